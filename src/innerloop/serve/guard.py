"""What stands before every request: the key, the size of its body, and how long that may take to arrive."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
GUARDED = ("/v1/", "/metrics")


def error_of(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """Lets requests through to an app.

    Args:
        app: the app.
        key: which requests must have; None: none.
        most_bytes: of a body.
        patience: seconds in which a body must arrive.
    """

    def __init__(self, app: App, key: str | None, most_bytes: int, patience: float):
        self.app, self.most_bytes, self.patience = app, most_bytes, patience
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
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
