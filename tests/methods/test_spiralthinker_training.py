"""SpiralThinker's two stages in training: the explicit teacher on disk, and the student that follows it."""

from pathlib import Path

import pytest
import torch

from innerloop import Example, LatentModel
from innerloop.errors import InputError
from innerloop.methods import SpiralThinker
from tests.close import assert_close
from tests.methods.spiralthinker_reference import ALIGNED, SPIRAL
from tests.methods.tools import MIXED, change
from tests.models import chain_examples, moved, tiny_model
from tests.test_trainer import assert_goes_on_as_if_uninterrupted, logged, make_trainer, weights

UNEVEN = [Example(e.question, e.steps[: i % 4], e.answer, e.id) for i, e in enumerate(chain_examples(32, 3))]
BLOCKS = change(SPIRAL, hid={"weight": 1.0, "teacher": "-"})
by_schedule = pytest.mark.parametrize("schedule", ["parallel", "sequential"])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """The folder of a stage-1 run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    moved(tiny_model(SpiralThinker(pattern="none"), "gpt2")).save_pretrained(folder)
    return str(folder)


def followed(folder: Path, method: SpiralThinker, teacher: str, **settings) -> LatentModel:
    """Train a student for a few steps."""
    model = LatentModel.from_pretrained(teacher, change(method, hid={"teacher": teacher}))
    make_trainer(folder, model, UNEVEN, **{"max_steps": 4, **settings}).train()
    return model


@by_schedule
@pytest.mark.parametrize("pattern", ["odd", "even", "random_parity", "all"])
def test_a_student_learns_from_text_and_from_its_teacher(pattern, schedule, teacher, tmp_path: Path):
    model = followed(tmp_path, change(BLOCKS, pattern=pattern, block_schedule=schedule), teacher)
    frozen = LatentModel.from_pretrained(teacher)
    assert all(torch.equal(*pair) for pair in zip(model.teacher.parameters(), frozen.backbone.parameters()))
    assert not torch.equal(model.loop.rescale.outer.weight, torch.zeros(()))
    answer, hid, loss = (torch.tensor(logged(tmp_path, f"loss{n}")) for n in ("_answer", "_hid", ""))
    assert_close(loss, answer + hid)


@by_schedule
@pytest.mark.parametrize("pattern", ["even", "random_parity", "random"])
@pytest.mark.slow
def test_states_on_disk_give_the_same_losses(pattern, schedule, teacher, tmp_path: Path):
    """Also for batches in which rows follow nothing: examples without steps, or with text alone."""
    method = change(BLOCKS, pattern=pattern, block_schedule=schedule)
    found = []
    for name, settings in (("run", {}), ("disk", {"teacher_cache": str(tmp_path / "states")})):
        torch.manual_seed(0)
        followed(tmp_path / name, method, teacher, batch_size=2, max_steps=8, **settings)
        found.append(logged(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_distances_of_any_scale_are_not_taken_for_divergence(teacher, tmp_path: Path):
    followed(tmp_path, change(BLOCKS, hid={"distance": "l1_sum"}), teacher, max_steps=2)
    assert logged(tmp_path, "loss_hid")[0] > 15


@by_schedule
def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(schedule, teacher, tmp_path: Path):
    """The parities of a resumed run are those of an uninterrupted one too."""
    method = change(BLOCKS, pattern="random_parity", block_schedule=schedule)

    def made(seed: int) -> LatentModel:
        model = LatentModel.from_pretrained(teacher, change(method, hid={"teacher": teacher}))
        return moved(model) if seed else model

    assert_goes_on_as_if_uninterrupted(tmp_path, made, UNEVEN, max_steps=6)


@by_schedule
def test_gradient_accumulation_takes_the_mean_over_the_global_batch(schedule, tmp_path: Path):
    method, found = change(SPIRAL, block_schedule=schedule), []
    for name, settings in (("one", {"batch_size": 8}), ("parts", {"batch_size": 2, "gradient_accumulation_steps": 4})):
        model = tiny_model(method)
        make_trainer(tmp_path / name, model, UNEVEN, max_steps=2, **settings).train()
        found.append((logged(tmp_path / name), weights(model)))
    assert_close(found[0], found[1], 1e-4)


@by_schedule
def test_a_saved_student_is_the_same(schedule, tmp_path: Path):
    model = moved(tiny_model(change(SPIRAL, block_schedule=schedule, loop={"width": 5, "gain": True})))
    model.save_pretrained(tmp_path / "run")
    loaded = LatentModel.from_pretrained(tmp_path / "run")
    assert loaded.method == model.method and loaded.loss(MIXED).loss == model.loss(MIXED).loss


def test_an_example_that_is_too_long_is_named(teacher, tmp_path: Path):
    """With its links and with what its teacher reads: it is refused before training, not in it."""
    long = Example("3 ; + 4", (" ".join(["3 + 4 = 2"] * 60),), "2", "long-one")
    for method in (change(BLOCKS, pattern="all"), change(ALIGNED, pattern="even")):
        with pytest.raises(InputError, match="example 'long-one' takes"):
            model = LatentModel.from_pretrained(teacher, change(method, hid={"teacher": teacher}))
            make_trainer(tmp_path, model, [*UNEVEN, long])
