"""latent-tts-coconut and latent-tts-codi (ModalityDance): a GPT-2 by its own names, with the markers in config.json.

config.json: latent_id, latent_start_id, latent_end_id, target_id; of CODI projector: true
transformer.*, lm_head.weight; of CODI projector.1, projector.3 (Linear), projector.4 (LayerNorm)
"""

from __future__ import annotations

from typing import Any

from innerloop.errors import InputError
from innerloop.formats.bases import config_of
from innerloop.formats.codi import WORDING, projection
from innerloop.formats.opened import Format, Opened, checked
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of, with_names
from innerloop.methods import Coconut, Codi
from innerloop.text.row import BOT, EOT, LAT
from innerloop.text.wording import OURS

MARKERS = {"latent_start_id": BOT, "latent_id": LAT, "latent_end_id": EOT}
TOKENS = {"latent_start_id": "<|start-latent|>", "latent_id": "<|latent|>", "latent_end_id": "<|end-latent|>"}
CLASSES = {"COCONUTGPT2", "CODIGPT2"}
PROJECTOR = "projector."


def recognises(source: Source) -> bool:
    """Tell it by the markers in config.json, or by the name of its class."""
    has_ids = all(isinstance(source.config.get(name), int) for name in MARKERS)
    return source.model_type == "gpt2" and (has_ids or bool(CLASSES & {*(source.config.get("architectures") or ())}))


def ids_of(source: Source) -> dict[int, str]:
    """Return our markers by their ids: config.json's, or where it has none those of the tokenizer's."""
    found = {name: source.config.get(name, -1) for name in MARKERS}
    found = {name: source.added_tokens.get(TOKENS[name], -1) if i < 0 else i for name, i in found.items()}
    if len({*found.values()}) < len(MARKERS) or min(found.values()) < 0:
        told = ", ".join(f"{name}={i}" for name, i in found.items())
        raise InputError(
            f"{source.folder / 'config.json'} and the tokenizer give no three markers ({told}): restore them"
        )
    return {i: MARKERS[name] for name, i in found.items()}


def opened(source: Source) -> Opened:
    """Open it as a GPT-2 that thinks in six latents, as it was trained; with a projector it is CODI's."""
    found = source.tensors()
    own = {name: one for name, one in found.items() if not name.startswith(PROJECTOR)}
    config: Any = config_of(source, own)
    tokenizer = with_names(tokenizer_of(source, "gpt2"), ids_of(source))
    weights = checked(source, config, own)
    if not source.config.get("projector") and len(own) == len(found):
        return Opened(config, weights, tokenizer, Coconut(), wording=OURS)
    method = Codi(loop={"width": source.config.get("projector_hidden_size", 0)})  # type: ignore[arg-type]
    parts = projection(source, found, (PROJECTOR + "1", PROJECTOR + "3", PROJECTOR + "4"), found.keys() - own.keys())
    return Opened(config, weights, tokenizer, method, parts, WORDING)


FORMAT = Format("LatentTTS (ModalityDance)", recognises, opened)
