"""Calibration: the loosest threshold that loses no more than was said; where rows stop, foretold exactly."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from innerloop import AdaInfer, Cot, InputError, LatentModel, Looped, Lotus, RecurrentDepth, Slr
from innerloop.calibrate.calibrate import REPORT, Calibration, adopt_rule, calibrate
from innerloop.calibrate.loop_scan import scan_loop
from innerloop.calibrate.oracles import first_showing
from innerloop.calibrate.settings import CalibrationSettings
from innerloop.calibrate.threshold_search import ThresholdSearch, thresholds_between
from innerloop.methods import Method
from innerloop.methods.latent.slr_settings import SlrStop
from innerloop.model.run_folder import PARTS, SETTINGS
from innerloop.model.stopping import ruled_by, use_rule
from innerloop.tasks import Chain
from tests.close import assert_close
from tests.fields import FullStop
from tests.kills import killed_at
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


def model_of(method: Method, layers: int = 2) -> LatentModel:
    return tiny_model(method, num_hidden_layers=layers)


def quick(model: LatentModel, rule: str, *, check=(), progress=lambda told: None, stop=None, **how) -> Calibration:
    """Calibrate a model to a goal, the rule with the settings ``stop``."""
    settings = CalibrationSettings(**{"max_new_tokens": 3, "min_rows": 3} | how)
    return calibrate(model, EVEN, VALID, rule, settings, check=check, progress=progress, **stop or {})


def searching(model: LatentModel, **how) -> ThresholdSearch:
    return ThresholdSearch(model, EVEN, CalibrationSettings(max_new_tokens=3, min_rows=3, **how))


# Where it starts


def test_a_rule_that_the_model_stops_by_keeps_the_settings_that_are_not_named():
    own = SlrStop(rule="kl", threshold=0.5, site="answer", patience=2)
    kept = quick(model_of(replace(SLR, stop=own)), "kl", stop={"patience": 3}).model.method.stop
    assert (kept.site, kept.patience) == ("answer", 3)
    other = quick(model_of(replace(SLR, stop=own)), "delta").model.method.stop
    assert (other.site, other.patience) == (SlrStop().site, SlrStop().patience)


# Searching


def test_thresholds_tell_scores_apart_from_strict_to_loose():
    assert thresholds_between(torch.tensor([0.5, 0.25, 0.5, 1.0])) == [2.0, 0.75, 0.375, -0.75]
    assert thresholds_between(torch.tensor([3.0, 1.0, 2.0])) == [4.0, 3.0, 2.0, 1.0]
    many = thresholds_between(torch.rand(1000, generator=torch.Generator().manual_seed(0)), most=10)
    assert len(many) == 11 and many == sorted(many, reverse=True)


@pytest.mark.parametrize("kind", ["delta", "gap", "classifier"])
@pytest.mark.parametrize("goal", [{"max_drop": 0.1}, {"agreement": 0.7}, {"mean_loops": 2.6}], ids=str)
def test_what_is_foretold_of_rows_is_what_then_happens(goal, kind):
    model, told = model_of(SLR), []
    plain = searching(model).answers(VALID)
    report = quick(model, kind, progress=told.append, **goal).report
    assert searching(model).answers(VALID, math.inf) == plain  # full depth costs what no rule does
    assert f"answered {report['n']['choose']} questions at full depth" in told and "at depth 1 of 3" in "".join(told)
    full, chosen, (known, *others) = report["full"], report["chosen"], _near(report)
    assert report["goal"]["is_met"]
    assert not others or known in report["frontier"]
    for name, foretold in (("accuracy", "accuracy"), ("agreement", "agreement"), ("mean_loops", "loops")):
        assert chosen[name] == pytest.approx(known[foretold])
    if "max_drop" in goal:
        assert chosen["accuracy"] >= full["accuracy"] - 0.1 - 1e-9
        good = [one for one in report["frontier"] if one["accuracy"] >= full["accuracy"] - 0.1 - 1e-9]
        assert chosen["mean_loops"] == pytest.approx(min(one["loops"] for one in good))
    assert "agreement" not in goal or chosen["agreement"] >= 0.7
    assert "mean_loops" not in goal or chosen["mean_loops"] <= 2.6
    assert full["mean_loops"] == T and report["fixed"][-1] == pytest.approx(full["accuracy"])
    assert sum(report["histogram"]) == pytest.approx(1.0)
    share = sum(p * one for p, one in zip(report["histogram"], report["fixed"]))
    assert report["random"] == pytest.approx(share, abs=1e-6)
    assert chosen["loops_saved"] == pytest.approx(1 - chosen["mean_loops"] / T)
    assert chosen["ci95"][0] <= chosen["accuracy"] <= chosen["ci95"][1]
    assert chosen["agreement_ci95"][0] <= chosen["agreement"] <= chosen["agreement_ci95"][1]


def _near(report: dict) -> list[dict]:
    own = (report["threshold"], report["thresholds"])
    return [one for one in report["frontier"] if (one["threshold"], one["thresholds"]) == own]


GATED = Looped(max_loops=T, stop={"rule": "halt"}, exits={"gate": "distribution"})
HALTING = change(SLR, stop={"rule": "halt"}, halt={"weight": 0.1})


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        (GATED, "halt"),
        (GATED, "kl"),
        (Looped(max_loops=T, stop={"rule": "kl"}, kv_missing="restrict"), "kl"),
        (AdaInfer(layers=(1, 2, 3), stop={"rule": "gap"}, kv_missing="propagate", n_candidates=4), "gap"),
        (change(SLR, stop={"rule": "act"}, ponder_weight=0.1), "act"),
        (HALTING, "halt"),
        (HALTING, "kl_reverse"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_was_trained_to_stop_is_calibrated_too(method, rule):
    model = model_of(method, layers=T)
    report = quick(model, rule, mean_loops=3.0).report
    assert report["full"]["mean_loops"] == T and model.method.stop.rule == rule
    assert ("frontier" in report) == (method.family != "depth" and rule != "act")
    assert report["goal"]["is_met"] and report["chosen"]["mean_loops"] <= 3.0
    if rule == method.stop.rule:
        assert model.method == change(method, stop={"threshold": model.method.stop.threshold})


@pytest.mark.parametrize("method", [Looped(max_loops=T), AdaInfer(layers=(1, 2, 3))], ids=lambda m: m.name)
@pytest.mark.parametrize("field", ["min_loops", "check_every"])
def test_a_classifier_leaves_where_it_may(field, method):
    model = model_of(method, layers=T)
    report = quick(model, "classifier", agreement=0.5, stop={field: 2}).report
    n_1, n_2, n_3, _ = (one["n"] for one in report["tokens"]["iterations"])
    assert n_1 == 0 and n_2 > 0 and (n_3 == 0 or field != "check_every")
    assert report["tokens"]["agreement"] >= 0.5
    mean_depth = model.loop.stop.classifier.mean_KF[0, 2].item()
    assert mean_depth == pytest.approx((1 + 2 + 3) / 3 / T)  # it was fitted to every iteration but the last


def test_a_sure_model_is_scanned_to_its_end_though_thresholds_fall():
    model = model_of(Looped(max_loops=T, stop=FullStop(rule="top_prob", decay=8)))
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.mul_(100)
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
        (SLR, "kl", {"site": "answer"}),
        (Lotus(n_blocks=2, latents_per_block=2), "cos", {}),
    ],
    ids=str,
)
def test_other_settings_of_stopping_and_other_methods_go_along(method, rule, fields):
    model = model_of(method)
    report = quick(model, rule, agreement=0.6, stop=fields).report
    (known,) = _near(report)
    assert known["loops"] == pytest.approx(report["chosen"]["mean_loops"])
    assert model.method.stop == replace(method.stop, rule=rule, threshold=report["threshold"], **fields)


@pytest.mark.parametrize("method", [Looped(max_loops=T), AdaInfer(layers=(1, 2, 3))], ids=lambda m: m.name)
@pytest.mark.parametrize("kind", ["kl_reverse", "classifier"])
def test_thresholds_of_tokens_are_found_by_trying(kind, method):
    plain = searching(model_of(method, layers=T)).answers(VALID)
    for goal in ({"max_drop": 0.05}, {"mean_loops": 3.2}, {"agreement": 0.7}):
        model = model_of(method, layers=T)
        report = quick(model, kind, **goal).report
        full, chosen, tokens = report["full"], report["chosen"], report["tokens"]
        assert report["goal"]["is_met"] and full["mean_loops"] == T
        assert "max_drop" not in goal or chosen["drop"] <= 0.05 + 1e-9
        assert "mean_loops" not in goal or chosen["mean_loops"] <= 3.2
        assert "agreement" not in goal or tokens["agreement"] >= 0.7
        assert sum(one["n"] for one in tokens["iterations"]) == tokens["n"]
        assert "frontier" not in report
        assert searching(model).answers(VALID, math.inf) == plain  # full depth costs what no rule does


def test_under_teacher_forcing_what_is_foretold_of_leaving_tokens_is_exact():
    model = model_of(AdaInfer(layers=(1, 2, 3)), layers=4)
    use_rule(model, rule="gap", threshold=math.inf)
    seen = scan_loop(model, MIXED)
    for kappa in thresholds_between(seen.scores_TM[:-1].flatten(), most=5):
        use_rule(model, rule="gap", threshold=kappa)
        batch = model.batch(model.rows(MIXED))
        with torch.no_grad():
            thought = model.think(batch)
            model.written_logits(batch, thought)
        found = thought.deep[-1].depths_BL.flatten()[batch.predict_at_U]
        assert torch.equal(found, seen.stops_at(model.method.stop, kappa).long())


def test_the_best_there_could_be_is_told_beside():
    tops, gold = torch.tensor([[1, 5, 2], [3, 5, 2], [1, 5, 4]]), torch.tensor([1, 6, 2])
    assert first_showing(tops, tops[-1]).tolist() == [1, 1, 3] and first_showing(tops, gold).tolist() == [1, 3, 1]
    model = model_of(Looped(max_loops=T, stop={"rule": "gap", "threshold": math.inf}))
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
    search = searching(model_of(Looped(max_loops=T, stop={"rule": "gap", "threshold": math.inf})))
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
    found = quick(model, "classifier", agreement=0.7, check=TASK.examples("test"))
    path = found.save(run)
    report = json.loads(path.read_text())
    assert path.name == REPORT and report["rule"] == "classifier" and report["n"]["check"] == 8
    assert set(report["check"]) == {"full", "chosen"} and report["method"]["stop"]["rule"] == "classifier"
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
    with ruled_by(loaded, rule="delta"):
        adopt_rule(loaded, run)
    plain = LatentModel.from_pretrained(run, device="cpu")
    assert plain.method.stop.rule == "delta" and not [f for f in (run / PARTS).parent.glob(".*")]
    with pytest.raises(InputError, match="not of 'looped'"):
        adopt_rule(model_of(Looped()), run)
    assert json.loads((run / SETTINGS).read_text())["method"]["stop"]["rule"] == "delta"


def test_calibrating_leaves_the_weights_and_keeps_a_gate():
    model = model_of(change(SLR, stop={"rule": "halt"}))
    with torch.no_grad():
        model.loop.stop.gate.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for rule in ("halt", "halt_sample", "halt"):
        quick(model, rule, mean_loops=3.0)
        assert model.method.stop.rule == rule and model.method.stop.threshold is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", [SLR, AdaInfer(layers=(1,))], ids=lambda m: m.name)
def test_what_is_learned_of_rows_and_of_tokens_is_agreement_or_correctness(method):
    found = []
    for label in ("agree", "correct"):
        model = model_of(method)
        quick(model, "classifier", agreement=0.5, label=label)
        found.append(model.loop.stop.classifier.bias_K.tolist())
    assert found[0] != found[1]
    assert quick(model, "mlp_probe", agreement=0.3).report["goal"]["is_met"]
    assert model.loop.stop.probe[2].weight.abs().max() > 0
    assert not quick(model, "delta", mean_loops=0.5).report["goal"]["is_met"]  # a goal that cannot be met is told


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("none", {}, "no threshold"),
        ("random", {"stop": {"histogram": (1.0,)}}, "no threshold"),
        ("halt", {}, "train it with that rule first"),
        ("delta", {"max_drop": -0.1}, "between 0 and 1"),
        ("delta", {"agreement": 1.5}, "between 0 and 1"),
        ("delta", {"agreement": 0.5, "mean_loops": 2.0}, "not both"),
        ("delta", {"fit_share": 1.0}, "between 0 and 1"),
        ("delta", {"stop": {"patienc": 2}}, "stop.patienc: 'slr' has no such setting .did you mean 'patience'"),
    ],
    ids=str,
)
def test_what_cannot_be_calibrated_is_refused(rule, options, message):
    with pytest.raises(InputError, match=message):
        quick(model_of(SLR), rule, **options)
    with pytest.raises(InputError, match="no loop that could stop"):
        quick(model_of(Cot()), "kl")
    with pytest.raises(InputError, match="at least 2"):
        calibrate(model_of(SLR), TASK, VALID[:1], "delta")


def test_a_rule_in_a_block_is_gone_after_it():
    model = model_of(change(SLR, stop={"rule": "mlp_probe"}))
    probe = model.loop.stop
    with ruled_by(model, rule="fixed", threshold=1.0):
        assert model.method.stop.rule == model.loop.stop.kind == "fixed"
    assert model.loop.stop is probe and model.method.stop.rule == model.loop.stopping.rule == "mlp_probe"


@pytest.mark.parametrize("rule", ["delta", "kl_reverse"])
def test_thresholds_of_recurrent_depth_are_calibrated(rule):
    model = model_of(RecurrentDepth(n_prelude=1, n_core=1, n_coda=1, max_loops=T), layers=3)
    report = quick(model, rule, agreement=0.9).report
    assert model.method.stop.rule == rule
    assert report["tokens"]["agreement"] >= 0.9 and report["chosen"]["mean_loops"] <= T


def test_adopting_a_rule_that_is_killed_at_any_step_leaves_the_run_as_it_was_or_as_it_will_be(tmp_path):
    model = model_of(SLR)
    quick(model, "classifier", agreement=0.7)
    before, step = saved(model_of(SLR), tmp_path / "before"), 1
    found = []
    while True:
        run = Path(shutil.copytree(before, tmp_path / str(step) / "run"))
        (run / "notes.txt").write_text("mine")
        was_killed = killed_at(step, lambda run=run: adopt_rule(model, run))
        found.append(LatentModel.from_pretrained(run, device="cpu").method)
        assert found[-1] in (SLR, model.method) and (run / "notes.txt").read_text() == "mine"
        if not was_killed:
            break
        step += 3
    assert found[0] == SLR and found[-1] == model.method
