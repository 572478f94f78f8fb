"""Think-at-Hard the slow way: one row, no cache, all (token, depth) pairs side by side in one pass of the decoder.

The mask is written out pair by pair from the rule of tah.md, section 3; LoRA is added to the columns of deeper pairs by
weights multiplied out; the logits of the depths are added up after the head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from innerloop import LatentModel
from innerloop.methods.depth.duo_attention import DuoCache
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun

Pair = tuple[int, int]  # token, depth


ATTENTION = {"duo": lambda k, d: k <= d, "depth1_only": lambda k, d: k == 1, "same_depth": lambda k, d: k == d}


@contextmanager
def lora_at(model: LatentModel, pairs: Sequence[Pair]) -> Iterator[None]:
    """Add the LoRA of depth d - 1 to the outputs of the columns at depth d > 1."""
    bank = model.loop.lora
    handles = []
    for name, module in {} if bank is None else bank.modules_by_name.items():

        def add(module, args, output, name=name):
            rows = [torch.zeros_like(output[0, 0])] * len(pairs)
            for column, (_, depth) in enumerate(pairs):
                if depth > 1:
                    rows[column] = bank.delta(name, depth - 1) @ args[0][0, column]
            return output + torch.stack(rows)

        handles.append(module.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slow_logits(model: LatentModel, ids: Sequence[int], depths: Sequence[int]) -> Tensor:
    """Return the logits (T, V) of one row of tokens, each read so many times."""
    method, backbone = model.method, model.backbone
    embeds = [backbone.embed(torch.tensor([[i]]))[0, 0] for i in ids]
    pairs = [(i, 1) for i in range(len(ids))]
    shown: dict[int, Tensor] = {}
    for depth in range(1, max(depths) + 1):
        if depth > 1:
            for i, limit in enumerate(depths):
                if limit >= depth:
                    top = shown[i].topk(min(method.input_mix_topk, len(shown[i])))
                    shares = top.values.exp() / top.values.exp().sum()
                    words = [backbone.embed(torch.tensor([[int(v)]]))[0, 0] for v in top.indices]
                    embeds.append(sum(share * word for share, word in zip(shares, words)))
                    pairs.append((i, depth))
        sees = ATTENTION[method.depth_attention]
        mask = [[0.0 if j <= i and sees(k, d) else -torch.inf for j, k in pairs] for i, d in pairs]
        positions = torch.tensor([[i for i, _ in pairs]])
        with lora_at(model, pairs):
            states = backbone(
                torch.stack(embeds)[None], mask=torch.tensor(mask).to(embeds[0])[None, None], positions_BL=positions
            )
        logits = backbone.head(states)[0]
        for column, (i, d) in enumerate(pairs):
            if d == depth:
                shown[i] = logits[column] + (shown[i] if depth > 1 and method.residual_logits else 0)
    return torch.stack([shown[i] for i in range(len(ids))])


slow = torch.no_grad()(slow_logits)


@torch.no_grad()
def read(
    model: LatentModel,
    ids_BL: Tensor,
    depths_BL: Tensor,
    parts: Sequence[int] | None = None,
    mask_BL: Tensor | None = None,
) -> tuple[Tensor, Context]:
    """Read rows in passes of so many tokens (None: one pass); return the logits (B, L, V) and the context."""
    context = Context(model.backbone, len(ids_BL), depth=DepthRun(model.depth))
    context.depth.wanted_BS = depths_BL
    states, start = [], 0
    for n in parts or [ids_BL.shape[1]]:
        mask = None if mask_BL is None else mask_BL[:, start : start + n]
        states.append(context.read(model.backbone.embed(ids_BL[:, start : start + n]), mask))
        start += n
    return model.backbone.head(torch.cat(states, dim=1)), context


def columns(context: Context, depth: int, layer: int = 0, row: int = 0) -> Tensor:
    """Return the keys (P, H * d) that a row has in a layer's cache at a depth, in the order of their positions."""
    assert isinstance(context.cache, DuoCache)
    slot = context.cache.slots["duo"]
    at = torch.nonzero((slot.depths_BP[row] == depth) & slot.real_BP[row])[:, 0]
    at = at[slot.positions_BP[row, at].argsort()]
    return slot.keys[layer][row][:, at].transpose(0, 1).flatten(1)
