"""What the first second costs: CPU time, wall time and peak memory of commands, each in a process of its own, in turns.

    python benchmarks/startup.py --threads 1 --out benchmarks/results/startup.json               # a minute or two
    python benchmarks/startup.py --smoke --threads 1 --out /tmp/startup.json                     # seconds

Commands that need no model stand beside a Python that does nothing; `ask`, on a run with random weights, beside one
that imports torch, transformers and the class of the run's model, which is the least that an answer needs. A small
process starts each command and waits for it, as the peak of a child is at least that of who starts it. The first turn
is not counted; it leaves bytecode behind, as an installation does.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import record
import subjects

from innerloop.bench.timing import Turn, spread, take_turns
from innerloop.methods import Slr

NOTHING, IMPORTS, ASK = "python, nothing", "python, torch and the model's class", "ask"
LIGHT = {"--help": ["--help"], "--version": ["--version"], "methods": ["methods"], "a typo": ["methds"]}
CODES = {"a typo": 2}
SLOW = ("torch", "transformers")
LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, used = os.wait4(child, 0)
print(json.dumps({"wall_s": time.perf_counter() - started, "cpu_s": used.ru_utime + used.ru_stime,
                  "peak_mib": used.ru_maxrss / 1024, "code": os.waitstatus_to_exitcode(status)}))
"""  # Linux counts ru_maxrss in KiB
MEASURES = ("cpu_s", "wall_s", "peak_mib")


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES), help="of the run that is asked")
    options = record.begin(parser)
    repeats = options.repeats or 5
    if options.smoke:
        options.shape, repeats = "smoke", 1
    environment = (
        dict(os.environ) if options.threads is None else os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    )
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_on(options, Path(folder) / "run")
        runs = {name: partial(run, name, command, environment) for name, command in commands.items()}
        turns = take_turns(runs, repeats)
        slow = {name: imported(command, environment) for name, command in commands.items()}
    points = [point(name, turns, slow[name]) for name in commands]
    for one in points:
        print(one, flush=True)
    record.write(options, "startup", {"shape": options.shape, "repeats": repeats, "points": points})


def commands_on(options, folder: Path) -> dict[str, list[str]]:
    """Save a run with random weights to a folder; return the commands by name, each after what it stands beside."""
    model = subjects.random_model(subjects.SHAPES[options.shape], Slr(), options.seed, options.device, options.dtype)
    model.save_pretrained(folder)
    (question,) = subjects.questions(model, 1, 20, options.seed)
    lm = type(model.backbone.lm)
    python, imports = sys.executable, f"import torch, transformers; from {lm.__module__} import {lm.__name__}"
    return {
        NOTHING: [python, "-c", "pass"],
        **{name: [python, "-m", "innerloop", *words] for name, words in LIGHT.items()},
        IMPORTS: [python, "-c", imports],
        ASK: [python, "-m", "innerloop", "ask", str(folder), question, "--max_new_tokens", "8"],
    }


def run(name: str, command: Sequence[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command; return what it took."""
    asked = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    found = subprocess.run(asked, env=environment, capture_output=True, text=True)
    used = json.loads(found.stdout)
    if used["code"] != CODES.get(name, 0):
        raise SystemExit(f"{name} ended with {used['code']}: {found.stderr.strip()[-300:]}")
    return used


def imported(command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """Return which of the slow libraries a command imports."""
    python, *words = command
    asked = subprocess.run([python, "-X", "importtime", *words], env=environment, capture_output=True, text=True)
    names = {line.rpartition("|")[2].strip() for line in asked.stderr.splitlines() if line.startswith("import time:")}
    return [name for name in SLOW if name in names]


def point(name: str, turns: dict[str, list[Turn[dict[str, float]]]], slow: list[str]) -> dict:
    """Return what a command took, and how many times the CPU time of what it stands beside, turn by turn."""
    beside = IMPORTS if name == ASK else NOTHING
    pairs = [(turn.result, other.result) for turn, other in zip(turns[name], turns[beside], strict=True)]
    measured = {measure: spread([own[measure] for own, _ in pairs]) for measure in MEASURES}
    times_cpu = spread([own["cpu_s"] / other["cpu_s"] for own, other in pairs])
    return {"command": name, "imports": slow, **measured, "beside": beside, "times_cpu": times_cpu}


if __name__ == "__main__":
    main()
