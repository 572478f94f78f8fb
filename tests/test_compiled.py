"""Compiled passes give what other passes give, write nowhere else, and are compiled once for all lengths of a room."""

import pytest
import torch

from innerloop.decoder import kv_buffer as rooms
from innerloop.methods import Coconut, Cot, Lotus, Method, Pccot, Slr, SpiralThinker
from innerloop.passes.context import Context
from tests.close import assert_close
from tests.methods.tools import base, by_arch, lean_towards_end, on
from tests.models import SLIDING, tiny_model

QUESTIONS = ["3 ; + 4 ; * 2", "1 ; + 1", "2 ; * 3 ; - 1 ; + 2", "4 ; - 1 ; - 1"]
METHODS = {
    "cot": Cot(),
    "coconut": Coconut(),
    "slr": Slr(n_slots=2, max_loops=3, loop={"lora": "per_iter"}, stop={"rule": "delta"}),
    "append": Slr(loop_scope="append", max_loops=3, loop={"residual": "none"}),
    "lotus": Lotus(n_blocks=2, latents_per_block=2, max_loops=3),
    "pccot": Pccot(n_slots=3, max_loops=2),
    "spiral": SpiralThinker(latents_per_block=2, max_loops=2),
}
ANSWERING = {name: "gpt2" if name in ("cot", "slr", "spiral") else "llama" for name in METHODS}


@pytest.fixture(autouse=True)
def forgetful() -> None:
    """Let no test find programs of another."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def columns_read(context: Context) -> list[torch.Tensor]:
    """Return all keys and values."""
    return [t for layer in context.cache.layers for t in (layer.keys.clone(), layer.values.clone())]


def own(method: Method, arch: str, n_layers: int = 1):
    """Return a model of its own in double precision."""
    changes = {} if arch in SLIDING else {"num_hidden_layers": n_layers}
    return tiny_model(method, arch, **changes).double().eval()


@pytest.mark.parametrize(("name", "arch"), [*ANSWERING.items(), ("windows", "mistral"), ("windows", "gemma2")])
def test_answers_are_those_of_passes_that_are_not_compiled(name, arch):
    model = lean_towards_end(own(METHODS.get(name, Cot()), arch), 2.0)
    plain = model.generate(QUESTIONS, max_new_tokens=9, batch_size=2)
    model.backbone.compile_passes("eager")
    compiled = model.generate(QUESTIONS, max_new_tokens=9, batch_size=2)
    assert [g.ids for g in compiled] == [g.ids for g in plain]
    assert [g.cost.passes for g in compiled] == [g.cost.passes for g in plain]
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (name != "windows")


@by_arch
def test_states_and_what_is_remembered_are_those_of_other_passes(arch, monkeypatch):
    monkeypatch.setattr(rooms, "COLUMNS", 8)  # rooms fill up
    backbone = own(Cot(), arch, 2).backbone
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    embeds = [torch.randn(2, n, backbone.width, dtype=torch.double) for n in (5, 1, 3, 1, 1, 2, 4)]
    found = []
    for compiles in (False, True):
        backbone.compiled = None
        if compiles:
            backbone.compile_passes("eager")
        context, states = Context(backbone, 2), []
        with torch.no_grad():
            states.append(context.read(embeds[0], mask))
            for i, new in enumerate(embeds[1:]):
                states.append(context.read(new, torch.tensor([[1], [0]]).expand(2, new.shape[1]) if i == 2 else None))
        found.append([*(s[:1] if i == 3 else s[:, -1:] for i, s in enumerate(states)), *columns_read(context)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, 1e-12)


def test_forks_that_live_keep_what_they_have_read_and_those_that_are_gone_leave_their_place():
    backbone = own(Cot(), "llama").backbone
    backbone.compile_passes("eager")
    with torch.no_grad():
        context = Context(backbone, 1)
        context.read(torch.randn(1, 4, backbone.width, dtype=torch.double))
        new = [torch.randn(1, 2, backbone.width, dtype=torch.double) for _ in range(4)]
        first = context.fork()
        first.read(new[0])
        before = columns_read(first)
        room = first.cache.layers[0].buffer
        second = first.fork()  # has read nothing of its own, and must find what it shares
        context.read(new[1])
        assert context.cache.layers[0].buffer is not room
        first.read(new[2])
        assert first.cache.layers[0].buffer is room
        for one, other in zip(columns_read(second), before):
            assert torch.equal(one, other)
        kept = columns_read(first)
        second.read(new[3])  # first has columns there
        assert second.cache.layers[0].buffer is not room
        for one, other in zip(columns_read(first), kept):
            assert torch.equal(one, other)
        peeked = [context.peek(new[0]) for _ in range(3)]
        assert torch.equal(peeked[0], peeked[2])
        room = context.cache.layers[0].buffer
        context.peek(new[0])
        assert context.cache.layers[0].buffer is room
        after = context.fork()
        after.read(new[3])
        assert after.cache.layers[0].buffer is room  # the peeks are gone, so their place is free


def test_rows_that_leave_take_their_columns_along():
    backbone = own(Cot(), "gpt2").backbone
    backbone.compile_passes("eager")
    embeds, more = (torch.randn(3, n, backbone.width, dtype=torch.double) for n in (4, 1))
    with torch.no_grad():
        context, again = Context(backbone, 3), Context(backbone, 3)
        for one in (context, again):
            one.read(embeds)
            one.read(more)
        states = context.keep_rows(torch.tensor([2, 0])).read(more[[2, 0]])
        assert_close(states, again.read(more)[[2, 0]], 1e-12)


def test_one_program_serves_all_lengths_of_a_room_and_all_iterations():
    model = own(Slr(n_slots=2, max_loops=4, loop={"lora": "per_iter"}), "llama")
    model.backbone.compile_passes("eager")
    model.generate(QUESTIONS[:1], max_new_tokens=12)
    counted = torch._dynamo.utils.counters
    assert sum(counted["graph_break"].values()) == 0
    assert counted["stats"]["unique_graphs"] == 3  # two columns of the thought; the answer's first; one more column


def test_nothing_is_compiled_where_gradients_are_asked_for():
    backbone = base("llama").backbone
    model = on("llama", Cot())
    backbone.compile_passes("eager")
    try:
        assert not backbone.compiled.takes(Context(backbone, 1).cache, 1)
        with torch.no_grad():
            context = Context(backbone, 1)
            context.read(torch.randn(1, 2, backbone.width, dtype=torch.double))
        assert not backbone.compiled.takes(context.cache, 1)
        with torch.no_grad():
            assert backbone.compiled.takes(context.cache, 1)
            assert not backbone.compiled.takes(context.cache, 65)
    finally:
        model.backbone.compiled = None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_programs_of_inductor_write_the_same():
    model = tiny_model(Lotus(n_blocks=2, latents_per_block=2, max_loops=3), "llama").eval()
    plain = model.generate(QUESTIONS, max_new_tokens=9)
    model.backbone.compile_passes()
    assert [g.ids for g in model.generate(QUESTIONS, max_new_tokens=9)] == [g.ids for g in plain]
