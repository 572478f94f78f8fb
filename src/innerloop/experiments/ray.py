"""Jobs on a Ray cluster that is there: one task for each, on one CPU and, where there are some, one GPU.

    ray start --head                                  # or any cluster; RAY_ADDRESS says which
    innerloop sweep RECIPE --grid ... --on ray

Every node needs innerloop, and the folder that the sweep was started from at the same path (a shared disk).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from innerloop.errors import InputError, check_installed
from innerloop.experiments.workers import Workers, one_thread
from innerloop.train.recipe import Recipe


def check_ray() -> None:
    """Refuse where Ray is not installed."""
    check_installed("--on ray needs Ray", "cluster", "ray")


@contextmanager
def ray_workers() -> Iterator[Workers]:
    """Join the cluster at RAY_ADDRESS, or on this machine, and leave it again."""
    check_ray()
    import ray
    from ray.util.queue import Queue

    joins = not ray.is_initialized()
    if joins:
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"there is no Ray cluster to join ({reason}): ray start --head, or set RAY_ADDRESS"
            ) from None
    has_gpus = ray.cluster_resources().get("GPU", 0) >= 1
    handed: list[Any] = []

    def submit(function: Callable[..., None], key: Any, recipe: Recipe, *more: Any) -> Future[None]:
        n_gpus = 1 if has_gpus and not recipe.train.get("use_cpu", False) else 0
        task = ray.remote(num_cpus=1, num_gpus=n_gpus, max_retries=0)(_there)
        handed.append(task.remote(os.getcwd(), function, key, recipe, *more))
        return handed[-1].future()  # type: ignore[no-any-return]

    messages = Queue(actor_options={"num_cpus": 0})
    try:
        yield Workers(submit, messages)
    except BaseException:
        for task in handed:
            ray.cancel(task)  # as Ctrl-C: what trains saves a checkpoint first
        ray.wait(handed, num_returns=len(handed), timeout=60)
        raise
    finally:
        messages.shutdown()
        if joins:
            ray.shutdown()


def _there(folder: str, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a folder, on a node of the cluster."""
    if not Path(folder).is_dir():
        raise InputError(f"a node of the cluster has no {folder}: start the sweep from a folder that all nodes share")
    os.chdir(folder)
    one_thread()
    function(*arguments)
