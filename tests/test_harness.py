"""lm-evaluation-harness: what a run answers to its requests, and what it refuses."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from innerloop.errors import InputError
from innerloop.measure import harness
from innerloop.measure.bound import bounds
from innerloop.measure.harness import evaluate_tasks, harness_model, weighed, written
from innerloop.measure.result_cache import ResultCache, of_model
from innerloop.methods import Coconut, Cot, Llada, Lotus, NoCot, Pause, Slr, SpiralThinker
from innerloop.tasks import Chain
from innerloop.text.examples import Example, write_examples
from tests.models import tiny_model
from tests.test_cli import innerloop

PLAIN = (NoCot(), Pause(n_pauses=2), Coconut(latents_per_step=1, curriculum={"max_stage": 2}), Lotus(n_blocks=2))
QUESTIONS = [example.question for example in Chain(n_ops=2, n_train=8, n_valid=8, n_test=6).examples("test")]


def test_what_is_written_ends_where_a_request_says_and_comes_in_order():
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    whole = [answer.text for answer in model.generate(QUESTIONS, max_new_tokens=12)]
    ends = whole[0].split()[3]
    requests = [
        (question, {"until": [ends] if i % 2 == 0 else "never there", "max_gen_toks": 12, "do_sample": False})
        for i, question in enumerate(QUESTIONS)
    ]
    found = written(model, requests, batch_size=4)
    assert found == [text.partition(ends)[0] if i % 2 == 0 else text for i, text in enumerate(whole)]
    assert found[0] != whole[0]


@pytest.mark.parametrize("method", [*PLAIN, Slr(n_slots=2, max_loops=2)], ids=lambda m: m.name)
def test_given_answers_are_weighed_as_the_model_would_write_them(method):
    model = tiny_model(method)
    found = weighed(model, [(question, f" {a}") for question in QUESTIONS[:3] for a in (1, 2)], batch_size=4)
    example = Example(QUESTIONS[1], (), "2")
    batch = model.batch(model.rows([example]))
    by_hand = -torch.nn.functional.cross_entropy(model.answer_logits([example])[0], batch.targets_U, reduction="sum")
    assert found[3][0] == pytest.approx(by_hand.item(), rel=1e-4)
    assert len(found) == 6 and all(total < 0 for total, _ in found)


@pytest.mark.parametrize("soft", [0.0, 1.0])
def test_a_method_that_denoises_weighs_answers_by_the_same_draws(soft, monkeypatch):
    monkeypatch.setattr(harness, "DRAWS", 8)
    model = tiny_model(Llada(gen_length=8, write_steps=False, soft={"share": soft})).double()
    requests = [(question, f" {a}") for question in QUESTIONS[:2] for a in (1, 2, 1)]
    found = weighed(model, requests, batch_size=4)
    by_hand = bounds(model, [Example(QUESTIONS[1], (), "2")], n_draws=8)[0].nll
    assert found[4][0] == pytest.approx(-by_hand, rel=1e-6)
    assert found[0] == found[2] and found[0] != found[1]
    said = model.generate(QUESTIONS[:1])[0]
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda questions, **_: [said] * len(questions))
        example = Example(QUESTIONS[0], (), "1")
        row = model.method.lay_out(example, model.encoder)
        said.ids = row.ids()[row.region_start :][: row.ids()[row.region_start :].index(model.encoder.eos_id) + 1]
        assert [one for _, one in weighed(model, [(QUESTIONS[0], "1"), (QUESTIONS[0], "2")], 4)] == [True, False]


@pytest.mark.parametrize(
    "method", [Cot(), SpiralThinker(latents_per_block=2), Llada(gen_length=24)], ids=lambda m: m.name
)
def test_methods_that_write_steps_weigh_nothing(method):
    with pytest.raises(InputError, match="writes steps before it answers"):
        weighed(tiny_model(method), [(QUESTIONS[0], "1")], 4)


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood"])
def test_requests_that_were_answered_before_an_interruption_are_not_answered_again(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "LM", object)
    monkeypatch.setattr(harness, "PART", 1)
    model, told = tiny_model(Slr(n_slots=2, max_loops=2)), []
    after = {"until": ["never"], "max_gen_toks": 6, "do_sample": True, "temperature": 2.0}
    requests = [SimpleNamespace(args=(q, after if kind == "generate_until" else "1")) for q in [*QUESTIONS, *QUESTIONS]]
    name = "written" if kind == "generate_until" else "weighed"
    calls, real, stops_at = [], getattr(harness, name), 2

    def spy(model, some, *others):
        calls.append(len(some))
        if len(calls) == stops_at:
            raise KeyboardInterrupt
        return real(model, some, *others)

    monkeypatch.setattr(harness, name, spy)

    def answered(file: str, **facts) -> list:
        parts = ResultCache(tmp_path / file, of_model(model) | facts)
        return getattr(harness_model(model, 5, parts, told.append, told.append), kind)(requests)

    with pytest.raises(KeyboardInterrupt):
        answered("twice.json")
    assert calls == [5, 5] and told == [12, 5]
    twice = answered("twice.json")
    assert calls[2:] == [5, 2] and told[2:] == [12, 5, 5, 2]
    assert twice == answered("once.json") and len(calls) == 7 and twice == answered("once.json") and len(calls) == 7
    assert kind == "loglikelihood" or twice[:6] != twice[6:]  # draws are not the same again in another part
    answered("once.json", batch_size=3)
    model.backbone.lm.get_input_embeddings().weight.data[5, 5] += 1.0
    assert answered("once.json") and len(calls) == 7 + 3 + 3  # with other weights everything is answered anew


def test_without_the_harness_the_command_says_what_to_install(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tiny_model(Cot()).save_pretrained(tmp_path)
    backend, tasks = ("--backend", "lm-eval"), ("--tasks", "gsm8k")
    for options, message in (
        ((*backend, *tasks), "pip install 'innerloop[eval]'"),
        (backend, "needs --tasks NAME"),
        (tasks, "are of --backend lm-eval"),
    ):
        code, _, err = innerloop(capsys, "eval", tmp_path, *options)
        assert code == 2 and message in err


@pytest.mark.slow
def test_the_harness_scores_tasks_of_ones_own(tmp_path: Path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    examples = Chain(n_ops=2, n_train=8, n_valid=8, n_test=6).examples("test")
    write_examples(examples, tmp_path / "chain.jsonl")
    shared = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "chain.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
metadata: {{version: 1.0}}
"""
    (tmp_path / "writes.yaml").write_text(
        f"task: writes{shared}output_type: generate_until\ngeneration_kwargs: {{until: ['never'], max_gen_toks: 8}}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "chooses.yaml").write_text(
        f"task: chooses{shared}output_type: multiple_choice\ndoc_to_choice: ['0', '1', '2', '3', '4']\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    report = evaluate_tasks(model, ["writes", "chooses"], "run", tmp_path, tasks_dir=str(tmp_path))
    choices = [(e.question, f" {a}") for e in examples for a in range(5)]
    scores = [total for total, _ in weighed(model, choices, 8)]
    best = [max(range(5), key=lambda a: scores[5 * i + a]) for i in range(len(examples))]
    right = sum(str(a) == e.answer for a, e in zip(best, examples)) / len(examples)
    assert report["results"]["chooses"]["acc,none"] == pytest.approx(right)
    told: list[int] = []
    cache = ResultCache(tmp_path / "parts.json", of_model(model))
    kept = (None, None, 32, str(tmp_path), cache, lambda n: None, told.append)
    assert evaluate_tasks(model, ["writes", "chooses"], "run", tmp_path, *kept) == report and sum(told) == 36
    with monkeypatch.context() as patch:
        patch.setattr(harness, "written", lambda *_: pytest.fail("answered again"))
        patch.setattr(harness, "weighed", lambda *_: pytest.fail("answered again"))
        assert evaluate_tasks(model, ["writes", "chooses"], "run", tmp_path, *kept) == report
    texts = [answer.text for answer in model.generate([e.question for e in examples], max_new_tokens=8)]
    right = sum(text == e.answer for text, e in zip(texts, examples)) / len(examples)
    assert report["results"]["writes"]["exact_match,none"] == pytest.approx(right)
    assert json.loads((tmp_path / "lm_eval.json").read_text()) == report and report["n-shot"]["writes"] == 0
    with pytest.raises(InputError, match="has no task 'gone'"):
        evaluate_tasks(model, ["gone"], "run", tmp_path, tasks_dir=str(tmp_path))
