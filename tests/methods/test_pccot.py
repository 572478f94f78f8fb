"""PCCoT: CODI's latents refined side by side (codi.md and lotus.md, section 9; arXiv 2506.18582).

k iterations make the result of CODI: tests/test_one_loop.py, and here latent by latent.
"""

import pytest
import torch

from innerloop import InputError
from innerloop.methods import Codi, Pccot
from tests.fields import make
from tests.methods.reference_codi import CodiReference
from tests.methods.slowly import assert_batch_is_its_rows, assert_decodes_as_forced, assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    ROUNDED,
    assert_close,
    by_arch,
    change,
    on,
    passes,
    same_weights,
    sharp_model,
    thought_of,
)

K = 5
BASE = Pccot(n_slots=K, max_loops=2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_loops": 0},
        {"max_loops": 1},
        {"max_loops": K + 1},
        {"n_slots": 1},
        {"loop.rescale": "none", "hid.distance": "l1", "hid.layers": "all"},
        {"loop.norm": False, "loop.width": 8, "teacher_weight": 0.0},
        {"hid.weight": 0.0, "teacher_weight": 0.0},
        {"loop.site": "pre_norm"},
    ],
    ids=str,
)
@by_arch
def test_all_terms_and_their_gradients_equal_the_reference(arch, fields):
    model = on(arch, change(BASE, **fields))
    assert_terms_of_the_reference(model, CodiReference(model))


@by_arch
@torch.no_grad()
def test_the_first_t_latents_are_codis_after_t_iterations_and_the_others_are_not(arch):
    model = on(arch, change(BASE, max_loops=K + 2))
    codi = same_weights(model, Codi(n_latents_total=K))
    loop = thought_of(codi, MIXED).loop
    sequential = torch.cat([loop.first, *(state for _, state in loop.states)], dim=1)
    for t, (_, parallel) in enumerate(thought_of(model, MIXED).loop.states, 1):
        assert_close(parallel[:, :t], sequential[:, :t], ROUNDED)
        assert t >= K or (parallel[:, t:] - sequential[:, t:]).abs().amax(2).min() > 1e-4


@pytest.mark.parametrize("fields", [{}, {"loop.time": "lookup", "loop.residual": "B"}], ids=str)
@by_arch
def test_rows_of_a_batch_do_as_alone(arch, fields):
    model = on(arch, change(BASE, **{"hid.distance": "cosine"}, **fields))
    assert_batch_is_its_rows(model, model.rows(MIXED))


@pytest.mark.parametrize("max_loops", [0, 1, 3])
@by_arch
def test_answering_takes_one_pass_for_each_iteration_and_equals_teacher_forcing(arch, max_loops):
    model = sharp_model(change(BASE, max_loops=max_loops), arch)
    assert_decodes_as_forced(model, CodiReference(model), passes_before=1 + max_loops if max_loops else 0)


@pytest.mark.parametrize("max_loops", [1, 3])
def test_training_takes_the_passes_of_the_iterations_and_one_of_the_teacher(max_loops):
    model = on("gpt2", change(BASE, max_loops=max_loops))
    with passes(model) as seen:
        model.loss(MIXED)
    assert len(seen) == 1 + max_loops + 1 + 1


def test_the_number_of_iterations_may_be_changed_when_answering():
    model = on("gpt2", BASE)
    for loops in (0, 1, K):
        (generation,) = model.generate(["2"], loops=loops, max_new_tokens=2)
        other = same_weights(model, change(BASE, max_loops=loops)).generate(["2"], max_new_tokens=2)[0]
        assert (generation.text, generation.cost.loops) == (other.text, loops)


@pytest.mark.parametrize(
    ("fields", "mend"),
    [
        ({"n_slots": 0}, "n_slots is 0, but must be"),
        ({"max_loops": -1}, "max_loops is -1, but must be"),
        ({"hid.teacher": None}, "set hid.teacher"),
        ({"hid.teacher": "runs/cot"}, "set hid.teacher to self"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_in_one_sentence(fields, mend):
    with pytest.raises(InputError, match=mend) as refusal:
        make(Pccot, **fields)
    assert "\n" not in str(refusal.value)
