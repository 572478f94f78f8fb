"""SIM_COT-GPT2-Coconut (InternLM, Wiselnn): what Coconut's code saves, in one file without an ending.

    checkpoint_28: base_causallm.* (the model), embedding.weight (its table), expainable_llm.* (told steps in training)

There is no tokenizer, and config.json is empty. Markers are the last three rows: <|start-latent|>, <|end-latent|>,
<|latent|>, in the order in which the code adds them.
"""

from __future__ import annotations

from innerloop.formats.bases import HUB, TABLES, config_of, kind_of
from innerloop.formats.merged import below
from innerloop.formats.opened import Format, Opened, check_names, checked
from innerloop.formats.source import Source
from innerloop.formats.tokens import added, tokenizer_of
from innerloop.methods import Coconut, SimCot
from innerloop.text.row import BOT, EOT, LAT
from innerloop.text.wording import OURS

MODEL, TOLD, TABLE = "base_causallm.", "expainable_llm.", "embedding.weight"
STAGES = 5  # the paper's: five groups of two latents


def recognises(source: Source) -> bool:
    """Tell it by the names of tensors."""
    return source.mentions(MODEL)


def opened(source: Source) -> Opened:
    """Open it as the model that it was trained on, which thinks in ten latents; Coconut's own code leaves six."""
    found = source.tensors()
    check_names(source, [name for name in found if not name.startswith((MODEL, TOLD))], [TABLE], [TABLE])
    weights = below(found, MODEL)
    kind, config = kind_of(source, weights), config_of(source, weights)
    first = len(weights[TABLES[kind]]) - 3
    tokenizer = added(tokenizer_of(source, "gpt2", base=HUB[kind]), first, BOT, EOT, LAT)
    told = any(name.startswith(TOLD) for name in found)
    method = SimCot(aux={"weight": 0.0}, curriculum={"max_stage": STAGES}) if told else Coconut()  # type: ignore[arg-type]
    return Opened(config, checked(source, config, weights), tokenizer, method, wording=OURS)


FORMAT = Format("Coconut's code (SIM-CoT)", recognises, opened, is_mended=True)
