"""LOTUS (yingfanbot: gsm-lotus-llama3b, -codi): an ordinary folder whose tokenizer has markers of latents.

Their first stages, gsm-cot-..., write the chain of thought. K, R and c are in none of the files: six blocks and as many
loops, of 25 latents for Llama and 13 for GPT-2 (lotus.md, 2).
"""

from __future__ import annotations

from innerloop.formats.bases import HUB, config_of, kind_of
from innerloop.formats.opened import Format, Opened, checked
from innerloop.formats.source import Source
from innerloop.formats.tokens import tokenizer_of, with_names
from innerloop.methods import Cot, Lotus, Method
from innerloop.text.row import BOT, EOT, LAT
from innerloop.text.wording import OURS

MARKERS = {"<|start-latent|>": BOT, "<|latent|>": LAT, "<|end-latent|>": EOT}
FIRST_STAGE = "gsm-cot-"
BLOCK_LENGTH = {"llama": 25, "gpt2": 13}


def recognises(source: Source) -> bool:
    """Tell it by its markers, those of LatentTTS being in config.json too; a first stage by the name of the release."""
    is_known = source.model_type in HUB and "latent_id" not in source.config
    return is_known and (FIRST_STAGE in source.name or source.added_tokens.keys() >= MARKERS.keys())


def opened(source: Source) -> Opened:
    """Open it as it is, with the blocks of the paper."""
    weights, tokenizer = source.tensors(), tokenizer_of(source, "gpt2")
    kind, config = kind_of(source, weights), config_of(source, weights)
    method: Method = Cot()
    if FIRST_STAGE not in source.name:
        tokenizer = with_names(tokenizer, {source.added_tokens[name]: marker for name, marker in MARKERS.items()})
        method = Lotus(latents_per_block=BLOCK_LENGTH[kind])
    return Opened(config, checked(source, config, weights), tokenizer, method, wording=OURS)


FORMAT = Format("LOTUS (yingfanbot)", recognises, opened)
