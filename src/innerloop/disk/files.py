"""Files that are whole or as they were: written aside, flushed to the disk, renamed; no link is followed.

write_text(path, text)
with replacing(path) as aside:      # for what a library writes
save_file(tensors, aside)
append(path, line)                  # logs alone, whose readers take a last line that was cut short
"""

from __future__ import annotations

import errno
import glob
import itertools
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from innerloop.disk.names import check_folder
from innerloop.errors import InputError

WRITING = ".writing"  # ends the names of what is written aside
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
HOST = re.sub(r"[^\w-]", "_", socket.gethostname())[:32]
HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room on the disk"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a folder that you may read and write"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files, with ulimit -n 4096"),
}
OF_TORCH = re.compile("PytorchStreamWriter|inline_container|iostream")
MOST_OF_NAME = 100  # letters of a file's name that are in the one beside it
_numbers = itertools.count()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a new, empty file; once the block has ended, it takes the place of ``path``, whose folder is made.

    Raises:
        InputError: it cannot be written: a full disk, no permission, no folder; what was there is as it was.
    """
    path = check_folder(path, "the file")
    prefix = f".{path.name[:MOST_OF_NAME]}.{HOST}-"
    aside = path.with_name(f"{prefix}{os.getpid()}-{next(_numbers)}{WRITING}")
    try:
        with told(f"could not write {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_left(path.parent, prefix)
            os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINKS, 0o666))
            yield aside
            flush(aside)
            os.replace(aside, path)
            flush(path.parent)
    except BaseException:
        try_to_unlink(aside)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def check_writable(folder: Path, hint: str) -> None:
    """Make a folder, and see that files can be written into it; else say ``hint``."""
    check_folder(folder, "the folder")
    with told(f"{folder} cannot be written to", hint):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def append(path: str | Path, text: str) -> None:
    """Add lines to a file; they begin on a line of their own where a kill has cut the last one short."""
    with told(f"could not write {path}"):
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINKS, 0o666)
        try:
            size = os.fstat(handle).st_size
            is_cut = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            data = (("\n" if is_cut else "") + text).encode()
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)


@contextmanager
def told(what: str, end: str = "what was there before is untouched") -> Iterator[None]:
    """Turn what a disk, or a library that writes to it, refuses into one sentence."""
    try:
        yield
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(f"{what}: {reason(error)}; {end}") from error
    except Exception as error:
        if type(error) is not Exception and not (isinstance(error, RuntimeError) and OF_TORCH.search(str(error))):
            raise  # tokenizers and torch have no errors of their own for a full disk
        raise InputError(f"{what}: {reason(error)}; {end}") from error


def reason(error: Exception) -> str:
    """Return why something could not be written, without the names of files that are none of the user's."""
    return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split()) or type(error).__name__


def of_the_machine(error: Exception) -> str | None:
    """Return a sentence about what the machine, not a library, refuses; None: it is something else."""
    hint = HINTS.get(error.errno or 0) if isinstance(error, OSError) else None
    return hint and f"{error.filename or 'a file'} cannot be used ({error.strerror}): {hint}"  # type: ignore[attr-defined]


def flush(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def try_to_unlink(path: Path) -> None:
    """Remove a file where that can be done."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _remove_left(folder: Path, prefix: str) -> None:
    """Remove what processes of this machine that are gone have left beside a file."""
    for left in folder.glob(f"{glob.escape(prefix)}*{WRITING}"):
        pid = left.name[len(prefix) :].partition("-")[0]
        if pid.isdigit() and not is_running(int(pid)):
            try_to_unlink(left)


def is_running(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
