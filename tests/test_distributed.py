"""Two processes: a step is that of one with twice the batch, what is logged is of both, and both end together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from innerloop.cli import main as cli
from innerloop.methods import Mor, Slr
from innerloop.train import trainer as training
from innerloop.train.trainer import DivergedError
from tests.models import tiny_model
from tests.test_cli import RECIPE
from tests.test_grpo import G, by_length
from tests.test_grpo import make_trainer as reinforcing
from tests.test_trainer import TOLD, At, logged, make_trainer, uneven_examples

pytestmark = pytest.mark.slow
METHODS = {"simcot": TOLD, "mor": Mor(), "slr": Slr(n_slots=3, max_loops=2, step_weight=1.0)}
ROOT = Path(__file__).parents[1]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def launched(launcher: list[str], *command: object) -> str:
    """Start processes; return what they print."""
    words = [sys.executable, "-m", *launcher, *map(str, command)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train_all(folder: Path, batch_size: int, **settings) -> None:
    """Train each method for three steps."""
    for name, method in METHODS.items():
        model, examples = tiny_model(method), uneven_examples()
        make_trainer(folder / name, model, examples, batch_size=batch_size, max_steps=3, **settings).train()


def reinforce(folder: Path, batch_size: int) -> None:
    """Reinforce a model for three steps of two micro-batches."""
    settings = {"gradient_accumulation_steps": 2, "beta": 0.1, "max_steps": 3, "scale_rewards": "batch"}
    model = tiny_model(Slr(n_slots=2, max_loops=3, stop={"rule": "halt"}))
    reinforcing(folder, model, [by_length], batch_size=batch_size, **settings).train()


def of_two(folder: Path) -> None:
    """What each of two processes does."""
    train_all(folder, 8)
    train_all(folder / "micro", 8, loss_norm="micro")
    rank = int(os.environ["RANK"])
    reinforce(folder / "grpo", 2 * G)
    limit, training.DIVERGED = training.DIVERGED, 0.7  # of an untrained model the loss is about that of guessing
    told = "it went on"
    try:
        make_trainer(folder / "diverged", tiny_model(TOLD), uneven_examples(), batch_size=8).train()
    except DivergedError as error:
        told = str(error)
    (folder / f"told_{rank}").write_text(told)
    training.DIVERGED = limit
    ends = [At(3, lambda *_: os.kill(os.getpid(), signal.SIGTERM))] if rank == 1 else []
    ended = make_trainer(folder / "ended", tiny_model(TOLD), uneven_examples(), callbacks=ends, batch_size=8)
    ended.train()
    (folder / f"step_{rank}").write_text(str(ended.state.global_step))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "run.py").write_text(
        f"from pathlib import Path\nfrom {__name__} import of_two\nof_two(Path(__file__).parent)"
    )
    launched(TORCHRUN, folder / "run.py")
    return folder


def numbers(folder: Path) -> list[dict[str, float]]:
    """All that is logged of the steps, but for times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_all_that_is_logged_is_that_of_one_process_with_twice_the_batch(two: Path, tmp_path: Path):
    train_all(tmp_path, 16)
    for name in METHODS:
        for line, expected in zip(numbers(two / name), numbers(tmp_path / name), strict=True):
            exact = [term for term in line if term.startswith("loss")]
            assert [line[t] for t in exact] == pytest.approx([expected[t] for t in exact], rel=1e-5), name
            assert line == pytest.approx(expected, rel=1e-2), name  # of micro-batches, whose tokens are not as many
    assert {"loss_answer", "loss_aux"} <= numbers(two / "simcot")[0].keys()


def test_reinforcement_draws_and_learns_what_one_process_does(two: Path, tmp_path: Path):
    reinforce(tmp_path, 4 * G)
    for line, expected in zip(numbers(two / "grpo"), numbers(tmp_path), strict=True):
        known = [name for name in expected if name != "rollout_share"]  # which is of seconds
        assert {"kl", "clip_ratio"} <= {*known}
        assert line["completion_length"] == expected["completion_length"] and line["n_loops"] == expected["n_loops"]
        for name in known:  # a norm of gradients in fp32, through loops, is rounded more
            assert line[name] == pytest.approx(expected[name], rel=1e-3 if name == "grad_norm" else 1e-4), name


def test_the_means_of_micro_batches_are_of_both_processes(two: Path):
    for name in ("simcot", "slr"):
        for line in numbers(two / "micro" / name):
            terms = [value for term, value in line.items() if term.startswith("loss_")]
            assert sum(terms) == pytest.approx(line["loss"], rel=1e-5) and len(terms) == 2


def test_a_loss_that_goes_wrong_is_seen_as_it_is_by_both(two: Path):
    told = {(two / f"told_{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1 and "training stopped at step 1: the loss of text is" in told.pop()


def test_a_signal_to_one_ends_both_after_the_same_step_with_a_checkpoint(two: Path):
    assert {(two / f"step_{rank}").read_text() for rank in (0, 1)} == {"4"}
    assert (two / "ended" / "checkpoint-4" / "trainer_state.json").exists()


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_a_recipe_of_two_stages_is_trained_and_told_once(launcher: list[str], tmp_path: Path, capfd):
    for name, batch_size in (("two", 4), ("one", 8)):
        settings = {**RECIPE["train"], "batch_size": batch_size, "eval_strategy": "epoch", "num_train_epochs": 1}
        recipe = RECIPE | {"train": settings, "out": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    out = launched(launcher, *(["-m"]), "innerloop", "train", tmp_path / "two.yaml")
    assert out.count("the trained model is in") == 1 and out.count("2/2 slr:  2/2") == 1
    assert cli.main(["train", str(tmp_path / "one.yaml")]) == 0
    for stage in ("stages/1", "."):
        both = [logged(tmp_path / name / stage) for name in ("two", "one")]
        assert both[0] == pytest.approx(both[1], rel=1e-5) and len(both[0]) == 2
    assert (tmp_path / "two" / "finished").exists()


def test_two_processes_that_are_killed_are_let_alone_while_they_run_and_resumed_to_the_same_weights(tmp_path: Path):
    train = {"max_steps": 80, "batch_size": 4, "use_cpu": True, "logging_steps": 1, "save_steps": 5}
    recipe = {**RECIPE, "stages": None, "method": {"name": "pause", "n_pauses": 1}, "train": train}
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "out": str(tmp_path / name)}))
    command = [sys.executable, "-m", *TORCHRUN, "-m", "innerloop", "train", str(tmp_path / "killed.yaml")]
    alone = [sys.executable, "-m", "innerloop", "train", str(tmp_path / "killed.yaml"), "--resume"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=ENVIRONMENT, **quiet) as processes:
        while not (tmp_path / "killed" / "checkpoint-5").exists():
            assert processes.poll() is None
            time.sleep(0.002)
        everyone = [*psutil.Process(processes.pid).children(recursive=True), psutil.Process(processes.pid)]
        for one in everyone:
            one.suspend()  # so that they cannot come to their end meanwhile
        refused = subprocess.run(alone, env=ENVIRONMENT, capture_output=True, text=True)
        for one in everyone:
            one.kill()
    assert refused.returncode == 2 and "is being written by process" in refused.stderr
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert not (killed / "finished").exists()
    launched(TORCHRUN, "-m", "innerloop", "train", tmp_path / "killed.yaml", "--resume")
    launched(TORCHRUN, "-m", "innerloop", "train", tmp_path / "whole.yaml")
    assert numbers(killed) == numbers(whole) and len(numbers(whole)) == 80
    for name in ("model.safetensors", "innerloop.safetensors"):
        assert (killed / "checkpoint" / name).read_bytes() == (whole / "checkpoint" / name).read_bytes()
