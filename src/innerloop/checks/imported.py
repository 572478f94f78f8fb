"""What lies outside the package and is named by its import path, as ``my_package.module.Thing``."""

from importlib import import_module
from typing import Any

from innerloop.errors import InputError


def imported(what: str, path: str) -> Any:
    """Return what an import path names; it must be on PYTHONPATH, and no folder of a run is looked into.

    Args:
        what: how it is called in an error, such as ``method 'my_package.Breath'``.
        path: the import path.

    Raises:
        InputError: its module cannot be imported, or has nothing of that name.
    """
    module, _, last = path.rpartition(".")
    try:
        found = getattr(import_module(module), last, None)
    except ImportError as error:
        raise InputError(f"{what}: cannot import {module} ({error}); is it on PYTHONPATH?") from None
    if found is None:
        raise InputError(f"{what}: {module} has no '{last}'")
    return found
