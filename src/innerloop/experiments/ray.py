"""Jobs, and parts of an evaluation, on a Ray cluster that is there: one task each, on one CPU and, if any, one GPU.

    ray start --head                                  # or any cluster; RAY_ADDRESS says which
    innerloop sweep RECIPE --grid ... --on ray

Every node needs innerloop, and the folder that the sweep was started from at the same path (a shared disk).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from innerloop.errors import InputError, check_installed
from innerloop.experiments.workers import Workers, one_thread
from innerloop.measure.accuracy import Prediction
from innerloop.measure.shards import answer_part, parts_of, put_together
from innerloop.methods import Method
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.train.recipe import Recipe


def check_ray() -> None:
    """Refuse where Ray is not installed."""
    check_installed("--on ray needs Ray", "cluster", "ray")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that was joined; a task takes one CPU of it and, where there are some and it may, one GPU."""

    n_cpus: int
    n_gpus: int
    tasks: list[Any] = field(default_factory=list)

    def submit(self, function: Callable[..., Any], *arguments: Any, on_cpu: bool = False) -> Future[Any]:
        """Hand over a function, which is run in this folder on some node."""
        import ray

        n_gpus = 1 if self.n_gpus >= 1 and not on_cpu else 0
        task = ray.remote(num_cpus=1, num_gpus=n_gpus, max_retries=0)(_there)
        self.tasks.append(task.remote(os.getcwd(), function, *arguments))
        return self.tasks[-1].future()  # type: ignore[no-any-return]


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Join the cluster at RAY_ADDRESS, or on this machine, and leave it again; what fails ends what was handed over."""
    check_ray()
    import ray

    joins = not ray.is_initialized()
    if joins:
        try:
            ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"there is no Ray cluster to join ({reason}): ray start --head, or set RAY_ADDRESS"
            ) from None
    there = ray.cluster_resources()
    joined = Cluster(int(there.get("CPU", 1)), int(there.get("GPU", 0)))
    try:
        yield joined
    except BaseException:
        for task in joined.tasks:
            ray.cancel(task)  # as Ctrl-C: what trains saves a checkpoint first
        if joined.tasks:
            ray.wait(joined.tasks, num_returns=len(joined.tasks), timeout=60)
        raise
    finally:
        if joins:
            ray.shutdown()


@contextmanager
def ray_workers() -> Iterator[Workers]:
    """Let jobs run on the cluster that is there."""
    check_ray()
    from ray.util.queue import Queue

    with cluster() as joined:
        messages = Queue(actor_options={"num_cpus": 0})

        def submit(function: Callable[..., None], key: Any, recipe: Recipe, *more: Any) -> Future[None]:
            return joined.submit(function, key, recipe, *more, on_cpu=bool(recipe.train.get("use_cpu", False)))

        try:
            yield Workers(submit, messages)
        finally:
            messages.shutdown()


def evaluate_on_ray(
    who: tuple[str, Method | None, str],
    task: Task,
    examples: Sequence[Example],
    how: Mapping[str, Any],
    progress: Callable[[int], None],
    on_cpu: bool = False,
) -> list[Prediction]:
    """Answer examples in parts, as many as there are GPUs or, where there are none, CPUs in the cluster.

    Args:
        who: a run's folder or any model, how it reasons where the folder does not say, and the type of its weights.
        task: extracts and checks answers.
        examples: what is answered by all.
        how: the other options of `innerloop.measure.accuracy.evaluate`.
        progress: called with the number of examples answered since the last call.
        on_cpu: whether GPUs are left alone.

    Raises:
        InputError: there is no cluster, or not one example could be answered.
    """
    with cluster() as joined:
        parts = parts_of(examples, (0 if on_cpu else joined.n_gpus) or joined.n_cpus)
        handed = {
            joined.submit(answer_part, *who, task, [examples[i] for i in part], part, how, on_cpu=on_cpu): i
            for i, part in enumerate(parts)
        }
        found: dict[int, list[Prediction]] = {}
        for done in as_completed(handed):
            found[handed[done]] = done.result()
            progress(len(found[handed[done]]))
        return put_together(parts, [found[i] for i in range(len(parts))])


def _there(folder: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a folder, on a node of the cluster."""
    if not Path(folder).is_dir():
        raise InputError(f"a node of the cluster has no {folder}: start the sweep from a folder that all nodes share")
    os.chdir(folder)
    one_thread()
    return function(*arguments)
