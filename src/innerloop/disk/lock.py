"""One process writes a run: a lock file in its folder, which is also the mark that the folder is a run's.

The lock ends with the process that holds it, however that goes. What the file says (process, machine) is for people,
and for disks that know no locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from innerloop.disk.files import NO_LINKS, is_running, told, try_to_unlink
from innerloop.errors import InputError

MARK = ".run.lock"
INSIDE = ("checkpoint", "checkpoint-*", "stages")  # folders that a run writes, and replaces
_own: set[tuple[int, Path]] = set()  # folders that a process, not one that it forks, holds


@contextmanager
def locked(folder: str | Path, written: Sequence[str] = ()) -> Iterator[None]:
    """Be the only process that writes a run into a folder, which is made; what nothing was written to goes away again.

    Args:
        folder: the run's.
        written: patterns of the names that a run writes. Where such files lie in a folder that no run has marked, they
            are another's.

    Raises:
        InputError: another process holds it, it lies inside what another run writes, others' files are in the way, or
            it cannot be written to.
    """
    folder = Path(folder).resolve()
    own = (os.getpid(), folder)
    if own in _own:
        yield
        return
    mark = folder / MARK
    for run in folder.parents:
        first = folder.relative_to(run).parts[0]
        if any(fnmatch(first, name) for name in INSIDE) and (run / MARK).exists() and (os.getpid(), run) not in _own:
            raise InputError(
                f"{folder} lies inside {run / first}, which the run {run} writes: choose another with --out"
            )
    if not mark.exists() and (found := sorted(path for name in written for path in folder.glob(name))):
        raise InputError(
            f"{found[0]} was not written by a run of innerloop, and would be written over: choose another folder with "
            "--out, or move it away"
        )
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with told(f"cannot write a run to {folder}", "choose another folder with --out"):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(mark)
    _own.add(own)
    try:
        yield
    finally:
        _own.discard(own)
        if [path.name for path in folder.glob("*")] == [MARK]:
            try_to_unlink(mark)
        _remove_empty(made)
        os.ftruncate(handle, 0)
        os.close(handle)


def _take(mark: Path) -> int:
    """Lock the file, write into it who has it, and return its handle."""
    me = {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        handle = os.open(mark, os.O_RDWR | os.O_CREAT | NO_LINKS, 0o666)
        holder = _holder(handle)
        here = holder.get("host") == me["host"]
        is_gone = not holder or (here and not is_running(holder["pid"]))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = False
        except BlockingIOError:
            is_held = not (here and is_gone)  # a worker of a process that is gone may still have its lock
        except OSError:  # a disk that knows no locks
            is_held = not is_gone
        if is_held:
            os.close(handle)
            who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise InputError(
                f"{mark.parent} is being written by {who}: wait for its end, or choose another folder with --out (if "
                f"it is long gone, remove {mark})"
            )
        if _is_at(handle, mark):
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
            return handle
        os.close(handle)  # whoever had it has just removed the file


def _holder(handle: int) -> dict:
    """Return who has written a lock file last, and not left it empty."""
    try:
        found = json.loads(os.pread(handle, 4096, 0))
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (ValueError, TypeError, KeyError):
        return {}


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
