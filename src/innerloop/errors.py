"""What a user can mend: one exception, and one warning, which the command line prints as one sentence each."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""


class InputNote(UserWarning):
    """Something the user gave can be used, but not as it may be meant; the command line prints it as a note."""


class UnreadWarning(InputNote):
    """Something that lies where a model is loaded from is not read, or not as it was saved; the message names it."""


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and how many there are more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or an empty string."""
    close = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def refuse(*problems: tuple[bool, str]) -> None:
    """Raise the message of the first problem that is there."""
    for is_there, message in problems:
        if is_there:
            raise InputError(message)


def check_installed(what: str, extra: str, *modules: str) -> None:
    """Refuse what needs packages that are not there.

    Args:
        what: says what needs which, such as "probes need scikit-learn".
        extra: the extra of this package that brings them.
        modules: names that must be importable.
    """
    if any(find_spec(module) is None for module in modules):
        raise InputError(f"{what}: pip install 'innerloop[{extra}]'")
