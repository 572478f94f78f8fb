"""AdaInfer's options: every one does something, what cannot be is refused, and training, saving and fitting work."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import AdaInfer, Cot, InputError, LatentModel, LatentTrainer, LatentTrainingArguments
from innerloop.calibrate.calibrate import calibrate
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.config.stopping import ExitClassifierKind
from innerloop.tasks import Chain
from tests.close import assert_close
from tests.methods.test_adainfer import read, written_depths
from tests.methods.tools import MIXED, QUESTIONS, assert_same_gradients, by_arch, change, gradients
from tests.models import saved, tiny_model

L, EXITS = 6, (2, 3, 5)
LEAVES = AdaInfer(layers=EXITS, stop={"rule": "top_prob", "threshold": 0.5})
TASK = Chain(n_ops=2, n_train=32, n_valid=24, n_test=8)


def model_of(method, arch: str = "llama", seed: int = 0) -> LatentModel:
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) if arch == "gpt2" else {}
    return tiny_model(method, arch, seed, num_hidden_layers=L, **dropout)


def layers_of(model: LatentModel) -> list[int]:
    """Return after which layers the tokens that write have left."""
    return written_depths(*read(model, MIXED)[:2])


def test_by_default_tokens_may_leave_from_a_quarter_of_the_depth_on():
    assert [layers.stop for layers in model_of(AdaInfer()).depth.sections] == [2, 3, 4, 5, 6]
    twelve = tiny_model(AdaInfer(), num_hidden_layers=12)
    assert [layers.stop for layers in twelve.depth.sections] == [*range(3, 13)]


@pytest.mark.parametrize(
    "fields",
    [{"layers": (3,)}, {"n_candidates": 2}, {"stop.rule": "gap"}]
    + [{f"stop.{name}": n} for name, n in (("threshold", 0.4), ("min_loops", 2), ("patience", 2), ("check_every", 2))]
    + [{"stop.decay": 2}],
    ids=str,
)
def test_every_setting_of_leaving_changes_where_tokens_leave(fields):
    assert layers_of(model_of(LEAVES)) != layers_of(model_of(change(LEAVES, **fields)))


def test_exits_that_the_model_does_not_have_are_refused():
    with pytest.raises(InputError, match="choose layers from 1 to 5"):
        model_of(AdaInfer(layers=(2, 6)))
    with pytest.raises(InputError, match="begin layers at 2"):
        model_of(AdaInfer(layers=(1, 3), stop={"rule": "classifier", "features": ("gap", "mlp")}))
    with pytest.raises(InputError, match="calibrate the model first"):
        model_of(AdaInfer(stop={"rule": "classifier"})).answer_logits(MIXED)


# Fewer words


def test_candidates_spare_the_head_and_are_the_likeliest_words_of_the_first_exit():
    n_words = model_of(LEAVES).backbone.config.vocab_size
    assert layers_of(model_of(LEAVES)) == layers_of(model_of(change(LEAVES, n_candidates=n_words)))
    never = change(LEAVES, stop={"threshold": math.inf})
    every, few = (model_of(change(never, n_candidates=n)) for n in (0, 4))
    costs = [m.generate(QUESTIONS[:1], max_new_tokens=1)[0].cost.flops for m in (every, few)]
    assert costs[0] - costs[1] == pytest.approx(2 * 2 * every.backbone.width * (n_words - 4))  # 2 of the 3 looks
    written, plain = (m.generate(QUESTIONS, max_new_tokens=4) for m in (few, model_of(Cot())))
    assert [g.text for g in written] == [g.text for g in plain]
    seen, backbone, batch = scan_loop(few, MIXED[:1]), few.backbone, few.batch(few.rows(MIXED[:1]))
    first, state = None, backbone.embed(batch.ids_BS)
    for t, layers in enumerate(few.depth.sections):
        with torch.no_grad():
            state = backbone(state, layers=layers)
            logits = backbone.head(backbone.norm(state))[0, batch.predict_at_U]
        first = logits.topk(4, dim=-1).indices if first is None else first
        assert_close(seen.scores_TM[t], logits.gather(1, first).softmax(-1).amax(1))
        assert torch.equal(seen.tops_TM[t], logits.argmax(1))


# Learning


@by_arch
def test_training_leaves_nowhere_and_learns_as_the_plain_model(arch):
    plain = model_of(Cot(), arch).train()
    ours = LatentModel(plain.backbone, plain.tokenizer, LEAVES).train()
    left, right = (gradients(model, model.loss(MIXED).loss) for model in (ours, plain))
    assert_same_gradients({k: v for k, v in left.items() if k in right}, right)


@by_arch
@pytest.mark.parametrize("schedule", ["equal", "linear"])
def test_earlier_exits_learn_to_speak(schedule, arch):
    model = model_of(AdaInfer(layers=EXITS, exits={"weight": 0.7, "schedule": schedule}), arch).train()
    out, batch = model.loss(MIXED), model.batch(model.rows(MIXED))
    backbone, state, losses = model.backbone, model.backbone.embed(batch.ids_BS), []
    at = (batch.mask_BS.cumsum(1) - 1).clamp(min=0)
    for layers in model.depth.sections:
        state = backbone(state, mask=batch.mask_BS, positions_BL=at, layers=layers)
        logits = backbone.head(backbone.norm(state)).flatten(0, 1)[batch.predict_at_U]
        losses.append(cross_entropy(logits, batch.targets_U).item())
    shares = [1.0] * 3 if schedule == "equal" else [1 / 4, 2 / 4, 3 / 4]
    expected = sum(share * loss for share, loss in zip(shares, losses))
    assert out.terms["exits"].item() == pytest.approx(expected, rel=1e-5)
    assert out.terms["answer"].item() == pytest.approx(losses[-1], rel=1e-5)
    assert out.loss.item() == pytest.approx(losses[-1] + 0.7 * expected, rel=1e-5)
    plain = gradients(model, model.loss(MIXED).loss)
    model.activation_checkpointing_enable()
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), plain)


@pytest.mark.slow
def test_exits_that_have_learned_to_speak_spare_layers_without_a_loss(tmp_path):
    method = AdaInfer(layers=(1, 2, 3), exits={"weight": 1.0, "schedule": "linear"})
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


def fitted(agreement: float, n: int = 2, **options) -> tuple[LatentModel, dict]:
    """Return a model whose classifier is fitted, and the report on it."""
    model = model_of(AdaInfer(layers=EXITS))
    settings = CalibrationSettings(agreement=agreement, min_rows=5, max_new_tokens=n)
    return model, calibrate(model, TASK, TASK.examples("valid"), "classifier", settings, **options).report


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("kind", ExitClassifierKind.__args__)
def test_a_fitted_classifier_is_saved_and_loaded_and_decides_alike(kind, per_step, tmp_path):
    model, _ = fitted(0.6, 3, classifier=kind, per_step=per_step, features=("gap", "top", "mlp", "block"))
    left, run = layers_of(model), saved(model, tmp_path / "run")
    assert len(set(left)) > 1
    loaded = LatentModel.from_pretrained(run, device="cpu")
    assert loaded.method == model.method and layers_of(loaded) == left
    shifted, lazy, other = (
        LatentModel.from_pretrained(run, change(model.method, **fields), device="cpu")
        for fields in ({"stop.threshold": 0.1}, {"kv_missing": "full_compute"}, {"stop.features": ("gap",)})
    )
    assert all(a >= b for a, b in zip(layers_of(shifted), left)) and layers_of(shifted) != left
    assert layers_of(lazy) == left
    with pytest.raises(InputError, match="calibrate the model first"):  # it was fitted to other features
        other.answer_logits(MIXED)


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_agreement_on_the_tokens_that_chose_the_thresholds_is_as_asked(target):
    model, report = fitted(target)
    tokens, examples = report["tokens"], TASK.examples("valid")
    assert tokens["agreement"] >= target and tokens["agreement_ci95"][0] <= tokens["agreement"]
    assert tokens["mean_iterations"] < len(EXITS) + 1
    seen = scan_loop(model, examples[len(examples) // 2 :])
    stops = seen.stops_at(model.method.stop, 0.0)
    same = seen.agrees_TM.gather(0, stops[None] - 1).double().mean().item()
    assert same == pytest.approx(tokens["agreement"]) and len(stops) == tokens["n"]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma2"])
def test_a_few_words_are_read_as_the_head_reads_them(arch):
    backbone = tiny_model(Cot(), arch).backbone
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(5, backbone.width, generator=generator)
    ids = torch.randint(0, backbone.config.vocab_size, (5, 3), generator=generator)
    assert_close(backbone.head_rows(states, ids), backbone.head(states).gather(1, ids))
