"""Canvases are short where their length is not what is tested."""

import pytest

from innerloop.formats import llada, qwen


@pytest.fixture
def short_canvases(monkeypatch):
    for module in (llada, qwen):
        monkeypatch.setattr(module, "GEN_LENGTH", module.BLOCK)
