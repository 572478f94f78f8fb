"""The decider: whether a token is hard and shall be read once more, and what it is then read as (tah.md, 3 and 5).

    x = W_1 [h_1; ..; h_m; W_0 top] ;  x = W_2 x ;  6 times: x = x + MLP(LN(x)) ;  c = w LN(x)
    the token goes on if sigmoid(c) > tau, as the mixture sum_v p_v E[v], p = softmax over its K largest logits

h_i are the token's states at some layers, ``top`` its largest logits, sorted.

Shapes: `A` tokens, `R` and `N` rows and columns of a part of a pass, `D` width, `K` logits, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.onlooker import Onlooker
from innerloop.errors import refuse
from innerloop.loop.stabilize import at_least_fp32
from innerloop.methods.depth.tah import DeciderSettings, Iterate
from innerloop.passes.tokens import CostScope, Tokens

EXPANSION = 4
AT_ONCE = 4096  # tokens that are read out together: their logits are large
N_SITES = 5  # layers that are looked at, unless they are named
FREE, ONCE = -1, 0
"""What is known of a token: nothing, so ``iterate`` decides; that it is none of those asked, so it is read once."""


class ChoiceSettings(Protocol):
    """Who says which tokens go on, and as what; a `Tah` says it."""

    @property
    def iterate(self) -> Iterate:
        """Who says which tokens go on."""

    @property
    def tau(self) -> float:
        """How sure the decider must be."""

    @property
    def input_mix_topk(self) -> int:
        """Words mixed into the next input, and logits that the decider looks at."""


def usual_layers(n_layers: int) -> tuple[int, ...]:
    """Return layers evenly spaced from the embeddings (0) to the last but one: 0, 7, 13, 20, 26 of 28."""
    last = max(n_layers - 2, min(n_layers - 1, 1))
    return tuple(sorted({int(last * i / (N_SITES - 1) + 0.5) for i in range(N_SITES)}))


class Decider(nn.Module):
    """An MLP on what a pass made of a token.

    Args:
        width: D.
        n_states: how many layers it looks at.
        n_logits: K.
        hidden: its inner width.
        n_blocks: its residual blocks.
        dropout: inside the blocks.
    """

    def __init__(self, width: int, n_states: int, n_logits: int, hidden: int, n_blocks: int, dropout: float):
        super().__init__()
        self.of_logits = nn.Linear(n_logits, width)
        self.enter, self.mix = nn.Linear((n_states + 1) * width, hidden), nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(hidden),
                nn.Linear(hidden, EXPANSION * hidden),
                nn.GELU(),
                nn.Dropout(dropout),
                nn.Linear(EXPANSION * hidden, hidden),
                nn.Dropout(dropout),
            )
            for _ in range(n_blocks)
        )
        self.norm, self.leave = nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if module is not self.leave:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    @property
    def flops(self) -> float:
        """What one decision costs."""
        return 2.0 * sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))

    def forward(self, states: Sequence[Tensor], top_AK: Tensor) -> Tensor:
        """Return c (A,), in fp32 or better, from states (A, D) of each layer and the largest logits."""
        dtype = self.enter.weight.dtype
        parts = [*states, self.of_logits(top_AK.to(dtype))]
        x = self.mix(self.enter(torch.cat([part.to(dtype) for part in parts], dim=-1)))
        for block in self.blocks:
            x = x + block(x)
        return at_least_fp32(self.leave(self.norm(x))[:, 0])


@dataclass
class Choice:
    """Which tokens go on.

    Attributes:
        goes_RN: the tokens.
        inputs_RND: their next inputs; zero elsewhere.
        asked_RN: those that ``iterate`` decided on.
        scores_RN: what the decider said of them; zero elsewhere.
        ends_A: places, row by row, of the tokens that were read out; -1 for those that go on.
        logits_AV: what they show; None where they are too many to keep.
    """

    goes_RN: Tensor
    inputs_RND: Tensor
    asked_RN: Tensor
    scores_RN: Tensor
    ends_A: Tensor
    logits_AV: Tensor | None


class Chooser(Onlooker):
    """Says which tokens go on from a depth, and makes their next inputs.

    Args:
        settings: of the decider.
        choice: who says which tokens go on, and as what.
        backbone: whose words and layers; it is looked at, not owned.
        learns: the decider is trained.
    """

    def __init__(self, settings: DeciderSettings, choice: ChoiceSettings, backbone: Backbone, learns: bool):
        super().__init__()
        self.choice, self.learns = choice, learns
        self.look_at(backbone=backbone)
        n, n_words = backbone.n_layers, backbone.lm.get_output_embeddings().weight.shape[0]
        self.layers = settings.layers or usual_layers(n)
        refuse(
            (
                not all(0 <= layer < n for layer in self.layers),
                f"decider.layers are states after layers 0 (the embeddings) to {n - 1} of this model",
            )
        )
        self.n_mixed = self.n_shown = min(choice.input_mix_topk, n_words)
        self.read_out_flops, self.mix_flops = 2.0 * backbone.width * n_words, 2.0 * backbone.width * self.n_mixed
        self.decider, self.decider_flops = None, 0.0
        if choice.iterate == "decider":
            sizes = settings.width, settings.blocks, settings.dropout
            decider = Decider(backbone.width, len(self.layers), self.n_shown, *sizes)
            self.decider, self.decider_flops = decider.requires_grad_(learns), decider.flops

    backbone: Backbone

    def forward(
        self,
        tokens: Tokens,
        states_RND: Tensor,
        layers: Sequence[Tensor],
        known_RN: Tensor,
        depth: int | Tensor,
        limit: int,
        logits_RNV: Tensor | None = None,
        cost_scope: CostScope | None = None,
    ) -> Choice | None:
        """Choose among tokens.

        Args:
            tokens: the tokens.
            states_RND: what they have come to, after the final norm.
            layers: their states after each layer (R, N, D), the embeddings first.
            known_RN: how many iterations they shall have; FREE where ``iterate`` is to say.
            depth: the depth, or that of each row (R, 1).
            limit: D, from which none goes on.
            logits_RNV: what the states show, if that is known.
            cost_scope: where the work is counted. Logits that are known are so for tokens that go on alone: those of
                the others are what is written from.

        Returns:
            The choice, or None where there is nothing to choose.
        """
        real = tokens.real & (depth < limit)
        knows = real & (known_RN > depth)
        may_ask = self.decider is not None or self.choice.iterate == "always"
        asked = real & (known_RN == FREE) if may_ask else torch.zeros_like(real)
        at_A = torch.nonzero((asked | knows).flatten())[:, 0]
        if len(at_A) == 0:
            return None
        flat = states_RND.flatten(0, 1)
        shown_AV = None if logits_RNV is None else logits_RNV.flatten(0, 1)[at_A]
        if shown_AV is None and len(at_A) <= AT_ONCE:
            shown_AV = self.backbone.head(flat[at_A])
        values, words = self.largest(flat, at_A, shown_AV)
        goes, scores = knows | asked, torch.zeros_like(known_RN, dtype=values.dtype)
        if self.decider is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.learns):
                seen = [layers[i].flatten(0, 1)[at_A].detach() for i in self.layers]
                scores_A = self.decider(seen, values[:, : self.n_shown].detach())
                scores = scores.flatten().index_copy(0, at_A, scores_A.to(scores.dtype)).view(scores.shape)
            goes = knows | (asked & (scores.sigmoid() > self.choice.tau))
        goes_A = goes.flatten()[at_A]
        mixed = self.mix(values[goes_A], words[goes_A]).to(flat.dtype)
        inputs = torch.zeros_like(flat).index_copy(0, at_A[goes_A], mixed).view(states_RND.shape)
        if cost_scope is not None:
            looks, mixes = self.decider_flops, self.mix_flops
            if logits_RNV is None:
                looks += self.read_out_flops
            else:
                mixes += self.read_out_flops
            charge(cost_scope, tokens, (asked | knows).double() * looks + goes.double() * mixes)
        return Choice(goes, inputs, asked, scores, at_A.masked_fill(goes_A, -1), shown_AV)

    def largest(self, flat: Tensor, at_A: Tensor, shown_AV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the largest logits of places of ``flat`` states and their words (A, K); not too many at once."""
        n = max(self.n_mixed, self.n_shown)
        parts = [shown_AV] if shown_AV is not None else (self.backbone.head(flat[some]) for some in at_A.split(AT_ONCE))
        values, words = zip(*(at_least_fp32(logits).topk(n) for logits in parts))
        return torch.cat(values), torch.cat(words)

    def mix(self, values_AK: Tensor, words_AK: Tensor) -> Tensor:
        """Return the mixtures (A, D) of the embeddings of the words with the largest logits."""
        shares = values_AK[:, : self.n_mixed].softmax(-1)
        return self.backbone.embed_mix(words_AK[:, : self.n_mixed], shares)


def charge(cost_scope: CostScope, tokens: Tokens, flops_RN: Tensor) -> None:
    """Count FLOPs of each of some tokens."""
    flops_R, rows = flops_RN.sum(1), tokens.rows_R
    if cost_scope.counted_B is not None:
        flops_R = flops_R * (cost_scope.counted_B if rows is None else cost_scope.counted_B[rows])
    if rows is not None and cost_scope.rows is not None:
        rows = cost_scope.rows[rows]
    cost_scope.meter.add(cost_scope.rows if rows is None else rows, flops_R)
