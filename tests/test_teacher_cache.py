"""A teacher's states on disk: what they are, and when a file is refused."""

from pathlib import Path

import pytest
import torch

from innerloop import LatentModel
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError
from innerloop.methods import SpiralThinker
from innerloop.model.teacher_cache import TeacherCache, positions
from innerloop.text.row import Row
from tests.close import assert_close
from tests.methods.tools import MIXED, change
from tests.models import tiny_model

STUDENT = SpiralThinker(latents_per_block=2, max_loops=2, hid={"weight": 1.0, "teacher": "-"})
OTHER = {"other data": MIXED[:4], "other positions": MIXED}


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return tiny_model(STUDENT, "gpt2", num_hidden_layers=2)


def teacher(seed: int = 5) -> Backbone:
    return tiny_model(SpiralThinker(pattern="none"), "gpt2", seed, num_hidden_layers=2).backbone


def cache(path: Path, rows: list[Row], backbone: Backbone | None = None) -> TeacherCache:
    return TeacherCache(path, rows, backbone or teacher(), pad_id=0, batch_size=2)


def assert_holds_the_states(found: TeacherCache, rows: list[Row]) -> None:
    """Every state that a row follows is that of the bare teacher on the row alone."""
    lm = teacher().lm
    for row in rows:
        with torch.no_grad():
            layers = lm(torch.tensor([row.teacher.ids()]), output_hidden_states=True).hidden_states
        states = found.states_of(row)
        assert sorted(states) == positions(row)
        for at, state in states.items():
            assert_close(state, torch.stack([layer[0, at] for layer in layers]))


def test_states_are_the_teachers_also_when_the_data_come_in_another_order(model, tmp_path: Path):
    rows = model.rows(MIXED)
    assert_holds_the_states(cache(tmp_path / "states", rows), rows)
    for again in (rows, rows[::-1], rows[2:] + rows[:2]):
        assert_holds_the_states(cache(tmp_path / "states", again), rows)


@pytest.mark.parametrize("what", ["other weights", *OTHER])
def test_a_stale_file_is_refused_and_left_alone(what, model, tmp_path: Path):
    path, rows = tmp_path / "states", model.rows(MIXED)
    cache(path, rows)
    before = path.read_bytes()
    if what == "other weights":
        backbone = teacher()
        with torch.no_grad():
            next(backbone.lm.parameters())[0, 0] += 1e-3
    else:
        backbone, method = teacher(), change(STUDENT, pattern="even" if what == "other positions" else "odd")
        rows = [method.lay_out(example, model.encoder, 0) for example in OTHER[what]]
    with pytest.raises(InputError, match="of another teacher, other data or another method; delete the file"):
        cache(path, rows, backbone)
    assert path.read_bytes() == before


def test_a_file_is_used_where_it_is_there_and_refused_where_it_holds_something_else(model, tmp_path: Path):
    rows = model.rows(MIXED)
    (tmp_path / "other").write_text("no states")
    with pytest.raises(InputError, match="delete it"):
        cache(tmp_path / "other", rows)
    cache(tmp_path / "states", rows)
    backbone = teacher()
    backbone.decoder.register_forward_pre_hook(lambda *_: pytest.fail("the teacher was run"))
    cache(tmp_path / "states", rows, backbone)
