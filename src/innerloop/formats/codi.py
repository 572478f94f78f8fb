"""CODI-gpt2 and CODI-llama3.2-1b-Instruct (zen-E), and the CODI models of SIM-CoT (InternLM).

    codi.base_model.model.*        the model with peft's updates of all its matrices, r = 128, alpha = 32
    prj.1, prj.3, prj.ln           the projection: Linear, GELU, Linear, LayerNorm
    decoder.*, pj_in.*, pj_out.*   of SIM-CoT, what told steps in training; answers need none of it

The vocabulary ends in three rows that the tokenizer lacks: padding, <bot> and <eot>. SIM-CoT's config.json is empty.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from innerloop.formats.bases import HUB, TABLES, config_of, kind_of
from innerloop.formats.merged import below, merged
from innerloop.formats.opened import Format, Opened, check_names, checked
from innerloop.formats.source import Source
from innerloop.formats.tokens import added, tokenizer_of
from innerloop.methods import Codi, SimCotCodi
from innerloop.text.row import BOT, EOT
from innerloop.text.wording import Wording

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

MODEL, PROJECTION = "codi.base_model.model.", "prj."
TOLD = ("decoder.", "pj_in.", "pj_out.")
ALPHA = 32.0  # of all released ones; the scripts of zhenyi4/codi
PAD = "[PAD]"
WORDING = Wording(question_end="", answer_prefix="The answer is: ")


def projection(
    source: Source, found: Mapping[str, Tensor], modules: Sequence[str], own: Collection[str]
) -> dict[str, Tensor]:
    """Return the parts of the projection: two Linear and the norm, called ``modules``, which ``own`` must name all."""
    names = {
        f"{theirs}.{end}": f"loop.rescale.{ours}.{end}"
        for theirs, ours in zip(modules, ("inner", "outer", "norm"))
        for end in ("weight", "bias")
    }
    check_names(source, own, names)
    return {new: found[old].float() for old, new in names.items()}


def recognises(source: Source) -> bool:
    """Tell it by the names of tensors."""
    return source.mentions(MODEL, PROJECTION)


def opened(source: Source) -> Opened:
    """Open it as the model with its updates added, that thinks in six projected latents."""
    found = source.tensors()
    theirs = {name: one for name, one in found.items() if not name.startswith(TOLD)}
    weights = merged(below(theirs, MODEL), ALPHA)
    kind = kind_of(source, weights)
    config = config_of(source, weights)
    first = len(weights[TABLES[kind]]) - 3
    tokenizer = added(tokenizer_of(source, "gpt2", base=HUB[kind]), first, PAD, BOT, EOT)
    tokenizer.pad_token = PAD
    own = [name for name in theirs if not name.startswith(MODEL)]
    prj = tuple(PROJECTION + name for name in ("1", "3", "ln"))
    parts = projection(source, theirs, prj, own)
    width = {"width": len(parts["loop.rescale.inner.weight"])}
    told = len(theirs) < len(found)
    method = SimCotCodi(loop=width, aux={"weight": 0.0}) if told else Codi(loop=width)  # type: ignore[arg-type]
    return Opened(config, checked(source, config, weights), tokenizer, method, parts, WORDING)


FORMAT = Format("CODI", recognises, opened, is_mended=True)
