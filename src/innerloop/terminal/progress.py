"""How what takes long is shown: bars in a terminal; lines, less and less often, where output goes to a file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from innerloop.phases.phase import heard_by
from innerloop.terminal.plain import plain_console

TICK = 0.25  # seconds from one look at the clock to the next
FIRST = 2.0  # seconds until something is told to go on
NEXT, LAST = 10.0, 60.0  # seconds from one line to the next, at the beginning and after a while
GROWTH = 20  # a line is worth at least this share, one in so many, of the time that has gone by


def bar(console: Console | None = None) -> Progress:
    """Return a progress bar with counts, time used and time left, which is lines where no terminal is."""
    console = console or plain_console()
    watched = console.is_terminal or console.is_jupyter
    return (Progress if watched else ProgressLines)(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


class Pace:
    """When something that goes on is to be told: after two seconds, then less and less often."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.due = self.began + FIRST

    def is_due(self) -> bool:
        """Tell whether it is time, and when it will be next."""
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + min(max(NEXT, (now - self.began) / GROWTH), LAST)
        return True


@contextmanager
def ticking(told: Callable[[], object]) -> Iterator[None]:
    """Call a function again and again while a block runs, from a thread of its own."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(TICK):
            told()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class ProgressLines(Progress):
    """Progress in lines: every so often one for each task that went on, and at the end what has not been told."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.told: dict[TaskID, tuple[float, str]] = {}
        self.running = ExitStack()  # which is closed, too, where an error came before the start

    def start(self) -> None:
        """Begin to tell."""
        self.told = {}
        if not self.disable:
            pace = Pace()

            def tell() -> None:
                if pace.is_due():
                    self._tell(goes_on=True)

            self.running.enter_context(ticking(tell))

    def stop(self) -> None:
        """Tell how far each task came."""
        self.running.close()
        if not self.disable:
            self._tell()

    def _tell(self, goes_on: bool = False) -> None:
        """Print a line for each task that went on; where none did, one shows that somebody still works."""
        known = {task.id: (task.completed, task.fields.get("note", "")) for task in self.tasks}
        news = [task for task in self.tasks if any(known[task.id]) and self.told.get(task.id) != known[task.id]]
        if goes_on and not news:
            news = [task for task in self.tasks if not task.finished][:1]
        self.told = known
        for task in news:
            self.console.print(Text(self._line(task)), soft_wrap=True)

    def _line(self, task: Task) -> str:
        parts = [f"{task.description}:"]
        if task.total is not None or task.completed:
            parts.append(f"{task.completed:.0f}" + ("" if task.total is None else f"/{task.total:.0f}"))
        if task.finished:
            parts.append(f"in {_clock(task.finished_time or 0)}")
        elif task.time_remaining is not None:
            parts.append(f"{_clock(task.time_remaining)} left")
        elif task.elapsed is not None:
            parts.append(f"after {_clock(task.elapsed)}")
        return "  ".join([*parts, *filter(None, [task.fields.get("note", "")])])


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))).removeprefix("0:")


@contextmanager
def phases_told(console: Console) -> Iterator[None]:
    """Print the phases (`innerloop.phases`) of a block that take more than two seconds."""
    running: dict[Pace, str] = {}  # a phase may last microseconds, so it gets no thread of its own

    @contextmanager
    def listen(words: str) -> Iterator[None]:
        running[pace := Pace()] = words
        try:
            yield
        finally:
            del running[pace]

    def tell() -> None:
        for pace, words in list(running.items()):
            if pace.is_due():
                gone = _clock(time.monotonic() - pace.began)
                console.print(Text(f"{words} .. {gone}", "dim"), soft_wrap=True)

    with heard_by(listen), ticking(tell):
        yield
