"""What is trained and validated on: examples that the model can read whole, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from innerloop.checks.values import shown
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import check_length
from innerloop.errors import InputError, refuse
from innerloop.model.teacher_cache import TeacherCache
from innerloop.phases.phase import phase
from innerloop.tasks import Task
from innerloop.text.examples import ANSWER_PREFIX, Example, from_rows
from innerloop.train.training_arguments import LatentTrainingArguments

NORMALISED = 33
"""The most bytes that a character outside of ASCII becomes in a normal form of Unicode (U+FDFA)."""


class ByLength(Sampler):
    """An order of examples in which those of like length share a batch; it depends on the seed and the epoch alone."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order in another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.epoch + self.seed)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def training_examples(model: LatentModel, source: Any, max_length: int | None) -> tuple[list[Example], int]:
    """Return the examples that are trained on, with what the method must know of them, and how many are left out."""
    examples = given(source, "train_dataset")
    with phase(f"laying out {len(examples)} training examples"):
        kept = fitting(model, examples, max_length)
        train = model.prepared(kept)
        if model.step_decoder is not None:
            stages = model.method.stages()
            rows = (model.method.lay_out(example, model.encoder, stage) for example in train for stage in stages)
            model.step_decoder.check_room(rows, model.backbone)
    return train, len(examples) - len(kept)


def validation_examples(
    model: LatentModel, source: Any, task: Task | None, args: LatentTrainingArguments
) -> list[Example] | None:
    """Return the examples that are validated on, if there are any."""
    valid = None if source is None else given(source, "eval_dataset")[: args.eval_limit]
    if valid is not None and args.eval_limit < 1:
        raise InputError(f"eval_limit is {args.eval_limit}; answer at least one validation example")
    if valid:
        with phase(f"laying out {len(valid)} validation examples"):
            for example in valid:
                row = model.method.prompt(example.question, model.encoder, model.method.last_stage)
                check_length(model, example.question, row)
    if valid and task is None:
        raise InputError("validation by generation needs a task that checks answers: pass task=...")
    if valid is None and args.eval_strategy != "no":
        raise InputError(f"eval_strategy={args.eval_strategy} needs validation examples: pass eval_dataset=...")
    return valid


def fitting(model: LatentModel, examples: list[Example], max_length: int | None) -> list[Example]:
    """Return the examples that are read whole.

    Raises:
    InputError: they lack what the method learns from, or are too long and none may be left out.
    """
    method = model.method
    if method.needs_steps and not any(example.steps for example in examples):
        raise InputError(
            f"no training example has steps, but '{method.name}' learns from them; "
            "give data with steps, or choose a method that needs only answers (no_cot, pause)"
        )
    limit = max_length or model.backbone.context_length
    if limit is None:
        return examples
    lengths = {id(example): method.longest(example, model.encoder) for example in may_exceed(model, examples, limit)}
    worst = max(examples, key=lambda example: lengths.get(id(example), 0))
    if max_length is None and lengths.get(id(worst), 0) > limit:
        raise InputError(
            f"example '{worst.id}' takes {lengths[id(worst)]} positions but the model reads at most {limit}; "
            f"set train.max_length={limit} to leave longer examples out"
        )
    kept = [example for example in examples if lengths.get(id(example), 0) <= limit]
    if not kept:
        raise InputError(f"every training example is longer than max_length={limit}; raise it")
    return kept


def may_exceed(model: LatentModel, examples: Iterable[Example], limit: int) -> Iterator[Example]:
    """Yield the examples that may take more positions than a limit, without laying out those that cannot.

    A text has no more tokens than bytes, so a row has no more positions than one of as many one-letter steps and all
    its bytes, line breaks and the answer's mark among them.
    """
    shortest: dict[int, int] = {}
    for example in examples:
        n = len(example.steps)
        if n not in shortest:
            shortest[n] = model.method.longest(Example("1", ("1",) * n, "1"), model.encoder)
        text = "".join((example.question, *example.steps, example.answer))
        n_bytes = len(text) + NORMALISED * (len(text.encode(errors="surrogatepass")) - len(text))
        if shortest[n] + n_bytes + n + 1 + len(ANSWER_PREFIX) > limit:
            yield example


def check_text(model: LatentModel, eval_dataset: Any) -> None:
    """Refuse what cannot learn every token of a running text, or be validated on it."""
    method = model.method
    refuse(
        (eval_dataset is not None, "running text has no answers to validate on: set train.eval_strategy to no"),
        (
            method.decoder.kind != "lm_head",
            "a decoder of its own does not predict the text before the thought: set decoder.kind to lm_head",
        ),
        (
            method.plan.scope == "all" and method.plan.answer_context == "kv_last",
            "loop_scope=all with answer_from=kv_last leaves no pass that could predict the text: set answer_from to "
            "refeed",
        ),
    )


def given(source: Any, name: str) -> list[Example]:
    """Return the examples of a data set, of which there is at least one."""
    if isinstance(source, str) or not (isinstance(source, Iterable) or hasattr(source, "__getitem__")):
        raise InputError(f"{name} is {shown(source)}, but must be a list of examples, or a data set of such rows")
    examples = list(source)
    if not examples:
        raise InputError(f"{name} is empty; give at least one example")
    return examples if isinstance(examples[0], Example) else from_rows(examples, name)


def taught_states(
    model: LatentModel, examples: Sequence[Example], args: LatentTrainingArguments
) -> TeacherCache | None:
    """Return the teacher's states on disk, if they are wanted there; a teacher that does not fit is refused."""
    path, method = args.teacher_cache, model.method
    if method.has_latent_teacher:
        if path is not None:
            raise InputError(
                "train.teacher_cache keeps states at the ends of written steps, and teacher_thinks=latents has none: "
                "leave teacher_cache out; the teacher is run in every step"
            )
        _check_room_of(model, examples, args.max_length)
    if path is None:
        return None
    if method.hid.weight == 0 or method.teacher in (None, "self"):
        raise InputError(
            "train.teacher_cache keeps a frozen teacher's states: set hid.weight above 0 and its teacher to a folder"
        )
    with phase(f"laying out {len(examples)} examples for the teacher"):
        rows = [method.lay_out(example, model.encoder, stage) for stage in method.stages() for example in examples]
    return TeacherCache(path, rows, model.teacher, model.encoder.pad_id)


def _check_room_of(model: LatentModel, examples: Sequence[Example], max_length: int | None) -> None:
    """Refuse a teacher that cannot read the longest of the examples."""
    limit, own = model.load_teacher().backbone.context_length, max_length or model.backbone.context_length
    if limit is None or (own is not None and own <= limit):
        return
    longest = max(model.method.longest(example, model.encoder) for example in examples)
    if longest > limit:
        raise InputError(
            f"an example takes {longest} positions, but the teacher in {model.method.teacher} reads at most {limit}: "
            f"set train.max_length={limit} to leave longer examples out"
        )
