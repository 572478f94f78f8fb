"""Think-at-Hard in training: oracle labels, the two stages, what has a gradient, saving and recipes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from innerloop import Cot, InputError, LatentModel, Looped, Tah
from innerloop.decoder.adapters import freeze
from innerloop.methods.depth.decider import ONCE
from innerloop.methods.depth.token_labels import Oracle
from innerloop.train.recipe import load_recipe, parse_recipe
from innerloop.train.run import run_recipe
from tests.methods.reference_tah import slow_logits
from tests.methods.tools import MIXED, QUESTIONS, assert_close, assert_same_gradients, by_arch, change, gradients, stir
from tests.models import chain_examples, saved, tiny_model

TEXT = {"lora_rank": 2, "lora_dropout": 0.0, "input_mix_topk": 7}
ORACLE = Tah(iterate="oracle", reference="of the test", **TEXT)
DECIDES = Tah(trains="decider", reference="of the test", decider_width=8, decider_blocks=1, decider_dropout=0.0, **TEXT)


class Reference:
    """Stands in for a reference model: shows what it is told to."""

    def __init__(self, shows):
        self.method, self.spell, self.shows, self.n_read = Cot(), None, shows, 0
        self.method = type("Nothing", (), {"prompt": lambda *_: type("Row", (), {"depth": None})})()

    def think(self, batch):
        self.n_read += 1

    def written_logits(self, batch, thought) -> Tensor:
        return self.shows(batch)


def right(batch) -> Tensor:
    """A perfect reference."""
    return torch.nn.functional.one_hot(batch.targets_U, 15).float()


def sure_of(token: int):
    """A reference that always expects the same token."""
    return lambda batch: torch.nn.functional.one_hot(torch.full_like(batch.targets_U, token), 15).float()


def learner(arch: str, method: Tah, shows=None, seed: int = 0) -> LatentModel:
    """Return a model in training with a reference, nothing of it at a start where it does nothing."""
    model = tiny_model(method, arch, seed, num_hidden_layers=2).double()
    stir(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if shows is not None:
        model.depth.oracle._model.append(Reference(shows))
    return model.train()


def batch_of(model: LatentModel, n: int = 6):
    return model.batch(model.rows(MIXED[:n]))


# Labels


def test_a_label_is_of_the_position_that_predicts():
    """Position i is hard where the reference does not expect x_(i+1); the question's inside has no label."""
    model = learner("llama", ORACLE, sure_of(7))
    batch = batch_of(model)
    known = model.depth.wanted(batch)
    ids, mask = batch.ids_BS, batch.mask_BS
    written = torch.zeros_like(ids).flatten().index_fill(0, batch.predict_at_U, 1).view(ids.shape).bool()
    assert (known[~written] == ONCE).all()
    for row in range(len(ids)):
        for at in torch.nonzero(written[row])[:, 0].tolist():
            after = next(c for c in range(at + 1, ids.shape[1]) if mask[row, c])
            assert known[row, at] == (1 if ids[row, after] == 7 else 2)
    assert set(known.flatten().tolist()) == {ONCE, 1, 2}


def test_a_perfect_reference_finds_nothing_hard_and_a_random_one_nearly_all():
    method = change(ORACLE, force_one=False)
    model = learner("llama", method, right)
    assert int((model.depth.wanted(batch_of(model)) > 1).sum()) == 0
    torch.manual_seed(0)
    noise = learner("llama", method, lambda batch: torch.randn(len(batch.targets_U), 15))
    known = noise.depth.wanted(batch_of(noise))
    assert (known > 1).sum() / (known > 0).sum() > 0.8


def test_the_reference_is_a_run_or_a_model_on_disk_and_not_the_trained_one(tmp_path: Path):
    reference = tiny_model(Cot(), "llama", seed=5, num_hidden_layers=2)
    folder = saved(reference, tmp_path / "run")
    plain = tmp_path / "plain"
    reference.backbone.lm.save_pretrained(plain)
    reference.tokenizer.save_pretrained(plain)
    looped = saved(tiny_model(Looped(max_loops=3), "llama", seed=5, num_hidden_layers=2), tmp_path / "looped")
    found = []
    for source in (folder, plain, looped):
        model = tiny_model(change(ORACLE, reference=str(source)), "llama", num_hidden_layers=2).train()
        batch = batch_of(model)
        found.append(model.depth.labels(batch).flatten()[batch.predict_at_U])
        names = [name for name, _ in model.named_parameters()]
        assert not any("reference" in name or "oracle" in name for name in names)
    wrong = torch.cat(reference.answer_logits(MIXED)).argmax(-1) != batch.targets_U
    assert torch.equal(found[0], 1 + wrong.long()) and torch.equal(found[0], found[1])
    three = torch.cat(LatentModel.from_pretrained(looped).answer_logits(MIXED)).argmax(-1) != batch.targets_U
    assert torch.equal(found[2], 1 + three.long()) and not torch.equal(found[2], found[0])


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path):
    from tests.methods.tools import base

    folder = saved(base("llama"), tmp_path / "run")
    model = tiny_model(change(ORACLE, reference=str(folder)), "llama").train()
    with pytest.raises(InputError, match="vocabulary of 18, this model one of 15: set reference to"):
        model.loss(MIXED)


@pytest.mark.parametrize("metric", ["ce", "entropy"])
@pytest.mark.parametrize(("max_loops", "share"), [(2, 0.25), (4, 0.3)])
def test_the_hardest_share_by_cross_entropy_or_entropy(metric, max_loops, share):
    torch.manual_seed(1)
    logits = 3 * torch.randn(200, 15)
    method = change(ORACLE, label_metric=metric, label_share=share, max_loops=max_loops)
    model = learner("llama", method, lambda batch: logits[: len(batch.targets_U)])
    batch = batch_of(model)
    depths, n = model.depth.oracle.depths(batch, model.backbone, max_loops), len(batch.targets_U)
    log_p = logits[:n].log_softmax(-1)
    hard = (
        -(log_p.exp() * log_p).sum(-1)
        if metric == "entropy"
        else cross_entropy(logits[:n], batch.targets_U, reduction="none")
    )
    for depth in range(1, max_loops):
        assert int((depths > depth).sum()) == n - round((1 - share * (max_loops - depth) / (max_loops - 1)) * n)
        assert hard[depths > depth].min() > hard[depths <= depth].max()  # the hardest go deepest


def test_hard_tokens_share_the_deeper_iterations_evenly_and_by_place_alone():
    model = learner("llama", change(ORACLE, max_loops=4, force_one=False), lambda batch: -right(batch))
    examples = chain_examples(64)
    batch = model.batch(model.rows(examples))
    depths = model.depth.oracle.depths(batch, model.backbone, 4)
    shares = torch.bincount(depths, minlength=5)[2:] / len(depths)
    assert depths.min() == 2 and (shares - 1 / 3).abs().max() < 0.1
    one = model.batch(model.rows(examples[5:6]))
    alone = model.depth.oracle.depths(one, model.backbone, 4)
    assert torch.equal(alone, depths.split(batch.n_targets)[5])


def test_labels_are_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, path = saved(tiny_model(Cot(), "llama", seed=5), tmp_path / "run"), tmp_path / "labels" / "of.jsonl"
    method = change(ORACLE, reference=str(folder), label_cache=str(path))
    model = tiny_model(method, "llama").train()
    fresh = tiny_model(change(method, label_cache=None), "llama").train()
    first = fresh.depth.wanted(batch_of(model))
    assert torch.equal(model.depth.wanted(batch_of(model, 3)), fresh.depth.wanted(batch_of(model, 3)))
    assert torch.equal(model.depth.wanted(batch_of(model)), first)
    assert len(path.read_text().splitlines()) == 1 + 6
    with path.open("a") as file:
        file.write('\n["cut short", [0.0, 1')
    again = tiny_model(method, "llama").train()
    monkeypatch.setattr(Oracle, "measure", lambda *_: pytest.fail("all rows are known"))
    assert torch.equal(again.depth.wanted(batch_of(again)), first)
    other = tiny_model(change(method, label_metric="ce"), "llama").train()
    with pytest.raises(InputError, match=r"of.jsonl holds labels of another reference or label_metric; remove it"):
        other.depth.wanted(batch_of(other))
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
    model = learner(arch, change(ORACLE, **settings), sure_of(7))
    batch = batch_of(model, 3)
    known = model.depth.wanted(batch)
    out = model(batch)
    total, n = torch.zeros(()), 0
    for row, (example, labels) in enumerate(zip(MIXED[:3], model.rows(MIXED[:3]))):
        ids = labels.ids()
        real = known[row][batch.mask_BS[row].bool()]
        depths = [max(d, 1) for d in real.tolist()]
        logits = slow_logits(model, ids, depths)
        at = [i - 1 for i, label in enumerate(labels.labels()) if label >= 0]
        targets = torch.tensor([ids[i + 1] for i in at])
        total, n = total + cross_entropy(logits[at].float(), targets, reduction="sum"), n + len(at)
        assert example.question
    assert_close(out.loss, total / n, 1e-5)
    assert out.terms["hard"] == (known > 1).sum() / n == out.terms["iterated"]
    ours, theirs = gradients(model, out.loss), gradients(model, total / n)
    for grads in (ours, theirs):  # a table gives the row of its padding no gradient; what is mixed has no padding
        grads[next(iter(grads))][model.spell.pad_id] = 0
    assert_same_gradients(ours, theirs, 1e-4)


@by_arch
def test_stage_1_trains_the_model_and_the_lora(arch):
    model = learner(arch, ORACLE, sure_of(7))
    grads = gradients(model, model.loss(MIXED).loss)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora" in name)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "layers" in name or ".h." in name)


def test_without_a_hard_token_the_lora_has_no_gradient_unless_one_is_forced():
    for force_one in (False, True):
        model = learner("llama", change(ORACLE, force_one=force_one), right)
        out = model.loss(MIXED)
        grads = gradients(model, out.loss)
        lora = [grad.abs().max().item() for name, grad in grads.items() if "lora" in name]
        assert (min(lora) > 0) if force_one else (max(lora) == 0)
        assert out.terms["hard"].item() == pytest.approx(force_one / len(batch_of(model).targets_U))
    model.eval()
    assert model.loss(MIXED).terms["iterated"] == 0  # the oracle labels training alone


def test_lora_dropout_is_of_training():
    model = learner("llama", change(ORACLE, lora_dropout=0.5), sure_of(7))
    assert model.loop.lora.dropout == 0.5
    assert model.loss(MIXED).loss != model.loss(MIXED).loss
    model.eval()
    assert model.loss(MIXED).loss == model.loss(MIXED).loss


@by_arch
def test_recomputing_activations_gives_the_same_gradients(arch):
    for method in (ORACLE, change(DECIDES, tau=0.3)):
        model = learner(arch, method, sure_of(7))
        plain = gradients(model, model.loss(MIXED).loss)
        model.activation_checkpointing_enable()
        assert_same_gradients(gradients(model, model.loss(MIXED).loss), plain, 1e-6)


def test_the_low_budget_variant_trains_the_lora_alone():
    model = learner("llama", ORACLE, sure_of(7))
    freeze(model.backbone, model.marker_ids())
    grads = gradients(model, model.loss(MIXED).loss)
    assert {name.split(".")[0] for name, grad in grads.items() if grad.abs().max() > 0} == {"loop"}


def test_micro_batches_add_up_to_the_batch():
    model = learner("llama", DECIDES, sure_of(7))
    whole = model(batch_of(model))
    counts = batch_of(model).counts()
    parts = [model(model.batch(model.rows(MIXED[i : i + 2])), counts).loss for i in (0, 2, 4)]
    assert_close(sum(parts), whole.loss, 1e-6)


# Stage 2


@by_arch
def test_stage_2_is_the_weighted_binary_cross_entropy_and_trains_the_decider_alone(arch):
    model = learner(arch, change(DECIDES, tau=0.4, pos_weight=3.0), sure_of(7))
    scores = []
    model.depth.chooser.decider.register_forward_hook(lambda module, args, out: scores.append(out))
    out = model.loss(MIXED)
    batch = batch_of(model)
    hard = (batch.targets_U != 7).float()
    at = batch.predict_at_U.argsort()  # the decider sees them in the order of the columns
    wanted = binary_cross_entropy_with_logits(scores[0], hard[at].to(scores[0]), pos_weight=torch.tensor(3.0))
    assert_close(out.loss.double(), wanted.double(), 1e-6)
    assert out.terms["hard"] == hard.mean()
    assert_close(out.terms["iterated"].double(), (scores[0].sigmoid() > 0.4).double().mean(), 1e-6)
    out.loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    decider = {name for name, _ in model.named_parameters() if "decider" in name}
    assert with_gradient == decider == {name for name, p in model.named_parameters() if p.requires_grad}


def test_where_there_may_be_three_readings_the_decider_learns_from_those_it_was_asked_about():
    model = learner("llama", change(DECIDES, max_loops=3, tau=0.5), lambda batch: -right(batch))
    scores = []
    model.depth.chooser.decider.register_forward_hook(lambda module, args, out: scores.append(out))
    out, batch = model.loss(MIXED), batch_of(model)
    depths = model.depth.oracle.depths(batch, model.backbone, 3)[batch.predict_at_U.argsort()]
    weight = torch.tensor(model.method.pos_weight)
    went = scores[0].sigmoid() > 0.5
    assert 0 < went.sum() < len(went) and len(scores[1]) == went.sum()
    total = binary_cross_entropy_with_logits(scores[0], (depths > 1).to(scores[0]), reduction="sum", pos_weight=weight)
    total += binary_cross_entropy_with_logits(
        scores[1], (depths[went] > 2).to(scores[1]), reduction="sum", pos_weight=weight
    )
    assert_close(out.loss.double(), total.double() / len(depths), 1e-5)


def test_a_decider_that_is_not_trained_has_no_gradient():
    model = learner("llama", Tah(tau=0.4, decider_width=8, decider_blocks=1, **TEXT))
    out = model.loss(MIXED)
    assert set(out.terms) == {"answer", "iterated"} and out.terms["iterated"] > 0
    grads = gradients(model, out.loss)
    assert all(grad.abs().max() == 0 for name, grad in grads.items() if "decider" in name)
    assert all(grad.abs().max() > 0 for name, grad in grads.items() if "lora" in name)


# Runs


METHOD = {"name": "tah", "lora_rank": 2, "reference": "{out}/stages/1", "label_cache": "{out}/labels.jsonl"}
DECIDER = {**METHOD, "decider_width": 8, "decider_blocks": 1, "trains": "decider", "tau": 0.5}
RAW = {
    "task": {"name": "chain", "n_ops": 2, "n_train": 16, "n_valid": 8, "n_test": 8},
    "backbone": {"scratch": {"type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}},
    "train": {"max_steps": 2, "batch_size": 4, "use_cpu": True, "logging_steps": 1},
    "stages": [{"method": {"name": "cot"}}, {"method": {**METHOD, "iterate": "oracle"}}, {"method": DECIDER}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, two steps each."""
    return run_recipe(parse_recipe({**RAW, "out": str(tmp_path_factory.mktemp("tah") / "run")}))


def test_a_recipe_runs_through_the_stages_and_the_result_answers(run: Path, tmp_path: Path):
    stages = [LatentModel.from_pretrained(run / "stages" / n) for n in ("1", "2")]
    last = LatentModel.from_pretrained(run)
    assert last.method.reference == str(run / "stages" / "1") and (run / "labels.jsonl").exists()
    for (name, ours), (_, theirs) in zip(last.backbone.named_parameters(), stages[1].backbone.named_parameters()):
        assert torch.equal(ours, theirs), name  # stage 2 leaves the model as it is
    assert any(not torch.equal(a, b) for a, b in zip(stages[0].backbone.parameters(), stages[1].backbone.parameters()))
    for key, up in stages[1].loop.lora.up.items():
        assert torch.equal(up, last.loop.lora.up[key]) and up.abs().max() > 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_decider", "loss_hard", "loss_iterated", "loss_answer"} <= set(logged[0])
    answers = last.generate(QUESTIONS, max_new_tokens=5)
    assert all(set(depth for _, depth in answer.depths) <= {1, 2} for answer in answers)
    copy = LatentModel.from_pretrained(saved(last, tmp_path / "copy"))
    for ours, theirs in zip(copy.answer_logits(MIXED), last.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)
    stricter = LatentModel.from_pretrained(
        run, replace(last.method, tau=1.0, trains="model", reference=None, label_cache=None)
    )
    plain = LatentModel(stricter.backbone, stricter.tokenizer, Cot())
    for ours, theirs in zip(stricter.answer_logits(MIXED), plain.answer_logits(MIXED)):
        assert torch.equal(ours, theirs)


def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(run: Path, tmp_path: Path):
    method = {**DECIDER, "reference": str(run / "stages" / "1")}

    def train(name: str, steps: int, resume: bool = False) -> LatentModel:
        raw = {**RAW, "backbone": {"model": str(run / "stages" / "2")}, "method": method, "out": str(tmp_path / name)}
        raw = {name: value for name, value in raw.items() if name != "stages"}
        raw["train"] = {**RAW["train"], "max_steps": steps, "save_steps": 2}
        return LatentModel.from_pretrained(run_recipe(parse_recipe(raw), resume) / f"checkpoint-{steps}")

    train("part", 2)
    (tmp_path / "part" / "finished").unlink()
    ours, theirs = train("part", 4, resume=True), train("whole", 4)
    for (name, one), (_, other) in zip(ours.depth.named_parameters(), theirs.depth.named_parameters()):
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
