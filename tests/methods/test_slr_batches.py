"""SLR's invariants 10 and 14 (slr.md, section 9): rows of a batch do not know of each other, on GPT-2 and Llama shapes.

10. A batch in which rows halt == single rows; a halted row is not changed by later iterations.
14. The prefix does not depend on t; permuting rows permutes results.
"""

import pytest
import torch

from innerloop import LatentModel, Slr
from tests.methods.tools import (
    FULL,
    MIXED,
    PLAIN,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_rows_do_as_alone,
    base,
    by_answer,
    by_arch,
    by_region,
    by_scope,
    change,
    change_embedding,
    halting,
    on,
    states,
    thought_of,
)
from tests.models import tiny_model

by_word_score = pytest.mark.parametrize("stop", ["kl", "entropy", "argmax"])

# 10


@by_answer
@pytest.mark.parametrize("stop", ["delta", "cos", "kl", "entropy", "halt"])
@by_scope
def test_10_a_batch_in_which_rows_halt_equals_single_rows(scope, stop, answer_from):
    arch = {"delta": "gpt2", "cos": "llama", "kl": "gpt2", "entropy": "llama", "halt": "gpt2"}[stop]
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop={"rule": stop})
    assert_rows_do_as_alone(halting(arch, method))


@by_answer
@by_word_score
@by_scope
def test_10_rows_that_halt_by_the_answers_first_word_do_as_alone(scope, stop, answer_from):
    arch = "llama" if (stop, answer_from) == ("argmax", "refeed") else "gpt2"  # where rows differ
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=6, stop={"rule": stop, "site": "answer"})
    method = change(method, stop={"agg": "last" if stop == "kl" else "mean"})  # of the one position there is
    assert_rows_do_as_alone(halting(arch, method))


@pytest.mark.parametrize("solver", ["plain", "damped", "anderson"])
@by_region
def test_10_rows_that_reach_their_fixed_points_at_different_times_do_as_alone(scope, solver):
    fields = {
        "loop.residual": "A",
        "loop.alpha": 0.5,
        "loop.time": "none",
        "fixed_point.solver": solver,
        "fixed_point.tol": 3e-3,
        "max_loops": 40,
    }
    assert_rows_do_as_alone(on("gpt2", change(PLAIN, loop_scope=scope, loop={"rescale": "rms"}, **fields)))


@by_scope
def test_10_a_halted_row_is_not_changed_by_later_iterations(scope):
    model = halting("gpt2", change(FULL, loop_scope=scope, max_loops=4, stop={"rule": "delta", "agg": "last"}))
    result = thought_of(model, MIXED).loop
    for row, n_loops in enumerate(result.n_loops):
        rows, states_BND = result.states[n_loops - 1]
        assert torch.equal(result.state[row], states_BND[rows.index(row)])


@by_scope
@pytest.mark.parametrize(
    "fields", [{"stop.rule": "delta"}, {"stop.rule": "kl", "stop.site": "answer"}], ids=["delta", "answer"]
)
@by_answer
def test_10_generation_of_a_halting_batch_equals_that_of_single_questions(scope, fields, answer_from):
    model = halting("gpt2", change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, **fields))
    together = model.generate(QUESTIONS, max_new_tokens=4, trace=True)
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=4, trace=True)
        assert one.text == alone.text
        assert one.cost.loops == alone.cost.loops == len(one.trace.iterations) == len(alone.trace.iterations)
        assert one.cost.passes == alone.cost.passes
        assert one.cost.positions == alone.cost.positions


# 14


@by_arch
@pytest.mark.parametrize("scope", ["slots", "last", "append"])
def test_14_the_prefix_does_not_depend_on_the_iterations(scope, arch):
    model = on(arch, change(FULL, loop_scope=scope))
    with states(model) as seen, torch.no_grad():
        model.answer_logits(MIXED)
        n_passes = len(seen)
        for parameter in model.loop.parameters():
            parameter.mul_(1.7)
        model.answer_logits(MIXED)
    assert torch.equal(seen[0], seen[n_passes])
    assert (seen[1] - seen[n_passes + 1]).abs().max() > 1e-3


@by_arch
def test_14_the_prefix_does_not_depend_on_the_latents(arch):
    model = LatentModel(tiny_model(Slr(), arch).double().backbone, base(arch).tokenizer, FULL).double().eval()
    with states(model) as seen:
        model.answer_logits(MIXED)
        n_passes = len(seen)
        change_embedding(model, "<lat>")
        model.answer_logits(MIXED)
    assert torch.equal(seen[0], seen[n_passes])
    assert (seen[1] - seen[n_passes + 1]).abs().max() > 1e-3


@by_scope
@by_arch
def test_14_permuting_rows_permutes_results(scope, arch):
    model = on(arch, change(FULL, loop_scope=scope))
    order = [3, 0, 5, 1, 4, 2]
    logits = model.answer_logits(MIXED)
    for i, permuted in zip(order, model.answer_logits([MIXED[i] for i in order])):
        assert_close(permuted, logits[i], ROUNDED)
