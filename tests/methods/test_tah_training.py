"""Think-at-Hard in training: oracle labels, the two stages, what has a gradient, saving and recipes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from innerloop import Cot, InputError, LatentModel, Looped, Tah
from innerloop.decoder.adapters import freeze
from innerloop.methods.depth.decider import ONCE
from innerloop.methods.depth.token_labels import Oracle
from innerloop.text.batch import Batch
from innerloop.train.recipe import load_recipe, parse_recipe
from innerloop.train.run import run_recipe
from tests.methods.reference_tah import slow_logits
from tests.methods.tools import MIXED, QUESTIONS, assert_close, assert_same_gradients, by_arch, change, gradients, stir
from tests.models import SETTINGS, chain_examples, from_scratch, saved, spelled_tokenizer, tiny_model

TEXT = Tah(lora={"rank": 2, "dropout": 0.0}, decider={"width": 8, "blocks": 1, "dropout": 0.0}, input_mix_topk=7)
ORACLE = change(TEXT, iterate="oracle", oracle={"reference": "of the test"})
DECIDES = change(TEXT, trains="decider", oracle={"reference": "of the test"})
LogitsFn = Callable[[Batch], Tensor]


def right(batch: Batch) -> Tensor:
    """A perfect reference."""
    return one_hot(batch.targets_U, 15).float()


def sevens(batch: Batch) -> Tensor:
    """A reference that always expects the token 7."""
    return one_hot(torch.full_like(batch.targets_U, 7), 15).float()


def learner(method: Tah, shows: LogitsFn = sevens, arch: str = "llama") -> LatentModel:
    """Return a model in training with a reference that shows what it is told to, nothing of it at a neutral start."""
    model = tiny_model(method, arch, num_hidden_layers=2).double()
    stir(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.reference = SimpleNamespace(logits=shows)
    return model.train()


def batch_of(model: LatentModel, n: int = 6) -> Batch:
    return model.batch(model.rows(MIXED[:n]))


def known_of(model: LatentModel, n: int = 6) -> Tensor:
    """Return how many iterations each column (B, S) shall have."""
    return model.depth.wanted(batch_of(model, n), model.reference)


def moving(grads: dict[str, Tensor]) -> set[str]:
    """Return what has a gradient."""
    return {name for name, grad in grads.items() if grad.abs().max() > 0}


# Labels


def test_a_label_is_of_the_position_that_predicts():
    """Position i is hard where the reference does not expect x_(i+1); the question's inside has no label."""
    model = learner(ORACLE)
    batch, known = batch_of(model), known_of(model)
    ids, mask = batch.ids_BS, batch.mask_BS
    written = torch.zeros_like(ids).flatten().index_fill(0, batch.predict_at_U, 1).view(ids.shape).bool()
    assert (known[~written] == ONCE).all() and set(known.flatten().tolist()) == {ONCE, 1, 2}
    for row, at in torch.nonzero(written).tolist():
        after = next(c for c in range(at + 1, ids.shape[1]) if mask[row, c])
        assert known[row, at] == (1 if ids[row, after] == 7 else 2)


def test_a_perfect_reference_finds_nothing_hard_and_a_random_one_nearly_all():
    method = change(ORACLE, force_one=False)
    assert (known_of(learner(method, right)) > 1).sum() == 0
    known = known_of(learner(method, lambda batch: torch.randn(len(batch.targets_U), 15)))
    assert (known > 1).sum() / (known > 0).sum() > 0.8


def test_the_reference_is_a_run_or_a_model_on_disk_and_not_the_trained_one(tmp_path: Path):
    reference = tiny_model(Cot(), seed=5, num_hidden_layers=2)
    reference.backbone.lm.save_pretrained(tmp_path / "plain")
    reference.tokenizer.save_pretrained(tmp_path / "plain")
    looped = tiny_model(Looped(max_loops=3), seed=5, num_hidden_layers=2)
    sources = saved(reference, tmp_path / "run"), tmp_path / "plain", saved(looped, tmp_path / "looped")
    found = []
    for source in sources:
        model = tiny_model(change(ORACLE, oracle={"reference": str(source)}), num_hidden_layers=2).train()
        batch = batch_of(model)
        found.append(known_of(model).flatten()[batch.predict_at_U] > 1)
        assert not any("reference" in name or "oracle" in name for name, _ in model.named_parameters())
    wrong = [torch.cat(one.answer_logits(MIXED)).argmax(-1) != batch.targets_U for one in (reference, looped)]
    assert torch.equal(found[0], wrong[0]) and torch.equal(found[0], found[1])
    assert torch.equal(found[2], wrong[1]) and not torch.equal(found[2], found[0])
    other = from_scratch(SETTINGS["llama"], spelled_tokenizer(pad_token="<unk>"), Cot())
    model = tiny_model(change(ORACLE, oracle={"reference": str(saved(other, tmp_path / "other"))})).train()
    with pytest.raises(InputError, match="have other ids than those of the model: choose one of its family"):
        model.loss(MIXED)


@pytest.mark.parametrize("metric", ["ce", "entropy"])
@pytest.mark.parametrize(("max_loops", "share"), [(2, 0.25), (4, 0.3)])
def test_the_hardest_share_by_cross_entropy_or_entropy(metric, max_loops, share):
    torch.manual_seed(1)
    logits = 3 * torch.randn(200, 15)
    method = change(ORACLE, oracle={"metric": metric, "share": share}, max_loops=max_loops)
    model = learner(method, lambda batch: logits[: len(batch.targets_U)])
    batch = batch_of(model)
    depths, n = model.depth.oracle.depths(batch, model.reference, max_loops), len(batch.targets_U)
    log_p = logits[:n].log_softmax(-1)
    hard = cross_entropy(log_p, batch.targets_U, reduction="none")
    hard = -(log_p.exp() * log_p).sum(-1) if metric == "entropy" else hard
    for depth in range(1, max_loops):
        assert int((depths > depth).sum()) == n - round((1 - share * (max_loops - depth) / (max_loops - 1)) * n)
        assert hard[depths > depth].min() > hard[depths <= depth].max()  # the hardest go deepest


def test_hard_tokens_share_the_deeper_iterations_evenly_and_by_place_alone():
    model, examples = learner(change(ORACLE, max_loops=4), lambda batch: -right(batch)), chain_examples(64)
    batch, one = (model.batch(model.rows(part)) for part in (examples, examples[5:6]))
    depths, alone = (model.depth.oracle.depths(some, model.reference, 4) for some in (batch, one))
    shares = torch.bincount(depths, minlength=5)[2:] / len(depths)
    assert depths.min() == 2 and (shares - 1 / 3).abs().max() < 0.1
    assert torch.equal(alone, depths.split(batch.n_targets)[5])


def test_labels_are_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, path = saved(tiny_model(Cot(), seed=5), tmp_path / "run"), tmp_path / "labels" / "of.jsonl"
    method = change(ORACLE, oracle={"reference": str(folder), "cache": str(path)})
    model, again, other, fresh = (
        tiny_model(change(method, **fields)).train()
        for fields in ({}, {}, {"oracle.metric": "ce"}, {"oracle.cache": None})
    )
    for n in (3, 6):
        assert torch.equal(known_of(model, n), known_of(fresh, n))
    assert len(path.read_text().splitlines()) == 1 + 6
    with path.open("a") as file:
        file.write('\n["cut short", [0.0, 1')
    expected = known_of(fresh)
    monkeypatch.setattr(Oracle, "measure", lambda *_: pytest.fail("all rows are known"))
    assert torch.equal(known_of(again), expected)
    with pytest.raises(InputError, match=r"of.jsonl holds labels of another reference or metric; remove it"):
        known_of(other)
    assert json.loads(path.read_text().splitlines()[0])["metric"] == "mismatch"


# Stage 1


@pytest.mark.parametrize(
    "settings",
    [{}, {"residual_logits": False}, {"depth_attention": "depth1_only"}],
    ids=["default", "last", "depth1_only"],
)
@by_arch
def test_stage_1_is_the_cross_entropy_at_the_oracles_depths_and_so_is_its_gradient(arch, settings):
    """Through both readings, their mixture, and the keys of the first that the second sees: nothing is detached."""
    model = learner(change(ORACLE, **settings), sevens, arch)
    batch, known = batch_of(model, 3), known_of(model, 3)
    out, total = model(batch), torch.zeros(())
    for row, laid in enumerate(model.rows(MIXED[:3])):
        ids, depths = laid.ids(), known[row][batch.mask_BS[row].bool()].clamp(min=1).tolist()
        at = [i - 1 for i, label in enumerate(laid.labels()) if label >= 0]
        targets = torch.tensor([ids[i + 1] for i in at])
        total = total + cross_entropy(slow_logits(model, ids, depths)[at].float(), targets, reduction="sum")
    n = len(batch.targets_U)
    assert_close(out.loss, total / n, 1e-5)
    assert out.terms["hard"] == (known > 1).sum() / n == out.terms["iterated"]
    ours, theirs = gradients(model, out.loss), gradients(model, total / n)
    still = ours.keys() - moving(ours)
    assert settings or not any(part in name for name in still for part in ("lora", "layers", ".h."))
    for grads in (ours, theirs):  # a table gives the row of its padding no gradient; what is mixed has no padding
        grads[next(iter(grads))][model.encoder.pad_id] = 0
    assert_same_gradients(ours, theirs, 1e-4)


@pytest.mark.parametrize("force_one", [False, True])
def test_without_a_hard_token_the_lora_has_no_gradient_unless_one_is_forced(force_one):
    model = learner(change(ORACLE, force_one=force_one), right)
    out = model.loss(MIXED)
    n_lora = sum("lora" in name for name in moving(gradients(model, out.loss)))
    assert n_lora == (sum("lora" in name for name, _ in model.named_parameters()) if force_one else 0)
    assert out.terms["hard"].item() == pytest.approx(force_one / len(batch_of(model).targets_U))
    assert model.eval().loss(MIXED).terms["iterated"] == 0  # the oracle labels training alone


def test_lora_dropout_is_of_training():
    model = learner(change(ORACLE, lora={"dropout": 0.5}))
    assert model.loop.lora.dropout == 0.5
    assert model.loss(MIXED).loss != model.loss(MIXED).loss
    model.eval()
    assert model.loss(MIXED).loss == model.loss(MIXED).loss


@pytest.mark.parametrize("method", [ORACLE, change(DECIDES, tau=0.3)], ids=["text", "decider"])
@by_arch
def test_recomputing_activations_gives_the_same_gradients(arch, method):
    model = learner(method, sevens, arch)
    plain = gradients(model, model.loss(MIXED).loss)
    model.activation_checkpointing_enable()
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), plain, 1e-6)


def test_the_low_budget_variant_trains_the_lora_alone():
    model = learner(ORACLE)
    freeze(model.backbone, model.marker_ids())
    assert {name.split(".")[0] for name in moving(gradients(model, model.loss(MIXED).loss))} == {"loop"}


def test_micro_batches_add_up_to_the_batch():
    model = learner(DECIDES)
    counts = batch_of(model).counts()
    parts = [model(model.batch(model.rows(MIXED[i : i + 2])), counts).loss for i in (0, 2, 4)]
    assert_close(sum(parts), model(batch_of(model)).loss, 1e-6)


# Stage 2


def scores_of(model: LatentModel) -> list[Tensor]:
    """Return the list to which the decider's logits are added from now on."""
    found: list[Tensor] = []
    model.depth.chooser.decider.register_forward_hook(lambda module, args, out: found.append(out))
    return found


@by_arch
def test_stage_2_is_the_weighted_binary_cross_entropy_and_trains_the_decider_alone(arch):
    model = learner(change(DECIDES, tau=0.4, pos_weight=3.0), sevens, arch)
    found, batch = scores_of(model), batch_of(model)
    out, (scores,) = model.loss(MIXED), found
    hard = (batch.targets_U != 7).float()[batch.predict_at_U.argsort()]  # in the order of the columns
    wanted = binary_cross_entropy_with_logits(scores, hard.to(scores), pos_weight=torch.tensor(3.0))
    assert_close(out.loss.double(), wanted.double(), 1e-6)
    assert out.terms["hard"] == hard.mean()
    assert_close(out.terms["iterated"].double(), (scores.sigmoid() > 0.4).double().mean(), 1e-6)
    decider = {name for name, _ in model.named_parameters() if "decider" in name}
    assert decider == {name for name, p in model.named_parameters() if p.requires_grad}
    assert decider == moving(gradients(model, out.loss))


def test_where_there_may_be_three_readings_the_decider_learns_from_those_it_was_asked_about():
    model = learner(change(DECIDES, max_loops=3, tau=0.5), lambda batch: -right(batch))
    scores, batch = scores_of(model), batch_of(model)
    out = model.loss(MIXED)
    depths = model.depth.oracle.depths(batch, model.reference, 3)[batch.predict_at_U.argsort()]
    went = scores[0].sigmoid() > 0.5
    assert 0 < went.sum() < len(went) and len(scores[1]) == went.sum()
    weight, total = torch.tensor(model.method.pos_weight), 0.0
    for found, wanted in ((scores[0], depths > 1), (scores[1], depths[went] > 2)):
        total += binary_cross_entropy_with_logits(found, wanted.to(found), reduction="sum", pos_weight=weight)
    assert_close(out.loss.double(), total.double() / len(depths), 1e-5)


def test_a_decider_that_is_not_trained_has_no_gradient():
    model = learner(change(TEXT, tau=0.4))
    out = model.loss(MIXED)
    assert set(out.terms) == {"answer", "iterated"} and out.terms["iterated"] > 0
    moved = moving(gradients(model, out.loss))
    assert not any("decider" in name for name in moved) and any("lora" in name for name in moved)


# Runs


LABELS = {"reference": "{out}/stages/1", "cache": "{out}/labels.jsonl"}
METHOD = {"name": "tah", "lora": {"rank": 2}, "oracle": LABELS}
DECIDER = {**METHOD, "decider": {"width": 8, "blocks": 1}, "trains": "decider", "tau": 0.5}
RAW = {
    "task": {"name": "chain", "n_ops": 2, "n_train": 16, "n_valid": 8, "n_test": 8},
    "backbone": {"scratch": {"type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}},
    "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "logging_steps": 1},
}
STAGES = [{"method": {"name": "cot"}}, {"method": {**METHOD, "iterate": "oracle"}}, {"method": DECIDER}]


def test_a_recipe_runs_through_the_stages_and_an_interrupted_one_goes_on_as_if_it_had_not_been(tmp_path: Path):
    run = run_recipe(parse_recipe({**RAW, "stages": STAGES, "out": str(tmp_path / "run")}))
    cot, text, last = (LatentModel.from_pretrained(f) for f in (run / "stages" / "1", run / "stages" / "2", run))
    assert last.method.oracle.reference == str(run / "stages" / "1") and (run / "labels.jsonl").exists()
    weights = [dict(one.backbone.named_parameters()) for one in (cot, text, last)]
    assert all(torch.equal(weights[2][name], weights[1][name]) for name in weights[1])  # stage 2 leaves the model alone
    assert any(not torch.equal(weights[1][name], weights[0][name]) for name in weights[1])
    for key, up in text.loop.lora.up.items():
        assert torch.equal(up, last.loop.lora.up[key]) and up.abs().max() > 0
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss_decider", "loss_hard", "loss_iterated", "loss_answer"} <= set(logged)
    assert {depth for one in last.generate(QUESTIONS, max_new_tokens=5) for _, depth in one.depths} <= {1, 2}
    free = {"reference": None, "cache": None}
    strict = LatentModel.from_pretrained(run, change(last.method, tau=1.0, trains="model", oracle=free))
    plain = LatentModel(strict.backbone, strict.tokenizer, Cot())
    for ours, theirs in zip(strict.answer_logits(MIXED), plain.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)

    def train(name: str, steps: int, resume: bool = False) -> LatentModel:
        method = {**DECIDER, "oracle": {**LABELS, "reference": str(run / "stages" / "1")}}
        raw = {**RAW, "backbone": {"model": str(run / "stages" / "2")}, "method": method, "out": str(tmp_path / name)}
        raw["train"] = {**RAW["train"], "max_steps": steps, "save_steps": 2}
        return LatentModel.from_pretrained(run_recipe(parse_recipe(raw), resume) / f"checkpoint-{steps}")

    train("part", 2)
    (tmp_path / "part" / "finished").unlink()
    ours, theirs = train("part", 4, resume=True), train("whole", 4)
    for (name, one), other in zip(ours.depth.named_parameters(), theirs.depth.parameters()):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_the_recipe_learns_to_read_hard_tokens_twice_and_to_tell_them(tmp_path: Path):
    """One layer, now and then run twice, answers as well as two layers would; never or always twice is far worse."""
    path = Path(__file__).parents[2] / "recipes" / "chain" / "tah.yaml"
    overrides = ["--out", str(tmp_path / "run"), "--train.use_cpu", "true", "--train.eval_strategy", "no"]
    recipe = load_recipe(path, overrides)
    run = run_recipe(recipe)
    examples = recipe.task.examples("test")[:200]

    def answer(folder: Path, **changes) -> tuple[float, float]:
        model = LatentModel.from_pretrained(folder)
        if changes:
            model = LatentModel.from_pretrained(folder, replace(model.method, **changes))
        answers = model.generate([example.question for example in examples], max_new_tokens=40)
        n_right = sum(a.answer == e.answer for a, e in zip(answers, examples))
        return n_right / len(examples), sum(a.cost.flops for a in answers)

    (hard_twice, flops), (never, plain), (always, _) = (answer(run, tau=tau) for tau in (0.9, 1.0, 0.0))
    assert hard_twice > 0.9 > max(never, always, answer(run / "stages" / "1")[0])
    assert flops < 1.1 * plain
