"""Recipes: one YAML form for every method, typed by the same dataclasses that the Python interface uses.

    task: {name: chain, n_ops: 5}
    backbone: {scratch: {type: llama, hidden_size: 64, num_hidden_layers: 2}}   # or {model: NAME, lora: {r: 16}}
    method: {name: slr, n_slots: 4}
    train: {learning_rate: 1.0e-3, max_steps: 2000, batch_size: 64, seed: 0}
    out: runs/chain-slr

A recipe of several stages lists them; each overrides a part, and starts from the weights of the one before:

    stages:
      - {method: {name: cot}, train: {max_steps: 400}}
      - {method: {name: coconut, max_stage: 3}}
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from innerloop.checks.settings import Checked
from innerloop.checks.values import Count
from innerloop.config.reading import read_yaml
from innerloop.config.typed import field_names, filled, merged, named, typed
from innerloop.decoder.adapters import MarkerInit
from innerloop.disk.files import write_text
from innerloop.disk.names import check_folder
from innerloop.errors import InputError, nearest
from innerloop.methods import Method, method_named, name_of
from innerloop.tasks import Task, named_as, task_named
from innerloop.text.wording import Chat

SECTIONS = ("task", "backbone", "method", "train", "out", "stages")
NAMED = ("task", "method")
BARE = {"task": "name", "method": "name", "backbone": "model"}  # the field that a section is, where it is a bare name
CONFIG = "config.yaml"  # the recipe of a run, in its folder


@dataclass(frozen=True)
class BackboneChoice(Checked):
    """Which decoder a recipe trains: one made from scratch, or a model or run to start from.

    Args:
        scratch: make one with fresh weights: its transformers model ``type`` and fields of its configuration.
        model: folder, run or Hub name to start from.
        lora: train low-rank updates instead of all weights: fields of peft's LoraConfig, such as r and lora_alpha.
        freeze: train nothing of the backbone but the embeddings of markers; see also train.unfreeze_after.
        dtype: type of the weights.
        attention: which kernels compute attention; None: as transformers chooses.
        marker_init: what the rows of new markers start from: the row of << (token), the mean row, or normal draws.
        vocab_size: the most words of the tokenizer that a scratch backbone gets from the training data.
        trust_remote_code: let the model's own code run.
        chat: ask the model through its chat template (true), with bare questions (false), or as a chat if it has a
            template (auto). A run goes on as it was trained.
    """

    scratch: dict[str, Any] | None = None
    model: str | None = None
    lora: dict[str, Any] | None = None
    freeze: bool = False
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    marker_init: MarkerInit = "token"
    vocab_size: Count = 8192
    trust_remote_code: bool = False
    chat: Chat = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.scratch is None) == (self.model is None):
            raise InputError("backbone: give either 'scratch: {type: llama, ...}' or 'model: NAME_OR_PATH'")
        if self.freeze and self.lora is not None:
            raise InputError("backbone.freeze trains the method's parts alone, backbone.lora more: give one of them")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, how, and where to put it. ``stages`` are complete recipes, in order."""

    task: Task
    backbone: BackboneChoice
    method: Method
    train: dict[str, Any]
    out: str
    stages: tuple[Recipe, ...] = field(default=())

    def with_paths(self) -> Recipe:
        """Return the recipe with ``{out}`` in the method's fields (its teacher, ..) replaced by the run's folder."""
        return replace(self, method=filled(self.method, "{out}", self.out))

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as it would be written, every field spelled out."""
        sections: dict[str, Any] = {
            "task": {"name": named_as(self.task), **asdict(self.task)},
            "backbone": asdict(self.backbone),
            "method": {"name": name_of(self.method), **asdict(self.method)},
            "train": dict(self.train),
            "out": self.out,
        }
        if not self.stages:
            return sections
        stages = [{name: value for name, value in s.as_dict().items() if name != "out"} for s in self.stages]
        return {**sections, "train": {}, "stages": stages}

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        write_text(path, yaml.safe_dump(self.as_dict(), sort_keys=False))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as ``["--method.n_slots", "8", "--out=runs/x"]``.

    Raises:
        InputError: there is none, or something in it is wrong; the message names the file unless it may be an override.
    """
    raw = read_recipe(path, overrides)
    try:
        return parse_recipe(raw)
    except InputError as error:
        if overrides:
            raise
        raise InputError(f"{path}: {error}") from None


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file and apply overrides, without interpreting it."""
    path = check_folder(path, "the recipe")
    if not path.is_file():
        known = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise InputError(f"there is no recipe {path}{nearest(str(path), known)}")
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} holds no recipe: it must have the sections {', '.join(SECTIONS)}")
    for name, value in parse_overrides(overrides):
        set_field(raw, name, value)
    return raw


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """Split ``--a.b value`` and ``--a.b=value`` into (name, value) pairs; values are read as YAML."""
    pairs, rest = [], list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise InputError(f"cannot read '{name}': overrides are written --section.field value")
        name, has_value, value = name[2:].partition("=")
        if not has_value:
            if not rest:
                raise InputError(f"--{name} has no value; write --{name} VALUE")
            value = rest.pop(0)
        pairs.append((name, parse_value(value, f"--{name}")))
    return pairs


def parse_value(text: str, origin: str) -> Any:
    """Read a value written on the command line as YAML."""
    return read_yaml(text, origin)


def set_field(raw: dict[str, Any], name: str, value: Any) -> None:
    """Override one field.

    With stages, ``method`` means the last stage's and, where that goes on from the recipe's own method section, all
    stages' that do; ``train`` means every stage's, and ``stages.1.`` goes before the first's.
    """
    section, *path = name.split(".")
    if section not in SECTIONS:
        raise InputError(f"--{name}: a recipe has no '{section}'{_nearest_field(raw, name)}")
    stages = raw.get("stages") or []
    if section == "stages":
        if len(path) < 2 or not path[0].isdigit() or not 1 <= int(path[0]) <= len(stages):
            raise InputError(
                f"--{name}: write --stages.N.method.FIELD or --stages.N.train.FIELD, N from 1 to {len(stages)}"
            )
        targets, (section, *path) = [stages[int(path[0]) - 1]], path[1:]
    elif section == "method" and stages:
        targets = [*stages[-1:], *([raw] if _goes_on(raw, stages[-1]) else [])]
    else:
        targets = [raw, *(stage for stage in stages if section == "train" and "train" in stage)]
    for target in targets:
        if section == "backbone" and (path == ["model"] or (not path and isinstance(value, str))):
            target[section] = overridden(section, target.get(section), {"model": value})
            continue
        if not path:
            target[section] = _with_name(section, value)
            continue
        target[section], place = _with_name(section, target.get(section)), target
        for key in (section, *path[:-1]):
            place[key] = place.get(key) or {}
            place = place[key]
            if not isinstance(place, dict):
                raise InputError(f"--{name}: '{key}' is not a section")
        place[path[-1]] = value


def _nearest_field(raw: Mapping[str, Any], name: str) -> str:
    """Return the nearest of a recipe's fields to a name that lacks its section, or the nearest section."""
    first, dot, rest = name.partition(".")
    if near := nearest(first, SECTIONS) if dot else "":
        return near
    from innerloop.train.grpo_arguments import GrpoArguments  # slow to import

    known = {field.name: f"--train.{field.name}" for field in reversed(fields(GrpoArguments))}
    classes: list[tuple[str, type]] = []
    for part in (raw, *(raw.get("stages") or ())):
        for section, find in (("task", task_named), ("method", method_named)):
            with suppress(InputError, AttributeError):
                classes.append((section, find(str(_with_name(section, part.get(section)).get("name")))))
    for section, cls in [*classes, ("backbone", BackboneChoice)]:
        known |= {field.rpartition(".")[2]: f"--{section}.{field}" for field in reversed(field_names(cls))}
    known |= {section: section for section in SECTIONS}
    found = next(iter(get_close_matches(first, list(known), n=1, cutoff=0.5)), None)
    return "" if found is None else f" (did you mean '{known[found]}{dot}{rest}'?)"


def _goes_on(raw: Mapping[str, Any], stage: Mapping[str, Any]) -> bool:
    """Whether a stage's method is that of the recipe's own section, with other fields or none."""
    own, given = (_with_name("method", of.get("method") or {}) for of in (raw, stage))
    return bool(own) and given.get("name") in (None, own.get("name"))


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """Type a recipe: names become classes, fields are checked, stages are completed."""
    for name in raw:
        if name not in SECTIONS:
            raise InputError(f"a recipe has no section '{name}'{nearest(str(name), SECTIONS)}")
    for name in ("task", "backbone", "out"):
        if name not in raw:
            raise InputError(f"the recipe has no '{name}' section")
    listed = raw.get("stages") or []
    if not isinstance(listed, list) or not all(isinstance(stage, dict) for stage in listed):
        raise InputError("stages must be a list, each with a method and train section")
    if "method" not in raw and not listed:
        raise InputError("the recipe has no 'method' section, for example method: {name: cot}")
    stages = tuple(_parse_stage(raw, stage) for stage in listed)
    if stages:
        return Recipe(stages[-1].task, stages[0].backbone, stages[-1].method, stages[-1].train, str(raw["out"]), stages)
    return _parse_stage(raw, {})


def overridden(name: str, before: Any, value: Any) -> Any:
    """Return a section with the fields that a stage or variant gives it.

    Of another task or method none stay, and where a model takes the place of one from scratch, that goes.
    """
    before, value = (_with_name(name, section) for section in (before or {}, value))
    if not isinstance(before, dict) or not isinstance(value, dict):
        return value
    if value.get("name", before.get("name")) != before.get("name"):
        return value
    if name == "backbone" and value.get("model") is not None:
        before = {field: one for field, one in before.items() if field != "scratch"}
    return merged(before, value) if name in NAMED else {**before, **value}


def _with_name(name: str, section: Any) -> Any:
    """Return a section whose bare name is spelled out."""
    return {BARE[name]: section} if name in BARE and isinstance(section, str) else section


def _parse_stage(raw: Mapping[str, Any], stage: Mapping[str, Any]) -> Recipe:
    for name in stage:
        if name not in ("task", "backbone", "method", "train"):
            raise InputError(f"a stage overrides task, backbone, method or train, not '{name}'")
    sections = copy.deepcopy({name: value for name, value in raw.items() if name != "stages"})
    for name, value in stage.items():
        sections[name] = overridden(name, sections.get(name), value)
        if not isinstance(sections[name], dict):
            raise InputError(f"a stage's '{name}' must list fields, not {value!r}")
    if "method" not in sections:
        raise InputError("a stage has no 'method', and the recipe has none to fall back on")
    train = sections.get("train") or {}
    if not isinstance(sections["out"], str):
        raise InputError(f"out is {sections['out']!r}, but must be a folder's name")
    check_folder(sections["out"], "out")
    if not isinstance(train, dict):
        raise InputError("the train section must list training arguments, for example train: {max_steps: 1000}")
    return Recipe(
        task=named(sections["task"], "task", task_named),
        backbone=typed(BackboneChoice, _with_name("backbone", sections["backbone"]), "backbone"),
        method=named(sections["method"], "method", method_named),
        train=train,
        out=str(sections["out"]),
    )
