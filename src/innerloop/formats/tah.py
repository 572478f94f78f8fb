"""TaH and TaH-plus (thu-nics, arXiv 2511.08577): a stock decoder, a LoRA of its second readings, and a decider.

model.safetensors    the decoder under its own names, without the LoRA
lora/                a peft adapter
tah_config.json      max_iter, input_updater_kwargs.topk
iter_decider.bin     a pickle: class, init_args, and a state_dict whose threshold is tau
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from innerloop.errors import InputError, refuse
from innerloop.formats.opened import Format, Opened, check_names
from innerloop.formats.qwen import STOCK, stock
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of
from innerloop.methods import Tah

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

SETTINGS, DECIDER, ADAPTER = "tah_config.json", "iter_decider.bin", "lora"
BESIDE = (DECIDER, f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors")
OF_DECIDER = {
    "logits_projection": "of_logits",
    "combined_projection": "enter",
    "backbone.input_projection": "mix",
    "backbone.output_layer.0": "norm",
    "backbone.output_layer.1": "leave",
}
OF_BLOCK = {"layer_norm": "0", "mlp.0": "1", "mlp.3": "4"}
EXPANSION = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recognises(source: Source) -> bool:
    """Tell it by its settings."""
    return bool(source.settings(SETTINGS))


def opened(source: Source) -> Opened:
    """Open it as the decoder that it is, which reads hard tokens twice; questions too, as the authors' code does."""
    refuse(
        (source.model_type not in STOCK, f"{source.folder} is a {source.model_type}: only {', '.join(STOCK)} are known")
    )
    settings, saved = source.settings(SETTINGS), source.unpickled(source.folder / DECIDER)
    if not isinstance(saved, dict) or not {"class", "state_dict", "init_args"} <= saved.keys():
        raise InputError(f"{source.folder / DECIDER} has no class, state_dict and init_args: copy it again")
    kind, init = saved["class"], saved["init_args"]
    dims, n_logits = init.get("hidden_dims", [256, 512, 256]), init.get("topk", 100)
    n_mixed = (settings.get("input_updater_kwargs") or {}).get("topk", 100)
    where = source.folder / DECIDER
    refuse(
        (
            kind != "MLPIterDecider",
            f"{where} is a {kind}, and only MLPIterDecider is known: take a checkpoint of TaH's stage 2",
        ),
        (bool(init.get("normalize_input")), f"{where} has normalize_input, which no released one has"),
        (init.get("expansion_factor", EXPANSION) != EXPANSION, f"{where} has expansion_factor other than {EXPANSION}"),
        (len(set(dims)) != 1, f"{where} has layers of unlike width ({dims}), which no released one has"),
        (
            n_mixed != n_logits,
            f"{where} looks at {n_logits} logits, and {n_mixed} words are mixed: they must be as many",
        ),
    )
    config, weights = stock(source, source.model_type)
    parts, tau = decider(source, saved["state_dict"], len(dims))
    lora, adapter = low_rank(source, config.num_hidden_layers, weights)
    method = Tah(
        max_loops=settings.get("max_iter") or 2,
        tau=tau,
        input_mix_topk=n_mixed,
        prompt_iterates=True,
        lora={"rank": adapter["r"], "gamma": float(adapter["lora_alpha"])},  # type: ignore[arg-type]
        decider={"layers": tuple(init["hidden_states_layer_nums"]), "width": dims[0], "blocks": len(dims)},  # type: ignore[arg-type]
    )
    return Opened(config, weights, tokenizer_of(source), method, {**parts, **lora})


def decider(source: Source, state: Mapping[str, Tensor], n_blocks: int) -> tuple[dict[str, Tensor], float]:
    """Return the decider's parts, and tau."""
    modules = dict(OF_DECIDER)
    for i in range(n_blocks):
        modules |= {f"backbone.blocks.{i}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in OF_BLOCK.items()}
    names = {f"{a}.{end}": f"depth.chooser.decider.{b}.{end}" for a, b in modules.items() for end in ("weight", "bias")}
    check_names(source, state, [*names, "threshold"])
    return {new: state[old].float() for old, new in names.items()}, float(state["threshold"])


def low_rank(source: Source, n_layers: int, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the LoRA's parts, zeros where it has no update, and its settings."""
    import torch

    adapter = source.settings(f"{ADAPTER}/adapter_config.json")
    path = source.folder / ADAPTER / "adapter_model.safetensors"
    refuse(
        (not adapter.get("r"), f"{path.parent}/adapter_config.json has no rank r: copy the folder again"),
        (bool(adapter.get("use_dora") or adapter.get("use_rslora")), f"{path.parent} is no plain LoRA"),
    )
    found, asked = source.tensors_in(path), adapter.get("target_modules", "all-linear")
    updated = TARGETS if isinstance(asked, str) else asked
    parts: dict[str, Tensor] = {}
    wanted: list[str] = []
    for i in range(n_layers):
        for target in TARGETS:
            module = f"model.layers.{i}.{'self_attn' if target[0] in 'qkvo' else 'mlp'}.{target}"
            n_out, n_in = weights[f"{module}.weight"].shape
            for end, side, shape in (("A", "down", (adapter["r"], n_in)), ("B", "up", (n_out, adapter["r"]))):
                name = f"base_model.model.{module}.lora_{end}.weight"
                if target in updated or module in updated:
                    wanted.append(name)
                one = found.get(name, torch.zeros(shape))
                parts[f"loop.lora.{side}.{module.replace('.', '/')}"] = one.float()[None]
    check_names(source, found, wanted)
    return parts, adapter


FORMAT = Format("TaH (thu-nics)", recognises, opened, beside=BESIDE)
