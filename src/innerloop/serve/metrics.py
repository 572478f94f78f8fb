"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from innerloop.decoder.cost import Cost
from innerloop.serve.worker import Worker

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server."""

    def __init__(self, worker: Worker):
        own = self.registry = CollectorRegistry()
        self.requests = Counter("innerloop_requests", "Requests by route and status", ["route", "status"], registry=own)
        self.tokens = Counter("innerloop_written_tokens", "Tokens written", registry=own)
        self.passes = Counter("innerloop_passes", "Passes of the decoder, row by row", registry=own)
        self.thought = Counter("innerloop_thought_positions", "Positions of thought", registry=own)
        self.gone = Counter("innerloop_clients_gone", "Requests whose client went away", registry=own)
        first = "Seconds to the first event of an answer"
        self.first = Histogram("innerloop_first_event_seconds", first, registry=own, buckets=SECONDS)
        self.whole = Histogram("innerloop_request_seconds", "Seconds of requests", registry=own, buckets=SECONDS)
        running = Gauge("innerloop_running", "Answers that are being written", registry=own)
        running.set_function(lambda: worker.engine.n_running)
        waiting = Gauge("innerloop_open", "Answers that were asked for and are not there", registry=own)
        waiting.set_function(lambda: worker.n_open)

    def count(self, costs: Sequence[Cost]) -> None:
        """Count what answers cost."""
        for cost in costs:
            self.tokens.inc(cost.written)
            self.passes.inc(cost.passes)
            self.thought.inc(cost.thought_tokens)

    def page(self) -> bytes:
        """Return all of them as Prometheus reads them."""
        return generate_latest(self.registry)
