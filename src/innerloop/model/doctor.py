"""What a folder is, whether it is whole, and with which tools it can be used; no weights are loaded, no pickle opened.

print(examine("runs/chain/codi").kind)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import join
from typing import Any

from innerloop.disk.folders import MANIFEST, damage, is_unsettled, manifest
from innerloop.disk.names import check_folder
from innerloop.errors import InputError, few
from innerloop.formats.opened import Format
from innerloop.formats.recognise import released
from innerloop.formats.source import Source
from innerloop.methods import method_named
from innerloop.model.run_folder import PARTS, RECIPE, RUN_CHECKPOINT, SETTINGS, read_settings

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HAS_ALL = "transformers, vLLM, lm-eval and others that open Hugging Face folders"


@dataclass
class Findings:
    """What was found in a folder.

    Attributes:
        folder: where the model lies, which in a run is its checkpoint.
        kind: what it is, in words.
        facts: what is in it: name and value, in order.
        problems: why it is not whole.
        tools: what can be done with it, and with which tools.
    """

    folder: Path
    kind: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    tools: list[str] = field(default_factory=list)


def examine(path: str | Path) -> Findings:
    """Look at a folder: a run, a saved model, released weights or any Hugging Face model.

    Raises:
        InputError: there is no such folder.
    """
    folder = check_folder(path, "the folder")
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: doctor looks at folders on this disk")
    own = folder / RUN_CHECKPOINT
    found, known = Findings(own if (own / SETTINGS).exists() else folder), None
    if is_unsettled(found.folder.resolve()):
        found.problems.append("a save was killed while it was put in place: loading the folder finishes it")
    if (found.folder / SETTINGS).exists():
        _own(found)
    elif (known := _format_of(found.folder)) is not None:
        found.kind = f"released weights: {known[0].name}"
        found.problems += [f"{name} is missing" for name in known[0].missing(known[1])]
        found.tools = [
            "innerloop, as it is",
            f"{join(['innerloop', 'convert', str(folder), 'OUT'])} writes a folder for other tools",
        ]
    elif (found.folder / "adapter_config.json").exists():
        found.kind, found.tools = "a PEFT adapter", ["peft, on its base model; innerloop once it has been merged"]
    elif (found.folder / "config.json").exists():
        found.kind = "a Hugging Face model"
        found.tools = [HAS_ALL, "innerloop, with a method: --method NAME"]
    elif (folder / RECIPE).exists():
        found.kind = "a run that has not finished"
        go_on = join(["innerloop", "train", str(folder / RECIPE), "--resume", "true"])
        found.problems.append(f"it has no {RUN_CHECKPOINT}/ yet: {go_on}")
        return found
    else:
        found.kind = "no model"
        found.problems.append(f"it has neither config.json nor {SETTINGS}")
        return found
    _look_at_files(found, known is not None and known[0].is_mended)
    return found


def _format_of(folder: Path) -> tuple[Format, Source] | None:
    """Return the format of released weights, and where they lie; of a folder that cannot be read, none."""
    with suppress(InputError, OSError, ValueError):
        return released(folder)
    return None


def _own(found: Findings) -> None:
    """Look at a folder that innerloop has saved."""
    found.kind = "a model saved by innerloop"
    try:
        settings = read_settings(found.folder)
    except InputError as error:
        found.problems.append(str(error))
        return
    name = str(settings["method"]["name"])
    found.kind = f"a run: the method {name}"
    found.facts |= {key: str(settings[key]) for key in ("innerloop", "format", "seed", "stage") if key in settings}
    if isinstance(best := settings.get("validation"), dict) and "accuracy" in best:
        found.facts["validation"] = f"{best['accuracy']:.1%} of {best.get('n', '?')}, step {best.get('step', '?')}"
    try:
        method: Any = method_named(name)
        found.facts["paper"] = method.paper
    except InputError as error:
        found.problems.append(str(error))
    run = found.folder.parent if found.folder.name == RUN_CHECKPOINT else found.folder
    if (run / RECIPE).is_file():
        found.facts["recipe"] = f"{join(['innerloop', 'train', str(run / RECIPE)])} --out OUT trains it again"
    if not (found.folder / PARTS).exists():
        found.problems.append(f"{PARTS} is missing")
    verbs = "ask, eval, lens, bench, calibrate, serve, push"
    found.tools.append(f"innerloop: {verbs}; Python: innerloop.LatentModel.from_pretrained")
    found.tools += _plain_tools(found.folder)


def _plain_tools(folder: Path) -> Iterator[str]:
    """Say what plain transformers does with a folder of ours, and all others."""
    told = str(_json(folder / "generation_config.json").get("innerloop", ""))
    thought = _json(folder / "custom_generate/thought.json")
    if thought and not told:
        yield f"{HAS_ALL}: it writes its steps as text"
        return
    if thought:
        yield "transformers, with the thought: generate(..., custom_generate=FOLDER, trust_remote_code=True)"
    yield f"{HAS_ALL}: without the thought, and without a word of it" + ("" if thought else f"; {told}" * bool(told))


def _look_at_files(found: Findings, is_mended: bool) -> None:
    """Look at configuration, tokenizer, weights and what the manifest says of all."""
    folder = found.folder
    config = _json(folder / "config.json")
    if is_mended and not config:
        found.facts["config.json"] = "says nothing; sizes are read off the weights, the rest is known of the base"
    elif not config and (folder / "config.json").exists():
        found.problems.append(f"config.json {_wrong_json(folder / 'config.json')}")
    found.facts |= {"architecture": str(config["model_type"])} if "model_type" in config else {}
    if "auto_map" in config:
        found.facts["code"] = "it comes with code of its own, which runs with trust_remote_code alone"
    has_tokenizer = any((folder / name).exists() for name in TOKENIZERS)
    if is_mended and not has_tokenizer:
        found.facts["tokenizer"] = "none here; that of the base is loaded by its name"
    elif not has_tokenizer:
        found.problems.append(f"it has no tokenizer ({', '.join(TOKENIZERS[:2])}, ..)")
    _weights(found)
    if pickles := [file.name for file in _pickles(folder)]:
        found.facts["pickles"] = f"{few(pickles)}: not opened; innerloop reads them as plain weights, or not at all"
    if manifest(folder) is None and (folder / SETTINGS).exists():
        found.problems.append(f"it has no {MANIFEST}, which a save writes last")
    elif manifest(folder) is not None and (problem := damage(folder)):
        found.problems.append(problem)
    elif manifest(folder) is not None:
        found.facts["checksums"] = f"all {len(manifest(folder) or ())} files are as they were written"


def _weights(found: Findings) -> None:
    """Count the weights of the model and of the method by the headers of their files."""
    folder = found.folder
    files = sorted(file for file in folder.glob("*.safetensors") if file.name != PARTS)
    listed = Source(folder).weight_files
    if missing := [file.name for file in listed if not file.is_file()]:
        found.problems.append(f"{few(missing)} is missing, which the index of the weights lists")
    if not files and not listed and not _pickles(folder):
        found.problems.append("it has no weights")
    for title, group in (("weights", files), ("of the method", [p for p in [folder / PARTS] if p.exists()])):
        numbers, kinds = 0, set[str]()
        for file in group:
            try:
                header = _header(file)
            except (OSError, ValueError, KeyError, TypeError):
                found.problems.append(f"{file.name} is no whole safetensors file: copy it again")
                continue
            numbers += sum(math.prod(one["shape"]) for one in header.values())
            kinds |= {str(one["dtype"]) for one in header.values()}
        if group:
            found.facts[title] = f"{numbers:,} numbers{' as ' + ', '.join(sorted(kinds)) if kinds else ''}"


def _pickles(folder: Path) -> list[Path]:
    """Return the files that are pickles by their names, those without an ending among them that hold weights."""
    listed = [file for file in Source(folder).weight_files if file.suffix != ".safetensors" and file.is_file()]
    return sorted({*listed, *(file for file in folder.iterdir() if file.suffix in PICKLES and file.is_file())})


def _header(file: Path) -> dict[str, Any]:
    """Return what the header of a safetensors file says of each tensor; a file that is cut short is refused."""
    with file.open("rb") as opened:
        n = int.from_bytes(opened.read(8), "little")
        if n > file.stat().st_size:
            raise ValueError("cut short")
        header = json.loads(opened.read(n))
    header.pop("__metadata__", None)
    if 8 + n + max((one["data_offsets"][1] for one in header.values()), default=0) != file.stat().st_size:
        raise ValueError("cut short")
    return dict(header)


def _wrong_json(path: Path) -> str:
    """Say what is wrong with a file that should hold settings."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "is not valid JSON"
    return "holds no settings"


def _json(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing where it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
