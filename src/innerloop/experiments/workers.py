"""Workers: processes that run jobs; told to end they save what they train, killed they stop no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.managers import SyncManager
from multiprocessing.synchronize import Event
from queue import LifoQueue
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from innerloop.errors import InputError, InputNote
from innerloop.terminal.signals import end_with_parent

_ends: Event | None = None  # of a worker: whether its suite ends


@dataclass(frozen=True)
class Workers:
    """Where jobs run.

    Attributes:
        submit: hands over a function with its arguments, of which the second is a recipe.
        messages: a queue of what they report.
    """

    submit: Callable[..., Future[Any]]
    messages: Any


@contextmanager
def local_workers(n: int) -> Iterator[Workers]:
    """Run ``n`` jobs at a time on this machine, each in a process of one thread."""
    if n < 1:
        raise InputError("a suite needs workers >= 1")
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_serve)
    ends = context.Event()
    with manager, Processes(n, partial(ProcessPoolExecutor, 1, context, one_thread, (ends,))) as processes:
        others = multiprocessing.active_children()
        try:
            yield Workers(processes.submit, manager.Queue())
        except BaseException:
            ends.set()
            processes.threads.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                if worker not in others:
                    worker.terminate()  # which saves what it trains
            raise  # the manager stays until they have, as they report to it


def _serve() -> None:
    """Let the manager's process end after the workers, who report to it: with its parent, not when all are asked to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


class Processes:
    """Processes that do one job after the other; one that is killed fails its own job alone, and is replaced.

    Args:
        n: how many there are; each is fed by a thread.
        made: makes a pool of one process.
    """

    def __init__(self, n: int, made: Callable[[], ProcessPoolExecutor]):
        self.threads, self.made = ThreadPoolExecutor(n), made
        self.idle: LifoQueue[ProcessPoolExecutor] = LifoQueue()
        for _ in range(n):
            self.idle.put(made())  # which starts at its first job

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.threads.shutdown()
        while not self.idle.empty():
            self.idle.get().shutdown()

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future[Any]:
        """Hand over a job."""
        return self.threads.submit(self._do, function, *args)

    def _do(self, function: Callable[..., Any], *args: Any) -> Any:
        pool = self.idle.get()
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            pool = self.made()
            raise InputError(
                "its process was killed, as happens where memory runs out: the same command tries again, with "
                "--workers 1 it has the memory for itself"
            ) from None
        finally:
            self.idle.put(pool)


def one_thread(ends: Event | None = None) -> None:
    """Prepare a process that runs one job at a time, and begins none once ``ends`` is set."""
    global _ends
    _ends = ends
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # tiny models run faster so, and the workers share the cores
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def is_ending() -> bool:
    """Tell a worker whether its suite ends."""
    return _ends is not None and _ends.is_set()


@contextmanager
def notes_sent(messages: Any) -> Iterator[None]:
    """Report notes of a block instead of printing them: jobs that share their data would all tell the same."""
    notes: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", InputNote)
            yield
    finally:
        for note in notes:
            if issubclass(note.category, InputNote):
                messages.put((None, None, str(note.message)))
            else:
                warnings.showwarning(note.message, note.category, note.filename, note.lineno)
