"""Rollouts of canvases, and how likely they are by an estimate of one pass: diffu-GRPO (dcolt.md, 8; arXiv 2504.12216).

    log p(answer | question) ~ sum_k log p(a_k | question with some tokens masked, all masks)

The pass is no step of the rollout, so the estimate is not the rollout's own likelihood; a share of the question is
masked so that updates of one rollout do not all see the same. It is the same share for the old model, the new one and
the reference.

Shapes: `U` tokens that were written, rollout by rollout.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from innerloop.decoder.token_losses import token_losses
from innerloop.engine.at_work import evaluating
from innerloop.engine.decoding import without
from innerloop.engine.generate import generate
from innerloop.engine.rollouts import Rollout
from innerloop.errors import refuse
from innerloop.methods.denoise.commits import Commit
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.model.model import LatentCore
from innerloop.text.batch import Batch
from innerloop.text.row import Kind, Noise, Row, Span

P_MASK_PROMPT = 0.15


@dataclass(frozen=True)
class CanvasRollout(Rollout):
    """A canvas that was filled.

    Attributes:
        gen_length: G, its tokens.
        hidden: tokens of the question that are masked where its likelihood is estimated.
    """

    gen_length: int = 0
    hidden: tuple[int, ...] = ()

    @property
    def commits(self) -> Sequence[Commit]:
        """What each pass has changed, in order."""
        return self.generation.commits


def fill_canvases(
    model: LatentCore,
    questions: Sequence[str],
    samples: int,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    places: Sequence[int] | None = None,
) -> list[CanvasRollout]:
    """Return samples of each question, whose commits are kept; draws are those of `WritingPolicy.roll_out`."""
    assert isinstance(model.method, DenoisingMethod)
    found = generate(
        model,
        questions,
        places=places,
        samples=samples,
        temperature=temperature,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        replayable=True,
    )
    rows, n = model.prompts(questions), model.method.gen_length
    return [
        CanvasRollout(i // samples, rows[i // samples], one, n_loops=len(one.commits), gen_length=n)
        for i, one in enumerate(found)
    ]


class OnePassPolicy:
    """Fills canvases by the method's rule; tokens are scored in one pass over a canvas of masks.

    Args:
        model: what predicts masks.
        temperature: of the distribution that tokens are drawn from; log-probabilities are those in it.
        batch_size: canvases that share a pass.
        p_mask_prompt: the share of the question that is masked where tokens are scored.
    """

    depends = False

    def __init__(
        self,
        model: LatentCore,
        temperature: float = 1.0,
        batch_size: int = 64,
        p_mask_prompt: float = P_MASK_PROMPT,
    ):
        method = model.method
        assert isinstance(method, DenoisingMethod)
        refuse(
            (
                method.plan.sees != "all",
                f"one pass over a canvas of masks says nothing of '{method.name}', whose blocks read those before: "
                "train llada or dream",
            ),
            (
                method.noise.filler == "random",
                "the likelihood of a canvas is estimated from masks, and with noise.filler=random none is read: set it "
                "to mask",
            ),
        )
        self.model, self.method, self.temperature, self.batch_size = model, method, temperature, batch_size
        self.share = p_mask_prompt

    def roll_out(
        self,
        questions: Sequence[str],
        samples: int,
        seed: int,
        max_new_tokens: int,
        places: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """Return the samples of each question; a draw depends on the seed, the question's place and the sample's."""
        drawn = self.temperature, self.batch_size, places
        found = fill_canvases(self.model, questions, samples, seed, max_new_tokens, *drawn)
        at = range(len(questions)) if places is None else places
        return [self._hidden(one, f"{seed}/{at[one.question] * samples + i % samples}") for i, one in enumerate(found)]

    def _hidden(self, rollout: CanvasRollout, seed: str) -> CanvasRollout:
        """Draw which tokens of the question are masked."""
        rng = random.Random(f"prompt/{seed}")
        hidden = tuple(k for k in range(len(rollout.row)) if rng.random() < self.share)
        return replace(rollout, hidden=hidden)

    def batch(self, rollouts: Sequence[Rollout]) -> Batch:
        """Return rollouts as one batch, whose supervised tokens are those written."""
        return self.model.batch([self._masked(one) for one in rollouts])

    def _masked(self, rollout: Rollout) -> Row:
        """Return a question with some tokens masked, and a canvas of masks of which what was written is told."""
        assert isinstance(rollout, CanvasRollout)
        mask_id, n_prompt, n = self.method.mask_id(self.model.encoder), len(rollout.row), len(rollout.ids)
        hidden = set(rollout.hidden)
        ids = tuple(mask_id if k in hidden else i for k, i in enumerate(rollout.row.ids()))
        rest = (mask_id,) * (rollout.gen_length - n)
        written = [Span(rollout.ids, Kind.ANSWER, supervised=True), Span(rest, Kind.ANSWER)]
        places = tuple(range(n_prompt, n_prompt + n))
        noise = Noise(places, (1.0,) * n, mask_id, self.method.shift, n)
        return Row([Span(ids, Kind.QUESTION)], suffix=written, noise=noise)

    def replay(self, model: LatentCore, batch: Batch, is_reference: bool = False) -> Tensor:
        """Return the estimated log-probability of each written token (U,), with a gradient, from one pass."""
        suppressed = model.suppressed_ids()
        with evaluating(list(model.modules())):
            show = model.writing(batch, model.think(batch))
            return -token_losses(
                lambda part: without(show(part), suppressed).float() / self.temperature,
                batch.targets_U,
                model.loss_chunk,
            )
