"""What all benchmarks take (--out, --smoke, --device, --dtype, --threads, --seed), and what their files say of it."""

import argparse
import json
import subprocess
from pathlib import Path

import torch

from innerloop.measure.accuracy import device_name, versions

ROOT = Path(__file__).parents[1]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the parser of a script with a docstring, whose first line says what it does."""
    options = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    options.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs; measures nothing")
    options.add_argument("--device", default="cpu", help="cpu or cuda")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--threads", type=int, help="threads of a CPU; by default as many as torch takes")
    options.add_argument("--seed", type=int, default=0, help="of weights and questions")
    options.add_argument("--repeats", type=int, help="timed turns; by default the script's own")
    return options


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options and set threads and seed."""
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.device, options.dtype = torch.device(options.device), getattr(torch, options.dtype)
    return options


def write(options: argparse.Namespace, kind: str, report: dict) -> None:
    """Write a report with what produced it."""
    head = {
        "kind": kind,
        "smoke": options.smoke,
        "seed": options.seed,
        "dtype": str(options.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "device": device_name(options.device),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(head | report, indent=1) + "\n")
    print(options.out)


def commit() -> str | None:
    """Return the commit of this checkout, with -dirty where files differ from it; None outside of one."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None
