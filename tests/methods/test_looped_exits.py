"""Ways out of the loop: losses at every exit, the learned gate, tokens that stop, shared keys and values."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, cross_entropy, kl_div

from innerloop import LatentModel
from innerloop.methods.depth.exits import improvement_loss
from innerloop.methods.depth.looped import LoopedExits, LoopedStop
from tests.close import assert_close
from tests.fields import change
from tests.methods.test_looped import assert_same, gap, looped, texts
from tests.methods.tools import MIXED, QUESTIONS, by_arch, gradients, logits_of, with_token

GATED = {"max_loops": 3, "stop.rule": "halt"}


def other(model: LatentModel, **fields) -> LatentModel:
    """Put other settings on the same weights."""
    twin = LatentModel(model.backbone, model.tokenizer, change(model.method, **fields))
    for name, part in twin.trained_modules().items():
        part.load_state_dict(model.trained_modules()[name].state_dict(), strict=False)
    return twin.eval()


def target_logits(model: LatentModel) -> tuple[Tensor, Tensor]:
    """Return the logits (U, V) of written tokens and the tokens (U,)."""
    batch = model.batch(model.rows(MIXED))
    return model.written_logits(batch, model.think(batch)), batch.targets_U


def at_each_exit(model: LatentModel) -> tuple[list[Tensor], Tensor]:
    """Return what models of 1, 2, ... loops say, and what they should."""
    plain = {"exits": LoopedExits(), "stop": LoopedStop()}
    n_loops = range(1, model.method.max_loops + 1)
    said = [target_logits(other(model, **plain, max_loops=loops)) for loops in n_loops]
    return [logits for logits, _ in said], said[0][1]


def assert_learns(model: LatentModel, expected: Tensor) -> dict[str, Tensor]:
    """Compare the loss in training, and its gradients, with what they should be; return the gradients."""
    loss = model.train().loss(MIXED).loss
    assert_close(loss, expected)
    ours, theirs = gradients(model, loss), gradients(model, expected)
    for name in ours:
        assert_close(ours[name], theirs[name])
    return ours


# Losses at exits


@pytest.mark.parametrize(
    ("arch", "n_ends", "schedule"),
    [("llama", 0, "equal"), ("gpt2", 0, "linear"), ("llama", 1, "linear"), ("gpt2", 1, "equal")],
)
def test_every_exit_learns_as_the_model_that_ends_there(arch, n_ends, schedule):
    exits = {"exits.weight": 0.5, "exits.schedule": schedule}
    model = looped(arch, max_loops=3, n_prelude=n_ends, n_coda=n_ends, **exits)
    said, targets = at_each_exit(model)
    first, second, last = (cross_entropy(logits, targets) for logits in said)
    expected = first + second if schedule == "equal" else first / 3 + second * 2 / 3
    assert_close(model.train().loss(MIXED).terms["exits"], expected)
    assert_learns(model, last + 0.5 * expected)
    assert model.eval().loss(MIXED).terms.keys() == {"answer"}


def test_exits_follow_the_last_whose_own_distribution_is_left_alone():
    model = looped(max_loops=2, **{"exits.weight": 0.1, "exits.kd": 2.0})
    (first, last), targets = at_each_exit(model)
    kept = kl_div(first.log_softmax(-1), last.detach().log_softmax(-1), reduction="batchmean", log_target=True)
    assert_learns(model, cross_entropy(last, targets) + 0.1 * (cross_entropy(first, targets) + 2.0 * kept))


# The gate's mathematics


def test_an_iteration_is_worth_what_it_gains():
    losses, logits = torch.tensor([[2.0], [1.9], [2.5]]), torch.tensor([[0.3], [-0.4], [0.8]])
    wanted = torch.sigmoid(50 * (torch.tensor([0.1, 0.0]) - 0.005))
    expected = binary_cross_entropy(1 - logits[1:, 0].sigmoid(), wanted)
    assert_close(improvement_loss(losses, logits), expected)


# Training the gate


@by_arch
def test_the_gate_and_the_model_learn_the_loss_expected_over_exits(arch):
    model = looped(arch, **GATED, **{"exits.gate": "distribution", "exits.gate_beta": 0.2})
    said, targets = at_each_exit(model)
    losses = torch.stack([cross_entropy(logits, targets, reduction="none") for logits in said])
    batch = model.batch(model.rows(MIXED))
    rows, at = batch.predict_at_U // batch.ids_BS.shape[1], batch.predict_at_U % batch.ids_BS.shape[1]
    rates = [torch.sigmoid(model.loop.stop.gate(state_after(model, t)[rows, at]))[:, 0] for t in (1, 2, 3)]
    p = torch.stack([rates[0], (1 - rates[0]) * rates[1], (1 - rates[0]) * (1 - rates[1])])
    grads = assert_learns(model, ((p * losses).sum(0) + 0.2 * (math.log(3) + (p * p.log()).sum(0))).mean())
    assert grads["loop.stop.gate.weight"].abs().max() > 0


def state_after(model: LatentModel, loops: int) -> Tensor:
    """Return the block's state (B, L, D) after some loops, before the final norm."""
    seen = []
    handle = model.backbone.layers[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    target_logits(other(model, max_loops=loops, exits=LoopedExits(), stop=LoopedStop()))
    handle.remove()
    return seen[-1] if isinstance(seen[-1], Tensor) else seen[-1][0]


def test_the_second_stage_trains_the_gate_alone():
    model = looped(**GATED, **{"exits.gate": "improvement"}).train()
    learned = {name for name, grad in gradients(model, model.loss(MIXED).loss).items() if grad.abs().max() > 0}
    assert learned == {"loop.stop.gate.weight", "loop.stop.gate.bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned


# Tokens that stop

by_missing = pytest.mark.parametrize("kv_missing", ["share_step", "restrict", "full_compute"])


@by_arch
@by_missing
def test_thresholds_at_both_ends_are_one_loop_and_all(arch, kv_missing):
    model = looped(arch, **GATED, kv_missing=kv_missing)
    whole = other(model, stop=LoopedStop(), kv_missing="share_step")
    for bias, threshold, n_loops in ((0, 1.0, 3), (0, torch.inf, 3), (0, 0.0, 1), (1e4, 0.9, 1), (-1e4, 0.9, 3)):
        if bias:  # lambda_1 is 1 or 0
            model.loop.stop.gate.bias.data.fill_(bias)
        assert_same(other(model, stop={"threshold": threshold}), other(whole, max_loops=n_loops), exactly=True)


def halting(arch: str, **fields) -> LatentModel:
    """Make a model whose tokens stop after one, two or three loops."""
    model = looped(arch, **{**GATED, "stop.threshold": 0.5, **fields})
    with torch.no_grad():
        model.loop.stop.gate.weight.copy_(torch.linspace(-1, 1, 32).sin()[None] / 3)
        model.loop.stop.gate.bias.fill_(-0.5)
    return model


@torch.no_grad()
def slowly(model: LatentModel, ids: list[int]) -> tuple[Tensor, list[int]]:
    """One row (L, V), layer by layer without a cache; each token stops by itself, then is seen as the policy says."""
    backbone, method, gate = model.backbone, model.method, model.loop.stop.gate
    at = torch.arange(len(ids))
    h = backbone.enter(backbone.embed(torch.tensor([ids])), at[None])[0]
    depths, survival, said = torch.zeros(len(ids), dtype=torch.long), torch.ones(len(ids)), h.clone()
    inputs = [torch.zeros_like(h) for _ in backbone.layers]  # what each layer last read of every token
    going = at
    for loop in range(1, method.max_loops + 1):
        depths[going] = loop
        state, runs = h.clone(), at if method.kv_missing == "full_compute" else going
        for j, read in enumerate(inputs):
            read[runs] = state[runs]
            shown = going if method.kv_missing == "restrict" else at
            mask = backbone.mask_4d(shown[None], shown[None], None, h.dtype)
            out = backbone(read[None, shown], mask=mask, positions_BL=shown[None], layers=range(j, j + 1), inner=True)
            state[shown] = out[0]
        h[runs] = state[runs]
        said[going] = h[going]
        survival[going] *= 1 - gate(h[going])[:, 0].sigmoid()
        going = going[1 - survival[going] < method.stop.threshold]
    return backbone.head(backbone.norm(said)), depths.tolist()


@by_arch
@by_missing
def test_tokens_stop_one_by_one_as_the_card_says(arch, kv_missing):
    """Reading everything at once, and writing with a cache."""
    model, seen = halting(arch, kv_missing=kv_missing), set()
    for example, logits in zip(MIXED, model.answer_logits(MIXED)):
        (row,) = model.rows([example])
        expected, depths = slowly(model, row.ids()[:-1])
        assert_close(logits, expected[-len(logits) :])
        batch = model.batch([row])
        model.written_logits(batch, thought := model.think(batch))
        assert thought.deep[-1].depths_BL[0, :-1].tolist() == depths
        seen |= set(depths)
    assert seen == {1, 2, 3}
    for unlike in {"share_step", "restrict", "full_compute"} - {kv_missing}:
        assert gap(model, other(model, kv_missing=unlike)) > 1e-3
    for question, generation in zip(QUESTIONS, model.generate(QUESTIONS[:2], max_new_tokens=6)):
        ids = model.tokenizer.encode(question + "\n")
        for token in generation.ids:
            logits, depths = slowly(model, ids)
            assert token == int(logits[-1].argmax())
            ids.append(token)
        assert [depth for _, depth in generation.depths][: len(depths)] == depths


@pytest.mark.parametrize(
    "stop",
    [
        {"rule": "delta", "threshold": 0.3},
        {"rule": "cos", "threshold": 0.7, "patience": 2},
        {"rule": "kl", "threshold": 0.8},
        {"rule": "entropy", "threshold": 0.5},
        {"rule": "argmax", "threshold": 1.0},
        {"rule": "gap", "threshold": 0.2, "min_loops": 2},
        {"rule": "fixed", "threshold": 2.0},
        {"rule": "random", "histogram": (1.0, 1.0, 1.0, 1.0)},
    ],
    ids=lambda one: one["rule"],
)
def test_tokens_stop_by_any_score_and_rows_do_as_alone(stop):
    model = looped(max_loops=4, n_prelude=1, n_coda=1, stop=stop)
    together = model.generate(QUESTIONS, max_new_tokens=5)
    for question, ours in zip(QUESTIONS[:2], together):
        (alone,) = model.generate([question], max_new_tokens=5)
        assert (alone.text, alone.depths, alone.cost.flops) == (ours.text, ours.depths, ours.cost.flops)
    seen = {depth for generation in together for _, depth in generation.depths}
    assert seen == {2} if stop["rule"] == "fixed" else len(seen) > 1
    assert min(seen) >= stop.get("min_loops", 1) and max(seen) <= 4


def test_what_is_spent_is_what_was_run():
    """FLOPs of tokens that stop: their own layers and keys, and a look at the gate after every loop but the last."""
    model = halting("llama", kv_missing="restrict")
    (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=1)
    depths = [depth for _, depth in generation.depths]
    weights = sum(p.numel() for p in model.backbone.layers.parameters())
    runs = [[i for i, depth in enumerate(depths) if depth >= loop] for loop in (1, 2, 3)]
    pairs = sum(len([j for j in run if j <= i]) for run in runs for i in run)
    expected = 2 * weights * sum(map(len, runs)) + 4 * 32 * 3 * pairs  # three layers of width 32
    expected += 2 * 32 * (len(runs[0]) + len(runs[1])) + 2 * 32 * model.backbone.config.vocab_size
    assert len(set(depths)) > 1 and generation.cost.flops == expected


def test_tokens_that_run_on_cost_as_if_none_had_stopped():
    model = halting("llama", kv_missing="full_compute")
    whole = other(model, stop=LoopedStop(), kv_missing="share_step")
    ours, theirs = (one.generate(QUESTIONS[:1], max_new_tokens=1)[0] for one in (model, whole))
    depths = [depth for _, depth in ours.depths]
    looks = sum(min(depth, 2) for depth in depths)  # none after the last iteration
    assert min(depths) < 3 and ours.cost.flops == theirs.cost.flops + 2 * 32 * looks


@pytest.mark.parametrize("fields", [{"loop.residual": "B", "loop.time": "lookup"}, {"input_injection": True}], ids=str)
def test_tokens_that_run_on_are_seen_as_if_none_had_stopped(fields):
    """The word of a token that has run every iteration is then that of a model without a stop."""
    model = halting("llama", kv_missing="full_compute", n_prelude=1, **{"stop.threshold": 0.85}, **fields)
    for name, part in model.named_parameters():
        if name in ("depth.gamma", "loop.time.table"):
            part.data += 0.3
    whole = other(model, stop=LoopedStop(), kv_missing="share_step")
    (row,) = model.rows(MIXED[:1])
    batch = model.batch([row])
    model.written_logits(batch, thought := model.think(batch))
    ours, theirs = (logits_of(one, [row])[0] for one in (model, whole))
    last = thought.deep[-1].depths_BL[0, -len(ours) - 1 : -1] == 3  # of the tokens that are followed by those
    assert 0 < last.sum() < len(last)
    assert_close(ours[last], theirs[last])
    assert (ours - theirs)[~last].abs().amax(1).min() > 1e-3


def test_a_later_token_changes_no_earlier_depth():
    model = halting("llama")
    (row,) = model.rows(MIXED[:1])
    logits, n = logits_of(model, [row])[0], len(row)
    changed = logits_of(model, [with_token(row, n - 4, row.ids()[n - 4] - 1)])[0]
    assert_close(changed[:-3], logits[:-3])
    assert (changed - logits).abs().amax(1)[-3:].min() > 1e-6


# Keys and values that stand for all loops

by_share = pytest.mark.parametrize("kv_share", ["last_loop", "first_loop", "mean"])


@by_arch
@by_share
def test_shared_keys_and_values_are_exact_with_one_loop_and_when_reading_at_once(arch, kv_share):
    one, more = (looped(arch, max_loops=n, kv_share=kv_share) for n in (1, 3))
    assert texts(one, 4) == texts(other(one, kv_share="none"), 4)
    assert_same(more, other(more, kv_share="none"), exactly=True)
    assert texts(more, 4) == [more.generate([question], max_new_tokens=4)[0].text for question in QUESTIONS]


@torch.no_grad()
def decode(model: LatentModel, ids: Tensor, n_prefill: int) -> tuple[Tensor, int]:
    """Read a row's first tokens at once and the others one by one; return the logits (L, V) and the keys kept."""
    context = model.new_context(model.batch(model.prompts(QUESTIONS[:1])))
    states = [context.read(model.backbone.embed(ids[None, :n_prefill]))]
    states += [context.read(model.backbone.embed(ids[None, i : i + 1])) for i in range(n_prefill, len(ids))]
    kept = sum(key.shape[2] for slot in context.cache.slots.values() for key in slot.keys)
    return model.backbone.head(torch.cat(states, dim=1))[0], kept


@torch.no_grad()
def decode_slowly(model: LatentModel, ids: Tensor, n_prefill: int) -> Tensor:
    """The same with a plain cache for each loop, whose past is replaced by what stands for all before each token."""
    backbone, n_loops, layers = model.backbone, model.method.max_loops, range(model.backbone.n_layers)
    chosen = {"last_loop": [n_loops - 1], "first_loop": [0], "mean": list(range(n_loops))}[model.method.kv_share]
    shared: list[list[Tensor]] = [[] for _ in range(2 * len(layers))]  # the keys and values of each layer
    states = []
    for start, end in [(0, n_prefill), *((i, i + 1) for i in range(n_prefill, len(ids)))]:
        at = torch.arange(start, end)[None]
        h, new = backbone.enter(backbone.embed(ids[None, start:end]), at), []
        for _ in range(n_loops):
            cache = backbone.empty_cache()
            for layer, keys, values in zip(cache.layers, shared[::2], shared[1::2]):
                if start > 0:
                    layer.update(torch.cat(keys, dim=2), torch.cat(values, dim=2))
            h = backbone(h, layers=layers, positions_BL=at, cache=cache, inner=True)
            new.append([side[:, :, start:] for layer in cache.layers for side in (layer.keys, layer.values)])
        for place, sides in zip(shared, zip(*new)):
            place.append(torch.stack([sides[loop] for loop in chosen]).mean(0))
        states.append(h)
    return backbone.head(backbone.norm(torch.cat(states, dim=1)))[0]


@by_arch
@by_share
def test_a_written_token_sees_what_stands_for_all_loops_and_its_own_current_state(arch, kv_share):
    """Approximate by definition: how far the distributions of written tokens are from those of all keys and values."""
    model = looped(arch, max_loops=3, kv_share=kv_share)
    ids, whole = torch.tensor(model.rows(MIXED[:1])[0].ids()[:12]), other(model, kv_share="none")
    logits, kept = decode(model, ids, 6)
    assert_close(logits, decode_slowly(model, ids, 6))
    exact, kept_by_all = decode(whole, ids, 6)
    assert kept_by_all == 3 * kept == 9 * len(ids) and torch.equal(logits[:6], exact[:6])
    assert_close(exact, decode(whole, ids, len(ids))[0])
    shared, exact = logits[6:].log_softmax(-1), exact[6:].log_softmax(-1)
    assert 1e-4 < kl_div(shared, exact, reduction="batchmean", log_target=True) < 5.0
