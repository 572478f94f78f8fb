"""Layers of a KV cache that grow in place: keys and values lie in memory with more columns than they have.

Growing by concatenation copies all that was read for each token that is written. In a buffer new columns are written
behind those that are known, and forks of a prefix share it. What a layer has read is never changed while the layer
lives: one that finds somebody else's columns behind its own goes to a buffer of its own. Where something is learned,
gradients flow through the buffer (`_Appended`): a thought of T latents keeps its keys once, not T times.

Shapes: `B` rows, `H` heads of keys, `L` new columns, `P` known ones, `C` columns of a buffer, `d` width of a head.
"""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

COLUMNS = 64
"""Rooms have a multiple of so many columns: they are copied seldom, and compiled passes find few shapes."""


class KvBuffer:
    """Memory for keys and values (B, H, C, d), of which the first columns are known."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
        self.owners: weakref.WeakSet[BufferedLayer] = weakref.WeakSet()
        self.n_used = 0  # columns that somebody has had here
        self.is_kept = False  # whether a backward pass may need what anybody has had here, also those who are gone

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, n_columns: int) -> KvBuffer:
        """Return a buffer for at least ``n_columns`` columns, whose first are copies of these, the others zero."""
        n_columns = -(-n_columns // COLUMNS) * COLUMNS
        return cls(_with_space(keys, n_columns), _with_space(values, n_columns))

    @property
    def n_columns(self) -> int:
        """How many columns there is memory for."""
        return self.keys.shape[2]

    def is_taken(self, n_columns: int, owner: BufferedLayer) -> bool:
        """Whether others than an owner have columns behind the first ones here, or had some that are still needed."""
        if self.is_kept:
            return self.n_used > n_columns
        if len(self.owners) == 1:  # as it mostly is
            return False
        return any(one.buffer is self and one.n_placed > n_columns for one in self.owners if one is not owner)

    def clear(self, n_columns: int) -> None:
        """Forget what those who are gone have left behind the first columns."""
        if self.n_used > n_columns:
            self.keys[:, :, n_columns : self.n_used].zero_()
            self.values[:, :, n_columns : self.n_used].zero_()
            self.n_used = n_columns


class BufferedLayer:
    """What a layer does that may have its columns in a buffer."""

    keys: Tensor
    values: Tensor
    is_initialized: bool
    buffer: KvBuffer | None = None
    placed: Tensor | None = None  # the keys as they lie in the buffer; others may have been put in their place since
    n_appended = 0  # how often columns have come where something is learned

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if twin.buffer is not None:
            twin.buffer.owners.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "buffer": None, "placed": None}  # what is pickled or copied deeply is alone

    @property
    def n_kept(self) -> int:
        """The number of columns that are remembered."""
        return self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0

    @property
    def n_placed(self) -> int:
        """The number of columns that lie in the buffer."""
        return 0 if self.placed is None or self.keys is not self.placed else self.placed.shape[2]

    def grow(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d) in a buffer; return all."""
        n, end = self.n_kept, self.n_kept + keys.shape[2]
        if n == 0:
            self.move(KvBuffer.of(keys, values, end), end)
            return self.keys, self.values
        buffer = self.make_space(keys.shape[2])
        buffer.keys[:, :, n:end] = keys
        buffer.values[:, :, n:end] = values
        self.place(end)
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d), through which gradients flow; return all.

        What is read once, or once more, as a row's answer, is no longer than it must be; from the second time on there
        is space for more.
        """
        n, known = self.n_kept, self.keys
        self.n_appended += 1
        if n == 0 or self.n_appended < 3:
            whole = (keys, values) if n == 0 else (torch.cat([known, keys], 2), torch.cat([self.values, values], 2))
            self.hold(*whole)
            return whole
        past = self.values
        buffer = self.make_space(keys.shape[2])
        buffer.is_kept = True
        grown = _Appended.apply(known, keys, buffer.keys), _Appended.apply(past, values, buffer.values)
        self.place(n + keys.shape[2])
        self.keys, self.values = grown
        self.placed = self.keys
        return self.keys, self.values

    def make_space(self, n_new: int) -> KvBuffer:
        """Return a buffer in which the columns lie and nobody else's lie behind them, with space for ``n_new``."""
        n, buffer = self.n_kept, self.buffer
        if (
            buffer is None
            or self.n_placed != n
            or n + n_new > buffer.n_columns
            or buffer.is_taken(n, self)
            or (buffer.keys.is_inference() and not torch.is_inference_mode_enabled())  # written to no more
        ):
            buffer = self.move(KvBuffer.of(self.keys, self.values, n + n_new), n)
        return buffer

    def keep_rows(self, rows: Tensor) -> None:
        """Let the batch rows be ``rows`` (R,) of these; columns that lie in a buffer go to one as large."""
        n, buffer = self.n_placed, self.buffer
        if buffer is not None and n > 0 and not torch.is_grad_enabled():
            part = KvBuffer(buffer.keys.index_select(0, rows), buffer.values.index_select(0, rows))
            part.n_used = buffer.n_used
            self.move(part, n)
        elif self.n_kept > 0:
            self.hold(self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def cut(self, n_columns: int) -> None:
        """Forget all but the first columns."""
        n_columns = min(n_columns, self.n_kept)
        if 0 < n_columns <= self.n_placed:
            self.place(n_columns)
        elif self.n_kept:
            self.hold(self.keys[:, :, :n_columns], self.values[:, :, :n_columns])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns, as Hugging Face's layers do."""
        n_placed = self.n_placed
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if 0 < self.n_kept < n_placed:
            self.place(self.n_kept)

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Have these keys and values, which lie in no buffer."""
        self.keys, self.values, self.buffer, self.placed = keys, values, None, None

    def move(self, buffer: KvBuffer, n_columns: int) -> KvBuffer:
        """Let the first columns of another buffer be the layer's."""
        self.buffer = buffer
        buffer.owners.add(self)
        self.place(n_columns)
        return buffer

    def place(self, n_columns: int) -> None:
        """Let the first columns of the buffer be the layer's."""
        assert self.buffer is not None
        self.buffer.n_used = max(self.buffer.n_used, n_columns)
        self.keys = self.placed = self.buffer.keys[:, :, :n_columns]
        self.values = self.buffer.values[:, :, :n_columns]


class FullLayer(BufferedLayer, DynamicLayer):
    """A layer that forgets nothing."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Have no columns, of the type and on the device of these; the device is not waited for."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = (t.new_empty(*t.shape[:2], 0, t.shape[3]) for t in (key_states, value_states))

    @classmethod
    def holding(cls, keys: Tensor, values: Tensor) -> FullLayer:
        """Return a layer of keys and values (B, H, P, d) that lie in no buffer yet."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        layer.hold(keys, values)
        return layer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d); return all that the pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return (self.append if torch.is_grad_enabled() else self.grow)(key_states, value_states)


class WindowLayer(BufferedLayer, DynamicSlidingWindowLayer):
    """A layer that forgets what lies behind its window, which is counted in real columns.

    Once columns may be padding (`cache.expect_padding`) it forgets nothing until `cache.keep_columns` says what no row
    sees.
    """

    is_padded = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d); return all that the pass attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_new = key_states.shape[2]
        if not self.is_padded and (torch.is_grad_enabled() or self.cumulative_length + n_new >= self.sliding_window):
            self.buffer = self.placed = None
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        self.cumulative_length += n_new
        return (self.append if torch.is_grad_enabled() else self.grow)(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a pass attends to, and how many came before them."""
        if not self.is_padded:
            return super().get_mask_sizes(query_length)
        return self.n_kept + query_length, self.cumulative_length - self.n_kept


class _Appended(torch.autograd.Function):
    """Columns written behind known ones in a buffer that both lie in: nothing is copied, and each gets its gradient.

    The buffer is written to where nobody has ever had columns (`KvBuffer.is_kept`), so torch need not count it.
    """

    @staticmethod
    def forward(ctx: Any, known: Tensor, new: Tensor, buffer: Tensor) -> Tensor:
        ctx.n = known.shape[2]
        whole = buffer.data[:, :, : ctx.n + new.shape[2]]
        whole[:, :, ctx.n :] = new
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        return gradient[:, :, : ctx.n], gradient[:, :, ctx.n :], None


def _with_space(known: Tensor, n_columns: int) -> Tensor:
    """Return a copy of keys or values (B, H, P, d) with zeros behind them, ``n_columns`` in all."""
    whole = known.new_empty(*known.shape[:2], n_columns, known.shape[3])
    whole[:, :, : known.shape[2]] = known.detach()
    whole[:, :, known.shape[2] :].zero_()
    return whole
