"""`serve --replicas`: the same app several times, by Ray Serve on a cluster that is there.

    ray start --head                                  # or any cluster; RAY_ADDRESS says which
    innerloop serve RUN --replicas 4

A replica takes one CPU and, where the cluster has some, one GPU. Ray's proxy gives each request to one of them.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from innerloop.errors import InputError
from innerloop.experiments.ray import cluster
from innerloop.model.model import LatentCore
from innerloop.serve.server import bound, check_serve
from innerloop.serve.settings import KEY, ServeSettings


def check_replicas() -> None:
    """Refuse where Ray Serve is not installed."""
    check_serve()
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise InputError("replicas need Ray Serve: pip install 'innerloop[serve,replicas]'") from None


def serve_replicas(
    load: Callable[[], LatentCore], name: str, settings: ServeSettings, n: int, tell: Callable[[str], None]
) -> None:
    """Serve a model by several replicas until SIGTERM or Ctrl-C; then requests in flight are answered first.

    Args:
        load: loads the model, on a node of the cluster.
        name: what clients call it.
        settings: how each replica serves.
        n: how many replicas.
        tell: is told where, once all of them are ready.
    """
    check_replicas()
    with cluster() as joined:
        from ray import serve

        with bound(settings) as free:  # refused here where the port is taken
            host, port = free.getsockname()[:2]
        serve.start(http_options={"host": host, "port": port})
        app = serve.ingress(_builder(load, name, settings, os.environ.get(KEY) or None))()
        deployment = serve.deployment(
            app,
            name=name,
            num_replicas=n,
            ray_actor_options={"num_cpus": 1, "num_gpus": min(joined.n_gpus, 1)},
            max_ongoing_requests=settings.batch_size + settings.most_waiting + 1,  # it refuses the last by itself
            graceful_shutdown_timeout_s=settings.drain,
        )
        ends = threading.Event()
        before = {sig: signal.signal(sig, lambda *_: ends.set()) for sig in (signal.SIGTERM, signal.SIGINT)}
        try:
            serve.run(deployment.bind(), name=name)
            tell(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            ends.wait()
        finally:
            serve.delete(name)
            if not serve.status().applications:
                serve.shutdown()
            for sig, handler in before.items():
                signal.signal(sig, handler)


def _builder(load: Callable[[], LatentCore], name: str, settings: ServeSettings, key: str | None) -> Callable[[], Any]:
    """Return what makes the app of a replica, on its node."""

    def build() -> Any:
        from innerloop.serve.server import app_of

        return app_of(load(), name, settings, key)

    return build
