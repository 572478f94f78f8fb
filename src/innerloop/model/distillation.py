"""Learning from a teacher that thinks in latents itself: its states, iteration by iteration, and its predictions.

    L_hid   mean over iterations t and latents of  d(W h_t / s, H_sigma(t) / s)     h its own states, H the teacher's
    L_kd    mean over written tokens of  tau^2 KL(softmax(teacher / tau) || softmax(own / tau))   (arXiv 1503.02531)

The teacher reads this model's own rows with its own loop, so that every latent has its like there. It may be of another
width, another depth and another number of iterations; its tokens and its layout must be the same.

Shapes: `T` the teacher's iterations, `B` rows, `N` latents, `D` width, `U` written tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from innerloop.config.method import Method
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.token_losses import LogitsFn, by_rows, divergence
from innerloop.errors import refuse
from innerloop.model.answer_decoder import Classifier
from innerloop.model.losses import distance, state_at
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.row import Row


class Student(Protocol):
    """What is known of a model that learns, and of one that teaches."""

    method: Method
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    teacher_projection: nn.Linear | None

    @property
    def decoder(self) -> nn.Module | None:
        """What answers besides the model, if anything does."""

    def prompts(self, questions: Sequence[str]) -> list[Row]:
        """Lay out questions to be answered."""


class Teacher(Student, Protocol):
    """A model that thinks in latents itself, frozen."""

    def think(self, batch: Batch) -> Thought:
        """Read the prefix of a batch and run the loop."""

    def writing(self, batch: Batch, thought: Thought) -> LogitsFn:
        """Return what shows the logits of the supervised tokens."""


def latent_teacher_terms(inputs: LossInputs, student: Student, teacher: Teacher, own: LogitsFn | None) -> PassTerms:
    """Return the distance to a thinking teacher's states and the divergence from its predictions.

    ``own`` shows the student's logits of the supervised tokens; None where it writes none.
    """
    batch, loop = inputs.batch, inputs.thought.loop
    terms, weights = PassTerms(), student.method.term_weights
    n_loops = teacher.method.n_loops(teacher.method.last_stage)
    read = replace(batch, n_loops=[n_loops] * len(batch), token_targets=[], aux_targets=[], hidden_targets=[])
    with torch.no_grad():
        taught = teacher.think(read)
    if weights["hid"] and loop is not None:
        assert taught.loop is not None
        states = torch.stack([state_at(taught.loop.states, taught.loop.state, t) for t in range(1, n_loops + 1)])
        terms["hid"] = state_distance(inputs, student.method, states, student.teacher_projection), "rows"
    if weights["kd"] and own is not None:
        with torch.no_grad():
            shown = teacher.writing(read, taught)

        def losses_of(part: slice) -> Tensor:
            with torch.no_grad():
                wanted = shown(part)
            return divergence(wanted, own(part), student.method.kd.temperature)

        terms["kd"] = by_rows(losses_of, len(batch.targets_U), inputs.chunk).sum(), "answer"
    return terms


def state_distance(
    inputs: LossInputs, method: Method, taught_TBND: Tensor, projection: nn.Linear | None = None
) -> Tensor:
    """Return, summed over rows, the mean distance of a row's states to those of the teacher that they follow.

    Both are divided by the standard deviation of the teacher's states in the batch first: rescaled to the embeddings'
    RMS they are small, and a smooth L1 distance would hardly see them.
    """
    batch, thought = inputs.batch, inputs.thought
    assert thought.loop is not None
    loop, kind = thought.loop, method.hid.distance
    mask_BN = taught_TBND.new_ones(taught_TBND.shape[1:3]) if thought.state_mask is None else thought.state_mask
    spread, one = taught_TBND[:, mask_BN.bool()].float().std().clamp(min=1e-6), taught_TBND.new_ones(())
    pairs = [method.followed(n, len(taught_TBND)) for n in batch.n_loops]
    n_pairs = torch.tensor([sum(at is not None for at in row) for row in pairs], device=mask_BN.device)
    share_BN = mask_BN / (n_pairs * mask_BN.sum(1)).clamp(min=1)[:, None]
    total = batch.ids_BS.new_zeros((), dtype=torch.float32)
    for t in range(1, max(batch.n_loops) + 1):
        rows, at = _paired(pairs, t)
        if not rows:
            continue
        student = state_at(loop.states, loop.state, t)[rows]
        if projection is not None:
            student = projection(student.to(projection.weight.dtype))
        target = taught_TBND[at, rows].float() / spread
        total = total + (share_BN[rows] * distance(student.float() / spread, target, kind, one)).sum()
    return total


def _paired(pairs: Sequence[Sequence[int | None]], t: int) -> tuple[list[int], list[int]]:
    """Return the rows that follow the teacher in the 1-based iteration t, and its 0-based iterations that they do."""
    found = [(r, at) for r, row in enumerate(pairs) if t <= len(row) and (at := row[t - 1]) is not None]
    return [r for r, _ in found], [at for _, at in found]


def check_teacher(model: Student, teacher: Teacher, folder: str) -> None:
    """Refuse a teacher that does not read what the model reads, or has no states of the width that is followed.

    Raises:
        InputError: which of these it is, and how to mend it.
    """
    theirs, ours = teacher.method, model.method
    width, hid = ours.hid.width or model.backbone.width, ours.term_weights["hid"] > 0
    refuse(
        (
            teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab(),
            f"the tokens of the teacher in {folder} have other ids than this model's: both must come from one family, "
            "or learn their words from the same examples",
        ),
        (
            _layout(teacher) != _layout(model),
            f"the teacher in {folder} ('{theirs.name}') lays out a question in another way than this model, so their "
            "latents are no pairs: set loop_scope and n_slots as that run has them, or teacher_thinks to steps",
        ),
        (
            hid and theirs.n_loops(theirs.last_stage) == 0,
            f"the teacher in {folder} does not loop, so there are no states to follow: set hid.weight to 0",
        ),
        (
            hid and teacher.backbone.width != width,
            f"the teacher in {folder} has states of width {teacher.backbone.width}, this model follows with {width}: "
            f"set hid.width to {teacher.backbone.width}",
        ),
        (
            ours.term_weights["kd"] > 0 and isinstance(teacher.decoder, Classifier),
            f"the teacher in {folder} chooses among classes, and predicts no tokens: set kd.weight to 0",
        ),
    )


def _layout(model: Student) -> Any:
    """Return how a question is laid out: where the loop works, and the tokens of each segment."""
    (row,) = model.prompts(["?"])
    return model.method.plan.scope, [[span.ids for span in part] for part in (row.prefix, row.region, row.suffix)]
