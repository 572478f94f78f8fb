"""Passes of unlike depth: tokens run a varying number of layers, or the same layers a varying number of times.

The inner loop runs inside the token: its state are the tokens' states between two layers, f is a range of layers.

A depth method is a `DepthForward`: it takes the place of the decoder's own pass in `Context.read`, so training,
generation, caches, counting and saving are those of every other method.

Shapes: `B` rows, `L` tokens of a pass, `A` tokens in a line, `D` width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from innerloop.config.method import Method
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.onlooker import Onlooker
from innerloop.decoder.ragged_cache import DepthCache, Slot
from innerloop.halting.evidence import RowInfo
from innerloop.loop.loop import InnerLoop
from innerloop.passes.loss_inputs import LossInputs, PassTerms, Reference
from innerloop.passes.tokens import PassInput, PassOutput, Tokens, read_layers
from innerloop.text.batch import Batch


class DepthForward(Onlooker, ABC):
    """How a decoder makes a pass. A method's own subclass says it in `forward`; parts that it trains are its modules.

    Args:
        method: the settings.
        backbone: whose layers run; it is looked at, not owned.
        loop: the inner loop with its trained parts, for methods that iterate.
    """

    def __init__(self, method: Method, backbone: Backbone, loop: InnerLoop):
        super().__init__()
        self.look_at(method=method, backbone=backbone, loop=loop)

    backbone: Backbone
    loop: InnerLoop
    step: int | None = None
    """The optimizer step that training is in; None where nothing counts them. The trainer sets it."""

    def read_out(self, states: Tensor) -> Tensor:
        """Return the logits that states between two layers show through the final norm and the head."""
        return self.backbone.head(self.backbone.norm(states))

    waits: bool = False
    """Whether it may leave a token unfinished while answering: its row then waits while the others write on."""

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing."""
        return DepthCache()

    def wanted(self, batch: Batch, reference: Reference | None = None) -> Tensor | None:
        """Return how many iterations each column of a batch shall have (B, S), for methods that know beforehand."""
        return None

    @abstractmethod
    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the method's own terms of the loss, those that its passes have summed up over rows."""
        terms = PassTerms()
        for deep in inputs.thought.deep:
            for name, total in deep.sums.items():
                terms[name] = (terms[name][0] + total if name in terms else total), "rows"
        return terms

    def run(
        self,
        reading: PassInput,
        tokens: Tokens,
        layers: range,
        key: Hashable,
        also: Sequence[Slot] = (),
        writes: bool = True,
        inner: bool = True,
    ) -> Tensor:
        """Run some layers on some tokens, in the slot ``key``; see `read_layers`."""
        slot = reading.cache.slot(key, layers, reading.tokens.positions_RN)
        slot.is_dense = slot.is_dense and slot.length >= reading.n_read  # else nobody took part in some pass
        return read_layers(self.backbone, tokens, slot, also, writes, inner, reading.cost_scope)


class BlockPass:
    """f: a range of layers over all tokens of a pass; every iteration has a slot of its own. Rows stay.

    Args:
        depth: the method.
        reading: the pass.
        layers: the range.
        is_first: the range begins with the embeddings, which only its first iteration reads.
        key: makes the slot's key of an iteration.
    """

    compacts = False
    before: Tensor | None = None
    row_info: RowInfo | None = None

    def __init__(
        self,
        depth: DepthForward,
        reading: PassInput,
        layers: range,
        is_first: bool = False,
        key: Callable[[int], Hashable] = lambda loop: loop,
    ):
        self.depth, self.reading, self.layers, self.is_first, self.key = depth, reading, layers, is_first, key
        self.state_mask = None if reading.tokens.real_RN is None else reading.tokens.real_RN.long()

    def __call__(self, inputs_BLD: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return the states (B, L, D) after the range."""
        tokens = self.reading.tokens
        if active_B is not None:
            tokens = replace(tokens, real_RN=tokens.real & active_B[:, None])
        with self.weights(iteration):
            return self.run(tokens.with_states(inputs_BLD), iteration)

    def run(self, tokens: Tokens, iteration: int) -> Tensor:
        """Run the range on some tokens in the slot of ``iteration``."""
        inner = not self.is_first or iteration > 1
        return self.depth.run(self.reading, tokens, self.layers, self.key(iteration), inner=inner)

    def weights(self, iteration: int) -> AbstractContextManager[None]:
        """Return the block in which ``iteration`` runs."""
        return self.depth.loop.weights(iteration) if self.depth.loop is not None else nullcontext()

    def keep_rows(self, rows: list[int]) -> None:
        """Rows stay."""

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the rows, for what looks at their states."""
        cost_scope = self.reading.cost_scope
        if cost_scope is not None:
            counted_B = flops_B if cost_scope.counted_B is None else flops_B * cost_scope.counted_B
            cost_scope.meter.add(cost_scope.rows, counted_B)


class TokenPass(BlockPass):
    """f over tokens that may end one by one: to the loop each token is a row of its own, (A, 1, D).

    Those that go on are packed again; a slot holds the tokens that have run its iteration.
    """

    compacts = True

    def __init__(
        self,
        depth: DepthForward,
        reading: PassInput,
        layers: range,
        is_first: bool = False,
        key: Callable[[int], Hashable] = lambda loop: loop,
    ):
        super().__init__(depth, reading, layers, is_first, key)
        self.state_mask = None
        self.active_BL = reading.tokens.real
        self.flat_A = torch.nonzero(self.active_BL.flatten())[:, 0]
        positions_BL, asked_B = reading.tokens.positions_RN, reading.asked_B
        written_BL = positions_BL if asked_B is None else (positions_BL - asked_B[:, None]).clamp(min=0)
        places_A, written_A = (of_BL.flatten()[self.flat_A] for of_BL in (positions_BL, written_BL))
        self.row_info = RowInfo(places_A, written_A)

    def count(self, flops_B: Tensor) -> None:
        """Count FLOPs of the tokens that go on (A,), for what looks at their states."""
        n_rows, n_columns = self.active_BL.shape
        super().count(flops_B.new_zeros(n_rows).index_add(0, self.flat_A // n_columns, flops_B))

    def place(self, values_A: Sequence[int] | Tensor, whole: Tensor) -> Tensor:
        """Return (B, L, ...) in which all tokens of the pass have these values in place of ``whole``'s."""
        where = torch.nonzero(self.reading.tokens.real.flatten())[:, 0]
        values = torch.as_tensor(values_A, device=whole.device).to(whole.dtype)
        return whole.flatten(0, 1).index_copy(0, where, values).view(whole.shape)

    def line_up(self, values_BLD: Tensor) -> Tensor:
        """Return what the tokens that go on have, (A, 1, ...), from (B, L, ...)."""
        return values_BLD.flatten(0, 1)[self.flat_A][:, None]

    def spread(self, values_A1D: Tensor) -> Tensor:
        """Return (B, L, ...) from what the tokens that go on have; zero elsewhere."""
        shape = self.active_BL.shape
        whole = values_A1D.new_zeros(shape.numel(), *values_A1D.shape[2:])
        return whole.index_copy(0, self.flat_A, values_A1D[:, 0]).view(*shape, *values_A1D.shape[2:])

    def __call__(self, inputs_A1D: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return the states (A, 1, D) after the range."""
        tokens = self.reading.tokens.with_states(self.spread(inputs_A1D)).pick(self.active_BL)
        assert tokens is not None
        with self.weights(iteration):
            states = self.run(tokens, iteration)
        return self.line_up(tokens.put(self.spread(torch.zeros_like(inputs_A1D)), states))

    def keep_rows(self, rows: list[int]) -> None:
        """Go on with some tokens."""
        self.flat_A = self.flat_A[torch.tensor(rows, device=self.flat_A.device)]
        self.row_info = (
            None if self.row_info is None else self.row_info.keep_rows(torch.tensor(rows, device=self.flat_A.device))
        )
        active = torch.zeros_like(self.active_BL).flatten()
        self.active_BL = active.index_fill(0, self.flat_A, True).view(self.active_BL.shape)
