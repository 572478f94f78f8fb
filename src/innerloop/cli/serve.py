"""The verb that serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from innerloop.cli.arguments import ModelArguments, console
from innerloop.model import run_folder
from innerloop.serve.settings import ServeSettings


def serve_(run: str, model: ModelArguments, settings: ServeSettings, name: str | None = None) -> None:
    """Answer requests over HTTP, as OpenAI's clients send them; the address shows a page to ask and to look inside.

    Clients must send the key in the environment variable INNERLOOP_API_KEY, where it is set. SIGTERM and Ctrl-C let
    requests in flight end first.

    Args:
        run: a run's folder, or any model; a plain model writes freely.
        model: who answers.
        settings: how requests are served.
        name: what clients call the model; by default the folder's name.
    """
    from innerloop.serve.server import check_serve, serve

    check_serve()
    if model.method is None and not run_folder.says_method(run):
        model = replace(model, method="cot")
    loaded = model.load_model(run)
    loaded.encoder = loaded.encoder.reading(run_folder.recorded(run, "running_text", False))
    called = name or Path(run).resolve().name

    def tell(url: str) -> None:
        console.print(f"{called}: {url}, for clients {url}/v1", soft_wrap=True)

    serve(loaded, called, settings, tell)
