"""Small seeded models of every recipe lose, answer and cost what tests/golden.json says."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden import VALUES, cases, measure

CASES = cases()
RECORDED = json.loads(VALUES.read_text())
TOLERANCE = 1e-6  # relative; other processors and numbers of threads give values that differ by 1e-13
ABSOLUTE = 1e-9
TRACED = {"delta": 1e-6, "score": 1e-6}  # recorded with seven digits


def differences(new: Any, old: Any, path: str = "", absolute: float = ABSOLUTE) -> Iterator[str]:
    """Yield where two values differ; numbers with a fraction may differ by rounding."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() ^ new.keys()):
            yield f"{path}/{name} is in one of them only"
        for name in old.keys() & new.keys():
            yield from differences(new[name], old[name], f"{path}/{name}", TRACED.get(name, absolute))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(new, old)):
            yield from differences(one, other, f"{path}[{i}]", absolute)
    elif isinstance(old, float) and isinstance(new, float):
        same = math.isclose(new, old, rel_tol=TOLERANCE, abs_tol=absolute) or (math.isnan(new) and math.isnan(old))
        if not same:
            yield f"{path}: {new!r}, recorded {old!r}"
    elif type(new) is not type(old) or new != old:
        yield f"{path}: {new!r}, recorded {old!r}"


@pytest.mark.parametrize("name", CASES)
def test_nothing_measured_has_changed(name: str) -> None:
    assert list(differences(measure(CASES[name], RECORDED[name]), RECORDED[name])) == []


def test_every_recorded_case_is_measured() -> None:
    assert CASES.keys() == RECORDED.keys()


def test_a_change_would_be_seen() -> None:
    old = {"loss": 1.0, "ids": ["3 4"], "score": [[0.5]], "loops": [2, 3]}
    assert list(differences({**old, "loss": 1.0 + 1e-8}, old)) == []
    changes = ({"loss": 1.00001}, {"ids": ["3 5"]}, {"score": [[0.501]]}, {"loops": [2, 2]}, {"loops": [2]}, {"new": 1})
    assert all(len(list(differences({**old, **change}, old))) == 1 for change in changes)
