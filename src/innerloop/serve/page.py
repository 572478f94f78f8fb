"""The page at the server's address: a question is asked, and its latents are shown as they come."""

from __future__ import annotations

import json
from importlib.resources import files

from innerloop.config.method import Method


def live_page(name: str, method: Method, has_key: bool) -> str:
    """Return the page.

    Args:
        name: what clients call the model.
        method: how it reasons.
        has_key: whether requests need a key.
    """
    own, lens = files("innerloop.serve"), files("innerloop.lens")
    about = {"model": name, "method": method.name, "summary": method.summary, "hasKey": has_key}
    parts = {
        "STYLE": (lens / "page.css").read_text(encoding="utf-8") + (own / "live.css").read_text(encoding="utf-8"),
        "SCRIPT": (lens / "parts.js").read_text(encoding="utf-8") + (own / "live.js").read_text(encoding="utf-8"),
        "ABOUT": json.dumps(about).replace("<", "\\u003c"),
    }
    page = (own / "live.html").read_text(encoding="utf-8")
    for part, text in parts.items():
        page = page.replace(f"[[{part}]]", text)
    return page
