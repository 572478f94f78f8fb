"""The settings of training: transformers' `TrainingArguments`, and what curricula, losses and validation add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames

from innerloop.checks.settings import Checked, kinds_of
from innerloop.checks.values import MOST, Bounds, Count, Natural, Positive, Seed, Share, Weight, fitted
from innerloop.decoder.fused_loss import check_fused
from innerloop.errors import InputError, nearest, refuse

Momentum = Annotated[float, Bounds(0, 1, below=True)]
Every = Annotated[float, Bounds(0, above=True)]
INHERITED: dict[str, Any] = {
    "output_dir": str | Path | None,
    "num_train_epochs": Positive,
    "max_steps": Annotated[int, Bounds(1, MOST, also=-1)],
    "lr_scheduler_type": SchedulerType,
    "warmup_steps": Weight,
    "optim": OptimizerNames,
    "adam_beta1": Momentum,
    "adam_beta2": Momentum,
    "adam_epsilon": Positive,
    "max_grad_norm": Weight,
    "label_smoothing_factor": Share,
    "neftune_noise_alpha": Weight | None,
    "gradient_accumulation_steps": Count,
    "per_device_eval_batch_size": Count,
    "eval_accumulation_steps": Count | None,
    "logging_strategy": IntervalStrategy,
    "eval_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
    "eval_steps": Every | None,
    "eval_delay": Weight,
    "torch_empty_cache_steps": Count | None,
    "data_seed": Seed | None,
    "dataloader_num_workers": Annotated[int, Bounds(0, 1000)],
    "dataloader_prefetch_factor": Count | None,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "ddp_bucket_cap_mb": Count | None,
    "ddp_timeout": Count,
}
"""What transformers' own arguments may be, where its types leave that open and they are not declared below."""
LOOSE = ("accelerator_config", "debug", "deepspeed", "fsdp", "fsdp_config")  # transformers puts objects in their place
WITHOUT = {
    "label_smoothing_factor": "losses here are of whole tokens",
    "neftune_noise_alpha": "no noise is added to embeddings (slr has loop.noise for its states)",
    "auto_find_batch_size": "choose batch_size, and gradient_accumulation_steps where memory is short",
    "resume_from_checkpoint": "go on with --resume, or train(resume_from_checkpoint=...)",
    "push_to_hub": "upload the folder of the trained model afterwards",
}
"""Arguments of transformers that training here would not heed, and what to do instead."""
BATCH_SIZE = "per_device_train_batch_size"  # which is called batch_size here


@dataclass
class LatentTrainingArguments(Checked, TrainingArguments):
    """transformers' TrainingArguments with the field's usual defaults, and a few of our own.

    Args:
        algorithm: how to learn: supervised, or grpo, which has fields of its own.
        batch_size: examples per device and forward pass.
        parts_learning_rate: of what the method adds to the backbone (loop, LoRA, time, gates); None: learning_rate.
        unfreeze_after: with a frozen backbone, train all of it from this step on; None: never.
        ema_decay: validate and save a moving average of the weights, of which so much stays in each step; the model in
            memory goes on with the weights themselves. None: no average.
        loss_norm: divide the loss by the supervised tokens of the global batch, or of each micro-batch.
        max_length: leave out examples longer than this many positions (counted); None: refuse them.
        eval_limit: validation examples to answer at each evaluation.
        stop_at_accuracy: end training at the first validation that is so accurate; None: go on to the end.
        max_new_tokens: the most tokens to write per validation example; None: as the task says.
        teacher_cache: file for the teacher's states, computed once before training and read from then on; None: the
            teacher is run in every step.
        loss_chunk: rows of logits that a loss may have in memory at a time, the others are made again for the gradient
            (for large vocabularies); fused: head and loss are one kernel of liger-kernel's, on a GPU; None: all.
    """

    learning_rate: Weight = field(default=1e-4)
    lr_scheduler_type: str = field(default="constant")
    weight_decay: Weight = field(default=0.01)
    seed: Seed = field(default=0)
    logging_steps: Every = field(default=10)
    save_steps: Every = field(default=500)
    save_total_limit: Count | None = field(default=2)
    report_to: str | list[str] | None = field(default="none")
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    disable_tqdm: bool | None = field(default=True)
    dataloader_pin_memory: bool = field(default=False)  # examples are laid out later; there is no tensor to pin

    algorithm: Literal["supervised"] = field(default="supervised", metadata={"help": "how to learn"})
    batch_size: Count = field(default=32, metadata={"help": "examples per device and forward pass"})
    parts_learning_rate: Weight | None = field(
        default=None, metadata={"help": "learning rate of the method's own parts"}
    )
    unfreeze_after: Natural | None = field(
        default=None, metadata={"help": "step from which a frozen backbone trains too"}
    )
    ema_decay: Momentum | None = field(
        default=None, metadata={"help": "decay of a moving average of the weights; None: no average"}
    )
    loss_norm: Literal["global", "micro"] = field(default="global", metadata={"help": "what the loss is the mean over"})
    max_length: Count | None = field(default=None, metadata={"help": "leave out longer examples; None: refuse them"})
    eval_limit: Count = field(default=200, metadata={"help": "validation examples to answer at each evaluation"})
    stop_at_accuracy: Share | None = field(default=None, metadata={"help": "validation accuracy to end training at"})
    max_new_tokens: Count | None = field(default=None, metadata={"help": "most tokens to write per validation example"})
    teacher_cache: str | None = field(default=None, metadata={"help": "file for the teacher's states"})
    loss_chunk: Count | Literal["fused"] | None = field(
        default=None, metadata={"help": "rows of logits at a time in a loss, or fused; None: all"}
    )

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Refuse names that are no arguments, and a second name for the batch size."""
        if BATCH_SIZE in named and named[BATCH_SIZE] != named.get("batch_size", cls.batch_size):
            raise InputError(f"{BATCH_SIZE} is called batch_size here: write batch_size={named[BATCH_SIZE]}")
        return super().__new__(cls, *given, **named)

    def __post_init__(self) -> None:
        for name, kind in argument_kinds(cast(Any, type(self))).items():
            fitted(name, getattr(self, name), kind)
        for name in LOOSE:
            value = getattr(self, name)
            odd = isinstance(value, int | float) and not isinstance(value, bool)
            refuse((odd, f"{name} is {value}, but must be text or fields, as {{name: value}}"))
        for name, instead in WITHOUT.items():
            refuse((bool(getattr(self, name)), f"{name} has no effect here: leave it out; {instead}"))
        refuse(
            (
                bool(self.torch_compile or self.torch_compile_backend or self.torch_compile_mode),
                "torch_compile would compile the whole loss, whose passes are of unlike shapes and kinds, again and "
                "again: leave torch_compile, torch_compile_backend and torch_compile_mode out",
            ),
            (
                self.save_strategy == "best" and not self.metric_for_best_model,
                "save_strategy is best, but metric_for_best_model does not say by what: name it, as accuracy",
            ),
            (
                self.stop_at_accuracy is not None and self.eval_strategy == "no",
                "stop_at_accuracy is of a validation: set eval_strategy to steps or epoch",
            ),
            (
                self.use_liger_kernel,
                "use_liger_kernel is called loss_chunk=fused here: it fuses the head with the loss",
            ),
        )
        self.per_device_train_batch_size = self.questions_per_batch
        try:
            super(Checked, self).__post_init__()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"these training arguments cannot be used: {' '.join(str(error).split())}") from error
        _check_loggers(self.report_to or ())
        self._check_schedule()

    @property
    def questions_per_batch(self) -> int:
        """Examples that are drawn for one forward pass."""
        return self.batch_size

    @property
    def steps_together(self) -> int:
        """Optimizer steps between two places at which training may be cut."""
        return 1

    def _check_schedule(self) -> None:
        """Refuse a schedule of the learning rate that lacks what it needs, or is given what it does not know."""
        if self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):  # these are made from what is measured
            return
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        needs = {"scheduler_specific_kwargs": dict(self.lr_scheduler_kwargs or {})}
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, **needs)
        except (ValueError, TypeError, KeyError) as error:
            told = " ".join(str(error).split())
            name = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
            raise InputError(
                f"lr_scheduler_type={name} with lr_scheduler_kwargs={needs['scheduler_specific_kwargs']}: "
                f"{told}; give what it needs by lr_scheduler_kwargs"
            ) from error


@cache
def argument_kinds(cls: Any = LatentTrainingArguments) -> dict[str, Any]:
    """Return what each training argument may be."""
    kinds = {**kinds_of(cls), **INHERITED}
    return {name: kind for name, kind in kinds.items() if name not in (*LOOSE, BATCH_SIZE)}


def training_arguments(
    output_dir: str | Path, settings: dict[str, Any], cls: type[LatentTrainingArguments] = LatentTrainingArguments
) -> LatentTrainingArguments:
    """Make training arguments from a recipe's ``train:`` section, naming the nearest field for an unknown one."""
    known, values = {f.name: f for f in fields(cls) if f.init}, dict[str, Any]()
    for name, value in settings.items():
        if name not in known:
            raise InputError(f"train.{name} is not a training argument{nearest(str(name), known)}")
        if name == "output_dir":
            raise InputError("train.output_dir is called out here, beside train")
        if name == BATCH_SIZE:
            raise InputError(f"train.{BATCH_SIZE} is called train.batch_size here")
        if name.endswith("_strategy") and value is False:
            value = "no"  # what YAML makes of a bare no
        found = fitted(f"train.{name}", value, argument_kinds(cast(Any, cls)).get(name, Any), is_text=True)
        is_whole = isinstance(found, float) and isinstance(known[name].default, int) and found == int(found)
        values[name] = int(found) if is_whole else found
    return cls(output_dir=str(output_dir), **values)


def _check_loggers(names: str | Sequence[str]) -> None:
    """Refuse what metrics cannot be reported to before anything is read; transformers would refuse it afterwards."""
    for name in [names] if isinstance(names, str) else names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(
                f"train.report_to knows no '{name}'{nearest(name, INTEGRATION_TO_CALLBACK)}: it may be {known}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError):
            raise InputError(f"train.report_to={name} needs a package: pip install {name}, or leave it out") from None


def check_libraries(args: LatentTrainingArguments) -> None:
    """Refuse arguments that need a library or a device which is not there."""
    if args.loss_chunk == "fused":
        check_fused(args.device)
