"""Views on Hugging Face KV caches: fork a prefix, regroup rows, one slot per (loop, layer).

All of them rely on one fact: what a cache has read is never changed while it lives, so two caches may share the tensors
of a common prefix. Each update makes new key and value tensors by concatenation, through which gradients flow; compiled
passes (innerloop/compiled.py) write in place, behind the columns of everyone who shares the memory (`RoomLayer`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from innerloop.depth_cache import DepthCache, left_padded

COLUMNS = 64
"""Rooms have a multiple of so many columns, so that passes of a few shapes serve all lengths."""


class WindowLayer(DynamicSlidingWindowLayer):
    """A layer that forgets what lies behind its window, which is counted in real columns.

    Once columns may be padding (`expect_padding`) it forgets nothing until `keep_columns` says what no row sees.
    """

    keys: Tensor
    values: Tensor
    is_padded = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, H, L, d); return all that the pass attends to."""
        if not self.is_padded:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        self.values = torch.cat([self.values, value_states], dim=-2)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many columns a pass attends to, and how many came before them."""
        if not self.is_padded:
            return super().get_mask_sizes(query_length)
        return self.n_kept + query_length, self.cumulative_length - self.n_kept

    @property
    def n_kept(self) -> int:
        """The number of columns that are remembered."""
        return self.keys.shape[2] if self.is_initialized and self.keys.numel() else 0


class RoomLayer(DynamicLayer):
    """A growing layer whose keys and values may lie in a `Room` with more columns than it has; forks share the room."""

    keys: Tensor
    values: Tensor
    room: Room | None = None
    placed: Tensor | None = None  # the keys as they lie in the room; others may have been put in their place since

    def __copy__(self) -> RoomLayer:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        if twin.room is not None:
            twin.room.guests.add(twin)
        return twin

    @property
    def n_placed(self) -> int:
        """The number of columns that lie in the room."""
        return 0 if self.placed is None or self.keys is not self.placed else self.placed.shape[2]

    def make_room(self, n_new: int) -> Room:
        """Return a room in which the columns lie and where nobody else's lie behind them, with space for ``n_new``."""
        n, room = self.get_seq_length(), self.room
        is_mine = room is not None and self.n_placed == n and n + n_new <= room.n_columns
        if room is None or not is_mine or any(guest.n_placed > n for guest in room.guests if guest is not self):
            room = Room(self.keys, self.values, -(-(n + n_new) // COLUMNS) * COLUMNS)
            room.guests.add(self)
            self.room = room
            self.place(n)
        return room

    def place(self, n_columns: int) -> None:
        """Let the first columns of the room be the layer's."""
        assert self.room is not None
        self.keys = self.placed = self.room.keys[:, :, :n_columns]
        self.values = self.room.values[:, :, :n_columns]


class Room:
    """Memory for keys and values (B, H, C, d) of ``n_columns`` columns, of which the first are known."""

    def __init__(self, keys: Tensor, values: Tensor, n_columns: int):
        n_more = n_columns - keys.shape[2]
        self.keys, self.values = pad(keys, (0, 0, 0, n_more)), pad(values, (0, 0, 0, n_more))
        self.n_columns = n_columns
        self.guests: weakref.WeakSet[RoomLayer] = weakref.WeakSet()


def new_cache(config: PreTrainedConfig, n_loops: int = 1) -> DynamicCache:
    """Make an empty cache with one slot per (loop, layer), loop-major: slot ``loop * n_layers + layer``."""
    cache = DynamicCache(config=config)
    for _ in range(n_loops - 1):
        cache.layers.extend(DynamicCache(config=config).layers)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = WindowLayer(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            cache.layers[i] = RoomLayer()
    return cache


def expect_padding(cache: DynamicCache) -> int | None:
    """Let layers with a window forget nothing; return how many columns they hold, None if there are none."""
    windows = [layer for layer in cache.layers if isinstance(layer, WindowLayer)]
    for layer in windows:
        layer.is_padded = True
    return max((layer.n_kept for layer in windows), default=None)


def fork(cache: AnyCache) -> AnyCache:
    """Return a cache with the same contents that grows on its own; no tensor is copied.

    Keeping a prefix and rolling back is: read into a fork, drop the fork.
    """
    if isinstance(cache, DepthCache):
        return cache.fork()
    view = copy.copy(cache)
    view.layers = [copy.copy(layer) for layer in cache.layers]
    return view


def select_rows(cache: AnyCache, rows: Tensor) -> AnyCache:
    """Return a cache with the batch rows ``rows`` (R,) of ``cache``, in that order; the original stays as it is."""
    if isinstance(cache, DepthCache):
        return cache.keep_rows(rows)
    view: DynamicCache = fork(cache)
    for layer in view.layers:
        if layer.get_seq_length() > 0:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
    return view


def join_rows(caches: Sequence[AnyCache], gaps: Sequence[int], order: Tensor) -> AnyCache:
    """Put the rows of caches below each other, then in the order ``order``.

    Caches of unlike length are made alike by ``gaps`` columns of padding before each.
    """
    first = caches[0]
    if isinstance(first, DepthCache):
        return first.joined([cache for cache in caches if isinstance(cache, DepthCache)], gaps, order)
    plain: list[DynamicCache] = [cache for cache in caches if not isinstance(cache, DepthCache)]
    view: DynamicCache = fork(first)
    for i, layer in enumerate(view.layers):
        if all(cache.layers[i].get_seq_length() == 0 for cache in plain):
            continue
        n_kept = n_all = max(cache.layers[i].get_seq_length() + gap for cache, gap in zip(plain, gaps))
        if layer.is_sliding:  # what a row has forgotten already it sees no more, whatever stands there
            n_kept = max(cache.layers[i].n_kept for cache in plain)
            layer.cumulative_length, layer.is_padded = n_all, any(gaps) or any(c.layers[i].is_padded for c in plain)
        layer.keys = torch.cat([left_padded(cache.layers[i].keys, n_kept) for cache in plain]).index_select(0, order)
        layer.values = torch.cat([left_padded(cache.layers[i].values, n_kept) for cache in plain])[order]
    return view


def keep_columns(cache: AnyCache, kept: Tensor, first_seen: int = 0, is_padded: bool = True) -> AnyCache:
    """Return a cache with some columns alone, in their order; the others are padding in every row.

    Layers with a window keep only what any row may yet see: the columns from the place ``first_seen`` of ``kept`` on.
    ``is_padded`` says whether any of ``kept`` is padding in some row.
    """
    if isinstance(cache, DepthCache):
        return cache.keep_columns(kept)
    view: DynamicCache = fork(cache)
    for layer in view.layers:
        if layer.get_seq_length() == 0:
            continue
        if layer.is_sliding:
            own = kept[first_seen:] - (layer.cumulative_length - layer.n_kept)
            layer.cumulative_length, layer.is_padded = len(kept), is_padded
            layer.keys, layer.values = layer.keys.index_select(2, own), layer.values.index_select(2, own)
        else:
            layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)
    return view


def window_of(cache: AnyCache) -> int | None:
    """Return how many columns some layers of a cache look back, their own among them; None: all look at all."""
    layers = () if isinstance(cache, DepthCache) else cache.layers
    return next((layer.sliding_window for layer in layers if layer.is_sliding), None)


def loop_slots(cache: DynamicCache, loop: int, n_layers: int, first_layer: int = 0) -> DynamicCache:
    """View loop ``loop``'s slots of a cache made by ``new_cache(config, n_loops)`` as an ordinary cache.

    What is written through the view is written into ``cache``. When only the layers from ``first_layer`` on will run,
    the entries below it are stood in for by a later layer of the same kind, because masks are sized by asking an early
    layer for its length.
    """
    slots = cache.layers[loop * n_layers : (loop + 1) * n_layers]
    if len(slots) != n_layers:
        raise IndexError(f"the cache has {len(cache.layers) // n_layers} loops of {n_layers} layers, loop {loop} asked")
    ran = slots[first_layer:]
    view = copy.copy(cache)
    view.layers = [ran[0]] * first_layer + ran
    return view


AnyCache: TypeAlias = DynamicCache | DepthCache
