"""Nothing between two looks at what has ended asks the device: thought and writing run on tensors that hold no values.

The meta device knows shapes alone: whatever would wait for a value (`item`, `tolist`, `nonzero`, a branch) fails on it.
"""

import pytest
import torch

from innerloop.engine.decoding import DecodeBatch
from innerloop.engine.learned_canvases import canvas_engine
from innerloop.engine.options import EngineOptions
from innerloop.methods import (
    BlockDiffusion,
    Coconut,
    Codi,
    Cot,
    Dcolt,
    Dream,
    Icot,
    Llada,
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
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.passes.region import join
from innerloop.text.batch import Batch
from tests.models import tiny_model

QUESTIONS = ["3 ; + 4 ; * 2", "1 ; + 1", "2 ; * 3 ; - 1 ; + 2"]
METHODS: list[Method] = [
    *(Cot(), Pause(n_pauses=2), Icot(), Coconut(), Codi(), SimCot(), Pccot(n_slots=2, max_loops=2)),
    Slr(n_slots=2, max_loops=3, loop={"lora": "per_iter", "time": "lookup"}),
    Slr(loop_scope="append", max_loops=3, loop={"residual": "none"}),
    Lotus(n_blocks=2, latents_per_block=2, max_loops=3),
    *(SpiralThinker(latents_per_block=2, max_loops=2), Looped(max_loops=3), RecurrentDepth(max_loops=3)),
]
by_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def write_three(model, batch: Batch) -> DecodeBatch:
    """Think and write three tokens, as the engine does between two looks."""
    columns, mask = batch.columns(2)
    suffix = [(model.backbone.embed(batch.ids_BS[:, columns]), mask)] if columns.start < columns.stop else []
    thought = model.think(batch)
    decode_batch = DecodeBatch(model, thought.context, [None] * len(batch))
    decode_batch.start(join([*thought.pending, *suffix]))
    for _ in range(3):
        decode_batch.choose(model.suppressed_ids())
        decode_batch.write()
    return decode_batch


@torch.no_grad()
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@by_method
def test_neither_thought_nor_writing_asks_for_a_value(method, arch):
    model = tiny_model(method, arch, num_hidden_layers=3).eval().to("meta")
    decode_batch = write_three(model, model.batch(model.prompts(QUESTIONS)))
    assert decode_batch.logits_RV.is_meta and len(decode_batch.logits_RV) == len(QUESTIONS)


@torch.no_grad()
def test_a_value_that_is_asked_for_would_be_found():
    model = tiny_model(Slr(n_slots=2, max_loops=3, stop={"rule": "delta"}), "llama").eval().to("meta")
    with pytest.raises(NotImplementedError, match="meta tensor"):
        write_three(model, model.batch(model.prompts(QUESTIONS)))


@pytest.mark.gpu
@torch.no_grad()
@by_method
def test_a_gpu_is_never_waited_for(method):
    model = tiny_model(method, "llama", num_hidden_layers=3).eval().to("cuda")
    batch = model.batch(model.prompts(QUESTIONS))
    write_three(model, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_three(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


CANVASES: dict[str, DenoisingMethod] = {
    "llada": Llada(gen_length=12, sampler={"eos": "never"}),
    "llada, guided": Llada(gen_length=12, sampler={"eos": "never", "guidance": 1.0, "top_p": 0.9}),
    "dream": Dream(gen_length=12, sampler={"eos": "never", "commit": "entropy"}),
    "dcolt": Dcolt(gen_length=12, upm_init="confidence", sampler={"eos": "never"}),
    "dual": Llada(gen_length=12, sampler={"eos": "never", "block_length": 6, "cache": "dual"}),
    "block_diffusion": BlockDiffusion(gen_length=12, block_length=2, sampler={"eos": "never"}),
    "soft": Llada(gen_length=12, sampler={"eos": "never"}, soft={"share": 1.0}),
    "block_diffusion, soft": BlockDiffusion(
        gen_length=12, block_length=4, sampler={"eos": "never"}, soft={"share": 1.0}
    ),
    "block_diffusion, guided": BlockDiffusion(
        gen_length=12, block_length=2, shift=True, sampler={"eos": "never", "guidance": 1.0}
    ),
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", CANVASES.values(), ids=CANVASES)
def test_a_pass_over_canvases_waits_once(method, temperature, monkeypatch):
    """For the tokens that it predicts; rows of unlike questions join while others go on."""
    model, looks = tiny_model(method, "llama", num_hidden_layers=3).eval().to("meta"), []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: looks.append(t) or torch.full(t.shape, 5, dtype=t.dtype))
    options = EngineOptions(batch_size=3, temperature=temperature)
    engine = canvas_engine(method)(model, options)
    for question in QUESTIONS[:2]:
        engine.submit(question)
    for i in range(8):
        if i == 3:
            engine.submit(QUESTIONS[2])
        engine._advance()
    assert len(looks) == 8 and len(engine.live) == 3


@torch.no_grad()
@pytest.mark.parametrize("name", ["llada", "dream"])
def test_canvases_that_see_all_keep_no_keys(name):
    """They read everything again in each pass."""
    model, caches = tiny_model(CANVASES[name]), []
    forward = model.backbone.forward
    model.backbone.forward = lambda embeds, **known: caches.append(known["cache"]) or forward(embeds, **known)
    model.generate(QUESTIONS)
    assert set(caches) == {None}
