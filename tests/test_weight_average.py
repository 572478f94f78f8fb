"""The average of the weights is what is validated and kept; training goes on with the weights themselves."""

from pathlib import Path

import pytest
import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods import Slr
from innerloop.train import trainer as trainer_module
from innerloop.train.training_arguments import training_arguments
from tests.models import chain_examples, tiny_model
from tests.test_trainer import At, copies, make_trainer, stop_at

METHOD = Slr(n_slots=3, max_loops=2, step_weight=0.5)
FAST = {"learning_rate": 1e-2}


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that a run has kept."""
    return copies(LatentModel.from_pretrained(folder / "checkpoint"))


def trained(folder: Path, **settings) -> tuple[LatentModel, list[dict[str, torch.Tensor]]]:
    """Train a tiny model; return it, and its weights after each step."""
    model, seen = tiny_model(METHOD), []
    watch = At(None, lambda *_: seen.append(copies(model)))
    make_trainer(folder, model, callbacks=[watch], **FAST, **settings).train()
    return model, seen


def test_what_is_kept_is_the_average_and_training_does_not_heed_it(tmp_path: Path):
    plain, _ = trained(tmp_path / "plain")
    model, seen = trained(tmp_path / "averaged", ema_decay=0.6)
    expected = seen[0]
    for n, after in enumerate(seen, 1):
        decay = min(0.6, (1 + n) / (10 + n))
        expected = {name: decay * old + (1 - decay) * after[name] for name, old in expected.items()}
    assert (1 + 8) / (10 + 8) < 0.6  # so long the first steps count for less
    torch.testing.assert_close(kept(tmp_path / "averaged"), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(copies(model), copies(plain), rtol=0, atol=0)
    far = max((expected[name] - after).abs().max() for name, after in seen[-1].items())
    assert far > 1e-3
    trained(tmp_path / "no decay", ema_decay=0.0)
    torch.testing.assert_close(kept(tmp_path / "no decay"), kept(tmp_path / "plain"), rtol=0, atol=0)


def test_a_decay_is_reached_when_enough_steps_were_made(tmp_path: Path):
    _, seen = trained(tmp_path, ema_decay=0.2)  # (1 + 2) / (10 + 2) is above it
    expected = seen[0]
    for n, after in enumerate(seen, 1):
        decay = 0.2 if n > 1 else 2 / 11
        expected = {name: decay * old + (1 - decay) * after[name] for name, old in expected.items()}
    torch.testing.assert_close(kept(tmp_path), expected, rtol=1e-5, atol=1e-7)


def test_a_resumed_run_keeps_the_average_of_an_uninterrupted_one(tmp_path: Path):
    settings = {**FAST, "ema_decay": 0.6}
    make_trainer(tmp_path / "whole", tiny_model(METHOD), **settings).train()
    make_trainer(tmp_path / "cut", tiny_model(METHOD), callbacks=[stop_at(3)], **settings).train()
    make_trainer(tmp_path / "cut", tiny_model(METHOD, seed=1), **settings).train(resume_from_checkpoint=True)
    torch.testing.assert_close(kept(tmp_path / "cut"), kept(tmp_path / "whole"), rtol=0, atol=0)


def test_a_checkpoint_without_an_average_is_not_gone_on_from_with_one(tmp_path: Path):
    make_trainer(tmp_path, tiny_model(METHOD), callbacks=[stop_at(3)]).train()
    again = make_trainer(tmp_path, tiny_model(METHOD), ema_decay=0.6)
    with pytest.raises(InputError, match="as it was trained without ema_decay"):
        again.train(resume_from_checkpoint=True)


def test_validation_answers_by_the_average(tmp_path: Path, monkeypatch):
    model, seen = tiny_model(METHOD), []
    asked = trainer_module.evaluate

    def note(*given):
        seen.append(copies(model))
        return asked(*given)

    monkeypatch.setattr(trainer_module, "evaluate", note)
    settings = {"eval_strategy": "steps", "eval_steps": 8, "ema_decay": 0.6, **FAST}
    make_trainer(tmp_path, model, valid=list(chain_examples(4, 3)), **settings).train()
    torch.testing.assert_close(seen[-1], kept(tmp_path), rtol=0, atol=0)
    assert any(not torch.equal(seen[-1][name], weight) for name, weight in copies(model).items())


def test_weights_that_begin_to_learn_later_are_averaged_from_then_on(tmp_path: Path):
    model, seen = tiny_model(METHOD), []
    model.backbone.requires_grad_(False)
    watch = At(None, lambda *_: seen.append(copies(model)))
    settings = {"unfreeze_after": 6, "ema_decay": 0.6, **FAST}
    make_trainer(tmp_path, model, callbacks=[watch], **settings).train()
    name = next(name for name in seen[0] if name.startswith("backbone."))
    decay = (1 + 8) / (10 + 8)
    torch.testing.assert_close(
        kept(tmp_path)[name], decay * seen[6][name] + (1 - decay) * seen[7][name], rtol=1e-5, atol=1e-7
    )


def test_a_decay_of_one_would_never_move(tmp_path: Path):
    with pytest.raises(InputError, match="ema_decay is 1"):
        training_arguments(tmp_path, {"ema_decay": 1.0})
