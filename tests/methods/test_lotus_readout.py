"""What the latents of LOTUS show: an answer's trace and `measure.readout` against brute force (lotus.md, 6 and 7)."""

import dataclasses
import math
from operator import attrgetter

import pytest
import torch

from innerloop import InputError, Slr
from innerloop.measure.readout import Shown, shown_steps, summary
from innerloop.methods import Lotus
from innerloop.text.row import ANSWER_PASS
from tests.close import assert_close
from tests.methods.reference_lotus import LotusReference
from tests.methods.tools import MIXED, QUESTIONS, by_arch, change, choices, halting, learn, on
from tests.models import chain_examples, tiny_model

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)
N = 12
key = attrgetter("loop", "position", "gold")


def last_logits(slow, question):
    """The logits (1 + N, V) of <bot> and the latents in the pass that the answer sees."""
    run = slow.run(question, 3)
    return slow.read(torch.cat([run.prefix, run.last]))[1][-N - 1 :]


BLOCKS = {"supervision": ["post", "per_iter"], "last_pass": ["kv", "refeed"], "overflow": ["truncate", "spill"]}
LOOPS = [
    {"last_pass": "refeed"},
    {"max_loops": 0},
    {"loop.site": "pre_norm"},
    {"loop.residual": "none", "loop.shift": True},
]


@pytest.mark.parametrize("fields", [{}, *LOOPS], ids=str)
@by_arch
@torch.no_grad()
def test_a_traced_answer_tells_what_bot_and_the_latents_show_in_every_iteration_and_the_pass_it_sees(arch, fields):
    model = on(arch, change(BASE, **fields))
    slow = LotusReference(model)
    for batch_size in (6, 1):
        generations = model.generate(QUESTIONS, max_new_tokens=2, trace=True, batch_size=batch_size)
        for question, generation in zip(QUESTIONS, generations):
            expected = last_logits(slow, question).softmax(-1).topk(5)
            assert_close(generation.trace.last.top_ids[0], expected.indices)
            assert_close(generation.trace.last.top_probs[0], expected.values.float())
            run, iterations = slow.run(question, 3), generation.trace.iterations
            assert len(iterations) == model.method.n_loops(3)
            for entry, logits in zip(iterations, run.logits):
                assert entry.top_ids[0].tolist() == logits[1:].topk(5).indices.tolist()


@choices(readout_offset=[-1, 0], **BLOCKS)
@torch.no_grad()
def test_a_traced_answer_tells_each_blocks_step_its_alternatives_and_the_ranks_of_gold_tokens(settings):
    """Block i shows its step in h^(R), or in h^(i); what is beyond c tokens of a step, or m steps, is unknown."""
    model = on("gpt2", change(BASE, **settings))
    slow, name, c = LotusReference(model), model.tokenizer.convert_ids_to_tokens, 4
    steps = [example.steps for example in MIXED]
    for batch_size in (6, 1):
        told = model.generate(QUESTIONS, max_new_tokens=2, trace=True, steps=steps, batch_size=batch_size)
        for example, generation in zip(MIXED, told):
            run = slow.run(example.question, 3)
            assert len(generation.blocks) == 3
            for i, block in enumerate(generation.blocks):
                t = 3 if settings["supervision"] == "post" else i + 1
                logits = run.logits[t][1 + i * c + settings["readout_offset"] :][:c]
                best = logits.topk(5).indices
                lines = model.tokenizer.decode(best[:, 0]).splitlines()
                assert block.text == (lines[0] if "".join(lines).strip() else "")
                gold = slow.steps(example)[i][:c] if i < len(example.steps) else []
                gold += [None] * (c - len(gold))
                assert block.ranks == tuple(
                    None if token is None else int((row > row[token]).sum()) for row, token in zip(logits, gold)
                )
                for words, ids, p in zip(block.alternatives, best, logits.softmax(-1), strict=True):
                    assert [word for word, _ in words] == name(ids.tolist())
                    assert [q for _, q in words] == pytest.approx(p[ids].tolist(), rel=1e-5)


@pytest.mark.slow
def test_a_block_shows_its_step_after_training():
    model = tiny_model(Lotus(n_blocks=2, latents_per_block=6, step_weight=1.0), "gpt2", num_hidden_layers=2)
    examples = chain_examples(6, 2)
    learn(model, examples, 150)
    questions, steps = [example.question for example in examples], [example.steps for example in examples]
    for example, generation in zip(examples, model.generate(questions, trace=True, steps=steps)):
        assert tuple(block.text for block in generation.blocks) == example.steps
        assert all(rank in (0, None) for block in generation.blocks for rank in block.ranks)
        assert any(rank == 0 for block in generation.blocks for rank in block.ranks)


def test_without_gold_steps_or_another_method_nothing_is_claimed():
    model = on("gpt2", BASE)
    (one,) = model.generate(QUESTIONS[:1], max_new_tokens=1, trace=True)
    assert len(one.blocks) == 3 and all(rank is None for block in one.blocks for rank in block.ranks)
    assert model.generate(QUESTIONS[:1], max_new_tokens=1)[0].blocks == ()
    other = on("gpt2", Slr()).generate(QUESTIONS[:1], max_new_tokens=1, trace=True, steps=[("2",)])[0]
    assert other.blocks == () and other.trace.iterations
    with pytest.raises(InputError, match="steps: of 1 questions, but 2 are asked"):
        model.generate(QUESTIONS[:2], steps=[()])


def test_rows_that_stop_early_show_their_blocks_as_alone():
    model = halting("gpt2", change(BASE, stop={"rule": "delta"}, loops_per_block=2))
    steps = [example.steps for example in MIXED]
    together = model.generate(QUESTIONS, max_new_tokens=1, trace=True, steps=steps)
    assert len({generation.cost.loops for generation in together}) > 1
    for question, gold, one in zip(QUESTIONS, steps, together):
        alone = model.generate([question], max_new_tokens=1, trace=True, steps=[gold])[0]
        assert [(block.text, block.ranks) for block in one.blocks] == [(b.text, b.ranks) for b in alone.blocks]


def brute_force(slow, model, example, number):
    """Every token that a latent must show, read from uncached passes: its rank, loss and likelier alternatives."""
    run, name = slow.run(example.question, 3), model.tokenizer.convert_ids_to_tokens
    n_loops = slow.rounds(3) + (slow.method.last_pass == "refeed")
    found = []
    for t, place, token in slow.shown(example, 3):
        p = run.logits[t][place].softmax(-1).tolist()
        order = sorted(range(len(p)), key=lambda i: -p[i])
        best = tuple((name(i), p[i]) for i in order[:3])
        loop = ANSWER_PASS if t + 1 > n_loops else t + 1
        found.append(Shown(number, loop, place - 1, name(token), order.index(token), -math.log(p[token]), best))
    return sorted(found, key=key)


@choices(readout_offset=[-1, 0], **BLOCKS)
@torch.no_grad()
def test_shown_steps_are_those_of_brute_force(settings):
    model = on("gpt2", change(BASE, **settings))
    slow = LotusReference(model)
    for batch_size in (6, 4):
        rows = shown_steps(model, MIXED, top_k=3, batch_size=batch_size)
        for number, (example, row) in enumerate(zip(MIXED, rows)):
            expected = brute_force(slow, model, example, number)
            for one, other in zip(sorted(row, key=key), expected, strict=True):
                assert dataclasses.replace(one, nll=other.nll, alternatives=other.alternatives) == other
                assert one.nll == pytest.approx(other.nll, rel=1e-5)
                for (word, p), (right, q) in zip(one.alternatives, other.alternatives, strict=True):
                    assert word == right and p == pytest.approx(q, rel=1e-5)


def test_the_summary_counts_ranks_and_its_loss_is_l_step():
    model = on("gpt2", BASE)
    rows = shown_steps(model, MIXED)
    ranks = [one.rank for row in rows for one in row]
    told = summary(rows)
    assert told["n"] == len(ranks) > 10
    assert told["nll"] == pytest.approx(model.loss(MIXED).terms["step"].item(), rel=1e-5)
    assert told["top1"] == ranks.count(0) / len(ranks)
    assert told["top5"] == sum(rank < 5 for rank in ranks) / len(ranks)
    assert summary([[], []]) == {"n": 0, "nll": 0.0, "top1": 0.0, "top5": 0.0}


def test_showing_steps_leaves_the_model_as_it_was_and_needs_one_that_shows_some():
    model = on("gpt2", BASE).train()
    shown_steps(model, MIXED[:1])
    assert model.training
    model.eval()
    with pytest.raises(InputError, match="step_weight"):
        shown_steps(on("gpt2", change(BASE, step_weight=0.0)), MIXED)
