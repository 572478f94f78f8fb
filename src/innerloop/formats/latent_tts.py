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

MARKERS = {"latent_start_id": BOT, "latent_id": LAT, "latent_end_id": EOT}
PROJECTOR = "projector."


def recognises(source: Source) -> bool:
    """Tell it by the markers in config.json."""
    return source.model_type == "gpt2" and all(isinstance(source.config.get(name), int) for name in MARKERS)


def opened(source: Source) -> Opened:
    """Open it as a GPT-2 that thinks in six latents, as it was trained; with a projector it is CODI's."""
    found = source.tensors()
    own = {name: one for name, one in found.items() if not name.startswith(PROJECTOR)}
    config: Any = config_of(source, own)
    ids = {source.config[name]: marker for name, marker in MARKERS.items()}
    tokenizer = tokenizer_of(source, "gpt2")
    if len(ids) < len(MARKERS):
        raise InputError(f"{source.folder / 'config.json'} gives two markers one id: restore it")
    tokenizer = with_names(tokenizer, ids)
    weights = checked(source, config, own)
    if not source.config.get("projector") and len(own) == len(found):
        return Opened(config, weights, tokenizer, Coconut())
    method = Codi(loop={"width": source.config.get("projector_hidden_size", 0)})  # type: ignore[arg-type]
    parts = projection(source, found, (PROJECTOR + "1", PROJECTOR + "3", PROJECTOR + "4"), found.keys() - own.keys())
    return Opened(config, weights, tokenizer, method, parts, WORDING)


FORMAT = Format("LatentTTS (ModalityDance)", recognises, opened)
