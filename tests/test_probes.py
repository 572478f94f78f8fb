"""Probes and swaps: a model that stores the answer in one latent is found by both; one that stores none is not."""

import dataclasses
import json
import sys

import pytest

from innerloop.decoder.cost import Cost
from innerloop.errors import InputError
from innerloop.measure.accuracy import Prediction
from innerloop.measure.probes import best, probes, result_of_step, sentences
from innerloop.measure.subject import Subject
from innerloop.measure.swap import by_chance, evenly, swaps
from innerloop.measure.swap import sentences as swap_sentences
from innerloop.methods import Cot, Lotus, Method, Pause, Slr
from innerloop.text.codec import to_json
from innerloop.text.examples import Example
from tests.built import LATENTS, QUESTION, ROOM, TASK, THIRD, built, digit_examples
from tests.fields import change
from tests.test_controls import METHODS, PLAIN, REFEED

FOUR = Slr(n_slots=4, distinct_slots=True, max_loops=2, loop=PLAIN | {"residual": "sum"})


def test_the_answer_is_found_in_the_fourth_latent_by_a_probe():
    model, examples = built(FOUR, THIRD, n=90)
    found = probes(Subject(model, TASK, examples[50:]), examples[:50])
    assert {probe.step for probe in found} == {1, "answer"} and len(found) == 2 * 3 * 4
    assert {probe.loop for probe in found if probe.answer_pass} == {3}
    for probe in found:
        assert probe.n == 40 and probe.commonest == 0.1 and probe.control <= 0.3
        if probe.latent == 4:
            assert probe.accuracy == 1.0 and probe.selectivity >= 0.7
        else:
            assert probe.accuracy <= 0.3
    assert [(probe.step, probe.latent) for probe in best(found)] == [(1, 4), ("answer", 4)]
    assert "The answer can be read best off latent 4 after loop 1: 100%" in sentences(found)[1]


def test_the_answer_follows_the_fourth_latent_alone():
    model, examples = built(FOUR, THIRD)
    found = {(swap.latents, swap.loop): swap for swap in swaps(Subject(model, TASK, examples))}
    assert set(found) == {("all", None), (1, None), (2, None), (3, None), (4, None), ("all", 1)}
    for key in (("all", None), (4, None)):
        assert found[key].follows == 1.0 and found[key].keeps == 0.0 and found[key].ci95[0] > 0.85
        assert 0.05 < found[key].by_chance < 0.2  # ten answers
    for latent in (1, 2, 3):
        assert found[latent, None].follows == 0.0 and found[latent, None].keeps == 1.0
        assert found[latent, None].by_chance == 0.0
    said = swap_sentences(list(found.values()))
    assert "100% of the answers become that example's" in said[0] and "latent 4 is followed most: 100%" in said[1]


def test_what_would_be_followed_by_chance_is_told():
    def pair(now: str, own: str, donor: str) -> tuple[Prediction, Prediction, Prediction]:
        first, second, third = (Prediction("", "", x, x, x, True, Cost()) for x in (now, own, donor))
        return first, second, third

    two = [pair("b", "a", "b"), pair("a", "a", "b"), pair("a", "b", "a"), pair("b", "b", "a")]
    assert by_chance(two) == 0.5  # whoever does not stay must follow
    # donors' answers: b, c, a. The first row would get b or c, the second a or c, the third b or a.
    three = [pair("b", "a", "b"), pair("b", "b", "c"), pair("d", "c", "a")]
    assert by_chance(three) == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert by_chance([]) == 0.0


def test_a_swap_in_the_middle_of_the_loop_is_undone_where_the_question_is_read_again():
    again, examples = built(Slr(n_slots=2, max_loops=3, loop=PLAIN | {"residual": "sum"}), LATENTS)
    by_loop = {swap.loop: swap.follows for swap in swaps(Subject(again, TASK, examples)) if swap.latents == "all"}
    assert set(by_loop) == {None, 1, 2} and by_loop[None] == 1.0 and by_loop[1] < 1.0


@pytest.mark.parametrize("name", ["slots, kv_last", "append", "codi", "lotus", "pccot", "spiralthinker"])
def test_latents_that_are_followed_are_found_whatever_the_method(name: str):
    model, examples = built(METHODS[name], LATENTS, n=30)
    found = swaps(Subject(model, TASK, examples))
    assert found[0].latents == "all" and found[0].follows == 1.0
    json.dumps(to_json(found), allow_nan=False)
    model, examples = built(METHODS[name], QUESTION, n=30)
    assert all(swap.keeps == 1.0 for swap in swaps(Subject(model, TASK, examples)))


def test_latents_are_probed_where_they_are_written_and_in_the_pass_that_the_answer_sees():
    model, examples = built(METHODS["codi"], LATENTS, n=60)
    found = probes(Subject(model, TASK, examples[40:]), examples[:40])
    assert {(probe.loop, probe.latent) for probe in found} == {(0, 1), (1, 2), (2, 3), (3, 3)}
    assert best(found)[0].accuracy == 1.0
    model, examples = built(Pause(n_pauses=2), ROOM, n=60)
    found = probes(Subject(model, TASK, examples[40:]), examples[:40])
    by_loop = {probe.loop: probe for probe in found if probe.step == "answer"}
    assert by_loop[0].accuracy <= 0.2 and by_loop[1].accuracy == 1.0 and by_loop[1].answer_pass
    assert "in the answer's pass: 100%" in sentences(found)[1]


def test_nothing_can_be_read_off_latents_that_hold_nothing():
    model, examples = built(Lotus(n_blocks=1, latents_per_block=2), QUESTION, n=60)
    for part in model.backbone.layers:  # not even what the question says
        part.attn.c_proj.weight.data.zero_()
    found = probes(Subject(model, TASK, examples[40:]), examples[:40])
    assert max(probe.accuracy for probe in found) <= 0.3
    assert all("cannot be read off any latent" in sentence for sentence in sentences(found))


def test_the_same_seed_gives_the_same_report():
    model, examples = built(FOUR, THIRD, n=50)
    first, second = (
        probes(Subject(model, TASK, examples[30:], batch_size=size, seed=2), examples[:30]) for size in (30, 11)
    )
    assert [dataclasses.astuple(p) for p in first] == [dataclasses.astuple(p) for p in second]
    assert swaps(Subject(model, TASK, examples, seed=2)) == swaps(Subject(model, TASK, examples, seed=2, batch_size=7))


def test_progress_is_told():
    model, examples = built(change(REFEED, max_loops=1), LATENTS, n=24)
    planned, done = [], []
    probes(Subject(model, TASK, examples[12:], planned=planned.append, progress=done.append), examples[:12])
    assert planned == [sum(done)] == [8]
    swaps(Subject(model, TASK, examples, planned=planned.append, progress=done.append))
    assert sum(planned) == sum(done)


@pytest.mark.parametrize("method", [Cot(), Pause(placement="prepend")])
def test_what_has_no_latents_is_refused(method: Method):
    model, examples = built(method, QUESTION, n=24)
    with pytest.raises(InputError, match="no latents to swap"):
        swaps(Subject(model, TASK, examples))
    with pytest.raises(InputError, match="no latents to probe"):
        probes(Subject(model, TASK, examples[12:]), examples[:12])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    model, examples = built(FOUR, THIRD, n=12)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'innerloop\[fit\]'"):
        probes(Subject(model, TASK, examples), examples)


def test_results_of_steps():
    steps = {"3 + 4 = 2": "2", "<<5*3=15>>": "15", "Alex is a rompus.": "rompus", "x = y = 7 ": "7", "": "", "...": ""}
    assert {step: result_of_step(step) for step in steps} == steps


def test_examples_without_a_step_are_left_out_of_its_probe():
    model, _ = built(FOUR, THIRD)
    examples = digit_examples(90)
    mixed = [Example(e.question, e.steps if i % 2 else (), e.answer, e.id) for i, e in enumerate(examples)]
    n = {probe.step: probe.n for probe in probes(Subject(model, TASK, mixed[50:]), mixed[:50])}
    assert n == {1: 20, "answer": 40}
    with pytest.raises(InputError, match="10 examples with steps to learn from"):
        probes(Subject(model, TASK, examples[5:12]), examples[:5])


def test_many_latents_are_thinned_evenly():
    assert evenly(3) == [1, 2, 3] and evenly(150)[0] == 1 and evenly(150)[-1] == 150 and len(evenly(150)) == 16
