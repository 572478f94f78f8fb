"""Training: the same numbers however a run is cut up, and nothing lost when it goes wrong."""

import copy
import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from innerloop.decoder import adapters
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.methods import Coconut, Cot, Method, Mod, Mor, NoCot, Pause, RecurrentDepth, SimCot, Slr
from innerloop.model import checkpoint, run_folder
from innerloop.tasks import Chain
from innerloop.text.examples import Example
from innerloop.train.trainer import DivergedError, LatentTrainer
from innerloop.train.training_arguments import training_arguments
from tests.close import assert_close
from tests.fields import change
from tests.models import chain_examples, tiny_model

TASK = Chain(n_ops=3)
STAGED = Coconut(latents_per_step=1, curriculum={"max_stage": 2, "unit": "step", "length": 3, "mix": "linear"})


def make_trainer(folder: Path, model, examples=None, valid=None, callbacks=(), **settings) -> LatentTrainer:
    settings = {"batch_size": 4, "max_steps": 8, "logging_steps": 1, "use_cpu": True, "save_strategy": "no", **settings}
    args = training_arguments(folder, settings)
    return LatentTrainer(model, args, examples or list(chain_examples(32, 3)), valid, TASK, callbacks)


def logged(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(model: LatentModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class At(TrainerCallback):
    """Does something after a step; after every step where none is named."""

    def __init__(self, step: int | None, does: Callable[..., object]):
        self.step, self.does = step, does

    def on_step_end(self, args, state, control, **given):
        if self.step in (None, state.global_step):
            self.does(state.global_step, given)


def stop_at(step: int) -> At:
    return At(step, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def copies(model: LatentModel) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained_names(before: dict, model: LatentModel) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def assert_goes_on_as_if_uninterrupted(
    folder: Path, made: Callable[[int], LatentModel], examples=None, terms=("loss",), **settings
) -> LatentTrainer:
    """A run stopped after step 3 and gone on with by other weights == one that was not: every term, every weight."""
    whole, resumed = made(0), made(1)  # other weights: all must come from the checkpoint
    make_trainer(folder / "whole", whole, examples, **settings).train()
    interrupted = make_trainer(folder / "cut", made(0), examples, callbacks=[stop_at(3)], **settings)
    interrupted.train()
    assert not (folder / "cut" / "checkpoint").exists()  # a half-trained model is not passed off as the result
    make_trainer(folder / "cut", resumed, examples, **settings).train(resume_from_checkpoint=True)
    for term in terms:
        assert logged(folder / "cut", term) == logged(folder / "whole", term) != []
    assert torch.equal(weights(resumed), weights(whole))
    return interrupted


SHOWN = Slr(n_slots=3, max_loops=2, step_weight=0.5)
PROGRESSIVE = change(SHOWN, loop={"progressive": 0.5, "noise": 0.1}, loop_sampling="uniform")


@pytest.mark.parametrize("method", [STAGED, SHOWN, PROGRESSIVE], ids=["coconut", "slr", "progressive"])
def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(tmp_path: Path, method: Method):
    terms = ("loss", "loss_answer") if method is STAGED else ("loss", "loss_answer", "loss_step")
    interrupted = assert_goes_on_as_if_uninterrupted(tmp_path, partial(tiny_model, method, "llama"), terms=terms)
    assert interrupted.interrupted and interrupted.state.global_step == 4
    assert len(logged(tmp_path / "whole")) == 8


GROUPED = {"train_sampling_strategy": "group_by_length", "max_steps": 30}


def test_examples_of_like_length_share_a_batch_and_a_resumed_run_sees_the_same(tmp_path: Path, monkeypatch):
    examples = [*chain_examples(32, 2), *chain_examples(32, 4), *chain_examples(32, 6)]  # 24 steps an epoch
    examples = [examples[i] for i in torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()]
    batches, rows = [], LatentModel.rows

    def note(self, found, *rest):
        batches.append([len(example.steps) for example in found])
        return rows(self, found, *rest)

    monkeypatch.setattr(LatentModel, "rows", note)
    make_trainer(tmp_path / "whole", tiny_model(Cot()), examples, **GROUPED).train()
    whole = list(batches)
    assert len(whole) == 30 and whole[:6] != whole[24:]
    assert sum(len(set(batch)) for batch in whole) <= 30 + 5 * 2 + 4  # but for where two lengths meet, and the longest
    assert sorted(n for batch in whole[:24] for n in batch) == sorted(len(e.steps) for e in examples)
    make_trainer(tmp_path / "cut", tiny_model(Cot()), examples, callbacks=[stop_at(26)], **GROUPED).train()
    make_trainer(tmp_path / "cut", tiny_model(Cot(), seed=1), examples, **GROUPED).train(resume_from_checkpoint=True)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    with pytest.raises(InputError, match="one of random, sequential, group_by_length"):
        training_arguments(tmp_path, {"train_sampling_strategy": "batch_rebalance"})


def test_a_resumed_lora_run_gives_the_losses_of_an_uninterrupted_one(tmp_path: Path):
    def adapted(seed: int) -> LatentModel:
        torch.manual_seed(seed)
        model = tiny_model(Pause(n_pauses=2))  # what LoRA leaves as it is is no part of a checkpoint
        adapters.add_lora(model.backbone, model.marker_ids(), {"r": 2})
        return model

    assert_goes_on_as_if_uninterrupted(tmp_path, adapted, max_steps=6)


CHOOSING = Slr(n_slots=2, max_loops=2, decoder={"kind": "linear", "classes": ("0", "1", "2", "3", "4")})
APART = Slr(n_slots=2, max_loops=2, decoder={"kind": "separate"})
TOLD = SimCot(curriculum={"max_stage": 3, "first_stage": 3}, surplus="ignore")


@pytest.mark.parametrize("method", [Cot(), TOLD, APART, CHOOSING], ids=["cot", "simcot", "separate", "linear"])
def test_gradient_accumulation_takes_the_mean_over_the_global_batch(tmp_path: Path, method: Method):
    uneven = [Example(e.question, e.steps[: i % 4], e.answer, e.id) for i, e in enumerate(chain_examples(32, 3))]
    one, parts = tiny_model(method), tiny_model(method)
    make_trainer(tmp_path / "one", one, uneven, batch_size=8, max_steps=2).train()
    make_trainer(tmp_path / "parts", parts, uneven, batch_size=2, max_steps=2, gradient_accumulation_steps=4).train()
    assert len(logged(tmp_path / "parts")) == 2
    assert_close(logged(tmp_path / "parts"), logged(tmp_path / "one"))
    assert_close(weights(parts), weights(one))


def test_the_terms_of_the_loss_and_the_stage_are_logged(tmp_path: Path):
    make_trainer(tmp_path / "slr", tiny_model(Slr(n_slots=3, max_loops=2, step_weight=0.5)), max_steps=2).train()
    answer, step, loss = (logged(tmp_path / "slr", key) for key in ("loss_answer", "loss_step", "loss"))
    assert_close(torch.tensor(loss), torch.tensor(answer) + 0.5 * torch.tensor(step))
    make_trainer(tmp_path / "coconut", tiny_model(STAGED)).train()
    assert logged(tmp_path / "coconut", "stage") == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(("policy", "resets"), [("stage", [3, 6, 9]), ("epoch", [4, 8]), ("never", [])])
def test_the_optimizer_is_reset_when_the_method_says_so(tmp_path: Path, policy: str, resets: list[int]):
    method = change(STAGED, curriculum={"mix": "none", "reset_optimizer": policy})
    ages: list[int] = []
    note = At(None, lambda _, given: ages.append(int(next(iter(given["optimizer"].state.values()))["step"])))
    make_trainer(tmp_path, tiny_model(method), list(chain_examples(16, 3)), callbacks=[note], max_steps=10).train()
    expected, age = [], 0
    for step in range(10):  # 16 examples at 4 a step: an epoch has 4 steps
        age = 1 if step in resets else age + 1
        expected.append(age)
    assert ages == expected


def test_checkpointing_passes_changes_no_loss_and_mixed_precision_little(tmp_path: Path):
    method, settings = Slr(n_slots=2, max_loops=3), {"plain": {}, "saving": {"activation_checkpointing": True}}
    for name, given in (settings | {"half": {"bf16": True}}).items():
        make_trainer(tmp_path / name, tiny_model(method), max_steps=3, **given).train()
    assert logged(tmp_path / "saving") == pytest.approx(logged(tmp_path / "plain"), rel=1e-5)
    assert logged(tmp_path / "half") == pytest.approx(logged(tmp_path / "plain"), rel=0.05)


def test_a_loss_that_goes_wrong_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    model = tiny_model(Cot())
    poison = At(3, lambda *_: next(model.parameters()).data.fill_(float("nan")))
    trainer = make_trainer(tmp_path, model, callbacks=[poison], save_strategy="steps", save_steps=1)
    with pytest.raises(DivergedError, match=r"not a finite number; the last good checkpoint is .*checkpoint-2;"):
        trainer.train()
    saved = LatentModel.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.isfinite(weights(saved)).all()
    wild = {"learning_rate": 30.0, "max_steps": 50, "max_grad_norm": 1e9}
    with pytest.raises(DivergedError, match="far above guessing"):
        make_trainer(tmp_path / "wild", tiny_model(Cot()), **wild).train()


def test_a_finished_run_that_is_taken_further_leaves_the_model_of_its_last_step(tmp_path: Path):
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, tiny_model(Cot()), max_steps=4, **settings).train()
    further = tiny_model(Cot(), seed=1)
    make_trainer(tmp_path, further, max_steps=8, **settings).train(resume_from_checkpoint=True)
    assert torch.equal(weights(LatentModel.from_pretrained(tmp_path / "checkpoint")), weights(further))


@pytest.mark.parametrize(
    ("method", "names"),
    [
        (Mod(routed_layers=(1, 2)), ("selected_1", "selected_2", "agreement_1", "agreement_2")),
        (Mod(routed_layers=(1,)), ("selected", "agreement")),
        (Mor(n_recursions=2, sharing="cycle", routing="token"), ("selected_1", "selected_2", "load_1", "load_2")),
        (RecurrentDepth(max_loops=2, loop_sampling="fixed", state_std=0.0), ("state_cosine",)),
    ],
    ids=lambda value: value.name if isinstance(value, Method) else "",
)
def test_what_a_depth_method_measures_is_logged(tmp_path: Path, method: Method, names: tuple[str, ...]):
    model, examples = tiny_model(method), list(chain_examples(8, 3))
    measured = model.train().loss(examples).measured
    wanted = torch.cat([measured[name].flatten() for name in dict.fromkeys(n.rstrip("_12") for n in names)]).float()
    make_trainer(tmp_path / "one", copy.deepcopy(model), examples, batch_size=8, max_steps=2).train()
    first, second = (torch.tensor([logged(tmp_path / "one", name)[step] for name in names]) for step in (0, 1))
    assert_close(first, wanted)
    if names[-1] != "load_2":
        return
    micro = {"gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 2}
    make_trainer(tmp_path / "parts", model, examples, **micro).train()
    ((one, two),) = zip(*(logged(tmp_path / "parts", name) for name in names[2:]))
    assert_close(2 * torch.tensor([one, two]), ((first + second) / 2)[2:])  # means over micro-batches


def test_the_best_model_by_validation_accuracy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accuracies = iter([0.25, 0.75, 0.5, 0.0])
    monkeypatch.setattr("innerloop.train.trainer.accuracy_of", lambda predictions: next(accuracies))
    model, seen = tiny_model(NoCot()), {}

    class Remember(TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            seen[state.global_step] = weights(model).clone()

    settings = {"eval_strategy": "steps", "eval_steps": 2}
    make_trainer(tmp_path, model, valid=list(chain_examples(4, 3)), callbacks=[Remember()], **settings).train()
    record = run_folder.read_settings(tmp_path / "checkpoint")["validation"]
    assert record == {"accuracy": 0.75, "n": 4, "step": 4}
    assert torch.equal(weights(LatentModel.from_pretrained(tmp_path / "checkpoint")), seen[4])
    assert logged(tmp_path, "eval_accuracy") == [0.25, 0.75, 0.5, 0.0]


def test_only_the_last_stage_competes_for_the_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accuracies = iter([1.0, 1.0, 0.5, 0.25])
    monkeypatch.setattr("innerloop.train.trainer.accuracy_of", lambda predictions: next(accuracies))
    method = change(STAGED, curriculum={"mix": "none", "max_stage": 1, "length": 2})  # the last stage from step 4 on
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    make_trainer(tmp_path, tiny_model(method), valid=list(chain_examples(2, 3)), **settings).train()
    assert run_folder.read_settings(tmp_path / "checkpoint")["validation"]["step"] == 6


def test_a_full_disk_leaves_the_checkpoint_before_it_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    fill = At(3, lambda *_: monkeypatch.setattr(checkpoint, "save_file", no_space))
    trainer = make_trainer(tmp_path, tiny_model(Cot()), callbacks=[fill], save_strategy="steps", save_steps=2)
    with pytest.raises(InputError, match=r"No space left on device; .*checkpoint-2 is untouched"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()
    monkeypatch.undo()
    make_trainer(tmp_path, tiny_model(Cot(), seed=1)).train(resume_from_checkpoint=True)
    assert len(logged(tmp_path)) == 8


def test_lora_trains_low_rank_updates_and_marker_rows_alone(tmp_path: Path):
    model = tiny_model(Pause(n_pauses=2))
    adapters.add_lora(model.backbone, model.marker_ids(), {"r": 2})
    before = copies(model)
    make_trainer(tmp_path, model, max_steps=3).train()
    changed = trained_names(before, model)
    assert changed and all("lora" in name or "trainable_tokens" in name for name in changed)


def test_examples_that_cannot_be_trained_on_are_refused_or_left_out(tmp_path: Path):
    examples = list(chain_examples(8, 3))
    long = Example(" ; ".join(["3", *["+ 1"] * 90]), ("3 + 1 = 4",), "3", "long-one")
    with pytest.raises(InputError, match=r"example 'long-one' takes \d+ positions .* set train.max_length=256"):
        make_trainer(tmp_path, tiny_model(Cot()), [*examples, long])
    assert make_trainer(tmp_path, tiny_model(Cot()), [*examples, long], max_length=100).n_left_out == 1
    with pytest.raises(InputError, match="every training example is longer"):
        make_trainer(tmp_path, tiny_model(Cot()), examples, max_length=5)
    stepless = [Example(e.question, (), e.answer) for e in examples]
    with pytest.raises(InputError, match="no training example has steps, but 'coconut' learns from them"):
        make_trainer(tmp_path, tiny_model(STAGED), stepless)
    with pytest.raises(InputError, match="train_dataset is empty"):
        make_trainer(tmp_path, tiny_model(Cot()), iter([]))
    with pytest.raises(InputError, match="needs validation examples"):
        make_trainer(tmp_path, tiny_model(Cot()), eval_strategy="steps", eval_steps=1)
    args = training_arguments(tmp_path, {"max_steps": 1, "use_cpu": True})
    with pytest.raises(InputError, match="needs a task"):
        LatentTrainer(tiny_model(Cot()), args, examples, examples[:2])


def test_a_data_set_with_the_right_columns_serves_as_examples_and_yaml_text_as_numbers(tmp_path: Path):
    rows = [{"question": e.question, "steps": list(e.steps), "answer": e.answer} for e in chain_examples(8, 3)]
    trainer = make_trainer(tmp_path, tiny_model(Cot()), rows, learning_rate="1e-3")
    assert trainer.train_dataset[0].question == rows[0]["question"] and trainer.args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "train.learning_rat is not a training argument .did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "train.learning_rate is fast, but must be a number"),
        ({"loss_chunk": 2.5}, "train.loss_chunk is 2.5, but must be a whole number, at least 1"),
        ({"torch_compile": True}, "leave torch_compile, torch_compile_backend and torch_compile_mode out"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type=cosine_with_min_lr .* min_lr .* lr_scheduler_kwargs",
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"foo": 1}},
            "lr_scheduler_type=cosine with .*'foo': 1",
        ),
        ({"accelerator_config": 3}, "accelerator_config is 3, but must be text or fields"),
        ({"label_smoothing_factor": 0.5}, "label_smoothing_factor has no effect here"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha has no effect here"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size has no effect here: leave it out; choose batch_size"),
        ({"resume_from_checkpoint": "x"}, "go on with --resume"),
        ({"push_to_hub": True}, "upload the folder"),
        ({"output_dir": "x"}, "train.output_dir is called out here"),
        ({"save_strategy": "best"}, "metric_for_best_model does not say by what"),
        ({"torch_compile_mode": "default"}, "leave torch_compile"),
        ({"eval_strategy": "often"}, "train.eval_strategy is often, but must be one of no, steps, epoch"),
    ],
)
def test_wrong_training_arguments_are_named(tmp_path: Path, settings: dict, message: str):
    with pytest.raises(InputError, match=message):
        training_arguments(tmp_path, settings)


def uneven_examples() -> list[Example]:
    return [Example(e.question, e.steps[: 1 + i % 3], e.answer, e.id) for i, e in enumerate(chain_examples(48, 3))]


def test_the_micro_norm_takes_the_mean_of_the_means_of_micro_batches(tmp_path: Path):
    examples = uneven_examples()[:4]
    model = tiny_model(Cot())
    settings = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1, "seed": 3}
    make_trainer(tmp_path / "micro", tiny_model(Cot()), examples, loss_norm="micro", **settings).train()
    make_trainer(tmp_path / "global", tiny_model(Cot()), examples, loss_norm="global", **settings).train()
    assert logged(tmp_path / "global") == pytest.approx([model.loss(examples).loss.item()], rel=1e-5)
    pairs = [[(0, 1), (2, 3)], [(0, 2), (1, 3)], [(0, 3), (1, 2)]]  # one of these is how the examples were shuffled
    means = [sum(model.loss([examples[i] for i in p]).loss.item() for p in pairing) / 2 for pairing in pairs]
    assert any(logged(tmp_path / "micro")[0] == pytest.approx(mean, rel=1e-5) for mean in means)
    assert logged(tmp_path / "micro") != pytest.approx(logged(tmp_path / "global"), rel=1e-4)


ADAPTED = Slr(n_slots=2, max_loops=2, loop={"lora": "per_iter", "lora_rank": 2})


def test_a_frozen_backbone_stays_as_it_is_but_for_the_rows_of_markers_and_may_train_from_a_step_on(tmp_path: Path):
    model = tiny_model(ADAPTED)
    adapters.freeze(model.backbone, model.marker_ids())
    before, seen = copies(model), {}
    make_trainer(tmp_path, model, max_steps=3).train()
    changed = trained_names(before, model)
    assert any(name.startswith("loop.time") for name in changed) and any("loop.lora" in name for name in changed)
    assert all(name.startswith("loop.") or "trainable_tokens" in name for name in changed)
    loaded = LatentModel.from_pretrained(tmp_path / "checkpoint")
    example = list(chain_examples(2, 3))
    assert_close(loaded.answer_logits(example)[0], model.answer_logits(example)[0])

    def look(step: int, _: dict) -> None:
        seen[step] = any("mlp" in name and name.startswith("backbone") for name in trained_names(before, model))

    make_trainer(tmp_path / "on", model, max_steps=4, unfreeze_after=2, callbacks=[At(None, look)]).train()
    assert seen == {1: False, 2: False, 3: True, 4: True}


@pytest.mark.parametrize("method", [APART, CHOOSING], ids=["separate", "linear"])
def test_a_decoder_is_trained_validated_and_saved(method, tmp_path: Path):
    settings = {"eval_strategy": "steps", "eval_steps": 6, "learning_rate": 1e-2}
    model, examples = tiny_model(method), list(chain_examples(32, 3))
    before = copies(model)
    make_trainer(tmp_path, model, examples, examples[:4], max_steps=6, **settings).train()
    decoder = {name for name in before if name.startswith("decoder.")}
    assert decoder and trained_names(before, model) >= decoder
    assert len(logged(tmp_path)) == 6 and len(logged(tmp_path, "eval_accuracy")) == 1
    loaded = LatentModel.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(loaded.answer_logits(examples)[0], model.answer_logits(examples)[0])


@pytest.mark.parametrize("method", [ADAPTED, APART, CHOOSING], ids=["lora", "separate", "linear"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_methods_own_parts_may_have_a_learning_rate_of_their_own(method, frozen, tmp_path: Path):
    own = {"loop", "decoder"}
    for rate in (1e-2, 0.0):
        model = tiny_model(method)
        if frozen:
            adapters.freeze(model.backbone, model.marker_ids())
        before = copies(model)
        make_trainer(tmp_path / str(rate), model, max_steps=2, parts_learning_rate=rate, learning_rate=1e-2).train()
        changed = trained_names(before, model)
        assert changed and any(name.split(".")[0] in own for name in changed) == (rate > 0)
        assert not frozen or all(name.split(".")[0] in own or "trainable_tokens" in name for name in changed)
