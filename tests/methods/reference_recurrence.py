"""Recurrent depth without a cache and without gathering, and what its tests share.

Every iteration runs all tokens of one row; those that have ended are shown to the others as they were in their last.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from innerloop import LatentModel, RecurrentDepth
from innerloop.decoder.cost import CostMeter
from innerloop.methods.depth.initial_state import noise_at
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun
from innerloop.passes.tokens import PassOutput
from tests.fields import change
from tests.models import WIDTH, random_ids, tiny_model

LENGTH = 9
N_WORDS = 12  # of the tokenizer's, all known to every model here


def some_ids(n_rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids (n_rows, length)."""
    return random_ids(n_rows, length, seed) % N_WORDS


IDS = some_ids(1, LENGTH, seed=3)
PLAIN = RecurrentDepth(n_prelude=1, n_core=2, n_coda=1, max_loops=4, adapter_init="default", loop_sampling="fixed")
UNEQUAL = [2, 4, 1, 3, 1, 4, 2, 1, 3]  # numbers of iterations, token by token


def recurrent(method: RecurrentDepth = PLAIN, arch: str = "llama", seed: int = 0, **changes) -> LatentModel:
    """Make a model of one, two and one layers."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if arch == "gemma3" else {}
    return tiny_model(method, arch, seed, **{"num_hidden_layers": 4, **kinds, **changes})


def with_settings(model: LatentModel, **fields) -> LatentModel:
    """Put other settings on the weights of a model, the adapter's among them."""
    twin = LatentModel(model.backbone, model.tokenizer, change(model.method, **fields))
    if twin.depth.adapter is not None and model.depth.adapter is not None:
        twin.depth.adapter.load_state_dict(model.depth.adapter.state_dict())
    return twin.to(next(model.backbone.parameters()).dtype).eval()


@torch.no_grad()
def read(
    model: LatentModel,
    ids: Tensor,
    mask: Tensor | None = None,
    wanted: Tensor | None = None,
    pieces: Sequence[int] | None = None,
    meter: CostMeter | None = None,
) -> tuple[Tensor, Context, list[PassOutput]]:
    """Read ids (B, L) in pieces; return the logits (B, L, V), the context and what each pass gave."""
    context, logits = Context(model.backbone, len(ids), meter, depth=DepthRun(model.depth)), []
    context.depth.wanted_BS = wanted
    pieces = [ids.shape[1]] if pieces is None else list(pieces)
    masks = [None] * len(pieces) if mask is None else mask.split(pieces, dim=1)
    for part, part_mask in zip(ids.split(pieces, dim=1), masks, strict=True):
        logits.append(model.backbone.head(context.read(model.backbone.embed(part), part_mask)))
    return torch.cat(logits, dim=1), context, list(context.depth.passes)


def by_token(model: LatentModel, ids: Tensor = IDS, **options) -> Tensor:
    """Return the logits (B, L, V) of ids that are read one by one."""
    return read(model, ids, pieces=[1] * ids.shape[1], **options)[0]


def flops_of(model: LatentModel, **options) -> float:
    """Return what reading IDS costs."""
    meter = CostMeter(1, torch.device("cpu"))
    read(model, IDS, meter=meter, **options)
    return meter.costs(model.backbone)[0].flops


def assert_sees_no_later_token(model: LatentModel, **options) -> None:
    """Another token changes no logits before it, but its own and some after."""
    logits = read(model, IDS, **options)[0]
    for at in range(1, LENGTH - 1):
        ids = IDS.clone()
        ids[0, at] = (ids[0, at] + 1) % N_WORDS
        changed = (read(model, ids, **options)[0] - logits).abs().amax(-1)[0]
        assert (changed[:at] <= 1e-5).all() and changed[at] > 1e-4 and (changed[at + 1 :] > 1e-4).any()


def depths_of(deep: Sequence[PassOutput]) -> list[int]:
    """Return the iterations of the tokens of one row."""
    return torch.cat([one.depths_BL for one in deep], dim=1)[0].tolist()


@torch.no_grad()
def slowly(model: LatentModel, ids: Tensor, ran: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return logits (1, L, V) and final states (1, L, D) of one row whose tokens run ``ran`` iterations each."""
    backbone, depth, method = model.backbone, model.depth, model.method
    n, ran_1L = ids.shape[1], torch.tensor([list(ran)])
    positions = torch.arange(n)[None]

    def layer(state: Tensor, index: int, keys_1L: Tensor) -> Tensor:
        mask = backbone.mask_4d(positions, positions, keys_1L, state.dtype)
        return backbone(state, mask=mask, positions_BL=positions, layers=range(index, index + 1), inner=True)

    everyone = torch.ones(1, n, dtype=torch.bool)
    told = backbone.enter(backbone.embed(ids), positions)
    for index in depth.prelude:
        told = layer(told, index, everyone)
    std = math.sqrt(2 / (5 * WIDTH)) if method.state_std is None else method.state_std
    state = (std * noise_at(torch.tensor([[method.state_seed]]), positions, WIDTH)).to(told.dtype)
    shown: dict[int, Tensor] = {}
    for i in range(1, max(ran) + 1):
        going = (ran_1L >= i)[..., None]
        x = torch.cat([state, told], dim=-1) @ depth.adapter.weight.T if depth.adapter is not None else state + told
        for index in depth.core:
            shown[index] = torch.where(going, x, shown.get(index, x))
            x = layer(shown[index], index, going[..., 0] if method.kv_lookup == "skip" else everyone)
        state = torch.where(going, x, state)
    out = backbone.norm(state) if method.double_norm else state
    for index in depth.coda:
        out = layer(out, index, everyone)
    return backbone.head(backbone.norm(out)), state


def entries(context: Context, layers: range) -> Tensor:
    """Return how many keys of some layers each position (B, L) has."""
    found = torch.zeros(len(context.next_position_B), context.length, dtype=torch.long)
    for slot in context.cache.slots.values():
        if slot.layers == layers:
            found = found.scatter_add(1, slot.positions_BP, slot.real_BP.long())
    return found
