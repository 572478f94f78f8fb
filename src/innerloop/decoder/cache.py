"""Views on Hugging Face KV caches: fork a prefix, regroup rows, drop columns.

All of them rely on one fact: what a cache has read is never changed while it lives, so two caches may share the tensors
of a common prefix (`innerloop.decoder.kv_buffer` says how they grow all the same).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from innerloop.decoder.kv_buffer import FullLayer, WindowLayer
from innerloop.decoder.ragged_cache import DepthCache, left_padded


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """Make an empty cache, whose layers grow in place."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers[i] = WindowLayer(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            cache.layers[i] = FullLayer()
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
        layer.keep_rows(rows)
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
        sides = ([getattr(cache.layers[i], side) for cache in plain] for side in ("keys", "values"))
        layer.hold(*(torch.cat([left_padded(t, n_kept) for t in side]).index_select(0, order) for side in sides))
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
            layer.hold(layer.keys.index_select(2, own), layer.values.index_select(2, own))
        else:
            layer.hold(layer.keys.index_select(2, kept), layer.values.index_select(2, kept))
    return view


def pick_columns(cache: AnyCache, columns_BC: Tensor) -> DynamicCache:
    """Return a cache with some columns alone, for each row its own; windows must have forgotten nothing."""
    assert not isinstance(cache, DepthCache)
    view: DynamicCache = fork(cache)
    index_B1C1 = columns_BC[:, None, :, None]
    for layer in view.layers:
        keys, values = layer.keys, layer.values
        layer.hold(*(t.gather(2, index_B1C1.expand(-1, t.shape[1], -1, t.shape[3])) for t in (keys, values)))
        if layer.is_sliding:
            layer.cumulative_length, layer.is_padded = columns_BC.shape[1], True
    return view


def window_of(cache: AnyCache) -> int | None:
    """Return how many columns some layers of a cache look back, their own among them; None: all look at all."""
    layers = () if isinstance(cache, DepthCache) else cache.layers
    return next((layer.sliding_window for layer in layers if layer.is_sliding), None)


AnyCache: TypeAlias = DynamicCache | DepthCache
