"""Views on caches: what one view reads, no other view notices."""

import pytest
import torch

from innerloop.decoder.cache import fork, select_rows
from tests.close import ROUNDED, assert_close
from tests.models import ARCHS, WINDOW, random_ids, tiny_backbone

PAST = WINDOW + 3  # past the sliding window


def filled(backbone, n_rows=3, length=PAST, seed=0):
    """Return a cache that holds ``length`` random positions, and their ids."""
    ids, cache = random_ids(n_rows, length, seed), backbone.empty_cache()
    with torch.no_grad():
        backbone(backbone.embed(ids), cache=cache)
    return ids, cache


def read(backbone, ids, cache):
    with torch.no_grad():
        return backbone(backbone.embed(ids), cache=cache)


def contents(cache):
    """Return (length, keys, values) of every slot; the tensors are copies."""
    return [
        (layer.get_seq_length(), *((layer.keys.clone(), layer.values.clone()) if layer.get_seq_length() else ()))
        for layer in cache.layers
    ]


def assert_same_contents(one, other):
    assert [length for length, *_ in one] == [length for length, *_ in other]
    for (_, *ours), (_, *theirs) in zip(one, other):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("length", [2, PAST])
def test_reading_into_a_fork_leaves_the_original_as_it_was(arch, length):
    backbone = tiny_backbone(arch)
    _, cache = filled(backbone, length=length)
    before, tensors = contents(cache), [layer.keys for layer in cache.layers]
    twin = fork(cache)
    assert all(a.keys is b.keys for a, b in zip(twin.layers, cache.layers))  # nothing is copied
    for seed in range(3):
        read(backbone, random_ids(3, 4, seed), twin)

    assert twin.get_seq_length() == length + 12
    assert_same_contents(contents(cache), before)
    assert all(layer.keys is tensor for layer, tensor in zip(cache.layers, tensors))


def test_a_fork_and_its_original_read_on_independently(arch):
    backbone = tiny_backbone(arch)
    past, cache = filled(backbone)
    twin = fork(cache)
    left, right = random_ids(3, 4, seed=1), random_ids(3, 6, seed=2)
    for ids, view in ((left, cache), (right, twin)):
        first, rest = read(backbone, ids[:, :2], view), read(backbone, ids[:, 2:], view)
        whole = read(backbone, torch.cat([past, ids], dim=1), None)[:, PAST:]
        assert_close(torch.cat([first, rest], dim=1), whole)


def test_forking_an_empty_cache_leaves_it_empty(arch):
    backbone = tiny_backbone(arch)
    cache = backbone.empty_cache()
    twin = fork(cache)
    read(backbone, random_ids(1, 3), twin)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (0, 3)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1], [0, 0, 2, 2]], ids=["permutation", "one", "duplicates"])
def test_selected_rows_read_on_as_if_they_had_been_alone(arch, rows):
    backbone = tiny_backbone(arch)
    past, cache = filled(backbone)
    before = contents(cache)
    chosen, ids = torch.tensor(rows), random_ids(len(rows), 3, seed=1)
    part = select_rows(cache, chosen)
    states = read(backbone, ids, part)

    whole = read(backbone, torch.cat([past[chosen], ids], dim=1), None)[:, PAST:]
    assert_close(states, whole)
    assert_same_contents(contents(cache), before)


def test_selected_rows_are_the_rows_bit_for_bit():
    _, cache = filled(tiny_backbone("gemma3"))
    part = select_rows(cache, torch.tensor([2, 0]))
    for ours, whole in zip(part.layers, cache.layers):
        assert torch.equal(ours.keys, whole.keys[[2, 0]])
        assert torch.equal(ours.values, whole.values[[2, 0]])
        assert ours.get_seq_length() == whole.get_seq_length()


def test_selecting_rows_of_an_empty_cache_is_empty():
    assert select_rows(tiny_backbone().empty_cache(), torch.tensor([0])).get_seq_length() == 0


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_through_a_forked_cache_equal_those_of_one_uncached_pass(arch):
    backbone = tiny_backbone(arch).double()
    embeds = torch.randn(2, PAST + 4, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(states_of):
        backbone.zero_grad()
        inputs = embeds.clone().requires_grad_()
        (states_of(inputs) * weight).sum().backward()
        return inputs.grad, {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}

    def uncached(inputs):
        return backbone(inputs)[:, PAST:]

    def forked(inputs):
        cache = backbone.empty_cache()
        backbone(inputs[:, :PAST], cache=cache)
        backbone(torch.ones_like(inputs[:, :2]), cache=fork(cache))  # read ahead and forgotten
        twin = fork(cache)
        return torch.cat(
            [backbone(inputs[:, PAST : PAST + 1], cache=twin), backbone(inputs[:, PAST + 1 :], cache=twin)], 1
        )

    (ours, our_weights), (plain, plain_weights) = gradients(forked), gradients(uncached)
    assert plain[:, :PAST].abs().max() > 1e-3  # the past matters
    assert_close(ours, plain, ROUNDED)
    assert our_weights.keys() == plain_weights.keys()
    for name, gradient in plain_weights.items():
        assert_close(our_weights[name], gradient, ROUNDED)
