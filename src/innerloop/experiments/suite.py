"""Suites: variants of one recipe, each with several seeds, trained and tested alike; what is compared is one file.

    task: {name: chain, n_ops: 3}
    backbone: {scratch: {...}}
    warm_up: {method: {name: cot}, train: {max_steps: 400}}     # once for each seed; variants go on from it, but for
                                                                # those that make a backbone from scratch themselves
    train: {max_steps: 900, ...}
    variants:                                                   # each overrides sections of the recipe
      pause: {method: {name: pause, n_pauses: 3}}
      slr: {method: {name: slr, n_slots: 3, max_loops: 3}}
    seeds: [0, 1, 2]
    test: {split: test, loops: [1, 2, 4, 8], controls: true}    # also with other numbers of iterations, latents edited
    out: runs/suites/NAME

In place of variants, a grid gives every combination of the values of fields:

    grid: {method.max_loops: [1, 2, 4], train.learning_rate: [1.0e-3, 3.0e-4]}

A variant may answer with another's run, in another way (`innerloop.engine.test_time`); it trains nothing, and is a row
as well:

      cot, vote of 4: {of: cot, test: {samples: 4, temperature: 0.7}}

A point is one variant with one seed, in OUT/VARIANT/SEED: a run of its own, but for those. Points that are there are
not trained again; a point that fails is listed and stops no other. In fields of a method, ``{warm_up}`` is the folder
of the warm-up.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from innerloop.config.typed import typed
from innerloop.engine.test_time import Attempts
from innerloop.errors import InputError, nearest
from innerloop.experiments.grid import Choices, Range, axis_of, grid_variants
from innerloop.measure.statistics import over_seeds, share_noise
from innerloop.train.recipe import SECTIONS, Recipe, parse_recipe, read_recipe, set_field

SUITE_SECTIONS = (*SECTIONS, "warm_up", "variants", "grid", "seeds", "test")
TRIED = tuple(f.name for f in fields(Attempts))  # the fields of a test that a variant may set
COSTS = ("passes", "positions", "flops", "thought_tokens", "loops")


@dataclass(frozen=True)
class Exam(Attempts):
    """How every point is tested.

    Args:
        samples: answers that are drawn for each example, by the seed of the point.
        pick: which of several counts: the answer with most votes, or the likeliest text.
        temperature: at which they are drawn; by default 0.7 for several, and 0 for one.
        beams: texts that a beam search follows.
        split: which examples are answered.
        limit: how many; None: all.
        loops: for methods that iterate, numbers of iterations to answer with besides that of training.
        also: by name, fields of the task in which other tests differ, such as ``{longer: {n_ops: 5, min_ops: 5}}``;
            each is answered as trained, and with every number of ``loops``.
        controls: also edit the latents while the model answers (`measure/controls.py`); writes controls.json.
        stability: also measure how the loops of methods that think in latents behave (`measure/stability.py`); writes
            stability.json, and tells how many of a variant's runs have diverged.
    """

    split: str = "test"
    limit: int | None = None
    loops: tuple[int, ...] = ()
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    controls: bool = False
    stability: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "loops", tuple(self.loops))
        if (self.controls or self.stability) and not self.is_plain:
            raise InputError(
                "controls and stability are of one answer: leave them out, or samples, temperature and beams"
            )

    @property
    def attempts(self) -> Attempts:
        """How an example is answered."""
        return Attempts(**{name: getattr(self, name) for name in TRIED})


@dataclass(frozen=True)
class Suite:
    """Recipes to be compared.

    Attributes:
        out: the folder of all runs.
        warm_ups: for each seed, what is trained first; empty: nothing is.
        points: the recipe of each (variant, seed), in the order of training.
        exam: how they are tested, but for those of ``exams``.
        exams: how variants are tested that say so themselves.
        runs: by variant, the other variant whose runs it answers with.
        axes: of a grid, its fields with their values; empty: variants were listed.
        settings: of a grid, the value of each field by variant.
    """

    out: str
    warm_ups: Mapping[int, Recipe]
    points: Mapping[tuple[str, int], Recipe]
    exam: Exam = field(default_factory=Exam)
    axes: tuple[Choices, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exams: Mapping[str, Exam] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)

    def exam_of(self, variant: str) -> Exam:
        """Return how a variant is tested."""
        return self.exams.get(variant, self.exam)

    def run_of(self, variant: str, seed: int) -> str:
        """Return the folder of the run that a point answers with."""
        return self.points[self.runs.get(variant, variant), seed].out

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in order."""
        return list(dict.fromkeys(name for name, _ in self.points))


def is_suite(path: str | Path) -> bool:
    """Tell whether a file is a suite, rather than a recipe or a run."""
    return Path(path).suffix in (".yaml", ".yml") and not {"variants", "grid"}.isdisjoint(read_recipe(path))


def load_suite(
    path: str | Path, out: str | None = None, seeds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Suite:
    """Read a suite and type all its recipes, so that a mistake in any is found before anything is trained.

    ``overrides``, such as ``["--train.max_steps", "9"]``, are of what variants share; what one sets itself stays.
    """
    raw = read_recipe(path, overrides)
    if out is not None:
        raw["out"] = out
    if seeds is not None:
        raw["seeds"] = list(seeds)
    return parse_suite(raw)


def parse_suite(raw: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]] | None = None) -> Suite:
    """Type a suite as it is written in a file.

    ``settings`` are variants by the values of fields, such as ``{"max_loops=4": {"method.max_loops": 4}}``, in place
    of those that the file lists.
    """
    for name in raw:
        if name not in SUITE_SECTIONS:
            raise InputError(f"a suite has no section '{name}'{nearest(str(name), SUITE_SECTIONS)}")
    axes, changes = _axes(raw.get("grid")), raw.get("variants")
    if axes and changes is not None:
        raise InputError("a suite lists variants or has a grid, not both")
    settings = settings or (grid_variants(axes) if axes else {})
    variants = {name: {} for name in settings} if settings else changes
    if not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()) or not variants:
        raise InputError("a suite needs variants, for example variants: {pause: {method: {name: pause}}}")
    if "warm_up" in variants:
        raise InputError("no variant may be called warm_up: that is the folder of the warm-up")
    chosen = raw.get("seeds", [0])
    are_whole = isinstance(chosen, list) and all(isinstance(s, int) for s in chosen) and chosen
    if not are_whole or len(set(chosen)) != len(chosen):
        raise InputError(f"seeds is {chosen!r}, but must be a list of different whole numbers")
    if not isinstance(raw.get("out"), str):
        raise InputError("the suite has no 'out' folder")
    exam = typed(Exam, raw.get("test") or {}, "test")
    runs = _runs(variants)
    exams = {name: _exam(exam, changed, name) for name, changed in variants.items() if "test" in changed}
    variants = {
        name: {k: v for k, v in variants[runs.get(name, name)].items() if k not in ("of", "test")} for name in variants
    }
    common = {name: value for name, value in raw.items() if name in SECTIONS}
    warm_ups, points = {}, {}
    for seed in chosen:
        start = None
        if raw.get("warm_up") is not None:
            start = f"{raw['out']}/warm_up/{seed}"
            warm_ups[seed] = parse_recipe(_variant(common, raw["warm_up"], "warm_up", seed, start))
        for name, changed in variants.items():
            point = _variant(common, changed, name, seed, f"{raw['out']}/{name}/{seed}", start)
            try:
                for field_name, value in settings.get(name, {}).items():
                    set_field(point, field_name, value)
                points[name, seed] = parse_recipe(point)
            except InputError as error:
                raise InputError(f"variant '{name}': {error}") from None
    return Suite(raw["out"], warm_ups, points, exam, axes, settings, exams, runs)


def _runs(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the variants that answer with another's runs."""
    runs = {name: changed["of"] for name, changed in variants.items() if "of" in changed}
    for name, other in runs.items():
        trained = [known for known in variants if known not in runs]
        if other not in trained:
            raise InputError(
                f"variant '{name}' is of '{other}', no variant that is trained{nearest(str(other), trained)}"
            )
        if more := set(variants[name]) - {"of", "test"}:
            raise InputError(f"variant '{name}' answers with the run of '{other}', so it cannot set {sorted(more)[0]}")
        if not variants[name].get("test"):
            raise InputError(f"variant '{name}' is the same as '{other}': say under test how else it answers")
    return runs


def _exam(common: Exam, changed: Mapping[str, Any], name: str) -> Exam:
    """Return how a variant is tested: on the same examples, with attempts of its own."""
    own = changed["test"]
    if not isinstance(own, dict) or (more := [field for field in own if field not in TRIED]):
        told = f"{more[0]}{nearest(str(more[0]), TRIED)}" if isinstance(own, dict) else repr(own)
        raise InputError(
            f"variant '{name}': its test may set {', '.join(TRIED)}, not {told}; the others are the suite's"
        )
    try:
        how: dict[str, Any] = asdict(typed(Attempts, own, "test"))
        if "of" in changed:
            how |= {"loops": (), "controls": False, "stability": False}
        return replace(common, **how)
    except InputError as error:
        raise InputError(f"variant '{name}': {error}") from None


def _axes(grid: Any) -> tuple[Choices, ...]:
    """Return the axes of a grid as it is written: field by field a list, or text such as ``1,2,4``."""
    if grid is None:
        return ()
    if not isinstance(grid, dict) or not grid:
        raise InputError("grid lists the values of fields, for example grid: {method.max_loops: [1, 2, 4]}")
    axes = [axis_of(str(name), written) for name, written in grid.items()]
    for axis in axes:
        if axis.field in ("out", "train.seed"):
            raise InputError(f"the grid cannot go over {axis.field}" + ("; list seeds" if axis.field != "out" else ""))
    if drawn := [axis.field for axis in axes if isinstance(axis, Range)]:
        raise InputError(f"{drawn[0]} has a range, which only a search draws from: list values, or --search optuna")
    return tuple(axis for axis in axes if isinstance(axis, Choices))


def _variant(
    common: Mapping[str, Any], changes: Mapping[str, Any], name: str, seed: int, out: str, start: str | None = None
) -> dict[str, Any]:
    """Return the recipe of a point: what all share, what the variant changes, its seed and folder."""
    raw = copy.deepcopy(dict(common))
    for section, value in changes.items():
        if section not in SECTIONS or section == "out":
            raise InputError(f"variant '{name}' overrides '{section}'{nearest(str(section), SECTIONS)}, no section")
        value = {"name": value} if section in ("task", "method") and isinstance(value, str) else copy.deepcopy(value)
        before = raw.get(section)
        same = isinstance(before, dict) and isinstance(value, dict)
        same = same and value.get("name", before.get("name")) == before.get("name")  # type: ignore[union-attr]
        raw[section] = {**before, **value} if same else value  # type: ignore[dict-item]
    if start is not None:
        if "scratch" not in (changes.get("backbone") or {}):  # one that makes its own decoder starts with that
            kept = {k: v for k, v in (raw.get("backbone") or {}).items() if k not in ("scratch", "vocab_size")}
            raw["backbone"] = {**kept, "model": start}
        raw = _filled(raw, start)
    raw["train"] = {**(raw.get("train") or {}), "seed": seed}
    raw["out"] = out
    return raw


def _filled(value: Any, warm_up: str) -> Any:
    """Return a section with ``{warm_up}`` replaced by its folder."""
    if isinstance(value, dict):
        return {k: _filled(v, warm_up) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, warm_up) for v in value]
    return value.replace("{warm_up}", warm_up) if isinstance(value, str) else value


def suite_report(raw: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is written of a suite: what defines it, and every point without what they share."""
    first = next((r for r in results if "error" not in r), {})
    shared = ("task", "split", "n", "versions", "device")
    return {
        "suite": {name: value for name, value in raw.items() if name != "out"},
        **{name: first[name] for name in shared if name in first},
        "points": [
            {k: v for k, v in r.items() if k not in (*shared, "model", "method", "accuracy_by_match", "exam")}
            for r in results
        ],
    }


def seed_means(results: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return for each variant that has results their means over seeds.

    ``accuracy`` over ``n`` rows with ``half``, the half width of its 95 % interval (`over_seeds`); ``accuracies`` by
    seed; the costs of an example; ``loops``, the mean accuracy by number of iterations, where it was measured.
    """
    means = []
    for variant in dict.fromkeys(r["variant"] for r in results if "error" not in r):
        points = [r for r in results if r["variant"] == variant and "error" not in r]
        accuracies = [r["accuracy"] for r in points]
        accuracy, half = over_seeds(accuracies, share_noise(accuracies, n))
        costs = {name: sum(r["cost"][name] for r in points) / len(points) for name in COSTS}
        seconds = sum(sum(r["cost"]["seconds"].values()) for r in points) / len(points)
        curves = [{int(n): at["accuracy"] for n, at in r["loops"].items()} for r in points if "loops" in r]
        loops = {n: sum(curve[n] for curve in curves) / len(curves) for n in curves[0]} if curves else {}
        means.append(
            {
                "variant": variant,
                "accuracy": accuracy,
                "half": half,
                "accuracies": accuracies,
                **costs,
                "seconds": seconds,
                "loops": loops,
            }
        )
    return means
