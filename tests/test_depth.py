"""Tokens of unlike depth: packing, slots, and layers run on some tokens alone."""

import torch

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cache import fork, join_rows, select_rows
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.ragged_cache import DepthCache, Slot
from innerloop.passes.tokens import CostScope, Tokens, read_layers
from tests.close import assert_close
from tests.models import WIDTH, tiny_backbone


def some_tokens(n_rows: int = 3, n: int = 6, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(n_rows, n, WIDTH, generator=generator)
    return Tokens(states, torch.arange(n).expand(n_rows, n))


def empty_slot(layers: range, n_rows: int) -> Slot:
    return DepthCache().slot("any", layers, torch.zeros(n_rows, 1, dtype=torch.long))


def bits(*rows: str) -> torch.Tensor:
    return torch.tensor([[bit == "1" for bit in row] for row in rows])


# Packing


def test_picked_tokens_are_packed_in_order_and_put_back_where_they_were():
    tokens, chosen = some_tokens(), bits("010010", "000000", "110100")
    picked = tokens.pick(chosen)
    assert picked.rows_R.tolist() == [0, 2]  # a row without any is left out
    assert picked.positions_RN.masked_fill(~picked.real_RN, -1).tolist() == [[1, 4, -1], [0, 1, 3]]
    assert torch.equal(picked.states_RND[1], tokens.states_RND[2, [0, 1, 3]])
    whole = torch.zeros(3, 6, WIDTH)
    assert torch.equal(picked.put(whole, picked.states_RND), tokens.states_RND * chosen[..., None])
    assert picked.take(tokens.positions_RN).masked_fill(~picked.real_RN, 0).tolist() == [[1, 4, 0], [0, 1, 3]]


def test_picking_among_the_picked_speaks_of_the_same_pass():
    tokens = some_tokens()
    again = tokens.pick(bits("010011", "100000", "110100")).pick(bits("001", "000", "101"))
    assert again.rows_R.tolist() == [0, 2]
    assert again.positions_RN[0, 0] == 5 and again.positions_RN[1].tolist() == [0, 3]
    assert again.flat_index(6)[[0, 2, 3]].tolist() == [5, 12, 15]
    whole = again.put(tokens.states_RND, torch.full_like(again.states_RND, 7.0))
    assert torch.nonzero((whole != tokens.states_RND).any(-1)).tolist() == [[0, 5], [2, 0], [2, 3]]


def test_choosing_all_packs_nothing_choosing_none_leaves_nothing_and_padding_cannot_be_chosen():
    tokens, all_of, none = some_tokens(), bits(*["111111"] * 3), bits(*["000000"] * 3)
    assert tokens.pick(all_of) is tokens and tokens.pick(none) is None
    padded = Tokens(tokens.states_RND, tokens.positions_RN, bits(*["001111"] * 3))
    assert padded.pick(all_of) is padded and padded.pick(bits(*["100000"] * 3)) is None
    whole = padded.put(torch.full((3, 6, WIDTH), 3.0), tokens.states_RND)
    assert (whole[:, :2] == 3.0).all() and torch.equal(whole[:, 2:], tokens.states_RND[:, 2:])


# Layers on some tokens


def slowly(backbone: Backbone, layers: range, states: torch.Tensor, positions: list[int]) -> torch.Tensor:
    """Run layers on one row of tokens without a cache, each seeing itself and those before it."""
    at = torch.tensor([positions])
    mask = backbone.mask_4d(at, at, None, states.dtype)
    return backbone(states[None], mask=mask, positions_BL=at, layers=layers, inner=True)[0]


def test_some_tokens_run_alone_as_if_the_others_were_not_there(arch: str):
    backbone, layers = tiny_backbone(arch), range(1, 3)
    tokens = some_tokens(3, 9)
    chosen = bits("010110011", "000000000", "110000001")
    slot = empty_slot(layers, 3)
    picked = tokens.pick(chosen)
    out = picked.put(tokens.states_RND, read_layers(backbone, picked, slot))
    assert not slot.is_dense and slot.length == 5
    for row in range(3):
        own = torch.nonzero(chosen[row])[:, 0].tolist()
        if own:
            expected = slowly(backbone, layers, tokens.states_RND[row, own], own)
            assert_close(out[row, own], expected)
    assert torch.equal(out[~chosen], tokens.states_RND[~chosen])


def test_reading_on_equals_reading_at_once(arch: str):
    backbone, layers = tiny_backbone(arch), range(2)
    tokens = some_tokens(2, 8)
    chosen = bits("10110111", "01100010")
    slot, at_once = empty_slot(layers, 2), empty_slot(layers, 2)
    whole = tokens.pick(chosen)
    expected = whole.put(torch.zeros_like(tokens.states_RND), read_layers(backbone, whole, at_once))
    got = torch.zeros_like(tokens.states_RND)
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 8)):
        part = Tokens(tokens.states_RND[:, start:end], tokens.positions_RN[:, start:end])
        picked = part.pick(chosen[:, start:end])
        if picked is not None:
            got[:, start:end] = picked.put(got[:, start:end], read_layers(backbone, picked, slot))
    assert_close(got, expected)


# Slots


def test_a_fork_of_slots_grows_by_itself_and_rows_can_be_taken():
    backbone, layers = tiny_backbone("llama"), range(2)
    cache = DepthCache()
    tokens = some_tokens(3, 4)
    read_layers(backbone, tokens, cache.slot("a", layers, tokens.positions_RN))
    twin = fork(cache)
    read_layers(backbone, some_tokens(3, 2), twin.slot("a", layers, tokens.positions_RN))
    assert (cache.slots["a"].length, twin.slots["a"].length) == (4, 6)
    assert cache.slots["a"].keys[0].shape[2] == 4
    part = select_rows(twin, torch.tensor([2, 0]))
    assert torch.equal(part.slots["a"].keys[1], twin.slots["a"].keys[1][[2, 0]])
    assert part.slots["a"].real_BP.shape == (2, 6)
    whole = join_rows([cache, twin], [2, 0], torch.tensor([5, 4, 3, 2, 1, 0])).slots["a"]
    assert whole.positions_BP.shape == (6, 6) and whole.is_dense and not whole.is_real
    assert whole.real_BP[3:, :2].sum() == 0 and whole.real_BP[3:, 2:].all() and whole.real_BP[:3].all()
    assert torch.equal(whole.keys[1][0], twin.slots["a"].keys[1][2])
    assert torch.equal(whole.keys[1][5, :, 2:], cache.slots["a"].keys[1][0])


# Counting


def test_work_is_counted_for_the_tokens_that_ran_and_the_rows_that_count():
    backbone, layers = tiny_backbone("llama"), range(1, 3)
    meter = CostMeter(4, torch.device("cpu"))
    counted = torch.tensor([True, True, False])
    cost_scope = CostScope(meter, torch.tensor([3, 1, 0]), counted)
    chosen = bits("010110", "000001", "110100")
    slot = empty_slot(layers, 3)
    read_layers(backbone, some_tokens().pick(chosen), slot, cost_scope=cost_scope)
    assert meter.layer_positions.tolist() == [0, 2 * 1, 0, 2 * 3]
    assert meter.layer_keys.tolist() == [0, 2 * 1, 0, 2 * (1 + 2 + 3)]
    read_layers(backbone, some_tokens().pick(chosen), slot, cost_scope=cost_scope)  # on top of what is there
    assert meter.layer_keys.tolist()[3] == 2 * (1 + 2 + 3) + 2 * (2 + 4 + 6)
