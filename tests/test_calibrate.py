"""Calibration: the loosest threshold that loses no more than was said; where rows stop, foretold exactly."""

import json
import math

import pytest
import torch

from innerloop import AdaInfer, Cot, InputError, LatentModel, Looped, Lotus, Slr
from innerloop.calibrate.calibrate import REPORT, adopt_rule, calibrate
from innerloop.calibrate.loop_scan import ruled_by, survey, use_rule
from innerloop.calibrate.oracles import first_agreeing, first_correct
from innerloop.calibrate.threshold_search import Answers, Goal, Tryout, thresholds_between
from innerloop.measure.statistics import clopper_pearson
from innerloop.methods import Method
from innerloop.model.checkpoint import PARTS, SETTINGS
from innerloop.tasks import Chain
from tests.close import assert_close
from tests.methods.tools import MIXED, change
from tests.models import saved, tiny_model

TASK = Chain(n_ops=2, n_train=32, n_valid=16, n_test=8)
VALID = TASK.examples("valid")
SLR = Slr(n_slots=2, max_loops=4)
T = 4


class Lenient(Chain):
    """Counts an answer as right where its text has an even number of letters: random models are right half the time."""

    def extract(self, text: str) -> str | None:
        return text or "-"

    def is_correct(self, predicted: str, gold: str) -> bool:
        return len(predicted) % 4 < 2


EVEN = Lenient(n_ops=2, n_train=32, n_valid=16, n_test=8)


def model_of(method: Method, **changes) -> LatentModel:
    return tiny_model(method, num_hidden_layers=changes.pop("layers", 2), **changes)


def quick(model: LatentModel, rule: str, **options):
    return calibrate(model, EVEN, VALID, rule, max_new_tokens=3, min_rows=3, **options)


# Searching


def test_thresholds_tell_scores_apart_from_strict_to_loose():
    assert thresholds_between(torch.tensor([0.5, 0.25, 0.5, 1.0])) == [2.0, 0.75, 0.375, -0.75]
    assert thresholds_between(torch.tensor([3.0, 1.0, 2.0])) == [4.0, 3.0, 2.0, 1.0]
    many = thresholds_between(torch.rand(1000, generator=torch.Generator().manual_seed(0)), most=10)
    assert len(many) == 11 and many == sorted(many, reverse=True)


def test_clopper_pearson_at_known_values():
    assert clopper_pearson(0, 10) == (0.0, pytest.approx(0.30850, abs=1e-4))
    assert clopper_pearson(10, 10) == (pytest.approx(0.69150, abs=1e-4), 1.0)
    assert clopper_pearson(8, 10) == (pytest.approx(0.44390, abs=1e-4), pytest.approx(0.97479, abs=1e-4))


@pytest.mark.parametrize("kind", ["delta", "gap", "classifier"])
@pytest.mark.parametrize("goal", [{"max_drop": 0.1}, {"agreement": 0.7}, {"mean_loops": 2.6}], ids=str)
def test_what_is_foretold_of_rows_is_what_then_happens(goal, kind):
    model = model_of(SLR)
    report = quick(model, kind, **goal).report
    full, chosen, (known, *others) = report["full"], report["chosen"], _near(report)
    assert report["goal"]["is_met"]
    assert not others or known in report["frontier"]
    assert known["accuracy"] == pytest.approx(chosen["accuracy"])
    assert known["agreement"] == pytest.approx(chosen["agreement"])
    assert known["loops"] == pytest.approx(chosen["mean_loops"])
    if "max_drop" in goal:
        assert chosen["accuracy"] >= full["accuracy"] - 0.1 - 1e-9
        good = [one for one in report["frontier"] if one["accuracy"] >= full["accuracy"] - 0.1 - 1e-9]
        assert chosen["mean_loops"] == pytest.approx(min(one["loops"] for one in good))
    elif "agreement" in goal:
        assert chosen["agreement"] >= 0.7
    else:
        assert chosen["mean_loops"] <= 2.6
    assert full["mean_loops"] == T and report["fixed"][-1] == pytest.approx(full["accuracy"])
    assert sum(report["histogram"]) == pytest.approx(1.0)
    share = sum(p * one for p, one in zip(report["histogram"], report["fixed"]))
    assert report["random"] == pytest.approx(share, abs=1e-6)
    assert chosen["loops_saved"] == pytest.approx(1 - chosen["mean_loops"] / T)
    assert chosen["ci95"][0] <= chosen["accuracy"] <= chosen["ci95"][1]
    low, high = chosen["agreement_ci95"]
    assert low <= chosen["agreement"] <= high


def _near(report: dict) -> list[dict]:
    return [
        one
        for one in report["frontier"]
        if (one["threshold"], one["thresholds"]) == (report["threshold"], report["thresholds"])
    ]


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (Looped(max_loops=T, stop="halt", gate="distribution"), "halt"),
        (Looped(max_loops=T, stop="halt", gate="distribution"), "kl"),
        (Looped(max_loops=T, stop="kl", kv_missing="restrict"), "kl"),
        (AdaInfer(exits=(1, 2, 3), stop="gap", kv_missing="propagate", n_candidates=4), "gap"),
        (AdaInfer(exits=(1, 2, 3), stop="halt", gate="improvement"), "halt"),
        (change(SLR, stop="act", ponder_weight=0.1), "act"),
        (change(SLR, stop="halt", halt_weight=0.1), "halt"),
        (change(SLR, stop="halt", halt_weight=0.1), "kl_reverse"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_was_trained_to_stop_is_calibrated_too(method, rule):
    model = model_of(method, layers=T)
    report = quick(model, rule, mean_loops=3.0).report
    assert report["full"]["mean_loops"] == T and model.method.stop == rule
    kept = ("gate", "halt_weight", "ponder_weight") if rule == method.stop else ()
    assert all(getattr(model.method, name, None) == getattr(method, name, None) for name in kept)


@pytest.mark.parametrize("method", [SLR, Looped(max_loops=T), AdaInfer(exits=(1, 2, 3))], ids=lambda m: m.name)
def test_full_depth_costs_what_the_model_without_a_rule_does(method):
    model = model_of(method, layers=T)
    plain = Tryout(model, EVEN, 8, 3, 0, print).ask(VALID)
    use_rule(model, stop="delta")
    full = Tryout(model, EVEN, 8, 3, 0, print).ask_at_full_depth(VALID)
    assert full.texts == plain.texts and torch.equal(full.flops_M, plain.flops_M)


@pytest.mark.parametrize("method", [Looped(max_loops=T), AdaInfer(exits=(1, 2, 3))], ids=lambda m: m.name)
@pytest.mark.parametrize("fields", [{"min_loops": 2}, {"check_every": 2}], ids=str)
def test_a_classifier_leaves_where_it_may(fields, method):
    model = model_of(method, layers=T)
    report = quick(model, "classifier", agreement=0.5, **fields).report
    n_1, n_2, n_3, _ = (one["n"] for one in report["tokens"]["iterations"])
    assert n_1 == 0 and n_2 > 0 and (n_3 == 0 or "check_every" not in fields)
    assert report["tokens"]["agreement"] >= 0.5
    mean_depth = model.loop.stop.judge.mean_KF[0, 2].item()
    assert mean_depth == pytest.approx((1 + 2 + 3) / 3 / T)  # it was fitted to every iteration but the last


def test_a_sure_model_is_surveyed_to_its_end_though_thresholds_fall():
    model = model_of(Looped(max_loops=T))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.mul_(100)
    use_rule(model, stop="top_prob", stop_decay=8)
    seen = survey(model, VALID)
    assert (seen.scores_TM == 1).any() and seen.scores_TM.shape[0] == T


@pytest.mark.parametrize(
    ("method", "rule", "message"),
    [
        (Looped(max_loops=1), "delta", "single iteration"),
        (change(SLR, max_loops=1), "classifier", "single iteration"),
        (change(SLR, max_loops=2), "acceleration", "says nothing before the last of 2"),
    ],
)
def test_a_loop_too_short_to_be_stopped_is_refused(method, rule, message):
    with pytest.raises(InputError, match=message):
        quick(model_of(method), rule)


@pytest.mark.parametrize("fields", [{"patience": 2}, {"min_loops": 2}, {"check_every": 2}], ids=str)
def test_other_settings_of_stopping_go_along(fields):
    model = model_of(change(SLR, max_loops=5))
    report = quick(model, "delta", mean_loops=3.5, **fields).report
    (known,) = _near(report)
    assert known["loops"] == pytest.approx(report["chosen"]["mean_loops"])
    assert all(getattr(model.method, name) == value for name, value in fields.items())


def test_a_stop_site_and_a_method_with_other_fields_go_along():
    report = quick(model_of(SLR), "kl", agreement=0.6, stop_site="answer").report
    assert _near(report)[0]["loops"] == pytest.approx(report["chosen"]["mean_loops"])
    lotus = quick(model_of(Lotus(n_blocks=2, latents_per_block=2)), "cos", agreement=0.6).report
    assert _near(lotus)[0]["loops"] == pytest.approx(lotus["chosen"]["mean_loops"])


@pytest.mark.parametrize(
    ("method", "layers"), [(Looped(max_loops=T), 2), (AdaInfer(exits=(2, 3, 4)), 5)], ids=["looped", "adainfer"]
)
@pytest.mark.parametrize("kind", ["kl_reverse", "classifier"])
def test_thresholds_of_tokens_are_found_by_trying(kind, method, layers):
    for goal in ({"max_drop": 0.05}, {"mean_loops": 3.2}, {"agreement": 0.7}):
        model = model_of(method, layers=layers)
        report = quick(model, kind, **goal).report
        full, chosen, tokens = report["full"], report["chosen"], report["tokens"]
        assert report["goal"]["is_met"]
        assert full["mean_loops"] == (layers if isinstance(method, AdaInfer) else T)
        if "max_drop" in goal:
            assert chosen["drop"] <= 0.05 + 1e-9
        elif "mean_loops" in goal:
            assert chosen["mean_loops"] <= 3.2
        else:
            assert tokens["agreement"] >= 0.7
        assert sum(one["n"] for one in tokens["iterations"]) == tokens["n"]
        assert "frontier" not in report


def test_under_teacher_forcing_what_is_foretold_of_leaving_tokens_is_exact():
    model = model_of(AdaInfer(exits=(1, 2, 3)), layers=4)
    use_rule(model, stop="gap", stop_threshold=math.inf)
    seen = survey(model, MIXED)
    for kappa in thresholds_between(seen.scores_TM[:-1].flatten(), most=5):
        use_rule(model, stop="gap", stop_threshold=kappa)
        batch = model.batch(model.rows(MIXED))
        with torch.no_grad():
            thought = model.think(batch)
            model.written_logits(batch, thought)
        assert torch.equal(
            thought.deep[-1].depths_BL.flatten()[batch.predict_at_U], seen.stops_at(model.method, kappa).long()
        )


def test_the_best_there_could_be_is_told_beside():
    tops, gold = torch.tensor([[1, 5, 2], [3, 5, 2], [1, 5, 4]]), torch.tensor([1, 6, 2])
    assert first_agreeing(tops).tolist() == [1, 1, 3] and first_correct(tops, gold).tolist() == [1, 3, 1]
    model = model_of(Looped(max_loops=T))
    use_rule(model, stop="gap", stop_threshold=math.inf)
    search = Tryout(model, EVEN, 64, 4, 0, lambda done: None).search(VALID, 3)
    oracle = search.report(0, Goal(0.0))["tokens"]["oracle"]
    soonest = first_agreeing(search.seen.tops_TM)
    assert oracle["agree"] == pytest.approx(soonest.double().mean().item()) and 1 < oracle["agree"] < T
    assert oracle["right_at_last"] < oracle["right"] <= 1 < oracle["correct"] <= T
    model.eval()
    told = torch.cat([logits.log_softmax(-1) for logits in model.answer_logits(VALID)])
    assert_close(-told.gather(1, search.seen.gold_M[:, None])[:, 0], search.seen.losses_TM[-1])
    perfect = [choice for choice in search.choices if search.agreement(choice) == 1]
    assert perfect and all(choice.stops_M.double().mean() >= oracle["agree"] for choice in perfect)


def test_the_last_good_and_the_first_good_are_found_by_bisection(monkeypatch):
    """With known effects: the looser, the fewer iterations and the lower the accuracy."""
    model = model_of(Looped(max_loops=T))
    use_rule(model, stop="gap", stop_threshold=math.inf)
    search = Tryout(model, EVEN, 64, 4, 0, lambda done: None).search(VALID, 3)
    n = len(search.choices)
    asked = []

    def answers(i: int) -> Answers:
        asked.append(i)
        right = torch.arange(100) < 100 - 100 * i // n
        return Answers(right, ["x"] * 100, torch.full((100,), float(n - i)), torch.ones(100))

    monkeypatch.setattr(search, "answers", answers)
    search.full = answers(0)
    for drop in (0.0, 0.25, 0.5, 1.0):
        best = search.best(Goal(drop))
        assert 100 * best // n <= round(100 * drop) and (best == n - 1 or 100 * (best + 1) // n > round(100 * drop))
    for loops in (1, n // 2, n):
        assert n - search.best(Goal(0.0, mean_loops=loops)) == loops
    assert len(asked) < 7 * 8


# What is left behind


def test_a_report_is_written_and_a_run_adopts_the_rule(tmp_path):
    run = saved(model_of(SLR), tmp_path / "run")
    model = LatentModel.from_pretrained(run, device="cpu")
    found = quick(
        model, "classifier", mean_loops=3.0, check=TASK.examples("test"), stop_features=("gap", "block", "depth")
    )
    path = found.save(run)
    report = json.loads(path.read_text())
    assert path.name == REPORT and report["rule"] == "classifier" and report["n"]["check"] == 8
    assert set(report["check"]) == {"full", "chosen"} and report["method"]["stop"] == "classifier"
    untouched = LatentModel.from_pretrained(run, device="cpu")
    assert untouched.method == SLR
    before = {name: (run / name).read_bytes() for name in ("model.safetensors", "config.json")}
    found.save(run, adopt=True)
    assert before == {name: (run / name).read_bytes() for name in before}
    loaded = LatentModel.from_pretrained(run, device="cpu")
    assert loaded.method == model.method
    questions = [example.question for example in VALID]
    ours, theirs = (m.generate(questions, max_new_tokens=3) for m in (model, loaded))
    assert [(g.text, g.cost.loops) for g in ours] == [(g.text, g.cost.loops) for g in theirs]
    assert len({g.cost.loops for g in ours}) > 1
    with ruled_by(loaded, stop="delta"):
        adopt_rule(loaded, run)
    plain = LatentModel.from_pretrained(run, device="cpu")
    assert plain.method.stop == "delta" and not [f for f in (run / PARTS).parent.glob(".*")]
    with pytest.raises(InputError, match="not of 'looped'"):
        adopt_rule(model_of(Looped()), run)
    assert json.loads((run / SETTINGS).read_text())["method"]["stop"] == "delta"


def test_calibrating_leaves_the_weights_and_keeps_a_gate():
    model = model_of(change(SLR, stop="halt"))
    with torch.no_grad():
        model.loop.stop.gate.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for rule in ("halt", "halt_sample", "halt"):
        quick(model, rule, mean_loops=3.0)
        assert model.method.stop == rule and model.method.stop_threshold is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_act_is_calibrated_by_trying():
    model = model_of(change(SLR, stop="act"))
    report = quick(model, "act", mean_loops=1.5).report
    assert report["chosen"]["mean_loops"] <= 1.5 and "frontier" not in report


def test_labels_may_be_agreement_or_correctness_of_rows_and_of_tokens():
    for method in (SLR, AdaInfer(exits=(1,))):
        thresholds = []
        for label in ("agree", "correct"):
            model = model_of(method)
            quick(model, "classifier", agreement=0.5, label=label)
            thresholds.append(model.loop.stop.judge.bias_K.tolist())
        assert thresholds[0] != thresholds[1]


def test_a_fit_is_the_same_again():
    biases = []
    for _ in range(2):
        model = model_of(AdaInfer(exits=(1,)))
        quick(model, "classifier", agreement=0.5, seed=3)
        biases.append(model.loop.stop.judge.bias_K.tolist())
    assert biases[0] == biases[1]


def test_a_goal_that_cannot_be_met_is_told():
    for method in (SLR, Looped(max_loops=2)):
        assert not quick(model_of(method), "delta", mean_loops=0.5).report["goal"]["is_met"]


def test_a_probe_is_fitted_to_rows_and_to_tokens():
    for method in (SLR, AdaInfer(exits=(1,))):
        model = model_of(method)
        report = quick(model, "mlp_probe", agreement=0.3, probe_width=8).report
        assert report["goal"]["is_met"] and model.loop.stop.probe[0].weight.shape == (8, 32)
        assert model.loop.stop.probe[2].weight.abs().max() > 0


def test_progress_is_told():
    told = []
    quick(model_of(SLR), "delta", agreement=0.6, progress=told.append)
    assert told[:2] == ["answered 16 questions at full depth", "answered 16 questions at depth 1 of 3"]
    assert (
        told[2:4] == [one.replace("depth 1", f"depth {t}") for one, t in zip([told[1]] * 2, (2, 3))] and len(told) == 5
    )


REFUSED = [
    ({"rule": "none"}, "no threshold"),
    ({"rule": "random", "stop_histogram": (1.0,)}, "no threshold"),
    ({"rule": "halt"}, "train it with stop=halt first"),
    ({"max_drop": -0.1}, "cannot be negative"),
    ({"agreement": 1.5}, "between 0 and 1"),
    ({"agreement": 0.5, "mean_loops": 2.0}, "not both"),
    ({"fit_share": 1.0}, "between 0 and 1"),
    ({"patienc": 2}, "no setting of stopping"),
    ({"rule": "kl", "compare_init": False}, "compare_init"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_cannot_be_calibrated_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        calibrate(model_of(SLR), TASK, VALID, **{"rule": "delta", **options})


def test_a_method_without_a_loop_and_too_few_examples_are_refused():
    with pytest.raises(InputError, match="no loop that could stop"):
        quick(model_of(Cot()), "kl")
    with pytest.raises(InputError, match="at least 2"):
        calibrate(model_of(SLR), TASK, VALID[:1], "delta")


def test_a_rule_in_a_block_is_gone_after_it():
    model = model_of(change(SLR, stop="mlp_probe"))
    probe = model.loop.stop
    with ruled_by(model, stop="fixed", stop_threshold=1.0):
        assert model.method.stop == model.loop.stop.kind == "fixed"
    assert model.loop.stop is probe and model.method.stop == model.loop.settings.stop == "mlp_probe"
