"""What the latents of LOTUS show: an answer's trace and `measure.readout` against brute force (lotus.md, 6 and 7)."""

import dataclasses
import math

import pytest
import torch

from innerloop import InputError
from innerloop.layout import ANSWER_PASS
from innerloop.measure.readout import Shown, shown_steps, summary
from innerloop.methods import Lotus
from tests.methods.reference_lotus import LotusReference
from tests.methods.tools import MIXED, QUESTIONS, by_arch, change, choices, on

BASE = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.5)
N = 12


def last_logits(slow, question):
    """The logits (1 + N, V) of <bot> and the latents in the pass that the answer sees."""
    run = slow.run(question, 3)
    return slow.read(torch.cat([run.prefix, run.last]))[1][-N - 1 :]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"last_pass": "refeed"},
        {"max_loops": 0},
        {"feedback_site": "pre_norm"},
        {"inject": "replace", "shift": True},
    ],
    ids=str,
)
@by_arch
@torch.no_grad()
def test_a_traced_answer_tells_what_bot_and_the_latents_show_in_the_pass_it_sees(arch, fields):
    model = on(arch, change(BASE, **fields))
    slow = LotusReference(model)
    for batch_size in (6, 1):
        generations = model.generate(QUESTIONS, max_new_tokens=2, trace=True, batch_size=batch_size)
        for question, generation in zip(QUESTIONS, generations):
            expected = last_logits(slow, question).softmax(-1).topk(5)
            torch.testing.assert_close(generation.trace.last.top_ids[0], expected.indices)
            torch.testing.assert_close(generation.trace.last.top_probs[0], expected.values.float(), atol=1e-5, rtol=0)


@by_arch
@torch.no_grad()
def test_a_traced_answer_tells_what_the_latents_show_in_every_iteration(arch):
    model = on(arch, BASE)
    for question, generation in zip(QUESTIONS, model.generate(QUESTIONS, max_new_tokens=2, trace=True)):
        run = LotusReference(model).run(question, 3)
        assert len(generation.trace.iterations) == 3
        for entry, logits in zip(generation.trace.iterations, run.logits):
            assert entry.top_ids[0].tolist() == logits[1:].topk(5).indices.tolist()


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


def key(shown):
    return shown.loop, shown.position, shown.gold


@choices(supervision=["post", "per_iter"], last_pass=["kv", "refeed"], overflow=["truncate", "spill"])
@pytest.mark.parametrize("offset", [-1, 0])
@torch.no_grad()
def test_shown_steps_are_those_of_brute_force(settings, offset):
    model = on("gpt2", change(BASE, readout_offset=offset, **settings))
    slow = LotusReference(model)
    for batch_size in (6, 4):
        rows = shown_steps(model, MIXED, top_k=3, batch_size=batch_size)
        for number, (example, row) in enumerate(zip(MIXED, rows)):
            expected = brute_force(slow, model, example, number)
            assert [dataclasses.replace(one, nll=0, alternatives=()) for one in sorted(row, key=key)] == [
                dataclasses.replace(one, nll=0, alternatives=()) for one in expected
            ]
            for one, other in zip(sorted(row, key=key), expected):
                assert one.nll == pytest.approx(other.nll, abs=1e-5)
                for (word, p), (right, q) in zip(one.alternatives, other.alternatives, strict=True):
                    assert word == right and p == pytest.approx(q, abs=1e-6)


def test_the_summary_counts_ranks_and_its_loss_is_l_step():
    model = on("gpt2", BASE)
    rows = shown_steps(model, MIXED)
    ranks = [one.rank for row in rows for one in row]
    told = summary(rows)
    assert told["n"] == len(ranks) > 10
    assert told["nll"] == pytest.approx(model.loss(MIXED).terms["step"].item(), abs=1e-5)
    assert told["top1"] == ranks.count(0) / len(ranks)
    assert told["top5"] == sum(rank < 5 for rank in ranks) / len(ranks)
    assert summary([[], []]) == {"n": 0, "nll": 0.0, "top1": 0.0, "top5": 0.0}


def test_showing_steps_leaves_the_model_as_it_was():
    model = on("gpt2", BASE).train()
    shown_steps(model, MIXED[:1])
    assert model.training
    model.eval()


def test_a_model_that_shows_no_steps_is_refused():
    with pytest.raises(InputError, match="step_weight"):
        shown_steps(on("gpt2", change(BASE, step_weight=0.0)), MIXED)
