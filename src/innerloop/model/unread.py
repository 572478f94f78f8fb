"""What belongs to a model's folder, and is not read: it is named, as a model without it may be another one."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

from innerloop.disk.folders import MANIFEST, is_changed, manifest
from innerloop.errors import UnreadWarning, few

# What `transformers` reads, other formats of the same weights, and what innerloop writes.
KNOWN = re.compile(
    r"(model|pytorch_model|consolidated|adapter_model|innerloop)(-\d+-of-\d+|\.\d+)?\.(safetensors|bin|pth)|"
    r"(tf_model\.h5|flax_model\.msgpack|rust_model\.ot|training_args\.bin)|"
    r"(config|adapter_config|generation_config|tokenizer_config|processor_config|preprocessor_config)\.json|"
    r"custom_generate|onnx|original|coreml|openvino|metal"
)
OF_A_MODEL = re.compile(r".*(\.(safetensors|bin|pt|pth|ckpt|npz|h5|msgpack|pkl|pickle|gguf)|_config\.json)")


def unread_files(folder: Path) -> list[str]:
    """Return the files and folders inside a model's folder that hold weights or settings which nothing here reads."""
    written = {MANIFEST, *(manifest(folder) or ())}
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in written or KNOWN.fullmatch(path.name):
            continue
        names = (inner.name for inner in path.rglob("*")) if path.is_dir() else iter([path.name])
        if any(OF_A_MODEL.fullmatch(name) for name in names):
            found.append(f"{path.name}/" if path.is_dir() else path.name)
    return found


def tell_unread(path: str | Path, tensors: Iterable[str]) -> None:
    """Warn, in one line each, of a changed configuration, and of files and tensors of a model that are not read."""
    files = unread_files(Path(path)) if Path(path).is_dir() else []
    tensors = sorted(tensors)
    parts = [few(files)] if files else []
    parts += [f"the weights {few(tensors)}"] if tensors else []
    if Path(path).is_dir() and is_changed(Path(path), "config.json"):
        what = f"{path}/config.json is not the one that was saved with the weights; it is read as it is now"
        warnings.warn(what, UnreadWarning, stacklevel=2)
    if parts:
        warnings.warn(f"{path} also holds {' and '.join(parts)}, not read by innerloop", UnreadWarning, stacklevel=2)


def tell_chat(path: str | Path) -> None:
    """Say that a model is asked through its chat template."""
    told = f"{path} is asked through its chat template; chat: false asks bare questions"
    warnings.warn(told, UnreadWarning, stacklevel=2)
