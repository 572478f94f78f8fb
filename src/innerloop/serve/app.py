"""The app: routes, and how errors are told."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from innerloop.errors import InputError
from innerloop.serve.exchange import Exchange, Failed
from innerloop.serve.guard import AGAIN, Doors, Guard, error_of
from innerloop.serve.metrics import Metrics
from innerloop.serve.page import live_page
from innerloop.serve.protocol import Asked, ChatAsked, CompletionAsked
from innerloop.serve.settings import ServeSettings
from innerloop.serve.worker import Full, Worker

ANSWERING = ("/v1/completions", "/v1/chat/completions")


class Gone(Exception):
    """Who asked is gone."""


def make_app(worker: Worker, name: str, settings: ServeSettings, key: str | None = None) -> FastAPI:
    """Return the app of a worker, which it starts and ends; its ``state.doors`` are closed before it is to end.

    Args:
        worker: answers.
        name: what clients call the model.
        settings: how it is served.
        key: which clients must send; None: none.
    """
    metrics, doors = Metrics(worker), Doors()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        doors.close()
        worker.end()
        await anyio.to_thread.run_sync(worker.join, 10)

    app = FastAPI(title="innerloop", lifespan=life, docs_url=None, redoc_url=None)
    app.state.doors = doors
    app.add_middleware(Guard, doors=doors, key=key, most_bytes=settings.most_bytes, patience=settings.patience)
    _tell_errors(app, metrics)

    async def answered(asked: Asked, request: Request) -> Response:
        if asked.model != name:
            raise HTTPException(404, f"there is no model '{asked.model}' here; this server has '{name}'")
        exchange = Exchange(worker, metrics, name, asked, settings.max_new_tokens)
        await exchange.begin()
        if asked.stream:
            metrics.requests.labels(request.url.path, "200").inc()
            return StreamingResponse(
                exchange.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        body = await _unless_gone(exchange, request, metrics)
        metrics.requests.labels(request.url.path, "200").inc()
        return JSONResponse(body)

    @app.post("/v1/completions")
    async def completions(asked: CompletionAsked, request: Request) -> Response:
        return await answered(asked, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatAsked, request: Request) -> Response:
        return await answered(asked, request)

    _show_models(app, name, worker)
    _show_state(app, worker, metrics, doors)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(live_page(name, worker.model.method, key is not None))

    return app


def _show_models(app: FastAPI, name: str, worker: Worker) -> None:
    """Tell which models there are: one."""
    made = int(time.time())
    method = worker.model.method
    known = {
        "id": name,
        "object": "model",
        "created": made,
        "owned_by": "innerloop",
        "innerloop": {"method": method.name},
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [known]}

    @app.get("/v1/models/{model}")
    async def model(model: str) -> dict[str, Any]:
        if model != name:
            raise HTTPException(404, f"there is no model '{model}' here; this server has '{name}'")
        return known


def _show_state(app: FastAPI, worker: Worker, metrics: Metrics, doors: Doors) -> None:
    """Tell those that watch over servers how this one is."""

    @app.get("/health")
    async def health() -> Response:
        return (
            JSONResponse({"status": "ok"})
            if worker.is_alive()
            else JSONResponse({"status": "the engine has ended"}, 503)
        )

    @app.get("/ready")
    async def ready() -> Response:
        is_ready = worker.is_alive() and doors.closed_at is None
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics")
    async def counted() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _tell_errors(app: FastAPI, metrics: Metrics) -> None:
    """Let errors be told in one sentence, as OpenAI's clients read them."""

    def told(request: Request, status: int, message: str, headers: dict[str, str] | None = None) -> Response:
        route = request.url.path if request.url.path in ANSWERING else "other"  # anybody can ask for any path
        metrics.requests.labels(route, str(status)).inc()
        return JSONResponse(error_of(message, status), status, headers)

    @app.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> Response:
        return told(request, 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return told(request, 400, "the body is no JSON: send an object with the content type application/json")
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return told(request, 400, f"{where}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def missing(request: Request, error: HTTPException) -> Response:
        return told(request, error.status_code, str(error.detail))

    @app.exception_handler(Full)
    async def full(request: Request, error: Full) -> Response:
        return told(request, 429, "as many requests wait as may: try again in a moment", {"Retry-After": AGAIN})

    @app.exception_handler(Failed)
    async def failed(request: Request, error: Failed) -> Response:
        return told(request, 503, f"this could not be answered: {error}", {"Retry-After": AGAIN})

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=499)  # which nobody reads


async def _unless_gone(exchange: Exchange, request: Request, metrics: Metrics) -> dict[str, Any]:
    """Return the answers, unless the client goes away before they are there."""
    found: list[dict[str, Any]] = []
    errors: list[Failed] = []
    async with anyio.create_task_group() as both:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            both.cancel_scope.cancel()

        both.start_soon(watch)
        try:
            found.append(await exchange.whole())
        except Failed as error:
            errors.append(error)
        both.cancel_scope.cancel()
    if errors:
        raise errors[0]
    if not found:
        metrics.gone.inc()
        raise Gone
    return found[0]
