"""Soft masks: the invariants of soft_masked.md, section 9, by their numbers, and the engine against a plain sampler."""

import math
from itertools import pairwise

import pytest
import torch

from innerloop import Dream, InputError, LatentModel, Llada
from innerloop.config.soft_masks import SoftSettings
from innerloop.config.typed import named
from innerloop.engine import canvases
from innerloop.measure.bound import bounds
from innerloop.methods import method_named
from innerloop.passes.soft_masks import Seen, SoftMask, mixed
from tests.close import assert_close
from tests.fields import change
from tests.methods import reference_denoise as reference
from tests.methods.test_denoise_sampling import BY_DREAM, BY_LLADA, DRAWN, QUESTIONS, G, assert_equal
from tests.models import ARCHS, WIDTH, chain_examples, moved, saved, tiny_backbone, tiny_model
from tests.test_trainer import make_trainer

LONG = 24
EXAMPLES = list(chain_examples(4))
ON = {"share": 1.0, "start": 0.9}
MASK, V = 3, 64
MIXES = ("lerp", "lerp_norm", "slerp")
by_method = pytest.mark.parametrize(
    "method", [Llada(gen_length=LONG, soft=ON), Dream(gen_length=LONG, soft=ON)], ids=["llada", "dream"]
)


def model_of(method, arch=None):
    """A model whose predictions are sure enough to open the gate; of GPT-2's shape where it is shifted, or Llama's."""
    model = tiny_model(method, arch or ("gpt2" if method.shift else "llama")).double()
    with torch.no_grad():
        model.backbone.lm.get_output_embeddings().weight.mul_(1.0 if method.shift else 4.0)
        if model.soft is not None:
            model.soft.raw_steepness.fill_(0.5)
    return model


def gate(**settings):
    return SoftMask(SoftSettings(share=0.8, **settings), MASK).double()


def logits(n=5, seed=0):
    return 4 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def closed(model):
    """Close the gate: w_s = 0."""
    with torch.no_grad():
        model.soft.raw_scale.fill_(-torch.inf)
    return model


@by_method
def test_a_closed_gate_is_hard_masks(method):
    """1: loss, gradient and answers of the hard method; the second pass gives what the first did."""
    soft, hard = closed(model_of(method)), model_of(change(method, **{"soft.share": 0.0}))
    assert hard.soft is None
    losses = [model.loss(EXAMPLES, seed="1").loss for model in (soft, hard)]
    assert torch.equal(*losses)
    own, others = ([p for p in m.backbone.parameters() if p.requires_grad] for m in (soft, hard))
    for a, b in zip(torch.autograd.grad(losses[0], own), torch.autograd.grad(losses[1], others)):
        assert torch.equal(a, b)
    for temperature in DRAWN.values():
        answers = [[one.ids for one in m.generate(QUESTIONS, temperature=temperature)] for m in (soft, hard)]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("mix", MIXES)
def test_a_weight_of_nothing_leaves_the_embedding_bit_for_bit(mix):
    """1."""
    own, fed = torch.randn(5, WIDTH), torch.randn(5, WIDTH)
    assert torch.equal(mixed(mix, own, torch.zeros(5), fed), own)
    assert torch.equal(mixed(mix, own, torch.zeros(5), 2 * own), own)
    half = mixed(mix, own, torch.full((5,), 0.5), fed)
    if mix != "lerp":
        assert_close(half.norm(dim=-1), own.norm(dim=-1), 1e-5)
    if mix == "slerp":  # on the arc, half of the angle away
        cosines = [torch.cosine_similarity(a, b) for a, b in ((own, half), (half, fed), (own, fed))]
        angles = [cosine.double().acos() for cosine in cosines]
        assert_close(angles[0] + angles[1], angles[2], 1e-3)
        assert_close(angles[0], angles[1], 1e-3)
    opposite = mixed(mix, own, torch.full((5,), 0.3), -own)
    assert opposite.isfinite().all()


@pytest.mark.parametrize("top_k", [1, 3, 40, None])
def test_shares_are_convex_and_the_mask_is_never_fed(top_k):
    """2."""
    soft = gate(top_k=top_k, start=0.6)
    seen = soft.look(logits() + 50 * torch.eye(V)[MASK])
    lam = soft.gate(seen.entropy_A)
    assert (lam >= 0).all() and (lam <= soft.scale).all()
    assert (seen.shares_AK >= 0).all()
    assert_close(seen.shares_AK.sum(-1), torch.ones(5), 1e-6)
    assert seen.shares_AK[seen.ids_AK == MASK].sum() == 0
    assert seen.ids_AK.shape == (5, top_k or V)


def test_the_surer_the_more_is_fed():
    """3: in closed form where all tokens are alike or one is certain; the entropy is that of all tokens."""
    soft = gate(start=0.6, top_k=2)
    flat, sure = torch.zeros(1, V), torch.full((1, V), -1e4).index_fill(1, torch.tensor([7]), 0.0)
    w_s, w_a, w_b = soft.scale, soft.steepness, soft.centre
    entropies = [soft.look(x).entropy_A for x in (flat, sure)]
    assert entropies[0].item() == pytest.approx(math.log(V - 1), rel=1e-5)
    assert_close(soft.gate(entropies[0]), (w_s * torch.sigmoid(w_a * (-math.log(V - 1) - w_b)))[None], 1e-5)
    assert_close(soft.gate(entropies[1]), (w_s * torch.sigmoid(-w_a * w_b))[None], 1e-5)
    lam = [soft.gate(soft.look(scale * logits(1)).entropy_A).item() for scale in (0.1, 0.5, 1.0, 3.0)]
    assert all(a < b for a, b in pairwise(lam))


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_sparse_and_dense_forms_agree(arch):
    """4: one token at weight 1 is its embedding, all tokens are p @ E; each as the model scales them."""
    backbone = tiny_backbone(arch).double()
    table, x = backbone.embed(torch.arange(V)), logits()
    x[:, MASK] = -torch.inf
    one, some, every, dense = (gate(top_k=k) for k in (1, 3, V - 1, None))
    own, full = table[[MASK] * 5], torch.ones(5, dtype=torch.double)
    assert_close(one.mixed(own, full, one.words(one.look(x), backbone)), table[x.argmax(-1)], 1e-6)
    p = x.softmax(-1)
    for soft in (every, dense):  # at temperature 1
        assert_close(soft.words(soft.look(x), backbone), p @ table, 1e-5)
    kept = torch.where(p >= p.topk(3).values[:, -1:], p, 0.0)
    assert_close(some.words(some.look(x), backbone), kept / kept.sum(-1, keepdim=True) @ table, 1e-5)


@pytest.mark.parametrize("entropy, share", [(0, 0.993), (0.5, 0.841), (0.75, 0.5), (1.0, 0.159), (1.5, 0.0067)])
def test_the_gate_begins_as_published(entropy, share):
    """5, and w_s where the recipe says, or at 1e-6."""
    soft = gate(start=0.3)
    lam = soft.gate(torch.tensor([entropy], dtype=torch.double))
    assert (lam / soft.scale).item() == pytest.approx(share, abs=1e-3)
    assert [gate(start=s).scale.item() for s in (0.0, 0.3)] == pytest.approx([1e-6, 0.3], rel=1e-4)


@by_method
def test_gradients_reach_the_gate_through_the_second_pass_alone(method):
    """6: and the embeddings of what is fed; nothing flows through the first pass."""
    model = model_of(method)
    numbers = list(model.soft.parameters())
    table = model.backbone.lm.get_input_embeddings().weight
    *own, words = torch.autograd.grad(model.loss(EXAMPLES).loss, [*numbers, table])
    assert all(gradient.abs() > 0 for gradient in own)
    batch = model.batch(model.rows(EXAMPLES))
    hard = model_of(change(method, **{"soft.share": 0.0})).batch(model.rows(EXAMPLES))
    fed, seen = set(), model.soft.look
    model.soft.look = lambda x: [s := seen(x), fed.update(s.ids_AK.flatten().tolist()), assert_no_graph(x)][0]
    model(batch)
    missing = fed - set(hard.ids_BS.flatten().tolist())
    assert missing and all(words[i].abs().sum() > 0 for i in missing)
    batch.soft_at_U = None
    out = model(batch).loss
    assert all(g is None for g in torch.autograd.grad(out, numbers, allow_unused=True))


def assert_no_graph(x):
    assert not x.requires_grad


@pytest.mark.parametrize("unroll", [1, 2, 3])
@by_method
def test_training_is_two_passes_of_the_card_or_more(method, unroll):
    """3: the loss is that of a last pass whose masks are mixed one by one from what the pass before it predicts."""
    method = change(method, **{"soft.unroll": unroll})
    model = model_of(method)
    rows = model.rows(EXAMPLES, seed="s")
    total, count = 0.0, 0.0
    for example, row in zip(EXAMPLES, rows):
        plain = reference.Plain(model, method, example.question)
        ids, n = row.ids(), len(plain.prompt)
        plain.x = [plain.mask if k in row.noise.hidden else i for k, i in enumerate(ids)][n:]
        for _ in range(unroll):
            plain.predict(torch.zeros(LONG))
        assert len(plain.x) == LONG
        noisy = plain.prompt + plain.x
        log_p = reference.logits_of(model, noisy, method.shift, plain.soft(noisy)).log_softmax(-1)
        total -= sum(w * log_p[k, ids[k]].item() for k, w in zip(row.noise.hidden, row.noise.weights))
        count += row.noise.n_counted
    assert model.loss(EXAMPLES, seed="s").loss.item() == pytest.approx(total / count, rel=1e-5)


def test_more_passes_before_the_last_change_the_loss_and_no_gradient_flows_through_them():
    method = Llada(gen_length=LONG, soft={**ON, "unroll": 2})
    model, states = model_of(method), []
    one = model_of(change(method, **{"soft.unroll": 1}))
    assert not torch.allclose(model.loss(EXAMPLES, seed="s").loss, one.loss(EXAMPLES, seed="s").loss, rtol=1e-6)
    own = model.backbone.forward
    model.backbone.forward = lambda *a, **k: [out := own(*a, **k), states.append(out.requires_grad)][0]
    own_mix, fed = model.soft.mixed, []
    model.soft.mixed = lambda *a: [out := own_mix(*a), fed.append(out.requires_grad)][0]
    model.loss(EXAMPLES).loss.backward()
    assert (states, fed) == ([False, False, True], [False, True])
    assert all(number.grad.abs() > 0 for number in model.soft.parameters())
    with pytest.raises(InputError, match=r"unroll is 0, but must be a whole number, at least 1"):
        change(method, **{"soft.unroll": 0})


def assert_soft_equal(method, by, temperature, arch=None):
    """The engine equals the plain sampler, and soft masks do say something else than hard ones."""
    model = model_of(method, arch)
    assert_equal(model, method, by, temperature)
    return [one.ids for one in model.generate(QUESTIONS, temperature=temperature, seed=7)]


@pytest.mark.parametrize("temperature", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("sampler", BY_LLADA.values(), ids=BY_LLADA)
def test_the_engine_equals_lladas_plain_sampler(sampler, temperature):
    assert_soft_equal(Llada(gen_length=G, sampler=sampler, soft=ON), reference.llada, temperature)


@pytest.mark.parametrize("sampler", BY_DREAM.values(), ids=BY_DREAM)
def test_the_engine_equals_dreams_plain_sampler(sampler):
    assert_soft_equal(Dream(gen_length=G, sampler=sampler, soft={**ON, "top_k": 1}), reference.dream, 0.7)


@pytest.mark.parametrize("remasked", ["raw", "drop", "carry"])
def test_what_is_masked_again_is_fed_as_the_setting_says(remasked):
    method = Llada(gen_length=G, soft={**ON, "remasked": remasked},
                   sampler={"commit": "remdm", "steps": 24, "remask": {"cap": 0.3}})  # fmt: skip
    assert_soft_equal(method, reference.remdm, 1.0)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_engine_equals_the_plain_sampler_on_every_architecture(arch):
    sampler = {"steps": 6, "block_length": 4}
    assert_soft_equal(Llada(gen_length=G, sampler=sampler, soft=ON), reference.llada, 0.0, arch)


def test_soft_masks_change_what_is_said():
    """And what they change depends on each setting; so the equalities above are not those of hard masks."""
    base = model_of(Llada(gen_length=G, soft=ON, sampler={"steps": 6}))
    hard = closed(model_of(base.method))
    settings = [{}, {"top_k": 1}, {"top_k": None}, {"mix": "slerp"}]
    found = []
    for one in settings:
        model = model_of(change(base.method, soft={**ON, **one}))
        found.append(torch.cat([p for p in model.answer_logits(EXAMPLES_OF_G)]))
    found.append(torch.cat(hard.answer_logits(EXAMPLES_OF_G)))
    assert all(not torch.allclose(a, b) for i, a in enumerate(found) for b in found[:i])
    texts = [[one.ids for one in m.generate(QUESTIONS)] for m in (base, hard)]
    assert texts[0] != texts[1]


EXAMPLES_OF_G = [type(e)(e.question, (), e.answer, e.id, {}) for e in EXAMPLES]


def test_logits_of_places_that_are_tokens_change_nothing(monkeypatch):
    """7."""
    method = Llada(gen_length=G, soft=ON, sampler={"steps": 6})
    model = model_of(method)
    expected = [one.ids for one in model.generate(QUESTIONS)]
    kept, own = [], canvases.SoftCanvases.keep

    def keep(self, live, before, watched, logits_AV):
        places = [(canvas, place) for canvas, one in zip(live, watched) for place in one]
        is_token = torch.tensor([canvas.tokens_G[place] != canvas.mask_id for canvas, place in places])
        kept.append(int(is_token.sum()))
        own(self, live, before, watched, torch.where(is_token[:, None], logits_AV.flip(-1), logits_AV))

    monkeypatch.setattr(canvases.SoftCanvases, "keep", keep)
    assert [one.ids for one in model.generate(QUESTIONS)] == expected
    assert sum(kept) > 0


@pytest.mark.parametrize("sampler", [{}, {"steps": 5}, {"steps": 6, "block_length": 4}, {"commit": "random"}])
def test_passes_are_as_many_and_the_first_is_the_same(sampler, monkeypatch):
    """8."""
    method, firsts = Llada(gen_length=G, sampler={**sampler, "eos": "never"}), []
    own = canvases.predict
    for one in (method, change(method, soft=ON)):
        seen = []
        monkeypatch.setattr(canvases, "predict", lambda *a, seen=seen: seen.append(own(*a)) or seen[-1])
        model = model_of(one)
        firsts.append((model.generate(QUESTIONS[:1])[0].cost.passes, len(seen)))
    assert firsts[0] == firsts[1]
    if "block_length" in sampler:
        return
    alike = [model_of(one).generate(QUESTIONS, loops=1) for one in (method, change(method, soft=ON))]
    assert [one.ids for one in alike[0]] == [one.ids for one in alike[1]]


def test_a_model_that_copies_what_it_reads_needs_one_more_pass():
    """9: fed the truth at weight 1, the nearest token to each input is the truth."""
    backbone, truth = tiny_backbone().double(), torch.arange(5, 10)
    soft = gate(top_k=1)
    with torch.no_grad():
        soft.raw_scale.fill_(torch.inf)
    table = backbone.embed(torch.arange(V))
    seen = soft.look(60 * torch.eye(V, dtype=torch.double)[truth])
    read = soft.mixed(table[[MASK] * 5], soft.gate(seen.entropy_A), soft.words(seen, backbone))
    assert torch.equal(torch.cdist(read, table).argmin(-1), truth)


@pytest.mark.parametrize("share, unroll, expected",
                         [(0.0, 1, 1.0), (0.5, 1, 1.5), (0.8, 1, 1.8), (1.0, 1, 2.0), (0.5, 2, 2.0)])  # fmt: skip
def test_steps_make_as_many_passes_as_the_share_says(share, unroll, expected):
    """10: decided by the step, so by the run's seed and the step's number alone, alike on all processes."""
    model = tiny_model(Llada(gen_length=LONG, soft={"share": share, "unroll": unroll}))
    rows = [[model.rows(EXAMPLES, seed=f"0/{step}/{process}/{i}") for process, i in ((0, 0), (1, 0), (0, 1))]
            for step in range(300)]  # fmt: skip
    n_passes = [{1 + unroll * one.noise.soft for batch in step for one in batch} for step in rows]
    assert all(len(n) == 1 for n in n_passes)
    mean = sum(n.pop() for n in n_passes) / 300
    assert mean == pytest.approx(expected, abs=3 * unroll * math.sqrt(share * (1 - share) / 300))
    passes, own = [], model.backbone.forward
    model.backbone.forward = lambda *a, **k: passes.append(1) or own(*a, **k)
    for step in range(6):
        model.loss(EXAMPLES, seed=f"0/{step}/0/0")
    assert len(passes) == sum(1 + unroll * batch[0][0].noise.soft for batch in rows[:6])


def test_no_share_is_ordinary_training_bit_for_bit():
    """10."""
    plain, none = Llada(gen_length=LONG), Llada(gen_length=LONG, soft={"share": 0.0})
    assert plain == none
    models = [tiny_model(plain), tiny_model(Llada(gen_length=LONG, soft={"share": 0.5}))]
    rows = [[r for r in m.rows(EXAMPLES, seed="0/1/0/0")] for m in models]
    assert [r.noise.hidden for r in rows[0]] == [r.noise.hidden for r in rows[1]]
    assert not any(r.noise.soft for r in rows[0])


@pytest.mark.parametrize("top_k, n", [(3, 3), (None, 4)])
def test_parameters_are_three_more_and_saved(top_k, n, tmp_path):
    """11."""
    method = Llada(gen_length=LONG, soft={**ON, "top_k": top_k})
    model = moved(tiny_model(method))
    hard = tiny_model(Llada(gen_length=LONG))
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in hard.parameters()) == n
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert loaded.method == method
    assert torch.equal(loaded.loss(EXAMPLES).loss, model.loss(EXAMPLES).loss)
    other = LatentModel.from_pretrained(tmp_path / "run", change(method, **{"soft.share": 0.0}), device="cpu")
    assert other.soft is None


@pytest.mark.parametrize("own_rate, rate", [(None, 1e-2), (3e-3, 3e-3)])
def test_the_gate_has_a_group_of_the_optimizer_of_its_own(own_rate, rate, tmp_path):
    model = tiny_model(Llada(gen_length=LONG, soft={"share": 1.0, "start": 0.0}))
    trainer = make_trainer(tmp_path, model, EXAMPLES, max_steps=2, weight_decay=0.1, parts_learning_rate=own_rate)
    before = model.soft.raw_scale.item()
    trainer.train()
    found = [g for g in trainer.optimizer.param_groups if any(p is model.soft.raw_scale for p in g["params"])]
    assert len(found) == 1 and {id(p) for p in found[0]["params"]} == {id(p) for p in model.soft.parameters()}
    assert (found[0]["weight_decay"], found[0]["eps"], found[0]["initial_lr"]) == (0.0, 1e-15, rate)
    others = [g for g in trainer.optimizer.param_groups if g is not found[0]]
    assert {g["initial_lr"] for g in others} == {trainer.args.learning_rate}
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == len(list(model.parameters()))
    assert abs(model.soft.raw_scale.item() - before) > rate  # nearly two whole steps, from w_s = 1e-6 on


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_an_optimizer_without_an_epsilon_trains_the_gate_too(optim, tmp_path):
    model = tiny_model(Llada(gen_length=LONG, soft={"share": 1.0}))
    trainer = make_trainer(tmp_path, model, EXAMPLES, max_steps=1, optim=optim)
    trainer.train()
    (found,) = (g for g in trainer.optimizer.param_groups if any(p is model.soft.raw_scale for p in g["params"]))
    assert found["initial_lr"] == 1e-2 and found.get("eps") != 1e-15
    assert torch.isfinite(model.soft.raw_scale)


@by_method
def test_a_loss_in_chunks_is_the_whole_and_a_bound_takes_two_passes(method):
    model = model_of(method)
    expected = model.loss(EXAMPLES).loss
    model.loss_chunk = 5
    assert_close(model.loss(EXAMPLES).loss, expected, 1e-6)
    hard = closed(model_of(method))
    found = [bounds(m, EXAMPLES[:1], n_draws=4)[0].nll for m in (model, hard)]
    assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_presets_are_the_papers():
    found = [named({"name": name, "preset": "soft_masked", "gen_length": 8}, "method", method_named).soft
             for name in ("llada", "dream")]  # fmt: skip
    assert [(one.share, one.top_k, one.mix, one.remasked) for one in found] == [
        (0.8, 3, "lerp", "raw"),
        (0.8, 1, "lerp", "raw"),
    ]
    with pytest.raises(InputError, match=r"soft\.share is 2, but must be a number between 0 and 1"):
        Llada(soft={"share": 2})


def test_what_is_seen_is_small():
    """What is kept of a place is k tokens, and never a distribution over all of them."""
    seen = gate().look(logits())
    assert isinstance(seen, Seen)
    assert {tuple(getattr(seen, name).shape) for name in vars(seen)} == {(5,), (5, 3)}
