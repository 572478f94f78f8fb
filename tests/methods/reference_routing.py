"""MoD and MoR without a cache and without gathering: every layer runs all tokens, masks hide those that are not chosen.

Also what the tests of both share: one pass of a model over token ids, token by token or at once.
"""

import dataclasses

import torch
from torch import Tensor

from innerloop import LatentModel
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.masks import visible
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun
from innerloop.passes.tokens import PassOutput
from tests.methods.tools import ROUNDED
from tests.models import random_ids

LENGTH = 9
N_WORDS = 15  # of the chain task


def some_ids(n_rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random ids (n_rows, length) that a model of the chain task knows."""
    return random_ids(n_rows, length, seed) % N_WORDS


IDS = some_ids(1, LENGTH, seed=3)


def scattered(model: LatentModel, scale: float = 1.0) -> LatentModel:
    """Draw routers, and what chooses in their stead, so that they tell tokens apart."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.depth.named_parameters():
        if any(part in name for part in ("router", "predictor")):
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def on_same(model: LatentModel, **fields) -> LatentModel:
    """Put other settings on the weights of a model."""
    twin = LatentModel(model.backbone, model.tokenizer, dataclasses.replace(model.method, **fields))
    twin.depth.load_state_dict(model.depth.state_dict())
    return twin.eval()


def opened(model: LatentModel, n_rows: int = 1, meter: CostMeter | None = None) -> Context:
    """Return a context that has read nothing."""
    return Context(model.backbone, n_rows, meter, depth=DepthRun(model.depth))


def only_pass(model: LatentModel, ids: Tensor, mask: Tensor | None = None) -> PassOutput:
    """Read ids (B, L) with gradients; return what the pass gave."""
    context = opened(model, len(ids))
    context.read(model.backbone.embed(ids), mask)
    return context.depth.passes[0]


def read(model: LatentModel, ids: Tensor, mask: Tensor | None = None, meter: CostMeter | None = None):
    """Read ids (B, L) in one pass; return the logits (B, L, V), the context and what the pass gave."""
    return read_embeds(model, model.backbone.embed(ids), mask, meter)


@torch.no_grad()
def read_embeds(model: LatentModel, embeds: Tensor, mask: Tensor | None = None, meter: CostMeter | None = None):
    """Read embeddings (B, L, D) in one pass."""
    context = opened(model, len(embeds), meter)
    states = context.read(embeds, mask)
    return model.backbone.head(states), context, context.depth.passes[-1]


def leak(model: LatentModel, ids: Tensor) -> tuple[float, float]:
    """Return for which share of tokens the logits change when the row (1, L) goes on, and how much at the most.

    Looked at are all beginnings of the row. Another number of packed tokens rounds otherwise, which is no change.
    """
    whole = read(model, ids)[0]
    changes = [(read(model, ids[:, :n])[0] - whole[:, :n]).abs().amax(-1).flatten() for n in range(1, ids.shape[1])]
    change = torch.cat(changes)
    return (change > ROUNDED).float().mean().item(), change.max().item()


def displaces(model: LatentModel, ids: Tensor, router: Tensor, early: Tensor) -> bool:
    """Put a token with a huge score at the end of a row; return whether an earlier one makes room for it.

    ``early`` (1, L - 1) is how deep the tokens before it are while the last one has no such score; then what is written
    after the earlier tokens changes as well.
    """
    embeds = model.backbone.embed(ids).detach()
    before = read_embeds(model, embeds)[0][:, :-1]
    found = False
    for sign in (-100.0, 100.0):
        crafted = torch.cat([embeds[:, :-1], sign * router.detach().expand(1, 1, -1)], dim=1)
        logits, _, deep = read_embeds(model, crafted)
        if not torch.equal(deep.depths_BL[:, :-1], early):
            assert (logits[:, :-1] - before).abs().max() > 1e-3
            found = True
    return found


@torch.no_grad()
def stepwise(
    model: LatentModel, ids: Tensor, n_first: int = 1, meter: CostMeter | None = None
) -> tuple[Tensor, Context]:
    """Read the first ids in one pass and the others one by one; return all logits (B, L, V)."""
    context, logits = opened(model, len(ids), meter), []
    for part in (ids[:, :n_first], *ids[:, n_first:].split(1, dim=1)):
        logits.append(model.backbone.head(context.read(model.backbone.embed(part))))
    return torch.cat(logits, dim=1), context


def highest(scores: list[float], among: list[int], k: int) -> Tensor:
    """Return the mask (1, L) of the k highest scores, of equal ones the earlier."""
    best = sorted(among, key=lambda i: (-scores[i], i))[:k]
    return torch.tensor([[i in best for i in range(len(scores))]])


def gate_value(method, score: Tensor, alpha: float) -> Tensor:
    match method.gate:
        case "identity":
            return score
        case "sigmoid":
            return score.sigmoid()
        case "scaled_sigmoid":
            return alpha * score.sigmoid()
    return torch.ones_like(score)


def gated(before: Tensor, after: Tensor, g: Tensor, target: str) -> Tensor:
    """The card's three readings, as they are written there."""
    g = g[..., None]
    return {"delta": before + g * (after - before), "full": before + g * after, "replace": g * after}[target]


def masked_layer(model: LatentModel, state: Tensor, layer: int, keys_1L: Tensor) -> Tensor:
    """Run one layer on all tokens, which see the keys at and before their own position that ``keys_1L`` allows."""
    positions = torch.arange(state.shape[1])[None]
    mask = model.backbone.mask_4d(positions, positions, keys_1L, state.dtype)
    return model.backbone(state, mask=mask, positions_BL=positions, layers=range(layer, layer + 1), inner=True)


@torch.no_grad()
def dense_mod(model: LatentModel, ids: Tensor, k: int | None = None) -> tuple[Tensor, list[Tensor]]:
    """Return logits (1, L, V) and the chosen tokens of each routed layer; k None: by the sign of the score."""
    backbone, depth, method = model.backbone, model.depth, model.method
    n = ids.shape[1]
    state, everyone = backbone.enter(backbone.embed(ids), torch.arange(n)[None]), torch.ones(1, n, dtype=torch.bool)
    chosen = []
    for layer in range(backbone.n_layers):
        if layer not in depth.routed:
            state = masked_layer(model, state, layer, everyone)
            continue
        score = state @ depth.routers[len(chosen)].weight[0]
        is_in = score > 0 if k is None else highest(score[0].tolist(), list(range(n)), k)
        after = masked_layer(model, state, layer, is_in)
        g = gate_value(method, score, method.alpha)
        state = torch.where(is_in[..., None], gated(state, after, g, method.gate_target), state)
        chosen.append(is_in)
    return backbone.head(backbone.norm(state)), chosen


def shared_layer(model: LatentModel, first: Tensor, state: Tensor, layer: int) -> Tensor:
    """Run one layer on tokens that see the keys which the layer makes of their states ``first`` in recursion 1."""
    n = state.shape[1]
    positions = torch.arange(n)[None].repeat(1, 2)
    behind = positions[:, :, None] - positions[:, None, :]
    seen = (behind >= 0) & (torch.arange(2 * n) < n)  # what comes second makes no keys that anyone sees
    both = torch.cat([first, state], dim=1)
    mask = visible(model.backbone.config, seen, behind, state.dtype)
    return model.backbone(both, mask=mask, positions_BL=positions, layers=range(layer, layer + 1), inner=True)[:, n:]


@torch.no_grad()
def dense_mor(model: LatentModel, ids: Tensor, sees_later: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Return logits (1, L, V) and the tokens of each recursion, by either routing."""
    backbone, depth, method = model.backbone, model.depth, model.method
    n, everyone = ids.shape[1], torch.ones(1, ids.shape[1], dtype=torch.bool)
    state, last = backbone.enter(backbone.embed(ids), torch.arange(n)[None]), backbone.n_layers - 1
    if method.is_middle:
        state = masked_layer(model, state, 0, everyone)
    start, among, chosen, inputs = state, everyone, [], {}
    shares = (state @ depth.routers[0].weight.T).softmax(-1)
    for r, layers in enumerate(method.recursions(backbone.n_layers)):
        if method.routing == "token":
            depths = shares.argmax(-1)
            among = depths >= r
            g = gate_value(method, torch.ones(1), 1.0) if method.gate == "st" else shares.amax(-1)
            g = g * (method.alpha or 1.0)
        else:
            score = state @ depth.routers[r].weight[0]
            before = 1.0 if r == 0 else method.shares[r - 1]
            if sees_later:
                k = max(1, int(method.shares[r] * n + 1e-9))
                among = highest(score[0].tolist(), torch.nonzero(among[0])[:, 0].tolist(), k)
            elif method.shares[r] < before:
                among = among & (score.sigmoid() >= 0.5)
            g = gate_value(method, score, 0.1 if method.alpha is None else method.alpha)
        after = state
        for place, layer in enumerate(layers):
            inputs.setdefault(place, after)
            is_shared = method.kv == "recursive_sharing" and r > 0
            shown = inputs[place] if is_shared else after
            after = shared_layer(model, shown, after, layer) if is_shared else masked_layer(model, after, layer, among)
        new = gated(state, after, g, method.gate_target)
        if method.routing == "token":
            going = after
            if method.tc_weighting == "every":
                going = gated(state, after, g, "replace" if method.gate_target == "full" else "delta")
            new = torch.where((depths == r)[..., None], gated(start, after, g, method.gate_target), going)
        state = torch.where(among[..., None], new, state)
        chosen.append(among)
    if method.is_middle:
        state = masked_layer(model, state, last, everyone)
    return backbone.head(backbone.norm(state)), chosen
