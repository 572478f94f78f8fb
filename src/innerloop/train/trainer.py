"""Training on `transformers.Trainer`: curricula, losses over the global batch, validation by generation.

accelerate, mixed precision, gradient accumulation, checkpoints, resuming and `report_to` come with it. What is our
own: examples are laid out when their optimizer step begins, so the curriculum's stage and the draws of stage mixing
depend on nothing but the step and the seed, and a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback

from innerloop.checks.arguments import checked
from innerloop.decoder.adapters import adapted
from innerloop.decoder.token_losses import AtOnce
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.measure.accuracy import accuracy_of, evaluate
from innerloop.model import checkpoint, run_folder
from innerloop.model.loading import load_lm
from innerloop.model.teacher_cache import TeacherCache
from innerloop.phases.phase import phase
from innerloop.tasks import Task
from innerloop.text.batch import Batch, added, collate
from innerloop.text.examples import Example
from innerloop.text.row import Row
from innerloop.train import checkpoints
from innerloop.train.callbacks import MetricsFile, StopOnInterrupt
from innerloop.train.parameter_groups import parameter_groups
from innerloop.train.resumable import ResumableTrainer
from innerloop.train.sharding import check_sharded, gathered, kept_whole, whole
from innerloop.train.training_arguments import LatentTrainingArguments, check_libraries
from innerloop.train.training_set import (
    ByLength,
    check_text,
    given,
    taught_states,
    training_examples,
    validation_examples,
)
from innerloop.train.weight_average import WeightAverage

DIVERGED = 3.0  # a loss this many times that of guessing uniformly means training has gone wrong


class DivergedError(InputError):
    """The loss is not finite, or far above that of guessing."""


class LatentTrainer(ResumableTrainer):
    """Trains a `LatentModel` on examples.

    Args:
        model: the model.
        args: how to train; ``output_dir`` receives metrics.jsonl, checkpoint-<step>/ and the best model, checkpoint/.
        train_dataset: examples, or a data set with the columns question, steps and answer.
        eval_dataset: examples to validate on by generation.
        task: extracts and checks answers, and says whether examples are running text; needed for validation.
        callbacks: transformers' TrainerCallbacks.
    """

    model: LatentModel
    args: LatentTrainingArguments

    @checked
    def __init__(
        self,
        model: LatentModel,
        args: LatentTrainingArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        task: Task | None = None,
        callbacks: Sequence[Any] = (),
    ):
        self.task = task
        self.curriculum = model.method.curriculum
        if task is not None and task.running_text != model.encoder.running_text:
            model.encoder = model.encoder.reading(task.running_text)
        if model.encoder.running_text:
            check_text(model, eval_dataset)
        self.args = args
        train, self.n_left_out = self._training_examples(model, train_dataset)
        valid = validation_examples(model, eval_dataset, task, args)
        check_libraries(args)
        model.loss_chunk = cast(AtOnce, args.loss_chunk)
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_they_are,
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=valid,  # type: ignore[arg-type]
            callbacks=[MetricsFile(), StopOnInterrupt(args.steps_together), *callbacks],
        )
        self._average = None if args.ema_decay is None else WeightAverage(model, args.ema_decay)
        if self._average is not None:
            self.add_callback(self._average)
        check_sharded(bool(args.fsdp), self.is_fsdp_enabled)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._measured: dict[str, tuple[Tensor, int]] = {}  # the sums of what is only reported, and of how many
        self._n_logged_steps: int | None = None  # set when the first step begins
        self._taught = self._taught_states(model, train)
        self._finite = torch.ones((), dtype=torch.bool, device=args.device)

    # Data: examples become rows when their step begins.

    def _training_examples(self, model: LatentModel, source: Any) -> tuple[list[Example], int]:
        """Return the examples that are trained on, and how many are left out."""
        return training_examples(model, source, self.args.max_length)

    def _taught_states(self, model: LatentModel, examples: Sequence[Example]) -> TeacherCache | None:
        """Return the teacher's states on disk, if they are wanted there."""
        return taught_states(model, examples, self.args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        """Return the order of the examples; with train_sampling_strategy=group_by_length like lengths go together."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        with phase(f"measuring the lengths of {len(self.train_dataset)} examples"):
            lengths = [self.model.method.longest(example, self.model.encoder) for example in self.train_dataset]
        n = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return ByLength(lengths, n, self.args.data_seed or self.args.seed)

    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch."""
        n_batches = math.ceil(len(self.train_dataset) / (self.args.train_batch_size * self.args.world_size))
        return max(math.ceil(n_batches / self.args.gradient_accumulation_steps), 1)

    def stage_at(self, step: int) -> int:
        """Return the curriculum's stage at an optimizer step."""
        return self.model.method.stage_at(step, self.steps_per_epoch())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the weights that decay: as transformers says, but for modules with ``decays = False``."""
        kept = {id(p) for m in model.modules() if not getattr(m, "decays", True) for p in m.parameters()}
        spared = {name for name, p in model.named_parameters() if id(p) in kept}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; the method's parts may have a learning rate of their own, modules with ``group`` more."""
        named = [(name, module) for name, module in self.model.named_modules() if hasattr(module, "group")]
        if self.args.parts_learning_rate is None and self.args.unfreeze_after is None and not named:
            return super().create_optimizer(model)
        decays = set(self.get_decay_parameter_names(self.model))
        cls, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        groups = parameter_groups(self.model, self.args, dict(named), decays, settings)
        self.optimizer = cls(groups, **settings)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Lay out the next step's micro-batches, and count the supervised items of the global batch."""
        step = self.state.global_step
        if self._n_logged_steps is None:
            self._n_logged_steps = step
        stage = self.stage_at(step)
        if self.model.depth is not None:
            self.model.depth.step = step
        self._maybe_reset_optimizer(step, stage)
        if self.args.unfreeze_after is not None and step >= self.args.unfreeze_after:
            self.model.backbone.requires_grad_(True)
        micro_batches = []
        for i, examples in zip(range(num_batches), epoch_iterator):
            place = (
                i * self.args.world_size + self.args.process_index
            )  # of the micro-batch among those of all processes
            seed = f"{self.args.seed}/{step}/0/{place}"
            micro_batches.append(self._collate(self.model.rows(examples, stage, seed)))
        if not micro_batches or self.args.loss_norm == "micro":
            return [{"batch": batch, "n_items": None} for batch in micro_batches], None
        counts: dict[str, list[Any]] = {}
        if self.model.step_decoder is not None:  # all processes count the same things
            counts["aux"] = [torch.zeros(1, 3, device=self.args.device)]
        for batch in micro_batches:
            for name, n in batch.counts().items():
                counts.setdefault(name, []).append(n)
        totals = {name: added(ns) if name == "aux" else sum(ns) for name, ns in counts.items()}
        n_items = {name: self._over_processes(n, device) for name, n in totals.items()}
        return [{"batch": batch, "n_items": n_items} for batch in micro_batches], None

    def _collate(self, rows: list[Row]) -> Batch:
        states_of = None if self._taught is None else self._taught.states_of
        return collate(rows, self.model.encoder.pad_id, states_of).to(self.args.device)

    def _over_processes(self, n: Any, device: torch.device) -> Any:
        if self.args.world_size == 1:
            return n
        own = torch.as_tensor(n, device=device)
        if own.ndim:  # processes may know unlike numbers of groups
            own = self.accelerator.pad_across_processes(own)
        return self.accelerator.gather(own[None]).sum(0)

    def _maybe_reset_optimizer(self, step: int, stage: int) -> None:
        if step == 0:
            return
        policy = self.curriculum.reset_optimizer
        changes = policy == "stage" and self._changes(self.stage_at(step - 1), stage)
        if changes or (policy == "epoch" and step % self.steps_per_epoch() == 0):
            self.optimizer.state.clear()  # type: ignore[union-attr]

    def _changes(self, before: int, stage: int) -> bool:
        """Tell whether any example is laid out differently at two stages."""
        method, encoder = self.model.method, self.model.encoder
        return before != stage and any(
            method.lay_out(example, encoder, before) != method.lay_out(example, encoder, stage)
            for example in self.train_dataset
        )

    # Loss: its terms are summed on the device and looked at only when logged.

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, normalised over the global batch."""
        out = model(inputs["batch"], n_items=inputs["n_items"])
        self._finite &= torch.isfinite(out.loss.detach())
        n_means = 1 if inputs["n_items"] else self.current_gradient_accumulation_steps
        for name, mean in out.terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=mean.device)) + mean / n_means
        for name, value in out.measured.items():
            total, n = self._measured.get(name, (torch.zeros_like(value), 0))
            self._measured[name] = total + value, n + 1
        # Data-parallel gradients are averaged over processes, but the mean is over the global batch.
        loss = out.loss * self.accelerator.num_processes if inputs["n_items"] else out.loss
        return (loss, out) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run one micro-batch."""
        self.loss_is_scaled_for_ga = self.args.loss_norm == "global"
        with kept_whole(self.model, self.args.activation_checkpointing):
            return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each term of the loss, what the method measured and the stage; stop if training has gone wrong.

        The mean loss of all steps, which is logged last, is known only where all steps were run in one go.
        """
        if "train_loss" in logs:
            if self.interrupted:
                return
            if self._initial_global_step > 0:
                logs = {name: value for name, value in logs.items() if name != "train_loss"}
        if "loss" in logs:
            logs |= self._means()
            if self.model.method.last_stage:
                logs["stage"] = self.stage_at(max(self.state.global_step - 1, 0))
            self._check_health(self._loss_of_text(logs))
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """Return the means over the steps since the last log, of all processes: loss terms, and what was measured."""
        n_steps = max(self.state.global_step - (self._n_logged_steps or 0), 1)
        terms = {f"loss_{name}": total.item() / n_steps for name, total in self._sums.items()}
        measured = {name: (total.flatten().tolist(), n) for name, (total, n) in self._measured.items()}
        own = [(terms, measured, bool(self._finite))]
        found = gather_object(own) if self.args.world_size > 1 else own
        self._finite &= all(finite for _, _, finite in found)
        self._sums, self._measured, self._n_logged_steps = {}, {}, self.state.global_step
        names = dict.fromkeys(name for one, _, _ in found for name in one)  # a process may have no target of a kind
        shares = 1 if self.args.loss_norm == "global" else len(found)  # of a global batch each has summed its own part
        logs = {name: sum(one.get(name, 0.0) for one, _, _ in found) / shares for name in names}
        for name in measured:
            each = [one[name] for _, one, _ in found]
            means = [sum(values) / sum(n for _, n in each) for values in zip(*(totals for totals, _ in each))]
            # Where there are several routers, they are numbered from 1.
            logs |= {f"{name}_{i}" if len(means) > 1 else name: mean for i, mean in enumerate(means, 1)}
        return logs

    def _loss_of_text(self, logs: dict[str, float]) -> float | None:
        """Return the mean loss of written tokens, which guessing has a value for."""
        return logs.get("loss_masked", logs["loss_answer"])

    def _check_health(self, loss: float | None = None) -> None:
        finite = bool(self._finite) and (loss is None or math.isfinite(loss))
        guess = math.log(self.model.backbone.config.vocab_size)  # other terms have other scales
        if finite and (loss is None or loss <= DIVERGED * guess):
            return
        kept = checkpoints.last_kept(self.args.output_dir)
        what = "is not a finite number" if not finite else f"of text is {loss:.3g}, far above guessing ({guess:.3g})"
        raise DivergedError(
            f"training stopped at step {self.state.global_step}: the loss {what}; {kept}; "
            "lower train.learning_rate or train.max_grad_norm, or steady the loop (its residual, alpha, rescale)"
        )

    # Validation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Answer the validation examples at the current stage's layout; keep the best model of the last stage."""
        examples = self.eval_dataset if eval_dataset is None else given(eval_dataset, "eval_dataset")
        if not examples or self.task is None:
            raise InputError("there is nothing to validate on: pass eval_dataset=... and task=...")
        stage = self.stage_at(max(self.state.global_step - 1, 0))
        n_tokens, at_once = self.args.max_new_tokens, self.args.eval_batch_size
        with self._averaged():
            predictions = evaluate(self.model, self.task, examples, n_tokens, at_once, stage)
            accuracy = accuracy_of(predictions)
            metrics = {
                f"{metric_key_prefix}_accuracy": accuracy,
                f"{metric_key_prefix}_unparsable": sum(p.predicted is None for p in predictions),
            }
            self.log(dict(metrics))
            if stage == self.model.method.last_stage:
                self._keep_if_best(accuracy, stage)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_training_stop |= self.is_good_enough
        return metrics

    def _kept_validation(self) -> dict[str, Any] | None:
        """Return what validation chose the kept model by; None where it was not chosen, or there is none."""
        is_there = (self.best_folder / run_folder.SETTINGS).exists()
        return run_folder.read_settings(self.best_folder).get("validation") if is_there else None

    def _keep_if_best(self, accuracy: float, stage: int) -> None:
        best = self._kept_validation() if self.args.should_save else None
        with gathered(self.model):
            if self.args.should_save and (best is None or accuracy >= best["accuracy"]):
                self._check_weights()
                record = {"accuracy": accuracy, "n": len(self.eval_dataset), "step": self.state.global_step}
                told = {"validation": record, "seed": self.args.seed, "stage": stage}
                checkpoint.save(self.model, self.best_folder, told)

    # Checkpoints

    def _averaged(self) -> AbstractContextManager[None]:
        """Have the average of the weights in a block, where one is kept."""
        return nullcontext() if self._average is None else self._average.used()

    def _save_result(self) -> None:
        with self._averaged(), gathered(self.model):
            if self.args.should_save and not self.interrupted and self._kept_validation() is None:
                checkpoint.save(self.model, self.best_folder, {"seed": self.args.seed, "stage": self.reached_stage})

    @property
    def reached_stage(self) -> int:
        """The stage of the curriculum that the last step was in."""
        return self.stage_at(max(self.state.global_step - 1, 0))

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended training early."""
        return self.state.global_step < self.state.max_steps and not self.is_good_enough

    @property
    def is_good_enough(self) -> bool:
        """Whether a validation was accurate enough to end training."""
        wanted = self.args.stop_at_accuracy
        return wanted is not None and any(log.get("eval_accuracy", 0) >= wanted for log in self.state.log_history)

    def _check_weights(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self._finite &= torch.stack([whole(torch.isfinite(p).all()) for p in trained]).all()
        self._check_health()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with gathered(self.model):
            if self.args.should_save:
                checkpoint.write(self.model, Path(output_dir or self.args.output_dir))
        if self._average is not None:
            self._average.save(Path(output_dir or self.args.output_dir), self.args.should_save)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        run_folder.read_settings(folder)
        lm = self.model.backbone.lm
        with gathered(self.model, changes=True):
            if not adapted(lm):
                lm.load_state_dict(load_lm(folder, is_own=True, dtype=lm.dtype).state_dict())
            checkpoint.load_parts(self.model, folder)
        if self._average is not None:
            self._average.load(folder)


def _as_they_are(examples: list[Example]) -> list[Example]:
    """Collate nothing: rows are laid out when their step begins."""
    return examples
