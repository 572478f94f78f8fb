"""Requests that wait: those of like length come after each other, duplicates together, and none waits for ever."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from weakref import WeakValueDictionary

from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import Prompt, Request
from innerloop.text.row import Row, ShownBlock

BATCHES_A_TURN = 4
"""So many batches of later and shorter questions may be read before a question, and no more."""


class Waiting:
    """The requests that wait.

    Args:
        batch_size: how many are read together.
    """

    def __init__(self, batch_size: int):
        self.heap: list[Request] = []
        self.prompts: WeakValueDictionary[tuple[tuple[int, ...], ...], Prompt] = WeakValueDictionary()  # of requests
        self.numbers, self.n_read, self.batch_size = itertools.count(), 0, batch_size

    def __len__(self) -> int:
        return len(self.heap)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.heap)

    def add(
        self,
        id: int,
        rows: Iterable[Row],
        budget: int,
        options: EngineOptions,
        blocks: Iterable[ShownBlock],
        place: int,
    ) -> None:
        """Let the samples of a question, a row each, wait; see `Request`."""
        for s, row in enumerate(rows):
            apart = (id, s) if options.starts > 1 and s > 0 else ()  # begins at a state of its own
            key = (tuple(row.ids()), (*apart, row.n_loops))
            if (prompt := self.prompts.get(key)) is None:
                prompt = self.prompts[key] = Prompt(next(self.numbers))
            turn = self.n_read // (BATCHES_A_TURN * self.batch_size)
            heappush(self.heap, Request(id, row, budget, options, tuple(blocks), (place, s), prompt, turn))

    def again(self, requests: Iterable[Request]) -> None:
        """Let requests wait again."""
        self.heap += requests
        heapify(self.heap)

    def remove(self, id: int) -> None:
        """Let a question go."""
        self.heap = [request for request in self.heap if request.id != id]
        heapify(self.heap)

    def take(self, most: int, room: int | None, positions: Callable[[Row, int], int]) -> list[Request]:
        """Take as many as there is room for, and no more than ``most``.

        Args:
            most: the most requests.
            room: the most positions that they may come to occupy together; None: no limit.
            positions: how many a row with a budget of tokens may come to occupy.
        """
        heap, requests, longest = self.heap, list[Request](), 0
        while heap and len(requests) < most:
            longest = max(longest, positions(heap[0].row, heap[0].budget))  # rows are padded to the longest
            if room is not None and longest * (len(requests) + 1) > room:
                break
            requests.append(heappop(heap))
        if heap and requests and heap[0].prompt is requests[-1].prompt is not requests[0].prompt:
            while requests[-1].prompt is heap[0].prompt:  # duplicates come together, and are read once
                heappush(heap, requests.pop())
        self.n_read += len(requests)
        return requests
