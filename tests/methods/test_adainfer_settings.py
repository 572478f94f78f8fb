"""AdaInfer's options: every one does something, what cannot be is refused, and training, saving and fitting work."""

import copy
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import AdaInfer, Cot, InputError, LatentModel, LatentTrainer, LatentTrainingArguments
from innerloop.calibrate.calibrate import calibrate
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.config.stopping import ExitClassifierKind
from innerloop.methods import METHODS
from innerloop.methods.depth.exits import exit_losses
from innerloop.model.stopping import use_rule
from innerloop.tasks import Chain
from tests.close import assert_close
from tests.methods.tools import MIXED, QUESTIONS, assert_same_gradients, by_arch, change, gradients
from tests.models import saved, tiny_model

L, EXITS = 6, (2, 3, 5)
LEAVES = AdaInfer(exits=EXITS, stop="top_prob", stop_threshold=0.5)
TASK = Chain(n_ops=2, n_train=32, n_valid=24, n_test=8)


def model_of(method, arch: str = "llama", seed: int = 0) -> LatentModel:
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if arch == "gpt2" else {}
    return tiny_model(method, arch, seed, num_hidden_layers=L, **dropout)


def layers_of(model: LatentModel) -> list[int]:
    """Return after which layers the tokens that write have left."""
    batch = model.batch(model.rows(MIXED))
    with torch.no_grad():
        thought = model.think(batch)
        model.written_logits(batch, thought)
    return thought.deep[-1].depths_BL.flatten()[batch.predict_at_U].tolist()


def test_adainfer_is_a_method_of_the_depth_family():
    assert METHODS["adainfer"] is AdaInfer and AdaInfer.family == "depth"


def test_by_default_tokens_may_leave_from_a_quarter_of_the_depth_on():
    assert [layers.stop for layers in model_of(AdaInfer()).depth.sections] == [2, 3, 4, 5, 6]
    twelve = tiny_model(AdaInfer(), num_hidden_layers=12)
    assert [layers.stop for layers in twelve.depth.sections] == [*range(3, 13)]


SETTINGS = [
    {"exits": (3,)},
    {"stop": "gap"},
    {"stop_threshold": 0.4},
    {"min_loops": 2},
    {"patience": 2},
    {"check_every": 2},
    {"stop_decay": 2},
    {"n_candidates": 2},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_every_setting_of_leaving_changes_where_tokens_leave(fields):
    assert layers_of(model_of(LEAVES)) != layers_of(model_of(change(LEAVES, **fields)))


def test_the_policy_changes_no_exit_but_what_later_tokens_see():
    lazy, full, passed = (
        model_of(change(LEAVES, kv_missing=p)) for p in ("lazy_backfill", "full_compute", "propagate")
    )
    assert layers_of(lazy) == layers_of(full)
    for a, b, c in zip(*(m.answer_logits(MIXED) for m in (lazy, full, passed))):
        assert_close(a, b)
        error = (a - c).abs().max().item()
        assert error < 20  # approximate: its error is measured by what the words become
    assert max((a - c).abs().max() for a, c in zip(lazy.answer_logits(MIXED), passed.answer_logits(MIXED))) > 1e-2


REFUSED = [
    ({"exits": (3, 2)}, "ascending"),
    ({"exits": (2, 2)}, "ascending"),
    ({"exits": (0, 2)}, "counted from 1"),
    ({"stop": "gap", "n_candidates": 1}, "at least 2"),
    ({"n_candidates": 4}, "set a stop score"),
    ({"kv_missing": "propagate"}, "set a stop score"),
    ({"stop": "kl", "stop_site": "answer"}, "for latents"),
    ({"stop": "delta", "stop_agg": "max"}, "for latents"),
    ({"stop": "act"}, "for latents"),
    ({"gate": "distribution"}, "set stop to halt"),
    ({"kv_missing": "keep"}, "choose one of"),
    ({"exit_weight": -1.0}, "cannot be negative"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_settings_that_go_together_badly_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        AdaInfer(**fields)


def test_exits_that_the_model_does_not_have_are_refused():
    with pytest.raises(InputError, match="choose exits from 1 to 5"):
        model_of(AdaInfer(exits=(2, 6)))
    with pytest.raises(InputError, match="begin exits at 2"):
        model_of(AdaInfer(exits=(1, 3), stop="classifier", stop_features=("gap", "mlp")))
    with pytest.raises(InputError, match="calibrate the model first"):
        model_of(AdaInfer(stop="classifier")).answer_logits(MIXED)


# Fewer words


def test_candidates_spare_the_head_and_say_the_same_where_they_are_all_words():
    model = model_of(LEAVES)
    n_words = model.backbone.config.vocab_size
    assert layers_of(model) == layers_of(model_of(change(LEAVES, n_candidates=n_words)))
    never = change(LEAVES, stop_threshold=math.inf)
    every, few = (model_of(change(never, n_candidates=n)) for n in (0, 4))
    costs = [m.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost.flops for m in (every, few)]
    width = model.backbone.width
    assert costs[0] - costs[1] == pytest.approx(2 * 2 * width * (n_words - 4))  # two of the three looks
    (written, plain) = (m.generate(QUESTIONS, max_new_tokens=4) for m in (few, model_of(Cot())))
    assert [g.text for g in written] == [g.text for g in plain]


def test_candidates_are_the_likeliest_words_of_the_first_exit():
    few = model_of(change(LEAVES, stop_threshold=math.inf, n_candidates=4))
    use_rule(few, stop="top_prob", stop_threshold=math.inf)
    seen, backbone = scan_loop(few, MIXED[:1]), few.backbone
    batch = few.batch(few.rows(MIXED[:1]))
    first, state = None, backbone.embed(batch.ids_BS)
    for t, layers in enumerate(few.depth.sections):
        with torch.no_grad():
            state = backbone(state, layers=layers)
            logits = backbone.head(backbone.norm(state))[0, batch.predict_at_U]
        first = logits.topk(4, dim=-1).indices if first is None else first
        expected = logits.gather(1, first).softmax(-1).amax(1)
        assert_close(seen.scores_TM[t], expected)
        assert torch.equal(seen.tops_TM[t], logits.argmax(1))


# Learning


@by_arch
def test_training_leaves_nowhere_and_learns_as_the_plain_model(arch):
    plain = model_of(Cot(), arch).train()
    ours = LatentModel(plain.backbone, plain.tokenizer, LEAVES).train()
    left, right = (gradients(model, model.loss(MIXED).loss) for model in (ours, plain))
    assert_same_gradients({k: v for k, v in left.items() if k in right}, right)


@by_arch
@pytest.mark.parametrize(("schedule", "kd"), [("equal", 0.0), ("linear", 0.5)])
def test_earlier_exits_learn_to_speak(schedule, kd, arch):
    method = AdaInfer(exits=EXITS, exit_weight=0.7, exit_schedule=schedule, exit_kd=kd)
    model = model_of(method, arch).train()
    out, batch = model.loss(MIXED), model.batch(model.rows(MIXED))
    backbone, state, logits = model.backbone, model.backbone.embed(batch.ids_BS), []
    for layers in model.depth.sections:
        state = backbone(
            state, mask=batch.mask_BS, positions_BL=(batch.mask_BS.cumsum(1) - 1).clamp(min=0), layers=layers
        )
        logits.append(backbone.head(backbone.norm(state)).flatten(0, 1)[batch.predict_at_U])
    last = logits[-1].detach().log_softmax(-1) if kd else None
    shares = [1.0] * 3 if schedule == "equal" else [1 / 4, 2 / 4, 3 / 4]
    expected = sum(w * exit_losses(one, batch.targets_U, last, kd).sum() for w, one in zip(shares, logits)) / len(
        batch.targets_U
    )
    assert out.terms["exits"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out.terms["answer"].item() == pytest.approx(cross_entropy(logits[-1], batch.targets_U).item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(out.terms["answer"].item() + 0.7 * out.terms["exits"].item(), rel=1e-5)
    kept = copy.deepcopy(model)
    kept.activation_checkpointing_enable()
    left, right = (gradients(m, m.loss(MIXED).loss) for m in (model, kept))
    assert_same_gradients(left, right)


def test_a_gate_learns_at_the_exits_and_alone_if_asked():
    for gate, others in (("distribution", True), ("improvement", False)):
        model = model_of(AdaInfer(exits=EXITS, stop="halt", gate=gate)).train()
        grads = gradients(model, model.loss(MIXED).loss)
        assert grads["loop.stop.gate.weight"].abs().max() > 1e-5
        assert any(p.requires_grad for p in model.backbone.parameters()) == others
        assert (max(g.abs().max() for name, g in grads.items() if name.startswith("backbone")) > 0) == others


@pytest.mark.slow
def test_exits_that_have_learned_to_speak_spare_layers_without_a_loss(tmp_path):
    method = AdaInfer(exits=(1, 2, 3), exit_weight=1.0, exit_schedule="linear")
    task = Chain(n_ops=3, n_train=3000, n_valid=200, n_test=200)
    model = tiny_model(method, num_hidden_layers=4, initializer_range=0.1)
    args = LatentTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=3e-3,
        max_steps=400,
        per_device_train_batch_size=32,
        use_cpu=True,
        seed=0,
    )
    LatentTrainer(model, args, task.examples("train"), None, task).train()
    found = calibrate(model, task, task.examples("valid"), "classifier", check=task.examples("test"))
    chosen = found.report["check"]["chosen"]
    assert chosen["accuracy"] > 0.8 and chosen["drop"] <= 0.05 and chosen["loops_saved"] > 0.1


# Fitting, saving


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kind", ExitClassifierKind.__args__)
def test_a_fitted_classifier_is_saved_and_loaded_and_decides_alike(kind, per_step, tmp_path):
    options = {"stop_classifier": kind, "stop_per_step": per_step, "stop_features": ("gap", "top", "mlp", "block")}
    model = model_of(AdaInfer(exits=EXITS))
    settings = CalibrationSettings(agreement=0.6, min_rows=5, max_new_tokens=3)
    calibrate(model, TASK, TASK.examples("valid"), "classifier", settings, **options)
    left = layers_of(model)
    assert len(set(left)) > 1
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == model.method and layers_of(loaded) == left
    shifted = LatentModel.from_pretrained(tmp_path / "run", change(model.method, stop_threshold=0.1), device="cpu")
    assert all(a >= b for a, b in zip(layers_of(shifted), left)) and layers_of(shifted) != left
    lazy = LatentModel.from_pretrained(tmp_path / "run", change(model.method, kv_missing="full_compute"), device="cpu")
    assert layers_of(lazy) == left


def test_a_classifier_of_other_features_must_be_fitted_anew(tmp_path):
    model = model_of(AdaInfer(exits=EXITS))
    settings = CalibrationSettings(agreement=0.5, min_rows=5, max_new_tokens=2)
    calibrate(model, TASK, TASK.examples("valid"), "classifier", settings)
    saved(model, tmp_path / "run")
    other = LatentModel.from_pretrained(tmp_path / "run", change(model.method, stop_features=("gap",)), device="cpu")
    with pytest.raises(InputError, match="calibrate the model first"):
        other.answer_logits(MIXED)


def test_agreement_on_the_tokens_that_chose_the_thresholds_is_as_asked():
    model = model_of(AdaInfer(exits=EXITS))
    for target in (0.5, 0.8):
        examples = TASK.examples("valid")
        settings = CalibrationSettings(agreement=target, min_rows=5, max_new_tokens=2)
        found = calibrate(model, TASK, examples, "classifier", settings)
        tokens = found.report["tokens"]
        assert tokens["agreement"] >= target and tokens["agreement_ci95"][0] <= tokens["agreement"]
        assert tokens["mean_iterations"] < len(EXITS) + 1
        seen = scan_loop(model, examples[len(examples) // 2 :])
        stops = seen.stops_at(model.method, 0.0)
        same = seen.agrees_TM.gather(0, stops[None] - 1).double().mean().item()
        assert same == pytest.approx(tokens["agreement"]) and len(stops) == tokens["n"]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_a_few_words_are_read_as_the_head_reads_them(arch):
    backbone = tiny_model(Cot(), arch).backbone
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, backbone.width, generator=generator)
    ids = torch.randint(0, backbone.config.vocab_size, (5, 3), generator=generator)
    assert_close(backbone.head_rows(states, ids), backbone.head(states).gather(1, ids))
