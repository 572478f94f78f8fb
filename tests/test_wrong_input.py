"""Wrong values of every field and option, made from what each may be: all are answered in one sentence that names it.

The sentence is ours: no library's words, no bare TypeError. Of each list a share may go otherwise, which is 5 %.
"""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
import yaml

import innerloop as il
from innerloop.bench.bench import BenchSettings
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.checks.settings import kinds_of
from innerloop.cli.main import VERBS, main
from innerloop.cli.verb import Verb
from innerloop.config.typed import groups
from innerloop.engine.options import Answering, EngineOptions
from innerloop.errors import InputError
from innerloop.measure import evaluate
from innerloop.methods import METHODS
from innerloop.model.loading import Loading
from innerloop.tasks import TASKS
from innerloop.train.recipe import BackboneChoice
from innerloop.train.training_arguments import argument_kinds
from tests.models import tiny_model
from tests.wrong import written, wrong_values

SHARE = 0.05
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
RECIPE = {
    "task": {"name": "chain", "n_ops": 2, "n_train": 20, "n_valid": 4, "n_test": 4},
    "backbone": {"scratch": {"type": "llama", **SIZES, "max_position_embeddings": 128}},
    "method": {"name": "cot"},
    "train": {"max_steps": 1, "use_cpu": True},
}


def fields_of(cls: type, prefix: str = "") -> list[tuple[str, object]]:
    """Return the fields of a dataclass by their paths, with what each may be."""
    inner = groups(cls)
    own = [(prefix + name, kind) for name, kind in kinds_of(cls).items() if name not in inner]
    return own + [field for name, group in inner.items() for field in fields_of(group, f"{prefix}{name}.")]


def overrides() -> list[tuple[dict, list[str]]]:
    """Return recipes, each with a wrong value of one of their fields."""
    sections = [(RECIPE, "train", list(argument_kinds().items())), (RECIPE, "backbone", fields_of(BackboneChoice))]
    sections += [({**RECIPE, "method": {"name": n}}, "method", fields_of(cls)) for n, cls in METHODS.items()]
    sections += [({**RECIPE, "task": {"name": n}}, "task", fields_of(cls)) for n, cls in TASKS.items()]
    found = [
        (recipe, [f"--{section}.{name}", text])
        for recipe, section, known in sections
        for name, kind in known
        for text in map(written, wrong_values(kind))
        if text  # nothing is what leaves a field out
    ]
    known = [("r", "0"), ("r", "1.5"), ("lora_alpha", "x"), ("lora_dropout", "2"), ("bias", "x"), ("rank", "4")]
    found += [(RECIPE, ["--backbone.lora", f"{{{name}: {value}}}"]) for name, value in known]
    wrong = ("0", "-1", ".nan", "x", "1.5", "[1]", "2024-01-01", "100000000000")
    found += [(RECIPE, [f"--backbone.scratch.{name}", value]) for name in SIZES for value in wrong]
    return random.Random(0).sample(found, 200)


@pytest.fixture
def answer(monkeypatch, capsys):
    """Run a command up to where training would begin; return its code and what it says."""

    def stop(*_) -> None:
        raise SystemExit("accepted")

    monkeypatch.setattr("innerloop.train.run.train_stage", stop)

    def run(*words: str) -> tuple[object, str]:
        try:
            code: object = main(list(words))
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return run


def test_wrong_fields_of_recipes_are_named(tmp_path: Path, answer):
    missed, cases = [], overrides()
    for i, (recipe, (option, value)) in enumerate(cases):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "out": str(tmp_path / str(i))}))
        code, said = answer("train", str(tmp_path / "r.yaml"), option, value)
        names = (option.rpartition(".")[2], value.strip("{").partition(":")[0])
        if code != 2 or not any(name in said for name in names):
            missed.append((recipe["method"], option, value, code, said))
    assert len(missed) <= SHARE * len(cases), missed


def test_wrong_options_of_verbs_are_named(answer):
    from importlib import import_module

    missed, n = [], 0
    for name, (where, _) in VERBS.items():
        module, _, function = where.partition(":")
        verb = Verb(name, getattr(import_module(f"innerloop.cli.{module}"), function))
        places = ["x"] * len(verb.places)
        options = {option: kind for option, kind in verb.kinds.items() if option in verb.types}
        for option, kind in options.items():
            for text in map(written, wrong_values(kind)):
                if text and option not in verb.places and verb.types[option] not in (str, str | None):
                    code, said = answer(*name.split(), *places, f"--{option}={text}")
                    n += 1
                    missed += [(name, option, text, code, said)] * (code != 2 or option not in said)
        code, said = answer(*name.split(), *places, "--no_such_option", "1")
        n += 1
        missed += [(name, code, said)] * (code != 2 and not verb.takes_overrides)
    assert n > 200
    assert len(missed) <= SHARE * n, missed


def calls() -> list[tuple[object, dict]]:
    """Return classes, each with a wrong value of a field."""
    classes = [*METHODS.values(), *TASKS.values(), BackboneChoice, EngineOptions, il.TestTimeCompute]
    classes += [BenchSettings, CalibrationSettings]
    classes += [group for cls in METHODS.values() for group in groups(cls).values()]
    found = [(c, {n: v}) for c in classes for n, kind in kinds_of(c).items() for v in wrong_values(kind)]
    found += [(c, {"no_such_field": 1}) for c in classes]
    train = [(n, v) for n, kind in argument_kinds().items() for v in wrong_values(kind)]
    return found + [(il.LatentTrainingArguments, {"use_cpu": True, "output_dir": "x", n: v}) for n, v in train]


def test_wrong_settings_in_python_are_named():
    missed, cases = [], random.Random(1).sample(calls(), 1500)
    for cls, named in cases:
        try:
            cls(**named)
        except InputError as error:
            missed += [(cls, named, str(error))] * (list(named)[-1] not in str(error))
        except Exception as error:
            missed.append((cls, named, repr(error)))
        else:
            missed.append((cls, named, "accepted"))
    assert len(missed) <= SHARE * len(cases), missed


def test_wrong_arguments_of_functions_are_named():
    model, task = tiny_model(il.Coconut()), il.Chain(n_ops=2)
    example, scratch = il.Example("1 ; + 1", ("1 + 1 = 2",), "2"), {"type": "llama", **SIZES}
    cases = [
        (model.generate, ("text",), {}, "questions"),
        (model.generate, (3,), {}, "questions"),
        (model.generate, ({"1", "2"},), {}, "questions"),  # whose order is nobody's
        (model.generate, (), {}, "questions"),
        (model.generate, ([3],), {}, "a question is text"),
        (model.generate, (["2"],), {"max_token": 3}, "max_new_tokens"),
        (model.generate, (["2"],), {"stage": 9}, "stage is 9"),
        (model.generate, (["2"],), {"stage": -1}, "stage is -1"),
        (model.generate, (["2"],), {"steps": "text"}, "steps"),
        (model.generate, (["2"], 4), {}, "by place"),
        (model.loss, ([],), {}, "examples"),
        (model.loss, (example,), {}, "examples"),
        (model.loss, (["text"],), {}, "examples"),
        (model.loss, ([example],), {"stage": 9}, "stage is 9"),
        (model.loss, ([example],), {"stage": 1.5}, "stage"),
        (model.loss, ([example],), {"stge": 1}, "stge"),
        (model.answer_logits, ("text",), {}, "examples"),
        (model.save_pretrained, (3,), {}, "path"),
        (il.LatentModel.from_pretrained, (3,), {}, "path"),
        (il.LatentModel.from_pretrained, (), {}, "path"),
        (il.LatentModel.from_pretrained, ("x", "slr"), {}, "method"),
        (il.LatentModel.from_pretrained, ("x", il.Slr), {}, "method"),
        (il.LatentModel.from_pretrained, ("x",), {"lora": 8}, "lora"),
        (il.LatentModel.from_pretrained, ("x",), {"dtype": 16}, "dtype"),
        (il.LatentModel.from_pretrained, ("x",), {"device": 0.5}, "device"),
        (il.LatentModel.from_pretrained, ("x",), {"device": "tpu9"}, "device"),
        (il.LatentModel.from_pretrained, ("x",), {"marker_init": "mode"}, "marker_init"),
        (il.LatentModel.from_pretrained, ("x",), {"methd": None}, "methd"),
        (il.LatentModel.from_scratch, (scratch, [], il.Cot()), {}, "examples"),
        (il.LatentModel.from_scratch, (scratch, "text", il.Cot()), {}, "examples"),
        (il.LatentModel.from_scratch, (scratch, [example], "cot"), {}, "method"),
        (il.LatentModel.from_scratch, ("llama", [example], il.Cot()), {}, "settings"),
        (il.LatentModel.from_scratch, (scratch, [example], il.Cot()), {"seed": -1}, "seed"),
        (evaluate, (model, task, example), {}, "examples"),
        (evaluate, (model, "chain", [example]), {}, "task"),
        (evaluate, (task, model, [example]), {}, "model"),
        (evaluate, (model, task, [example]), {"attempts": 3}, "attempts"),
        (il.read_examples, (3,), {}, "source"),
        (il.read_examples, ("x.jsonl",), {"limit": 0}, "limit"),
        (il.read_examples, ("x.jsonl",), {"limit": 1.5}, "limit"),
        (il.write_examples, (example, "x.jsonl"), {}, "examples"),
        (il.write_examples, ([example], 3), {}, "path"),
        (task.examples, ("tets",), {}, "did you mean 'test'"),
        (task.examples, (3,), {}, "split"),
        (task.examples, ("test", 0), {}, "limit"),
        (il.Example, (3, (), "4"), {}, "question"),
        (il.Example, ("q", "12", "4"), {}, "steps"),
        (il.Example, ("q", 3, "4"), {}, "steps"),
        (il.Example, ("q", (), 4), {}, "answer"),
        (il.LatentTrainer, (model, "args", [example]), {}, "args"),
        (il.LatentTrainer, ("model", il.LatentTrainingArguments("x", use_cpu=True), [example]), {}, "model"),
        (il.LatentTrainer, (model, il.LatentTrainingArguments("x", use_cpu=True), []), {}, "train_dataset"),
        (il.LatentTrainer, (model, il.LatentTrainingArguments("x", use_cpu=True), 3), {}, "train_dataset"),
    ]
    cases += [
        (model.generate, (["2"],), {name: value}, name)
        for name, kind in kinds_of(EngineOptions).items()
        for value in wrong_values(kind)
    ]
    missed = []
    for function, given, named, word in cases:
        try:
            function(*given, **named)
        except InputError as error:
            missed += [(function, given, named, str(error))] * (word not in str(error))
        except Exception as error:
            missed.append((function, given, named, repr(error)))
        else:
            missed.append((function, given, named, "accepted"))
    assert missed == [], missed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.Slr(n_slots=1.5), "^n_slots is 1.5, but must be a whole number, at least 1$"),
        (lambda: il.Slr(max_loops=1_000_000), "^max_loops is 1000000, but must be a whole number, at most 10000$"),
        (lambda: il.Slr(stop={"threshold": float("nan")}), "^stop.threshold is nan, but must be a finite number$"),
        (lambda: il.Slr(n_slot=3), "^Slr has no 'n_slot' .did you mean 'n_slots'"),
        (lambda: il.SimCot(latents_per_step=1, max_stage=2), r"^SimCot has 'max_stage' in a group: curriculum=\{'max_"),
        (lambda: dataclasses.replace(il.Slr(), n_slots=True), "^n_slots is True, but must be a whole number"),
        (lambda: il.Slr(loop=il.StopSettings()), "^loop is "),
        (lambda: il.LatentTrainingArguments(per_device_train_batch_size=4), "is called batch_size here"),
        (lambda: il.LatentTrainingArguments(save_steps=0), "^save_steps is 0, but must be a number, above 0$"),
        (lambda: il.LatentTrainingArguments(bf16="maybe"), "^bf16 is maybe, but must be true or false$"),
        (lambda: EngineOptions(max_new_tokens=float("nan")), "^max_new_tokens is nan, but must be a whole number"),
        (lambda: EngineOptions(temperature=float("inf")), "^temperature is inf, but must be a finite number"),
    ],
)
def test_what_once_went_through_is_refused_in_a_sentence(make, message: str):
    with pytest.raises(InputError, match=message):
        make()


def test_what_is_right_stays_as_it_is():
    method = il.Slr(n_slots=torch.arange(9).numpy()[8], loop={"alpha": 1, "lora_targets": ["q_proj"]})
    assert type(method.n_slots) is int and method.n_slots == 8
    assert method.loop.alpha == 1.0 and method.loop.lora_targets == ("q_proj",)
    assert il.Slr(stop={"rule": "kl", "threshold": float("inf")}).stop.threshold == float("inf")
    args = il.LatentTrainingArguments(output_dir="x", use_cpu=True, batch_size=4)
    assert dataclasses.replace(args, seed=3).per_device_train_batch_size == 4


def test_options_that_are_spelled_out_are_those_that_there_are():
    assert list(Answering.__annotations__) == [field.name for field in dataclasses.fields(EngineOptions)]
    assert {"lora", "dtype", "device", "marker_init", "trust_remote_code", "revision"} <= set(Loading.__annotations__)
