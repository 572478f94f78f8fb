"""The invariants of Stable Latent Reasoning, in the order of its card (slr.md, section 9), on GPT-2 and Llama shapes.

1.  T = 0 == pause (slots) or the bare markers (all, last, append); kappa = inf == fixed T, -inf stops at min_loops.
2.  At the start lookup, sinusoidal, concat and LoRA == none; per_iter with tied weights == shared; merged == hooked.
3.  Residuals: A == B at t = 1; A == B == none at alpha = 1; alpha = 0 keeps h_0; C with fixed gates == A, B, none;
    sum / 2 == A at alpha = 1/2 for one update.
4.  slots without residual: h0 = forward with T == embed with T + 1.
5.  kv_last with T + 1 == refeed with T.
6.  append, h0 = forward, kv_last == Coconut; with an adapter as projection == CODI's student.
7.  slots, sum: refeed T = R == kv_last T = R + 1 == LOTUS.
8.  slots, none, adapter, refeed == SpiralThinker's single block.
9.  The linear toy: fixed points of A and B; an eigenvalue of -1.2 diverges alone and converges with B.
10. A batch in which rows halt == single rows; a halted row is not changed by later iterations.
11. Cached == uncached; the number of passes is the formula's.
12. bptt = T == full, bptt = 0: no gradient through the loop; another LoRA_t changes the passes t alone.
13. Training the adapters alone leaves theta's checksum; L_hid = 0 where the student's states are the teacher's.
14. The prefix does not depend on t; permuting rows permutes results.
"""

import dataclasses
import functools
import hashlib
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from innerloop import LatentModel, Slr, adapters
from innerloop.context import Context
from innerloop.loop import InnerLoop, LoopSettings
from innerloop.losses import follow_loss
from innerloop.trace import Trace
from tests.methods.reference import Reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    assert_close,
    assert_same_gradients,
    change_embedding,
    gradients,
    iterate,
    lean_towards_end,
    logits_of,
    passes,
    states,
)
from tests.models import tiny_model

ROUNDED = 1e-5  # a norm of Llama computes in fp32, even in a model of double precision
SCOPES = ("slots", "all", "last", "append")
REGIONS = ("slots", "all", "last")
PLAIN = Slr(n_slots=3, max_loops=3, residual="none", rescale="none", time="none")
FULL = Slr(
    n_slots=3, max_loops=3, residual="B", rescale="rms", time="sinusoidal", lora="per_iter", lora_rank=2, alpha=0.6
)

by_arch = pytest.mark.parametrize("arch", ["gpt2", "llama"])
by_scope = pytest.mark.parametrize("scope", SCOPES)
by_region = pytest.mark.parametrize("scope", REGIONS)


def change(method: Slr, **fields) -> Slr:
    return dataclasses.replace(method, **fields)


@functools.cache
def base(arch: str) -> LatentModel:
    return tiny_model(Slr(), arch, num_hidden_layers=2).double()


def on(arch: str, method: Slr, stirred: bool = True) -> LatentModel:
    """Put a method on the weights of an architecture; all that begins at zero is moved, unless told not to."""
    model = LatentModel(base(arch).backbone, base(arch).tokenizer, method).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.loop.parameters() if stirred else ():
        with torch.no_grad():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.eval()


def same_weights(model: LatentModel, method: Slr) -> LatentModel:
    """Put another method on the weights of a model, those of its loop included."""
    twin = LatentModel(model.backbone, model.tokenizer, method).double().eval()
    twin.loop.load_state_dict(model.loop.state_dict(), strict=False)
    return twin


def assert_same_answers(left: LatentModel, right: LatentModel, tolerance: float = 1e-10) -> None:
    for a, b in zip(left.answer_logits(MIXED), right.answer_logits(MIXED)):
        assert_close(a, b, tolerance)


def differs(left: LatentModel, right: LatentModel) -> bool:
    pairs = zip(left.answer_logits(MIXED), right.answer_logits(MIXED))
    return max((a - b).abs().max().item() for a, b in pairs) > 1e-4


def thought_of(model: LatentModel, examples, trace: Trace | None = None):
    with torch.no_grad():
        return model._states(model.batch(model.rows(list(examples))), trace)[1]


# 1


@by_scope
@by_arch
def test_1_without_iterations_the_markers_are_read_as_they_are(scope, arch):
    model = on(arch, change(FULL, loop_scope=scope, max_loops=0))
    slow = Reference(model)
    bot, lat, eot = (slow.marker(name) for name in ("<bot>", "<lat>", "<eot>"))
    between = {"slots": [*bot, *lat * 3, *eot], "all": eot, "last": [*bot, *eot], "append": [*bot, *lat, *eot]}
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            thought = slow.embed([*slow.question(example.question), *between[scope]])
            assert_close(logits, slow.logits_after(thought, slow.written(example, 0)))


@pytest.mark.parametrize("stop", ["delta", "delta_undamped", "cos", "kl", "entropy", "argmax", "halt"])
@by_scope
def test_1_an_infinite_threshold_is_a_fixed_number_and_minus_infinity_stops_at_min_loops(stop, scope):
    fixed = on("gpt2", change(FULL, loop_scope=scope))
    never = same_weights(fixed, change(FULL, loop_scope=scope, stop=stop, stop_threshold=torch.inf))
    assert_same_answers(fixed, never, 0)
    for min_loops in (1, 2):
        method = change(FULL, loop_scope=scope, stop=stop, stop_threshold=-torch.inf, min_loops=min_loops)
        at_once = same_weights(fixed, method)
        assert thought_of(at_once, MIXED).loop.n_loops == [min_loops] * len(MIXED)
        if scope != "append":  # there the layout has max_loops latents
            rows = fixed.rows(MIXED)
            for row in rows:
                row.n_loops = min_loops
            for stopped, counted in zip(at_once.answer_logits(MIXED), logits_of(fixed, rows)):
                assert torch.equal(stopped, counted)


# 2


@by_arch
@pytest.mark.parametrize(
    "fields",
    [
        {"time": "lookup"},
        {"time": "sinusoidal"},
        {"time": "sinusoidal", "time_norm": True, "noise_level": "delta"},
        {"time": "lookup", "time_inject": "concat"},
        {"time": "sinusoidal", "time_inject": "concat"},
        {"lora": "per_iter"},
        {"lora": "shared", "lora_rank": 1, "decode_lora": True},
    ],
    ids=str,
)
def test_2_at_the_start_time_and_lora_change_nothing(fields, arch):
    for scope in SCOPES:
        without = change(PLAIN, loop_scope=scope, residual="A", rescale="rms")
        new = on(arch, change(without, **fields), stirred=False)
        assert_same_answers(on(arch, without), new)
        assert differs(new, on(arch, change(without, **fields)))  # what is trained does


@by_arch
def test_2_a_new_adapter_is_rms(arch):
    assert_same_answers(on(arch, change(PLAIN, rescale="rms")), on(arch, change(PLAIN, rescale="adapter"), False))


@by_scope
@by_arch
def test_2_per_iter_lora_with_tied_weights_is_shared(scope, arch):
    method = change(PLAIN, loop_scope=scope, lora="shared", lora_rank=2)
    shared = on(arch, method)
    tied = on(arch, change(method, lora="per_iter"))
    with torch.no_grad():
        for name in shared.loop.lora.down:
            tied.loop.lora.down[name].copy_(shared.loop.lora.down[name].expand(3, -1, -1))
            tied.loop.lora.up[name].copy_(shared.loop.lora.up[name].expand(3, -1, -1))
    assert_same_answers(shared, tied)
    assert differs(shared, on(arch, change(method, lora="per_iter")))


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


# 3


@by_scope
@by_arch
def test_3_a_is_b_for_one_iteration_and_both_are_none_at_alpha_one(scope, arch):
    once = change(PLAIN, loop_scope=scope, max_loops=1)
    assert_same_answers(on(arch, change(once, residual="A")), on(arch, change(once, residual="B")))
    thrice = change(PLAIN, loop_scope=scope)
    assert differs(on(arch, change(thrice, residual="A")), on(arch, change(thrice, residual="B")))
    for residual in "AB":
        assert_same_answers(on(arch, change(thrice, residual=residual, alpha=1.0)), on(arch, thrice))


@by_scope
@by_arch
def test_3_with_alpha_zero_every_state_is_the_first(scope, arch):
    for residual in "AB":
        for h0 in ("embed", "forward"):
            model = on(arch, change(PLAIN, loop_scope=scope, residual=residual, alpha=0.0, h0=h0, rescale="rms"))
            result = thought_of(model, MIXED).loop
            first = result.states[0][1]
            assert len(result.states) == 3
            assert all(torch.equal(state, first) for _, state in result.states)
            assert torch.equal(result.state, first)


@pytest.mark.parametrize(
    ("gates", "fields"),
    [
        ((0.7, 0.3, 0.0), {"residual": "A"}),
        ((0.7, 0.0, 0.3), {"residual": "B"}),
        ((1.0, 0.0, 0.0), {"residual": "none"}),
        ((1.0, 1.0, 0.0), {"residual": "sum"}),
    ],
    ids=str,
)
@by_arch
def test_3_c_with_fixed_gates_is_the_other_residuals(gates, fields, arch):
    kinds = [("sigmoid", "scalar"), ("sigmoid", "channel")]
    if sum(gates) == 1:
        kinds += [("softmax", "scalar"), ("softmax", "channel"), ("attention", "scalar")]
    for scope in SCOPES:
        method = change(PLAIN, loop_scope=scope, rescale="rms", alpha=0.7)
        expected = on(arch, change(method, **fields))
        for kind, shape in kinds:
            c = on(arch, change(method, residual="C", gate_kind=kind, gate_shape=shape), stirred=False)
            shares = torch.tensor(gates, dtype=torch.float64)
            c.loop.residual.shares_logit = torch.logit(shares) if kind == "sigmoid" else shares.log()
            assert_same_answers(expected, c, 2e-5)


def test_3_half_the_sum_is_a_with_alpha_one_half_for_one_update():
    state = torch.linspace(-1, 1, 24).view(2, 3, 4)
    run = {kind: InnerLoop(LoopSettings(residual=kind, alpha=0.5), 4, 1, torch.ones(())) for kind in ("A", "sum")}
    after = {kind: iterate(loop, lambda x, t: (3 * x).sin(), state, 1).state for kind, loop in run.items()}
    assert_close(after["sum"] / 2, after["A"], 1e-7)


# 4, 5


@by_region
@by_arch
@pytest.mark.parametrize("rescale", ["none", "rms", "adapter"])
def test_4_a_first_state_made_by_a_pass_is_one_iteration_more(scope, arch, rescale):
    method = change(PLAIN, loop_scope=scope, rescale=rescale)
    forward = on(arch, change(method, h0="forward"))
    embed = same_weights(forward, change(method, max_loops=4))
    assert_same_answers(forward, embed)


@by_scope
@by_arch
@pytest.mark.parametrize("residual", ["none", "A", "B", "sum", "C"])
def test_5_the_cache_of_one_iteration_more_is_the_state_fed_once_more(scope, arch, residual):
    for h0 in ("embed", "forward"):
        method = change(PLAIN, loop_scope=scope, h0=h0, residual=residual)
        refeed = on(arch, method)
        assert_same_answers(refeed, same_weights(refeed, change(method, max_loops=4, answer_from="kv_last")), ROUNDED)


# 6, 7, 8


@by_arch
def test_6_append_from_the_state_of_bot_is_coconut_and_with_a_projection_codi(arch):
    for rescale in ("none", "adapter"):
        method = change(PLAIN, loop_scope="append", h0="forward", answer_from="kv_last", rescale=rescale)
        model = on(arch, method)
        slow, rho = Reference(model), by_hand(model) if rescale == "adapter" else lambda u: u
        with torch.no_grad():
            for example, logits in zip(MIXED, model.answer_logits(MIXED)):
                x_LD = slow.embed([*slow.question(example.question), *slow.marker("<bot>")])
                for _ in range(3):
                    x_LD = torch.cat([x_LD, rho(slow.read(x_LD)[0][-1:])])
                thought = torch.cat([x_LD, slow.embed(slow.marker("<eot>"))])
                assert_close(logits, slow.logits_after(thought, slow.written(example, 0)), ROUNDED)


def by_hand(model: LatentModel):
    """rho(u) = RMSNorm(u + W_b SiLU(W_a u)) tau, from the weights of the adapter."""
    adapter, tau = model.loop.rescale, model.backbone.lm.get_input_embeddings().weight.square().mean().sqrt()

    def rho(u: Tensor) -> Tensor:
        v = u + silu(u @ adapter.inner.weight.T) @ adapter.outer.weight.T
        return v * tau / v.square().mean(-1, keepdim=True).sqrt()

    return rho


@by_arch
def test_7_sum_is_a_hand_written_lotus_loop(arch):
    refeed = on(arch, change(PLAIN, residual="sum"))
    kv_last = on(arch, change(PLAIN, residual="sum", max_loops=4, answer_from="kv_last"))
    slow = Reference(refeed)
    with torch.no_grad():
        for example, left, right in zip(MIXED, refeed.answer_logits(MIXED), kv_last.answer_logits(MIXED)):
            x_LD = slow.lotus(example.question, 3, 3)
            expected = slow.logits_after(x_LD, slow.written(example, 0))
            assert_close(left, expected)
            assert_close(right, expected)
            z, e = thought_of(kv_last, [example]).loop.state[0], slow.embed(slow.marker("<lat>") * 3)
            assert_close(z - e, slow.read(x_LD[:-1])[0][-3:])  # h^(R) = z_T - E


@by_arch
def test_8_an_adapter_without_residual_is_spiralthinkers_single_block(arch):
    model = on(arch, change(PLAIN, rescale="adapter"))
    slow, g = Reference(model), by_hand(model)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            prefix = slow.embed([*slow.question(example.question), *slow.marker("<bot>")])
            z = slow.embed(slow.marker("<lat>") * 3)
            for _ in range(3):
                z = g(slow.read(torch.cat([prefix, z]))[0][-3:])
            thought = torch.cat([prefix, z, slow.embed(slow.marker("<eot>"))])
            assert_close(logits, slow.logits_after(thought, slow.written(example, 0)), 5 * ROUNDED)
    with passes(model) as seen:
        model.answer_logits(MIXED[:1])
    assert len(seen) == 1 + 3 + 1  # the prefix, K region passes, and the last one with the answer


# 9


@pytest.mark.parametrize("eigenvalue", [0.9, -0.9, -1.2])
def test_9_residuals_have_the_fixed_points_of_theory(eigenvalue):
    j = torch.tensor([[eigenvalue, 0.2], [0.0, 0.5]], dtype=torch.float64)
    b, h0, one = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 1.0]).double(), torch.eye(2).double()

    def settle(residual, alpha):
        loop = InnerLoop(LoopSettings(residual=residual, alpha=alpha), 2, 1, torch.ones(()))
        return iterate(loop, lambda x, t: x @ j.T + b, h0.view(1, 1, 2), 500).state[0, 0]

    fixed = torch.linalg.solve(one - j, b)
    assert_close(settle("B", 0.5), fixed, 1e-8)
    assert_close(settle("A", 0.7), torch.linalg.solve(one - 0.7 * j, 0.7 * b + 0.3 * h0), 1e-8)
    undamped = (settle("B", 1.0) - fixed).norm()
    assert undamped > 1e3 if eigenvalue < -1 else undamped < 1e-8


# 10


def halting(arch: str, method: Slr) -> LatentModel:
    """Put a stop rule on a model, with a threshold at which the rows of `MIXED` stop at as many times as possible."""
    model = on(arch, change(method, stop_threshold=torch.inf))
    traces = [Trace() for _ in MIXED]
    for example, trace in zip(MIXED, traces):
        thought_of(model, [example], trace)
    scores_TB = torch.tensor([[entry.score.item() for entry in trace.iterations] for trace in traces]).T
    known = scores_TB[scores_TB.isfinite()].unique()
    wide = [(a + b).item() / 2 for a, b in itertools.pairwise(known) if b - a > 1e-4]

    def stops(threshold: float) -> list[int]:
        column = [torch.nonzero(scores >= threshold)[:, 0].tolist() for scores in scores_TB.T]
        return [at[0] + 1 if at else method.max_loops for at in column]

    threshold = max(wide, key=lambda kappa: len(set(stops(kappa))))
    assert len(set(stops(threshold))) > 1
    return same_weights(model, change(method, stop_threshold=threshold))


@pytest.mark.parametrize("answer_from", ["refeed", "kv_last"])
@pytest.mark.parametrize("stop", ["delta", "cos", "kl", "entropy", "halt"])
@by_scope
def test_10_a_batch_in_which_rows_halt_equals_single_rows(scope, stop, answer_from):
    arch = {"delta": "gpt2", "cos": "llama", "kl": "gpt2", "entropy": "llama", "halt": "gpt2"}[stop]
    model = halting(arch, change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop=stop))
    trace = Trace()
    together = thought_of(model, MIXED, trace).loop
    assert len(set(together.n_loops)) > 1
    for row, (example, logits) in enumerate(zip(MIXED, model.answer_logits(MIXED))):
        alone_trace = Trace()
        alone = thought_of(model, [example], alone_trace).loop
        n = alone.state.shape[1]  # in scope all, shorter rows are padded on the right
        assert alone.n_loops[0] == together.n_loops[row]
        assert_close(together.state[row, :n], alone.state[0], ROUNDED)
        assert_close(logits, model.answer_logits([example])[0], ROUNDED)
        ours, single = trace.row(row).iterations, alone_trace.iterations
        assert [entry.loop for entry in ours] == [entry.loop for entry in single]
        assert all(torch.allclose(a.score, b.score, atol=1e-4) for a, b in zip(ours, single))


@by_scope
def test_10_a_halted_row_is_not_changed_by_later_iterations(scope):
    model = halting("gpt2", change(FULL, loop_scope=scope, max_loops=4, stop="delta", stop_agg="last"))
    result = thought_of(model, MIXED).loop
    for row, n_loops in enumerate(result.n_loops):
        rows, states_BND = result.states[n_loops - 1]
        assert torch.equal(result.state[row], states_BND[rows.index(row)])


@by_scope
def test_10_generation_of_a_halting_batch_equals_that_of_single_questions(scope):
    model = halting("gpt2", change(FULL, loop_scope=scope, max_loops=4, stop="delta"))
    together = model.generate(QUESTIONS, max_new_tokens=4, trace=True)
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=4, trace=True)
        assert one.text == alone.text
        assert len(one.trace.iterations) == len(alone.trace.iterations)
        assert one.cost.passes == alone.cost.passes
        assert one.cost.positions == alone.cost.positions


# 11


@by_scope
@by_arch
@pytest.mark.parametrize("answer_from", ["refeed", "kv_last"])
@pytest.mark.parametrize("h0", ["embed", "forward"])
def test_11_cached_equals_uncached(scope, arch, answer_from, h0):
    method = change(PLAIN, loop_scope=scope, answer_from=answer_from, h0=h0, residual="A", rescale="rms", time="lookup")
    model = on(arch, method)
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            assert_close(logits, uncached(model, example), ROUNDED)


def uncached(model: LatentModel, example) -> Tensor:
    """slr.md, section 3, with every pass over the whole row and nothing remembered."""
    slow, method = Reference(model), model.method
    asked, bot, lat, eot = slow.question(example.question), *map(slow.marker, ("<bot>", "<lat>", "<eot>"))
    prefix, region = {
        "slots": ([*asked, *bot], lat * method.n_slots),
        "all": ([], asked),
        "last": (asked, bot),
        "append": ([*asked, *bot], lat),
    }[method.loop_scope]
    past, h = slow.embed(prefix), slow.embed(region)
    n = len(h)
    if method.h0 == "forward":
        h = slow.rho(slow.read(past if method.loop_scope == "append" else torch.cat([past, h]))[0][-n:])
    first, fed = h, h
    for t in range(1, method.max_loops + 1):
        fed = h + slow.e(t)
        u = slow.read(torch.cat([past, fed]))[0][-n:]
        if method.loop_scope == "append":
            past = torch.cat([past, fed])
        h = slow.mix(slow.rho(u), first, h)
    if method.answer_from == "refeed":
        past = torch.cat([past, h])
    elif method.loop_scope != "append":
        past = torch.cat([past, fed])
    return slow.logits_after(torch.cat([past, slow.embed(eot)]), slow.written(example, 0))


@by_scope
@by_arch
@pytest.mark.parametrize("prefix_kv", ["base", "per_iter"])
def test_11_passes_and_positions_counted_by_a_hook_are_those_of_the_formula(scope, arch, prefix_kv):
    if prefix_kv == "per_iter" and scope in ("all", "append"):
        return  # refused
    model = on(arch, change(FULL, loop_scope=scope, prefix_kv=prefix_kv))
    lean_towards_end(model, -100.0)
    try:
        with passes(model) as seen:
            (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=4)
    finally:
        model.backbone.lm.get_output_embeddings()._forward_hooks.clear()
    n_prefix, until = model.batch(model.prompts(QUESTIONS[:1])).bounds
    width = 1 if scope == "append" else until - n_prefix
    has_prefill, per_iter = int(scope != "all"), prefix_kv == "per_iter"
    n_passes = has_prefill + 3 * (1 + per_iter) + 4
    n_positions = n_prefix * (1 + 3 * per_iter) + 3 * width + (width + 1) + 3
    assert generation.cost.passes == len(seen) == n_passes
    assert generation.cost.positions == sum(embeds.shape[1] for embeds in seen) == n_positions


@by_arch
@pytest.mark.parametrize("scope", ["slots", "last"])
def test_11_the_prompt_read_in_every_iteration_is_the_uncached_pass_with_its_weights(scope, arch):
    method = change(PLAIN, loop_scope=scope, lora="per_iter", lora_rank=2, prefix_kv="per_iter")
    for answer_from in ("refeed", "kv_last"):
        model = on(arch, change(method, answer_from=answer_from))
        slow = Reference(model)
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            asked, bot = slow.question(example.question), slow.marker("<bot>")
            prefix, region = ([*asked, *bot], slow.marker("<lat>") * 3) if scope == "slots" else (asked, bot)
            past, h = slow.embed(prefix), slow.embed(region)
            for t in (1, 2, 3):
                with torch.no_grad(), model.loop.lora.at(t):
                    u = slow.read(torch.cat([past, h]))[0][-len(h) :]
                fed, h = h, u
            if answer_from == "refeed":
                thought = torch.cat([past, h, slow.embed(slow.marker("<eot>"))])
                assert_close(logits, slow.logits_after(thought, slow.written(example, 0)))
            else:  # the answer attends to the prompt and latents of the last pass, which had its weights
                batch = model.batch(model.rows([example]))
                context = Context(model.backbone, 1)
                with torch.no_grad():
                    context.read(torch.cat([past, fed])[None], weights=lambda: model.loop.lora.at(3))  # noqa: B023
                    rest = slow.embed([*slow.marker("<eot>"), *slow.written(example, 0)])
                    expected = model.backbone.head(context.read(rest[None]))[0, :-1]
                assert batch.n_targets == [len(expected)]
                assert_close(logits, expected)


# 12


@by_scope
@by_arch
def test_12_bptt_cuts_the_gradient_before_the_last_iterations(scope, arch):
    method = change(FULL, loop_scope=scope)
    full = on(arch, method)
    expected = gradients(full, full.loss(MIXED).loss)
    for last_k in (3, 2, 1, 0):
        model = same_weights(full, change(method, bptt=last_k))
        assert_same_answers(full, model, 0)
        with states(model) as seen:
            ours = gradients(model, model.loss(MIXED).loss)
        passed = seen[scope != "all" :][:3]
        flows = [u.grad is not None and u.grad.abs().max().item() > 0 for u in passed]
        if scope == "append":  # the state is cut; what later latents read of earlier ones in the cache is not
            assert last_k == 3 or not flows[2 - last_k]
        else:
            assert flows == [t > 3 - last_k for t in (1, 2, 3)]
        if last_k == 3:
            assert_same_gradients(ours, expected, 1e-6)
        for name, grad in ours.items() if scope != "append" else ():  # there the latents stay in the cache
            if name.startswith("loop.lora"):
                assert [part.abs().max().item() > 0 for part in grad] == flows, (last_k, name)
            elif name.startswith("loop.") and last_k == 0:
                assert grad.abs().max() == 0, name


@by_arch
def test_12_another_lora_update_changes_the_passes_of_its_iteration_alone(arch):
    """With alpha = 0 every iteration reads the same state, so that passes do not depend on those before them."""
    for scope in REGIONS:
        model = on(arch, change(FULL, loop_scope=scope, residual="A", alpha=0.0))
        with states(model) as seen, torch.no_grad():
            model.answer_logits(MIXED)
            n_passes = len(seen)
            for up in model.loop.lora.up.values():
                up[1] *= 3
            model.answer_logits(MIXED)
        same = [torch.equal(a, b) for a, b in zip(seen[:n_passes], seen[n_passes:])]
        assert same == [*([True] if scope != "all" else []), True, False, True, True]


# 13


def checksum(tensors) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in tensors)).hexdigest()


@by_arch
def test_13_training_the_adapters_alone_leaves_the_base_weights(arch):
    method = change(FULL, residual="C", rescale="adapter", time_inject="concat", distinct_slots=True)
    model = LatentModel(tiny_model(Slr(), arch).backbone, base(arch).tokenizer, method)
    adapters.freeze(model)
    frozen = [p for p in model.backbone.parameters() if not p.requires_grad]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("loop.") or "trainable_tokens" in name for name in trained)
    assert {id(p) for p in trained.values()} >= {id(p) for p in model.loop.parameters()}
    before, parts = checksum(frozen), checksum(model.loop.parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(MIXED).loss.backward()
        optimizer.step()
    assert checksum(frozen) == before
    assert checksum(model.loop.parameters()) != parts


@by_arch
@pytest.mark.parametrize("hid_layers", ["last", "all"])
@pytest.mark.parametrize("hid_distance", ["smooth_l1", "cosine"])
def test_13_the_teachers_own_states_have_no_distance_to_it(arch, hid_layers, hid_distance):
    method = change(FULL, hid_weight=1.0, teacher="-", hid_layers=hid_layers, hid_distance=hid_distance)
    model = on(arch, method)
    model._teacher.append(base(arch))
    batch = model.batch(model.rows(MIXED))
    with torch.no_grad():
        thought = model._states(batch)[1]
        assert follow_loss(model, batch, thought) > 0.1
        context = Context(model.teacher, len(batch))
        targets = context.read(model.teacher.embed(batch.teacher.ids_BS), batch.teacher.mask_BS, all_states=True)
        for t, layers in enumerate(thought.layer_states):
            for layer, state in enumerate(layers):
                for row, at in enumerate(batch.follow_TB[t].tolist()):
                    if at >= 0:
                        state[row] = targets[layer].flatten(0, 1)[at]
        assert follow_loss(model, batch, thought).abs() < 1e-5


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
