"""`innerloop bench`: turns, spreads, memory, the floor by hand, and what bench.json holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from innerloop.bench.bench import BenchSettings, bench, bench_lines, bench_table
from innerloop.bench.roofline import (
    COPY,
    MATMUL,
    READ,
    Ceilings,
    Rates,
    bytes_of,
    floor_of,
    least_calls,
    position_bytes,
)
from innerloop.bench.timing import Turn, ratio, spread, take_turns
from innerloop.cli import main as cli
from innerloop.decoder.cost import Cost
from innerloop.decoder.memory import peak_memory
from innerloop.errors import InputError
from innerloop.methods import Cot, Slr
from tests.models import chain_examples, saved, tiny_backbone, tiny_model

CHAIN = "{name: chain, n_ops: 2, n_train: 8, n_valid: 8, n_test: 16}"
QUESTIONS = [example.question for example in chain_examples(6)]
SMALL = BenchSettings(batch_sizes=(1, 4), repeats=3, questions=2, max_new_tokens=3)


class Clock:
    """A clock that runs moves on: each by so many seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds: list[float]) -> Callable[[], float]:
        left = iter(seconds)

        def run() -> float:
            self.now += next(left)
            return self.now

        return run


def test_runs_take_turns_forwards_and_backwards_and_warm_ups_are_not_counted():
    clock, order = Clock(), []
    jobs = {name: clock.job([100.0, 1.0 * k, 2.0 * k, 3.0 * k]) for name, k in (("a", 1), ("b", 4))}
    runs = {name: (lambda name=name: (order.append(name), jobs[name]())[1]) for name in jobs}
    turns = take_turns(runs, 3, clock)
    assert order == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert [turn.seconds for turn in turns["a"]] == [1.0, 2.0, 3.0]
    assert [turn.seconds for turn in turns["b"]] == [4.0, 8.0, 12.0]
    assert ratio(turns["b"], turns["a"]) == {"median": 4.0, "p10": 4.0, "p90": 4.0}
    assert [turn.result for turn in turns["a"]] == [201.0, 215.0, 218.0]
    with pytest.raises(InputError, match="at least one turn"):
        take_turns(runs, 0, clock)


def test_spreads_ratios_and_least_calls_on_hand_numbers():
    assert spread([5.0]) == {"median": 5.0, "p10": 5.0, "p90": 5.0}
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "p10": 1.0, "p90": 9.0}
    quiet, loud = [Turn(s, None) for s in (1.0, 10.0, 2.0)], [Turn(s, None) for s in (2.0, 20.0, 4.0)]
    assert ratio(loud, quiet) == {"median": 2.0, "p10": 2.0, "p90": 2.0}  # noise that hits both cancels
    assert [least_calls([3, 3, 3, 3], 2), least_calls([9, 1, 1, 1], 4), least_calls([], 4)] == [6, 9, 0]


def test_peak_memory_is_the_most_held_at_once():
    def run() -> None:
        first = torch.ones(2**18)  # 1 MiB
        second = torch.ones(2**19)  # 2 MiB more
        del first, second
        torch.ones(2**17)

    peak = peak_memory(run, torch.device("cpu"))
    assert 3 * 2**20 <= peak < 3 * 2**20 + 4096


def test_a_cost_tells_what_passes_found_in_the_cache_and_what_was_read_out():
    question = QUESTIONS[0]
    model = tiny_model(Cot())
    (one,) = model.generate([question], max_new_tokens=3)
    n = len(model.encoder.question(question).ids)
    assert one.cost.passes == 3 and one.cost.cached == 0 + n + (n + 1) and one.cost.logits == 3
    model = tiny_model(Slr(n_slots=4, max_loops=2))
    (one,) = model.generate([question], max_new_tokens=1)
    n += 1  # <bot>; two iterations, and the pass of h_T with <eot>, read on that
    assert one.cost.passes == 4 and one.cost.cached == 0 + 3 * n and one.cost.logits == 1


def test_floor_on_hand_numbers():
    backbone = tiny_backbone("llama", hidden_size=32, num_hidden_layers=2)  # 4 heads of 8, 2 of them for keys
    layers, head = sum(p.numel() for p in backbone.layers.parameters()), 64 * 32
    assert position_bytes(backbone) == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    costs = [Cost(passes=5, flops=1e6, cached=30, logits=3), Cost(passes=4, flops=2e6, cached=20, logits=2)]
    assert bytes_of(backbone, costs, 1) == 4 * (9 * layers + 5 * head) + 50 * 256
    assert bytes_of(backbone, costs, 2) == 4 * (5 * layers + 3 * head) + 50 * 256
    floor = floor_of(backbone, costs, 2, Rates([1e6, 3e6], [1e12, 5e11]))
    assert floor.compute_seconds == 1.0 and floor.seconds == 1.0 and floor.report()["bound"] == "compute"
    assert floor.memory_seconds == bytes_of(backbone, costs, 2) / 1e12
    slow = floor_of(backbone, costs, 2, Rates([3e6], [1.0]))
    assert slow.seconds == bytes_of(backbone, costs, 2) and slow.report()["bound"] == "memory"
    full = position_bytes(tiny_backbone("llama", head_dim=16))  # positions of layers with a window are left out
    assert (position_bytes(tiny_backbone("mistral")), position_bytes(tiny_backbone("gemma3")) * 3) == (0, full)


def test_ceilings_count_the_work_of_their_jobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("innerloop.bench.roofline.MATMUL_SIDE", {"cpu": 8})
    monkeypatch.setattr("innerloop.bench.roofline.COPY_BYTES", {"cpu": 4096})
    ceilings = Ceilings(torch.device("cpu"), torch.float32)
    for job in ceilings.jobs().values():
        job()
    assert torch.allclose(ceilings.product(), ceilings.left @ ceilings.linear.weight.T, atol=1e-6)
    assert bool((ceilings.target == 1).all())
    seconds = {MATMUL: (2.0, 1.0), COPY: (0.5, 1.0), READ: (1.0, 0.25)}
    rates = ceilings.rates({job: [Turn(s, None) for s in taken] for job, taken in seconds.items()})
    assert rates.flops == [2 * 8**3 / 2, 2 * 8**3] and rates.n_bytes == [2 * 4096 / 0.5, 4096 / 0.25]
    assert rates.report()["matmul_gflops"]["best"] == 1024 / 1e9


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show the ceilings by small jobs."""
    monkeypatch.setattr("innerloop.bench.roofline.MATMUL_SIDE", {"cpu": 64})
    monkeypatch.setattr("innerloop.bench.roofline.COPY_BYTES", {"cpu": 2**16})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    slr = tiny_model(Slr(n_slots=3, max_loops=2))
    return saved(slr, folder / "slr"), saved(tiny_model(Cot()), folder / "cot")


def test_a_report_agrees_with_the_answers_and_with_itself():
    models = {"run": tiny_model(Slr(n_slots=3, max_loops=2)), "baseline": tiny_model(Cot())}
    report = bench(models, QUESTIONS, SMALL)
    json.dumps(report)
    for name, model in models.items():
        points = report["models"][name]["points"]
        assert [(point["batch_size"], point["n"]) for point in points] == [(1, 2), (4, 4)]
        for point in points:
            found = model.generate(QUESTIONS[: point["n"]], max_new_tokens=3, batch_size=point["batch_size"])
            assert point["cost"]["passes"] == sum(g.cost.passes for g in found) / len(found)
            assert point["cost"]["flops"] * point["n"] == pytest.approx(point["floor"]["flops"])
            assert point["peak_mib"] > 0 and len(point["seconds"]) == 3
            latency, floor = point["latency_ms"], point["floor"]
            assert set(latency) == {"total", "prefill", "thought", "answer"}
            parts = sum(latency[phase]["median"] for phase in ("prefill", "thought", "answer"))
            assert parts < 1.2 * latency["total"]["p90"]
            assert floor["seconds"] == max(floor["compute_seconds"], floor["memory_seconds"])
            fastest, slowest = floor["seconds"] / min(point["seconds"]), floor["seconds"] / max(point["seconds"])
            assert slowest <= floor["share"]["p10"] <= floor["share"]["median"] <= floor["share"]["p90"] <= fastest
    assert [one["batch_size"] for one in report["ratios"]] == [1, 4]
    shown = "\n".join(bench_lines(report))
    assert "ceilings" in shown and "batch 4: the run is" in shown
    assert bench_table(report).row_count == 20


def test_ratios_come_from_the_turns(monkeypatch: pytest.MonkeyPatch):
    clock, models = Clock(), {"run": tiny_model(Cot()), "baseline": tiny_model(Cot(), seed=1)}
    takes = {id(models["run"]): 2.0, id(models["baseline"]): 3.0}

    def generate(self, questions, **options):
        clock.now += takes[id(self)] * len(questions)
        return real(self, questions, **options)

    real = type(models["run"]).generate
    monkeypatch.setattr(type(models["run"]), "generate", generate)
    jobs = {name: clock.job([1.0] * 4) for name in (MATMUL, COPY, READ)}
    monkeypatch.setattr(Ceilings, "jobs", lambda self: jobs)
    report = bench(models, QUESTIONS, SMALL, clock)
    for one in report["ratios"]:
        assert one["speedup"] == {"median": 1.5, "p10": 1.5, "p90": 1.5}
    point = report["models"]["baseline"]["points"][1]
    assert point["seconds"] == [12.0] * 3 and point["latency_ms"]["total"]["median"] == 12000.0
    assert point["examples_per_second"]["median"] == pytest.approx(1 / 3)
    assert report["ceilings"]["matmul_gflops"]["median"] == 2 * 64**3 / 1e9


def test_the_command_writes_bench_json_and_prints_a_table(runs: tuple[Path, Path], tmp_path: Path, capfd):
    slr, cot = runs
    arguments = ["--batch_sizes", "1,2", "--repeats", 2, "--questions", 2, "--max_new_tokens", 2, "--device", "cpu"]
    assert run("bench", slr, "--baseline", cot, "--task", CHAIN, *arguments) == 0
    out, err = capfd.readouterr()
    assert "ceilings" in out and "bench.json" in out and "prefill" in out and not err
    report = json.loads((slr / "bench.json").read_text())
    assert list(report) == ["kind", "task", "split", "settings", "models", "ratios", "ceilings", "dtype", "threads",
                            "seed", "versions", "device"]  # fmt: skip
    assert report["models"]["run"]["model"] == str(slr) and report["models"]["baseline"]["method"]["name"] == "cot"
    assert run("bench", slr, "--task", CHAIN, "--out", tmp_path / "a" / "b.json", *arguments) == 0
    alone = json.loads((tmp_path / "a" / "b.json").read_text())
    assert list(alone["models"]["run"]["points"][0]) == ["batch_size", "n", "latency_ms", "examples_per_second",
                                                        "seconds", "peak_mib", "cost", "floor"]  # fmt: skip
    assert "ratios" not in alone and list(alone["models"]) == ["run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch_sizes", "[0]"], "each at least 1"),
        (["--batch_sizes", "[2, 2]"], "give each once"),
        (["--repeats", 0], "--repeats is 0, but must be a whole number, at least 1"),
        (["--max_new_tokens", 0], "--max_new_tokens is 0, but must be a whole number"),
        (["--threads", 0], "--threads is 0, but must be a whole number, at least 1"),
        (["--baseline_method", "cot"], "there is none"),
        (["--batch_sizes", "[17]"], "there are 16"),
        (["--device", "tpu9"], "is no device"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--baseline", "nowhere"], "nowhere"),
        (["--out", "/"], "name a file"),
    ],
)
def test_bad_input_is_one_sentence(runs: tuple[Path, Path], arguments: list, message: str, capsys):
    assert run("bench", runs[0], "--task", CHAIN, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])
