"""The verb that trains a recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, fields
from inspect import get_annotations, getdoc
from shlex import join
from typing import Any

from docstring_parser import parse as parse_docstring

from innerloop.cli.arguments import console
from innerloop.config.typed import field_parser, field_types, groups
from innerloop.errors import InputError, nearest
from innerloop.train.recipe import load_recipe


def train(recipe: str, resume: bool = False, overrides: Sequence[str] = ()) -> None:
    """Train a recipe; every field can be overridden: --section.field value. RECIPE --help lists them.

    Args:
        recipe: a YAML recipe.
        resume: go on where an earlier run of the same folder was interrupted.
        overrides: fields of the recipe, written --section.field value.
    """
    loaded = load_recipe(recipe, overrides)  # refused before what is slow to import
    from innerloop.train.callbacks import LiveProgress
    from innerloop.train.run import FINISHED, run_recipe

    folder = run_recipe(loaded, resume, lambda stage, title: [LiveProgress(title, console)])
    if not (folder / FINISHED).exists():
        raise InputError(f"interrupted; go on with: {join(['innerloop', 'train', recipe, *overrides, '--resume'])}")
    console.print(f"the trained model is in {folder}; next: {join(['innerloop', 'eval', str(folder)])}", soft_wrap=True)


def fields_help(recipe: str, path: str = "", overrides: Sequence[str] = ()) -> str:
    """Return the fields that a recipe takes: those of its method, or of the section or group at a dotted path."""
    loaded = load_recipe(recipe, overrides)
    from innerloop.train.algorithms import arguments_class
    from innerloop.train.training_arguments import LatentTrainingArguments

    sections: dict[str, Any] = {"task": loaded.task, "backbone": loaded.backbone, "method": loaded.method}
    sections["train"] = arguments_class(loaded.train)
    name, *inner = (path or "method").split(".")
    if name not in sections:
        raise InputError(f"--help {path}: a recipe has no section '{name}'{nearest(name, sections)}")
    at: Any = _class_of(sections[name])
    for group in inner:
        if group not in groups(at):
            raise InputError(f"--help {path}: '{at.__name__}' has no group '{group}'{nearest(group, groups(at))}")
        at = groups(at)[group]
    if issubclass(at, LatentTrainingArguments):
        return _train_help(at)
    lines = [field_parser(at, f"{path or 'method'}.").format_help().rstrip()]
    lines += [_line(f"{path or 'method'}.{group}", cls) for group, cls in groups(at).items()]
    if not path:
        lines += ["", *(_line(other, _class_of(value)) for other, value in sections.items() if other != "method")]
        command = join(["innerloop", "train", recipe, "--help"])
        lines += ["", f"{command} method.GROUP, or --help task, says what these are."]
    return "\n".join(lines)


def _train_help(arguments: type) -> str:
    """Return what the train section takes: our own fields with what they say, transformers' by name and default."""
    from innerloop.train.training_arguments import LatentTrainingArguments

    own = [param for cls in (LatentTrainingArguments, arguments) for param in parse_docstring(getdoc(cls) or "").params]
    said = {param.arg_name: " ".join((param.description or "").split()) for param in own}
    lines, theirs = ["train:"], []
    for field in fields(arguments):
        default = "null" if field.default is None else "" if field.default is MISSING else str(field.default)
        if field.name in said:
            told = f"--train.{field.name}  {said[field.name].rstrip('.')} (default: {default})"
            lines += textwrap.wrap(told, 100, initial_indent="  ", subsequent_indent=" " * 24)
        elif field.init and field.name not in ("output_dir", "per_device_train_batch_size"):
            theirs.append(f"{field.name}={default}")
    names = textwrap.wrap(", ".join(theirs), 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join([*lines, "", "--train.FIELD of transformers' TrainingArguments, which documents them:", *names])


def _class_of(section: Any) -> type:
    return section if isinstance(section, type) else type(section)


def _line(path: str, cls: type) -> str:
    """Return a section or group as one line."""
    names = get_annotations(cls) if path == "train" else field_types(cls)
    return f"  --{path}.FIELD".ljust(28) + "  " + textwrap.shorten(", ".join(names), 86, placeholder=" ..")
