"""Evaluation in parts: in processes, on a cluster; result.json is that of one process but for times."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from innerloop import Llada, Slr
from innerloop.engine.test_time import TestTimeCompute
from innerloop.measure.accuracy import evaluate
from innerloop.measure.shards import parts_of, put_together
from innerloop.tasks import Chain
from tests.methods.tools import sharp_model
from tests.models import tiny_model
from tests.ray_cluster import two_nodes
from tests.test_cli import innerloop

TASK = Chain(n_ops=2, n_train=64, n_valid=8, n_test=9)
METHODS = {"slr": Slr(n_slots=3, max_loops=3), "llada": Llada(gen_length=8)}
DRAWN = {"attempts": TestTimeCompute(samples=3, temperature=1.0), "seed": 5}


@cache
def made(name):
    return (sharp_model if name == "slr" else tiny_model)(METHODS[name]).eval()


def without_times(one):
    return {k: without_times(v) for k, v in one.items() if k != "seconds"} if isinstance(one, dict) else one


def lines(predictions):
    return [(p.id, p.text, p.samples, p.cost.passes, p.cost.positions, round(p.cost.flops)) for p in predictions]


@pytest.mark.parametrize("n", [1, 2, 4, 20])
@pytest.mark.parametrize("how", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", METHODS)
def test_an_example_is_answered_alike_in_whatever_part_it_is(name, how, n):
    model, examples = made(name), TASK.examples("test")
    parts = parts_of(examples, n)
    asked = {"max_new_tokens": 8, **how}
    found = [evaluate(model, TASK, [examples[i] for i in part], places=part, **asked) for part in parts]
    assert lines(put_together(parts, found)) == lines(evaluate(model, TASK, examples, **asked))


def test_what_asks_the_same_is_in_one_part_and_no_part_is_empty():
    examples = TASK.examples("test")[:3]
    parts = parts_of([*examples, examples[1], examples[1]], 4)
    assert parts == [[0], [1, 3, 4], [2]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Saved models, whose task is told when they are asked."""
    folder = tmp_path_factory.mktemp("runs")
    for name in METHODS:
        made(name).float().save_pretrained(folder / name)
    return folder


ASKED = ["--task", json.dumps({"name": "chain", "n_ops": 2, "n_train": 64, "n_valid": 8, "n_test": 9})]
ASKED += ["--max_new_tokens", "8", "--samples", "3", "--seed", "5"]


def results_of(folder: Path) -> tuple[dict, list]:
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return without_times(json.loads((folder / "result.json").read_text())), list(map(without_times, predictions))


def by_processes(n: int, *arguments: object) -> str:
    """Let processes evaluate together; return what they print."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n, "-m", "innerloop"]
    done = subprocess.run([*map(str, (*words, "eval", *arguments))], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_and_four_processes_write_the_result_of_one(run: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # which result.json tells
    for name, several in {"slr": (2, 4), "llada": (2,)}.items():
        asked = [run / name, *ASKED, "--device", "cpu", "--out"]
        assert innerloop(capsys, "eval", *asked, tmp_path / name)[0] == 0
        for n in several:
            out = by_processes(n, *asked, tmp_path / f"{name}{n}")
            assert out.count("chain/test: accuracy") == 1
            assert results_of(tmp_path / f"{name}{n}") == results_of(tmp_path / name)
    assert "measured before: accuracy" in by_processes(2, *asked, tmp_path / f"{name}2")


@pytest.mark.slow
def test_a_cluster_of_two_nodes_writes_the_result_of_one_process(run: Path, tmp_path: Path, monkeypatch, capsys):
    with two_nodes(monkeypatch):
        for name in METHODS:
            asked = ["eval", run / name, *ASKED, "--device", "cpu", "--out"]
            for place in ("ray", "local"):
                code, out, err = innerloop(capsys, *asked, tmp_path / name / place, "--on", place)
                assert code == 0 and "accuracy" in out, err
            assert results_of(tmp_path / name / "ray") == results_of(tmp_path / name / "local")
        for rule in ("delta", "mlp_probe"):  # the second has weights
            reports = []
            for place in ("ray", "local"):
                asked = [*ASKED[:2], "--rule", rule, "--device", "cpu", "--out", tmp_path / rule / place, "--on", place]
                assert innerloop(capsys, "calibrate", run / "slr", *asked)[0] == 0
                report = json.loads((tmp_path / rule / place / "calibration.json").read_text())
                reports.append({name: value for name, value in report.items() if name not in ("seconds", "device")})
            assert reports[0] == reports[1]
        compared = {}
        for place in ("ray", "local"):
            asked = ["compare", *(run / name for name in METHODS), *ASKED[:2], "--timed", 0, "--on", place]
            assert innerloop(capsys, *asked, "--out", tmp_path / place)[0] == 0
            compared[place] = json.loads((tmp_path / place / "results.json").read_text())["points"]
        assert list(map(without_times, compared["ray"])) == list(map(without_times, compared["local"]))
