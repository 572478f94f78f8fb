"""SLR's invariants 1 to 9 (slr.md, section 9): what equals what, on GPT-2 and Llama shapes.

1.  T = 0 == pause (slots) or the bare markers (all, last, append); kappa = inf == fixed T, -inf stops at min_loops.
2.  At the start lookup, sinusoidal, concat and LoRA == none; per_iter with tied weights == shared; merged == hooked.
3.  Residuals: C with fixed gates == A, B, none. A == B at t = 1; A == B == none at alpha = 1; alpha = 0 keeps h_0:
    tests/test_one_loop.py, tests/test_loop.py. sum / 2 == A at alpha = 1/2 for one update: tests/test_stabilize.py.
4.  slots without residual: h0 = forward with T == embed with T + 1.
5.  kv_last with T + 1 == refeed with T.
6.  append, h0 = forward, kv_last == Coconut; with an adapter as projection == CODI's student.
7.  slots, sum: refeed T = R == kv_last T = R + 1 == LOTUS.
8.  slots, none, adapter, refeed == SpiralThinker's single block.
9.  The linear toy: fixed points of A and B; -1.2 diverges alone and converges with B: tests/test_loop.py.

10 and 12 to 14: test_slr_batches.py. 11: test_slr_passes.py.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from innerloop import Codi, Example, LatentModel, Slr
from tests.methods.reference import Reference
from tests.methods.slowly import assert_thinks
from tests.methods.tools import (
    FULL,
    MIXED,
    PLAIN,
    ROUNDED,
    SCOPES,
    assert_close,
    assert_same_answers,
    by_answer,
    by_arch,
    by_region,
    by_scope,
    change,
    differs,
    logits_of,
    on,
    passes,
    same_weights,
    thought_of,
)


@by_scope
@by_arch
def test_1_without_iterations_the_markers_are_read_as_they_are(scope, arch):
    def markers(slow, example):
        bot, lat = slow.marker("<bot>"), slow.marker("<lat>")
        between = {"slots": [*bot, *lat * 3], "all": [], "last": bot, "append": [*bot, *lat]}
        return slow.embed([*slow.question(example.question), *between[scope]])

    assert_thinks(on(arch, change(FULL, loop_scope=scope, max_loops=0)), markers)


STOPS = [{"rule": rule} for rule in ("delta", "delta_undamped", "cos", "halt", "kl", "entropy", "argmax")]
LOOKS = [{"rule": rule, "site": "answer"} for rule in ("kl", "entropy", "argmax")]


@pytest.mark.parametrize("stop", [*STOPS, *LOOKS], ids=str)
@by_answer
@by_scope
def test_1_an_infinite_threshold_is_a_fixed_number_and_minus_infinity_stops_at_min_loops(stop, answer_from, scope):
    method = change(FULL, loop_scope=scope, answer_from=answer_from)
    fixed, method = on("gpt2", method), change(method, stop=stop)
    never = same_weights(fixed, change(method, stop={"threshold": torch.inf}))
    assert_same_answers(fixed, never, 0)
    for min_loops in (1, 2):
        at_once = same_weights(fixed, change(method, stop={"threshold": -torch.inf, "min_loops": min_loops}))
        assert thought_of(at_once, MIXED).loop.n_loops == [min_loops] * len(MIXED)
        if scope != "append":  # there the layout has max_loops latents
            rows = fixed.rows(MIXED)
            for row in rows:
                row.n_loops = min_loops
            for stopped, counted in zip(at_once.answer_logits(MIXED), logits_of(fixed, rows)):
                assert torch.equal(stopped, counted)


@by_arch
@pytest.mark.parametrize(
    "fields",
    [
        *({"loop.time": kind} for kind in ("lookup", "sinusoidal")),
        *({"loop.time": kind, "loop.time_inject": "concat"} for kind in ("lookup", "sinusoidal")),
        {"loop.time": "sinusoidal", "loop.time_norm": True, "loop.noise_level": "delta"},
        {"loop.lora": "per_iter"},
        {"loop.lora": "shared", "loop.lora_rank": 1, "decode_lora": True},
    ],
    ids=str,
)
def test_2_at_the_start_time_and_lora_change_nothing(fields, arch):
    for scope in SCOPES:
        without = change(PLAIN, loop_scope=scope, loop={"residual": "A", "rescale": "rms"})
        new = on(arch, change(without, **fields), stirred=False)
        assert_same_answers(on(arch, without), new)
        assert differs(new, on(arch, change(without, **fields)))  # what is trained does


@by_arch
def test_2_a_new_adapter_is_rms(arch):
    rms, adapter = (change(PLAIN, loop={"rescale": rescale}) for rescale in ("rms", "adapter"))
    assert_same_answers(on(arch, rms), on(arch, adapter, stirred=False))


@by_scope
@by_arch
def test_2_per_iter_lora_with_tied_weights_is_shared(scope, arch):
    method = change(PLAIN, loop_scope=scope, loop={"lora": "shared", "lora_rank": 2})
    shared = on(arch, method)
    tied = on(arch, change(method, loop={"lora": "per_iter"}))
    with torch.no_grad():
        for name in shared.loop.lora.down:
            tied.loop.lora.down[name].copy_(shared.loop.lora.down[name].expand(3, -1, -1))
            tied.loop.lora.up[name].copy_(shared.loop.lora.up[name].expand(3, -1, -1))
    assert_same_answers(shared, tied)
    assert differs(shared, on(arch, change(method, loop={"lora": "per_iter"})))


@by_arch
def test_2_merged_weights_give_the_logits_of_hooked_weights(arch):
    model = on(arch, FULL)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = model.backbone.head(model.backbone(model.backbone.embed(ids)))
        for loop in (1, 2, 3):
            with model.loop.lora.at(loop):
                hooked = model.backbone.head(model.backbone(model.backbone.embed(ids)))
            with model.loop.lora.merged(loop):
                merged = model.backbone.head(model.backbone(model.backbone.embed(ids)))
            assert_close(hooked, merged)
            assert (hooked - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("gates", "residual"),
    [((0.7, 0.3, 0.0), "A"), ((0.7, 0.0, 0.3), "B"), ((1.0, 0.0, 0.0), "none"), ((1.0, 1.0, 0.0), "sum")],
)
@by_arch
def test_3_c_with_fixed_gates_is_the_other_residuals(gates, residual, arch):
    kinds = [("sigmoid", "scalar"), ("sigmoid", "channel")]
    if sum(gates) == 1:
        kinds += [("softmax", "scalar"), ("softmax", "channel"), ("attention", "scalar")]
    for scope in SCOPES:
        method = change(PLAIN, loop_scope=scope, loop={"rescale": "rms", "alpha": 0.7})
        expected = on(arch, change(method, loop={"residual": residual}))
        for kind, shape in kinds:
            c = on(arch, change(method, loop={"residual": "C", "gate_kind": kind, "gate_shape": shape}), stirred=False)
            shares = torch.tensor(gates, dtype=torch.float64)
            c.loop.residual.shares_logit = torch.logit(shares) if kind == "sigmoid" else shares.log()
            assert_same_answers(expected, c, 2e-5)


@by_region
@by_arch
@pytest.mark.parametrize("rescale", ["none", "rms", "adapter"])
def test_4_a_first_state_made_by_a_pass_is_one_iteration_more(scope, arch, rescale):
    method = change(PLAIN, loop_scope=scope, loop={"rescale": rescale})
    forward = on(arch, change(method, h0="forward"))
    embed = same_weights(forward, change(method, max_loops=4))
    assert_same_answers(forward, embed)


@by_scope
@by_arch
@pytest.mark.parametrize("residual", ["none", "A", "B", "sum", "C"])
def test_5_the_cache_of_one_iteration_more_is_the_state_fed_once_more(scope, arch, residual):
    for h0 in ("embed", "forward"):
        method = change(PLAIN, loop_scope=scope, h0=h0, loop={"residual": residual})
        refeed = on(arch, method)
        assert_same_answers(refeed, same_weights(refeed, change(method, max_loops=4, answer_from="kv_last")), ROUNDED)


@by_arch
def test_6_append_from_the_state_of_bot_is_coconut_and_with_a_projection_codi(arch):
    for rescale in ("none", "adapter"):
        method = change(PLAIN, loop_scope="append", h0="forward", answer_from="kv_last", loop={"rescale": rescale})
        model = on(arch, method)
        rho = by_hand(model) if rescale == "adapter" else lambda u: u

        def feed_back(slow, example, rho=rho):
            x_LD = asked(slow, example)
            for _ in range(3):
                x_LD = torch.cat([x_LD, rho(slow.read(x_LD)[0][-1:])])
            return x_LD

        assert_thinks(model, feed_back, ROUNDED)


@by_arch
def test_6_the_preset_codi_is_codis_student(arch):
    student = on(arch, Slr.presets["codi"])
    codi = same_weights(student, Codi(n_latents_total=student.method.max_loops))
    assert_same_answers(codi, student, ROUNDED)
    assert differs(student, on(arch, Slr.presets["coconut"]))


def asked(slow: Reference, example: Example) -> Tensor:
    return slow.embed([*slow.question(example.question), *slow.marker("<bot>")])


def by_hand(model: LatentModel):
    """rho(u) = RMSNorm(u + W_b SiLU(W_a u)) tau, from the weights of the adapter."""
    adapter, tau = model.loop.rescale, model.backbone.lm.get_input_embeddings().weight.square().mean().sqrt()

    def rho(u: Tensor) -> Tensor:
        v = u + silu(u @ adapter.inner.weight.T) @ adapter.outer.weight.T
        return v * tau / v.square().mean(-1, keepdim=True).sqrt()

    return rho


@pytest.mark.parametrize("r", [1, 3])
@by_arch
def test_7_sum_is_a_hand_written_lotus_loop(arch, r):
    refeed = on(arch, change(PLAIN, loop={"residual": "sum"}, max_loops=r))
    assert_thinks(refeed, lambda slow, example: slow.lotus(example.question, 3, r)[:-1])
    kv_last = on(arch, change(refeed.method, max_loops=r + 1, answer_from="kv_last"))
    assert_same_answers(refeed, kv_last)
    slow = Reference(refeed)
    with torch.no_grad():
        for example in MIXED:
            x_LD = slow.lotus(example.question, 3, r)
            z, e = thought_of(kv_last, [example]).loop.state[0], slow.embed(slow.marker("<lat>") * 3)
            assert_close(z - e, slow.read(x_LD[:-1])[0][-3:])  # h^(R) = z_T - E


@by_arch
def test_8_an_adapter_without_residual_is_spiralthinkers_single_block(arch):
    model = on(arch, change(PLAIN, loop={"rescale": "adapter"}))
    g = by_hand(model)

    def block(slow, example):
        prefix, z = asked(slow, example), slow.embed(slow.marker("<lat>") * 3)
        for _ in range(3):
            z = g(slow.read(torch.cat([prefix, z]))[0][-3:])
        return torch.cat([prefix, z])

    assert_thinks(model, block, 5 * ROUNDED)
    with passes(model) as seen:
        model.answer_logits(MIXED[:1])
    assert len(seen) == 1 + 3 + 1  # the prefix, K region passes, and the last one with the answer
