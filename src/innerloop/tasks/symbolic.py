"""LaTeX compared as mathematics by math-verify, in a process of its own with a limit on its time of computing.

Some expressions would keep sympy busy for ever, in code that no exception ends; the system ends the process instead,
and the next comparison starts another. Time of computing, not of the clock: a busy machine changes no verdict, and any
thread may ask. This file is also the program of that process, so it imports nothing of the package.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading

SECONDS = 5.0  # of computing, for one comparison
MEMORY = 4 * 2**30  # bytes that the process may have
TRIES = 2  # where the process is gone for a reason of its own
N_REMEMBERED = 2**14


@functools.lru_cache(N_REMEMBERED)
def same_value(gold: str, predicted: str) -> bool | None:
    """Tell whether two answers in LaTeX are the same; None where that takes more than ``SECONDS`` of computing.

    Raises:
        ModuleNotFoundError: math-verify cannot be imported.
    """
    return _COMPARER.ask(gold, predicted, SECONDS)


class _Comparer:
    """The process that compares, started when it is first asked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, predicted: str, seconds: float) -> bool | None:
        """Return what the process says; None where it was ended before it said anything."""
        with self.lock:
            for _ in range(TRIES):
                process = self.process or self._start()
                try:
                    with contextlib.suppress(BrokenPipeError):
                        print(json.dumps([gold, predicted, seconds]), file=process.stdin, flush=True)
                    told = process.stdout.readline()  # type: ignore[union-attr]
                    if told:
                        return bool(json.loads(told))
                    if process.wait() == -signal.SIGPROF:
                        break
                except BaseException:  # an answer that nobody waited for must not be taken for the next one
                    self.stop()
                    raise
                self.stop()
            self.stop()
            return None

    def _start(self) -> "subprocess.Popen[str]":
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        try:
            if not process.stdout.readline():  # type: ignore[union-attr]
                raise ModuleNotFoundError("math_verify")
        except BaseException:
            self.stop()
            raise
        return process

    def stop(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()


def _forget() -> None:
    """Leave the process to the one that started it, where this one is a fork of that."""
    global _COMPARER
    _COMPARER = _Comparer()


_COMPARER = _Comparer()
atexit.register(lambda: _COMPARER.stop())
os.register_at_fork(after_in_child=_forget)


def _compare_what_is_asked() -> None:
    """Answer each line of [gold, predicted, seconds]: the whole work of the process."""
    import resource

    from math_verify import parse, verify

    answers, sys.stdout = sys.stdout, sys.stderr
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    first = [parse(text, parsing_timeout=None) for text in ("$x$", "$y$")]
    verify(*first, timeout_seconds=None)  # so all is loaded that the first comparison needs
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        *texts, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        expressions = [parse(f"${text.strip().strip('$')}$", parsing_timeout=None) for text in texts]
        is_same = verify(*expressions, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(is_same), file=answers, flush=True)


if __name__ == "__main__":
    _compare_what_is_asked()
