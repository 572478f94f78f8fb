"""SLR's invariants 10 and 14 (slr.md, section 9): rows of a batch do not know of each other, on GPT-2 and Llama shapes.

10. A batch in which rows halt == single rows; a halted row is not changed by later iterations.
14. The prefix does not depend on t; permuting rows permutes results.
"""

import pytest
import torch

from tests.methods.tools import (
    FULL,
    MIXED,
    PLAIN,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_rows_do_as_alone,
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

# 10


@by_answer
@pytest.mark.parametrize("stop", ["delta", "cos", "kl", "entropy", "halt"])
@by_scope
def test_10_a_batch_in_which_rows_halt_equals_single_rows(scope, stop, answer_from):
    arch = {"delta": "gpt2", "cos": "llama", "kl": "gpt2", "entropy": "llama", "halt": "gpt2"}[stop]
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop={"rule": stop})
    assert_rows_do_as_alone(halting(arch, method))


@by_answer
@pytest.mark.parametrize("stop", ["kl", "entropy", "argmax"])
@by_scope
def test_10_rows_that_halt_by_the_answers_first_word_do_as_alone(scope, stop, answer_from):
    arch = "llama" if (stop, answer_from) == ("argmax", "refeed") else "gpt2"  # where rows differ
    looks = {"rule": stop, "site": "answer", "agg": "last" if stop == "kl" else "mean"}  # of one position
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=6, stop=looks)
    assert_rows_do_as_alone(halting(arch, method))


@pytest.mark.parametrize("solver", ["plain", "damped", "anderson"])
@by_region
def test_10_rows_that_reach_their_fixed_points_at_different_times_do_as_alone(scope, solver):
    method = change(PLAIN, loop_scope=scope, max_loops=40, loop={"residual": "A", "alpha": 0.5, "rescale": "rms"})
    assert_rows_do_as_alone(on("gpt2", change(method, fixed_point={"solver": solver, "tol": 3e-3})))


@by_scope
def test_10_a_halted_row_is_not_changed_by_later_iterations(scope):
    model = halting("gpt2", change(FULL, loop_scope=scope, max_loops=4, stop={"rule": "delta", "agg": "last"}))
    result = thought_of(model, MIXED).loop
    for row, n_loops in enumerate(result.n_loops):
        rows, states_BND = result.states[n_loops - 1]
        assert torch.equal(result.state[row], states_BND[rows.index(row)])


@by_scope
@pytest.mark.parametrize("stop", [{"rule": "delta"}, {"rule": "kl", "site": "answer"}], ids=["delta", "answer"])
@by_answer
def test_10_generation_of_a_halting_batch_equals_that_of_single_questions(scope, stop, answer_from):
    model = halting("gpt2", change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop=stop))
    together = model.generate(QUESTIONS, max_new_tokens=4, trace=True)
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=4, trace=True)
        assert one.text == alone.text
        assert one.cost.loops == alone.cost.loops == len(one.trace.iterations) == len(alone.trace.iterations)
        assert one.cost.passes == alone.cost.passes
        assert one.cost.positions == alone.cost.positions


# 14


@by_arch
@pytest.mark.parametrize(
    ("scope", "changed"), [("slots", "loop"), ("last", "loop"), ("append", "loop"), ("slots", "latents")]
)
def test_14_the_prefix_depends_neither_on_the_iterations_nor_on_the_latents(scope, changed, arch):
    model = on(arch, change(FULL, loop_scope=scope))
    with states(model) as seen, torch.no_grad():
        model.answer_logits(MIXED)
        n_passes = len(seen)
        if changed == "latents":
            change_embedding(model, "<lat>")
        for parameter in model.loop.parameters() if changed == "loop" else ():
            parameter.mul_(1.7)
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
