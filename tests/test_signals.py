"""A suite that is told to end, or is killed, leaves no worker behind; told to, it has saved what it had."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUITE = """
task: {name: chain, n_ops: 2, modulus: 5, n_train: 200, n_valid: 8, n_test: 8}
backbone: {scratch: {type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}}
train: {learning_rate: 1.0e-3, batch_size: 8, max_steps: 4000, logging_steps: 1, save_steps: 3000,
  save_strategy: steps, use_cpu: true}
variants: {cot: {method: cot}, no_cot: {method: no_cot}}
seeds: [0, 1]
out: OUT
"""


def workers_of(pid: int) -> list[int]:
    """Return the processes below a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return [*found, *(below for child in found for below in workers_of(child))]


def trains(out: Path) -> bool:
    """Whether a step has been logged."""
    return any('"loss"' in path.read_text() for path in out.rglob("metrics.jsonl"))


def are_gone(pids: list[int]) -> bool:
    """Whether no process of these runs; a dead one may wait for its parent."""
    alive = []
    for pid in pids:
        try:
            alive.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX")
        except OSError:
            continue
    return not any(alive)


def wait(until, seconds: float) -> bool:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.2)
    return until()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "number, to_all", [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGKILL, False)], ids=str
)
def test_no_worker_outlives_its_suite(number, to_all, tmp_path):
    """Also where all are asked to end at once, as `timeout` and job managers do; none of them ends in a traceback."""
    out = tmp_path / "suite"
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE.replace("OUT", str(out)))
    command = [sys.executable, "-m", "innerloop", "compare", str(path), "--workers", "2"]
    told = tmp_path / "told"
    with told.open("w") as stderr:
        suite = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        assert wait(lambda: trains(out), 300)
        below = workers_of(suite.pid)
        assert len(below) >= 2
        os.killpg(suite.pid, number) if to_all else suite.send_signal(number)
        assert wait(lambda: suite.poll() is not None, 60)
        if number == signal.SIGTERM:
            assert suite.returncode == 130 and "Traceback" not in told.read_text()
        assert wait(lambda: are_gone(below), 120)
    finally:
        if suite.poll() is None:
            os.killpg(suite.pid, signal.SIGKILL)
        suite.wait()
    states = [json.loads(path.read_text()) for path in out.rglob("trainer_state.json")]
    assert states or number == signal.SIGKILL
    assert len([*out.rglob("metrics.jsonl")]) <= 2  # no other point was begun
    assert all(0 < state["global_step"] < 4000 for state in states)
