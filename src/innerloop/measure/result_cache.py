"""What has been measured is kept part by part, so that a measurement that was interrupted goes on where it was.

    cache = ResultCache(folder / PARTS, made_of(model, task, "test", examples, options))
    value = cache("shuffled", lambda: {"accuracy": ...})      # measured, and kept; the next time, taken from the file

A part is one accuracy, one control, one number of loops, one swap, some answers, ... as JSON has it. It is taken only
where all that decides it is the same: weights, method, tokens, task, examples, options, seed, versions and device.
Parts of other options stay in the file beside them; those of other weights or versions are gone with the next one that
is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from innerloop.disk.files import try_to_unlink, write_text
from innerloop.engine.latent_model import LatentModel
from innerloop.measure.accuracy import device_name, versions
from innerloop.model import checkpoint
from innerloop.model.frozen import fingerprint
from innerloop.tasks import Task
from innerloop.text.codec import from_json, to_json
from innerloop.text.examples import Example

PARTS = "parts.json"
T = TypeVar("T")
LASTING = ("weights", "versions")  # what was measured with others is never asked for again


class ResultCache:
    """Parts of a measurement, kept in a file as soon as they are known.

    Args:
        path: the file; None: they are kept in memory alone.
        made_of: everything that decides them, as JSON has it.
        fresh: start over, whatever was measured before.

    Attributes:
        begins: told the name of each part before it is measured.
    """

    def __init__(self, path: Path | None = None, made_of: Mapping[str, Any] | None = None, fresh: bool = False):
        self.path, self.made_of = path, json.loads(json.dumps(made_of or {}))
        self.begins: Callable[[str], None] = lambda name: None
        entries = [] if path is None else _entries(path)
        own = [e["parts"] for e in entries if e["made_of"] == self.made_of]
        self.others = [e for e in entries if e["made_of"] != self.made_of and self._may_be_asked_for(e["made_of"])]
        self.known: dict[str, Any] = {} if fresh or not own else own[0]

    def __contains__(self, name: str) -> bool:
        return name in self.known

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a part as JSON has it: what was kept, or what is measured now."""
        if name not in self.known:
            self.begins(name)
            value = json.loads(json.dumps(measure()))
            self.known[name] = value
            self._write()
        return self.known[name]

    def value(self, cls: type[T], name: str, measure: Callable[[], T]) -> T:
        """Return a part of a type: what was kept, or what is measured now."""
        return from_json(cls, self(name, lambda: to_json(measure())))

    def missing(self, names: Sequence[str]) -> list[str]:
        """Return those of some parts that have not been measured."""
        return [name for name in names if name not in self.known]

    def forget(self) -> None:
        """Remove the file: what it is for is done."""
        if self.path is not None:
            try_to_unlink(self.path)

    def _may_be_asked_for(self, made_of: Mapping[str, Any]) -> bool:
        return all(made_of.get(name) == self.made_of.get(name) for name in LASTING)

    def _write(self) -> None:
        if self.path is not None:
            entries = [*self.others, {"made_of": self.made_of, "parts": self.known}]
            write_text(self.path, json.dumps(entries, ensure_ascii=False) + "\n")


def _entries(path: Path) -> list[dict[str, Any]]:
    """Return what a file holds; nothing where it cannot be read, as all of it can be measured again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [{"made_of": dict(entry["made_of"]), "parts": dict(entry["parts"])} for entry in found]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def made_of(
    model: LatentModel,
    task: Task,
    split: str,
    examples: Sequence[Example],
    options: Mapping[str, Any],
    seed: int = 0,
) -> dict[str, Any]:
    """Return everything that decides what is measured of a model on some examples.

    Args:
        model: the model; its weights are hashed, which takes about a second for each gigabyte.
        task: what extracts and checks answers.
        split: whose examples these are.
        examples: what is asked.
        options: how it is asked: tokens, rows per batch, stage, loops.
        seed: of what the measurement draws.
    """
    return of_model(model) | {
        "task": {"name": task.name, "version": task.version, **asdict(task)},
        "split": split,
        "examples": digest_of(examples),
        "options": dict(options),
        "seed": seed,
    }


def of_model(model: LatentModel) -> dict[str, Any]:
    """Return everything about a model, and what runs it, that decides its answers."""
    vocabulary = sorted(model.tokenizer.get_vocab().items())
    return {
        "weights": fingerprint(model),
        "method": checkpoint.method_settings(model.method),
        "tokens": digest(vocabulary),
        "versions": versions(),
        "device": device_name(model.device),
    }


def digest_of(examples: Sequence[Example]) -> str:
    """Return a hash of examples: what is asked, in which steps it is solved, and the answer."""
    return digest([[e.id, e.question, list(e.steps), e.answer] for e in examples])


def digest(value: Any) -> str:
    """Return a hash of anything that JSON has."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
