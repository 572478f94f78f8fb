"""`LatentCore`: a backbone, a method and the parts the method trains; thinking, loss, logits, saving.

What users have is `innerloop.LatentModel`, which also answers and is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from innerloop.checks.arguments import checked
from innerloop.checks.values import Some
from innerloop.decoder.adapters import add_markers
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import CostMeter
from innerloop.decoder.token_losses import ALL, AtOnce, HeadInputs, LogitsFn, summed_loss, token_losses
from innerloop.loop.loop import InnerLoop
from innerloop.loop.trace import Trace
from innerloop.methods import Method
from innerloop.methods.denoise.method import DenoisingMethod
from innerloop.methods.depth.method import DepthMethod
from innerloop.methods.text.cot import Cot
from innerloop.model import checkpoint, loading, run_folder
from innerloop.model.answer_decoder import AnswerDecoder, Classifier, decoder_for
from innerloop.model.distillation import check_teacher, latent_teacher_terms
from innerloop.model.frozen import FrozenReference, check_reader, check_states
from innerloop.model.losses import (
    Output,
    Terms,
    answer_losses,
    deep_loss,
    every_pass_loss,
    follow_loss,
    halting_loss,
    read_teacher,
    step_loss,
)
from innerloop.model.row_layout import RowLayout
from innerloop.model.step_decoder import StepDecoder, aux_loss
from innerloop.passes.context import Context
from innerloop.passes.depth_run import DepthRun
from innerloop.passes.halves import read_halves
from innerloop.passes.hybrid import HybridFeed, as_fed
from innerloop.passes.loss_inputs import LossInputs
from innerloop.passes.noised import noised
from innerloop.passes.region import Masked, join
from innerloop.passes.soft_masks import SoftMask, soft_mask
from innerloop.passes.thought import Thought, think
from innerloop.text.batch import Batch
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import ANSWER_PASS, Row


class LatentCore(RowLayout):
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
        self.encoder = PromptEncoder(tokenizer)
        add_markers(backbone, tokenizer, method.markers)
        aux = method.aux
        self.hybrid = None if method.hybrid is None else HybridFeed(method.hybrid, backbone)
        self.step_decoder = self.scorer = None
        self.soft: SoftMask | None = None
        if isinstance(method, DenoisingMethod):
            self.scorer = method.make_scorer(backbone)
            self.soft = soft_mask(method.soft, method.check_mask(self.encoder), backbone.device)
        if aux.weight > 0:
            other = None if aux.source is None else loading.load_decoder(aux.source, tokenizer, backbone.lm.dtype)
            self.step_decoder = StepDecoder(aux, backbone, other).to(backbone.device)
        options: dict[str, Any] = {"stop": method.stop, "fixed_point": method.fixed_point}
        options |= {"n_slots": method.n_distinct_slots, "soft": method.soft_thinking}
        tau, n_loops = backbone.embed_rms(), method.n_iterations
        self.loop = InnerLoop(method.loop, backbone.width, n_loops, tau, backbone, **options).to(backbone.device)
        depth = method.make_depth(backbone, self.loop) if isinstance(method, DepthMethod) else None
        self.depth = None if depth is None else depth.to(backbone.device)
        width = method.hid.width
        self.teacher_projection = nn.Linear(backbone.width, width, bias=False).to(backbone.device) if width else None
        decoder = decoder_for(method.decoder, backbone)
        self.decoder = None if decoder is None else decoder.to(backbone.device)
        for part in self.children():
            if aux.trains == ("base" if part is self.step_decoder else "decoder"):
                part.requires_grad_(False)
        self._frozen: dict[str, LatentCore] = {}  # in a dictionary, so that they are no part of this model
        self.reference = None if method.reference_source is None else FrozenReference(self._load_reference)
        self.checkpoint_passes = False
        self.loss_chunk: AtOnce = None  # rows of logits that a loss may have in memory

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return what the method trains besides the backbone, by name."""
        return {name: module for name, module in self.named_children() if name != "backbone"}

    # Loss

    def forward(
        self,
        batch: Batch,
        n_items: dict[str, Any] | None = None,
        trace: Trace | None = None,
        instead: Callable[[LatentCore, Batch], Any] | None = None,
    ) -> Any:
        """Compute the whole loss of a batch.

        Args:
            batch: laid-out examples.
            n_items: what each term's sum is divided by: the counts of the global batch. None: this batch's own.
            trace: filled with the loop's iterations.
            instead: computes what is returned in place of an `Output`; who trains in parallel wraps this call alone.
        """
        if instead is not None:
            return instead(self, batch)
        terms = Terms(n_items or batch.counts())
        every_pass = self.method.learns_every_pass
        context, measured, taught = None, dict[str, Tensor](), tuple[Tensor, ...]()
        for segment in batch.segments():
            thought = self.think(segment, trace, context)
            inputs, learns_all = self.loss_inputs(segment, thought), segment.n_free is None
            if isinstance(self.decoder, Classifier):
                assert batch.class_B is not None
                logits_BC = self.decoder(thought).float()
                terms.add("answer", cross_entropy(logits_BC, batch.class_B, reduction="sum"), "rows")
                show = None
            else:
                show = self.writing(segment, thought)
                total = self._written_loss(show, segment, measured)
                terms.add("answer", every_pass_loss(inputs, total) if learns_all and every_pass else total)
            taught = self._teacher_states(segment, terms) or taught
            self._add_loop_terms(terms, inputs, taught)
            if self.method.has_latent_teacher and learns_all:
                terms.add_all(latent_teacher_terms(inputs, self, self.load_teacher(), show))
            if self.depth is not None:
                terms.add_all(self.depth.loss_terms(inputs))
                measured |= thought.deep[-1].measured
            context = thought.after
        loss = torch.stack([self.method.term_weights[name] * mean for name, mean in terms.means.items()]).sum()
        return Output(loss, {name: mean.detach() for name, mean in terms.means.items()}, trace, measured)

    def _written_loss(self, show: LogitsFn, batch: Batch, measured: dict[str, Tensor]) -> Tensor:
        """Return the summed loss of the supervised tokens; where they are weighted, report their plain mean too."""
        if batch.weights_U is None:
            return summed_loss(show, batch.targets_U, self.loss_chunk)
        losses_U = token_losses(show, batch.targets_U, self.loss_chunk)
        measured["loss_masked"] = losses_U.detach().sum() / max(len(losses_U), 1)
        return (batch.weights_U * losses_U).sum()

    def loss_inputs(self, segment: Batch, thought: Thought) -> LossInputs:
        """Return what the terms of a segment's loss are made of."""
        write = partial(self.writing, segment, thought)
        return LossInputs(segment, thought, self.backbone, self.head_input, self.loss_chunk, write, self.reference)

    def _teacher_states(self, batch: Batch, terms: Terms) -> tuple[Tensor, ...]:
        """Return the teacher's states after every layer (B, S, D), and add what it lost if it is this model."""
        method, weights = self.method, self.method.term_weights
        if batch.taught is not None:
            return tuple(batch.taught[:, None])
        if batch.teacher is None or not (terms.counts["hid"] or weights.get("teacher")):
            return ()
        is_own = method.teacher == "self"
        learns = is_own and method.teacher_weight > 0
        backbone = self.backbone if is_own else self.teacher
        read = read_teacher(backbone, batch.teacher, learns, method.teacher_passes, self.loss_chunk)
        if read.loss is not None:
            terms.add("teacher", read.loss)
        return read.layers

    def _add_loop_terms(self, terms: Terms, inputs: LossInputs, states: tuple[Tensor, ...]) -> None:
        """Add the terms that look inside the loop and that the method gives a weight."""
        segment, loop, method = inputs.batch, inputs.thought.loop, self.method
        if segment.token_targets:
            terms.add("step", step_loss(inputs))
        if segment.hidden_targets:
            terms.add("hid", follow_loss(inputs, states, method.hid, self.teacher_projection))
        if segment.aux_targets and self.step_decoder is not None:
            told = aux_loss(inputs, self.step_decoder, self.loop, counts_K3=terms.counts.get("aux"))
            terms.add_mean("aux", told)
        if loop is None or segment.n_free is not None:
            return
        if self.training and method.deep.weight + method.halt.weight > 0:
            losses_TB = answer_losses(inputs)
            if method.deep.weight > 0:
                terms.add("deep", deep_loss(losses_TB, method.deep.schedule, segment.n_loops), "answer")
            if method.halt.weight > 0 and self.loop.stop is not None:
                terms.add("halt", halting_loss(inputs, losses_TB, method.halt, self.loop.stop), "rows")
        if loop.ponder_B is not None and self.training and method.ponder_weight > 0:
            terms.add("ponder", loop.ponder_B.sum(), "rows")
        if loop.gain is not None:
            bound = method.fixed_point.spectral_bound
            terms.add("gain", len(segment) * (loop.gain - bound).clamp(min=0).square(), "rows")

    @checked
    def loss(self, examples: Some[Example], stage: int | None = None, trace: bool = False, seed: str = "") -> Output:
        """Return the loss of examples; with ``trace`` also what the loop did, with read-outs.

        ``seed`` fixes what is drawn for them (a mixed stage, what a denoising method hides): give another in each step.
        """
        return self(self.batch(self.rows(examples, stage, seed)), trace=self.new_trace() if trace else None)

    @checked
    def answer_logits(self, examples: Some[Example], stage: int | None = None) -> list[Tensor]:
        """Return for each example the teacher-forced logits (n_supervised, V) of its written tokens, no dropout.

        A classifier writes none; its logits are (1, C).
        """
        return self.row_logits(self.rows(examples, stage))

    @torch.no_grad()
    def row_logits(self, rows: Sequence[Row]) -> list[Tensor]:
        """Return for each laid-out row what `answer_logits` returns."""
        was_training = self.training
        self.eval()
        batch = self.batch(rows)
        logits: list[list[Tensor]] = [[] for _ in rows]
        context = None
        for segment in batch.segments():
            thought = self.think(segment, context=context)
            if isinstance(self.decoder, Classifier):
                parts = self.decoder(thought).split(1)
            else:
                parts = self.written_logits(segment, thought).split(segment.n_targets)
            for row, part in zip(logits, parts):
                row.append(part)
            context = thought.after
        self.train(was_training)
        return [torch.cat(row) for row in logits]

    def think(self, batch: Batch, trace: Trace | None = None, context: Context | None = None) -> Thought:
        """Read the prefix of a batch and run its loop, up to where writing begins; ``context`` is what came before."""
        if context is None:
            context = self.new_context(batch, checkpoint_passes=self.checkpoint_passes and self.training)
        if context.depth is not None:
            context.depth.trace = trace
        follows = any(sites.iteration != ANSWER_PASS for sites in batch.hidden_targets)
        answer_prefix_ids = self.encoder.answer_prefix_ids()
        return think(
            self.method.plan,
            self.loop,
            batch,
            context,
            trace,
            self.read_out,
            all_states=follows,
            answer_prefix_ids=answer_prefix_ids,
        )

    def new_context(self, batch: Batch, meter: CostMeter | None = None, checkpoint_passes: bool = False) -> Context:
        """Return the context of a batch that has read nothing."""
        depth = None
        if self.depth is not None:
            depth = DepthRun(self.depth, batch.depth, wanted_BS=self.depth.wanted(batch, self.reference))
            depth.asked_B = batch.mask_BS[:, : batch.bounds[1]].sum(1) - 1
        return Context(self.backbone, len(batch), meter, checkpoint_passes, depth)

    def written_logits(self, batch: Batch, thought: Thought, state: Tensor | None = None) -> Tensor:
        """Return the logits (U, V) of the supervised tokens, written on a final state (None: the thought's own)."""
        return self.writing(batch, thought, state)(ALL)

    def writing(self, batch: Batch, thought: Thought, state: Tensor | None = None) -> LogitsFn:
        """Read the supervised tokens on a final state (None: the thought's own); return what shows their logits."""
        columns, mask = batch.columns(2)
        n_columns = batch.ids_BS.shape[1]
        rows, at = batch.predict_at_U // n_columns, batch.predict_at_U % n_columns
        if isinstance(self.decoder, AnswerDecoder):
            read = self.decoder.read(batch.ids_BS[:, columns], self.memory(thought, state), self.backbone)
            return HeadInputs(partial(self.decoder.show, backbone=self.backbone), read[rows, at - columns.start])
        if batch.halves is not None:
            return read_halves(thought, batch, self.soft, self.loss_chunk)
        if state is not None and thought.fixed is not None:
            state = torch.where(*thought.fixed, state)
        pending = thought.pending if state is None else [(state, thought.region_mask)]
        context, start = thought.context.fork(), thought.first_column
        if batch.skipped_B is not None:  # only what comes before the suffix keeps its positions
            context.read(*join(pending))
            context.next_position_B = context.next_position_B + batch.skipped_B
            pending, start = [], columns.start
        fed = as_fed(self.hybrid, batch.fed, self.backbone.embed(batch.ids_BS[:, columns]))
        embeds, mask = join([*pending, (fed, mask)])
        follows = any(sites.iteration == ANSWER_PASS for sites in batch.hidden_targets)
        options: dict[str, Any] = {"all_states": follows, "sees": self.method.plan.sees}
        if batch.is_noised:
            embeds, options = noised(self.soft, context, (embeds, mask), batch, start, self.loss_chunk, options)
        states = context.read(embeds, mask, **options)
        layers = states if follows else (states,)
        if state is None:
            thought.answer, thought.after = layers, context
        written = layers[-1]
        if batch.first_predicting < start:  # the prefix, which was read before, predicts some
            assert thought.prompt is not None
            prompt, region_start = self.head_input(thought.prompt[0]), batch.bounds[0]
            written = torch.cat([prompt, written], dim=1)
            at = torch.where(at < region_start, at, at - (start - region_start))  # what the loop read is left out
            start = 0
        return context.shown(written, rows, at - start)

    def memory(self, thought: Thought, state: Tensor | None = None) -> Masked:
        """Return what a decoder of its own attends to."""
        assert isinstance(self.decoder, AnswerDecoder) and thought.loop is not None and thought.prompt is not None
        state = thought.loop.state if state is None else state
        return self.decoder.memory(state, thought.state_mask, thought.prompt)

    def head_input(self, outputs: Tensor) -> Tensor:
        """Return the input of the head (..., D) that loop outputs are: the state after the final norm."""
        return outputs if self.method.plan.is_normed else self.backbone.norm(outputs)

    def read_out(self, outputs: Tensor) -> Tensor:
        """Return the logits (..., V) that loop outputs show through the final norm and the head."""
        return self.backbone.head(self.head_input(outputs))

    def new_trace(self) -> Trace:
        """Return an empty trace that records read-outs."""
        return Trace(self.read_out)

    # Models that are looked at: loaded once, frozen, and no part of this one

    @property
    def teacher(self) -> Backbone:
        """The frozen backbone whose states the loop follows; loaded when first asked for."""
        return self.load_teacher().backbone

    def load_teacher(self) -> LatentCore:
        """Return the frozen run that the method learns from, in evaluation mode; it is loaded once.

        Raises:
            InputError: it is not there, or does not fit this model.
        """
        folder = self.method.teacher
        assert folder is not None
        if "teacher" not in self._frozen:
            teacher = self._load_frozen(folder)
            teacher.encoder = PromptEncoder(
                teacher.tokenizer, self.encoder.running_text, self.encoder.wording
            )  # it reads this model's rows
            if self.method.has_latent_teacher:
                check_teacher(self, teacher, folder)
            else:
                check_states(self, teacher, folder)
            self._frozen["teacher"] = teacher
        return self._frozen["teacher"]

    def _load_frozen(self, folder: str, dtype: torch.dtype | str = "auto") -> LatentCore:
        """Load a run, or any decoder as a plain one, to be looked at."""
        with torch.random.fork_rng(devices=[]):  # making it draws weights, which no one else should notice
            method = None if run_folder.says_method(folder) else Cot()
            model = loading.load(LatentCore, folder, method, device=self.device, dtype=dtype)
        return model.requires_grad_(False).eval()

    def _load_reference(self) -> LatentCore:
        """Load the frozen model that reads every training row along."""
        source = self.method.reference_source
        assert source is not None
        model = self._load_frozen(source, self.backbone.lm.dtype)
        loading.check_tokens(model.tokenizer, self.tokenizer, source)
        check_reader(model.method, source)
        return model

    def prepared(self, examples: Sequence[Example]) -> list[Example]:
        """Return training examples with what the method must know of them; called once, before training begins."""
        source = self.method.labeller_source
        found = self.method.prepared(examples, None if source is None else self._load_frozen(source))
        if isinstance(self.method, DenoisingMethod):
            self.method.check_examples(found, self.encoder)
        return found

    # Saving and loading

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Keep no activations inside a pass, recompute them in the backward pass. The Trainer calls this if asked."""
        self.checkpoint_passes = True

    @checked
    def save_pretrained(self, path: str | Path) -> None:
        """Save an ordinary Hugging Face folder plus innerloop.json and innerloop.safetensors."""
        checkpoint.save(self, path)
