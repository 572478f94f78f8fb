"""Layers that grow in place hold what growing by concatenation holds, whoever shares their memory."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop.decoder import kv_buffer
from innerloop.decoder.kv_buffer import FullLayer, WindowLayer
from innerloop.methods import Cot
from innerloop.passes.context import Context
from tests.close import assert_close
from tests.models import tiny_backbone, tiny_model

DEEDS = st.lists(
    st.tuples(
        st.sampled_from(["grow"] * 4 + ["fork"] * 2 + ["drop", "rows", "trim", "cut"]),
        st.integers(0, 9),
        st.integers(1, 3),
    ),
    min_size=12,
    max_size=24,
)


def columns(n_rows: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, n_rows, 2, n, 3, generator=generator)
    return made[0], made[1]


@settings(max_examples=80, deadline=None)
@given(deeds=DEEDS, is_window=st.booleans())
def test_whatever_layers_do_they_hold_what_concatenation_gives(deeds, is_window):
    """Several views of one past grow, split, lose rows and columns, and go; each is compared with plain tensors."""
    first = WindowLayer(64) if is_window else FullLayer()
    if isinstance(first, WindowLayer):
        first.is_padded = True
    views = [(first, *columns(3, 0, 0))]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kv_buffer, "COLUMNS", 8)  # they fill up
        for seed, (deed, which, n) in enumerate(deeds):
            i = which % len(views)
            layer, keys, values = views[i]
            if deed == "fork":
                views.append((copy.copy(layer), keys, values))
            elif deed == "drop" and len(views) > 1:
                del views[i], layer
            elif deed == "grow":
                new = columns(len(keys), n, seed)
                keys, values = torch.cat([keys, new[0]], dim=2), torch.cat([values, new[1]], dim=2)
                views[i] = (layer, keys, values)
                assert torch.equal(layer.update(*new)[0], keys)
            elif deed == "rows" and keys.shape[2]:
                rows = torch.randint(len(keys), (n,), generator=torch.Generator().manual_seed(seed))
                layer.keep_rows(rows)
                views[i] = (layer, keys[rows], values[rows])
            elif deed == "cut" and keys.shape[2]:
                layer.cut(keys.shape[2] - min(n, keys.shape[2]))
                views[i] = (layer, keys[:, :, :-n], values[:, :, :-n])
            elif deed == "trim" and keys.shape[2]:  # as `keep_columns` does
                layer.keys, layer.values = layer.keys[:, :, 1:].clone(), layer.values[:, :, 1:].clone()
                views[i] = (layer, keys[:, :, 1:], values[:, :, 1:])
            for layer, keys, values in views:
                assert layer.n_kept == keys.shape[2]
                if keys.shape[2]:
                    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)


def test_written_columns_are_copied_once_in_a_room():
    """64 tokens are written with two copies of what was read, not 64."""
    layer, addresses = FullLayer(), []
    with torch.no_grad():
        for seed in range(kv_buffer.COLUMNS + 1):
            layer.update(*columns(1, 1, seed))
            addresses.append(layer.keys.data_ptr())
    assert len(set(addresses)) == 2
    assert layer.get_seq_length() == kv_buffer.COLUMNS + 1


@pytest.mark.parametrize(("forget", "n"), [("crop", -2), ("cut", 2), ("cut", 9)])
def test_columns_that_are_kept_are_nobody_elses(forget, n):
    with torch.no_grad():
        layer = FullLayer()
        layer.update(*columns(1, 1, 0))
        twin = copy.copy(layer)
        layer.update(*columns(1, 3, 1))
        getattr(layer, forget)(n)
        kept = layer.keys.clone()
        twin.update(*columns(1, 3, 2))
        assert torch.equal(layer.keys, kept) and kept.shape[2] in (2, 4)
        assert torch.equal(layer.update(*columns(1, 1, 3))[0][:, :, :-1], kept)


def test_a_cache_can_be_pickled_and_goes_on_by_itself():
    layer = FullLayer()
    with torch.no_grad():
        layer.update(*columns(1, 2, 0))
        for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
            assert torch.equal(again.keys, layer.keys)
            again.update(*columns(1, 1, 1))
        assert torch.equal(layer.keys, columns(1, 2, 0)[0])


def test_memory_is_let_go_where_columns_lie_elsewhere_now():
    layer = FullLayer()
    with torch.no_grad():
        layer.update(*columns(1, 2, 0))
    layer.update(*columns(1, 1, 1))
    assert layer.buffer is None and layer.placed is None


def test_what_a_dropped_fork_left_behind_reaches_no_compiled_pass():
    backbone = tiny_backbone("llama")
    backbone.compile_passes("eager")
    embeds = torch.randn(1, 5, backbone.width)
    with torch.no_grad():
        context = Context(backbone, 1)
        context.read(embeds[:, :4])
        context.peek(torch.full((1, 3, backbone.width), torch.nan))
        assert context.read(embeds[:, 4:]).isfinite().all()


def test_memory_of_inference_mode_is_not_written_to_outside_of_it():
    layer = FullLayer()
    with torch.inference_mode():
        layer.update(*columns(1, 2, 0))
    with torch.no_grad():
        keys, _ = layer.update(*columns(1, 1, 1))
    assert torch.equal(keys, torch.cat([columns(1, 2, 0)[0], columns(1, 1, 1)[0]], dim=2))


def test_gradients_flow_through_what_was_read():
    """A prefix and what follows lie in no buffer; what a loop reads after them may."""
    backbone = tiny_backbone("llama")
    cache, embeds = backbone.empty_cache(), torch.randn(1, 4, backbone.width, requires_grad=True)
    backbone(embeds[:, :3], cache=cache)
    backbone(embeds[:, 3:], cache=cache).sum().backward()
    assert embeds.grad is not None and embeds.grad[:, :3].abs().sum() > 0
    assert all(layer.buffer is None for layer in cache.layers)


@settings(max_examples=40, deadline=None)
@given(deeds=st.lists(st.tuples(st.sampled_from(["grow", "grow", "fork"]), st.integers(0, 9), st.integers(1, 3))))
def test_gradients_are_those_of_concatenation(deeds):
    """Forks grow side by side; each column that any of them attends to gets its gradient."""
    found = []
    for is_buffered in (True, False):
        new, views, total = [], [(FullLayer(), *columns(2, 0, 0))], torch.zeros(())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_buffer, "COLUMNS", 8)
            for seed, (deed, which, n) in enumerate(deeds):
                layer, keys, values = views[which % len(views)]
                if deed == "fork":
                    views.append((copy.copy(layer), keys, values))
                    continue
                more = [t.requires_grad_() for t in columns(2, n, seed)]
                new += more
                keys, values = torch.cat([keys, more[0]], dim=2), torch.cat([values, more[1]], dim=2)
                if is_buffered:
                    keys, values = layer.update(*more)
                views[which % len(views)] = (layer, keys, values)
                total = total + (keys**2).sum() + (keys * values).sum()
        found.append((total, torch.autograd.grad(total, new) if new else ()))
    assert_close(found[0][0], found[1][0])
    for ours, plain in zip(found[0][1], found[1][1], strict=True):
        assert_close(ours, plain)


def test_a_long_thought_keeps_its_keys_once():
    layer, kept = FullLayer(), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.untyped_storage().data_ptr()) or t, lambda t: t):
        for seed in range(20):
            keys, values = layer.update(*(t.requires_grad_() for t in columns(2, 1, seed)))
            (keys * values).sum()
    assert len(kept) <= 8  # two that were read first, and one buffer


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_what_was_read_without_gradients_is_built_on_with_them(arch):
    """A prefix in a buffer can be read on from while something is learned, and the buffer stays as it is."""
    backbone = tiny_backbone(arch)
    past, new = torch.randn(2, 1, 3, backbone.width)
    cache = backbone.empty_cache()
    with torch.no_grad():
        backbone(past, cache=cache)
        whole = backbone(torch.cat([past, new], dim=1))[:, 3:]
    new.requires_grad_()
    states = backbone(new, cache=cache)
    assert_close(states, whole)
    states.sum().backward()
    assert new.grad is not None and new.grad.abs().sum() > 0


def test_answers_are_the_same_in_rooms_that_fill_up(monkeypatch):
    model, questions = tiny_model(Cot(), "gemma3"), ["3 ; + 4 ; * 2", "1 ; + 1", "4 ; - 1 ; - 1"]
    found = []
    for n in (1, 4, 64):
        monkeypatch.setattr(kv_buffer, "COLUMNS", n)
        found.append([g.ids for g in model.generate(questions, max_new_tokens=12, batch_size=2)])
    assert found[0] == found[1] == found[2]
