"""Names that become folders: what cannot be one is refused here, before anything is written, and nowhere else."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any
from unicodedata import category

from innerloop.errors import InputError

MOST_BYTES = 230  # of a name; file systems take 255, and folders are written aside under longer names
MOST_IN_ALL = 3000  # of a path; systems take 4096, and folders are made below it
NO_LETTERS = ("Cc", "Cs", "Zl", "Zp")  # controls such as NUL, halves of a surrogate pair, line ends
UNSAFE = re.compile(r"[^\w.=+-]+", re.ASCII)  # what a shell or a file system may take for something else


def check_name(name: Any, what: str) -> str:
    """Return a name if it can be that of one folder below another; ``what`` says in messages whose name it is."""
    if not isinstance(name, str):
        raise InputError(f"{what} {name!r} is no text: write its name in quotes")
    if "/" in name or "\\" in name or name in ("", ".", ".."):
        raise InputError(f"{what} {name!r} would be a path: a name holds no / and no \\, and is not '', '.' or '..'")
    return _writable(name, what)


def check_folder(path: str | Path, what: str) -> Path:
    """Return a path if a file system can have it; ``what`` says in messages whose path it is."""
    for part in Path(path).parts:
        _writable(part, what)
    if len(str(path).encode()) > MOST_IN_ALL:
        raise InputError(f"{what} has {len(str(path))} letters, but a path can have {MOST_IN_ALL}: give a shorter one")
    return Path(path)


def folder_name(name: str) -> str:
    """Return a name for a folder that a shell takes for one word: the name itself if it is, else a like one.

    Different names have different folders: what is changed or cut ends in a digest of the name.
    """
    plain = UNSAFE.sub("_", name)
    if plain == name and len(name) <= MOST_BYTES and name not in ("", ".", ".."):
        return name
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{plain[: MOST_BYTES - len(digest) - 1]}-{digest}"


def _writable(name: str, what: str) -> str:
    """Return a part of a path that can be written and printed as it is."""
    shown = repr(name if len(name) <= 60 else f"{name[:60]}…")
    if any(category(letter) in NO_LETTERS for letter in name):
        raise InputError(f"{what} {shown} holds a sign that cannot be printed: leave it out")
    if (size := len(name.encode())) > MOST_BYTES:
        raise InputError(f"{what} {shown} takes {size} bytes, but a name can have {MOST_BYTES}: choose a shorter one")
    return name
