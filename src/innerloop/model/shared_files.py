"""The files of a folder as others get them: the recipe among them, and nothing of the machine that trained it.

Paths of the machine are cut to names, and what says who trained is left out. The manifest tells of the files as shared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from innerloop.config.reading import read_yaml
from innerloop.disk.folders import MANIFEST, manifest, own_files
from innerloop.model.run_folder import RECIPE, SETTINGS, TELLING, identity_of

PATH = re.compile(r"(file://)?(/(?=[^/\s])|~[\w.-]*/|\.\./|[A-Za-z]:[\\/](?=[^\\/])|\\\\\w).*", re.DOTALL)
NAMES_ALONE = "# Of the machine that did there are names alone"
OF_PERSON = re.compile(r"(hub|push_to_hub|trackio)_.*|run_name|project")  # training arguments with names and secrets


def shared_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a saved folder that are shared by name: where they lie, or what is in them."""
    files: dict[str, Path | bytes] = {name: folder / name for name in (*own_files(folder), MANIFEST)}
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if (cleaned := without_machine(settings)) != settings:
        data = (json.dumps(cleaned, indent=2) + "\n").encode()
        facts = {**(manifest(folder) or {}), SETTINGS: {"size": len(data), "sha256": sha256(data).hexdigest()}}
        files |= {SETTINGS: data, MANIFEST: (json.dumps({"files": facts}, indent=1) + "\n").encode()}
    return files


def recipe_of(run: Path) -> dict[str, Any]:
    """Return the recipe of a run without what is of the machine; nothing where there is none."""
    path = run / RECIPE
    found = read_yaml(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else None
    return without_machine(found) if isinstance(found, dict) else {}


def recipe_text(run: Path) -> str:
    """Return config.yaml of a run as it is shared; nothing where it has none."""
    if not (recipe := recipe_of(run)):
        return ""
    text = (run / RECIPE).read_text(encoding="utf-8")
    cut = [name for name in _changed(read_yaml(text, RECIPE), recipe) if name != "out"]
    told = [line for line in text.split("\n") if line.startswith(NAMES_ALONE)]  # where it was shared before
    told = [f"{NAMES_ALONE}: give {', '.join(cut)} as they are on yours."] if cut else told
    lines = ["# How this model was trained; innerloop train config.yaml trains it again.", *told]
    return "\n".join(lines) + "\n" + yaml.safe_dump(recipe, sort_keys=False)


def result_text(result: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> str:
    """Return result.json as it is shared: as that of the model whose files these are."""
    own = (files[name] for name in TELLING)
    saved = identity_of(one if isinstance(one, bytes) else one.read_bytes() for one in own)
    return json.dumps({**without_machine(result), "saved": saved}, indent=2) + "\n"


def without_machine(value: Any, name: str = "") -> Any:
    """Return settings in which paths of the machine are cut to names, and nothing says who trained.

    Args:
        value: the settings.
        name: what they are called in those around them.
    """
    if isinstance(value, Mapping):
        kept = (key for key in value if name != "train" or not OF_PERSON.fullmatch(str(key)))
        return {key: without_machine(value[key], str(key)) for key in kept}
    if isinstance(value, list | tuple):
        return [without_machine(one) for one in value]
    return _named(value) if isinstance(value, str) else value


def _named(text: str) -> str:
    """Return the name of a path that says where things lie on a machine; other text as it is."""
    if PATH.fullmatch(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    home = Path.home()
    return re.sub(rf"{re.escape(str(home))}\b[^\s,;:]*", lambda at: Path(at[0]).name, text) if home.name else text


def _changed(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Yield the names of the settings, as the command line has them, that differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key, one in before.items():
            if key in after:
                yield from _changed(one, after[key], f"{name}.{key}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip(before, after), 1):
            yield from _changed(one, other, f"{name}.{number}")
    elif before != after:
        yield name
