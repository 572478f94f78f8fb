"""Which format a folder or a Hub model has; what cannot be told from settings and names of tensors is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from innerloop.formats import codi, huginn, latent_tts, llada, lotus, ouro, parscale, qwen, retrofit, simcot, tah
from innerloop.formats.bases import HUB
from innerloop.formats.opened import Format
from innerloop.formats.source import Source

FORMATS: tuple[Format, ...] = (
    *(llada.FORMAT, qwen.DREAM, qwen.A2D_MODELS),
    *(latent_tts.FORMAT, codi.FORMAT, simcot.FORMAT, lotus.FORMAT),
    *(ouro.FORMAT, huginn.FORMAT, retrofit.FORMAT, parscale.FORMAT, tah.FORMAT),
)
SETTINGS = ["config.json", "tokenizer_config.json", "added_tokens.json", "tah_config.json", "*.index.json"]
FILES = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.model", "checkpoint_*"]  # what may be needed, and no code
OWN, PICKLE = "innerloop.json", "pytorch_model.bin"


def format_of(source: Source) -> Format | None:
    """Return the format of a source, None where it has none of these."""
    if (source.folder / OWN).exists():
        return None
    return next((one for one in FORMATS if one.recognises(source)), None)


def released(path: str | Path, **hub: Any) -> tuple[Format, Source] | None:
    """Return the format of a folder or a Hub model, and where its files lie; of a Hub model they are downloaded.

    Args:
        path: a folder or a Hub name.
        hub: revision, token, cache_dir, local_files_only.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = _downloaded(str(path), hub)
        if found is None:
            return None
        source = Source(found, str(path))
    else:
        source = Source(folder)
    known = format_of(source)
    return None if known is None else (known, source)


def _downloaded(name: str, hub: dict[str, Any]) -> Path | None:
    """Download a Hub model that may have one of the formats: settings first, and the rest where they are not enough."""
    from huggingface_hub import snapshot_download

    try:
        small = Path(snapshot_download(name, allow_patterns=SETTINGS, **hub))
        source = Source(small, name)
        if source.model_type and format_of(source) is None and not _may_be_a_pickle(source, hub):
            return None
        return Path(snapshot_download(name, allow_patterns=FILES, **hub))
    except Exception:  # no such model, no network: whoever loads it as any other model says so
        return None


def _may_be_a_pickle(source: Source, hub: dict[str, Any]) -> bool:
    """Tell whether a Hub model whose settings are those of a base has its weights in a pickle alone, as CODI's."""
    from huggingface_hub import list_repo_files

    if source.model_type not in HUB or hub.get("local_files_only"):
        return False
    files = list_repo_files(source.name, revision=hub.get("revision"), token=hub.get("token"))
    return PICKLE in files and not any(name.endswith(".safetensors") for name in files)
