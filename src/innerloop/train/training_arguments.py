"""The settings of training: transformers' `TrainingArguments`, and what curricula, losses and validation add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from innerloop.errors import InputError, nearest

WHOLE_NUMBERS = ("batch_size", "max_steps", "seed", "gradient_accumulation_steps", "eval_limit")


@dataclass
class LatentTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the field's usual defaults, and a few of our own.

    Args:
        batch_size: examples per device and forward pass.
        parts_learning_rate: of what the method adds to the backbone (loop, LoRA, time, gates); None: learning_rate.
        unfreeze_after: with a frozen backbone, train all of it from this step on; None: never.
        loss_norm: divide the loss by the supervised tokens of the global batch, or of each micro-batch.
        max_length: leave out examples longer than this many positions (counted); None: refuse them.
        eval_limit: validation examples to answer at each evaluation.
        max_new_tokens: the most tokens to write per validation example; None: as the task says.
        teacher_cache: file for the teacher's states, computed once before training and read from then on; None: the
            teacher is run in every step.
        loss_chunk: rows of logits that a loss may have in memory at a time, the others are made again for the gradient
            (for large vocabularies); fused: head and loss are one kernel of liger-kernel's, on a GPU; None: all.
    """

    learning_rate: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="constant")
    weight_decay: float = field(default=0.01)
    seed: int = field(default=0)
    logging_steps: float = field(default=10)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=2)
    report_to: str | list[str] | None = field(default="none")
    logging_nan_inf_filter: bool = field(default=False)
    remove_unused_columns: bool = field(default=False)
    disable_tqdm: bool | None = field(default=True)
    dataloader_pin_memory: bool = field(default=False)  # examples are laid out later; there is no tensor to pin

    batch_size: int = field(default=32, metadata={"help": "examples per device and forward pass"})
    parts_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the method's own parts"}
    )
    unfreeze_after: int | None = field(default=None, metadata={"help": "step from which a frozen backbone trains too"})
    loss_norm: Literal["global", "micro"] = field(default="global", metadata={"help": "what the loss is the mean over"})
    max_length: int | None = field(default=None, metadata={"help": "leave out longer examples; None: refuse them"})
    eval_limit: int = field(default=200, metadata={"help": "validation examples to answer at each evaluation"})
    max_new_tokens: int | None = field(default=None, metadata={"help": "most tokens to write per validation example"})
    teacher_cache: str | None = field(default=None, metadata={"help": "file for the teacher's states"})
    loss_chunk: int | str | None = field(
        default=None, metadata={"help": "rows of logits at a time in a loss, or fused; None: all"}
    )

    def __post_init__(self) -> None:
        if self.torch_compile or self.torch_compile_backend or self.torch_compile_mode:
            raise InputError(
                "torch_compile would compile the whole loss, whose passes are of unlike shapes and kinds, again and "
                "again: leave torch_compile, torch_compile_backend and torch_compile_mode out"
            )
        if self.use_liger_kernel:
            raise InputError("use_liger_kernel is called train.loss_chunk=fused here: it fuses the head with the loss")
        if isinstance(self.loss_chunk, str) and self.loss_chunk != "fused":
            raise InputError(f"loss_chunk is '{self.loss_chunk}'; give a number of rows, or fused")
        self.per_device_train_batch_size = self.batch_size
        super().__post_init__()
        _check_loggers(self.report_to or ())


def training_arguments(output_dir: str | Path, settings: dict[str, Any]) -> LatentTrainingArguments:
    """Make training arguments from a recipe's ``train:`` section, naming the nearest field for an unknown one."""
    known = {f.name: f for f in fields(LatentTrainingArguments) if f.init}
    values = {}
    for name, value in settings.items():
        if name not in known:
            raise InputError(f"train.{name} is not a training argument{nearest(name, known)}")
        if name.endswith("_strategy") and value is False:
            value = "no"  # what YAML makes of a bare no
        values[name] = _number(name, value, known[name].default)
    if "per_device_train_batch_size" in values:
        raise InputError("train.per_device_train_batch_size is called train.batch_size here")
    if values.get("loss_norm", "global") not in ("global", "micro"):
        raise InputError(f"train.loss_norm is '{values['loss_norm']}'; choose global or micro")
    if values.get("train_sampling_strategy") == "batch_rebalance":
        raise InputError("train.train_sampling_strategy may be random, sequential or group_by_length")
    for name in (
        "batch_size",
        "gradient_accumulation_steps",
        "max_length",
        "max_new_tokens",
        "max_steps",
        "loss_chunk",
    ):
        value = values.get(name)
        is_fused = name == "loss_chunk" and value == "fused"
        if value is not None and not is_fused and (not isinstance(value, int) or value < 1):
            raise InputError(f"train.{name} is {value!r}, but must be at least 1, and whole")
    try:
        return LatentTrainingArguments(output_dir=str(output_dir), **values)
    except (ValueError, TypeError) as error:
        raise InputError(f"the train section cannot be used: {error}") from error


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


def _number(name: str, value: Any, default: Any) -> Any:
    """Read ``1e-3``, which YAML takes for text, as a number where a number belongs."""
    if not isinstance(default, (int, float)) or isinstance(default, bool):
        return value
    try:
        number = float(value)
    except (ValueError, TypeError):
        raise InputError(f"train.{name} is {value!r}, but must be a number") from None
    if name in WHOLE_NUMBERS and number != int(number):
        raise InputError(f"train.{name} is {value!r}, but must be a whole number")
    return int(number) if number == int(number) and isinstance(default, int) else number
