"""What a setting may change: a model's results, gauge by gauge, so that a test can say which move, and which not.

    assert moved_by(Coconut(), alpha=0.3) == FORWARD

Gauges: what rows read (`rows`), the curriculum (`schedule`), which weights are trained (`trained`); when answering the
`logits`, those of two iterations more (`beyond`), how many iterations ran (`ran`) and their stop scores (`score`); in
training the `passes`, every term of the loss by its name, the `loss`, and its `gradient` by the backbone.
"""

import functools
import math
from typing import Any

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from torch import Tensor

from innerloop import LatentModel, Slr
from innerloop.config.typed import field_names, groups
from innerloop.loop.trace import Trace
from innerloop.methods import Method
from tests.methods.tools import MIXED, change, gradients, logits_of, passes, stir, thought_of
from tests.models import tiny_model

LEARNS = {"loss", "gradient"}
FORWARD = {"logits", "beyond", "answer"} | LEARNS
"""What moves with the states."""
STATES = FORWARD | {"step"}
STOPS = {"ran", "score", "logits", "beyond"}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

STOPPING = {"stop.check_every", "stop.histogram", "stop.act_output", "halt.pull", "ponder_weight"}
"""The catalogue's own settings, which are the same under every loop; tests/test_halting_*.py try each of them."""
AT_ONCE = {"stop.rule": "delta", "stop.threshold": -math.inf}
NEVER = {"stop.rule": "kl", "stop.threshold": math.inf}


def table(*lines: tuple) -> list[ParameterSet]:
    """Cases of a table: each line is what moves, on top of which settings, and changes that move it, each alone."""
    return [
        pytest.param(base, fields, what, id="-".join(f"{name}={value}" for name, value in fields.items()))
        for what, base, *changes in lines
        for fields in changes
    ]


def untried(method: type[Method], cases: list[ParameterSet]) -> set[str]:
    """Return the settings of a method that no case of a table changes."""
    return set(field_names(method)) - set(groups(method)) - {name for case in cases for name in case.values[1]}


@functools.cache
def still(seed: int = 0) -> LatentModel:
    """Return a model without dropout, whose backbone all gauged models share."""
    return tiny_model(Slr(), "gpt2", seed, num_hidden_layers=2, **NO_DROPOUT).double()


@functools.cache
def results(method: Method) -> dict[str, Any]:
    """Run a method on the shared backbone, nothing of it at zero, and return its results."""
    torch.manual_seed(0)
    model = LatentModel(still().backbone, still().tokenizer, method).double()
    model._frozen["teacher"] = still(seed=1)
    stir(model)
    rows, trace = model.rows(MIXED), Trace()
    n_loops = thought_of(model.eval(), MIXED, trace).loop.n_loops
    found = {
        "rows": [row.ids() for row in rows],
        "schedule": _schedule(method),
        "trained": [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad],
        "logits": logits_of(model, rows),
        "ran": n_loops,
        "score": [entry.score for entry in trace.iterations if entry.score is not None],
    }
    for row in rows:
        row.n_loops += 2
    found["beyond"] = logits_of(model, rows)
    model.train()
    with passes(model) as seen:
        out = model.loss(MIXED)
    found |= out.terms | {"loss": out.loss.detach(), "passes": [x.shape for x in seen]}
    found["gradient"] = [grad for name, grad in gradients(model, out.loss).items() if name.startswith("backbone")]
    still().requires_grad_(True)  # a method may have frozen it
    return found


def moved_by(method: Method, **fields: Any) -> set[str]:
    """Return the gauges that move when fields of a method change."""
    left, right = results(method), results(change(method, **fields))
    return {name for name in left.keys() | right.keys() if not _same(left.get(name), right.get(name))}


def _schedule(method: Method) -> Any:
    """What training makes of a curriculum: its stages, the draws of examples with two steps, and the resets."""
    scheduled = [method.stage_at(step, steps_per_epoch=3) for step in range(30)]
    drawn = [method.stage_of(method.last_stage, 2, str(i)) for i in range(30)]
    return scheduled, drawn, method.curriculum.reset_optimizer


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and torch.allclose(left.double(), right.double(), atol=1e-6, rtol=0)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return left == right
