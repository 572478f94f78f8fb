"""One inner loop: methods of the literature are settings of each other, so the two sides of each line must agree.

    left == right: the same logits of every written token and the same gradient of every weight, on the same weights.

The equalities are those of the cards' section 9.
"""

import dataclasses

import pytest
import torch

from innerloop import Coconut, Cot, NoCot, Pause, Slr
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    assert_close,
    assert_same_gradients,
    gradients,
    passes,
    sharp_model,
    under,
)

K = 5
WITHOUT_STEPS = tuple(dataclasses.replace(example, steps=()) for example in MIXED)


def pauses(m: int = K, **fields) -> Pause:
    return Pause(n_pauses=m, **fields)


def coconut(k: int = K, **fields) -> Coconut:
    """Coconut whose last stage has k latents."""
    return Coconut(max_stage=1, latents_per_step=k, **fields)


def slots(loops: int = 3, **fields) -> Slr:
    """SLR with nothing but the loop: no residual, rescaling or timestep."""
    return Slr(**{"n_slots": K, "max_loops": loops, "residual": "none", "rescale": "none", "time": "none", **fields})


def append(loops: int = 3, **fields) -> Slr:
    return slots(loops, loop_scope="append", **fields)


def equal(name, left, right, stages=(None, None), examples=MIXED):
    """One line of the table; a stage of None is the last."""
    return pytest.param(left, right, stages, examples, id=name)


KV, A, B = {"answer_from": "kv_last"}, {"residual": "A"}, {"residual": "B"}
COT_WITH_MARKERS = Cot(with_markers=True)
BARE = {"with_markers": False}

EQUALITIES = [
    # text
    equal("No-CoT == CoT without steps", NoCot(), Cot(), examples=WITHOUT_STEPS),
    equal("no pauses == No-CoT", pauses(0, **BARE), NoCot()),
    equal("no pauses, steps kept == CoT", pauses(0, keep_steps=True, **BARE), Cot()),
    equal("no pauses, markers == No-CoT with markers", pauses(0), COT_WITH_MARKERS, examples=WITHOUT_STEPS),
    equal("Coconut at stage 0 == CoT with markers", Coconut(), COT_WITH_MARKERS, (0, None)),
    equal("no thought, last stage == No-CoT", coconut(0), NoCot()),
    # pauses
    equal("Coconut, thought=pause == pauses", coconut(thought="pause"), pauses()),
    equal("... at stage 2", Coconut(thought="pause"), pauses(6, max_stage=3, per_stage=2), (2, 2)),
    equal("SLR, T=0 == pauses", slots(0), pauses()),
    equal("... with time, rescaling and residual", Slr(n_slots=K, max_loops=0), pauses()),
    equal("SLR at stage 0 == pauses, then CoT",
          slots(max_stage=2, loops_per_stage=1), pauses(keep_steps=True), (0, None)),
    equal("append, A, alpha=0 == pauses", append(K - 1, alpha=0.0, **A), pauses()),
    # feed-back
    equal("append, forward, kv_last, T=k == Coconut", append(K, h0="forward", **KV), coconut()),
    equal("... A, alpha=1", append(K, h0="forward", alpha=1.0, **A, **KV), coconut()),
    equal("append, forward, refeed, T=k-1 == Coconut", append(K - 1, h0="forward"), coconut()),
    equal("append, forward, refeed, T=0 == Coconut, k=1", append(0, h0="forward"), coconut(1)),
    equal("Coconut's residual, A == append's", coconut(**A), append(K - 1, h0="forward", **A)),
    # iterations
    equal("forward, T == embed, T+1", slots(3, h0="forward"), slots(4)),
    equal("forward, T=0 == embed, T=1", slots(0, h0="forward"), slots(1)),
    equal("slots: kv_last, T+1 == refeed, T", slots(4, **KV), slots(3)),
    equal("slots, sum: kv_last, T+1 == refeed, T", slots(4, residual="sum", **KV), slots(3, residual="sum")),
    equal("slots, A: kv_last, T+1 == refeed, T", slots(4, **A, **KV), slots(3, **A)),
    equal("slots, B: kv_last, T+1 == refeed, T", slots(4, **B, **KV), slots(3, **B)),
    equal("slots, rms, forward: kv_last, T+1 == refeed, T",
          slots(4, rescale="rms", h0="forward", **KV), slots(3, rescale="rms", h0="forward")),
    equal("append: kv_last, T+1 == refeed, T", append(4, **KV), append(3)),
    equal("append, sum: kv_last, T+1 == refeed, T", append(4, residual="sum", **KV), append(3, residual="sum")),
    equal("append, A: kv_last, T+1 == refeed, T", append(4, **A, **KV), append(3, **A)),
    equal("append, B: kv_last, T+1 == refeed, T", append(4, **B, **KV), append(3, **B)),
    # residuals
    equal("A, alpha=1 == none", slots(alpha=1.0, **A), slots()),
    equal("B, alpha=1 == none", slots(alpha=1.0, **B), slots()),
    equal("A, alpha=0 == T=0", slots(alpha=0.0, **A), slots(0)),
    equal("B, alpha=0 == T=0", slots(alpha=0.0, **B), slots(0)),
    equal("T=1: A == B", slots(1, **A), slots(1, **B)),
    equal("append, T=1: A == B", append(1, **A), append(1, **B)),
]  # fmt: skip


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(("left", "right", "stages", "examples"), EQUALITIES)
def test_both_sides_give_the_same_logits_and_gradients(left, right, stages, examples, arch):
    one = sharp_model(left, arch)
    other = under(one, right)
    for a, b in zip(one.answer_logits(examples, stages[0]), other.answer_logits(examples, stages[1])):
        assert_close(a, b, 1e-10 if arch == "gpt2" and left.loop.rescale == "none" else 1e-5)  # rest: partly fp32
    of_one, of_other = (
        backbone_gradients(model, model.loss(examples, stage).loss) for model, stage in zip((one, other), stages)
    )
    assert_same_gradients(of_one, of_other, 1e-5)


def backbone_gradients(model, loss):
    return {name: grad for name, grad in gradients(model, loss).items() if name.startswith("backbone")}


@pytest.mark.parametrize(("left", "right", "stages", "examples"), EQUALITIES)
def test_both_sides_write_the_same(left, right, stages, examples):
    one = sharp_model(left)
    for model in (one, other := under(one, right)):
        model.suppressed_ids = under(one, pauses()).suppressed_ids  # methods without markers may write them
    questions = [example.question for example in examples]
    texts = [
        [generation.text for generation in model.generate(questions, max_new_tokens=6, stage=stage)]
        for model, stage in zip((one, other), stages)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("n_loops", [1, 3])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_slr_with_residual_sum_is_lotus(arch, n_loops):
    model = sharp_model(slots(n_loops, residual="sum"), arch)
    slow = Reference(model)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            lotus = slow.lotus(example.question, K, n_loops)
            assert_close(logits, slow.logits_after(lotus, slow.written(example, 0)), 1e-10 if arch == "gpt2" else 1e-5)


def test_equal_methods_may_differ_in_the_number_of_passes():
    """Pauses are read in one pass, the same latents one by one in k + 1: what is equal is the result."""
    counts = []
    model = sharp_model(pauses())
    for method in (pauses(), append(K - 1, alpha=0.0, **A), coconut()):
        with passes(model) as seen:
            under(model, method).answer_logits(MIXED)
            counts.append(len(seen))
    assert counts == [1, K + 1, K + 1]
