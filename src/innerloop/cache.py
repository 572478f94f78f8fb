"""Views on Hugging Face KV caches: fork a prefix, regroup rows, one slot per (loop, layer).

All of them rely on one fact: a growing cache layer (`DynamicLayer`, `DynamicSlidingWindowLayer`) never writes in place.
Each update makes new key and value tensors by concatenation, so two caches may share the tensors of a common prefix,
and gradients flow through them.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig


def new_cache(config: PreTrainedConfig, n_loops: int = 1) -> DynamicCache:
    """Make an empty cache with one slot per (loop, layer), loop-major: slot ``loop * n_layers + layer``."""
    cache = DynamicCache(config=config)
    for _ in range(n_loops - 1):
        cache.layers.extend(DynamicCache(config=config).layers)
    return cache


def fork(cache: DynamicCache) -> DynamicCache:
    """Return a cache with the same contents that grows on its own; no tensor is copied.

    Keeping a prefix and rolling back is: read into a fork, drop the fork.
    """
    view = copy.copy(cache)
    view.layers = [copy.copy(layer) for layer in cache.layers]
    return view


def select_rows(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache with the batch rows ``rows`` (R,) of ``cache``, in that order; the original stays as it is."""
    view = fork(cache)
    for layer in view.layers:
        if layer.get_seq_length() > 0:
            layer.keys = layer.keys.index_select(0, rows)
            layer.values = layer.values.index_select(0, rows)
    return view


def join_rows(caches: Sequence[DynamicCache], order: Tensor) -> DynamicCache:
    """Put the rows of caches of the same length below each other, then in the order ``order``."""
    view = fork(caches[0])
    for i, layer in enumerate(view.layers):
        if layer.get_seq_length() > 0:
            layer.keys = torch.cat([cache.layers[i].keys for cache in caches]).index_select(0, order)
            layer.values = torch.cat([cache.layers[i].values for cache in caches]).index_select(0, order)
    return view


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
