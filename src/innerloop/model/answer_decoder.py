"""Other ways to answer than by the model itself: a small decoder that looks at the final state, or a classifier.

    separate:  [<eot>][A]  --causal layers, cross-attention to z_T (and the prompt)-->  A[eos]
    linear:    mean of z_T over positions  -->  one of a few classes, in one shot

(slr.md, section 3, "Decode".) Shapes: `B` rows, `N` looped positions, `D` width, `S` columns of the suffix, `M` memory
positions, `V` vocabulary, `C` classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from innerloop.config.losses import DecoderSettings
from innerloop.decoder.backbone import Backbone
from innerloop.halting.evidence import masked_mean
from innerloop.loop.stabilize import sines
from innerloop.passes.thought import Masked, Thought


class AnswerDecoder(nn.Module):
    """A causal transformer decoder over the suffix that attends to the final state.

    Args:
        settings: its size and what it reads.
        backbone: whose width and heads it has, and whose tables it may share.
    """

    def __init__(self, settings: DecoderSettings, backbone: Backbone):
        super().__init__()
        self.reads, width = settings.decoder_reads, backbone.width
        layer = nn.TransformerDecoderLayer(
            width,
            backbone.config.num_attention_heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerDecoder(layer, settings.decoder_layers, norm=nn.LayerNorm(width))
        self.memory_norm = nn.LayerNorm(width)
        self.table = self.head = None
        if settings.decoder_table == "own":
            self.table = nn.Embedding(backbone.config.vocab_size, width)
            self.head = nn.Linear(width, backbone.config.vocab_size, bias=False)

    def memory(self, state_BND: Tensor, mask_BN: Tensor | None, prompt: Masked) -> Masked:
        """Return what is attended to (B, M, D), every position normalised, and its mask."""
        parts = [(state_BND, mask_BN), prompt] if self.reads == "state_and_prompt" else [(state_BND, mask_BN)]
        masks = [torch.ones(part.shape[:2], device=part.device) if mask is None else mask for part, mask in parts]
        whole = torch.cat([part for part, _ in parts], dim=1).to(self.memory_norm.weight.dtype)
        return self.memory_norm(whole), torch.cat([mask.bool() for mask in masks], dim=1)

    def forward(self, ids_BS: Tensor, memory: Masked, backbone: Backbone) -> Tensor:
        """Return the logits (B, S, V) of the token after each of the suffix ``ids_BS`` (padded on the right)."""
        return self.show(self.read(ids_BS, memory, backbone), backbone)

    def read(self, ids_BS: Tensor, memory: Masked, backbone: Backbone) -> Tensor:
        """Return the states (B, S, D) of a suffix (padded on the right)."""
        embeds = backbone.embed(ids_BS) if self.table is None else self.table(ids_BS)
        kept, known = memory
        embeds = layer_norm(embeds.to(kept.dtype), embeds.shape[-1:])
        positions = torch.arange(ids_BS.shape[1], device=ids_BS.device)
        embeds = embeds + sines(positions, embeds.shape[-1]).to(embeds.dtype)
        causal = nn.Transformer.generate_square_subsequent_mask(ids_BS.shape[1], embeds.device, embeds.dtype)
        assert known is not None
        hidden = torch.zeros(known.shape, device=kept.device, dtype=kept.dtype).masked_fill(~known, -torch.inf)
        return self.layers(embeds, kept, tgt_mask=causal, memory_key_padding_mask=hidden, tgt_is_causal=True)

    def show(self, states: Tensor, backbone: Backbone) -> Tensor:
        """Return the logits (..., V) of states."""
        if self.head is not None:
            return self.head(states)
        return backbone.head(states.to(backbone.lm.get_output_embeddings().weight.dtype))


class Classifier(nn.Module):
    """One linear map from the mean of the final state, normalised, to the classes."""

    def __init__(self, settings: DecoderSettings, backbone: Backbone):
        super().__init__()
        self.classes = settings.classes
        self.norm = nn.LayerNorm(backbone.width)
        self.linear = nn.Linear(backbone.width, len(settings.classes))

    def forward(self, thought: Thought) -> Tensor:
        """Return the logits (B, C)."""
        assert thought.loop is not None
        mean = masked_mean(thought.loop.state, thought.state_mask)
        return self.linear(self.norm(mean.to(self.linear.weight.dtype)))


def decoder_for(settings: DecoderSettings, backbone: Backbone) -> AnswerDecoder | Classifier | None:
    """Return what answers besides the model, if anything does."""
    match settings.decoder:
        case "separate":
            return AnswerDecoder(settings, backbone)
        case "linear":
            return Classifier(settings, backbone)
    return None
