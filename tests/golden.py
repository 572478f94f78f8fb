"""Golden values: what small seeded models of every recipe lose, answer and cost, recorded in tests/golden.json.

    python -m tests.golden                 # records all cases anew
    python -m tests.golden chain/slr ...   # records these anew

A case is a stage of a file in recipes/chain, made small, or a recipe of tests/golden_cases.yaml. Earlier stages are
made the same way and saved first, so that teachers, references and labellers are models with weights of their own.
Everything is made and computed in float64, even what is usually computed in float32 (losses, scores, norms): what a
loop does to rounding would otherwise show on another processor.

Fresh parts often begin at zero, so every weight is moved a little. What is added to a weight depends on its shape and
on how many weights of this shape came before it, counted in the backbone and in the parts besides it separately: names
may change, and parts of unlike shapes may be made in another order. The noise is numpy's, the same everywhere.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from innerloop import LatentModel
from innerloop.engine.generation import Generation
from innerloop.errors import InputError
from innerloop.methods import Method
from innerloop.text.examples import Example
from innerloop.train.recipe import Recipe, load_recipe, parse_recipe
from innerloop.train.run import build

RECIPES = Path(__file__).parents[1] / "recipes" / "chain"
CASES = Path(__file__).with_name("golden_cases.yaml")
VALUES = Path(__file__).with_name("golden.json")

SMALL_TASK = {"min_ops": 1, "n_train": 64, "n_valid": 4, "n_test": 8}
SMALL_BACKBONE = {"hidden_size": 32, "intermediate_size": 64}
WITHOUT_DROPOUT = {  # what it draws depends on the build of torch
    "tah": [
        f"--stages.{field}=0.0"
        for field in ("2.method.lora.dropout", "3.method.lora.dropout", "3.method.decider.dropout")
    ]
}
SEED = 0
NOISE = 0.15
STILL = ("relaxed_recursive",)  # begins with singular vectors, whose signs are arbitrary
LOUDER = 1.5  # words that end or turn an answer, so that rows end at different times
N_EXAMPLES, N_QUESTIONS, N_DRAWN = 5, 6, 3
N_TOKENS, N_FEW = 14, 4
USUAL_STOPS = ("delta", "kl")
GRID = [round(-1 + 0.1 * i, 2) for i in range(70)]  # thresholds to choose from where no scores are traced
NEVER = 99.0
NOT_RECORDED = ("seconds", "streams", "written")  # of a cost: the clock, what the method says, how many ids
MARGIN = 0.001  # by which a threshold may be changed without any row's stopping elsewhere

Values = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A stage of a recipe, with all stages before it.

    Attributes:
        name: of the case.
        load: makes the recipe, for a folder to put its stages in.
        stage: the number of the stage that is measured, from 1.
        step: the optimizer step it is measured in, for settings that change while training.
        stops: the stop rules that its answers are also measured with, where the method takes them.
        options: further arguments of ``generate``.
    """

    name: str
    load: Callable[[Path], Recipe]
    stage: int
    step: int | None = None
    stops: tuple[str, ...] = USUAL_STOPS
    options: Values = field(default_factory=dict)


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {case.name: case for case in (*_recipe_cases(), *_written_cases())}


def _recipe_cases() -> Iterator[Case]:
    """Yield each stage of recipes/chain; a chain of thought is measured where nothing follows it."""
    small = ["--backbone.dtype=auto", *(f"--task.{name}={value}" for name, value in SMALL_TASK.items())]
    small += [f"--backbone.scratch.{name}={value}" for name, value in SMALL_BACKBONE.items()]
    for path in sorted(RECIPES.glob("*.yaml")):

        def load(out: Path, path: Path = path) -> Recipe:
            return load_recipe(path, [*small, *WITHOUT_DROPOUT.get(path.stem, ()), f"--out={out}"])

        names = [stage["method"]["name"] for stage in yaml.safe_load(path.read_text()).get("stages", ())]
        measured = [number for number, name in enumerate(names, 1) if name != "cot"] or [1]
        for number in measured:
            yield Case(f"chain/{path.stem}" + (f"/{number}" if len(measured) > 1 else ""), load, number)


def _written_cases() -> Iterator[Case]:
    """Yield the cases of tests/golden_cases.yaml; sections that a case leaves out are the usual ones there."""
    written = yaml.safe_load(CASES.read_text())
    usual = written["usual"]
    for name, given in written["cases"].items():
        raw: Values = dict(given)
        own = {key: raw.pop(key) for key in ("step", "options", "stops") if key in raw}
        backbone = raw.get("backbone", {})
        scratch = backbone.get("scratch", {})
        raw["backbone"] = (
            usual["backbone"]
            | backbone
            | {"scratch": scratch if "type" in scratch else usual["backbone"]["scratch"] | scratch}
        )
        raw["task"] = usual["task"] | raw.get("task", {})
        if "stops" in own:
            own["stops"] = tuple(own["stops"])

        def load(out: Path, raw: Values = raw) -> Recipe:
            return parse_recipe({**raw, "out": str(out)})

        yield Case(name, load, len(raw.get("stages", ())) or 1, **own)


# How a model is made


@contextmanager
def in_float64() -> Iterator[None]:
    """Compute everything in float64 in the block, also where float32 is asked for."""
    usual, as_float, norm = torch.get_default_dtype(), Tensor.float, LlamaRMSNorm.forward

    def exact_norm(self: LlamaRMSNorm, states: Tensor) -> Tensor:
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    torch.set_default_dtype(torch.float64)
    Tensor.float, LlamaRMSNorm.forward = Tensor.double, exact_norm  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
        Tensor.float, LlamaRMSNorm.forward = as_float, norm  # type: ignore[method-assign]


def made(case: Case, out: Path) -> tuple[LatentModel, Recipe, list[Example]]:
    """Return the model of a case in float64, its stage, and the training examples as the method wants them."""
    recipe = case.load(out)
    stages = [stage.with_paths() for stage in recipe.stages or (recipe,)][: case.stage]
    words = stages[0].task.examples("train")
    folder: Path | None = None
    for number, stage in enumerate(stages, 1):
        backbone = stage.backbone if folder is None else replace(stage.backbone, model=str(folder), scratch=None)
        torch.manual_seed(SEED)
        model = build(backbone, stage.method, words, SEED).double()
        move(model, number)
        if number < len(stages):
            folder = out / "stages" / str(number)
            model.save_pretrained(folder)
    examples = stage.task.examples("train")[:N_EXAMPLES]
    return model, stage, model.prepared(examples)


@torch.no_grad()
def move(model: LatentModel, seed: int) -> None:
    """Add noise to all weights, and let the words be louder that end an answer or turn it."""
    backbone, rest = apart(model)
    if model.method.name not in STILL:
        _add_noise(backbone, seed)
        _add_noise(rest, 1000 + seed)
    turning = ["###", model.tokenizer.eos_token, *model.method.written_markers]
    head: Tensor = model.backbone.lm.get_output_embeddings().weight
    if seed == 1:
        head[sorted(set(model.tokenizer.convert_tokens_to_ids(turning)))] *= LOUDER


def apart(model: LatentModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the backbone's weights, and the others."""
    backbone = list(model.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    return backbone, [parameter for parameter in model.parameters() if id(parameter) not in known]


def _add_noise(parameters: Iterable[nn.Parameter], seed: int) -> None:
    before = Counter[tuple[int, ...]]()
    for parameter in parameters:
        shape = tuple(parameter.shape)
        rng = np.random.default_rng([seed, before[shape], *shape])
        parameter += NOISE * torch.from_numpy(np.asarray(rng.standard_normal(shape)))
        before[shape] += 1


def asked(examples: list[Example]) -> list[str]:
    """Return questions of unlike lengths: the beginnings of the examples'."""
    questions = []
    for i, example in enumerate((examples * N_QUESTIONS)[:N_QUESTIONS]):
        clauses = example.question.split(" ; ")
        questions.append(" ; ".join(clauses[: 1 + (len(clauses) + 2 * i) % (len(clauses) + 1)]))
    return questions


# What is measured


@in_float64()
def measure(case: Case, known: Values | None = None) -> Values:
    """Measure a case; ``known`` are recorded values, whose stop rules are used instead of choosing some."""
    with tempfile.TemporaryDirectory() as out:
        model, stage, examples = made(case, Path(out))
        if case.step is not None and model.depth is not None:
            model.depth.step = case.step
        last = model.method.last_stage
        values: Values = {"last stage": losses(model, examples, last)}
        if last > 0:
            values["earlier stage"] = losses(model, examples, last // 2)
    questions = asked(stage.task.examples("test"))
    values["greedy"] = greedy(model, questions, case)
    few = {"max_new_tokens": N_FEW, **case.options}
    if last > 0:
        values["asked earlier"] = ids(model.generate(questions[:N_DRAWN], stage=last // 2, **few))
    if "beams" in case.options:
        return values
    if not model.method.decoder.classes:  # which are not drawn
        drawn = model.generate(questions[:N_DRAWN], temperature=1.0, seed=3, samples=2, likelihoods=True, **few)
        values["drawn"] = {"ids": ids(drawn), "likelihoods": [one.log_likelihood for one in drawn]}
    values |= looped(model, questions, few)
    return values | {"stopped": stopped(model, questions, case, None if known is None else known["stopped"])}


def losses(model: LatentModel, examples: list[Example], stage: int) -> Values:
    """Return a training batch's loss, its terms, what else was measured, and the norms of its gradients."""
    model.train()
    model.zero_grad()
    torch.manual_seed(SEED)
    out = model(model.batch(model.rows(examples, stage, seed="golden")))
    out.loss.backward()
    backbone, rest = apart(model)
    model.eval()
    return {
        "loss": out.loss.item(),
        "terms": {name: term.item() for name, term in out.terms.items()},
        "measured": {name: value.tolist() for name, value in out.measured.items()},
        "gradient": {"all": _norm([*backbone, *rest]), "backbone": _norm(backbone), "parts": _norm(rest)},
    }


def _norm(parameters: list[nn.Parameter]) -> float:
    return sum((p.grad.double() ** 2).sum().item() for p in parameters if p.grad is not None) ** 0.5


def greedy(model: LatentModel, questions: list[str], case: Case) -> Values:
    """Return what is answered, fewer rows at a time than there are questions, and what that costs."""
    found = model.generate(questions, max_new_tokens=N_TOKENS, batch_size=4, **case.options)
    assert all(one.cost.written == len(one.ids) for one in found)
    costs = [{name: value for name, value in vars(one.cost).items() if name not in NOT_RECORDED} for one in found]
    values: Values = {
        "ids": ids(found),
        "text": [one.text for one in found],
        "answer": [one.answer for one in found],
        "cost": {name: [cost[name] for cost in costs] for name in costs[0]},
    }
    return values | _depths(found)


def looped(model: LatentModel, questions: list[str], few: Values) -> Values:
    """Return answers with another number of loops than trained, and how far each moved the state."""
    trained = getattr(model.method, "max_loops", None) or model.method.n_loops(model.method.last_stage)
    for loops in (trained + 1, trained - 1):
        try:
            found = model.generate(questions, loops=loops, trace=True, **few)
        except InputError:  # the method has no loops, or fewer parts than these
            continue
        return {"other loops": {"loops": loops, "ids": ids(found), "delta": _traced(found, "delta")} | _depths(found)}
    return {}


def stopped(model: LatentModel, questions: list[str], case: Case, known: dict[str, Values] | None) -> Values:
    """Return answers in which rows stop by themselves, by the recorded rules or by some that are chosen now."""
    if known is not None:
        return {rule: _stopped(model, questions, rule, one["threshold"]) for rule, one in known.items()}
    found = {}
    for rule in case.stops:
        try:
            tried = [_stopped(model, questions, rule, threshold) for threshold in _thresholds(model, questions, rule)]
        except InputError:  # the method does not stop so
            continue
        for one in sorted(tried, key=_variety, reverse=True):
            near = [_stopped(model, questions, rule, one["threshold"] + by) for by in (MARGIN, -MARGIN)]
            if all({**other, "threshold": one["threshold"]} == one for other in near):
                found[rule] = one
                break
    return found


def _thresholds(model: LatentModel, questions: list[str], rule: str) -> list[float]:
    """Return thresholds that lie between the scores of rows that do not stop."""
    rows = _stopped(model, questions, rule, NEVER)["score"]
    scores = sorted({value for row in rows for value in row if abs(value) < NEVER})
    found = [round((low + high) / 2, 4) for low, high in pairwise(scores) if high - low > 3 * MARGIN]
    return found[:: 1 + len(found) // 40] or GRID


def _variety(one: Values) -> int:
    """Return at how many different places rows have stopped."""
    return len(set(one["loops"])) + len(set("".join(one.get("depths", ()))))


def _stopped(model: LatentModel, questions: list[str], rule: str, threshold: float) -> Values:
    twin = LatentModel(model.backbone, model.tokenizer, stopping(model.method, rule, threshold)).double().eval()
    twin.load_state_dict(model.state_dict())
    found = twin.generate(questions, max_new_tokens=N_FEW, trace=True)
    loops = [one.cost.loops for one in found]
    values = {"threshold": threshold, "loops": loops, "ids": ids(found), "score": _traced(found, "score")}
    return values | _depths(found)


def stopping(method: Method, rule: str, threshold: float) -> Method:
    """Return a method that stops by a rule."""
    if not can_stop(method):
        raise InputError(f"'{method.name}' does not stop by itself")
    return replace(method, stop=replace(method.stop, rule=rule, threshold=threshold))


def can_stop(method: Method) -> bool:
    """Return whether a method has settings of stopping."""
    return any(one.name == "stop" for one in fields(method))


def ids(found: list[Generation]) -> list[str]:
    """Return the tokens that were written."""
    return [" ".join(map(str, one.ids)) for one in found]


def _depths(found: list[Generation]) -> Values:
    """Return how deeply each token was read, where tokens have unlike depth."""
    if not any(one.depths for one in found):
        return {}
    return {"depths": ["".join(str(depth) for _, depth in one.depths) for one in found]}


def _traced(found: list[Generation], name: str) -> list[list[float]]:
    """Return a statistic of every iteration, of the blocks that were opened while writing too."""
    rows = []
    for one in found:
        traces = [] if one.trace is None else [one.trace, *one.trace.opened]
        values = [getattr(entry, name) for trace in traces for entry in trace.iterations]
        rows.append([float(f"{value.item():.7g}") for value in values if value is not None])
    return rows


def main(names: list[str]) -> None:
    """Record cases anew: those named, or all."""
    torch.set_num_threads(1)
    every = cases()
    values = json.loads(VALUES.read_text()) if names else {}
    for name in names or every:
        print(name, flush=True)
        values[name] = measure(every[name])
    lines = [f"{json.dumps(name)}: {json.dumps(values[name], separators=(',', ':'))}" for name in every]
    VALUES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
