"""What a saved folder tells plain transformers, so that it answers with the thought or says why it cannot.

    custom_generate/generate.py           a copy of `innerloop.model.custom_generate`, which stands alone
    custom_generate/thought.json          how a question is laid out, and what the loop does
    custom_generate/thought.safetensors   the loop's weights; what is told or mixed by iteration, in tables
    generation_config.json                says under "innerloop" how the model is asked

Where that code cannot answer as a method does, ``generate.py`` refuses, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from innerloop.config.method import Method
from innerloop.decoder.backbone import Backbone
from innerloop.disk.files import write_text
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.method import DepthMethod
from innerloop.model import custom_generate
from innerloop.text.encoder import PromptEncoder
from innerloop.text.row import Block, Kind, Row

FOLDER, CODE = "custom_generate", "generate.py"
TOLD = "innerloop"  # what generation_config.json calls what it says of the thought
BUDGET = 128  # new tokens, where nothing says how many
ASKED = "a", "b b"  # whose layout shows what is the same for all questions
WAY_ELSE = "answer with innerloop: LatentModel.from_pretrained(FOLDER).generate([...])"
WAY = f"generate(**inputs, custom_generate=FOLDER, trust_remote_code=True), or {WAY_ELSE}"

REFUSAL = '''"""Refuses: plain transformers cannot answer as this model was trained to."""

import warnings

REASON = {reason!r}
warnings.warn(REASON, stacklevel=2)


def generate(*args, **options):
    """Say what is missing."""
    raise NotImplementedError(REASON)
'''


class Answering(Protocol):
    """A model that can be asked."""

    backbone: Backbone
    method: Method
    encoder: PromptEncoder
    loop: InnerLoop
    depth: Any
    hybrid: Any

    def prompts(self, questions: Any) -> list[Row]:
        """Lay out questions."""

    def block(self) -> Block | None:
        """Return the latents that a written token opens."""

    def suppressed_ids(self) -> Tensor:
        """Return the ids that are never written."""


def export(model: Answering, folder: Path) -> None:
    """Write what plain transformers needs, into the folder of a checkpoint."""
    (folder / FOLDER).mkdir(exist_ok=True)
    if reason := lacking(model):
        reason = f"plain transformers cannot answer as '{model.method.name}' does: {reason}; {WAY_ELSE}"
        write_text(folder / FOLDER / CODE, REFUSAL.format(reason=reason))
    else:
        settings = thought_settings(model)
        source = Path(custom_generate.__file__).read_text(encoding="utf-8")
        write_text(folder / FOLDER / CODE, source)
        write_text(folder / custom_generate.FILES[0], json.dumps(settings, indent=1) + "\n")
        save_file(thought_weights(model), folder / custom_generate.FILES[1])
        if settings["before"] or settings["after"]:
            reason = f"this model thinks before it answers, and plain generate leaves that out: {WAY}"
    _tell(folder / "generation_config.json", reason)


def _tell(path: Path, text: str) -> None:
    """Put a sentence into a generation config, or take out what another method has left there."""
    if path.is_file():
        config = json.loads(path.read_text())
        config.pop(TOLD, None)
        write_text(path, json.dumps(config | ({TOLD: text} if text else {}), indent=2, sort_keys=True) + "\n")


def lacking(model: Answering) -> str:
    """Return what the method does that `custom_generate` does not; nothing if it can answer."""
    method, loop, plan = model.method, model.method.loop, model.method.plan
    scale = getattr(model.backbone, "_logit_scale", 1)
    cap = getattr(model.backbone.config, "final_logit_softcapping", None)
    problems = (
        (method.family == "denoise" or plan.sees != "past", "it fills in a canvas of masks"),
        (isinstance(method, DepthMethod) and bool(method.passes_do), f"it {getattr(method, 'passes_do', '')}"),
        (model.hybrid is not None, "it feeds latents beside the tokens that it writes"),
        (method.decoder.kind != "lm_head", "a decoder of its own answers"),
        (model.block() is not None, "it thinks again while it writes"),
        (method.stop.stops, "its loop ends by itself"),
        (method.fixed_point.solver != "none", "it iterates to a fixed point"),
        (loop.noise_level != "none", "its loop is told how much its state changes"),
        (loop.time_inject == "token" and plan.answer_context == "kv_last", "its answer sees the timestep's token"),
        (method.soft_thinking[1] > 0 and (scale != 1 or cap is not None), "the words it feeds are of scaled logits"),
        (not _is_alike(model), "its latents are laid out otherwise for each question"),
    )
    return next((text for is_there, text in problems if is_there), "")


def _is_alike(model: Answering) -> bool:
    """Whether all questions have the same around them."""
    rows = model.prompts(ASKED)
    if any(len(_asked(row)) != 1 or row.next is not None for row in rows):
        return False
    return _around(rows[0]) == _around(rows[1]) and rows[0].n_loops == rows[1].n_loops


def _asked(row: Row) -> list[int]:
    return [i for i, span in enumerate(row.spans) if span.kind is Kind.QUESTION]


def _around(row: Row) -> tuple[list[int], list[int], int | None, int]:
    """Return the ids before and after the question, and how many are looped (None: all so far) and come after that."""
    (at,) = _asked(row)
    before, after = ([token for span in spans for token in span.ids] for spans in (row.spans[:at], row.spans[at + 1 :]))
    n_region, n_suffix = (sum(len(span.ids) for span in spans) for spans in (row.region, row.suffix))
    return before, after, n_region if row.prefix else None, n_suffix


def thought_settings(model: Answering) -> dict[str, Any]:
    """Return thought.json."""
    method, loop, plan, (row,) = model.method, model.method.loop, model.method.plan, model.prompts(ASKED[:1])
    wording = model.encoder.wording
    before, after, n_region, n_suffix = _around(row)
    makes_first = plan.first_state == "forward" and n_region != 0
    return {
        "method": method.name,
        "chat": wording.chat,
        "question_end": "" if model.encoder.running_text or wording.chat else wording.question_end,
        "answer_mark": wording.mark,
        "before": before,
        "after": after,
        "n_region": n_region,
        "n_suffix": n_suffix,
        "thinks": row.n_loops > 0 or makes_first or (model.loop.slots is not None and n_region != 0),
        "n_loops": row.n_loops,
        "scope": plan.scope,
        "first_state": plan.first_state,
        "answer_context": plan.answer_context,
        "norm": model.backbone.anatomy.norm,
        "is_normed": plan.is_normed,
        "rescale": loop.rescale,
        "prefix_kv": plan.prefix_kv,
        "residual": loop.residual,
        "gates": loop.gate_kind,
        "lora": [] if model.loop.lora is None else [model.loop.lora.index(t) for t in range(1, row.n_loops + 1)],
        "lora_scale": 0.0 if model.loop.lora is None else model.loop.lora.scale,
        "decode_lora": plan.decode_lora,
        "scale": loop.scale,
        "shift": loop.shift,
        "soft": list(method.soft_thinking),
        "time_inject": loop.time_inject,
        "n_ends": method.n_ends,
        "suppressed": model.suppressed_ids().tolist(),
        "pad": model.encoder.pad_id,
        "max_new_tokens": BUDGET,
    }


@torch.no_grad()
def thought_weights(model: Answering) -> dict[str, Tensor]:
    """Return the loop's weights; what an iteration has of its own is a row of a table."""
    loop, (row,) = model.loop, model.prompts(ASKED[:1])
    weights, times = dict[str, Tensor](), range(1, row.n_loops + 1)
    weights |= {name: tensor.detach() for name, tensor in loop.rescale.state_dict().items()}
    if loop.slots is not None:
        weights["slots"] = loop.slots.table.detach()
    if loop.residual.kind in ("A", "B") and times:
        weights["alpha"] = torch.tensor([float(loop.residual.alpha_at(t)) for t in times])
    if loop.time is not None and times:
        weights["time"] = torch.stack([loop.time.vector(t, None).detach() for t in times])
        if loop.time.mix is not None:
            weights["mix.weight"] = loop.time.mix.weight.detach()
    if loop.residual.kind == "C":
        weights |= {name: tensor.detach() for name, tensor in loop.residual.state_dict().items()}
    if loop.lora is not None:
        for name in loop.lora.modules_by_name:
            key = name.replace(".", "/")
            weights |= {f"{name}.down": loop.lora.down[key].detach(), f"{name}.up": loop.lora.up[key].detach()}
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}
