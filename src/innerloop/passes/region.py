"""What f is for latents: a pass over all looped positions at once, or over one new latent that stays.

Shapes: `B` rows, `N` region columns, `D` width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from innerloop.halting.evidence import RowInfo
from innerloop.passes.context import Context, Weights, merge

LoopWeights = Callable[[int], AbstractContextManager[None]]
Masked = tuple[Tensor, Tensor | None]
"""Embeddings (B, L, D) and their mask (B, L), None when all is real."""
FixedText = tuple[Tensor, Tensor]
"""Which positions of the region are text (B, N, 1), and its embeddings (B, N, D)."""


@dataclass
class Region:
    """The looped positions.

    Attributes:
        mask_BN: 1 where one is real; None when all are.
        state_mask: 1 where it is a latent; None when all are.
        fixed: the text between the latents, which is read as it is whatever the state.
    """

    mask_BN: Tensor | None
    state_mask: Tensor | None
    fixed: FixedText | None = None


def join(pieces: Sequence[Masked]) -> Masked:
    """Put embeddings side by side, with one mask over all, or None when nothing is padded."""
    embeds = torch.cat([embed for embed, _ in pieces], dim=1)
    if all(mask is None for _, mask in pieces):
        return embeds, None
    masks = [embed.new_ones(embed.shape[:2], dtype=torch.long) if mask is None else mask for embed, mask in pieces]
    return embeds, torch.cat(masks, dim=1)


class RegionPass:
    """f over all looped positions at once, each pass on the same prefix; the cache of a pass is dropped with the next.

    Args:
        prefix: what was read before.
        parts: what is known of the looped positions.
        weights: an iteration's weights.
        normed: whether outputs are states after the final norm.
        prompt: the prefix, to be read again in every pass with its weights; None: read once, with the base weights.
        keeps_caches: rows that leave keep the cache of their last pass, for `finish`.

    Attributes:
        all_states: keep the states after every layer, in ``layer_states``.
    """

    compacts = True
    row_info: RowInfo | None = None

    def __init__(
        self,
        prefix: Context,
        parts: Region,
        weights: LoopWeights,
        normed: bool,
        prompt: Masked | None = None,
        keeps_caches: bool = False,
    ):
        self.mask_BN, self.state_mask, self.fixed = parts.mask_BN, parts.state_mask, parts.fixed
        self.prefix, self.weights, self.normed = prefix, weights, normed
        self.prompt, self.keeps_caches, self.all_states = prompt, keeps_caches, False
        self.before: Tensor | None = None
        self.context: Context | None = None  # the prefix and the last pass
        self.rows = list(range(len(prefix.next_position_B)))
        self.ended: list[tuple[list[int], Context | None]] = []
        self.layer_states: list[tuple[Tensor, ...]] = []

    def __call__(self, inputs_BND: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u (B, N, D); the first ``n_extra`` inputs are no slots, and have no output."""
        weights: Weights = partial(self.weights, iteration)
        if self.prompt is None:
            self.context = self.prefix.fork()
        else:
            self.context = self.prefix.fresh()
            self.context.read(*self.prompt, weights=weights)
        mask = self.mask_BN if n_extra == 0 else with_extra(self.mask_BN, n_extra)
        if self.fixed is not None:
            fed = torch.where(*self.fixed, inputs_BND[:, n_extra:])
            inputs_BND = torch.cat([inputs_BND[:, :n_extra], fed], dim=1)
        if self.all_states:
            states = self.context.read(inputs_BND, mask, all_states=True, normed=self.normed, weights=weights)
            states = tuple(s[:, n_extra:] for s in states)
            last = states[-1] if self.normed else self.context.backbone.norm(states[-1])  # as the teacher's last
            self.layer_states.append((*states[:-1], last))
            return states[-1]
        return self.context.read(inputs_BND, mask, normed=self.normed, weights=weights)[:, n_extra:]

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some rows."""
        device = self.prefix.next_position_B.device
        if self.keeps_caches:
            leaving = [i for i in range(len(self.rows)) if i not in set(rows)]
            cache = None if self.context is None else self.context.keep_rows(torch.tensor(leaving, device=device))
            self.ended.append(([self.rows[i] for i in leaving], cache))
        index = torch.tensor(rows, device=device)
        self.prefix, self.rows = self.prefix.keep_rows(index), [self.rows[i] for i in rows]
        self.mask_BN = None if self.mask_BN is None else self.mask_BN[index]
        self.state_mask = None if self.state_mask is None else self.state_mask[index]
        self.before = None if self.before is None else self.before[index]
        if self.fixed is not None:
            is_text, text = self.fixed
            self.fixed = is_text[index], text[index]
        if self.prompt is not None:
            embeds, mask = self.prompt
            self.prompt = embeds[index], None if mask is None else mask[index]

    @property
    def context_now(self) -> Context:
        """What has been read before the region."""
        return self.prefix

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows, for what looks at their states."""
        if self.prefix.meter is not None:
            self.prefix.meter.add(self.prefix.rows, flops_B)

    def ahead(self, refeeds: bool) -> tuple[Context, Tensor | None]:
        """Return a context to read the answer on, before the last state is fed once more or instead, and its mask."""
        past = self.prefix if refeeds else self.context
        assert past is not None
        return past.fork(), self.mask_BN

    def probe(self) -> RegionPass:
        """Return a pass that leaves this one's cache and states alone."""
        twin = copy.copy(self)
        twin.all_states = False
        return twin

    def finish(self, prefix: Context, region: Tensor, mask_BN: Tensor | None) -> Context:
        """Return the context of all rows, each with the cache of its own last pass.

        Rows that never looped read the region as it was given.
        """
        parts: list[tuple[list[int], Context]] = []
        for rows, context in [*self.ended, (self.rows, self.context)]:
            if context is None:
                index = torch.tensor(rows, device=region.device)
                context = prefix.keep_rows(index)
                context.read(region[index], None if mask_BN is None else mask_BN[index])
            parts.append((rows, context))
        longest = max(context.length for _, context in parts)
        for rows, context in parts:  # a row that never looped has no column for the timestep's token
            if gap := longest - context.length:
                padding = region.new_zeros(len(rows), gap, region.shape[2])
                context.read(padding, padding[..., 0].long())
        return parts[0][1] if len(parts) == 1 else merge(parts)


class AppendPass:
    """f over one new latent per iteration, which stays in the context; rows that have ended read padding."""

    compacts = False
    state_mask: Tensor | None = None
    before: Tensor | None = None
    row_info: RowInfo | None = None
    peeks = False

    def __init__(self, context: Context, mask_BN: Tensor | None, weights: LoopWeights, normed: bool):
        self.context, self.mask_BN, self.weights, self.normed = context, mask_BN, weights, normed

    @property
    def context_now(self) -> Context:
        """What has been read."""
        return self.context

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows, for what looks at their states."""
        if self.context.meter is not None:
            self.context.meter.add(self.context.rows, flops_B)

    def ahead(self, refeeds: bool) -> tuple[Context, Tensor | None]:
        """Return a context to read the answer on; rows that have ended read too, in vain."""
        return self.context.fork(), None

    def probe(self) -> AppendPass:
        """Return a pass that reads ahead and forgets it."""
        twin = copy.copy(self)
        twin.peeks = True
        return twin

    def __call__(self, inputs_B1D: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return u (B, 1, D)."""
        mask = None if self.mask_BN is None else self.mask_BN[:, iteration - 1 : iteration]
        if active_B is not None:
            mask = active_B[:, None].long() if mask is None else mask * active_B[:, None]
        context = self.context.fork() if self.peeks else self.context
        return context.read(inputs_B1D, mask, normed=self.normed, weights=partial(self.weights, iteration))

    def keep_rows(self, rows: list[int]) -> None:
        """Rows stay."""


def with_extra(mask_BN: Tensor | None, n_extra: int) -> Tensor | None:
    """Return the mask with real columns before the slots."""
    if mask_BN is None or n_extra == 0:
        return mask_BN
    return torch.cat([mask_BN.new_ones(len(mask_BN), n_extra), mask_BN], dim=1)
