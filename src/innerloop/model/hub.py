"""Sharing a saved folder on the Hugging Face Hub, in one commit: it is there whole, or not at all.

push("runs/chain/codi", "me/codi-chain")

What an interrupted upload has sent is not sent again: the Hub knows large files by their contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from innerloop.disk.folders import damage, manifest
from innerloop.errors import InputError
from innerloop.model.card import RESULT, card, measured
from innerloop.model.run_folder import RECIPE, RUN_CHECKPOINT, SETTINGS, read_settings, resolve
from innerloop.model.shared_files import recipe_text, result_text, shared_files
from innerloop.phases.phase import says

AGAIN = "run the same again, and it goes on with what is missing"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
CARD = "README.md"


def check_repo(repo: str) -> None:
    """Refuse what is no name on the Hub."""
    if not REPO.fullmatch(repo) or len(repo) > 96:
        raise InputError(f"'{repo}' is no name on the Hub: write OWNER/NAME, in letters, digits, '-', '_' and '.'")


def pushable(run: str | Path) -> Path:
    """Return the folder of a run that is shared.

    Raises:
        InputError: it is none of ours, or not whole.
    """
    folder = Path(resolve(run))
    if not (folder / SETTINGS).exists():
        raise InputError(f"{run} was not saved by innerloop: give a run, or save the model with save_pretrained first")
    if problem := damage(folder):
        raise InputError(f"{folder} is not whole ({problem}), so it is not shared: innerloop doctor says more")
    aux = read_settings(folder)["method"].get("aux") or {}
    if aux.get("weight") and aux.get("source") and Path(aux["source"]).exists():
        raise InputError(
            f"{run} cannot be loaded without its aux.source, {aux['source']}, which is on this machine: load it with "
            "aux.weight=0 and share that, or share the source and train with its name on the Hub"
        )
    return folder


@says(lambda run, repo, **_: f"uploading to {repo}")
def push(
    run: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    told_of: str | Path | None = None,
) -> str:
    """Upload a run's model with its card; return its address.

    Args:
        run: a run's folder, or a folder that save_pretrained has written.
        repo: OWNER/NAME on the Hub; made if it is not there.
        private: make it private where it is made; None: as the Hub does.
        token: of the Hub; None: the one that ``hf auth login`` or HF_TOKEN has given.
        told_of: the run whose results and recipe the card tells, where that is another folder.

    Raises:
        InputError: something is not whole, or the Hub refuses it; what was uploaded is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_repo(repo)
    folder = pushable(run)
    if told_of is not None and _weights(folder) != _weights(Path(resolve(told_of))):
        raise InputError(f"the card would tell of {told_of}, whose weights are not this model's: leave run out")
    told, files = _run_of(told_of or run), shared_files(folder)
    files.setdefault(CARD, folder / CARD if (folder / CARD).is_file() else card(told, repo).encode())
    if recipe := recipe_text(told):
        files[RECIPE] = recipe.encode()
    if result := measured(told):
        files[RESULT] = result_text(result, files).encode()
    api = HfApi(token=token)
    with _told(repo):
        made = api.create_repo(repo, private=private, exist_ok=True)
        adds = [CommitOperationAdd(*one) for one in files.items()]
        api.create_commit(made.repo_id, adds, commit_message="Upload a model of innerloop")
    return str(made)


def _run_of(path: str | Path) -> Path:
    """Return the folder in which the results and the recipe of a model lie; what was downloaded has them in its own."""
    folder = Path(resolve(path))
    return folder.parent if folder.name == RUN_CHECKPOINT else folder


def _weights(folder: Path) -> dict[str, str]:
    """Return the checksums of the weights of a folder."""
    files = (manifest(folder) or {}).items()
    return {name: str(facts.get("sha256")) for name, facts in files if name.endswith(".safetensors")}


@contextmanager
def _told(repo: str) -> Iterator[None]:
    """Turn what the Hub refuses, and what the way to it does, into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            way = "log in with hf auth login, or set HF_TOKEN to a token that may write there"
            raise InputError(f"the Hub does not let you write to {repo} ({status}): {way}") from None
        raise InputError(f"the Hub refused {repo} ({_line(error)}): {AGAIN}") from None
    except Exception as error:  # as many kinds as there are ways for a network to fail
        raise InputError(f"{repo} could not be uploaded ({_line(error)}): {AGAIN}") from None


def _line(error: BaseException) -> str:
    """Return the first line of an error, and of the one that it came from."""
    texts = [str(one).strip().partition("\n")[0] for one in (error, error.__cause__) if one is not None]
    return "; ".join(text for text in texts if text) or type(error).__name__
