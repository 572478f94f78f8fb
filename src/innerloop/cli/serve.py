"""The verb that serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from innerloop.checks.values import Count
from innerloop.cli.arguments import ModelArguments, console
from innerloop.model import run_folder
from innerloop.serve.settings import ServeSettings

if TYPE_CHECKING:
    from innerloop.engine.latent_model import LatentModel


def serve_(
    run: str, model: ModelArguments, settings: ServeSettings, name: str | None = None, replicas: Count | None = None
) -> None:
    """Answer requests over HTTP, as OpenAI's clients send them; the address shows a page to ask and to look inside.

    Clients must send the key in the environment variable INNERLOOP_API_KEY, where it is set. SIGTERM and Ctrl-C let
    requests in flight end first.

    Args:
        run: a run's folder, or any model; a plain model writes freely.
        model: who answers.
        settings: how requests are served.
        name: what clients call the model; by default the folder's name.
        replicas: servers on the nodes of a Ray cluster, which share what is asked; by default one, in this process.
    """
    from innerloop.serve.server import check_serve, serve

    check_serve()
    if model.method is None and not run_folder.says_method(run):
        model = replace(model, method="cot")
    where = str(Path(run).resolve()) if Path(run).exists() else run  # a node may stand in another folder

    def load() -> LatentModel:
        loaded = model.load_model(where)
        loaded.encoder = loaded.encoder.reading(run_folder.recorded(where, "running_text", False))
        return loaded

    called = name or Path(run).resolve().name

    def tell(url: str) -> None:
        console.print(f"{called}: {url}, for clients {url}/v1", soft_wrap=True)

    if replicas is None:
        serve(load(), called, settings, tell)
    else:
        from innerloop.serve.replicas import serve_replicas

        serve_replicas(load, called, settings, replicas, tell)
