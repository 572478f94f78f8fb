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
    results: benchmarks/results/NAME.json                       # of jobs that were trained elsewhere (`committed.py`)

In place of variants, a grid gives every combination of the values of fields (`innerloop.experiments.search`):

    grid: {method.max_loops: [1, 2, 4], train.learning_rate: [1.0e-3, 3.0e-4]}

A variant may answer with another's run, in another way (`innerloop.engine.test_time`); it trains nothing, and is a row
as well:

      cot, vote of 4: {of: cot, test: {samples: 4, temperature: 0.7}}
      llada, random: {of: llada, method: {sampler: {commit: random}}}      # the same weights, other settings

A job is one variant with one seed, in OUT/VARIANT/SEED: a run of its own, but for those. Jobs that are done are not
run again; one that fails is listed and stops no other. In fields of a method, ``{warm_up}`` is the folder of the
warm-up.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from innerloop.checks.values import Count, Loops, Seed, fitted
from innerloop.config.typed import typed
from innerloop.disk.names import check_folder, check_name
from innerloop.engine.test_time import TestTimeCompute
from innerloop.errors import InputError, nearest
from innerloop.experiments.grid import axes_of, trial_folder, variant_name
from innerloop.experiments.search import combinations
from innerloop.train.recipe import SECTIONS, Recipe, overridden, parse_recipe, read_recipe, set_field

SUITE_SECTIONS = (*SECTIONS, "warm_up", "variants", "grid", "seeds", "test", "results")
TRIED = tuple(f.name for f in fields(TestTimeCompute))  # the fields of a test that a variant may set
Key = tuple[str, int]
"""A job: a variant and a seed."""


@dataclass(frozen=True)
class EvalConfig(TestTimeCompute):
    """How every job is tested.

    Args:
        samples: answers that are drawn for each example, by the seed of the job.
        starts: states that latents begin at: the method's own, and random ones by the seed of the job.
        pick: which of several counts: the answer with most votes, the likeliest text, or the calmest latents.
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
    limit: Count | None = None
    loops: tuple[Loops, ...] = ()
    also: dict[str, dict[str, Any]] = field(default_factory=dict)
    controls: bool = False
    stability: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.controls or self.stability) and not self.is_plain:
            raise InputError(
                "controls and stability are of one answer: leave them out, or samples, starts, temperature and beams"
            )

    @property
    def attempts(self) -> TestTimeCompute:
        """How an example is answered."""
        return TestTimeCompute(**{name: getattr(self, name) for name in TRIED})


@dataclass(frozen=True)
class Suite:
    """Recipes to be compared.

    Attributes:
        out: the folder of all runs.
        warm_ups: for each seed, what is trained first; empty: nothing is.
        jobs: the recipe of each (variant, seed), in the order of training.
        test: how they are tested, but for those of ``tests``.
        tests: how variants are tested that say so themselves.
        runs: by variant, the other variant whose runs it answers with.
    """

    out: str
    warm_ups: Mapping[int, Recipe]
    jobs: Mapping[Key, Recipe]
    test: EvalConfig = field(default_factory=EvalConfig)
    tests: Mapping[str, EvalConfig] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)

    def test_of(self, variant: str) -> EvalConfig:
        """Return how a variant is tested."""
        return self.tests.get(variant, self.test)

    def run_of(self, variant: str, seed: int) -> str:
        """Return the folder of the run that a job answers with."""
        return self.jobs[self.runs.get(variant, variant), seed].out

    @property
    def variants(self) -> list[str]:
        """The names of the variants, in order."""
        return list(dict.fromkeys(name for name, _ in self.jobs))


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
    given = {"out": out, "seeds": None if seeds is None else list(seeds)}
    return parse_suite({**raw, **{name: value for name, value in given.items() if value is not None}})


def parse_suite(raw: Mapping[str, Any], trials: Sequence[Mapping[str, Any]] | None = None) -> Suite:
    """Type a suite as it is written in a file; ``trials``, values by field, stand in place of its variants."""
    for name in raw:
        if name not in SUITE_SECTIONS:
            raise InputError(f"a suite has no section '{name}'{nearest(str(name), SUITE_SECTIONS)}")
    if raw.get("grid") is not None and trials is None:
        if raw.get("variants") is not None:
            raise InputError("a suite lists variants or has a grid, not both")
        trials = combinations(axes_of(raw["grid"]))
    settings = {variant_name(dict(trial)): trial for trial in trials or ()}
    variants = {name: {} for name in settings} if settings else _variants(raw.get("variants"))
    seeds = _seeds(raw.get("seeds", [0]))
    if not isinstance(raw.get("out"), str):
        raise InputError("the suite has no 'out' folder")
    check_folder(raw["out"], "out")
    if not isinstance(raw.get("results", ""), str):
        raise InputError(f"results is {raw['results']!r}, but must be the file of results that comes with the suite")
    test = typed(EvalConfig, raw.get("test") or {}, "test")
    runs = _runs(variants)
    tests = {name: _test(test, changed, name) for name, changed in variants.items() if "test" in changed}
    warm_ups = (
        {} if raw.get("warm_up") is None else {seed: _recipe(raw, "warm_up", raw["warm_up"], seed) for seed in seeds}
    )
    jobs = {}
    for seed in seeds:
        for name in variants:
            changes = _changes(variants, name, runs.get(name))
            start = warm_ups[seed].out if seed in warm_ups else None
            jobs[name, seed] = _recipe(raw, name, changes, seed, start, settings.get(name, {}))
    for name, other in runs.items():
        _check_reasons_alike(name, jobs[name, seeds[0]], jobs[other, seeds[0]])
    return Suite(raw["out"], warm_ups, jobs, test, tests, runs)


def _changes(variants: Mapping[str, Mapping[str, Any]], name: str, other: str | None) -> dict[str, Any]:
    """Return the sections that a variant overrides, after those of the variant whose run it answers with."""
    changes = {k: v for k, v in variants[other or name].items() if k not in ("of", "test")}
    if other is not None and "method" in variants[name]:
        changes["method"] = overridden("method", changes.get("method"), variants[name]["method"])
    return changes


def _variants(listed: Any) -> Mapping[str, dict[str, Any]]:
    if not isinstance(listed, dict) or not all(isinstance(changed, dict) for changed in listed.values()) or not listed:
        raise InputError("a suite needs variants, for example variants: {pause: {method: {name: pause}}}")
    for name in listed:
        check_name(name, "variant")
    if "warm_up" in listed:
        raise InputError("no variant may be called warm_up: that is the folder of the warm-up")
    return listed


def _seeds(listed: Any) -> list[int]:
    seeds: list[int] = fitted("seeds", listed, list[Seed], is_text=True)
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds is {listed!r}, but must be a list of different whole numbers")
    return seeds


def _runs(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the variants that answer with another's runs."""
    runs = {name: changed["of"] for name, changed in variants.items() if "of" in changed}
    trained = [name for name in variants if name not in runs]
    for name, other in runs.items():
        if other not in trained:
            raise InputError(
                f"variant '{name}' is of '{other}', no variant that is trained{nearest(str(other), trained)}"
            )
        if more := set(variants[name]) - {"of", "test", "method"}:
            raise InputError(f"variant '{name}' answers with the run of '{other}', so it cannot set {sorted(more)[0]}")
        if not (variants[name].get("test") or variants[name].get("method")):
            raise InputError(f"variant '{name}' is the same as '{other}': say under test or method how else it answers")
    return runs


def _check_reasons_alike(name: str, asked: Recipe, trained: Recipe) -> None:
    """Refuse another method than that of the run that answers."""
    if asked.method.name != trained.method.name:
        raise InputError(
            f"variant '{name}' answers with a run of '{trained.method.name}', not of '{asked.method.name}'"
        )
    if trained.stages and asked.method != trained.method:
        raise InputError(f"variant '{name}' answers with a run of several stages: it cannot set method")


def _test(common: EvalConfig, changed: Mapping[str, Any], name: str) -> EvalConfig:
    """Return how a variant is tested: on the same examples, with attempts of its own."""
    own = changed["test"]
    if not isinstance(own, dict) or (more := [field for field in own if field not in TRIED]):
        told = f"{more[0]}{nearest(str(more[0]), TRIED)}" if isinstance(own, dict) else repr(own)
        raise InputError(
            f"variant '{name}': its test may set {', '.join(TRIED)}, not {told}; the others are the suite's"
        )
    try:
        how: dict[str, Any] = asdict(typed(TestTimeCompute, own, "test"))
        if "of" in changed:
            how |= {"loops": (), "controls": False, "stability": False}
        return replace(common, **how)
    except InputError as error:
        raise InputError(f"variant '{name}': {error}") from None


def _recipe(
    suite: Mapping[str, Any],
    name: str,
    changes: Mapping[str, Any],
    seed: int,
    start: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """Return the recipe of a job: what all share, what the variant changes, its seed, its folder and its settings."""
    raw = copy.deepcopy({section: value for section, value in suite.items() if section in SECTIONS})
    for title, section in ((name, changes), ("train", raw.get("train") or {})):
        if not isinstance(section, dict):
            raise InputError(f"the {title} section of a suite must list fields, not {section!r}")
    for section, value in changes.items():
        if section not in SECTIONS or section == "out":
            raise InputError(f"variant '{name}' overrides '{section}'{nearest(str(section), SECTIONS)}, no section")
        raw[section] = overridden(section, raw.get(section), copy.deepcopy(value))
    if start is not None:
        if "scratch" not in (changes.get("backbone") or {}):  # one that makes its own decoder starts with that
            kept = {k: v for k, v in (raw.get("backbone") or {}).items() if k not in ("scratch", "vocab_size")}
            raw["backbone"] = {**kept, "model": start}
        raw = _filled(raw, start)
    folder = trial_folder(dict(settings)) if settings else name
    raw |= {"train": {**(raw.get("train") or {}), "seed": seed}, "out": f"{suite['out']}/{folder}/{seed}"}
    try:
        for field_name, value in (settings or {}).items():
            set_field(raw, field_name, value)
        return parse_recipe(raw)
    except InputError as error:
        raise InputError(f"variant '{name}': {error}") from None


def _filled(value: Any, warm_up: str) -> Any:
    """Return a section with ``{warm_up}`` replaced by its folder."""
    if isinstance(value, dict):
        return {k: _filled(v, warm_up) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, warm_up) for v in value]
    return value.replace("{warm_up}", warm_up) if isinstance(value, str) else value


def suite_report(raw: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is written of a suite: what defines it, and every job without what they share."""
    first = next((r for r in results if "error" not in r), {})
    shared = ("task", "split", "n", "versions", "device")
    left_out = (*shared, "model", "method", "accuracy_by_match", "exam")
    return {
        "suite": {name: value for name, value in raw.items() if name not in ("out", "results")},
        **{name: first[name] for name in shared if name in first},
        "points": [{name: value for name, value in r.items() if name not in left_out} for r in results],
    }
