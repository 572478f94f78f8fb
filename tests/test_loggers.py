"""Metrics reach what `train.report_to` names, and a logger that is not there is refused before anything is read."""

from typing import ClassVar

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from innerloop.errors import InputError
from innerloop.methods import Slr
from innerloop.train.training_arguments import training_arguments
from tests.models import tiny_model
from tests.test_trainer import make_trainer

LOGGERS = integration_utils.INTEGRATION_TO_CALLBACK


class Listener(TrainerCallback):
    heard: ClassVar[dict] = {}

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.update(logs)


class Missing:
    def __init__(self):
        raise RuntimeError("MissingCallback requires missing to be installed")


def test_the_terms_of_the_loss_reach_a_logger(tmp_path, monkeypatch):
    monkeypatch.setitem(LOGGERS, "tensorboard", Listener)
    method = Slr(n_slots=2, max_loops=2, slots_per_step=1, step_weight=1.0)
    make_trainer(tmp_path, tiny_model(method), max_steps=1, logging_steps=1, report_to="tensorboard").train()
    assert {"loss", "loss_answer", "loss_step"} <= set(Listener.heard)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "train.report_to=wandb needs a package: pip install wandb"),
        (["wandb"], "train.report_to=wandb needs a package: pip install wandb"),
        ("wandbb", "train.report_to knows no 'wandbb' .did you mean 'wandb'"),
    ],
)
def test_a_logger_that_is_not_there_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(LOGGERS, "wandb", Missing)
    with pytest.raises(InputError, match=message):
        training_arguments(tmp_path, {"report_to": name})
