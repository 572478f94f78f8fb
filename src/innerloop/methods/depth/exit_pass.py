"""Passes in which tokens leave between two layers, and what becomes of the keys and values they then lack.

    lazy_backfill   an ended token's state is kept; where a later token runs a layer, those before it run it too, first
    propagate       its state is taken through the keys and values of the layers it skips, and through nothing else
    full_compute    it runs on, though its word is known: what a rule is worth without any saving

To the inner loop iteration t is what lies between two exits, and every token that writes is a row (adainfer.md, 3).

Shapes: `B` rows, `L` tokens of a pass, `W` those and the ones left behind by earlier passes, `A` tokens in a line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache, Slot, SlotLayer
from innerloop.methods.depth.adainfer import KvMissing
from innerloop.passes.ragged import BlockPass, DepthForward, TokenPass
from innerloop.passes.tokens import CostScope, PassInput, Tokens


@dataclass
class LeftBehind:
    """Tokens that some layers have still to run: a suffix of what each row has read.

    Attributes:
        tokens: their states after the sections that they have run.
        done_BW: how many these are.
    """

    tokens: Tokens
    done_BW: Tensor

    def keep_rows(self, rows: Tensor) -> LeftBehind:
        """Return those of some rows."""
        kept = self.tokens.keep_rows(rows)
        return LeftBehind(replace(kept, rows_R=None), self.done_BW[rows])


@dataclass
class ExitCache(DepthCache):
    """What has been read, as far as it has been read."""

    left: LeftBehind | None = None

    def keep_rows(self, rows: Tensor) -> DepthCache:
        """Return the cache of some rows."""
        part = super().keep_rows(rows)
        return replace(part, left=None if self.left is None else self.left.keep_rows(rows))  # type: ignore[call-arg]

    @property
    def joins(self) -> bool:
        """Only where no row has layers still to run: how many tokens were left behind differs."""
        return self.left is None


class KeysMadeError(Exception):
    """Ends a pass whose keys are all that was wanted."""


class KeyTaker(SlotLayer):
    """A layer of a slot that takes keys and values, and ends the pass."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **_: object) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (R, H, N, d)."""
        super().update(key_states, value_states)
        raise KeysMadeError


def make_keys(backbone: Backbone, tokens: Tokens, slot: Slot, cost_scope: CostScope | None) -> None:
    """Give a slot the keys and values that its layers make of some tokens' states; nothing else of them is run."""
    takers = [KeyTaker(slot, i, tokens.rows_R, (), True) for i in range(len(slot.layers))]
    slot.extend(tokens.positions_RN, tokens.real_RN, tokens.rows_R)
    slot.is_dense = False
    for taker, layer in zip(takers, slot.layers):
        cache = DynamicCache()
        cache.layers = [taker] * (layer + 1)
        with suppress(KeysMadeError):
            backbone.make_keys(tokens.states_RND, tokens.positions_RN, cache, layer)
    if cost_scope is not None:
        cost_scope.spend(tokens, torch.zeros_like(tokens.positions_RN), 0, 2.0 * backbone.n_made_by(slot.layers))


Tap = tuple[str, int]
"""Whose output, and of which layer."""


@contextmanager
def listening(modules: Mapping[Tap, nn.Module]) -> Iterator[dict[Tap, Tensor]]:
    """Record what modules return in a block; of a tuple the first part."""
    heard: dict[Tap, Tensor] = {}

    def note(tap: Tap, module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        heard[tap] = output if isinstance(output, Tensor) else output[0]

    handles = [module.register_forward_hook(partial(note, tap)) for tap, module in modules.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class ExitPass(TokenPass):
    """f: the layers up to the next exit, over the tokens that write and have not left, and whatever they need before.

    Args:
        depth: the method.
        reading: the pass.
        sections: the ranges of layers between exits.
        kv_missing: what becomes of tokens that have left.
        taps: of which outputs the cosines to those of the layer before are wanted: attention, mlp, block.
        n_candidates: after the first reading, read out only so many words, the likeliest of it; 0: all words.
    """

    def __init__(
        self,
        depth: DepthForward,
        reading: PassInput,
        sections: Sequence[range],
        kv_missing: KvMissing,
        taps: Sequence[str] = (),
        n_candidates: int = 0,
    ):
        super().__init__(depth, reading, sections[0])
        self.sections, self.kv_missing, self.taps, self.n_candidates = sections, kv_missing, taps, n_candidates
        tokens = reading.tokens
        if reading.asked_B is not None:  # tokens before it write nothing
            self.active_BL = self.active_BL & (tokens.positions_RN >= reading.asked_B[:, None])
        kept = self.active_BL.flatten()[self.flat_A]
        self.flat_A, self.row_info = self.flat_A[kept], None if self.row_info is None else self.row_info.keep_rows(kept)
        self.start_A = self.flat_A
        self.open, self.done_BW = self._gather(tokens)
        self.n_left = self.open.positions_RN.shape[1] - tokens.positions_RN.shape[1]
        self.outputs: dict[str, Tensor] = {}  # of the last layer that was listened to (B, W, D)
        self.candidates_AK: Tensor | None = None
        self.words_AV: Tensor | None = None  # where the last iteration was read out in full
        self.last_BV: Tensor | None = None  # what tokens of the last column showed when they left

    def _gather(self, tokens: Tokens) -> tuple[Tokens, Tensor]:
        """Return the tokens left behind and the new ones (B, W), and how many sections they have run."""
        cache, new_BL = self.reading.cache, torch.zeros_like(tokens.positions_RN)
        assert isinstance(cache, ExitCache)
        left, cache.left = cache.left, None
        if left is None:
            return tokens, new_BL
        both = [
            torch.cat(pair, dim=1)
            for pair in (
                (left.tokens.states_RND, tokens.states_RND),
                (left.tokens.positions_RN, tokens.positions_RN),
                (left.tokens.real, tokens.real),
                (left.done_BW, new_BL),
            )
        ]
        columns = torch.arange(both[1].shape[1], device=new_BL.device).expand_as(both[1])
        return Tokens(both[0], both[1], both[2], columns_RN=columns), both[3]

    @property
    def is_empty(self) -> bool:
        """Whether no token of the pass writes."""
        return len(self.start_A) == 0

    def spot(self, values_BL: Tensor) -> Tensor:
        """Return what all tokens that write have, (A, ...), from (B, L, ...)."""
        return values_BL.flatten(0, 1)[self.start_A]

    def settle(self, values_A: Tensor, whole: Tensor) -> Tensor:
        """Return (B, L, ...) in which the tokens that write, also those that have left, have these values."""
        return whole.flatten(0, 1).index_copy(0, self.start_A, values_A.to(whole.dtype)).view(whole.shape)

    def __call__(self, inputs_A1D: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return the states (A, 1, D) at the next exit of the tokens that go on, whose inputs are here already."""
        section, self.words_AV = iteration - 1, None
        here_BW = self.open.real & (self.done_BW == section)
        needed_BW = here_BW & self._needed()
        if self.kv_missing == "propagate":
            self._make_keys(here_BW & ~needed_BW, section)
        self._run(needed_BW, section, self.taps)
        self._hint("depth", torch.full_like(self.done_BW, self.sections[section].stop) / self.depth.backbone.n_layers)
        return self.line_up(self.open.states_RND[:, self.n_left :])

    def _needed(self) -> Tensor:
        """Return which tokens must run on for those that go on (B, W)."""
        positions_BL, active_BL, asked_B = self.reading.tokens.positions_RN, self.active_BL, self.reading.asked_B
        if self.kv_missing == "full_compute":
            return self.open.real
        if self.kv_missing == "lazy_backfill":
            return self.open.positions_RN <= positions_BL.masked_fill(~active_BL, -1).amax(1, keepdim=True)
        if asked_B is None:
            return active_BL
        # What is given goes as deep as its last token, or all the way where that is not here.
        is_asked_BL = self.reading.tokens.real & (positions_BL == asked_B[:, None])
        goes_B = (is_asked_BL & active_BL).any(1) | ~is_asked_BL.any(1)
        return torch.where(positions_BL < asked_B[:, None], goes_B[:, None], active_BL)

    def _run(self, chosen_BW: Tensor, section: int, taps: Sequence[str] = ()) -> None:
        """Run a section on some tokens."""
        part, layers, backbone = self.open.pick(chosen_BW), self.sections[section], self.depth.backbone
        if part is None:
            return
        sources = {"attention": lambda i: backbone.taps(i)[0], "mlp": lambda i: backbone.taps(i)[1]}
        modules = {(name, i): sources.get(name, lambda i: backbone.layers[i])(i) for name in taps for i in layers[-2:]}
        with listening(modules) as heard:
            states = self.depth.run(self.reading, part, layers, section, inner=section > 0)
        for name in taps:
            new = heard[name, layers[-1]]
            before = self.outputs.get(name, torch.zeros_like(self.open.states_RND))
            old = heard[name, layers[-2]] if len(layers) > 1 else part.take(before)
            cosine_RN = cosine_similarity(new.float(), old.float(), dim=-1)
            self._hint(name, part.put(torch.zeros_like(self.open.positions_RN, dtype=torch.float), cosine_RN))
            self.outputs[name] = part.put(before, new)
        self.open = self.open.with_states(part.put(self.open.states_RND, states))
        self.done_BW = self.done_BW + chosen_BW.long()

    def _hint(self, name: str, values_BW: Tensor) -> None:
        """Tell the stop rule something of the tokens that go on."""
        assert self.row_info is not None
        self.row_info.features[name] = self.line_up(values_BW[:, self.n_left :])[:, 0]

    def _make_keys(self, chosen_BW: Tensor, section: int) -> None:
        """Let some tokens skip a section, with keys and values of their last states."""
        part = self.open.pick(chosen_BW)
        if part is not None:
            slot = self.reading.cache.slot(section, self.sections[section], self.reading.tokens.positions_RN)
            make_keys(self.depth.backbone, part, slot, self.reading.cost_scope)
            self.done_BW = self.done_BW + chosen_BW.long()

    def read_all(self, states_A1D: Tensor) -> Tensor:
        """Return the logits (A, 1, V) of all words."""
        return self.depth.read_out(states_A1D)

    def read_out(self, states_A1D: Tensor) -> Tensor:
        """Return the logits (A, 1, V) that states show; with candidates, those of each token's own few words."""
        backbone = self.depth.backbone
        normed = backbone.norm(states_A1D)
        if self.candidates_AK is not None:
            return backbone.head_rows(normed[:, 0], self.candidates_AK)[:, None]
        logits = backbone.head(normed)
        self.words_AV = logits[:, 0]
        n_words, n = logits.shape[-1], self.n_candidates
        if n == 0 or n >= n_words:
            return logits
        self.candidates_AK = logits[:, 0].topk(n, dim=-1).indices  # the loop counts what it is given
        self.count(torch.full_like(logits[:, 0, 0], 2.0 * backbone.width * (n_words - n), dtype=torch.float64))
        return logits.gather(-1, self.candidates_AK[:, None])

    def count_rows(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows of the pass."""
        BlockPass.count(self, flops_B)

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some tokens."""
        index = torch.tensor(rows, device=self.flat_A.device)
        self._note_words(torch.ones_like(self.flat_A, dtype=torch.bool).index_fill(0, index, False))
        self.candidates_AK = None if self.candidates_AK is None else self.candidates_AK[index]
        super().keep_rows(rows)

    def _note_words(self, gone_A: Tensor) -> None:
        """Keep what tokens of the last column showed when they left: nothing is read out twice while writing."""
        if self.words_AV is None or self.reading.cost_scope is None:
            return
        n_rows, n_columns = self.active_BL.shape
        gone_A = gone_A & (self.flat_A % n_columns == n_columns - 1)
        words_AV, rows = self.words_AV[gone_A], self.flat_A[gone_A] // n_columns
        if self.last_BV is None:
            self.last_BV = words_AV.new_full((n_rows, words_AV.shape[1]), torch.nan)
        self.last_BV = self.last_BV.index_copy(0, rows, words_AV)

    def finish(self) -> None:
        """Do with the tokens that have left what is to be done with them."""
        self._note_words(torch.ones_like(self.flat_A, dtype=torch.bool))
        everyone, n = self.open.real, len(self.sections)
        if self.kv_missing == "lazy_backfill":
            self._leave_behind(everyone & (self.done_BW < n))
            return
        for section in range(n):
            here_BW = everyone & (self.done_BW == section)
            if self.kv_missing == "full_compute" or self.is_empty:
                self._run(here_BW, section)
            else:
                self._make_keys(here_BW, section)

    def _leave_behind(self, chosen_BW: Tensor) -> None:
        cache, most = self.reading.cache, int(chosen_BW.sum(1).max())
        assert isinstance(cache, ExitCache)
        if most == 0:
            return
        order_BN = torch.argsort((~chosen_BW).byte(), dim=1, stable=True)[:, :most]
        states = self.open.states_RND.gather(1, order_BN[..., None].expand(-1, -1, self.open.states_RND.shape[-1]))
        positions, real, done = (of.gather(1, order_BN) for of in (self.open.positions_RN, chosen_BW, self.done_BW))
        cache.left = LeftBehind(Tokens(states, positions, real), done)
