"""Why a model cannot be loaded, where whoever gave it can mend that: one sentence for what fails deep inside."""

from __future__ import annotations

import traceback
from pathlib import Path

from safetensors import SafetensorError

from innerloop.errors import InputError, few
from innerloop.formats.source import Source
from innerloop.model.checkpoint import first_line

REMOTE_CODE = "transformers_modules"  # where transformers puts it
UNPICKLING = ("torch", "serialization.py")


def why(error: Exception, path: str | Path, trust_remote_code: bool) -> str | None:
    """Say why the model at a path cannot be loaded; None: it is nothing that whoever gave the model can mend."""
    if not trust_remote_code and "trust_remote_code" in str(error):
        return "it comes with code of its own; read that, and let it run with trust_remote_code: true"
    cause = error.__cause__ if isinstance(error, InputError) and isinstance(error.__cause__, Exception) else error
    places = [frame.filename for frame in traceback.extract_tb(cause.__traceback__)]
    if trust_remote_code and (isinstance(cause, ImportError) or any(REMOTE_CODE in place for place in places)):
        told = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        return f"the code that it comes with, which trust_remote_code let run, fails ({told})"
    if any(Path(place).parts[-2:] == UNPICKLING for place in places):
        names = few([file.name for file in Source(Path(path)).weight_files]) or "what holds its weights"
        return (
            f"{names} is a pickle that cannot be read as tensors alone ({type(error).__name__}), and nothing in it was "
            "run: ask for the weights as safetensors"
        )
    return first_line(error) if isinstance(error, (OSError, ValueError, SafetensorError)) else None
