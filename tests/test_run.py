"""Stages of training: what a stage begins with is set by its seed, and an interrupted one leaves nothing behind."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from innerloop import Cot, Slr
from innerloop.errors import InputError, InputNote
from innerloop.tasks import Chain, Plain
from innerloop.text.examples import write_examples
from innerloop.train.callbacks import StopOnInterrupt
from innerloop.train.recipe import BackboneChoice, Recipe
from innerloop.train.run import build, prepare_stage, run_recipe
from tests.close import assert_close
from tests.models import chain_examples, saved, tiny_model

SCRATCH = {"type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
DRAWN = {
    "decoder": Slr(n_slots=2, decoder={"kind": "separate", "table": "own"}),
    "classifier": Slr(n_slots=2, decoder={"kind": "linear", "classes": ("0", "1", "2", "3", "4")}),
    "lora": Slr(n_slots=2, loop={"lora": "per_iter"}),
    "gate": Slr(n_slots=2, loop={"residual": "C"}),
}


@pytest.fixture(params=["scratch", "model"])
def start(request, tmp_path: Path) -> dict[str, object]:
    """What a backbone begins with."""
    if request.param == "scratch":
        return {"scratch": SCRATCH}
    return {"model": str(saved(tiny_model(Slr(n_slots=2)), tmp_path / "start"))}


@pytest.mark.parametrize("method", DRAWN.values(), ids=DRAWN.keys())
def test_what_the_method_draws_is_set_by_the_seed_whatever_ran_before(method, start, tmp_path: Path):
    def parts(seed: int) -> list[torch.Tensor]:
        settings = {"seed": seed, "max_steps": 1, "use_cpu": True, "batch_size": 4}
        recipe = Recipe(Chain(n_ops=3), BackboneChoice(**start), method, settings, str(tmp_path))
        model = prepare_stage(recipe, tmp_path / "out", None, list(chain_examples(8)), None, []).model
        return [p for part in model.trained_modules().values() for p in part.parameters()]

    first, again, other = parts(0), parts(0), parts(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert any(not torch.equal(a, b) for a, b in zip(first, other))


def test_the_kernels_of_attention_may_be_chosen(start):
    examples, method = list(chain_examples(4)), Slr(n_slots=2)
    usual, eager = (build(BackboneChoice(**start, attention=kind), method, examples) for kind in ("sdpa", "eager"))
    assert usual.backbone.config._attn_implementation == "sdpa"
    assert eager.backbone.config._attn_implementation == "eager"
    for one, other in zip(usual.answer_logits(examples), eager.answer_logits(examples)):
        assert_close(one, other)
    if find_spec("flash_attn") is None:
        with pytest.raises(InputError, match=r"attention=flash_attention_2 cannot be used here.*choose sdpa or eager"):
            build(BackboneChoice(**start, attention="flash_attention_2"), method, examples)


def test_an_interruption_leaves_neither_a_checkpoint_nor_a_line_of_the_log(tmp_path: Path, monkeypatch):
    """Asked to stop after steps 1 and 4, the run has the files and losses of one that nobody interrupted."""

    def stop_after(step: int | None) -> None:
        monkeypatch.setattr(
            StopOnInterrupt,
            "on_step_begin",
            lambda self, args, state, control, **_: setattr(self, "asked", state.global_step + 1 == step),
        )

    def run(name: str, resume: bool = False) -> Path:
        train = {"max_steps": 5, "batch_size": 2, "use_cpu": True, "logging_steps": 1, "save_steps": 2}
        task, backbone = Chain(n_ops=2, n_train=16), BackboneChoice(scratch=SCRATCH | {"hidden_size": 16})
        return run_recipe(Recipe(task, backbone, Slr(n_slots=2), train, str(tmp_path / name)), resume)

    def logged(folder: Path) -> list[dict[str, float]]:
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    stop_after(None)
    whole = run("whole")
    for n, step in enumerate((1, 4)):
        stop_after(step)
        cut = run("cut", resume=n > 0)
        assert (cut / f"checkpoint-{step}").exists() and not any("train_loss" in line for line in logged(cut))
    stop_after(None)
    cut = run("cut", resume=True)
    left, kept = (sorted(path.name for path in folder.glob("checkpoint-*")) for folder in (cut, whole))
    assert left == kept == ["checkpoint-4", "checkpoint-5"]
    *ours, last = logged(cut)
    *theirs, end = logged(whole)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs]) and len(ours) == 5
    assert "train_runtime" in last and "train_loss" not in last
    assert end["train_loss"] == pytest.approx(sum(line["loss"] for line in theirs) / 5)


def test_questions_that_are_trained_on_and_measured_are_counted(tmp_path: Path):
    write_examples(chain_examples(6), tmp_path / "all.jsonl")
    task = Plain(*[str(tmp_path / "all.jsonl")] * 3)
    recipe = Recipe(
        task, BackboneChoice(scratch=SCRATCH), Cot(), {"max_steps": 1, "use_cpu": True}, str(tmp_path / "run")
    )
    with pytest.warns(InputNote) as notes:
        run_recipe(recipe)
    told = " ".join(str(note.message) for note in notes)
    for pair in ("valid questions are also in train", "test questions are also in train"):
        assert f"6 of 6 {pair}" in told
