"""Stage arithmetic, and the draws of stage mixing (coconut.md, sections 2, 5 and 9)."""

from collections import Counter

import pytest
from scipy.stats import chisquare

from innerloop import Coconut
from innerloop.config.curriculum import Curriculum
from innerloop.errors import InputError
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import Kind
from tests.models import spelled_tokenizer

N_DRAWS = 6000
SURELY = 1e-3  # p-values below this are failures; the seeds are fixed, so a test never flickers


def draws(curriculum: Curriculum, stage: int, n_steps: int) -> Counter[int]:
    return Counter(curriculum.stage_of(stage, n_steps, f"0/{i}") for i in range(N_DRAWS))


def p_value(counts: Counter[int], shares: list[float]) -> float:
    assert set(counts) <= set(range(len(shares)))
    total = sum(shares)
    expected = [N_DRAWS * share / total for share in shares]
    return chisquare([counts[i] for i in range(len(shares))], expected).pvalue


# The schedule


def test_coconuts_stages_over_25_epochs():
    method = Coconut(max_stage=3, latents_per_step=2, stage_length=3)
    stages = [method.stage_at(step=10 * e, steps_per_epoch=10) for e in range(25)]
    assert stages == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [4] * 13
    assert [method.n_latents(s) for s in stages] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6] + [6] * 13


def test_coconut_skips_as_many_steps_as_the_stage_and_in_the_last_all():
    method, spell = Coconut(), Speller(spelled_tokenizer())
    example = Example("q", ("s1",) * 5, "a")
    rows = [method.lay_out(example, spell, method.stage_at(e, 1)) for e in range(25)]
    skipped = [5 - sum(piece.kind == Kind.STEP for piece in row.pieces) for row in rows]
    assert skipped == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [5] * 13


def test_an_epoch_that_has_begun_counts_as_the_epoch():
    curriculum = Curriculum(max_stage=3)
    assert [curriculum.stage_at(step, 1000) for step in (2999, 3000, 3001, 5999)] == [0, 1, 1, 1]


def test_stages_may_be_counted_in_steps():
    curriculum = Curriculum(max_stage=2, stage_length=10, stage_unit="step")
    assert [curriculum.stage_at(step, steps_per_epoch=1) for step in (0, 9, 10, 19, 20, 29, 30, 1000)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]


def test_training_may_begin_in_a_later_stage():
    curriculum = Curriculum(max_stage=3, first_stage=2)
    assert [curriculum.stage_at(e, 1) for e in (0, 2, 3, 6, 60)] == [2, 2, 3, 4, 4]
    only_last = Curriculum(max_stage=3, first_stage=4)
    assert {only_last.stage_at(e, 1) for e in range(20)} == {4}


def test_a_method_without_a_curriculum_has_one_stage():
    curriculum = Curriculum()
    assert curriculum.last_stage == 0
    assert {curriculum.stage_at(step, 10) for step in range(100)} == {0}
    assert curriculum.stage_of(0, 5, "any") == 0


# Draws


def test_without_mixing_every_example_uses_the_scheduled_stage():
    assert draws(Curriculum(max_stage=4), 2, 9) == {2: N_DRAWS}


@pytest.mark.parametrize("stage", [1, 3, 5])
def test_linear_mixing_draws_stage_i_with_probability_proportional_to_i_plus_1(stage):
    counts = draws(Curriculum(max_stage=4, stage_mix="linear"), stage, 9)
    assert p_value(counts, [i + 1 for i in range(stage + 1)]) > SURELY


def test_uniform_mixing_draws_every_stage_alike():
    assert p_value(draws(Curriculum(max_stage=4, stage_mix="uniform"), 3, 9), [1] * 4) > SURELY


def test_the_distributions_can_be_told_apart():
    """The check itself: what is drawn linearly is not uniform."""
    assert p_value(draws(Curriculum(max_stage=4, stage_mix="linear"), 3, 9), [1] * 4) < 1e-20


@pytest.mark.parametrize("mix", ["none", "linear"])
def test_stage_0_mixes_with_nothing(mix):
    assert draws(Curriculum(max_stage=4, stage_mix=mix), 0, 9) == {0: N_DRAWS}


def test_uniform_prob_draws_from_zero_to_the_number_of_steps():
    curriculum = Curriculum(max_stage=6, uniform_prob=1.0)
    assert p_value(draws(curriculum, 5, n_steps=3), [1] * 4) > SURELY


def test_uniform_prob_mixes_with_the_scheduled_stage():
    curriculum = Curriculum(max_stage=6, uniform_prob=0.4)
    shares = [0.1, 0.1, 0.1, 0.1, 0.0, 0.6]
    counts = draws(curriculum, 5, n_steps=3)
    assert counts[4] == 0
    del shares[4]
    assert chisquare([counts[i] for i in (0, 1, 2, 3, 5)], [N_DRAWS * s for s in shares]).pvalue > SURELY


def test_uniform_prob_and_stage_mixing_together():
    curriculum = Curriculum(max_stage=6, uniform_prob=0.5, stage_mix="linear")
    # half from 0..1 alike, half from 0..2 as 1 : 2 : 3
    shares = [1 / 4 + 1 / 12, 1 / 4 + 2 / 12, 3 / 12]
    assert p_value(draws(curriculum, 2, n_steps=1), shares) > SURELY


def test_stages_past_the_last_are_the_last():
    curriculum = Curriculum(max_stage=2, uniform_prob=1.0)
    counts = draws(curriculum, 1, n_steps=9)  # of 0..9, those from 3 on have no text left either
    assert p_value(counts, [1, 1, 1, 7]) > SURELY


def test_an_example_without_steps_draws_stage_0():
    assert draws(Curriculum(max_stage=3, uniform_prob=1.0), 2, n_steps=0) == {0: N_DRAWS}


def test_the_same_seed_draws_the_same_stage_and_another_seed_another():
    curriculum = Curriculum(max_stage=4, stage_mix="linear", uniform_prob=0.3)

    def drawn(seed):
        return [curriculum.stage_of(4, 5, f"{seed}/{i}") for i in range(50)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_draws_do_not_depend_on_the_process():
    """Python's own hash of a string does; these were drawn once and written down."""
    curriculum = Curriculum(max_stage=4, stage_mix="linear")
    assert [curriculum.stage_of(4, 5, f"0/{i}") for i in range(10)] == [4, 3, 4, 4, 3, 0, 1, 2, 4, 3]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_stage": -1}, "max_stage"),
        ({"stage_length": 0}, "stage_length"),
        ({"max_stage": 3, "first_stage": 5}, "from 0 to 4"),
        ({"max_stage": 3, "first_stage": -1}, "from 0 to 4"),
        ({"first_stage": 1}, "from 0 to 0"),
        ({"uniform_prob": 1.5}, "probability"),
        ({"uniform_prob": -0.1}, "probability"),
        ({"stage_unit": "epochs"}, "stage_unit"),
        ({"stage_mix": "cubic"}, "stage_mix"),
        ({"reset_optimizer": "always"}, "reset_optimizer"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Curriculum(**settings)
