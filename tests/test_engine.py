"""Generation: results and costs do not depend on batching, and every option does what it says."""

import pytest
import torch

from innerloop import Coconut, Cot, InputError, NoCot, Pause, Slr
from innerloop.engine import batching, decoding
from innerloop.engine.generation import n_step_tokens
from tests.methods.reference import Reference
from tests.methods.tools import MIXED, QUESTIONS, halting, lean_towards_end, on, passes, sharp_model, under
from tests.models import tiny_model
from tests.test_engine_continuous import METHODS as ALL_METHODS

METHODS = {name: ALL_METHODS[name] for name in ("cot", "pause", "coconut", "slots", "append")}
NEVER_ENDS = -100.0


@pytest.fixture(params=METHODS.values(), ids=METHODS.keys())
def method(request):
    return request.param


def ending_model(method, arch="gpt2"):
    """A model whose rows end at different times, some never."""
    return lean_towards_end(sharp_model(method, arch), 1.0)


def comparable(generation):
    """Everything but the seconds and the trace."""
    cost = generation.cost
    counted = (cost.passes, cost.positions, cost.flops, cost.thought_tokens, cost.loops)
    return generation.text, generation.answer, generation.ended, *counted


def texts_of(model, asked=QUESTIONS, n=12, **options):
    return [generation.text for generation in model.generate(asked, max_new_tokens=n, **options)]


# Batching


@pytest.mark.parametrize("check_every", [1, 3, 8])
def test_rows_that_end_leave_the_batch_and_the_others_go_on_unchanged(method, check_every, monkeypatch):
    model = ending_model(method)
    monkeypatch.setattr(batching, "CHECK_EVERY", 1000)
    kept = [comparable(generation) for generation in model.generate(QUESTIONS, max_new_tokens=20)]
    monkeypatch.setattr(batching, "CHECK_EVERY", check_every)
    with passes(model) as seen:
        compacted = [comparable(generation) for generation in model.generate(QUESTIONS, max_new_tokens=20)]
    n_rows = [embeds.shape[0] for embeds in seen]
    assert n_rows[0] == len(QUESTIONS) > n_rows[-1] and n_rows == sorted(n_rows, reverse=True)
    assert compacted == kept


def test_decoding_stops_when_every_row_has_ended():
    model = lean_towards_end(sharp_model(Cot()), 100.0)
    with passes(model) as seen:
        (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=50)
    assert len(seen) == 1
    assert (generation.text, generation.ended, generation.cost.passes) == ("", True, 1)


def test_answers_come_in_the_order_of_the_questions_though_rows_of_like_length_share_a_batch():
    model, order = ending_model(Cot()), [3, 1, 0, 5, 2, 4]
    forward = texts_of(model, batch_size=2)
    assert len(set(forward)) > 3
    assert texts_of(model, [QUESTIONS[i] for i in order], batch_size=2) == [forward[i] for i in order]
    told = []
    with passes(model) as seen:
        model.generate(QUESTIONS, batch_size=4, max_new_tokens=1, progress=told.append)
    lengths = sorted(len(row) for row in model.prompts(QUESTIONS))
    assert [embeds.shape[1] for embeds in seen] == [lengths[3], lengths[5]] and told == [4, 2]
    assert model.generate([]) == []


def test_a_question_asked_twice_is_read_and_thought_about_once(method):
    model = ending_model(method)
    with passes(model) as alone:
        (single,) = model.generate(QUESTIONS[:1], max_new_tokens=12)
    with passes(model) as seen:
        first, second = model.generate(QUESTIONS[:1] * 2, max_new_tokens=12)
    assert comparable(first) == comparable(single)
    told = [(g.text, g.cost.thought_tokens, g.cost.loops) for g in (single, second)]
    assert told[0] == told[1] and len(seen) == len(alone)
    n_first = len(seen) - second.cost.passes  # passes of prefill and thought
    assert second.cost.passes == single.cost.passes - n_first
    assert [len(embeds) for embeds in seen[:n_first]] == [1] * n_first


# Length


@pytest.mark.parametrize("n", [1, 7, 8, 9, 17])
def test_a_model_that_never_ends_writes_exactly_max_new_tokens(method, n):
    model = lean_towards_end(sharp_model(method), NEVER_ENDS)
    before = model.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost.passes - 1
    with passes(model) as seen:
        generations = model.generate(QUESTIONS, max_new_tokens=n)
    assert len(seen) == before + n
    assert {generation.cost.passes for generation in generations} == {before + n}
    assert not any(generation.ended for generation in generations)


def test_passes_counted_by_a_hook_are_those_charged_when_a_row_ends(method, monkeypatch):
    monkeypatch.setattr(batching, "CHECK_EVERY", 1)  # otherwise an ended row rides along for a while, uncharged
    model = ending_model(method)
    for question in QUESTIONS:
        with passes(model) as seen:
            (generation,) = model.generate([question], max_new_tokens=20)
        assert generation.cost.passes == len(seen)
        assert generation.cost.positions == sum(embeds.shape[1] for embeds in seen)


def test_writing_stops_where_the_context_ends_as_it_would_alone():
    model = lean_towards_end(sharp_model(Cot(), max_position_embeddings=20), NEVER_ENDS)
    (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=64)
    n_question = len(model.prompts(QUESTIONS[:1])[0])
    assert n_question + generation.cost.passes in (20, 21)  # the last token written is not read
    assert not generation.ended
    questions = [QUESTIONS[1], QUESTIONS[0]]  # short and long
    alone = [comparable(model.generate([question], max_new_tokens=12)[0]) for question in questions]
    assert [comparable(generation) for generation in model.generate(questions, max_new_tokens=12)] == alone


# Choosing tokens


def test_greedy_writes_the_likeliest_token_as_a_very_low_temperature_does_and_needs_no_seed():
    model = ending_model(Cot())
    slow = Reference(model)
    expected = [model.tokenizer.decode(slow.write(q, 12), skip_special_tokens=True) for q in QUESTIONS]
    for options in ({"seed": 0}, {"seed": 1}, {"temperature": 1e-4}):
        assert texts_of(model, **options) == expected


def test_sampling_is_reproduced_by_its_seed_and_leaves_the_global_random_state_alone():
    model, state = ending_model(Coconut()), torch.random.get_rng_state()
    texts = [texts_of(model, temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    asked = [QUESTIONS[0]] * 6  # each draws by its index alone
    together, apart = (texts_of(model, asked, temperature=1.5, seed=3, batch_size=n) for n in (32, 1))
    assert together == apart and len(set(together)) > 1
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampling_follows_the_probabilities_at_the_temperature():
    model = under(sharp_model(Cot()), NoCot())
    slow = Reference(model)
    with torch.no_grad():
        logits = slow.read(slow.embed(slow.question(QUESTIONS[0])))[1][-1]
    for temperature in (0.5, 1.5):
        generations = model.generate([QUESTIONS[0]] * 2000, max_new_tokens=1, temperature=temperature, batch_size=2000)
        share = sum(generation.ended for generation in generations) / 2000
        expected = (logits / temperature).softmax(-1)[model.tokenizer.eos_token_id].item()
        assert share == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("marked", [Pause(with_markers=False), Coconut(), Slr(max_loops=1)], ids=lambda m: m.name)
def test_markers_are_never_written(marked, temperature):
    model = sharp_model(marked)
    ids = model.tokenizer.convert_tokens_to_ids(list(marked.markers))

    def prefer_markers(module, args, logits):
        logits = logits.clone()
        logits[..., ids] += 50.0
        return logits

    model.backbone.lm.get_output_embeddings().register_forward_hook(prefer_markers)
    states = torch.randn(64, model.backbone.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = model.backbone.head(states)
    written = decoding.choose(logits, model.suppressed_ids(), temperature, torch.rand(64, dtype=torch.float64))
    assert not set(written.tolist()) & set(ids)


def test_generation_leaves_the_model_in_the_mode_it_was_in_and_drops_nothing_out():
    model = ending_model(Cot())
    expected = texts_of(model)
    for training in (True, False):
        model.train(training)
        assert texts_of(model) == expected
        assert model.training is training

    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.train().generate(QUESTIONS[:1], max_new_tokens=2, progress=interrupt)
    assert model.training


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_token": 3}, r"generate has no 'max_token' \(did you mean 'max_new_tokens'\?\)"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        tiny_model(Cot()).generate(["2"], **option)


# What a generation tells


def script(model, *pieces):
    """Return what chooses the tokens of given pieces of text, one after the other, whatever is asked."""
    ids = [token for piece in pieces for token in model.tokenizer.encode(piece)] + [model.tokenizer.eos_token_id]
    written = []

    def dictate(logits, *_):
        written.append(ids[len(written)])
        return torch.full((len(logits),), written[-1])

    return dictate


@pytest.mark.parametrize(
    ("pieces", "answer", "n_step_tokens"),
    [
        (["### 3"], "3", 0),
        (["3 + 4 = 2\n", "### 2"], "2", 6),
        (["3 + 4 = 2\n", "2 * 2 = 4\n", "### 4 ; 1"], "4 ; 1", 12),
        (["3 + 4 = 2"], None, 6),  # all of it is thought, the end-of-sequence token included
        (["### 1\n", "### 2"], "2", 0),
        (["###"], "", 0),
    ],
)
def test_the_answer_follows_the_last_hash_signs_and_thought_comes_before_the_first(
    pieces, answer, n_step_tokens, monkeypatch
):
    model = sharp_model(Coconut())
    monkeypatch.setattr(decoding, "choose", script(model, *pieces))
    monkeypatch.setattr(batching, "CHECK_EVERY", 1)
    (generation,) = model.generate(QUESTIONS[:1])
    assert (generation.text.replace("\n ", "\n"), generation.answer) == ("".join(pieces), answer)
    assert generation.ended
    assert generation.cost.thought_tokens == 6 + n_step_tokens


def test_thought_tokens_are_latents_and_written_steps(monkeypatch):
    model = sharp_model(Slr())
    monkeypatch.setattr(batching, "CHECK_EVERY", 1)
    for method, latents in ((Cot(), 0), (NoCot(), 0), (Pause(n_pauses=3), 3), (Coconut(), 6), (Slr(n_slots=5), 5),
                            (Slr(loop_scope="append", max_loops=3), 4)):  # fmt: skip
        monkeypatch.setattr(decoding, "choose", script(model, "### 3"))
        assert under(model, method).generate(QUESTIONS[:1])[0].cost.thought_tokens == latents


@pytest.mark.parametrize(
    ("method", "n_loops"),
    [
        (Cot(), 0),
        (Pause(), 0),
        (Slr(max_loops=0), 0),
        (Slr(max_loops=0, h0="forward"), 0),
        (Coconut(curriculum={"max_stage": 2}, latents_per_step=2), 3),
        (Slr(max_loops=3), 3),
        (Slr(max_loops=3, loop_scope="append", answer_from="kv_last"), 3),
        (Slr(max_loops=3, decoder={"kind": "separate"}), 3),
        (Slr(max_loops=3, decoder={"kind": "linear", "classes": ("0", "1")}), 3),
    ],
    ids=lambda one: getattr(one, "name", None),
)
def test_loops_are_the_iterations_that_each_row_ran(method, n_loops):
    model = sharp_model(method)
    for generation in model.generate(QUESTIONS, max_new_tokens=2, trace=True):
        assert generation.cost.loops == len(generation.trace.iterations) == n_loops


@pytest.mark.parametrize("name", ["stop", "solver"])
def test_loops_are_counted_for_each_row_where_rows_end_by_themselves(name):
    if name == "stop":
        loop = {"residual": "A", "rescale": "rms", "time": "lookup"}
        model = halting("gpt2", Slr(n_slots=3, max_loops=4, loop=loop, stop={"rule": "delta"}))
    else:
        loop = {"residual": "A", "rescale": "rms", "time": "none", "alpha": 0.5}
        model = on("gpt2", Slr(n_slots=3, loop=loop, max_loops=40, fixed_point={"solver": "plain", "tol": 3e-3}))
    generations = model.generate(QUESTIONS, max_new_tokens=2, trace=True)
    loops = [generation.cost.loops for generation in generations]
    assert loops == [len(generation.trace.iterations) for generation in generations]
    assert len(set(loops)) > 1


@pytest.mark.parametrize(("answer_from", "n_fed"), [("refeed", 1), ("kv_last", 0)])
def test_a_row_that_stops_early_is_billed_the_latents_that_it_has_appended(answer_from, n_fed):
    method = Slr(
        loop_scope="append", max_loops=4, answer_from=answer_from, loop={"residual": "none"}, stop={"rule": "delta"}
    )
    model = halting("gpt2", method)
    generations = model.generate(QUESTIONS, max_new_tokens=2)
    latents = [one.cost.thought_tokens - n_step_tokens(model, one.ids, one.text)[0] for one in generations]
    assert latents == [one.cost.loops + n_fed for one in generations]
    assert len(set(latents)) > 1


def test_loops_follow_the_stage_and_the_number_asked_for():
    model = sharp_model(Slr(n_slots=2, max_loops=4, curriculum={"max_stage": 2}, loops_per_stage=1))
    asked = [{"stage": 0}, {"stage": 1}, {"stage": 3}, {"loops": 7}]
    found = [[g.cost.loops for g in model.generate(QUESTIONS[:2], max_new_tokens=1, **one)] for one in asked]
    assert found == [[0, 0], [1, 1], [4, 4], [7, 7]]


def test_seconds_are_split_over_phases_and_shared_over_the_batch(method):
    model = ending_model(method)
    seconds = [generation.cost.seconds for generation in model.generate(QUESTIONS, max_new_tokens=8)]
    assert all(set(one) == {"prefill", "thought", "answer"} and min(one.values()) >= 0 for one in seconds)
    assert len({one["prefill"] for one in seconds}) == 1 and seconds[0]["prefill"] > 0


def test_flops_count_weights_attention_and_head():
    model = lean_towards_end(sharp_model(NoCot()), NEVER_ENDS)
    (cost,) = (generation.cost for generation in model.generate(QUESTIONS[:1], max_new_tokens=3))
    n, d, vocab = len(model.prompts(QUESTIONS[:1])[0]), 32, len(model.tokenizer)
    keys = n * (n + 1) // 2 + (n + 1) + (n + 2)
    weights = sum(p.numel() for p in model.backbone.lm.transformer.h.parameters())
    assert cost.flops == 2 * weights * (n + 2) + 4 * 3 * d * keys + 2 * d * vocab * 3


def test_the_trace_has_one_iteration_for_each_loop_with_read_outs_of_its_own_row_and_no_gradient():
    model = ending_model(Slr(n_slots=4, max_loops=3))
    together = model.generate(QUESTIONS, max_new_tokens=2, trace=True)
    for question, generation in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=2, trace=True)
        assert [entry.loop for entry in generation.trace.iterations] == [1, 2, 3]
        for entry, single in zip(generation.trace.iterations, alone.trace.iterations):
            assert entry.top_ids.shape == (1, 4, 5) and not entry.delta.requires_grad
            assert torch.equal(entry.top_ids, single.top_ids)
            assert torch.allclose(entry.top_probs, single.top_probs, atol=1e-5)
            assert torch.allclose(entry.delta, single.delta, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tracing_changes_no_text_and_no_cost(method):
    model = ending_model(method)
    plain, traced = (model.generate(QUESTIONS, max_new_tokens=12, trace=trace) for trace in (False, True))
    assert [comparable(generation) for generation in plain] == [comparable(generation) for generation in traced]
    for one, other in zip(plain, traced):
        assert one.trace is None and len(other.trace.iterations) == other.cost.loops


@pytest.mark.parametrize("stage", [0, 1, 4])
def test_a_stage_of_the_curriculum_may_be_asked(stage):
    model = ending_model(Coconut())
    slow = Reference(model)
    expected = [model.tokenizer.decode(slow.write(q, 12, stage), skip_special_tokens=True) for q in QUESTIONS]
    assert texts_of(model, stage=stage) == expected


def test_examples_and_questions_are_laid_out_alike(method):
    """What training reads before the first written token is what answering reads."""
    model = tiny_model(method)
    for example, row, prompt in zip(MIXED, model.rows(MIXED), model.prompts(QUESTIONS)):
        assert row.ids()[: len(prompt)] == prompt.ids(), example
        assert row.n_loops == prompt.n_loops
