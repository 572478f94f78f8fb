"""Everything that is to be measured on a GPU, in one call of at most ten minutes, into one file.

Each point is a script of this folder in a process of its own; what came out is written at once, and a script that
fails, or runs out of time, costs its own point alone. Run again with the same file, only what is missing is measured.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --smoke --out /tmp/gpu.json      # that it runs; measures nothing
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

LARGE = ("--shape", "llama-1b")
POINTS: dict[str, tuple[str, ...]] = {  # what users feel first comes first
    "peers": (*LARGE, "--static", "--repeats", "3"),  # against generate, with a static cache and compiled too
    "compiled": (*LARGE, "--batch_sizes", "1"),  # a captured pass against its memory floor
    "latent_against_text": (*LARGE, "--batch_sizes", "1", "8", "--repeats", "3"),  # chains of 60 and 200 tokens
    "canvases": (*LARGE, "--repeats", "3"),
    "halting": (*LARGE,),
    "training": ("--shape", "gpt2", "--repeats", "3"),
    "shared_prefix": (),
}


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.5, help="of all points together")
    parser.set_defaults(device="cuda", dtype="bfloat16")
    options = record.begin(parser)
    ends = time.monotonic() + 60 * options.minutes
    known = json.loads(options.out.read_text())["points"] if options.out.exists() else {}
    found = {name: point for name, point in known.items() if "failed" not in point}
    for name, arguments in POINTS.items():
        if name not in found:
            found[name] = measured(options, name, arguments, ends - time.monotonic())
            record.write(options, "gpu", {"points": found})
    if failed := [f"{name}: {point['failed']}" for name, point in found.items() if "failed" in point]:
        raise SystemExit("\n".join(failed))


def measured(options, name: str, arguments: tuple[str, ...], seconds: float) -> dict:
    """Return what a script measured, or why it did not."""
    if seconds <= 0:
        return {"failed": "no time was left"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        asked = [
            "--device",
            str(options.device),
            "--dtype",
            str(options.dtype).removeprefix("torch."),
            "--out",
            str(out),
        ]
        asked += ["--seed", str(options.seed), *(["--smoke"] if options.smoke else [])]
        command = [sys.executable, str(record.ROOT / "benchmarks" / f"{name}.py"), *asked, *arguments]
        begin = time.monotonic()
        try:
            ran = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {seconds:.0f} s"}
        if ran.returncode != 0 or not out.exists():
            return {"failed": ran.stderr.strip().splitlines()[-1] if ran.stderr.strip() else f"rc {ran.returncode}"}
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()
