"""Hand-over: what a model has read when it begins to answer, as input embeddings from which any decoder goes on.

    embeds_SD = embeds("runs/demo/slr", "3 ; + 4 ; * 2")
    decoder.generate(inputs_embeds=embeds_SD[None], suppress_tokens=never_written(model))

The thought runs here; its latents are inputs like words, and the decoder that reads them has the run's plain weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from innerloop.checks.arguments import checked
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import lay_out
from innerloop.errors import InputError
from innerloop.methods.depth.method import DepthMethod
from innerloop.model.model import LatentCore
from innerloop.passes.context import Context
from innerloop.passes.region import join


class Remembering(Context):
    """A context that keeps the embeddings of all that it, or what it was forked from, has read."""

    heard: tuple[Tensor, ...] = ()

    def read(self, embeds_BLD: Tensor, mask_BL: Tensor | None = None, *args: Any, **options: Any):
        """Read as any context does."""
        self.heard = (*self.heard, embeds_BLD if mask_BL is None else embeds_BLD[:, mask_BL[0].bool()])
        return super().read(embeds_BLD, mask_BL, *args, **options)


@checked
@torch.no_grad()
def embeds(run: str | Path | LatentCore, question: str, *, loops: int | None = None) -> Tensor:
    """Return the input embeddings (S, D) after which the answer is written: the prompt, the latents, what closes them.

    Args:
        run: a model, or a run's folder.
        question: what is asked.
        loops: another number of loops than the model was trained with.

    Raises:
        InputError: the answer needs more than embeddings and the decoder's weights.
    """
    model = run if isinstance(run, LatentCore) else LatentModel.from_pretrained(run)
    if reason := beyond(model):
        raise InputError(
            f"'{model.method.name}' cannot hand over its thought: {reason}; answer with this library, as serve does"
        )
    was_training = model.training
    model.eval()
    try:
        row, _ = lay_out(model, question, None, loops, None)
        batch = model.batch([row])
        context = Remembering(model.backbone, 1)
        thought = model.think(batch, context=context)
        columns, mask = batch.columns(2)
        suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)]
        pending, mask_BL = join([*thought.pending, *suffix])
        last = pending if mask_BL is None else pending[:, mask_BL[0].bool()]
        assert isinstance(thought.context, Remembering)
        return torch.cat([*thought.context.heard, last], dim=1)[0]
    finally:
        model.train(was_training)


def never_written(model: LatentCore) -> list[int]:
    """Return the tokens that an answer never has: the method's markers; whoever goes on must leave them out too."""
    return [int(i) for i in model.suppressed_ids().tolist()]


def beyond(model: LatentCore) -> str:
    """Return what an answer needs besides embeddings and the decoder's own weights; nothing if that is all."""
    method, plan, loop = model.method, model.method.plan, model.loop
    rereads = plan.answer_context == "refeed" and plan.scope != "append"
    problems = (
        (method.family == "denoise" or plan.sees != "past", "it fills in a canvas of masks"),
        (isinstance(method, DepthMethod) and bool(method.passes_do), f"it {getattr(method, 'passes_do', '')}"),
        (model.hybrid is not None, "it feeds latents beside the tokens that it writes"),
        (method.decoder.kind != "lm_head", "a decoder of its own answers"),
        (model.block() is not None, "it thinks again while it writes"),
        (method.n_ends > 1, "its answer goes on after an end of sequence"),
        (plan.decode_lora, "its answer is written with weights of the loop"),
        (loop.lora is not None and not rereads, "its latents are read with weights of the loop"),
    )
    return next((reason for is_so, reason in problems if is_so), "")
