"""Requests one by one: whatever comes, goes and is cancelled, an answer is the one that `generate` gives alone."""

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop import InputError
from innerloop.engine import batching
from innerloop.engine.engine import Engine
from innerloop.engine.incremental import IncrementalEngine
from innerloop.engine.waiting import BATCHES_A_TURN
from innerloop.loop.hooks import LoopHook, hooked
from innerloop.methods import BlockDiffusion, Llada
from tests.models import tiny_model
from tests.test_engine_continuous import POOL, engine_of, made, quiet, told

CANVASES = {
    "llada": Llada(gen_length=8, sampler={"block_length": 4}),
    "blocks": BlockDiffusion(gen_length=8, block_length=4),
    "remasked": Llada(gen_length=8, sampler={"commit": "remdm", "steps": 8, "remask": {"cap": 0.3}, "block_length": 4}),
}
KINDS = ({}, {"temperature": 1.0, "seed": 3}, {"max_new_tokens": 2}, {"temperature": 0.5, "samples": 3},
         {"likelihoods": True, "temperature": 2.0})  # fmt: skip
DRAWN = ({}, {"seed": 3, "temperature": 1.0}, {"max_new_tokens": 2}, {"samples": 2, "temperature": 1.0})
LOOPING = ({"loops": 1}, {"loops": 0, "temperature": 1.0}, {"trace": True}, {"beams": 2})
STOPPING = ({"stop": {"rule": "fixed", "threshold": 2}}, {"stop": {"rule": "delta", "threshold": 0.1}})
SHORT = sorted(set(POOL), key=lambda question: (len(question.split()), question))[:3]
ASKED = {
    "cot": (*KINDS, {"beams": 2}),
    "slots": (*KINDS, *LOOPING, {"starts": 2}),
    "stops": (*KINDS, *LOOPING, *STOPPING),
    "looped": KINDS,
    "spiral": KINDS,
    **dict.fromkeys(CANVASES, DRAWN),
}


@cache
def model_of(name):
    return tiny_model(CANVASES[name], "llama").double().eval() if name in CANVASES else made(name)[0]


@cache
def alone(name, question, kind):
    """Return what `generate` answers to a question asked alone."""
    return [
        seen(one) for one in model_of(name).generate([POOL[question]], **({"max_new_tokens": 8} | ASKED[name][kind]))
    ]


def seen(one):
    """All that is told of an answer, but times; log-probabilities but for rounding."""
    shown = one.trace and [(entry.loop, entry.top_ids.tolist()) for entry in one.trace.iterations]
    return told(one), [round(p, 9) for p in one.log_probs], shown


def drained(engine, events=()):
    events = list(events)
    while engine.is_at_work:
        events += engine.step()
    return events


def answers(events):
    return {(one.id, one.sample): one.generation for one in events if one.generation is not None}


@pytest.mark.parametrize("name", ASKED)
@settings(max_examples=6, **quiet)
@given(data=st.data(), batch_size=st.integers(1, 5), check_every=st.sampled_from([None, 3]))
def test_an_answer_is_that_of_generate_whatever_comes_goes_and_is_cancelled(name, data, batch_size, check_every):
    options = st.tuples(st.integers(0, len(POOL) - 1), st.integers(0, len(ASKED[name]) - 1))
    acts = data.draw(st.lists(st.one_of(options, st.sampled_from(["step", "step", "cancel"])), max_size=20))
    engine, asked, events, gone = IncrementalEngine(model_of(name), batch_size=batch_size), {}, [], set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "CHECK_EVERY", check_every)
        for act in acts:
            if act == "step":
                events += engine.step()
            elif act == "cancel" and asked:
                gone.add(id := sorted(asked)[len(acts) % len(asked)])
                engine.cancel(id)
            elif act != "cancel":
                asked[engine.submit(POOL[act[0]], **({"max_new_tokens": 8} | ASKED[name][act[1]]))] = act
        events = drained(engine, events)
    found = answers(events)
    assert sum(one.generation is not None for one in events) == len(found)
    for id, act in asked.items():
        expected = alone(name, *act)
        own = [seen(found[id, s]) for s in range(len(expected)) if (id, s) in found]
        is_shared = len(expected) > 1 or [question for question, _ in asked.values()].count(act[0]) > 1
        if is_shared:  # what is read for several is billed to one of them
            own, expected = ([(texts[0], *rest) for texts, *rest in each] for each in (own, expected))
        assert own == expected or id in gone
    for (id, sample), one in found.items():
        ids = [i for event in events if (event.id, event.sample) == (id, sample) for i in event.ids]
        assert ids in (one.ids, [])  # beams and canvases tell no tokens
    assert not engine.owners and not engine.engines


def test_tokens_are_told_as_they_are_written_and_thoughts_before_them():
    engine = IncrementalEngine(model_of("slots"), trace=True, likelihoods=True, alternatives=2)
    engine.submit(POOL[0], max_new_tokens=4)
    events = drained(engine)
    assert [entry.loop for entry in events[0].thought.iterations] == [1, 2]
    assert [len(event.ids) for event in events[1:-1]] == [1] * len(events[-1].generation.ids)
    for event in events[1:-1]:
        (((best, likely), _),) = event.alternatives
        assert (best, likely) == (event.ids[0], event.log_probs[0])


def test_a_canvas_is_told_whole_and_what_is_final_stays():
    for name in CANVASES:
        engine = IncrementalEngine(model_of(name))
        engine.submit(POOL[0])
        *events, last = drained(engine)
        final = [event.canvas[: event.n_final] for event in events]
        assert len(events) == last.generation.cost.loops and len(final[-1]) > 0
        for before, after in pairwise(final):
            assert after[: len(before)] == before
        n = min(len(last.generation.ids), len(final[-1]))
        assert list(final[-1][:n]) == last.generation.ids[:n]


def test_a_cancelled_question_leaves_its_row_and_what_it_has_written():
    engine = IncrementalEngine(model_of("cot"), batch_size=2, max_new_tokens=8)
    first, second, third = (engine.submit(question) for question in SHORT)
    events = [event for _ in range(3) for event in engine.step()]
    (one,) = engine.cancel(first)
    assert one.ids == model_of("cot").generate(SHORT[:1], max_new_tokens=8)[0].ids[:3]
    assert one.cost.passes == 1 + 3 and engine.n_running == 1
    events += engine.step()
    assert engine.n_waiting == 0
    assert engine.cancel(first) == [] and {id for id, _ in answers(drained(engine, events))} == {second, third}


def test_what_cannot_be_answered_is_refused_at_once_and_leaves_nothing():
    engine = IncrementalEngine(model_of("stops"), max_positions=60, max_new_tokens=4)
    for question, options in ((" ", {}), ("1", {"max_new_tokens": 100}), ("1", {"stop": {"rule": "dlta"}}),
                              ("1", {"loops": -1}), ("1", {"tokens": 3}), ("1", {"samples": 2}),
                              ("1", {"stop": {"treshold": 1}}), ("1", {"alternatives": 2})):  # fmt: skip
        with pytest.raises(InputError):
            engine.submit(question, **options)
    engine.cancel(engine.submit("1"))
    assert not engine.is_at_work and not engine.owners


def test_a_failing_pass_fails_those_it_was_for_and_no_others(monkeypatch):
    engine = IncrementalEngine(model_of("slots"), max_new_tokens=4)
    ids = [engine.submit(question) for question in POOL[:2]]
    other = engine.submit(POOL[0], trace=True)
    broken = next(iter(engine.engines.values()))

    def fail():
        raise RuntimeError("a device is gone")

    monkeypatch.setattr(broken, "_advance", fail)
    found = answers(drained(engine))
    assert ["a device is gone" in (found[id, 0].error or "") for id in (*ids, other)] == [True, True, False]


def test_a_long_question_is_not_overtaken_for_ever():
    engine = IncrementalEngine(model_of("cot"), batch_size=1, max_new_tokens=1)
    engine.submit(POOL[1])
    engine.step()
    long = engine.submit(max(POOL, key=len))
    for _ in range(2 * BATCHES_A_TURN):
        engine.submit(POOL[0])
        if (long, 0) in answers(engine.step()):
            return
    pytest.fail("shorter questions that came later are always answered first")


def test_the_prompts_of_answered_questions_are_forgotten():
    engine = Engine(model_of("cot"))
    for question in POOL:
        engine.submit(question)
    prompts = engine.waiting.prompts
    assert len(prompts) == len(set(POOL))
    while engine.is_at_work:
        engine.step()
    assert len(prompts) == 0


def test_an_engine_that_answers_one_by_one_answers_no_batch_meanwhile():
    engine = engine_of(model_of("cot"))
    engine.submit(POOL[0])
    with pytest.raises(InputError, match="still answering"):
        next(engine.groups(POOL))
    engine.close()
    assert len(list(engine.run(POOL))) == len(POOL)


class Counting(LoopHook):
    """Counts the iterations that have begun."""

    n = 0

    def on_input(self, state, iteration, rows):
        self.n += 1
        return state


@pytest.mark.parametrize("kind", ["slots", "append"])
def test_iterations_are_told_as_they_run_and_answers_stay_the_same(kind):
    model, heard, ran = model_of(kind), [], Counting()
    expected = model.generate(SHORT, max_new_tokens=4, trace=True)
    engine = IncrementalEngine(model, max_new_tokens=4, trace=True)
    engine.on_loop = lambda event: heard.append((event.id, event.loop.iterations[0], ran.n))
    for question in SHORT:
        engine.submit(question)
    with hooked(model.loop, ran):
        events = drained(engine)
    answers = {event.id: event.generation for event in events if event.generation is not None}
    assert [answers[i].ids for i in sorted(answers)] == [one.ids for one in expected]
    for event in (event for event in events if event.thought is not None):
        own = [entry.top_probs.tolist() for id, entry, _ in heard if id == event.id]
        assert own == [entry.top_probs.tolist() for entry in event.thought.iterations] and len(own) > 1
    assert all(n == entry.loop for _, entry, n in heard)  # each before the next began
