"""Try every causal language model of transformers: does it load, answer, think in latents, loop its layers, learn?

    python benchmarks/families.py --out benchmarks/results/families.json     # three minutes on a CPU
    python benchmarks/families.py --out /tmp/some.json --only opt bloom

Of each family a model of random weights is made, so small that windows are shorter than its rows. Families of images or
of encoders have no small text model to try, and are listed as not tried.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import begin, parser, write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import innerloop as il
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.check import check_passes, gap_of
from innerloop.engine.latent_model import LatentModel
from innerloop.methods.depth.method import DepthMethod
from innerloop.tasks import Chain
from innerloop.text.examples import Example
from innerloop.text.tokenizer import train_tokenizer

SMALL: dict[str, Any] = {  # fields of configurations, by their many names
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "window_size", "attention_chunk_size"), 3),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    "num_key_value_heads": 2,
    "moe_intermediate_size": 24,
    "head_dim": 16,
    "rotary_dim": 4,
    "vocab_size": 64,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "qk_head_dim", "index_head_dim")
MLA = {**dict.fromkeys(HEADS, 8), "qk_head_dim": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "num_key_value_heads": 4}
MLA |= {"index_n_heads": 2, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
EXTRA: dict[str, dict[str, Any]] = {  # what a family needs besides
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "helium": {"head_dim": 8},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {"moe_layer_freq": 1, "n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "reformer": {"is_decoder": True},
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gemma3n_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    "falcon with ALiBi": {"alibi": True},
    "opt as opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
}
MOST_WEIGHTS = 30_000_000  # of a small model: what is larger is not small
OWN_FAULT = "reading words fails"
ROUNDED = 1e-4
LEARNED = 1e-3
LOADS, TEXT, LATENTS, TRAINS, LOOPS = "loads", "text", "latents", "trains", "loops"
METHODS = {
    TEXT: [il.Cot()],
    LATENTS: [il.Coconut(latents_per_step=2, pad_latent_to_max=False), il.Slr(n_slots=3, max_loops=3)],
    LOOPS: [il.Looped(n_prelude=1, n_coda=1, max_loops=2)],
}


class NotTried(Exception):
    """No small model of a family can be made here."""


def small_lm(family: str) -> PreTrainedModel:
    """Return a small random model of a family in evaluation mode.

    Raises:
        NotTried: there is none.
    """
    kind = family.split()[0]
    try:
        base = AutoConfig.for_model(kind)
        if base.get_text_config(decoder=True) is not base:
            raise NotTried("an encoder, pictures or sound belong to it")
        known = {*vars(base), *base.attribute_map}
        fields = SMALL | (MLA if "kv_lora_rank" in known else {}) | IDS
        settings = {name: value for name, value in fields.items() if name in known} | EXTRA.get(family, {})
        config = small_config(kind, base, settings)
        with torch.device("meta"):
            n_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
        if n_weights > MOST_WEIGHTS:
            raise NotTried(f"its smallest model here has {n_weights:,} weights")
        torch.manual_seed(0)
        lm = copy.deepcopy(AutoModelForCausalLM.from_config(config).float().eval())
    except NotTried:
        raise
    except Exception as error:
        raise NotTried(f"no small model of it could be made here ({type(error).__name__})") from error
    with torch.no_grad():  # norms and biases start at constants; move them, so that leaving one out is noticed
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return lm


def small_config(kind: str, base: Any, settings: dict[str, Any]) -> Any:
    """Return a configuration of four layers, among which is each of the kinds that a family has."""
    kinds = list(dict.fromkeys(getattr(base, "layer_types", None) or ()))
    if kinds:
        try:
            mixed = {"layer_types": [kinds[i % len(kinds)] for i in range(4)]}
            return AutoConfig.for_model(kind, **copy.deepcopy(mixed | settings))
        except AttributeError:  # the family reckons them itself
            pass
    return AutoConfig.for_model(kind, **copy.deepcopy(settings))


def unlike_examples() -> list[Example]:
    """Return examples of unlike length."""
    found = []
    for n_ops in (4, 2, 1):
        found += Chain(n_ops=n_ops, n_train=8, n_valid=8, n_test=8).examples("train", 1)
    return found


def put_on(lm: PreTrainedModel, method: il.Method) -> LatentModel:
    """Return a copy of a model with a method on it."""
    lm, tokenizer = copy.deepcopy(lm), train_tokenizer(Chain(n_ops=4).examples("train", 64))
    torch.manual_seed(0)
    backbone = Backbone(lm)
    tokenizer.add_tokens([*method.markers], special_tokens=True)
    assert len(tokenizer) <= lm.get_input_embeddings().weight.shape[0]
    if isinstance(method, DepthMethod):
        method.begin(backbone)
    return LatentModel(backbone, tokenizer, method).eval()


def try_answering(lm: PreTrainedModel, method: il.Method) -> str | None:
    """Say in what way a method's answers in a batch are not those of single rows; None: they are."""
    model, examples = put_on(lm, method), unlike_examples()
    together = model.answer_logits(examples)
    for example, logits in zip(examples, together):
        (alone,) = model.answer_logits([example])
        if not (gap := gap_of(logits, alone)) <= ROUNDED:
            return f"{method.name}: logits in a batch are not those of rows alone (by {gap:.2g} of their size)"
    asked = [example.question for example in examples]
    written = [answer.text for answer in model.generate(asked, max_new_tokens=6)]
    if written != [model.generate([question], max_new_tokens=6)[0].text for question in asked]:
        return f"{method.name}: answers in a batch are not those of rows alone"
    return None


def try_learning(lm: PreTrainedModel, method: il.Method) -> str | None:
    """Say in what way a method's gradients in a batch are not those of single rows; None: they are."""
    model, examples = put_on(lm, method), unlike_examples()
    n_written = [len(logits) for logits in model.answer_logits(examples)]

    def gradients(some: Sequence[Example], weight: float) -> dict[str, Tensor]:
        (weight * model.loss(some).loss).backward()  # in evaluation mode: without dropout
        found = {name: p.grad for name, p in model.backbone.layers.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    together = gradients(examples, 1.0)
    apart = [gradients([one], n / sum(n_written)) for one, n in zip(examples, n_written)]
    for name, grad in together.items():
        alone = sum((part[name] for part in apart if name in part), torch.zeros_like(grad))
        if not (grad - alone).norm() <= LEARNED * max(one.norm() for one in together.values()):
            return f"{method.name}: gradients of a batch are not those of rows alone"
    return None if together else f"{method.name}: the layers get no gradients"


def outcome(family: str) -> dict[str, Any]:
    """Return what a family can do, and what speaks against the rest."""
    found: dict[str, Any] = {"family": family, "can": [], "why": ""}
    try:
        lm = small_lm(family)
    except NotTried as why:
        return found | {"not_tried": True, "why": str(why)}
    found["model"] = type(lm).__name__
    try:
        check_passes(Backbone(copy.deepcopy(lm)))
    except il.InputError as error:
        by_itself = OWN_FAULT in str(error)  # what is wrong is how we made it
        return found | ({"not_tried": True} if by_itself else {}) | {"why": reason_of(error)}
    found["can"].append(LOADS)
    for ability, methods in METHODS.items():
        why = next(filter(None, (guarded(try_answering, lm, method) for method in methods)), None)
        if ability == LOOPS and why is None:
            why = guarded(lambda lm, _: check_passes(Backbone(copy.deepcopy(lm)), sections=True), lm, methods[0])
        if why is None:
            found["can"].append(ability)
        else:
            found["why"] = f"{found['why']}; {why}".strip("; ")
    why = next(filter(None, (guarded(try_learning, lm, method) for method in METHODS[TEXT] + METHODS[LATENTS])), None)
    return found | ({"can": [*found["can"], TRAINS]} if why is None else {"why": f"{found['why']}; {why}".strip("; ")})


def guarded(attempt: Callable[[PreTrainedModel, il.Method], str | None], lm: PreTrainedModel, method: il.Method):
    """Say what an attempt says, or what it raised."""
    try:
        return attempt(lm, method)
    except il.InputError as error:
        return reason_of(error)
    except Exception as error:
        return f"{method.name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"


def reason_of(error: Exception) -> str:
    """Return why a model is refused, without its name."""
    return str(error).partition("cannot be used: ")[2].rpartition("; docs/models.md")[0] or str(error)


def main(names: Sequence[str] | None = None) -> None:
    """Try all families, or some."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", default=None, help="families to try; by default all")
    chosen = begin(options)
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    families = []
    for family in chosen.only or (
        ("llama", "opt") if chosen.smoke else sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *EXTRA})
    ):
        families.append(outcome(family))
        print(family, ", ".join(families[-1]["can"]) or "-", families[-1]["why"], flush=True)
    write(chosen, "families", {"families": families})


if __name__ == "__main__":
    main()
