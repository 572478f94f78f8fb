"""Which weights learn together: those of the backbone, of what the method adds, and of modules with a ``group``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from innerloop.train.training_arguments import LatentTrainingArguments


def parameter_groups(
    model: nn.Module,
    args: LatentTrainingArguments,
    named: Mapping[str, nn.Module],
    decays: Collection[str],
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer.

    Args:
        model: what is trained.
        args: its learning rates and weight decay.
        named: modules that say how they learn, in ``group``.
        decays: names of the weights that decay.
        settings: the optimizer's own; of those of a group it gets what it knows.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or args.unfreeze_after is not None:
            owner = next((owner for owner in named if name.startswith(f"{owner}.")), None)
            part = owner or ("backbone" if name.startswith("backbone.") else "parts")
            groups.setdefault((part, name in decays), []).append(parameter)
    rate, own_rate = args.learning_rate, args.parts_learning_rate
    own = {owner: own_group(module.group, rate) for owner, module in named.items()}  # type: ignore[arg-type]
    own["backbone"], own["parts"] = {"lr": rate}, {"lr": rate}
    if own_rate is not None:
        own |= {part: {**group, "lr": own_rate} for part, group in own.items() if part != "backbone"}
    known = {name for name, value in settings.items() if isinstance(value, float)}  # not every one has an epsilon
    return [
        {
            **{name: value for name, value in own[part].items() if name in known},
            "params": found,
            "weight_decay": args.weight_decay if decay else 0.0,
        }
        for (part, decay), found in groups.items()
    ]


def own_group(group: Mapping[str, float], rate: float) -> dict[str, float]:
    """Return the settings of a module's group of the optimizer; ``times``: a multiple of the learning rate."""
    settings = {name: value for name, value in group.items() if name != "times"}
    return {**settings, "lr": rate * group["times"]} if "times" in group else settings
