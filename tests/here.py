"""Workers of a suite that do everything at once, in this process."""

import queue
from concurrent.futures import Future
from contextlib import contextmanager

from innerloop.experiments.workers import Workers


@contextmanager
def here():
    """Workers that do everything at once, in this process."""

    def submit(function, *arguments):
        done: Future = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done

    yield Workers(submit, queue.Queue())
