"""Processes that end as they are asked to: by SIGTERM, or with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType


def end_when_asked() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that nothing is lost; call it in the main thread."""

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end)


def end_with_parent() -> None:
    """Let this worker end when the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)  # nobody will ever ask it for anything

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()
