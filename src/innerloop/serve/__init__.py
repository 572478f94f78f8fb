"""Requests over HTTP, by the protocol of OpenAI's clients; and what another server needs to answer in its place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from innerloop.serve.hand_over import embeds, never_written

__all__ = ["embeds", "never_written"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'innerloop.serve' has no attribute '{name}'")
    from innerloop.serve import hand_over

    return getattr(hand_over, name)
