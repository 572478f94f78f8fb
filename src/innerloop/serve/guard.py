"""What stands before every request: the key, its body's size, how long that may take to arrive, closed doors."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
GUARDED = ("/v1/", "/metrics")
ANSWERED = "/v1/"  # waited for where a server ends
AGAIN = "1"  # seconds after which a client may try again


def error_of(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Doors:
    """Who is inside, and whether anybody else is let in.

    Attributes:
        n_inside: requests that are being answered.
        closed_at: when the server was asked to end, by `time.monotonic`; None: it was not.
    """

    def __init__(self) -> None:
        self.n_inside = 0
        self.closed_at: float | None = None

    def close(self) -> None:
        """Let nobody in any more."""
        self.closed_at = time.monotonic()

    def seconds_closed(self) -> float:
        """Return for how long nobody has been let in."""
        return 0.0 if self.closed_at is None else time.monotonic() - self.closed_at

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count somebody who is inside in the block."""
        self.n_inside += 1
        try:
            yield
        finally:
            self.n_inside -= 1


class Guard:
    """Lets requests through to an app.

    Args:
        app: the app.
        doors: count requests, and may be closed.
        key: which requests must have; None: none.
        most_bytes: of a body.
        patience: seconds in which a body must arrive.
    """

    def __init__(self, app: App, doors: Doors, key: str | None, most_bytes: int, patience: float):
        self.app, self.doors, self.most_bytes, self.patience = app, doors, most_bytes, patience
        self.expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.expected is not None and scope["path"].startswith(GUARDED) and not self._knows(scope):
            await refuse(
                send, 401, "the key is missing or wrong: send it as 'Authorization: Bearer KEY'", "invalid_api_key"
            )
            return
        if not scope["path"].startswith(ANSWERED):
            await self._pass(scope, receive, send)
        elif self.doors.closed_at is not None:
            await refuse(send, 503, "this server is about to end: ask again in a moment, or ask another")
        else:
            with self.doors.inside():
                await self._pass(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through once its body is there."""
        try:
            body = await asyncio.wait_for(self._body(receive), self.patience)
        except TimeoutError:
            await refuse(send, 408, f"the request's body did not arrive within {self.patience:g} seconds")
            return
        if body is None:
            await refuse(send, 413, f"the request's body is longer than {self.most_bytes} bytes")
            return
        is_read = False

        async def again() -> MutableMapping[str, Any]:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    def _knows(self, scope: Scope) -> bool:
        """Whether a request has the key; how long the comparison takes does not depend on how much of it is right."""
        assert self.expected is not None
        given = b"".join(value for name, value in scope["headers"] if name == b"authorization")
        return hmac.compare_digest(given, self.expected)

    async def _body(self, receive: Receive) -> bytes | None:
        """Return the body of a request; None if it is too long."""
        parts, n = [], 0
        while True:
            message = await receive()
            parts.append(message.get("body", b""))
            n += len(parts[-1])
            if n > self.most_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


async def refuse(send: Send, status: int, message: str, code: str | None = None) -> None:
    """Send an error."""
    body = json.dumps(error_of(message, status, code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 503:
        headers.append((b"retry-after", AGAIN.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
