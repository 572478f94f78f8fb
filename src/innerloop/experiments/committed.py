"""Results that come with a suite: its table in seconds, and what it would take to train it anew.

A suite that names ``results``, a file that ``innerloop compare --results`` wrote, takes from it each job that is there,
was trained and tested by the same settings, and has no result in the suite's own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from innerloop.errors import InputError
from innerloop.experiments.jobs import known_result, n_steps
from innerloop.experiments.suite import Key, Suite
from innerloop.experiments.summary import CONTROLS, PREDICTIONS, read_json
from innerloop.measure.statistics import read_correct
from innerloop.methods import name_of
from innerloop.text.codec import read_lines, to_json
from innerloop.train.callbacks import METRICS

OF_EACH = ("variants", "seeds")  # the sections that say which jobs there are
NOT_OF_JOBS = (*OF_EACH, "out", "results")
RIGHT, TRAINED = "right", "trained_seconds"  # which rows are right, as hexadecimal digits; how long training took
EDITED = "edited"  # what is answered where the thought is another


def committed(suite: Suite, raw: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """Return the results of jobs that the suite's file of results holds and that have none of their own.

    Args:
        suite: the suite.
        raw: the same as it is written in its file.

    Raises:
        InputError: where the file is none that ``innerloop compare --results`` wrote.
    """
    file = raw.get("results")
    if file is None or not Path(file).exists():
        return {}
    report = read_json(Path(file))
    if "suite" not in report or "points" not in report:
        raise InputError(f"{file} holds no results of a suite: innerloop compare SUITE --results FILE writes them")
    then, now = (_as_read_from_json(written) for written in (report["suite"], raw))
    if _shared(then) != _shared(now):
        return {}
    alike = [name for name in suite.variants if _variant(then, name) == _variant(now, name)]
    facts = {name: value for name, value in report.items() if name not in ("suite", "points")}
    found = {}
    for point in report["points"]:
        key = point["variant"], point["seed"]
        if key in suite.jobs and key[0] in alike and "error" not in point and known_result(suite, key) is None:
            method = suite.jobs[key].method
            found[key] = {**facts, **point, "method": {"name": name_of(method), **to_json(asdict(method))}}
    return found


def _as_read_from_json(written: Any) -> Any:
    return json.loads(json.dumps(written))


def _shared(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in NOT_OF_JOBS}


def _variant(raw: Mapping[str, Any], name: str) -> list[Any]:
    """Return what a file says of a variant, and of the one whose runs it answers with; of a grid nothing."""
    variants = raw.get("variants") or {}
    own = variants.get(name)
    return [own, variants.get(own["of"]) if own and "of" in own else None]


def committed_sentence(suite: Suite, file: str, found: Mapping[Key, Mapping[str, Any]]) -> str:
    """Say which results are of the file, where they were made, and what it would take to train them here."""
    trained = [key for key in found if key[0] not in suite.runs]
    steps = sum(n_steps(suite.jobs[key]) or 0 for key in trained)
    seconds = [found[key].get(TRAINED) for key in trained]
    first = next(iter(found.values()))
    took = ""
    if trained and None not in seconds:
        hours = sum(float(s) for s in seconds if s is not None) / 3600
        took = f"; training took {hours:.1f} hours, one job after the other"
    jobs = f"{len(trained)} {'job' if len(trained) == 1 else 'jobs'}" + (
        f", {steps:,} optimizer steps" if steps else ""
    )
    return (
        f"{len(found)} of {len(suite.jobs)} results are those of {file} ({first.get('device', 'device unknown')}, "
        f"torch {(first.get('versions') or {}).get('torch', 'unknown')}); to train them here, add --out FOLDER: "
        f"{jobs}{took}"
    )


def with_records(suite: Suite, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with what else the suite's folder says: rows that are right, controls, seconds of training."""
    return [{**result, **dict(_records(suite, result))} for result in results]


def _records(suite: Suite, result: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "error" in result or "exam" not in result:  # of a file, which has what it has
        return
    key = result["variant"], result["seed"]
    answers = Path(suite.jobs[key].out) / PREDICTIONS
    if answers.exists():
        yield RIGHT, as_digits(list(read_correct(answers).values()))
    if (controls := Path(suite.jobs[key].out) / CONTROLS).exists():
        yield EDITED, edited(read_json(controls))
    if key[0] not in suite.runs and (seconds := trained_seconds(Path(suite.jobs[key].out))) is not None:
        yield TRAINED, round(seconds, 1)


def edited(controls: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return of controls.json the accuracy under each edit of the latents, or of the steps that a method writes."""
    found = {one["control"]: one for one in controls["controls"]}
    if (written := controls.get("written_steps")) is not None:
        found = {"hidden": written["early"]["0.0"], "noise": written["mistaken"], "shuffled": written["exchanged"]}
    kept = ("accuracy", "same_answers", "donor_answers")
    return {name: {key: one[key] for key in kept if one.get(key) is not None} for name, one in found.items()}


def trained_seconds(run: Path) -> float | None:
    """Return how long the stages of a run took to train, without what an interruption cost; None: it does not say."""
    found: list[float] = []
    for file in (run / METRICS, *sorted(run.glob(f"stages/*/{METRICS}"))):
        with suppress(OSError, ValueError):
            found += [row["train_runtime"] for row in map(json.loads, read_lines(file)) if "train_runtime" in row]
    return sum(found) if found else None


def as_digits(right: Sequence[bool]) -> str:
    """Write which rows are right as hexadecimal digits, four rows each, the first row being the highest bit."""
    bits = "".join("01"[one] for one in right)
    return "".join(f"{int(bits[i : i + 4].ljust(4, '0'), 2):x}" for i in range(0, len(bits), 4))


def from_digits(digits: str, n: int) -> list[bool]:
    """Read which of ``n`` rows are right."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)
    return [bit == "1" for bit in bits[:n]]
