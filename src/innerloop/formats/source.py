"""What lies where weights were released: settings, names of tensors, tensors. Nothing that lies there is run.

Names are read from the heads of safetensors files and need no torch; a pickle is read as tensors alone.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from innerloop.errors import InputError

if TYPE_CHECKING:  # slow to import
    from torch import Tensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are preferred
LONGEST_HEAD = 100_000_000  # bytes, as safetensors itself limits them


class Source:
    """A folder of released weights.

    Args:
        folder: where the files lie.
        name: what the model is called where it was released; by default the folder's name.
    """

    def __init__(self, folder: Path, name: str | None = None):
        self.folder = folder
        whole = folder.resolve()
        whole = whole.parent.parent if whole.parent.name == "snapshots" else whole  # as the Hub's cache has them
        self.name = whole.name if name is None else name
        self.pickles: list[str] = []  # that have been read

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json; empty where there is none, or where it holds no settings."""
        return self.settings("config.json")

    def settings(self, name: str) -> dict[str, Any]:
        """Return what a JSON file says; nothing where there is none, or where it is no mapping."""
        try:
            found = json.loads((self.folder / name).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def model_type(self) -> str:
        """What config.json calls the model's architecture."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that were added to the tokenizer's own, with their ids."""
        listed = self.settings("tokenizer_config.json").get("added_tokens_decoder")
        if isinstance(listed, dict):
            tokens = [{**one, "id": int(i)} for i, one in listed.items() if i.isdigit() and isinstance(one, dict)]
        else:  # large, so only where need be
            tokens = [one for one in self.settings("tokenizer.json").get("added_tokens") or () if isinstance(one, dict)]
        found = {str(one.get("content")): one["id"] for one in tokens if isinstance(one.get("id"), int)}
        return found | {name: i for name, i in self.settings("added_tokens.json").items() if isinstance(i, int)}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights; none where there are none."""
        for name in WEIGHTS:
            listed = self.settings(f"{name}.index.json").get("weight_map")
            if isinstance(listed, dict):
                return [self.folder / part for part in sorted({str(part) for part in listed.values()})]
            if (self.folder / name).is_file():
                return [self.folder / name]
            stem, end = name.split(".")
            if shards := sorted(self.folder.glob(f"{stem}-*-of-*.{end}")):
                return shards
        numbered = [path for path in self.folder.glob("checkpoint_*") if path.name[11:].isdigit() and path.is_file()]
        return sorted(numbered, key=lambda path: int(path.name[11:]))[-1:]  # Coconut's code counts epochs so

    def mentions(self, *beginnings: str) -> bool:
        """Tell whether tensors with each of some beginnings of names are there; of pickles, by their letters alone."""
        return all(any(beginning.encode() in head for head in self._heads) for beginning in beginnings)

    @cached_property
    def _heads(self) -> list[bytes]:
        return [_letters(path) for path in self.weight_files]

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name.

        Raises:
            InputError: there are none, a file is damaged, or a pickle holds more than tensors.
        """
        if not self.weight_files:
            raise InputError(f"{self.folder} holds no {' or '.join(WEIGHTS)}: copy the weights there")
        return {name: tensor for path in self.weight_files for name, tensor in self.tensors_in(path).items()}

    def tensors_in(self, path: Path) -> dict[str, Tensor]:
        """Return the tensors of one file."""
        if path.suffix == ".safetensors":
            return _safetensors(path)
        import torch

        found = self.unpickled(path)
        if not isinstance(found, dict) or not all(isinstance(one, torch.Tensor) for one in found.values()):
            raise InputError(
                f"{path} is a pickle that holds more than tensors by name: ask for the weights as safetensors"
            )
        return found

    def unpickled(self, path: Path) -> Any:
        """Return what a pickle holds, of which nothing but tensors, numbers, text and lists of them is made."""
        import torch

        self.pickles.append(path.name)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or malicious file leads to
            raise InputError(
                f"{path} is a pickle that cannot be read as tensors alone ({type(error).__name__}), and nothing in it "
                "was run: ask for the weights as safetensors"
            ) from None


def _letters(path: Path) -> bytes:
    """Return the part of a file of weights that spells the names of tensors, without reading it as anything."""
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                return file.read(min(int.from_bytes(file.read(8), "little"), LONGEST_HEAD))
        with ZipFile(path) as packed:
            name = next(name for name in packed.namelist() if name.endswith("data.pkl"))
            with packed.open(name) as file:
                return file.read(LONGEST_HEAD)
    except (OSError, StopIteration, BadZipFile):
        pass  # an older pickle, or damaged
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_HEAD)
    except OSError:
        return b""


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {str(error).partition(chr(10))[0]}") from None
