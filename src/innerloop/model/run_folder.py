"""Which folders are runs, and what they say of themselves; a wrong name is refused before anything slow is imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from innerloop.disk.files import told
from innerloop.disk.folders import MANIFEST, is_unsettled, settle
from innerloop.disk.names import check_folder
from innerloop.errors import InputError, nearest
from innerloop.formats.recognise import released

SETTINGS, PARTS = "innerloop.json", "innerloop.safetensors"
RECIPE = "config.yaml"  # how it was trained: of a run, beside its checkpoint; of what is shared, in it
FORMAT = 2  # of innerloop.json: how settings are spelled
OF_HUB = ("revision", "token", "cache_dir", "local_files_only")  # what downloads are told
SHARED = [RECIPE, "*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "custom_generate/*"]  # of a run on the Hub
TELLING = SETTINGS, MANIFEST  # of all files of a saved model
RUN_CHECKPOINT = "checkpoint"  # the folder of the best model inside a run


def read_settings(folder: Path) -> dict[str, Any]:
    """Read innerloop.json."""
    if not (folder / SETTINGS).exists():
        raise InputError(f"{folder} has no {SETTINGS}, so it is not a saved innerloop run")
    try:
        settings = json.loads((folder / SETTINGS).read_text())
    except ValueError as error:
        raise InputError(f"{folder / SETTINGS} is not valid JSON ({error}); restore it or save the run again") from None
    if not isinstance(settings, dict) or "name" not in (settings.get("method") or ()):
        raise InputError(f"{folder / SETTINGS} names no method; restore it or save the run again")
    return settings


def identity(path: str | Path) -> str | None:
    """Return what tells a saved model from one that takes its place, whatever the clock says; None: it is none."""
    folders = (Path(path) / RUN_CHECKPOINT, Path(path))
    folder = next((folder for folder in folders if (folder / SETTINGS).exists()), None)
    if folder is None:
        return None
    return identity_of((folder / name).read_bytes() for name in TELLING if (folder / name).exists())


def identity_of(parts: Iterable[bytes]) -> str:
    """Return the identity of a model by what is in the files TELLING, in that order."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def resolve(path: str | Path, **hub: Any) -> str | Path:
    """Return the checkpoint folder of a run, a model folder as it is, or a Hub name; a run on the Hub is downloaded.

    Args:
        path: a folder or a Hub name.
        hub: revision, token, cache_dir, local_files_only; others are passed over.

    Raises:
        InputError: it can only be a folder, and that does not exist or holds no model.
    """
    folder = check_folder(path, "the model's folder")
    for own in (folder.resolve(), folder.resolve() / RUN_CHECKPOINT):
        if is_unsettled(own):
            with told(f"cannot finish the save of {own} that was killed", "make its folder writable"):
                settle(own)
    if (folder / RUN_CHECKPOINT / SETTINGS).exists():
        return folder / RUN_CHECKPOINT
    if folder.is_dir():
        if not (folder / "config.json").exists() and released(folder) is None:
            raise InputError(
                f"{folder} holds no model and no finished run: it has neither config.json nor {RUN_CHECKPOINT}/"
            )
        return folder
    names = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    hint = nearest(folder.name, names)
    is_path = folder.is_absolute() or len(folder.parts) > 2 or str(path).startswith((".", "runs/", "models/"))
    if is_path or (hint and folder.parts[1:]):
        raise InputError(f"there is no folder {folder}{hint}")
    wanted = {name: value for name, value in hub.items() if name in OF_HUB and value is not None}
    shared = _shared(str(path), tuple(sorted(wanted.items()))) if len(folder.parts) == 2 else None
    return str(path) if shared is None else shared


@cache
def _shared(name: str, hub: tuple[tuple[str, Any], ...]) -> Path | None:
    """Download a run that was shared on the Hub; None: it is none, or cannot be reached, as whoever loads it says."""
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        hf_hub_download(name, SETTINGS, **dict(hub))
        return Path(snapshot_download(name, allow_patterns=SHARED, **dict(hub)))
    except Exception:  # as many kinds as there are ways for a network to fail
        return None


def check_own_code(asked: str | Path, method: str) -> None:
    """Refuse a run from the Hub whose method is none of ours: a stranger would say which module is imported.

    Args:
        asked: the folder or Hub name that was asked for.
        method: what innerloop.json calls the method.
    """
    if "." in method and not Path(asked).exists():
        raise InputError(
            f"{asked} reasons by a class of its author's own, {method}: have it on PYTHONPATH and give "
            "trust_remote_code=True if you trust it, or give the method yourself"
        )


def is_run(path: str | Path) -> bool:
    """Tell whether a folder was saved by innerloop, itself or as a run."""
    return (Path(resolve(path)) / SETTINGS).exists()


def says_method(path: str | Path) -> bool:
    """Tell whether a folder or a Hub model says itself how it reasons: a run, or released weights of a known format."""
    return is_run(path) or released(resolve(path)) is not None


def recorded(path: str | Path, name: str, default: Any = None) -> Any:
    """Return what a run's innerloop.json says of its training, such as ``seed`` and ``stage``."""
    folder = Path(resolve(path))
    return read_settings(folder).get(name, default) if (folder / SETTINGS).exists() else default
