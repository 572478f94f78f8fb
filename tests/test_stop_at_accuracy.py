"""Training that ends where it is right often enough."""

import pytest

from innerloop import Cot, InputError
from tests.models import chain_examples, tiny_model
from tests.test_trainer import make_trainer


def test_training_ends_at_a_validation_that_is_accurate_enough(tmp_path):
    known = {"eval_strategy": "steps", "eval_steps": 2, "stop_at_accuracy": 0.0}
    trainer = make_trainer(tmp_path, tiny_model(Cot()), valid=list(chain_examples(4)), **known)
    trainer.train()
    assert trainer.state.global_step == 2
    assert not trainer.interrupted
    with pytest.raises(InputError, match="stop_at_accuracy is of a validation"):
        make_trainer(tmp_path, tiny_model(Cot()), stop_at_accuracy=0.5)
