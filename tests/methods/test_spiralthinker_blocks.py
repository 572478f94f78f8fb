"""SpiralThinker when it answers: blocks are opened by the rows themselves (spiralthinker.md, section 6; invariant 5).

The models are random; a bias on the head makes them write <bol>, <bot> and <eot> now and then, each row in its own way.
"""

import time
from itertools import pairwise

import pytest
import torch

from innerloop import Example
from innerloop.engine import decoding
from innerloop.methods import SpiralThinker
from innerloop.text.row import Kind, Row, Span
from tests.methods.spiralthinker_reference import SPIRAL, Spiral, student
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    by_arch,
    change,
    lean_towards,
    learn,
    same_weights,
)
from tests.models import chain_examples, tiny_model

N, K = SPIRAL.latents_per_block, SPIRAL.max_loops
LEANS = {
    "gpt2": {"<bol>": 1.0, "<eot>": 1.0, "<bot>": 1.0, "<eos>": 2.5},
    "llama": {"<bol>": 1.5, "<eot>": 1.0, "<bot>": 1.0},
}
STABLE = {"loop.time": "lookup", "loop.lora": "per_iter", "loop.lora_rank": 2, "loop.residual": "sum"}
by_pattern = pytest.mark.parametrize("pattern", ["odd", "even"])


def writer(arch="gpt2", method=SPIRAL, by=None):
    """Return a model that writes markers on its own account."""
    return lean_towards(student(arch, method, own=True), LEANS[arch] | (by or {}))


def n_opened(model, ids):
    """The number of blocks that were read because a row has written <bol>, not as the last token it may write."""
    return ids[:-1].count(model.encoder.marker("<bol>").ids[0])


def expected_cost(model, question, ids, k=K):
    """Passes, positions and loops by the card: a block is K + 1 passes, a token one; the last token is not read."""
    asked = len(model.encoder.question(question).ids)
    opened = n_opened(model, ids)
    passes, positions = len(ids) - 1 + opened * (k + 1), len(ids) - 1 + opened * ((k + 1) * N + 1)
    if model.method.begins_with_block:  # its <eol> is part of the region that the loop reads
        return passes + k + 2, positions + asked + 1 + (k + 1) * (N + 1), (opened + 1) * k
    return passes + 1, positions + asked, opened * k


def assert_alike(one, other):
    """Two answers to a question are the same, and cost the same."""
    assert one.ids == other.ids and one.text == other.text and one.answer == other.answer and one.ended == other.ended
    for name in ("passes", "positions", "loops", "thought_tokens"):
        assert getattr(one.cost, name) == getattr(other.cost, name), name
    assert one.cost.flops == pytest.approx(other.cost.flops)


def assert_answers_as_alone_and_as_the_twin(model, answers, n=14):
    """Batched == single rows == the slow twin, token for token; and the cost is the card's. Return the answers."""
    slow, together, marker = Spiral(model), answers(model, n=n), model.encoder.answer("").ids[0]
    for question, generation in zip(QUESTIONS, together):
        assert_alike(generation, answers(model, [question], n=n)[0])
        ids, n_blocks = slow.write(question, n)
        assert generation.ids == ids and len(ids) <= n
        assert n_blocks == n_opened(model, ids) + model.method.begins_with_block
        cost = generation.cost
        assert (cost.passes, cost.positions, cost.loops) == expected_cost(model, question, ids)
        before = ids.index(marker) if marker in ids else len(ids)
        assert cost.thought_tokens == n_blocks * N + before
    return together


# Rows of a batch open blocks when they like


@by_arch
@by_pattern
def test_rows_with_different_numbers_of_blocks_answer_as_alone(pattern, arch, answers):
    model = writer(arch, change(SPIRAL, pattern=pattern))
    together = assert_answers_as_alone_and_as_the_twin(model, answers)
    assert len({n_opened(model, generation.ids) for generation in together}) > 2


@by_arch
@pytest.mark.parametrize("n", [1, 2, 5, 9, 12])
def test_a_row_writes_no_more_than_it_may_and_pays_for_no_more(n, arch, answers):
    assert_answers_as_alone_and_as_the_twin(writer(arch), answers, n)


def test_the_pattern_without_blocks_opens_none(answers):
    model = lean_towards(student("gpt2", SpiralThinker(pattern="none"), own=True), {"<bot>": 1.0, "<eot>": 1.0})
    for question, generation in zip(QUESTIONS, answers(model)):
        assert generation.ids == Spiral(model).write(question, 14)[0] and generation.cost.loops == 0
        assert generation.cost.positions == len(model.encoder.question(question).ids) + len(generation.ids) - 1


def test_rows_wait_so_that_their_blocks_are_refined_together(answers):
    """There are fewer loops than blocks, and those that share one were opened at different tokens."""
    model, runs = writer("gpt2"), []
    model.loop.register_forward_hook(lambda module, args, result: runs.append(args[2]))
    generations = answers(model)
    shared = [n_loops for n_loops in runs[1:] if sum(n > 0 for n in n_loops) > 1]
    assert shared and len(runs) - 1 < sum(n_opened(model, generation.ids) for generation in generations)
    bol = model.encoder.marker("<bol>").ids[0]
    firsts = {generation.ids.index(bol) for generation in generations if n_opened(model, generation.ids)}
    assert len(firsts) > 1


# What blocks hold


def assert_shows(top_probs, top_ids, logits):
    """Read-outs of one row (1, N, k) are the likeliest tokens of logits (N, V)."""
    expected = logits.float().softmax(-1).topk(5)
    assert_close(top_probs[0], expected.values.float())
    assert (top_ids[0] == expected.indices).float().mean() > 0.9  # but for tokens that are as likely as each other


@by_arch
@by_pattern
def test_a_trace_holds_every_block_as_the_slow_twin_reads_it(pattern, arch, answers):
    """Rows of one batch open different numbers of blocks; each is recorded, and nothing else changes."""
    model = writer(arch, change(SPIRAL, pattern=pattern))
    slow, traced = Spiral(model), answers(model, trace=True)
    assert len({len(generation.trace.opened) for generation in traced}) > 2
    for question, plain, generation in zip(QUESTIONS, answers(model), traced):
        assert_alike(plain, generation)
        slow.write(question, 14)
        first = [generation.trace] if pattern == "odd" else []
        blocks = [*first, *generation.trace.opened]
        assert len(blocks) == len(slow.read_blocks) and (first or not generation.trace.iterations)
        for block, (updates, last) in zip(blocks, slow.read_blocks):
            assert [entry.loop for entry in block.iterations] == list(range(1, K + 1))
            for entry, (logits, new, old) in zip(block.iterations, updates):
                assert_shows(entry.top_probs[:, :N], entry.top_ids[:, :N], logits)
                assert_close(entry.delta[0], ((new - old).norm() / new.norm()).float(), ROUNDED)
                assert_close(entry.changes[0, :N], ((new - old).norm(dim=1) / new.norm(dim=1)).float(), ROUNDED)
            assert_shows(block.last.top_probs, block.last.top_ids, last)


def forced(model, question, ids):
    """Lay out what was written as a training row."""
    encoder, row = model.encoder, model.method.prompt(question, model.encoder, 0)
    head, text, bol = row, [], encoder.marker("<bol>").ids[0]
    latents, end = encoder.marker("<lat>", N), encoder.marker("<eol>")
    for place, token in enumerate(ids):
        text.append(token)
        if token == bol and place < len(ids) - 1:
            span = Span(tuple(text), Kind.STEP, supervised=True)
            if model.method.block_schedule == "sequential":
                row.suffix.append(span)
                row.next = row = Row([], [latents, end], n_loops=K)
            else:
                row.region += [span, latents, end]
                row.n_loops = K
            text = []
    row.suffix.append(Span(tuple(text), Kind.ANSWER, supervised=True))
    return head


@by_arch
@pytest.mark.parametrize("schedule", ["sequential", "parallel"])
@pytest.mark.parametrize("fields", [{}, STABLE], ids=["plain", "stabilised"])
def test_5_what_was_written_has_the_same_logits_and_latents_when_it_is_forced(
    fields, schedule, arch, answers, monkeypatch
):
    """Sequential training is answering; in parallel that is so up to the second block."""
    model = writer(arch, change(SPIRAL, block_schedule=schedule, max_blocks=99, **fields))
    choose, seen, fed = decoding.choose, [], []
    note = lambda logits, *rest: (seen.append(logits.clone()), choose(logits, *rest))[1]  # noqa: E731
    monkeypatch.setattr(decoding, "choose", note)
    model.loop.register_forward_hook(lambda module, args, result: fed.append(result.state[:, :N]))
    n_with_more = 0
    for question in QUESTIONS:
        seen.clear(), fed.clear()
        ids = answers(model, [question])[0].ids
        written, latents = torch.cat(seen[: len(ids)]), list(fed)
        fed.clear()
        (logits,) = model.row_logits([forced(model, question, ids)])
        second = ids.index(model.encoder.marker("<bol>").ids[0]) + 1 if n_opened(model, ids) else len(ids)
        assert_close(logits[:second], written[:second], ROUNDED)
        assert_close(fed[0], latents[0], ROUNDED)
        if schedule == "sequential":
            assert len(fed) == n_opened(model, ids) + 1
            assert_close([logits, *fed], [written, *latents], ROUNDED)
        elif n_opened(model, ids):
            n_with_more += 1
            assert (logits[second:] - written[second:]).abs().max() > 1e-3
    assert schedule == "sequential" or n_with_more > 1


@by_arch
def test_5_one_block_is_the_same_in_both_schedules(arch, answers):
    model = writer(arch, change(SPIRAL, max_blocks=1))
    twin = same_weights(model, change(model.method, block_schedule="sequential"))
    for one, other in zip(answers(model), answers(twin)):
        assert_alike(one, other)
    examples = [Example(e.question, e.steps[:2], e.answer) for e in MIXED]
    assert_close(model.answer_logits(examples), twin.answer_logits(examples))


# Which blocks are opened


@by_arch
@by_pattern
@pytest.mark.parametrize("most", [1, 2])
def test_no_more_blocks_than_max_blocks(most, pattern, arch, answers):
    model = writer(arch, change(SPIRAL, pattern=pattern, max_blocks=most), {"<bol>": 5.0})
    bol = model.encoder.marker("<bol>").ids[0]
    generations = assert_answers_as_alone_and_as_the_twin(model, answers)
    assert max(generation.ids.count(bol) + (pattern == "odd") for generation in generations) == most


@by_arch
@by_pattern
def test_a_block_after_every_step_of_text_if_so_wished(pattern, arch, answers):
    """All but where the answer begins; a model that would never do so by itself."""
    method = change(SPIRAL, pattern=pattern, force_block_after_text=True, max_blocks=3)
    model = writer(arch, method, {"<bol>": -9.0, "<eot>": 4.0, "<eos>": 0.0, "###": 2.5})
    encoder, followed = model.encoder, []
    bol, eot, marker = encoder.marker("<bol>").ids[0], encoder.marker("<eot>").ids[0], encoder.answer("").ids[0]
    for generation in assert_answers_as_alone_and_as_the_twin(model, answers):
        n_blocks = int(pattern == "odd")
        for token, following in pairwise(generation.ids):
            n_blocks += token == bol
            if token == eot and n_blocks < 3:
                assert following in (bol, marker)
                followed.append(following)
    assert set(followed) == {bol, marker}
    free = same_weights(model, change(method, force_block_after_text=False))
    assert all(bol not in generation.ids for generation in answers(free))


@pytest.mark.parametrize("force", [False, True])
def test_draws_go_on_where_no_block_may_be_opened(force, answers):
    """At a temperature the tokens in place of <bol> are drawn like all others."""
    method = change(SPIRAL, max_blocks=1, force_block_after_text=force)
    model = writer("gpt2", method, {"<bol>": 60.0})
    drawn = [g.ids for g in answers(model, QUESTIONS[:1] * 12, n=6, temperature=4.0)]
    assert len(set(map(tuple, drawn))) > 6
    assert all(model.encoder.marker("<bol>").ids[0] not in ids for ids in drawn)


# Budgets


@pytest.mark.parametrize("room", [22, 24, 27, 31])
@by_pattern
def test_blocks_take_from_the_room_of_the_context(pattern, room, answers):
    """Latents and <eol> have positions too: what is written and what is thought fit together."""
    model = tiny_model(change(SPIRAL, pattern=pattern), "gpt2", num_hidden_layers=2, max_position_embeddings=room)
    lean_towards(model, {"<bol>": 3.0})
    generations = answers(model, n=64)
    sizes = []
    for question, generation in zip(QUESTIONS, generations):
        n_blocks = n_opened(model, generation.ids) + (pattern == "odd")
        asked = len(model.encoder.question(question).ids)
        sizes.append(asked + (pattern == "odd") + len(generation.ids) + n_blocks * (N + 1))
        assert_alike(generation, answers(model, [question], n=64)[0])
    assert max(sizes) == room
    assert any(n_opened(model, generation.ids) for generation in generations)


# Loops


@pytest.mark.parametrize("stop", ["delta", "cos", "kl"])
def test_rows_stop_early_inside_their_blocks_as_alone(stop, answers):
    method = change(SPIRAL, max_loops=5, stop={"rule": stop, "threshold": 0.5 if stop == "delta" else 1.0})
    model, runs = writer("gpt2", method), []
    model.loop.register_forward_hook(lambda module, args, result: runs.append(result.n_loops))
    generations = answers(model)
    later = {n for n_loops in runs[1:] for n in n_loops if n}
    assert len(later) > 1  # blocks that were opened while answering stop at different times
    for question, generation in zip(QUESTIONS, generations):
        assert_alike(generation, answers(model, [question])[0])
    never = same_weights(model, change(method, stop={"threshold": torch.inf}))
    once = same_weights(model, change(method, stop={"threshold": -torch.inf}))
    for generation in answers(never):
        assert generation.cost.loops == 5 * (n_opened(model, generation.ids) + 1)
    for generation in answers(once):
        assert generation.cost.loops == n_opened(model, generation.ids) + 1


@pytest.mark.parametrize("loops", [0, 1, 5])
def test_another_number_of_loops_is_that_of_every_block(loops, answers):
    model = writer("gpt2", change(SPIRAL, hid={"weight": 1.0, "teacher": "-"}))
    twin = same_weights(model, change(SPIRAL, max_loops=loops))
    generations = answers(model, loops=loops)
    for question, one, other in zip(QUESTIONS, generations, answers(twin)):
        assert_alike(one, other)
        cost = one.cost.passes, one.cost.positions, one.cost.loops
        assert loops == 0 or cost == expected_cost(model, question, one.ids, loops)  # 0: the prompt is one pass
    assert any(n_opened(model, generation.ids) for generation in generations)


def test_the_time_of_blocks_counts_once(answers, monkeypatch):
    model = writer("gpt2")
    forward = model.loop.forward

    def slowly(*args, **options):
        time.sleep(0.05)
        return forward(*args, **options)

    monkeypatch.setattr(model.loop, "forward", slowly)
    start = time.perf_counter()
    generations = answers(model)
    took = time.perf_counter() - start
    spent = sum(sum(generation.cost.seconds.values()) for generation in generations)
    assert 0.5 * took < spent <= took


# Learning


@pytest.mark.slow
def test_blocks_and_text_are_learned_by_heart(answers):
    """Examples of 1 to 4 steps: all answered, with a block for every other step, opened by the model itself."""
    examples = [Example(e.question, e.steps[: 1 + i % 4], e.answer) for i, e in enumerate(chain_examples(8, 4))]
    method = change(SPIRAL, block_schedule="sequential")
    model = tiny_model(method, "gpt2", num_hidden_layers=2, initializer_range=0.1)
    assert learn(model, examples) < 0.05
    generations = answers(model, [example.question for example in examples], n=60)
    assert [generation.answer for generation in generations] == [example.answer for example in examples]
    for example, generation in zip(examples, generations):
        assert n_opened(model, generation.ids) + 1 == (len(example.steps) + 1) // 2
        written = [*example.steps[1::2], f"### {example.answer}"]
        assert [line.strip() for line in generation.text.splitlines()] == written
