"""Runs that were killed, damaged or disturbed: resumed they are those of an uninterrupted one, or say why not."""

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from innerloop import LatentModel, Pause
from innerloop.disk.folders import MANIFEST
from innerloop.errors import InputError
from innerloop.tasks import Chain
from innerloop.train.recipe import BackboneChoice, Recipe
from innerloop.train.run import run_recipe

SCRATCH = {"type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TRAIN = {"max_steps": 4, "batch_size": 2, "use_cpu": True, "logging_steps": 1, "save_steps": 2}


def run(out: Path, resume: bool = False, callbacks=(), **train) -> Path:
    task = Chain(n_ops=2, n_train=30, n_valid=4)  # 15 steps an epoch
    recipe = Recipe(task, BackboneChoice(scratch=SCRATCH), Pause(n_pauses=1), {**TRAIN, **train}, str(out))
    return run_recipe(recipe, resume, lambda stage, title: callbacks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that came to its end."""
    return run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A copy of it, to harm."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def weights(run: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in LatentModel.from_pretrained(run).parameters()])


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


class Count(TrainerCallback):
    """Counts steps."""

    steps = 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1


@pytest.mark.parametrize("lost", [["finished"], ["finished", "checkpoint"]], ids=["mark", "result"])
def test_a_run_killed_after_its_last_save_trains_no_further(lost, copy, whole):
    (copy / "finished").unlink()
    if "checkpoint" in lost:
        shutil.rmtree(copy / "checkpoint")
    count = Count()
    run(copy, resume=True, callbacks=[count])
    assert count.steps == 0 and (copy / "finished").exists()
    assert checkpoints(copy) == ["checkpoint-2", "checkpoint-4"]
    assert torch.equal(weights(copy), weights(whole))


@pytest.mark.parametrize("at", ["written", "unsealed", "unrotated"])
def test_what_a_kill_leaves_of_a_checkpoint_is_finished_or_removed(at, copy, whole):
    (copy / "finished").unlink()
    if at == "unrotated":
        shutil.copytree(copy / "checkpoint-2", copy / "checkpoint-1")
    else:
        (copy / "checkpoint-4").rename(copy / ".checkpoint-4.innerloop.writing")
        if at == "unsealed":
            (copy / ".checkpoint-4.innerloop.writing" / MANIFEST).unlink()
    (copy / ".checkpoint-3.innerloop.writing").mkdir()
    count = Count()
    run(copy, resume=True, callbacks=[count], save_steps=9)
    assert count.steps == (2 if at == "unsealed" else 0) and torch.equal(weights(copy), weights(whole))
    assert checkpoints(copy) == ["checkpoint-2", "checkpoint-4"] and not [*copy.glob(".checkpoint*")]


def test_a_validation_that_a_kill_prevented_is_made_up_for(tmp_path, monkeypatch):
    """The save of an epoch's last step comes before the validation at the epoch's end."""
    monkeypatch.setattr("innerloop.train.trainer.accuracy_of", lambda predictions: 0.5)
    settings = {"max_steps": 45, "save_steps": 15, "eval_strategy": "epoch", "logging_steps": 15, "save_total_limit": 9}
    evaluate, n = "innerloop.train.trainer.evaluate", []
    kept = (run(tmp_path / "whole", **settings) / "metrics.jsonl").read_text().count("eval_accuracy")

    def killed(*_):
        n.append(1)
        if len(n) in (2, 4):
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(evaluate, killed)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", resume, **settings)
    run(tmp_path / "cut", True, **settings)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text().count("eval_accuracy") == kept == 3
    assert torch.equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


HARMS = {
    "state": lambda newest: cut(newest / "trainer_state.json"),
    "weights": lambda newest: cut(newest / "model.safetensors"),
    "optimizer": lambda newest: (newest / "optimizer.pt").unlink(),
    "draws": lambda newest: (newest / "rng_state.pth").unlink(),
    "config": lambda newest: (newest / "config.json").write_text("{}"),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_of_the_checkpoints_the_newest_whole_one_is_gone_on_from(harm, copy, whole, capsys):
    (copy / "finished").unlink()
    harm(copy / "checkpoint-4")
    count = Count()
    run(copy, resume=True, callbacks=[count])
    said = capsys.readouterr().out
    assert count.steps == 2 and said.startswith(f"going on from {copy / 'checkpoint-2'}, as checkpoint-4 is damaged (")
    assert torch.equal(weights(copy), weights(whole)) and checkpoints(copy) == ["checkpoint-2", "checkpoint-4"]


def test_without_a_whole_checkpoint_a_run_is_not_resumed_and_nothing_is_written(copy):
    (copy / "finished").unlink()
    for name in ("checkpoint-2", "checkpoint-4"):
        (copy / name / MANIFEST).unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole: checkpoint-4 is damaged \(it has no manifest"):
        run(copy, resume=True, max_steps=9)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == {
        **before,
        copy / ".run.lock": b"",
    }


@pytest.mark.parametrize("text", ["", '{"step": 1, "loss": 2.0}\n{"st', "[]\n"])
def test_a_log_that_a_kill_cut_short_is_gone_on_with(text, copy):
    (copy / "finished").unlink()
    shutil.rmtree(copy / "checkpoint-4")
    (copy / "metrics.jsonl").write_text(text)
    run(copy, resume=True)
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    assert [line[:10] for line in lines][-3:] == ['{"step": 3', '{"step": 4', '{"step": 4']


@pytest.mark.parametrize("name", ["checkpoint/precious", "checkpoint-1/precious", "metrics.jsonl", "stages/precious"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_files_of_somebody_else_is_not_taken(resume, name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for _ in range(2):
        with pytest.raises(InputError, match="was not written by a run of innerloop"):
            run(tmp_path, resume)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_what_others_put_into_checkpoints_stays(tmp_path):
    class Notes(TrainerCallback):
        def on_save(self, args, state, control, **_):
            (tmp_path / f"run/checkpoint-{state.global_step}/notes").write_text("mine")

    run(tmp_path / "run", save_steps=1, save_total_limit=1, callbacks=[Notes()])
    assert [len(list(path.iterdir())) > 1 for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == [
        False,
        False,
        False,
        True,
    ]
    assert len(list((tmp_path / "run").glob("checkpoint-*/notes"))) == 4


def test_checkpoints_are_counted_by_step_whatever_the_clock_says(tmp_path):
    class BackwardClock(TrainerCallback):
        def on_save(self, args, state, control, **_):
            time = 2_000_000_000 - 100 * state.global_step
            os.utime(tmp_path / f"run/checkpoint-{state.global_step}", (time, time))

    run(tmp_path / "run", save_steps=1, callbacks=[BackwardClock()])
    assert checkpoints(tmp_path / "run") == ["checkpoint-3", "checkpoint-4"]


def test_a_full_disk_ends_a_run_in_one_sentence_and_leaves_nothing_half(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))

    try:
        with pytest.raises(InputError, match=r"could not save .*checkpoint-4 .*; .*checkpoint-2 is untouched"):
            run(tmp_path / "run", callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".run.lock",
        "checkpoint-2",
        "config.yaml",
        "metrics.jsonl",
    ]
    assert run(tmp_path / "run", resume=True).joinpath("finished").exists()


def test_a_recipe_of_a_run_that_was_cut_is_named_and_nothing_is_written(copy):
    (copy / "config.yaml").write_text("task: {name: chain}\n")
    before = sorted(path.stat().st_mtime_ns for path in copy.rglob("*"))
    with pytest.raises(InputError, match=f"^{copy}/config.yaml: the recipe has no 'backbone' section"):
        run(copy, resume=True)
    assert sorted(path.stat().st_mtime_ns for path in copy.rglob("*")) == before


@pytest.mark.parametrize("inside", ["checkpoint", "checkpoint/mine", "checkpoint-4", "stages/1"])
def test_no_run_is_trained_inside_what_another_writes(inside, copy):
    before = sorted(copy.rglob("*"))
    with pytest.raises(InputError, match=rf"{inside} lies inside .*, which the run {copy} writes: choose another"):
        run(copy / inside)
    assert sorted(copy.rglob("*")) == before
    assert (run(copy / "mine", max_steps=1) / "finished").exists()  # beside it there is room


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_to_is_one_sentence():
    with pytest.raises(InputError, match=r"cannot write a run to /proc/.*/run: .*; choose another folder with --out"):
        run(Path("/proc/self/run"))
