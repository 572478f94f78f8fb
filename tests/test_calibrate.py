"""Calibration: the loosest threshold that loses no more than was said; where rows stop, foretold exactly."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from innerloop import AdaInfer, Cot, InputError, LatentModel, Looped, Lotus, Slr
from innerloop.calibrate.calibrate import REPORT, adopt_rule, calibrate
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.calibrate.oracles import first_showing
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.calibrate.threshold_search import ThresholdSearch, thresholds_between
from innerloop.methods import Method
from innerloop.model.checkpoint import PARTS, SETTINGS
from innerloop.model.stopping import ruled_by, use_rule
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
    names = {field.name for field in fields(CalibrationSettings)}
    how = {name: options.pop(name) for name in names & set(options)}
    settings = CalibrationSettings(**{"max_new_tokens": 3, "min_rows": 3, **how})
    return calibrate(model, EVEN, VALID, rule, settings, **options)


def searching(model: LatentModel, **how) -> ThresholdSearch:
    return ThresholdSearch(model, EVEN, CalibrationSettings(max_new_tokens=3, min_rows=3, **how))


# Searching


def test_thresholds_tell_scores_apart_from_strict_to_loose():
    assert thresholds_between(torch.tensor([0.5, 0.25, 0.5, 1.0])) == [2.0, 0.75, 0.375, -0.75]
    assert thresholds_between(torch.tensor([3.0, 1.0, 2.0])) == [4.0, 3.0, 2.0, 1.0]
    many = thresholds_between(torch.rand(1000, generator=torch.Generator().manual_seed(0)), most=10)
    assert len(many) == 11 and many == sorted(many, reverse=True)


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
    assert ("frontier" in report) == (method.family != "depth" and rule != "act")
    assert report["goal"]["is_met"] and report["chosen"]["mean_loops"] <= 3.0
    kept = ("gate", "halt_weight", "ponder_weight") if rule == method.stop else ()
    assert all(getattr(model.method, name, None) == getattr(method, name, None) for name in kept)


@pytest.mark.parametrize("method", [SLR, Looped(max_loops=T), AdaInfer(exits=(1, 2, 3))], ids=lambda m: m.name)
def test_full_depth_costs_what_the_model_without_a_rule_does(method):
    model = model_of(method, layers=T)
    plain = searching(model).answers(VALID)
    use_rule(model, stop="delta")
    assert searching(model).answers(VALID, math.inf) == plain


@pytest.mark.parametrize("method", [Looped(max_loops=T), AdaInfer(exits=(1, 2, 3))], ids=lambda m: m.name)
@pytest.mark.parametrize("fields", [{"min_loops": 2}, {"check_every": 2}], ids=str)
def test_a_classifier_leaves_where_it_may(fields, method):
    model = model_of(method, layers=T)
    report = quick(model, "classifier", agreement=0.5, **fields).report
    n_1, n_2, n_3, _ = (one["n"] for one in report["tokens"]["iterations"])
    assert n_1 == 0 and n_2 > 0 and (n_3 == 0 or "check_every" not in fields)
    assert report["tokens"]["agreement"] >= 0.5
    mean_depth = model.loop.stop.classifier.mean_KF[0, 2].item()
    assert mean_depth == pytest.approx((1 + 2 + 3) / 3 / T)  # it was fitted to every iteration but the last


def test_a_sure_model_is_surveyed_to_its_end_though_thresholds_fall():
    model = model_of(Looped(max_loops=T))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.mul_(100)
    use_rule(model, stop="top_prob", stop_decay=8)
    seen = scan_loop(model, VALID)
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


@pytest.mark.parametrize(
    ("method", "rule", "fields"),
    [
        *((change(SLR, max_loops=5), "delta", {name: 2}) for name in ("patience", "min_loops", "check_every")),
        (SLR, "kl", {"stop_site": "answer"}),
        (Lotus(n_blocks=2, latents_per_block=2), "cos", {}),
    ],
    ids=str,
)
def test_other_settings_of_stopping_and_other_methods_go_along(method, rule, fields):
    model = model_of(method)
    report = quick(model, rule, agreement=0.6, **fields).report
    (known,) = _near(report)
    assert known["loops"] == pytest.approx(report["chosen"]["mean_loops"])
    assert all(getattr(model.method, name) == value for name, value in fields.items())


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
    seen = scan_loop(model, MIXED)
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
    assert first_showing(tops, tops[-1]).tolist() == [1, 1, 3] and first_showing(tops, gold).tolist() == [1, 3, 1]
    model = model_of(Looped(max_loops=T))
    use_rule(model, stop="gap", stop_threshold=math.inf)
    search = searching(model)
    search.look(VALID)
    oracle = search.report(0)["tokens"]["oracle"]
    soonest = first_showing(search.seen.tops_TM, search.seen.tops_TM[-1])
    assert oracle["agree"] == pytest.approx(soonest.double().mean().item()) and 1 < oracle["agree"] < T
    assert oracle["right_at_last"] < oracle["right"] <= 1 < oracle["correct"] <= T
    model.eval()
    told = torch.cat([logits.log_softmax(-1) for logits in model.answer_logits(VALID)])
    assert_close(-told.gather(1, search.seen.gold_M[:, None])[:, 0], search.seen.losses_TM[-1])
    perfect = search.stops_KM[search.foreseen()["agreement"] == 1]
    assert len(perfect) and all(stops_M.double().mean() >= oracle["agree"] for stops_M in perfect)


def test_the_last_good_and_the_first_good_are_found_by_bisection(monkeypatch):
    """With known effects: the looser, the fewer iterations and the lower the accuracy."""
    model = model_of(Looped(max_loops=T))
    use_rule(model, stop="gap", stop_threshold=math.inf)
    search = searching(model)
    search.look(VALID)
    n = len(search.thresholds)
    asked = []

    def effect(i: int) -> dict:
        asked.append(i)
        return {"accuracy": (100 - 100 * i // n) / 100, "agreement": 1.0, "mean_loops": n - i}

    monkeypatch.setattr(search, "effect", effect)
    search.full |= {"correct": [True] * len(VALID)}

    def best(**how) -> int:
        search.settings = replace(search.settings, **how)
        return search.best()

    for drop in (0.0, 0.25, 0.5, 1.0):
        i = best(max_drop=drop)
        assert 100 * i // n <= round(100 * drop) and (i == n - 1 or 100 * (i + 1) // n > round(100 * drop))
    for loops in (1, n // 2, n):
        assert n - best(mean_loops=loops) == loops
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


def test_labels_may_be_agreement_or_correctness_of_rows_and_of_tokens():
    for method in (SLR, AdaInfer(exits=(1,))):
        thresholds = []
        for label in ("agree", "correct"):
            model = model_of(method)
            quick(model, "classifier", agreement=0.5, label=label)
            thresholds.append(model.loop.stop.classifier.bias_K.tolist())
        assert thresholds[0] != thresholds[1]


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
        quick(model_of(SLR), **{"rule": "delta", **options})


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
