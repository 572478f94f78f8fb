"""The verb that trains a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from innerloop.cli.arguments import console
from innerloop.errors import InputError
from innerloop.train.callbacks import LiveProgress
from innerloop.train.recipe import load_recipe
from innerloop.train.run import FINISHED, run_recipe


def train(recipe: str, resume: bool = False, overrides: Sequence[str] = ()) -> None:
    """Train a recipe; every field can be overridden: --section.field value.

    Args:
        recipe: a YAML recipe.
        resume: go on where an earlier run of the same folder was interrupted.
        overrides: fields of the recipe, written --section.field value.
    """
    loaded = load_recipe(recipe, overrides)
    folder = run_recipe(loaded, resume, lambda stage, title: [LiveProgress(title, console)])
    if not (folder / FINISHED).exists():
        raise InputError(f"interrupted; go on with: {' '.join(['innerloop train', recipe, *overrides, '--resume'])}")
    console.print(f"the trained model is in {folder}; next: innerloop eval {folder}", soft_wrap=True)
