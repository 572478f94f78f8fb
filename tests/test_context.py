"""Reading on: pieces, padding, rows, checkpointed passes, and what is counted on the way."""

import pytest
import torch
from torch import Tensor

from innerloop.decoder.cost import CostMeter
from innerloop.passes.context import Context
from tests.close import assert_close
from tests.models import ARCHS, WINDOW, left_pad, random_ids, tiny_backbone

LENGTH = 2 * WINDOW + 3
CPU = torch.device("cpu")


@torch.no_grad()
def read(context: Context, ids: Tensor, mask: Tensor | None = None, **options):
    return context.read(context.backbone.embed(ids), mask, **options)


def alone(backbone, row: Tensor) -> Tensor:
    """Return the states of one row read by itself, without padding, in one pass."""
    return read(Context(backbone, 1), row[None])[0]


def snapshot(context: Context) -> dict:
    return {
        "length": context.length,
        "positions": context.next_position_B.clone(),
        "mask": None if context.mask_BP is None else context.mask_BP.clone(),
        "cache": [(layer.get_seq_length(), layer.keys, layer.values) for layer in context.cache.layers],
    }


def assert_unchanged(context: Context, before: dict) -> None:
    after = snapshot(context)
    assert after["length"] == before["length"]
    assert torch.equal(after["positions"], before["positions"])
    assert (after["mask"] is None) == (before["mask"] is None)
    assert before["mask"] is None or torch.equal(after["mask"], before["mask"])
    for (length, keys, values), (old_length, old_keys, old_values) in zip(after["cache"], before["cache"]):
        assert length == old_length and keys is old_keys and values is old_values


# Reading


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [WINDOW, 1, LENGTH - WINDOW - 1], [LENGTH - 1, 1]])
def test_reading_in_pieces_equals_reading_at_once(arch, pieces):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    context = Context(backbone, 2)
    states = torch.cat([read(context, part) for part in ids.split(pieces, dim=1)], dim=1)
    assert_close(states, read(Context(backbone, 2), ids))
    assert context.length == LENGTH
    assert context.next_position_B.tolist() == [LENGTH, LENGTH]
    assert context.mask_BP is None


def test_reading_equals_the_models_own_forward(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    with torch.no_grad():
        own = backbone.lm(input_ids=ids).logits
    assert_close(backbone.head(read(Context(backbone, 2), ids)), own)


def test_a_mask_without_padding_changes_nothing(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, LENGTH)
    masked = read(Context(backbone, 2), ids, torch.ones_like(ids))
    assert_close(masked, read(Context(backbone, 2), ids))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_may_have_any_type(dtype):
    backbone, (ids, mask) = tiny_backbone(), left_pad([random_ids(1, 5)[0], random_ids(1, 3)[0]])
    states = read(Context(backbone, 2), ids, mask.to(dtype))
    assert torch.equal(states, read(Context(backbone, 2), ids, mask))


def test_left_padded_rows_read_in_pieces_equal_rows_alone(arch):
    backbone = tiny_backbone(arch)
    rows = [random_ids(1, n, seed=n)[0] for n in (LENGTH, WINDOW + 2, 4)]
    ids, mask = left_pad(rows)
    context = Context(backbone, 3)
    cuts = [LENGTH - 5, 3, 1, 1]  # the shortest row has no real position in the first piece
    parts = [read(context, i, m) for i, m in zip(ids.split(cuts, 1), mask.split(cuts, 1))]
    for row, states in zip(rows, torch.cat(parts, dim=1)):
        assert_close(states[-len(row) :], alone(backbone, row))
    assert context.next_position_B.tolist() == [len(row) for row in rows]


def test_learned_positions_count_from_a_rows_own_start():
    backbone = tiny_backbone("gpt2")
    row = random_ids(1, 4)[0]
    ids, mask = left_pad([random_ids(1, 9)[0], row])
    assert_close(read(Context(backbone, 2), ids, mask)[1, 5:], alone(backbone, row))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("cuts", [[9], [3, 3, 3], [1] * 9])
def test_holes_anywhere_in_a_row_are_as_if_they_were_not_there(arch, cuts):
    backbone, ids = tiny_backbone(arch), random_ids(3, 9)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 1, 0, 1]])
    context = Context(backbone, 3)
    parts = [read(context, i, m) for i, m in zip(ids.split(cuts, 1), mask.split(cuts, 1))]
    for row_ids, row_mask, states in zip(ids, mask.bool(), torch.cat(parts, dim=1)):
        assert_close(states[row_mask], alone(backbone, row_ids[row_mask]))
    assert context.next_position_B.tolist() == [9, 5, 3]
    assert torch.equal(context.mask_BP, mask)


def test_padding_may_come_first_or_last_or_only_in_some_pieces(arch):
    backbone = tiny_backbone(arch)
    long, short = random_ids(1, 7)[0], random_ids(1, 5, seed=1)[0]
    context = Context(backbone, 2)
    first = read(context, torch.stack([long[:3], short[:3]]))  # no mask yet
    ids = torch.stack([long[3:], torch.cat([short[3:], short[:2]])])
    rest = read(context, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    assert_close(torch.cat([first[1], rest[1, :2]]), alone(backbone, short))
    assert_close(torch.cat([first[0], rest[0]]), alone(backbone, long))
    assert context.mask_BP.tolist() == [[1] * 7, [1] * 5 + [0] * 2]


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}], ids=["usual", "eager"])
def test_gradients_of_a_padded_batch_are_those_of_its_rows(arch, attention):
    backbone = tiny_backbone(arch, **attention)
    rows = [random_ids(1, n, seed=n)[0] for n in (8, 3)]
    ids, mask = left_pad(rows)

    def gradients(run):
        backbone.zero_grad()
        run().backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}

    def batched():
        context = Context(backbone, 2)
        first = context.read(backbone.embed(ids[:, :5]), mask[:, :5])  # all of the second row is padding here
        last = context.read(backbone.embed(ids[:, 5:]), mask[:, 5:])
        return (torch.cat([first, last], dim=1) * mask[..., None]).square().sum()

    def one_by_one():
        return sum(Context(backbone, 1).read(backbone.embed(row[None])).square().sum() for row in rows)

    ours, plain = gradients(batched), gradients(one_by_one)
    for name, gradient in plain.items():
        assert_close(ours[name], gradient, 1e-3)  # sums of order 100


# Reading ahead


@pytest.mark.parametrize("padded", [False, True])
def test_peeking_reads_the_same_and_leaves_the_context_as_it_was(arch, padded):
    backbone = tiny_backbone(arch)
    ids, mask = left_pad([random_ids(1, LENGTH)[0], random_ids(1, LENGTH - 2)[0]])
    mask = mask if padded else None
    context = Context(backbone, 2)
    read(context, ids[:, :WINDOW], None if mask is None else mask[:, :WINDOW])
    before = snapshot(context)
    rest = None if mask is None else mask[:, WINDOW:]
    with torch.no_grad():
        seen = context.peek(backbone.embed(ids[:, WINDOW:]), rest)
        context.peek(backbone.embed(ids[:, :3]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert_unchanged(context, before)
    assert torch.equal(read(context, ids[:, WINDOW:], rest), seen)
    assert context.length == LENGTH


def test_a_fork_reads_on_by_itself():
    backbone, ids = tiny_backbone(), random_ids(2, 6)
    context = Context(backbone, 2)
    read(context, ids[:, :3])
    twin, before = context.fork(), snapshot(context)
    states = read(twin, ids[:, 3:])
    assert_unchanged(context, before)
    assert (twin.length, context.length) == (6, 3)
    assert_close(states, read(Context(backbone, 2), ids)[:, 3:])


def test_all_states_are_those_of_the_backbone(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, 6)
    context = Context(backbone, 2)
    first = read(context, ids[:, :4], all_states=True)
    with torch.no_grad():
        last = context.peek(backbone.embed(ids[:, 4:]), all_states=True)
        expected = backbone(backbone.embed(ids), all_states=True)
    assert len(first) == len(last) == len(expected) == 4
    for ours, whole in zip(zip(first, last), expected):
        assert_close(torch.cat(ours, dim=1), whole)


def test_states_before_the_final_norm_are_those_of_the_backbone(arch):
    backbone, ids = tiny_backbone(arch), random_ids(2, 6)
    context = Context(backbone, 2)
    first = read(context, ids[:, :4], normed=False)
    with torch.no_grad():
        last = context.peek(backbone.embed(ids[:, 4:]), normed=False)
        expected = backbone(backbone.embed(ids), normed=False)
    assert_close(torch.cat([first, last], dim=1), expected)


# Rows


@pytest.mark.parametrize("kept", [[2, 0], [1], [1, 1, 0]], ids=["permutation", "one", "duplicates"])
def test_kept_rows_read_on_as_if_alone(arch, kept):
    backbone = tiny_backbone(arch)
    rows = [random_ids(1, n, seed=n)[0] for n in (WINDOW + 3, 4, WINDOW)]
    ids, mask = left_pad(rows)
    context = Context(backbone, 3)
    read(context, ids, mask)
    before = snapshot(context)
    part = context.keep_rows(torch.tensor(kept))
    more = random_ids(len(kept), 3, seed=9)
    states = read(part, more)
    for index, new, ours in zip(kept, more, states):
        assert_close(ours, alone(backbone, torch.cat([rows[index], new]))[-3:])
    assert_unchanged(context, before)


def test_kept_rows_can_be_kept_again():
    backbone, ids = tiny_backbone(), random_ids(4, 3)
    meter = CostMeter(4, CPU)
    context = Context(backbone, 4, meter)
    read(context, ids)
    part = context.keep_rows(torch.tensor([3, 1, 0])).keep_rows(torch.tensor([2, 0]))
    assert part.rows.tolist() == [0, 3]
    more = random_ids(2, 2, seed=1)
    states = read(part, more)
    assert_close(states[1], alone(backbone, torch.cat([ids[3], more[1]]))[-2:])
    assert meter.positions.tolist() == [5, 3, 3, 5]


# Counting


def test_the_meter_counts_passes_positions_and_keys():
    meter = CostMeter(2, CPU)
    context = Context(tiny_backbone(), 2, meter)
    ids = random_ids(2, 4)
    read(context, ids)  # 4 positions see 1+2+3+4 keys
    read(context, ids[:, :3])  # 3 positions see 5+6+7
    read(context, ids[:, :1])  # 1 sees 8
    assert meter.passes.tolist() == [3, 3]
    assert meter.positions.tolist() == [8, 8]
    assert meter.keys.tolist() == [10 + 18 + 8] * 2


def test_padding_is_not_counted():
    meter = CostMeter(2, CPU)
    context = Context(tiny_backbone(), 2, meter)
    read(context, random_ids(2, 4), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))  # 10 and 3 keys
    read(context, random_ids(2, 2), torch.tensor([[1, 1], [0, 0]]))  # 5+6 keys; the second row is not in it
    read(context, random_ids(2, 3), torch.tensor([[1, 0, 0], [1, 1, 0]]))  # 7; 3+4
    assert meter.passes.tolist() == [3, 2]
    assert meter.positions.tolist() == [7, 4]
    assert meter.keys.tolist() == [10 + 11 + 7, 3 + 7]


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1], [1, 1], [0, 1]])])
def test_rows_that_do_not_count_are_not_charged(mask):
    meter = CostMeter(3, CPU)
    context = Context(tiny_backbone(), 3, meter)
    read(context, random_ids(3, 2), mask)
    counted = torch.tensor([True, False, True])
    read(context, random_ids(3, 1), counted_B=counted)
    n_third = 2 if mask is None else 1
    assert meter.passes.tolist() == [2, 1, 2]
    assert meter.positions.tolist() == [3, 2, n_third + 1]
    assert meter.keys.tolist() == [3 + 3, 3, 6 if mask is None else 1 + 2]
    assert context.next_position_B.tolist() == [3, 3, n_third + 1]  # it rides along


def test_kept_rows_are_charged_to_the_right_counters():
    meter = CostMeter(3, CPU)
    context = Context(tiny_backbone(), 3, meter)
    read(context, random_ids(3, 2))
    part = context.keep_rows(torch.tensor([2, 0]))
    read(part, random_ids(2, 1))
    read(part, random_ids(2, 2), torch.tensor([[1, 1], [1, 0]]))
    read(part, random_ids(2, 1), counted_B=torch.tensor([False, True]))
    assert meter.passes.tolist() == [4, 1, 3]
    assert meter.positions.tolist() == [5, 2, 5]
    assert meter.keys.tolist() == [3 + 3 + 4 + 5, 3, 3 + 3 + 9]


def test_peeked_passes_are_counted():
    meter, backbone = CostMeter(1, CPU), tiny_backbone()
    context = Context(backbone, 1, meter)
    read(context, random_ids(1, 2))
    with torch.no_grad():
        context.peek(backbone.embed(random_ids(1, 3)))
    assert (meter.passes.item(), meter.positions.item(), meter.keys.item()) == (2, 5, 3 + 3 + 4 + 5)


def test_reading_and_counting_never_wait_for_the_device(monkeypatch):
    """No `.item()`, `.tolist()` or `if tensor:` of ours on the way (style.md, section 4)."""
    context = Context(tiny_backbone(), 2, CostMeter(2, CPU))
    read(context, random_ids(2, 2), torch.ones(2, 2))

    def refused(*_):
        raise AssertionError("the host asked the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(Tensor, name, refused)
    part = context.keep_rows(torch.tensor([1, 0]))
    part._pass = lambda embeds, *_, **__: embeds  # the model's own forward may ask
    part.peek(torch.zeros(2, 1, 32), torch.ones(2, 1))
    part.read(torch.zeros(2, 1, 32))
    part.read(torch.zeros(2, 3, 32), torch.ones(2, 3), counted_B=torch.ones(2, dtype=torch.bool))
    part.meter.count_logits(part.rows, torch.ones(2, dtype=torch.bool))


# Checkpointed passes


def run_three_passes(backbone, embeds: Tensor, checkpoint_passes: bool, padded: bool = False, all_states: bool = False):
    """Read a prefix, peek at a block fed back once, read the rest; return a loss over all of it."""
    mask = torch.tensor([[1] * 9, [0, 0, 0, *[1] * 6]]) if padded else torch.ones(2, 9, dtype=torch.long)
    context = Context(backbone, 2, checkpoint_passes=checkpoint_passes)
    first = context.read(embeds[:, :5], mask[:, :5])
    ahead = context.peek(embeds[:, 5:7], mask[:, 5:7], all_states=all_states)
    ahead = torch.stack(ahead[1:]).mean(0) if all_states else ahead
    second = context.read(embeds[:, 5:7] + 0.1 * ahead, mask[:, 5:7])
    third = context.read(embeds[:, 7:], mask[:, 7:])
    states = torch.cat([first, second, third], dim=1)
    return states, (third[:, -1].square().sum() + ahead[:, -1].square().sum())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("all_states", [False, True])
def test_checkpointed_passes_give_equal_states_and_gradients(arch, padded, all_states):
    backbone = tiny_backbone(arch)
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for checkpoint_passes in (False, True):
        backbone.zero_grad()
        inputs = embeds.clone().requires_grad_()
        states, loss = run_three_passes(backbone, inputs, checkpoint_passes, padded, all_states)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
        results.append((states.detach(), inputs.grad, gradients))
    (plain_states, plain_inputs, plain), (states, inputs, ours) = results
    assert torch.equal(states, plain_states)
    # The prefix enters the loss only through its keys and values, so this is the gradient of the past.
    assert plain_inputs[0, :5].abs().max() > 1e-2
    assert torch.equal(inputs, plain_inputs)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_checkpointed_passes_draw_the_same_dropout_when_recomputed():
    backbone = tiny_backbone("gpt2", embd_pdrop=0.3, attn_pdrop=0.3, resid_pdrop=0.3).train()
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpoint_passes in (False, True):
        inputs = embeds.clone().requires_grad_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            run_three_passes(backbone, inputs, checkpoint_passes)[1].backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)


def test_checkpointed_passes_keep_far_less_for_the_backward_pass(arch):
    backbone = tiny_backbone(arch)
    weights = {p.data_ptr() for p in backbone.parameters()}
    kept = []
    for checkpoint_passes in (False, True):
        saved: dict[int, int] = {}

        def remember(tensor, saved=saved):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        embeds = torch.randn(2, 9, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            run_three_passes(backbone, embeds, checkpoint_passes)
        kept.append(sum(saved.values()))
    assert kept[1] < kept[0] / 4


def test_checkpointing_does_nothing_where_no_gradient_is_wanted(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("checkpoint was called")

    monkeypatch.setattr("innerloop.passes.context.checkpoint", refused)
    backbone, ids = tiny_backbone(), random_ids(1, 4)
    assert torch.equal(read(Context(backbone, 1, checkpoint_passes=True), ids), read(Context(backbone, 1), ids))
