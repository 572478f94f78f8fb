"""Folders that are whole or as they were, and that say what was written into them.

A folder is written aside (`.NAME.innerloop.writing`), sealed by a manifest of its files, their sizes and checksums,
which is written last, and put in place of what an earlier one wrote; the files of others stay. A kill at any moment
leaves the old folder, or one that `settle` brings to its end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from innerloop.disk.files import NO_LINKS, flush, told, try_to_unlink, write_text
from innerloop.disk.names import check_folder

MANIFEST = "manifest.json"
WRITING, OLD = ".innerloop.writing", ".innerloop.old"  # end the names of what is written, and of what it replaces


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Give a new, empty folder; once the block has ended, it is sealed and put in the place of ``path``.

    Raises:
        InputError: it cannot be written; what was there is as it was.
    """
    path = check_folder(path, "the folder").resolve()
    aside, _ = beside(path)
    with told(f"could not save to {path}"):
        try:
            settle(path)
            clear(aside)
            aside.mkdir(parents=True)
            with _held(aside):
                yield aside
                seal(aside)
                _put(aside, path)
        except BaseException:
            clear(aside)
            raise


def place(written: Path, path: Path) -> None:
    """Seal a folder that was written elsewhere on the same disk, and put it in the place of ``path``."""
    aside, _ = beside(path)
    settle(path)
    clear(aside)
    written.rename(aside)
    with _held(aside):
        try:
            seal(aside)
        except BaseException:
            clear(aside)
            raise
        _put(aside, path)


def beside(path: Path) -> tuple[Path, Path]:
    """Return where a folder is written, and where what it replaces lies meanwhile."""
    return path.with_name(f".{path.name}{WRITING}"), path.with_name(f".{path.name}{OLD}")


def seal(folder: Path) -> None:
    """Write the manifest of a folder."""
    files = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name != MANIFEST:
            flush(file)
            files[name] = {"size": file.stat().st_size, "sha256": _digest(file)}
    write_text(folder / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the files that a folder's manifest lists, with what it says of each; None without a readable manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: dict(facts) for name, facts in files.items() if _is_inside(name)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def is_changed(folder: Path, name: str) -> bool:
    """Tell whether a file has other contents than the manifest of its folder says; not where that says nothing."""
    facts = (manifest(folder) or {}).get(name)
    return facts is not None and (folder / name).is_file() and _digest(folder / name) != facts.get("sha256")


def damage(folder: Path) -> str | None:
    """Return what a folder lacks of that which was written into it, or what differs; None: it is whole."""
    files = manifest(folder)
    if files is None:
        return f"it has no {MANIFEST}"
    for name, facts in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.get("size"):
            return f"{name} has {file.stat().st_size} bytes, where {facts.get('size')} were written"
        if _digest(file) != facts.get("sha256"):
            return f"{name} is not what was written"
    return None


def remove(folder: Path, also: Sequence[str] = ()) -> None:
    """Remove what was written into a folder, and the folder where nothing of others is in it."""
    for name in (*own_files(folder), *also, MANIFEST):  # the manifest last: a kill leaves what can be removed
        try_to_unlink(folder / name)
    _remove_empty(folder)


def own_files(folder: Path) -> list[str]:
    """Return the names of the files that were written into a folder and are there, but for its manifest."""
    root = folder.resolve()
    found = (name for name in manifest(folder) or () if (folder / name).is_file() and name != MANIFEST)
    return [name for name in found if (folder / name).parent.resolve().is_relative_to(root)]


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or where the disk cannot do that, a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target)


def settle(path: Path) -> None:
    """Bring what a killed process has left beside a folder to its end: the new one is put in place, or the old one."""
    aside, replaced = beside(path)
    if is_unsettled(path):
        with _held(aside):  # not while another process is at it
            if is_unsettled(path) and manifest(aside) is not None:
                _finish(aside, path, replaced)
    if replaced.is_dir() and not path.exists():
        replaced.rename(path)
    clear(replaced)


def settle_all(parent: Path) -> None:
    """Settle what killed processes have left in a folder beside the folders in it."""
    for left in [*parent.glob(f".*{WRITING}"), *parent.glob(f".*{OLD}")]:
        path = left.with_name(left.name[1:].removesuffix(WRITING).removesuffix(OLD))
        if left.is_dir() and not left.is_symlink() and path.name:
            settle(path)
            clear(beside(path)[0])


def is_unsettled(path: Path) -> bool:
    """Tell whether a process was killed while it put a folder in place, or just before."""
    if not path.name:  # the root
        return False
    aside, replaced = beside(path)
    return not aside.is_symlink() and aside.is_dir() and (replaced.is_dir() or not path.exists())


def clear(path: Path) -> None:
    """Remove a folder or file where that can be done; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try_to_unlink(path)


def _put(aside: Path, path: Path) -> None:
    """Put a sealed folder in place: by two renames, or file by file where others' files are in the old one."""
    _, replaced = beside(path)
    own = {*own_files(path), MANIFEST}
    others = [file for file in _files(path) if file not in own] if path.is_dir() else []
    if others:
        _put_among(aside, path, replaced)
    else:
        if path.exists():
            path.rename(replaced)
        try:
            aside.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    flush(path.parent)
    clear(replaced)


def _put_among(aside: Path, path: Path, replaced: Path) -> None:
    """Put a sealed folder's files, its manifest last, in place of a folder's own; all of them, or none."""
    new = [*(manifest(aside) or ()), MANIFEST]
    old = [name for name in dict.fromkeys([*own_files(path), *new]) if (path / name).is_file()]
    moved = list[tuple[Path, Path]]()
    replaced.mkdir()
    try:
        for name in old:
            moved.append(_move(path / name, replaced / name))
        for name in new:
            moved.append(_move(aside / name, path / name))
    except OSError:
        for source, target in reversed(moved):
            _move(target, source)
        clear(replaced)
        raise
    clear(aside)


def _finish(aside: Path, path: Path, replaced: Path) -> None:
    """Go on where a killed process stopped putting a sealed folder in place."""
    if not path.exists():
        aside.rename(path)
        return
    new = [*(manifest(aside) or ()), MANIFEST]
    for name in {*own_files(path), *own_files(replaced)} - {*new}:
        try_to_unlink(path / name)
    for name in new:
        if (aside / name).is_file():
            _move(aside / name, path / name)
    clear(aside)


def _move(source: Path, target: Path) -> tuple[Path, Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
    return source, target


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir() or file.is_symlink()]


def _remove_empty(folder: Path) -> None:
    """Remove a folder and those inside it, as far as they are empty."""
    for inner in sorted((f for f in folder.rglob("*") if f.is_dir()), reverse=True):
        _try_rmdir(inner)
    _try_rmdir(folder)


def _try_rmdir(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and str(path) == name


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a folder, and keep it from others until the end of the block."""
    try:
        handle = os.open(folder, os.O_RDONLY | NO_LINKS)
    except FileNotFoundError:  # it has just been put in place
        yield
        return
    try:
        with suppress(OSError):  # a disk that knows no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
