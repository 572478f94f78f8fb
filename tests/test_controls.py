"""Controls: models of hand-set weights that use their latents, or do not, are recognised, whatever the method."""

import dataclasses
import json
import random
from collections import Counter

import pytest
import torch

from innerloop.decoder.cost import Cost
from innerloop.errors import InputError
from innerloop.loop.hooks import hooked
from innerloop.measure.accuracy import Prediction, evaluate
from innerloop.measure.control_verdict import Controls, Effect
from innerloop.measure.controls import controls, effect_of, following
from innerloop.measure.latents import Recorder, Replacement
from innerloop.measure.statistics import verdict
from innerloop.measure.subject import Subject
from innerloop.measure.swap import swaps
from innerloop.methods import (
    Coconut,
    Codi,
    Cot,
    Lotus,
    Method,
    NoCot,
    Pause,
    Pccot,
    SimCot,
    SimCotCodi,
    Slr,
    SpiralThinker,
)
from tests.built import LATENTS, LOUD, QUESTION, ROOM, TASK, THIRD, built
from tests.close import assert_close
from tests.fields import change

PLAIN = {"residual": "none", "rescale": "none", "time": "none"}
REFEED = Slr(n_slots=2, max_loops=2, loop=PLAIN)
APPEND = Slr(loop_scope="append", max_loops=2, h0="forward", loop=PLAIN)
ALONE = {"hid": {"weight": 0.0, "teacher": None}, "teacher_weight": 0.0, "loop": {"rescale": "none"}}
TOKEN = {"time": "lookup", "time_inject": "token"}
SPIRAL = SpiralThinker(
    pattern="all", latents_per_block=2, max_loops=2, hid={"weight": 0.0, "teacher": None}, loop={"rescale": "none"}
)
METHODS: dict[str, Method] = {
    "slots, refeed": REFEED,
    "slots, kv_last": change(REFEED, answer_from="kv_last"),
    "slots, a pass first": change(REFEED, max_loops=1, h0="forward"),
    "slots, a token for the time": change(REFEED, answer_from="kv_last", loop=TOKEN),
    "residual and rms": Slr(n_slots=2, max_loops=2),
    "last": change(REFEED, loop_scope="last"),
    "append": APPEND,
    "append, kv_last": change(APPEND, answer_from="kv_last"),
    "coconut": Coconut(curriculum={"max_stage": 2}, latents_per_step=1),
    "simcot": SimCot(curriculum={"max_stage": 2}, latents_per_step=1),
    "codi": Codi(n_latents_total=3, **ALONE),
    "simcot_codi": SimCotCodi(n_latents_total=3, **ALONE),
    "lotus": Lotus(n_blocks=2, latents_per_block=2),
    "lotus, refeed": Lotus(n_blocks=1, latents_per_block=2, last_pass="refeed"),
    "pccot": Pccot(n_slots=3, max_loops=2, **ALONE),
    "spiralthinker": SPIRAL,
    "stops by itself": change(REFEED, stop={"rule": "delta", "threshold": -0.5}),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SOME = ("slots, refeed", "slots, kv_last", "coconut", "lotus", "pccot", "spiralthinker")
some_methods = pytest.mark.parametrize("method", [METHODS[name] for name in SOME], ids=SOME)


@pytest.mark.parametrize("method", [REFEED, METHODS["spiralthinker"]])
def test_a_question_that_is_too_long_is_left_out(method: Method):
    model, examples = built(method, LATENTS, n=6)
    room = max(len(row) for row in model.prompts([example.question for example in examples])) + 24
    model.backbone.config.max_position_embeddings = room
    long = dataclasses.replace(examples[0], id="long", question=" ".join([examples[0].question] * room))
    found, plain = (controls(Subject(model, TASK, asked)).as_dict() for asked in ([long, *examples], examples))
    assert found == plain
    assert swaps(Subject(model, TASK, [long, *examples])) == swaps(Subject(model, TASK, examples))


def accuracy_of(found: Controls, control: str) -> float:
    return found.effects[control].compared.accuracies[0]


@every_method
def test_a_model_built_to_depend_on_its_latents_is_recognised(method: Method):
    model, examples = built(method, LATENTS, n=24)
    found = controls(Subject(model, TASK, examples))
    assert sum(p.correct for p in found.unedited) == len(examples)
    assert found.kind == "carried" and "The answers come from the latents." in found.sentence, found.sentence
    assert found.effects["shuffled"].donor_answers == 1.0
    for control in ("shuffled", "zeroed", "mean", "noise", "frozen", "hidden"):
        if control in found.effects and not (control == "frozen" and method.plan.first_state == "forward"):
            assert accuracy_of(found, control) <= 0.4, control
    if "question_hidden" in found.effects:
        assert accuracy_of(found, "question_hidden") == 1.0


@some_methods
def test_a_model_built_to_ignore_its_latents_is_called_out(method: Method):
    model, examples = built(method, QUESTION, n=24)
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "unused" and found.sentence.endswith("The latents are not used."), found.sentence
    for control, effect in found.effects.items():
        if control != "question_hidden":
            assert effect.same_answers == 1.0, control
    if "question_hidden" in found.effects:
        assert accuracy_of(found, "question_hidden") <= 0.2


@pytest.mark.parametrize("method", [Pause(n_pauses=2), METHODS["lotus"]], ids=["pause", "lotus"])
def test_latents_that_are_but_room_to_compute_in_are_told_from_those_that_carry(method: Method):
    model, examples = built(method, ROOM, n=24)
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "room" and "room to compute in" in found.sentence, found.sentence
    assert accuracy_of(found, "shuffled") == 1.0 and accuracy_of(found, "hidden") <= 0.2
    assert (found.spread == pytest.approx(0, abs=1e-5)) == (method.name == "pause")


def test_where_nothing_is_right_nothing_can_be_taken_away():
    model, examples = built(Pause(n_pauses=2), LATENTS)
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "unused" and "no better than always giving the commonest answer (10.0%)" in found.sentence
    assert {"loops", "frozen"} == set(found.left_out)
    for name, same in (("shuffled", 0.3), ("hidden", 1.0)):
        found.effects[name] = dataclasses.replace(found.effects[name], same_answers=same)
    assert found.kind == "undecided" and found.sentence.startswith("The unedited run is right in 10.0% of 40 examples")


def test_answers_that_follow_the_latents_are_seen_to_even_where_they_are_wrong():
    model, examples = built(REFEED, LATENTS)
    wrong = [dataclasses.replace(e, answer=str((int(e.answer) + 1) % 10)) for e in examples]
    found = controls(Subject(model, TASK, wrong))
    assert found.kind == "carried" and "The answers come from the latents, right or wrong." in found.sentence
    right, none = evaluate(model, TASK, examples), evaluate(model, TASK, examples, loops=0)
    gain = effect_of(right, none, 0)  # an effect that helps
    assert not gain.costs and "gains 90.0 points" in gain.sentence("Thinking")


def test_answers_of_which_some_need_the_latents_are_told_from_those_that_all_do():
    model, examples = built(REFEED, QUESTION, n=40)
    found = controls(Subject(model, TASK, examples))
    right = [p.correct for p in found.unedited]
    compared = verdict([i % 4 > 0 for i in range(40)], right)
    found.effects["shuffled"] = Effect(compared, 0.75, 0.1)
    assert found.kind == "partly" and "Some answers need what the latents hold" in found.sentence
    found.effects["shuffled"] = Effect(verdict([False] * 40, right), 0.1, 0.1)
    assert found.kind == "carried" and "together with the question" in found.sentence


GUESSES = ["".join(random.Random(seed).choices("AB", k=200)) for seed in range(3)]


def judged(answers: str, shuffled: str, hidden: str, gold: str) -> str:
    """Return what the latents are said to do, from one letter for each example's answer, and its donor's next to it."""

    def predicted(given: str) -> list[Prediction]:
        rows = enumerate(zip(given, gold, strict=True))
        return [Prediction(str(i), "", f"### {a}", a, g, a == g, Cost()) for i, (a, g) in rows]

    plain, changed = predicted(answers), predicted(shuffled)
    share, p = following(changed, plain, [*plain[1:], plain[0]], 0)
    effects = {
        "shuffled": dataclasses.replace(effect_of(changed, plain, 0), donor_answers=share, donor_p=p),
        "hidden": effect_of(predicted(hidden), plain, 0),
    }
    commonest = max(Counter(gold).values()) / len(gold)
    return Controls(plain, commonest, n_latents=2, spread=1.0, effects=effects).kind


@pytest.mark.parametrize(
    ("answers", "shuffled", "hidden", "gold", "kind"),
    [
        ("A" * 99 + "B", "A" * 100, "A" * 100, "ABCDE" * 20, "unused"),  # one answer is lost: half of two donors
        (GUESSES[0], GUESSES[1], GUESSES[0], GUESSES[2], "undecided"),  # guesses, hooked or not
        (GUESSES[0], GUESSES[1], "A" * 200, GUESSES[0], "carried"),  # all is lost; half stays by chance
        ("AB", "BB", "AB", "CD", "undecided"),  # two examples
        ("AX" * 50, "AB" * 50, "AX" * 50, "AB" * 50, "undecided"),  # it gets better
        ("ABCDE" * 20, "BCDEA" * 20, "A" * 100, "ABCDE" * 20, "carried"),  # the donor's
        ("ABCDE" * 20, "ABCDE" * 15 + "BCDEA" * 5, "A" * 100, "ABCDE" * 20, "partly"),  # of few the donor's
    ],
    ids=["constant", "guesses", "lost", "two", "better", "donor", "few"],
)
def test_what_chance_alone_makes_of_answers_is_no_verdict(
    answers: str, shuffled: str, hidden: str, gold: str, kind: str
):
    assert judged(answers, shuffled, hidden, gold) == kind


def test_accuracy_against_loops_and_latents():
    model, examples = built(REFEED, LATENTS)
    found = controls(Subject(model, TASK, examples)).as_dict()
    points = {point["loops"]: point["accuracy"] for point in found["loops"]}
    assert list(points) == [0, 1, 2, 3, 4] and points[0] == 0.1 and points[1] == points[4] == 1.0
    assert [point["loops"] for point in found["loops"] if point["trained"]] == [2]
    kept = {point["kept"]: point["accuracy"] for point in found["kept_latents"]}
    assert kept == {0: 0.1, 1: 1.0, 2: 1.0}


def test_latents_that_hold_nothing_may_go():
    model, examples = built(change(REFEED, n_slots=4, distinct_slots=True, max_loops=1), THIRD)
    kept = {n: effect.compared.accuracies[0] for n, effect in controls(Subject(model, TASK, examples)).kept.items()}
    assert kept == {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 1.0}


@pytest.mark.parametrize("method", [Cot(), NoCot(), Pause(placement="prepend"), Slr(loop_scope="all", max_loops=1)])
def test_methods_without_latents_are_told_so(method: Method):
    model, examples = built(method, QUESTION, n=10)
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "none" and not found.effects and method.name in found.sentence
    assert bool(found.loops) == (method.name == "slr")


def test_what_cannot_be_hidden_is_left_out_with_the_reason():
    model, examples = built(Pause(n_pauses=2, with_markers=False), QUESTION, n=10)
    found = controls(Subject(model, TASK, examples))
    assert "last latent itself" in found.left_out["hidden"] and "hidden" not in found.effects
    model, examples = built(change(METHODS["slots, kv_last"], stop={"rule": "delta"}), QUESTION, n=10)
    assert "set stop.rule to none" in controls(Subject(model, TASK, examples)).left_out["latents"]
    model, examples = built(REFEED, QUESTION, n=10)
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "undecided" and "10 examples are too few" in found.sentence


def test_the_same_seed_gives_the_same_report_whatever_the_batches():
    model, examples = built(REFEED, LATENTS, n=30)
    first, second = (controls(Subject(model, TASK, examples, batch_size=size, seed=5)) for size in (30, 11))
    assert json.dumps(first.as_dict()) == json.dumps(second.as_dict())
    unedited, planned, done = evaluate(model, TASK, examples), [], []
    found = controls(Subject(model, TASK, examples, unedited, seed=6, planned=planned.append, progress=done.append))
    assert json.dumps(found.as_dict()) != json.dumps(first.as_dict())
    assert list(map(id, found.unedited)) == list(map(id, unedited)) and planned == [sum(done)]  # each is answered once
    assert planned[0] == (len(found.effects) + len(found.loops) - 1 + len(found.kept) - 2) * 30
    for some, message in (([], "examples"), (examples[:1], "two different questions")):
        with pytest.raises(InputError, match=message):
            controls(Subject(model, TASK, some))


# What the loop is fed


@every_method
def test_feeding_latents_what_they_were_fed_changes_nothing(method: Method):
    model, examples = built(method, LATENTS, n=12)
    questions, seen = [e.question for e in examples], Subject(model, TASK, examples, batch_size=5).seen
    plain, logits = model.generate(questions, max_new_tokens=4), model.answer_logits(examples)
    with hooked(model.loop, Replacement(seen.blocks)):
        assert [g.text for g in model.generate(questions, max_new_tokens=4)] == [g.text for g in plain]
        assert_close(model.answer_logits(examples), logits)
    assert not model.loop.hooks


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.name != "spiralthinker"])
def test_hiding_nothing_changes_nothing(name: str):
    model, examples = built(METHODS[name], LATENTS, n=6)
    logits = model.answer_logits(examples)
    with hooked(model.loop, Replacement(kept=99)):
        assert_close(model.answer_logits(examples), logits)


def test_frozen_latents_are_those_of_no_loops():
    model, examples = built(REFEED, QUESTION, n=6)
    first = Subject(model, TASK, examples).recorded.map(lambda key, i, block: type(block)((), block.fed[0]))
    without = [g.text for g in model.generate([e.question for e in examples], max_new_tokens=4, loops=0)]
    with hooked(model.loop, Replacement(first)):
        assert [g.text for g in model.generate([e.question for e in examples], max_new_tokens=4)] == without


def test_methods_that_begin_with_text_may_open_their_blocks_later():
    method = change(SPIRAL, pattern="even")
    model, examples = built(method, QUESTION, n=10)  # it opens none
    found = controls(Subject(model, TASK, examples))
    assert found.n_latents == 0 and found.kind == "undecided" and "shuffled" in found.effects
    assert not any(Subject(model, TASK, examples).seen.blocks.values())
    model, examples = built(method, LATENTS)
    head = model.backbone.lm.get_output_embeddings().weight.data
    opening, newline = model.block().opened_by, model.encoder.question("q").ids[-1]
    head[opening, newline], head[opening, -1] = LOUD, -LOUD  # now each opens one after the question
    found = controls(Subject(model, TASK, examples))
    assert found.kind == "carried" and found.n_latents == 2 and found.effects["shuffled"].donor_answers == 1.0
    assert accuracy_of(found, "zeroed") == 0.1
    assert swaps(Subject(model, TASK, examples))[0].follows == 1.0


def test_every_input_is_recorded_once():
    model, examples = built(METHODS["codi"], LATENTS, n=4)
    recorder = Recorder()
    with hooked(model.loop, recorder):
        loop = model.think(model.batch(model.rows(examples))).loop
    blocks = [block for (block,) in recorder.blocks.values()]
    assert [len(block.fed) for block in blocks] == [2] * 4
    assert_close(torch.stack([block.left for block in blocks]), loop.state)
    assert_close(torch.stack([block.fed[0] for block in blocks]), loop.first)
