"""A Hugging Face decoder seen as embed -> layers -> norm -> head; the only file that knows architectures.

The state every method works with is the decoder's output *after* the final norm, i.e. exactly the input of the head
(cot.md, section 0). Shapes: `B` rows, `L` positions, `D` width, `V` vocabulary.

    backbone = Backbone(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
    logits_BLV = backbone.head(backbone(backbone.embed(ids_BL)))
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers import DynamicCache, PreTrainedModel

from innerloop.decoder.anatomy import (
    ATTENTIONS,
    MLPS,
    PER_LAYER,
    Anatomy,
    Matrix,
    decoder_of,
    longrope_starts,
    matrices_of,
    place_in,
    text_config,
)
from innerloop.decoder.cache import new_cache
from innerloop.decoder.columns import count_real_columns, counts_columns, has_alibi
from innerloop.decoder.compiled import CompiledPasses
from innerloop.decoder.fused_loss import fused_loss
from innerloop.decoder.masks import Sees, grouped_queries, kinds_of, visible
from innerloop.decoder.surrogates import (
    fuse_activations,
    keyless,
    n_key_weights,
    n_made_by,
    queryless,
    replaced,
    section,
)
from innerloop.decoder.token_losses import HeadInputs
from innerloop.errors import InputError, refuse


class Backbone(nn.Module):
    """One view over Hugging Face decoders, run from embeddings.

    Args:
        lm: a decoder-only ``...ForCausalLM`` model. GPT-2's activation is replaced in it by one operator, which gives
            the same up to rounding; attention that counts padding is taught not to.

    Raises:
        InputError: its layers or its final norm have no known name.
    """

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.compiled: CompiledPasses | None = None  # makes short passes, where it can
        fuse_activations(lm)
        count_real_columns(lm)
        self.anatomy = Anatomy.of(self.decoder, type(lm).__name__)

    @property
    def decoder(self) -> nn.Module:
        """The inner model: embeddings, layers and final norm, without the head."""
        return decoder_of(self.lm)

    @property
    def layers(self) -> nn.ModuleList:
        """The stack of decoder layers."""
        return getattr(self.decoder, self.anatomy.layers)

    @property
    def config(self):
        """The text part of the Hugging Face configuration."""
        return text_config(self.lm)

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
        """The most positions a row may have, where the model says so, and where its numbers are its own.

        With LongRoPE one long row turns the rotations of all rows of its batch, and not those of keys in the cache; so
        rows end where that begins.
        """
        longest = getattr(self.config, "max_position_embeddings", None)
        return min((length for length in (longest, *longrope_starts(self.config)) if length), default=None)

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

    def embed_mix(self, ids_AK: Tensor, shares_AK: Tensor) -> Tensor:
        """Return mixtures (A, D) of the input embeddings of words, scaled as the model scales them."""
        table = self.lm.get_input_embeddings()
        mixed = embedding_bag(ids_AK, table.weight, per_sample_weights=shares_AK.to(table.weight.dtype), mode="sum")
        return mixed * getattr(table, "embed_scale", 1.0)

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (..., V) read from final-norm states (..., D)."""
        return self._scaled(self.lm.get_output_embeddings()(states))

    def head_rows(self, states_AD: Tensor, ids_AK: Tensor) -> Tensor:
        """Return the logits (A, K) of a few words of each state's own, read from final-norm states (A, D)."""
        table = self.lm.get_output_embeddings()
        logits_AK = (table.weight[ids_AK] @ states_AD.to(table.weight.dtype)[..., None])[..., 0]
        bias: Any = getattr(table, "bias", None)
        return self._scaled(logits_AK if bias is None else logits_AK + bias[ids_AK])

    def head_inputs(self, states_UD: Tensor) -> HeadInputs:
        """Return what shows final-norm states; a head that is a plain matrix may be fused with the loss."""
        table = self.lm.get_output_embeddings()
        is_plain = type(table) is nn.Linear and (table.bias is None or self._logit_scale == 1)
        return HeadInputs(self.head, states_UD, self._fused_loss if is_plain else None)

    def _fused_loss(self, states_UD: Tensor, targets_U: Tensor) -> Tensor:
        cap = getattr(self.config, "final_logit_softcapping", None)
        return fused_loss(self._logit_scale * states_UD, targets_U, self.lm.get_output_embeddings(), cap)

    @property
    def _logit_scale(self) -> float:
        """What logits are multiplied by: Granite divides, Cohere multiplies."""
        return (getattr(self.config, "logit_scale", None) or 1.0) / (
            getattr(self.config, "logits_scaling", None) or 1.0
        )

    def _scaled(self, logits: Tensor) -> Tensor:
        """Do to logits what the model does to them."""
        if self._logit_scale != 1:
            logits = logits * self._logit_scale
        if cap := getattr(self.config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    def enter(self, embeds_BLD: Tensor, positions_BL: Tensor) -> Tensor:
        """Return the state that the first layer sees: what the decoder itself does to embeddings, done to them."""
        if self.anatomy.positions:
            embeds_BLD = embeds_BLD + place_in(getattr(self.decoder, self.anatomy.positions), positions_BL)
        if self.anatomy.dropout:
            embeds_BLD = getattr(self.decoder, self.anatomy.dropout)(embeds_BLD)
        scale: Any = getattr(self.decoder, "embedding_multiplier", None)  # Granite
        return embeds_BLD if scale is None else embeds_BLD * scale

    def matrices(self, layer: int) -> dict[str, Matrix]:
        """Return the weight matrices of a layer by name; a fused ``attn.c_attn`` is ``attn.c_attn.q``, k and v."""
        return matrices_of(self.layers[layer], self.config)

    def replace_layers(self, layers: Sequence[nn.Module], kinds: Sequence[int]) -> None:
        """Put other layers in place of the stack; ``kinds`` are the layers of the old one that they are shaped as."""
        for index, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", index)  # noqa: B010 - not a field that modules declare
        setattr(self.decoder, self.anatomy.layers, nn.ModuleList(layers))
        for name in PER_LAYER:
            if listed := getattr(self.config, name, None):
                setattr(self.config, name, [listed[kind] for kind in kinds])
        self.config.num_hidden_layers = len(layers)

    @torch.no_grad()
    def expect_depth(self, n_layers: int) -> None:
        """Scale fresh weights that are drawn the smaller the deeper a model is (GPT-2's) for so many layers."""
        if self.config.model_type in ("gpt2", "gpt_bigcode"):
            for name, parameter in self.layers.named_parameters():
                if name.endswith("c_proj.weight"):
                    parameter.mul_((self.n_layers / n_layers) ** 0.5)

    def compile_passes(self, backend: str = "inductor") -> None:
        """Let passes that read a few new columns be compiled from now on, as CUDA graphs on a GPU (see `compiled`)."""
        self.compiled = CompiledPasses(self.lm, backend)

    def empty_cache(self) -> DynamicCache:
        """Return a cache that has read nothing."""
        return new_cache(self.config)

    def forward(
        self,
        embeds_BLD: Tensor,
        *,
        mask: Any = None,
        positions_BL: Tensor | None = None,
        cache: DynamicCache | None = None,
        layers: range | None = None,
        all_states: bool = False,
        normed: bool = True,
        inner: bool | None = None,
        makes_keys: bool = True,
    ) -> Tensor | tuple[Tensor, ...]:
        """Run the decoder, or some of its layers, once: one pass.

        Args:
            embeds_BLD: input embeddings, or with ``layers`` starting past 0 the states between two layers.
            mask: (B, past + L), 1 where a column is real; None when all are. A 4-D mask, or one
                for each kind of layer, goes to the attention as it is.
            positions_BL: position ids; None counts from the cache's length.
            cache: what was read before; this pass is appended to it.
            layers: the layers to run; None means all, followed by the final norm. A range is never normed.
            all_states: return the embeddings and the state after each layer as well.
            normed: False leaves out the final norm of the whole stack.
            inner: the input are states between two layers, to which nothing is done that is done to embeddings; None:
                where ``layers`` starts past 0.
            makes_keys: False: nobody attends to what is read, so a range of layers need not make its keys and values;
                the cache must ignore those it is given.

        Returns:
            The states (B, L, D); with ``all_states`` the tuple of the embeddings and the states after each layer that
            ran, whose last is that one.
        """
        if layers is None and not normed:
            layers = range(self.n_layers)
        decoder = self.decoder
        if layers is not None:
            parts = {i: self.layers[i] for i in layers}
            if not makes_keys:
                parts = {i: replaced(layer, keyless, self.config) for i, layer in parts.items()}
            inner = layers.start > 0 if inner is None else inner
            decoder = section(decoder, self.anatomy, self.config, parts, inner)
        with grouped_queries(embeds_BLD.device):
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

    def mask_of(
        self,
        mask_BP: Tensor,
        n_new: int,
        n_window: int | None,
        dtype: torch.dtype,
        sees: Sees = "past",
        seen_BQP: Tensor | None = None,
    ) -> Any:
        """Return the attention mask of the last ``n_new`` columns, of which ``mask_BP`` says which are real.

        Windows are counted in real columns: padding between them, wherever it is, is as if it were not there. Made
        here, the mask asks the device nothing. Kernels that pack real columns get ``mask_BP`` as it is, and decoders
        with ALiBi too, which count in it how far back a key lies.

        Args:
            mask_BP: 1 where a column is real, the new ones included.
            n_new: how many are new.
            n_window: how many of the earlier ones the layers with a window hold; None: there are no such layers.
            dtype: of an additive mask.
            sees: with ``all`` every real column is seen, with ``blocks`` those of ``seen_BQP``; windows are lifted.
            seen_BQP: which columns each new one sees.

        Raises:
            InputError: more than the past is to be seen, and the decoder's attention takes no such mask.
        """
        kind = self.config._attn_implementation
        is_known = kind in ("sdpa", "eager") and kinds_of(self.config) <= {"full_attention", "sliding_attention"}
        if sees != "past":
            seen_BQP = mask_BP.bool()[:, None, :].expand(-1, n_new, -1) if seen_BQP is None else seen_BQP
            return self._mask_of_seen(seen_BQP, dtype, is_known)
        if not is_known or has_alibi(self.decoder):
            return mask_BP
        ranks_BP, columns_P = mask_BP.cumsum(1), torch.arange(mask_BP.shape[1], device=mask_BP.device)
        is_past_QP = columns_P <= columns_P[-n_new:, None]
        behind_BQP = ranks_BP[:, -n_new:, None] - ranks_BP[:, None, :]
        dtype = torch.bool if kind == "sdpa" else dtype
        masks = visible(self.config, is_past_QP & mask_BP.bool()[:, None, :], behind_BQP, dtype)
        if n_window is None:
            return masks["full_attention"] if isinstance(masks, dict) else masks
        if not isinstance(masks, dict):
            return masks[..., -(n_window + n_new) :]
        return masks | {"sliding_attention": masks["sliding_attention"][..., -(n_window + n_new) :]}

    def _mask_of_seen(self, seen_BQP: Tensor, dtype: torch.dtype, is_known: bool) -> Any:
        """Return the mask by which each new column sees some; no key is far back in it."""
        kind = self.config._attn_implementation
        refuse(
            (
                counts_columns(self.decoder) or (not is_known and kind in ("sdpa", "eager")),
                f"a {type(self.lm).__name__} counts how far back keys lie, so its tokens cannot see what comes after "
                "them: denoise with a decoder that has positions or rotary embeddings",
            ),
            (
                not is_known,
                f"attention by '{kind}' takes no mask of its own, so tokens would not see what comes after them: load "
                "the model with attn_implementation=sdpa",
            ),
        )
        behind_1QP = torch.zeros_like(seen_BQP[:1], dtype=torch.long)
        return visible(self.config, seen_BQP, behind_1QP, torch.bool if kind == "sdpa" else dtype)

    def mask_4d(
        self,
        queries_BQ: Tensor,
        keys_BK: Tensor,
        real_BK: Tensor | None,
        dtype: torch.dtype,
        bias_BK: Tensor | None = None,
    ) -> Any:
        """Return the additive attention mask (B, 1, Q, K) of queries and keys at given positions.

        A query sees the real keys up to its own position; in sliding layers, those of its window. A key at a
        position below 0 counts for none, and every query sees it. ``bias_BK`` is added to what
        every query makes of a key. A model with layers of both kinds gets a mask for each.
        """
        behind_BQK = (queries_BQ[:, :, None] - keys_BK[:, None, :]).masked_fill(keys_BK[:, None, :] < 0, 0)
        seen_BQK = behind_BQK >= 0
        if real_BK is not None:
            seen_BQK = seen_BQK & real_BK[:, None, :]
        masks = visible(self.config, seen_BQK, behind_BQK, dtype)
        if bias_BK is None:
            return masks
        bias = bias_BK[:, None, None, :].to(dtype)
        return {kind: mask + bias for kind, mask in masks.items()} if isinstance(masks, dict) else masks + bias

    def taps(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """Return the modules of a layer that give what its attention and its MLP add to the state.

        Raises:
            InputError: the layer has no such modules.
        """
        parts = dict(self.layers[layer].named_children())
        if "post_feedforward_layernorm" in parts:  # Gemma and OLMo 2 norm what is added
            return parts["post_attention_layernorm"], parts["post_feedforward_layernorm"]
        attention = next((parts[name] for name in ATTENTIONS if name in parts), None)
        mlp = next((parts[name] for name in MLPS if name in parts), None)
        if attention is None or mlp is None:
            kind, names = type(self.layers[layer]).__name__, ", ".join((*ATTENTIONS, *MLPS))
            raise InputError(f"{kind} has no attention or no MLP under a name that innerloop knows ({names})")
        return attention, mlp

    def make_keys(self, states_BLD: Tensor, positions_BL: Tensor, cache: DynamicCache, layer: int) -> None:
        """Make the keys and values that a layer makes of states; the cache must end the pass when it gets them."""
        block = {layer: replaced(self.layers[layer], queryless, self.config)}
        part = section(self.decoder, self.anatomy, self.config, block, inner=True)
        part(inputs_embeds=states_BLD, position_ids=positions_BL, past_key_values=cache, use_cache=True)

    def n_made_by(self, layers: range) -> int:
        """Return how many weights of some layers `make_keys` uses for a token."""
        return n_made_by(self.layers[i] for i in layers)

    def n_key_weights(self, layers: range) -> int:
        """Return how many weights of some layers are not used where no keys and values are made."""
        return n_key_weights((self.layers[i] for i in layers), self.config)
