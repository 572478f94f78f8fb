"""`RowLayout`: what a model knows of rows: laying them out by its method, padding them, and the words they may hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from innerloop.config.method import Method
from innerloop.decoder.backbone import Backbone
from innerloop.errors import InputError
from innerloop.model.step_decoder import StepDecoder
from innerloop.text.batch import Batch, collate
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import LAT, Block, Row, ShownBlock


class RowLayout(nn.Module):
    """The part of a model that is before any tensor of states."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase
    method: Method
    encoder: PromptEncoder
    step_decoder: StepDecoder | None
    scorer: nn.Module | None  # of the masks of a canvas, where it is learned which are filled
    looped: tuple[Method, int, Method] | None = None  # a method, a number of loops, and the method with that many

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.backbone.device

    def rows(self, examples: Sequence[Example], stage: int | None = None, seed: str = "") -> list[Row]:
        """Lay out training examples at a stage (None: the last); ``seed`` fixes the draws of stage mixing."""
        return self.method.rows(examples, self.encoder, stage, seed)

    def prompts(self, questions: Sequence[str], stage: int | None = None, loops: int | None = None) -> list[Row]:
        """Lay out questions to be answered at a stage (None: the last), with another number of loops than trained."""
        method = self._looping(loops)
        stage = method.last_stage if stage is None else self.method.stage_or_last(stage)
        return [method.prompt(question, self.encoder, stage) for question in questions]

    def block(self, loops: int | None = None) -> Block | None:
        """Return the latents that a written token opens, with another number of loops than trained."""
        return self._looping(loops).block(self.encoder)

    def shown_blocks(
        self, rows: Sequence[Row], steps: Sequence[Sequence[str]] | None = None, loops: int | None = None
    ) -> list[list[ShownBlock]]:
        """Return where the latents of rows to be answered show steps; ``steps`` are the gold ones, where known."""
        method, known = self._looping(loops), steps or [()] * len(rows)
        pieces = [[self.encoder.step(text, i) for i, text in enumerate(texts)] for texts in known]
        return [method.shown_blocks(row, gold) for row, gold in zip(rows, pieces, strict=True)]

    def _looping(self, loops: int | None) -> Method:
        if loops is None:
            return self.method
        known = self.looped
        if known is None or known[0] is not self.method or known[1] != loops:
            self.looped = known = self.method, loops, self.method.with_loops(loops)
        return known[2]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pad rows into one batch on the model's device; rows longer than the context are refused."""
        limit = self.backbone.context_length
        longest = max(self.method.n_positions(row) for row in rows)
        if limit is not None and longest > limit:
            raise InputError(
                f"a row has {longest} positions but the model reads at most {limit}; "
                "shorten the question, or set train.max_length to leave long examples out"
            )
        if self.step_decoder is not None:
            self.step_decoder.check_room(rows, self.backbone)
        return collate(rows, self.encoder.pad_id).to(self.device)

    def marker_ids(self) -> list[int]:
        """Return the ids of the method's markers."""
        return self.tokenizer.convert_tokens_to_ids([*self.method.markers])

    def suppressed_ids(self) -> Tensor:
        """Return the ids that must never be written: markers that are only read."""
        never = [marker for marker in self.method.markers if marker not in self.method.written_markers]
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(never), device=self.device).long()

    def n_thought_positions(self, row: Row, n_loops: int) -> int:
        """Return how many latent positions a row has filled in ``n_loops`` iterations.

        Where every iteration appends one, a row that stopped before its last has left the others out.
        """
        if LAT not in self.method.markers:
            return 0
        n_latents = row.ids().count(self.tokenizer.convert_tokens_to_ids(LAT))
        return n_latents - (row.n_loops - n_loops if self.method.plan.scope == "append" else 0)
