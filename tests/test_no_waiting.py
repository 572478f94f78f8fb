"""Nothing between two looks at what has ended asks the device: thought and writing run on tensors that hold no values.

The meta device knows shapes alone: whatever would wait for a value (`item`, `tolist`, `nonzero`, a branch) fails on it.
"""

import pytest
import torch

from innerloop.engine.decoding import Writer
from innerloop.methods import (
    Coconut,
    Codi,
    Cot,
    Icot,
    Looped,
    Lotus,
    Method,
    Pause,
    Pccot,
    RecurrentDepth,
    SimCot,
    Slr,
    SpiralThinker,
)
from innerloop.passes.thought import join, think
from innerloop.text.batch import Batch
from tests.models import tiny_model

QUESTIONS = ["3 ; + 4 ; * 2", "1 ; + 1", "2 ; * 3 ; - 1 ; + 2"]
METHODS: dict[str, Method] = {
    "cot": Cot(),
    "pause": Pause(n_pauses=2),
    "icot": Icot(),
    "coconut": Coconut(),
    "codi": Codi(),
    "simcot": SimCot(),
    "pccot": Pccot(n_slots=2, max_loops=2),
    "slr": Slr(n_slots=2, max_loops=3, lora="per_iter", time="lookup"),
    "append": Slr(loop_scope="append", max_loops=3, residual="none"),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=3),
    "spiralthinker": SpiralThinker(latents_per_block=2, max_loops=2),
    "looped": Looped(max_loops=3),
    "recurrent_depth": RecurrentDepth(max_loops=3),
}


def write_three(model, batch: Batch) -> Writer:
    """Think and write three tokens, as the engine does between two looks."""
    context = model.new_context(batch, None)
    columns, mask = batch.columns(2)
    suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
    thought = think(model.method, model.loop, batch, context, None, model.read_out, stem=model.spell.stem())
    seats = [None] * len(batch)
    writer = Writer(model, thought.context, seats)
    writer.start(join([*thought.pending, *suffix]))
    for _ in range(3):
        writer.choose(model.suppressed_ids(), 0.0)
        writer.write()
    return writer


@torch.no_grad()
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_neither_thought_nor_writing_asks_for_a_value(name, arch):
    model = tiny_model(METHODS[name], arch, num_hidden_layers=3).eval().to("meta")
    writer = write_three(model, model.batch(model.prompts(QUESTIONS)))
    assert writer.logits_RV.is_meta and len(writer.logits_RV) == len(QUESTIONS)


@torch.no_grad()
def test_a_value_that_is_asked_for_would_be_found():
    model = tiny_model(Slr(n_slots=2, max_loops=3, stop="delta"), "llama").eval().to("meta")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        write_three(model, model.batch(model.prompts(QUESTIONS)))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_is_never_waited_for(name):
    model = tiny_model(METHODS[name], "llama", num_hidden_layers=3).eval().to("cuda")
    batch = model.batch(model.prompts(QUESTIONS))
    write_three(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_three(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
