"""The verb that shares a run."""

from __future__ import annotations

from innerloop.cli.arguments import console
from innerloop.model.hub import check_repo, pushable


def push(run: str, repo: str, private: bool | None = None) -> None:
    """Share a run on the Hugging Face Hub: its folder, and a card with method, data, accuracy, cost and recipe.

    Args:
        run: a run's folder, or a folder that save_pretrained has written.
        repo: OWNER/NAME on the Hub; made if it is not there.
        private: make it private where it is made.
    """
    check_repo(repo)
    pushable(run)
    from innerloop.model import hub

    address = hub.push(run, repo, private=private)
    console.print(f"{address}: shared; il.LatentModel.from_pretrained({repo!r}) loads it", soft_wrap=True)
