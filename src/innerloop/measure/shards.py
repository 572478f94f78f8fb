"""Examples answered in parts, in several processes or on several machines, and put together as if one had answered all.

    torchrun --nproc_per_node 4 -m innerloop eval RUN          # `Processes`: each answers its part, the first writes

What is drawn for an example depends on its place among all of them, so its answer is the same in whatever part it is.
Examples that ask the same are in one part, as a question is read once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from innerloop.engine.latent_model import LatentModel
from innerloop.measure.accuracy import Prediction, check_answered, evaluate
from innerloop.methods import Method
from innerloop.tasks import Task
from innerloop.text.examples import Example

if TYPE_CHECKING:
    from accelerate import PartialState


def parts_of(examples: Sequence[Example], n: int) -> list[list[int]]:
    """Return the places of examples in at most ``n`` parts that are about as large."""
    same: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        same.setdefault(example.question, []).append(place)
    parts: list[list[int]] = [[] for _ in range(n)]
    for places in same.values():
        min(parts, key=len).extend(places)
    return [sorted(part) for part in parts if part]


def put_together(parts: Sequence[Sequence[int]], found: Sequence[Sequence[Prediction]]) -> list[Prediction]:
    """Return the predictions of parts in the order of the examples.

    Raises:
        InputError: not one example could be answered.
    """
    pairs = [pair for part, own in zip(parts, found, strict=True) for pair in zip(part, own, strict=True)]
    return check_answered([prediction for _, prediction in sorted(pairs, key=lambda pair: pair[0])])


def answer_part(
    run: str,
    method: Method | None,
    dtype: str,
    task: Task,
    examples: Sequence[Example],
    places: Sequence[int],
    how: Mapping[str, Any],
) -> list[Prediction]:
    """Load a model and answer a part of the examples.

    Args:
        run: a run's folder, or any model.
        method: how it reasons; None: as the folder says.
        dtype: the type of its weights.
        task: extracts and checks answers.
        examples: those of the part.
        places: where they are among all.
        how: the options of `evaluate`.
    """
    model = LatentModel.from_pretrained(run, method, dtype=dtype)
    return evaluate(model, task, examples, places=places, **how)


class Processes:
    """The processes that torchrun or accelerate started, of which this is one; one alone where none did.

    Args:
        on_cpu: whether they leave GPUs alone.
    """

    def __init__(self, on_cpu: bool = False):
        self.state: PartialState | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            self.state = PartialState(cpu=on_cpu)
        self.rank = 0 if self.state is None else int(self.state.process_index)
        self.n = 1 if self.state is None else int(self.state.num_processes)

    def told(self, value: Any) -> Any:
        """Return what the first process says."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def evaluate(
        self,
        model: LatentModel,
        task: Task,
        examples: Sequence[Example],
        how: Mapping[str, Any],
        progress: Callable[[int], None] | None = None,
    ) -> list[Prediction]:
        """Answer examples, each process a part of them; all processes return all predictions.

        Args:
            model: the model.
            task: extracts and checks answers.
            examples: what is answered by all.
            how: the other options of `innerloop.measure.accuracy.evaluate`.
            progress: called with the number of examples that all have answered, as far as this process knows.

        Raises:
            InputError: not one example could be answered.
        """
        parts = parts_of(examples, self.n)
        own = parts[self.rank] if self.rank < len(parts) else []
        advance = None if progress is None else lambda n: progress(n * len(parts))
        given = [examples[place] for place in own]
        found = evaluate(model, task, given, places=own, progress=advance, **how) if own else []
        if self.state is None:
            return put_together(parts, [found][: len(parts)])
        from accelerate.utils import gather_object

        return put_together(parts, gather_object([found])[: len(parts)])


@contextmanager
def processes(on_cpu: bool = False) -> Iterator[Processes]:
    """Let the processes that were started work together in a block."""
    found = Processes(on_cpu)
    try:
        yield found
    finally:
        if found.state is not None:
            found.state.destroy_process_group()
