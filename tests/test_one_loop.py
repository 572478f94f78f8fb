"""One inner loop: methods of the literature are settings of each other, so the two sides of each line must agree.

    left == right: the same logits of every written token and the same gradient of every weight, on the same weights.

The equalities are those of the cards' section 9.
"""

import dataclasses

import pytest
import torch

from innerloop import Coconut, Cot, NoCot, Pause, Slr
from innerloop.methods import Codi, Lotus, Pccot, SpiralThinker
from innerloop.text.row import BOL, BOT, EOL, EOT, LAT
from tests.fields import make
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    assert_close,
    assert_same_gradients,
    gradients,
    passes,
    same_weights,
    sharp_model,
    under,
)

K = 5
WITHOUT_STEPS = tuple(dataclasses.replace(example, steps=()) for example in MIXED)


def pauses(m: int = K, **fields) -> Pause:
    return make(Pause, n_pauses=m, **fields)


def coconut(k: int = K, **fields) -> Coconut:
    """Coconut whose last stage has k latents."""
    return make(Coconut, curriculum={"max_stage": 1}, latents_per_step=k, **fields)


def slots(loops: int = 3, **fields) -> Slr:
    """SLR with nothing but the loop: no residual, rescaling or timestep."""
    return make(Slr, **{"n_slots": K, "max_loops": loops, "loop.time": "none", **NONE, **RAW, **fields})


def append(loops: int = 3, **fields) -> Slr:
    return slots(loops, loop_scope="append", **fields)


def lotus(loops: int = 3, **fields) -> Lotus:
    """LOTUS without read-outs, K latents in blocks of one."""
    return make(Lotus, n_blocks=K, latents_per_block=1, max_loops=loops, step_weight=0.0, **fields)


def codi(k: int = K, **fields) -> Codi:
    """CODI's student alone."""
    return make(Codi, n_latents_total=k, hid={"weight": 0.0}, teacher_weight=0.0, **fields)


def pccot(loops: int = 3, **fields) -> Pccot:
    """PCCoT's student alone."""
    return make(Pccot, n_slots=K, max_loops=loops, hid={"weight": 0.0}, teacher_weight=0.0, **fields)


def spiral(loops: int = 3, **fields) -> SpiralThinker:
    """SpiralThinker's block with the identity for an adapter, and none after it."""
    return make(SpiralThinker, latents_per_block=K, max_loops=loops, max_blocks=1, **RAW, **fields)


def equal(name, left, right, stages=(None, None), examples=MIXED):
    """One line of the table; a stage of None is the last."""
    return pytest.param(left, right, stages, examples, id=name)


KV, REFEED = {"answer_from": "kv_last"}, {"last_pass": "refeed"}
NONE, SUM, A, B = ({"loop.residual": residual} for residual in ("none", "sum", "A", "B"))
A0, A1, B0, B1 = ({**residual, "loop.alpha": alpha} for residual in (A, B) for alpha in (0.0, 1.0))
RAW, RMS, PROJECT = ({"loop.rescale": rescale} for rescale in ("none", "rms", "project"))
JACOBI = {**NONE, "loop.shift": True}
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
    equal("... at stage 2", Coconut(thought="pause"), pauses(6, curriculum={"max_stage": 3}, per_stage=2), (2, 2)),
    equal("SLR, T=0 == pauses", slots(0), pauses()),
    equal("... with time, rescaling and residual", Slr(n_slots=K, max_loops=0), pauses()),
    equal("SLR at stage 0 == pauses, then CoT",
          slots(curriculum={"max_stage": 2}, loops_per_stage=1), pauses(keep_steps=True), (0, None)),
    equal("append, A, alpha=0 == pauses", append(K - 1, **A0), pauses()),
    # feed-back
    equal("append, forward, kv_last, T=k == Coconut", append(K, h0="forward", **KV), coconut()),
    equal("... A, alpha=1", append(K, h0="forward", **A1, **KV), coconut()),
    equal("append, forward, refeed, T=k-1 == Coconut", append(K - 1, h0="forward"), coconut()),
    equal("append, forward, refeed, T=0 == Coconut, k=1", append(0, h0="forward"), coconut(1)),
    equal("Coconut's residual, A == append's", coconut(**A), append(K - 1, h0="forward", **A)),
    # iterations
    equal("forward, T == embed, T+1", slots(3, h0="forward"), slots(4)),
    equal("forward, T=0 == embed, T=1", slots(0, h0="forward"), slots(1)),
    equal("slots: kv_last, T+1 == refeed, T", slots(4, **KV), slots(3)),
    equal("slots, sum: kv_last, T+1 == refeed, T", slots(4, **SUM, **KV), slots(3, **SUM)),
    equal("slots, A: kv_last, T+1 == refeed, T", slots(4, **A, **KV), slots(3, **A)),
    equal("slots, B: kv_last, T+1 == refeed, T", slots(4, **B, **KV), slots(3, **B)),
    equal("slots, rms, forward: kv_last, T+1 == refeed, T",
          slots(4, h0="forward", **RMS, **KV), slots(3, h0="forward", **RMS)),
    equal("append: kv_last, T+1 == refeed, T", append(4, **KV), append(3)),
    equal("append, sum: kv_last, T+1 == refeed, T", append(4, **SUM, **KV), append(3, **SUM)),
    equal("append, A: kv_last, T+1 == refeed, T", append(4, **A, **KV), append(3, **A)),
    equal("append, B: kv_last, T+1 == refeed, T", append(4, **B, **KV), append(3, **B)),
    # LOTUS
    equal("LOTUS at stage 0 == CoT with markers", lotus(), COT_WITH_MARKERS, (0, None)),
    equal("LOTUS, R=0 == pauses", lotus(0), pauses()),
    equal("SLR, T=0 == LOTUS, R=0", slots(0), lotus(0)),
    equal("SLR, sum, T=R == LOTUS", slots(3, **SUM), lotus(3)),
    equal("SLR, sum, kv_last, T=R+1 == LOTUS", slots(4, **SUM, **KV), lotus(3)),
    equal("SLR, T=R == LOTUS, replace", slots(3), lotus(3, **NONE)),
    equal("LOTUS: refeed, R-1 == kv, R", lotus(2, **REFEED), lotus(3)),
    equal("LOTUS: refeed, R=0 == kv, R=1", lotus(0, **REFEED), lotus(1)),
    equal("LOTUS, replace: refeed, R-1 == kv, R", lotus(2, **NONE, **REFEED), lotus(3, **NONE)),
    equal("LOTUS, replace, shift, R=N == Coconut", lotus(K, **JACOBI), coconut()),
    equal("... R>N", lotus(K + 2, **JACOBI), coconut()),
    equal("... refeed, R=N-1", lotus(K - 1, **JACOBI, **REFEED), coconut()),
    # SpiralThinker, its <bol> and <eol> embedded as <bot> and <eot> are
    equal("SpiralThinker, K=0 == pauses", spiral(0), pauses(), examples=WITHOUT_STEPS),
    equal("SpiralThinker, identity == LOTUS, replace",
          spiral(3), lotus(3, **NONE), examples=WITHOUT_STEPS),
    equal("... the static pass counted", spiral(4, count_static_pass=True), lotus(3, **NONE),
          examples=WITHOUT_STEPS),
    equal("... sequential", spiral(3, block_schedule="sequential"), lotus(3, **NONE),
          examples=WITHOUT_STEPS),
    equal("SpiralThinker, identity, added == LOTUS", spiral(3, **SUM), lotus(3), examples=WITHOUT_STEPS),
    # CODI and PCCoT
    equal("CODI without projection == Coconut", codi(**RAW), coconut()),
    equal("... k=1", codi(1, **RAW), coconut(1)),
    equal("CODI, k=0 == No-CoT with markers", codi(0), pauses(0)),
    equal("append, forward, project, T=k-1 == CODI", append(K - 1, h0="forward", **PROJECT), codi()),
    equal("PCCoT, T=k == CODI, teacher and all", Pccot(n_slots=K, max_loops=K), Codi(n_latents_total=K)),
    equal("PCCoT, T>k == CODI", pccot(K + 1), codi()),
    equal("PCCoT, T=0 == pauses", pccot(0), pauses()),
    equal("PCCoT without projection == LOTUS, replace, shift", pccot(**RAW), lotus(**JACOBI)),
    equal("SLR, shift, project == PCCoT", slots(3, loop={"shift": True, "rescale": "project"}), pccot(3)),
    # presets
    equal("preset lotus == LOTUS", Slr.presets["lotus"], Lotus(step_weight=0.0)),
    equal("preset pause == pauses", Slr.presets["pause"], pauses(8)),
    equal("preset coconut == Coconut", Slr.presets["coconut"], Coconut(latents_per_step=2)),
    # residuals
    equal("A, alpha=1 == none", slots(**A1), slots()),
    equal("B, alpha=1 == none", slots(**B1), slots()),
    equal("A, alpha=0 == T=0", slots(**A0), slots(0)),
    equal("B, alpha=0 == T=0", slots(**B0), slots(0)),
    equal("T=1: A == B", slots(1, **A), slots(1, **B)),
    equal("append, T=1: A == B", append(1, **A), append(1, **B)),
]  # fmt: skip


ALIKE = {BOL: BOT, EOL: EOT}


def on_alike_markers(method, arch="gpt2"):
    """Make a model to whose markers' names it makes no difference which of two that are alike a row reads."""
    model = sharp_model(method, arch)
    with torch.no_grad():
        for table in tables(model):
            for one, other in alike_ids(model):
                table[one] = table[other]
    return model


def tables(model):
    """The weights that have a row for every token."""
    lm = model.backbone.lm
    return {lm.get_input_embeddings().weight, lm.get_output_embeddings().weight}


def alike_ids(model):
    vocab = model.tokenizer.get_vocab()
    return [(vocab[one], vocab[other]) for one, other in ALIKE.items() if one in vocab]


def folded(model, loss):
    """The gradients of a loss, those of markers that are alike added up."""
    grads, names = gradients(model, loss), [name for name, p in model.named_parameters() if p in tables(model)]
    for name in names:
        for one, other in alike_ids(model):
            grads[name][other] += grads[name][one]
            grads[name][one] = 0
    return grads


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize(("left", "right", "stages", "examples"), EQUALITIES)
def test_both_sides_give_the_same_logits_and_gradients(left, right, stages, examples, arch):
    one = on_alike_markers(left, arch)
    other = same_weights(one, right)
    for a, b in zip(one.answer_logits(examples, stages[0]), other.answer_logits(examples, stages[1])):
        assert_close(a, b, 1e-10 if arch == "gpt2" and left.loop.rescale == "none" else 1e-5)  # rest: partly fp32
    of_one, of_other = (folded(model, model.loss(examples, stage).loss) for model, stage in zip((one, other), stages))
    shared = of_one.keys() & of_other.keys()
    assert_same_gradients(*({name: grads[name] for name in shared} for grads in (of_one, of_other)), 1e-5)


@pytest.mark.parametrize(("left", "right", "stages", "examples"), EQUALITIES)
def test_both_sides_write_the_same(left, right, stages, examples):
    one = on_alike_markers(left)
    markers = [marker for marker in (BOT, LAT, EOT, BOL, EOL) if marker in one.tokenizer.get_vocab()]
    for model in (one, other := same_weights(one, right)):
        never = torch.tensor(one.tokenizer.convert_tokens_to_ids(markers))
        model.suppressed_ids = lambda never=never: never  # methods without markers may write them
    questions = [example.question for example in examples]
    texts = [
        [generation.text for generation in model.generate(questions, max_new_tokens=6, stage=stage)]
        for model, stage in zip((one, other), stages)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("n_loops", [1, 3])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_slr_with_residual_sum_is_lotus(arch, n_loops):
    model = sharp_model(slots(n_loops, **SUM), arch)
    slow = Reference(model)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            lotus = slow.lotus(example.question, K, n_loops)
            assert_close(logits, slow.logits_after(lotus, slow.written(example, 0)), 1e-10 if arch == "gpt2" else 1e-5)


def test_equal_methods_may_differ_in_the_number_of_passes():
    """Pauses are read in one pass, the same latents one by one in k + 1: what is equal is the result."""
    counts = []
    model = sharp_model(pauses())
    for method in (pauses(), append(K - 1, **A0), coconut()):
        with passes(model) as seen:
            under(model, method).answer_logits(MIXED)
            counts.append(len(seen))
    assert counts == [1, K + 1, K + 1]
