"""What takes long is told: bars where somebody watches, lines where output goes to a file, a word for long phases."""

import io
import itertools
import threading

import pytest
from rich.console import Console
from rich.progress import Progress

from innerloop.phases.phase import heard_by, phase
from innerloop.terminal import progress as shown
from innerloop.terminal.progress import Pace, ProgressLines, bar, phases_told


def quick(monkeypatch: pytest.MonkeyPatch, first: float = 0.02) -> None:
    """Let lines come after hundredths of a second."""
    for name, seconds in {"TICK": 0.005, "FIRST": first, "NEXT": 0.02, "LAST": 0.02}.items():
        monkeypatch.setattr(shown, name, seconds)


class Output(io.StringIO):
    """A file that can be waited for."""

    def until(self, words: str) -> str:
        for _ in range(1000):
            if words in self.getvalue():
                return self.getvalue()
            threading.Event().wait(0.01)
        raise AssertionError(f"'{words}' never came: {self.getvalue()}")


def test_a_terminal_gets_bars_and_a_file_lines():
    assert type(bar(Console(file=io.StringIO(), force_terminal=True))) is Progress
    assert type(bar(Console(file=io.StringIO()))) is ProgressLines


def test_lines_say_how_far_each_task_is_while_it_goes_on_and_how_it_ended(monkeypatch):
    quick(monkeypatch)
    out = Output()
    with bar(Console(file=out, width=20)) as progress:
        row = progress.add_task("cot", total=120, note="")
        progress.add_task("waits", total=9, note="")
        out.until("cot:  0/120  after")
        progress.update(row, completed=30, note="loss 2.5, in more words than a line has columns")
        out.until("cot:  30/120  ")
        progress.update(row, completed=120, note="done")
    lines = out.getvalue().splitlines()
    assert any(line.endswith("  loss 2.5, in more words than a line has columns") for line in lines)
    assert lines[-1].startswith("cot:  120/120  in 0") and lines[-1].endswith("  done")
    assert not any("waits" in line for line in lines) and "\x1b" not in out.getvalue()


def test_what_is_soon_over_gets_one_line_and_a_silent_process_none(monkeypatch):
    out = Output()
    with bar(Console(file=out)) as progress:
        progress.advance(progress.add_task("[lens]", total=None, note=""), 3)
    assert out.getvalue() == "[lens]:  3  after 00:00\n"
    with bar(Console(file=out)) as progress:
        progress.disable = True
    assert out.getvalue().count("\n") == 1


def test_lines_come_less_and_less_often_but_every_minute(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(shown.time, "monotonic", lambda: float(next(now)))
    pace = Pace()
    due = [t for t in range(1, 4000) if pace.is_due()]
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert due[:4] == [2, 12, 22, 32] and gaps == sorted(gaps) and gaps[-1] == 60


def test_a_long_phase_is_named_and_a_short_one_is_not(monkeypatch):
    quick(monkeypatch, first=0.1)
    out = Output()
    with phases_told(Console(file=out)):
        with phase("short"):
            pass
        with phase("reading [a].jsonl"):
            out.until("reading [a].jsonl .. 00:00\n")
    with phase("nobody listens"):
        pass
    assert "short" not in out.getvalue()


def test_listeners_hear_of_phases_until_they_leave():
    heard = []

    def listen(words: str):
        heard.append(words)
        return io.StringIO()

    with heard_by(listen), phase("one"):
        pass
    with pytest.raises(KeyError), heard_by(listen):
        raise KeyError
    with phase("two"):
        pass
    assert heard == ["one"]


def test_lines_stop_where_an_error_came_before_the_start():
    lines = bar(Console(file=io.StringIO()))
    lines.stop()
    assert lines.console.file.getvalue() == ""
