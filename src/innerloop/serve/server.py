"""`serve`: a model behind HTTP, until it is asked to end; then requests in flight are answered first."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from innerloop.errors import InputError, check_installed
from innerloop.model.model import LatentCore
from innerloop.serve.settings import KEY, ServeSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

BACKLOG = 2048  # connections that wait to be accepted
MODULES = ("fastapi", "uvicorn", "prometheus_client")


def check_serve() -> None:
    """Refuse where what serves is not installed."""
    check_installed("serving needs FastAPI, uvicorn and prometheus-client", "serve", *MODULES)


def serve(model: LatentCore, name: str, settings: ServeSettings, tell: Callable[[str], None]) -> None:
    """Serve a model; ``tell`` is told where, once it listens."""
    check_serve()
    import uvicorn

    from innerloop.serve.draining import DrainingServer

    app = app_of(model, name, settings, os.environ.get(KEY) or None)
    listening = bound(settings)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=int(settings.drain),
        timeout_keep_alive=max(int(settings.patience), 1),
    )
    tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    with suppress(KeyboardInterrupt):  # a second Ctrl-C, which is passed on
        DrainingServer(config, app.state.doors, settings.drain).run(sockets=[listening])


def app_of(model: LatentCore, name: str, settings: ServeSettings, key: str | None) -> FastAPI:
    """Return the app of a model."""
    from innerloop.serve.app import make_app
    from innerloop.serve.worker import Worker

    options = {"batch_size": settings.batch_size, "max_positions": settings.max_positions}
    return make_app(Worker(model.eval(), settings.most_waiting, **options), name, settings, key)


def bound(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens at the address asked for."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # whoever comes before the app is ready waits
    except OSError as error:
        told = f"{settings.host}, port {settings.port}, cannot be listened at ({error.strerror}): give another --port"
        raise InputError(told) from None
    return bound
