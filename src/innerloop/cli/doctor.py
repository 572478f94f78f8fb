"""The verb that looks at a folder."""

from __future__ import annotations

from innerloop.cli.arguments import console
from innerloop.errors import InputError


def doctor(folder: str) -> None:
    """Tell what a folder is, whether it is whole, and with which tools it can be used; nothing of it is run.

    Args:
        folder: a run, a saved model, released weights or any Hugging Face model, on this disk.
    """
    from innerloop.model.doctor import examine

    found = examine(folder)
    lines = [f"{found.folder}: {found.kind}", *(f"  {name}: {value}" for name, value in found.facts.items())]
    lines += ["it can be used with"] * bool(found.tools) + [f"  {tool}" for tool in found.tools]
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if found.problems:
        raise InputError(f"{found.folder} is not whole: {'; '.join(found.problems)}")
    console.print("it is whole")
