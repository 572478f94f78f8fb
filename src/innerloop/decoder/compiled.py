"""Compiled passes of a decoder on memory that stands still: what a thought or a written token repeats.

A pass that grows its cache has another shape each time. Here keys and values lie in buffers of a multiple of `COLUMNS`
columns; a pass writes its own in place, attends to the whole buffer, and a mask hides what is not there. So passes of
the same number of rows and new columns have the same shape: `torch.compile` makes one program of them, on a GPU one
CUDA graph. Nothing in a pass asks the device anything.

    model.backbone.compile_passes()
    model.generate(questions)

Shapes: `B` rows, `L` new positions, `C` columns of a buffer, `D` width, `h` heads of keys, `d` their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from innerloop.decoder.anatomy import decoder_of, text_config
from innerloop.decoder.cache import AnyCache
from innerloop.decoder.columns import counts_columns
from innerloop.decoder.kv_buffer import FullLayer, KvBuffer
from innerloop.decoder.masks import kinds_of, visible, window_of
from innerloop.phases.phase import phase

MOST_COLUMNS = 64
"""Passes of more new columns than this are no steps, and not compiled."""


class StillLayer(DynamicLayer):
    """A layer during a compiled pass: new keys and values are put in the columns ``at_L`` of a buffer."""

    def __init__(self, keys: Tensor, values: Tensor, at_L: Tensor):
        super().__init__()
        self.keys, self.values, self.at_L = keys, values, at_L
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Remember new keys and values (B, h, L, d); return the whole buffer's."""
        self.keys.index_copy_(2, self.at_L, key_states)
        self.values.index_copy_(2, self.at_L, value_states)
        return self.keys, self.values


class CompiledPasses:
    """Passes of a decoder that read a few columns each.

    Args:
        lm: the model whose decoder it is.
        backend: what torch.compile makes programs with.
    """

    def __init__(self, lm: PreTrainedModel, backend: str = "inductor"):
        self.lm, self.known = lm, set[tuple[int, ...]]()  # of what shapes a program is there
        self.is_plain = kinds_of(text_config(lm)) <= {"full_attention"} and not counts_columns(decoder_of(lm))
        is_cuda = lm.get_input_embeddings().weight.device.type == "cuda" and backend == "inductor"
        self.step: Callable[..., Tensor] = torch.compile(
            self._step, backend=backend, mode="reduce-overhead" if is_cuda else None
        )

    def takes(self, cache: AnyCache, n_new: int) -> bool:
        """Whether a pass can be compiled: it is a short one, on keys that no layer forgets, and nothing is learned."""
        if torch.is_grad_enabled() or n_new > MOST_COLUMNS or not isinstance(cache, DynamicCache):
            return False
        if not self.is_plain or window_of(text_config(self.lm)) is not None:
            return False
        return all(isinstance(layer, FullLayer) and layer.get_seq_length() > 0 for layer in cache.layers)

    def __call__(self, embeds_BLD: Tensor, positions_BL: Tensor, mask_BP: Tensor | None, cache: DynamicCache) -> Tensor:
        """Read new columns and remember them; return their final-norm states (B, L, D).

        Args:
            embeds_BLD: input embeddings.
            positions_BL: position ids.
            mask_BP: 1 where a column is real, the new ones included; None: all are.
            cache: what was read before.
        """
        layers: Sequence[Any] = cache.layers
        n_new = embeds_BLD.shape[1]
        buffers: list[KvBuffer] = [layer.make_space(n_new) for layer in layers]
        if embeds_BLD.is_cuda:
            for buffer in buffers:  # a CUDA graph writes to the memory it was recorded with
                torch._dynamo.mark_static_address(buffer.keys, guard=False)
                torch._dynamo.mark_static_address(buffer.values, guard=False)
        end, n_columns = layers[0].get_seq_length() + n_new, buffers[0].n_columns
        for buffer in buffers:
            buffer.clear(end)  # hidden columns are multiplied by zero, which a NaN outlives
        at_L = torch.arange(end - n_new, end, device=embeds_BLD.device)
        seen_BLC = torch.arange(n_columns, device=at_L.device) <= at_L[None, :, None]
        if mask_BP is None:
            seen_BLC = seen_BLC.expand(len(embeds_BLD), -1, -1)
        else:
            real_BC = mask_BP.new_zeros(len(mask_BP), n_columns, dtype=torch.bool)
            real_BC[:, :end] = mask_BP.bool()
            seen_BLC = seen_BLC & real_BC[:, None, :]
        config = text_config(self.lm)
        kind = torch.bool if config._attn_implementation == "sdpa" else embeds_BLD.dtype
        mask = visible(config, seen_BLC, seen_BLC, kind)
        tensors = [buffer.keys for buffer in buffers], [buffer.values for buffer in buffers]
        shape = (*embeds_BLD.shape, n_columns)
        with nullcontext() if shape in self.known else phase(f"compiling a pass of {shape[0]} rows"):
            states = self.step(embeds_BLD, positions_BL, mask, at_L, *tensors)
        self.known.add(shape)
        for layer in layers:
            layer.place(end)
        return states.clone() if states.is_cuda else states  # the graph's own memory is written over by its next run

    def _step(
        self,
        embeds_BLD: Tensor,
        positions_BL: Tensor,
        mask: Tensor,
        at_L: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        cache = DynamicCache()
        cache.layers = [StillLayer(k, v, at_L) for k, v in zip(keys, values)]
        out = decoder_of(self.lm)(
            inputs_embeds=embeds_BLD,
            attention_mask=mask,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state
