"""Stage arithmetic, and the draws of stage mixing (coconut.md, sections 2, 5 and 9)."""

from collections import Counter
from collections.abc import Sequence

import pytest
from scipy.stats import chisquare

from innerloop import Coconut
from innerloop.config.curriculum import Schedule
from innerloop.errors import InputError
from innerloop.methods.latent.coconut import CoconutSchedule
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Kind
from tests.models import spelled_tokenizer

N_DRAWS = 6000
SURELY = 1e-3  # p-values below this are failures; the seeds are fixed, so a test never flickers


def of(**fields) -> Schedule:
    """Return a schedule of every option there is."""
    curriculum = CoconutSchedule(**{"max_stage": 0} | fields)
    curriculum.check(curriculum.last_stage)
    return curriculum


def draws(curriculum: Schedule, stage: int, n_steps: int) -> Counter[int]:
    last = curriculum.last_stage
    return Counter(curriculum.stage_of(stage, n_steps, f"0/{i}", last) for i in range(N_DRAWS))


def p_value(counts: Counter[int], shares: Sequence[float]) -> float:
    """Return how likely counts as unlike their shares are by chance."""
    likely = [i for i, share in enumerate(shares) if share > 0]
    expected = [N_DRAWS * shares[i] / sum(shares) for i in likely]
    return chisquare([counts[i] for i in likely], expected).pvalue


# The schedule


def test_coconuts_stages_over_25_epochs():
    method = Coconut(curriculum={"max_stage": 3, "length": 3}, latents_per_step=2)
    stages = [method.stage_at(step=10 * e, steps_per_epoch=10) for e in range(25)]
    assert stages == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [4] * 13
    assert [method.n_latents(s) for s in stages] == [0, 0, 0, 2, 2, 2, 4, 4, 4, 6, 6, 6] + [6] * 13


def test_coconut_skips_as_many_steps_as_the_stage_and_in_the_last_all():
    method, encoder = Coconut(), PromptEncoder(spelled_tokenizer())
    example = Example("q", ("s1",) * 5, "a")
    rows = [method.lay_out(example, encoder, method.stage_at(e, 1)) for e in range(25)]
    skipped = [5 - sum(span.kind == Kind.STEP for span in row.spans) for row in rows]
    assert skipped == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] + [5] * 13


@pytest.mark.parametrize(
    ("fields", "steps_per_epoch", "expected"),
    [
        ({"max_stage": 3}, 1000, {2999: 0, 3000: 1, 3001: 1, 5999: 1}),  # an epoch that has begun counts
        ({"max_stage": 2, "length": 10, "unit": "step"}, 1, {0: 0, 9: 0, 10: 1, 19: 1, 20: 2, 29: 2, 30: 3, 1000: 3}),
        ({"max_stage": 3, "first_stage": 2}, 1, {0: 2, 2: 2, 3: 3, 6: 4, 60: 4}),
        ({"max_stage": 3, "first_stage": 4}, 1, {0: 4, 5: 4, 19: 4}),
        ({}, 10, {0: 0, 50: 0, 99: 0}),
    ],
    ids=str,
)
def test_the_stage_of_an_optimizer_step(fields, steps_per_epoch, expected):
    curriculum = of(**fields)
    assert {step: curriculum.stage_at(step, steps_per_epoch, curriculum.last_stage) for step in expected} == expected


# Draws


@pytest.mark.parametrize(
    ("fields", "stage", "n_steps", "shares"),
    [
        ({"max_stage": 4}, 2, 9, [0, 0, 1]),
        ({"max_stage": 4, "mix": "uniform"}, 3, 9, [1] * 4),
        *(({"max_stage": 4, "mix": "linear"}, stage, 9, range(1, stage + 2)) for stage in (0, 1, 3, 5)),
        ({"max_stage": 6, "uniform_prob": 1.0}, 5, 3, [1] * 4),  # from 0 to the number of steps
        ({"max_stage": 6, "uniform_prob": 0.4}, 5, 3, [0.1, 0.1, 0.1, 0.1, 0, 0.6]),
        # half from 0..1 alike, half from 0..2 as 1 : 2 : 3
        ({"max_stage": 6, "uniform_prob": 0.5, "mix": "linear"}, 2, 1, [1 / 4 + 1 / 12, 1 / 4 + 2 / 12, 3 / 12]),
        ({"max_stage": 2, "uniform_prob": 1.0}, 1, 9, [1, 1, 1, 7]),  # from 3 on nothing has text left either
        ({"max_stage": 3, "uniform_prob": 1.0}, 2, 0, [1]),  # an example without steps
    ],
    ids=str,
)
def test_stages_are_drawn_with_their_chances(fields, stage, n_steps, shares):
    counts = draws(of(**fields), stage, n_steps)
    assert set(counts) <= {i for i, share in enumerate(shares) if share > 0}
    assert len(counts) == 1 or p_value(counts, shares) > SURELY


def test_the_distributions_can_be_told_apart():
    """The check itself: what is drawn linearly is not uniform."""
    assert p_value(draws(of(max_stage=4, mix="linear"), 3, 9), [1] * 4) < 1e-20


def test_the_same_seed_draws_the_same_stage_and_another_seed_another():
    curriculum = of(max_stage=4, mix="linear", uniform_prob=0.3)
    first, again, other = ([curriculum.stage_of(4, 5, f"{seed}/{i}", 5) for i in range(50)] for seed in (0, 0, 1))
    assert first == again != other


def test_draws_do_not_depend_on_the_process():
    """Python's own hash of a string does; these were drawn once and written down."""
    curriculum = of(max_stage=4, mix="linear")
    assert [curriculum.stage_of(4, 5, f"0/{i}", 5) for i in range(10)] == [4, 3, 4, 4, 3, 0, 1, 2, 4, 3]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_stage": -1}, "max_stage"),
        ({"length": 0}, "length is 0, but must be a whole number, at least 1"),
        ({"max_stage": 3, "first_stage": 5}, "from 0 to 4"),
        ({"max_stage": 3, "first_stage": -1}, "at least 0"),
        ({"first_stage": 1}, "from 0 to 0"),
        ({"uniform_prob": 1.5}, "between 0 and 1"),
        ({"uniform_prob": -0.1}, "between 0 and 1"),
        ({"unit": "epochs"}, "unit"),
        ({"mix": "cubic"}, "mix"),
        ({"reset_optimizer": "always"}, "reset_optimizer"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        of(**settings)
