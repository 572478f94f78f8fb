"""`LatentModel`: a backbone, a method and the parts the method trains; loss, logits, generation, saving, loading.

model = LatentModel.from_pretrained("HuggingFaceTB/SmolLM2-135M", method=Coconut())
model.loss(examples).loss.backward()
model.generate(["How many legs have 3 cats?"])[0].text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from innerloop import checkpoint
from innerloop.adapters import add_markers
from innerloop.backbone import Backbone
from innerloop.context import Context
from innerloop.errors import InputError
from innerloop.examples import Example
from innerloop.layout import LAT, Batch, Row, Speller, collate
from innerloop.loop import InnerLoop
from innerloop.losses import Terms, add_loop_terms
from innerloop.methods import Method
from innerloop.thought import Masked, Thought, think
from innerloop.tokenizer import train_tokenizer
from innerloop.trace import Trace

if TYPE_CHECKING:
    from innerloop.engine import Generation


@dataclass
class Output:
    """A loss and what it is made of.

    Attributes:
        loss: the weighted sum of the terms.
        terms: each term's mean over its own supervised items, before weighting.
        trace: the loop's record, where asked for.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    trace: Trace | None = None


class LatentModel(nn.Module):
    """Any decoder that reasons by any method.

    Args:
        backbone: the decoder.
        tokenizer: its tokenizer; the method's markers are added to it and to the embeddings.
        method: how to reason.
    """

    def __init__(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase, method: Method):
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.method = method
        self.spell = Speller(tokenizer)
        add_markers(backbone, tokenizer, method.markers)
        max_loops = method.n_loops(method.curriculum.last_stage)
        loop = InnerLoop(
            method.loop, backbone.width, max_loops, backbone.embed_rms(), backbone, method.n_distinct_slots
        )
        self.loop = loop.to(backbone.device)
        self._teacher: list[LatentModel] = []  # in a list, so that it is no part of this model
        self.checkpoint_passes = False

    # Layout

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.backbone.device

    def rows(self, examples: Sequence[Example], stage: int | None = None, seed: str = "") -> list[Row]:
        """Lay out training examples at a stage (None: the last); ``seed`` fixes the draws of stage mixing."""
        return self.method.rows(examples, self.spell, stage, seed)

    def prompts(self, questions: Sequence[str], stage: int | None = None, loops: int | None = None) -> list[Row]:
        """Lay out questions to be answered at a stage (None: the last), with another number of loops than trained."""
        method = self.method if loops is None else with_loops(self.method, loops)
        stage = method.curriculum.last_stage if stage is None else stage
        return [method.prompt(question, self.spell, stage) for question in questions]

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Pad rows into one batch on the model's device; rows longer than the context are refused."""
        limit = self.backbone.context_length
        longest = max(len(row) for row in rows)
        if limit is not None and longest > limit:
            raise InputError(
                f"a row has {longest} positions but the model reads at most {limit}; "
                "shorten the question, or set train.max_length to leave long examples out"
            )
        return collate(rows, self.spell.pad_id).to(self.device)

    # Loss

    def forward(self, batch: Batch, n_items: dict[str, Any] | None = None, trace: Trace | None = None) -> Output:
        """Compute the whole loss of a batch.

        Args:
            batch: laid-out examples.
            n_items: what each term's sum is divided by: the counts of the global batch. None: this batch's own.
            trace: filled with the loop's iterations.
        """
        states, thought = self._states(batch, trace)
        logits_UV = self.backbone.head(states)
        terms = Terms(self, batch, n_items or batch.counts())
        terms.add("answer", cross_entropy(logits_UV.float(), batch.targets_U, reduction="sum"))
        if thought.loop is not None:
            add_loop_terms(terms, thought, trains=self.training)
        loss = torch.stack([self.method.term_weights[name] * mean for name, mean in terms.means.items()]).sum()
        return Output(loss, {name: mean.detach() for name, mean in terms.means.items()}, trace)

    def loss(self, examples: Sequence[Example], stage: int | None = None, trace: bool = False) -> Output:
        """Return the loss of examples; with ``trace`` also what the loop did, with read-outs."""
        return self(self.batch(self.rows(examples, stage)), trace=self.new_trace() if trace else None)

    @torch.no_grad()
    def answer_logits(self, examples: Sequence[Example], stage: int | None = None) -> list[Tensor]:
        """Return for each example the teacher-forced logits (n_supervised, V) of its written tokens, no dropout."""
        was_training = self.training
        self.eval()
        batch = self.batch(self.rows(examples, stage))
        states, _ = self._states(batch)
        self.train(was_training)
        return list(self.backbone.head(states).split(batch.n_targets))

    def _states(self, batch: Batch, trace: Trace | None = None) -> tuple[Tensor, Thought]:
        """Return the states that predict the supervised tokens (U, D), and the thought before them."""
        context = Context(self.backbone, len(batch), checkpoint_passes=self.checkpoint_passes and self.training)
        follows = batch.teacher is not None
        thought = think(self.method, self.loop, batch, context, trace, self.read_out, all_states=follows)
        return self.answer_states(batch, thought, thought.context.fork(), thought.pending), thought

    def answer_states(self, batch: Batch, thought: Thought, context: Context, pending: list[Masked]) -> Tensor:
        """Read what is pending and the suffix; return the states that predict the supervised tokens (U, D)."""
        columns, mask = batch.columns(2)
        states = context.read(*join([*pending, (self.backbone.embed(batch.ids_BS[:, columns]), mask)]))
        n_columns = batch.ids_BS.shape[1]
        rows, at = batch.predict_at_U // n_columns, batch.predict_at_U % n_columns
        return states[rows, at - thought.first_column]

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the logits (..., V) that loop outputs show through the final norm and the head."""
        normed = self.method.loop.feedback_site == "post_norm"
        return self.backbone.head(outputs if normed else self.backbone.norm(outputs))

    def new_trace(self) -> Trace:
        """Return an empty trace that records read-outs."""
        return Trace(self.read_out)

    @property
    def teacher(self) -> Backbone:
        """The frozen backbone whose states the loop follows; loaded when first asked for."""
        if not self._teacher:
            folder = self.method.losses.teacher
            assert folder is not None
            self._teacher.append(checkpoint.load(folder, device=self.device).requires_grad_(False).eval())
        return self._teacher[0].backbone

    # Generation

    def generate(self, questions: Sequence[str], **options: Any) -> list[Generation]:
        """Answer questions; see `innerloop.engine.generate` for the options."""
        from innerloop.engine import generate

        return generate(self, questions, **options)

    # Saving and loading

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Keep no activations inside a pass, recompute them in the backward pass. The Trainer calls this if asked."""
        self.checkpoint_passes = True

    def save_pretrained(self, path: str | Path) -> None:
        """Save an ordinary Hugging Face folder plus innerloop.json and innerloop.safetensors."""
        checkpoint.save(self, path)

    @classmethod
    def from_pretrained(cls, path: str | Path, method: Method | None = None, **options: Any) -> LatentModel:
        """Load a saved run, or put a method on any Hugging Face model; see `innerloop.checkpoint.load`."""
        return checkpoint.load(path, method, **options)

    @classmethod
    def from_scratch(
        cls, settings: Mapping[str, Any], examples: Sequence[Example], method: Method, seed: int = 0
    ) -> LatentModel:
        """Make a backbone with fresh weights and a word tokenizer trained on the text of examples.

        Args:
            settings: ``type`` (a transformers model type such as llama or gpt2) and fields of its configuration.
            examples: whose words the tokenizer learns.
            method: how to reason.
            seed: of the initial weights.
        """
        return checkpoint.from_scratch(settings, train_tokenizer(examples), method, seed)

    def suppressed_ids(self) -> Tensor:
        """Return the ids that must never be written: the markers."""
        return torch.tensor(self.tokenizer.convert_tokens_to_ids([*self.method.markers]), device=self.device).long()

    def n_thought_positions(self, row: Row) -> int:
        """Return how many latent positions a row holds."""
        lat = self.tokenizer.convert_tokens_to_ids(LAT)
        return row.ids().count(lat) if LAT in self.method.markers else 0


def with_loops(method: Method, loops: int) -> Method:
    """Return the method with another number of loops."""
    if not any(f.name == "max_loops" for f in fields(method)):
        raise InputError(f"'{method.name}' has no max_loops, so the number of loops cannot be set; leave loops out")
    return replace(method, max_loops=loops)  # type: ignore[call-arg]


def join(pieces: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Put embeddings side by side, with one mask over all, or None when nothing is padded."""
    embeds = torch.cat([embed for embed, _ in pieces], dim=1)
    if all(mask is None for _, mask in pieces):
        return embeds, None
    masks = [embed.new_ones(embed.shape[:2], dtype=torch.long) if mask is None else mask for embed, mask in pieces]
    return embeds, torch.cat(masks, dim=1)
