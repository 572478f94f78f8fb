"""A Hugging Face decoder seen as embed -> layers -> norm -> head; the only file that knows architectures.

The state every method works with is the decoder's output *after* the final norm, i.e. exactly the input of the head
(cot.md, section 0). Shapes: `B` rows, `L` positions, `D` width, `V` vocabulary.

    backbone = Backbone(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
    logits_BLV = backbone.head(backbone(backbone.embed(ids_BL)))
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from innerloop.cache import new_cache
from innerloop.errors import InputError


@dataclass(frozen=True)
class Anatomy:
    """Where a family of decoders keeps its parts: attribute names inside the inner model."""

    layers: str
    norm: str
    positions: str | None = None  # a table of learned absolute positions, added to the input embeddings
    dropout: str | None = None  # applied to the input embeddings


LLAMA_LIKE = Anatomy(layers="layers", norm="norm")  # Llama, Qwen2/3, Mistral, Gemma 2/3, SmolLM3, Phi-3, OLMo 2, ...
GPT2_LIKE = Anatomy(layers="h", norm="ln_f", positions="wpe", dropout="drop")


class ZeroPositions(nn.Module):
    """Stands in for a table of learned positions where they have been added already."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """Return zeros (B, L, 1), which broadcast over the width; as booleans they leave any type of state as it is."""
        return torch.zeros(*position_ids.shape, 1, dtype=torch.bool, device=position_ids.device)


class Backbone(nn.Module):
    """One view over Hugging Face decoders, run from embeddings.

    Args:
        lm: any decoder-only ``...ForCausalLM`` model.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.anatomy = GPT2_LIKE if hasattr(self.decoder, "wpe") else LLAMA_LIKE
        for name in (self.anatomy.layers, self.anatomy.norm):
            if not hasattr(self.decoder, name):
                raise InputError(
                    f"{type(lm).__name__} has no '{name}' in its decoder, so innerloop cannot read its layers; "
                    "use a decoder shaped like Llama, Qwen, Mistral, Gemma or GPT-2"
                )

    @property
    def decoder(self) -> nn.Module:
        """The inner model: embeddings, layers and final norm, without the head."""
        return self.lm.get_decoder() if hasattr(self.lm, "get_decoder") else self.lm.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The stack of decoder layers."""
        return getattr(self.decoder, self.anatomy.layers)

    @property
    def config(self):
        """The text part of the Hugging Face configuration."""
        return self.lm.config.get_text_config(decoder=True)

    @property
    def width(self) -> int:
        """The width `D` of the states."""
        return self.config.hidden_size

    @property
    def n_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.layers)

    @property
    def context_length(self) -> int | None:
        """The most positions a row may have, where the model says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """The device of the embedding table."""
        return self.lm.get_input_embeddings().weight.device

    def embed_rms(self) -> Tensor:
        """Return tau, the root mean square over the whole input embedding table as the layers see it (scalar, fp32)."""
        table = self.lm.get_input_embeddings()
        scale = getattr(table, "embed_scale", 1.0)
        return table.weight.detach().float().pow(2).mean().sqrt() * scale

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Return the input embeddings (B, L, D), scaled as the model scales them."""
        return self.lm.get_input_embeddings()(ids_BL)

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) read from final-norm states (..., D)."""
        logits = self.lm.get_output_embeddings()(states)
        if scale := getattr(self.config, "logits_scaling", None):  # Granite divides
            logits = logits / scale
        if scale := getattr(self.config, "logit_scale", None):  # Cohere multiplies
            logits = logits * scale
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def empty_cache(self, n_loops: int = 1) -> DynamicCache:
        """Return a new cache with one slot per (loop, layer)."""
        return new_cache(self.config, n_loops)

    def forward(
        self,
        embeds_BLD: Tensor,
        *,
        mask: Tensor | None = None,
        positions_BL: Tensor | None = None,
        cache: DynamicCache | None = None,
        layers: range | None = None,
        all_states: bool = False,
        normed: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the decoder, or some of its layers, once: one pass.

        Args:
            embeds_BLD: input embeddings, or with ``layers`` starting past 0 the states between two layers.
            mask: (B, past + L), 1 where a column is real; None when all are. A 4-D mask goes to the attention as it is.
            positions_BL: position ids; None counts from the cache's length.
            cache: what was read before; this pass is appended to it.
            layers: the layers to run; None means all, followed by the final norm. A range is never normed.
            all_states: return the embeddings and the state after each layer as well.
            normed: False leaves out the final norm of the whole stack.

        Returns:
            The states (B, L, D); with ``all_states`` the tuple of the embeddings and the states after each layer that
            ran, whose last is that one.
        """
        if layers is None and not normed:
            layers = range(self.n_layers)
        decoder = self.decoder if layers is None else self._section(layers)
        out = decoder(
            inputs_embeds=embeds_BLD,
            attention_mask=mask,
            position_ids=positions_BL,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=all_states,
        )
        return out.hidden_states if all_states else out.last_hidden_state

    def norm(self, states: Tensor) -> Tensor:
        """Apply the final norm."""
        return getattr(self.decoder, self.anatomy.norm)(states)

    def _section(self, layers: range) -> nn.Module:
        """Return a shallow copy of the decoder that holds only ``layers``; it shares all weights, nothing is edited."""
        decoder = self.decoder
        maybe_install_capturing_hooks(decoder)  # once for all sections: they sit on the layers, which are shared
        section = copy.copy(decoder)
        section._modules = dict(decoder._modules)
        setattr(section, self.anatomy.layers, nn.ModuleList([self.layers[i] for i in layers]))
        setattr(section, self.anatomy.norm, nn.Identity())
        if layers.start > 0:  # what is done to the embeddings is not done again to the states between two layers
            if self.anatomy.positions:
                setattr(section, self.anatomy.positions, ZeroPositions())
            if self.anatomy.dropout:
                setattr(section, self.anatomy.dropout, nn.Identity())
            if hasattr(section, "embedding_multiplier"):  # Granite
                setattr(section, "embedding_multiplier", 1.0)  # noqa: B010 - not a field that modules declare
        config = copy.copy(self.config)
        if layer_types := getattr(config, "layer_types", None):
            config.layer_types = [layer_types[i] for i in layers]
        config.num_hidden_layers = len(layers)
        section.config = config
        return section

    @torch.no_grad()
    def check(self) -> None:
        """Verify on four tokens that embed -> layers -> head gives the model's own logits.

        Raises:
            InputError: the model does something to its embeddings or logits that innerloop does not know.
        """
        was_training = self.lm.training
        self.lm.eval()
        ids = torch.arange(4, device=self.device)[None] % self.config.vocab_size
        own, ours = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, self.head(self(self.embed(ids)))
        self.lm.train(was_training)
        gap = (own.float() - ours.float()).abs().max().item()
        if not gap <= 1e-3 * max(own.float().abs().max().item(), 1.0):
            raise InputError(
                f"{type(self.lm).__name__} run from embeddings gives other logits than by itself (by {gap:.2g}): "
                "this architecture is not supported"
            )
