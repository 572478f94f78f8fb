"""How a server serves: `ServeSettings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Count, Natural
from innerloop.engine.options import Many

KEY = "INNERLOOP_API_KEY"
"""The environment variable with the key that clients must send."""


@dataclass(frozen=True)
class ServeSettings(Checked):
    """How requests are served.

    Args:
        host: the address that is listened at; 0.0.0.0 is every one of this machine.
        port: the port; 0 takes any that is free.
        batch_size: rows that are answered together.
        max_new_tokens: the most tokens that an answer may have, and those of a request that asks for none.
        max_positions: the most positions that rows in the engine may come to occupy together; by default no limit.
        most_waiting: answers that may wait; a request beyond them is told to come again (429).
        most_bytes: of the body of a request.
        patience: seconds in which the body of a request must arrive.
        drain: seconds in which requests in flight may end, once the server is asked to.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Bounds(0, 65535)] = 8000
    batch_size: Many = 32
    max_new_tokens: Count = 256
    max_positions: Count | None = None
    most_waiting: Natural = 256
    most_bytes: Count = 1_000_000
    patience: Annotated[float, Bounds(0, above=True)] = 30.0
    drain: Annotated[float, Bounds(0)] = 60.0
