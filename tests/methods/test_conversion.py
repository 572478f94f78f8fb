"""From a decoder to a mask predictor: the invariants of ar2diffusion.md, section 9, by their numbers."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop import Cot, Dream, InputError, LatentModel, Llada
from innerloop.measure.bound import bounds
from innerloop.methods.denoise.canvas import Canvas
from innerloop.methods.denoise.noise import ahead, cut
from innerloop.passes.noised import looks_ahead
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from tests.close import assert_close
from tests.fields import change
from tests.methods import reference_denoise as reference
from tests.methods.test_denoise_sampling import assert_equal
from tests.methods.tools import learn
from tests.models import ARCHS, SLIDING, chain_examples, moved, saved, tiny_model
from tests.test_trainer import make_trainer

G = 24
EXAMPLES = list(chain_examples(4))
QUESTIONS = [example.question for example in EXAMPLES]
SHIFTED = Llada(gen_length=G, shift=True)
TEXTS = [Example("3 + 4 =", (), " 2 2 * 2 = 4 4 - 3 = 1" + " 2" * n, str(n), {}) for n in range(3)]


def converted(arch, tmp_path, method=SHIFTED, **options):
    """A decoder from a folder, with the method put on it, and what it was."""
    decoder = tiny_model(Cot(), arch)
    decoder.backbone.lm.save_pretrained(tmp_path)
    decoder.tokenizer.save_pretrained(tmp_path)
    return LatentModel.from_pretrained(tmp_path, method, device="cpu", **options), decoder


def logits_of(model, rows, share=None):
    """Return the logits of laid-out rows' hidden tokens, by the pass of training."""
    batch = model.batch(rows)
    batch.ahead = None if share is None else (share, "s")
    with torch.no_grad():
        return model.written_logits(batch, model.think(batch)), batch


@pytest.mark.parametrize("arch", ARCHS)
def test_any_decoder_sees_what_comes_later_and_old_logits_stay(arch, tmp_path):
    """1, 4, 8: under a causal mask it scores as the decoder did, and the mask's row changes no logit."""
    model, decoder = converted(arch, tmp_path)
    model, decoder = model.double(), decoder.double()
    row = model.rows(EXAMPLES[:1])[0]
    ids = row.ids()
    ids = ids[: 5 if arch in SLIDING else None]  # windows are lifted, and these rows end before one would matter
    with torch.no_grad():
        own = decoder.backbone.lm(input_ids=torch.tensor([ids])).logits[0]
        mask = model.backbone.mask_of(torch.ones(1, len(ids), dtype=torch.long), len(ids), 0, own.dtype)
        seen = model.backbone.head(model.backbone(model.backbone.embed(torch.tensor([ids])), mask=mask))[0]
    n = min(own.shape[-1], len(decoder.tokenizer))
    assert_close(seen[:, :n], own[:, :n], 1e-6)
    whole = reference.logits_of(model, row.ids(), shift=True)
    other = reference.logits_of(model, [*row.ids()[:-1], row.ids()[-1] + 1], shift=True)
    assert not torch.allclose(whole[2], other[2])


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch not in SLIDING])
def test_annealing_begins_as_the_decoder_and_ends_with_all(arch, tmp_path):
    """4, 5: with nothing seen ahead, predictions of the pass of training are the decoder's, padded or not."""
    model = converted(arch, tmp_path)[0].double()
    rows = model.rows(EXAMPLES)
    causal, batch = logits_of(model, rows, 0.0)
    with torch.no_grad():
        for r, (row, part) in enumerate(zip(rows, causal.split(batch.n_targets))):
            ids = [i for i, m in zip(batch.ids_BS[r].tolist(), batch.mask_BS[r].tolist()) if m]
            own = decoder_logits(model, ids)
            assert_close(part, own[[k - 1 for k in row.noise.hidden]], 1e-6)
    full, _ = logits_of(model, rows)
    assert torch.equal(logits_of(model, rows, 1.0)[0], full)
    assert not torch.allclose(causal, full)


def decoder_logits(model, ids):
    """Return what the decoder itself says after each token."""
    return model.backbone.lm(input_ids=torch.tensor([ids])).logits[0]


def test_the_chance_to_look_ahead_rises_and_is_drawn_once_for_a_step():
    """5."""
    shares = [(ahead(10, f"0/{step}/0/0") or (1.0, ""))[0] for step in range(12)]
    assert shares == pytest.approx([min(1.0, (step + 1) / 10) for step in range(12)])
    assert ahead(10, "0/3/0/0") == ahead(10, "0/3/1/2") != ahead(10, "1/3/0/0")
    assert (ahead(0, "0/3/0/0"), ahead(10, ""), ahead(10, "seed")) == (None, None, None)
    ones = torch.ones(40, 40, dtype=torch.bool)
    assert torch.equal(looks_ahead(40, 0.0, "s"), ones.tril())
    assert torch.equal(looks_ahead(40, 1.0, "s"), ones)
    half = looks_ahead(40, 0.5, "s")
    assert half.tril().equal(ones.tril()) and torch.equal(half, looks_ahead(40, 0.5, "s"))
    assert half.triu(1).sum().item() / 780 == pytest.approx(0.5, abs=3 * math.sqrt(0.25 / 780))
    method = Dream(gen_length=G, anneal_steps=4)
    model = tiny_model(method)
    assert [r.noise.ahead for r in model.rows(EXAMPLES, seed="0/1/0/0")] == [(0.5, "0/1")] * 4
    assert model.rows(EXAMPLES)[0].noise.ahead is None


def test_a_trainer_anneals_and_answers_see_all(tmp_path):
    method = Llada(gen_length=G, shift=True, anneal_steps=3)
    model = tiny_model(method)
    seen, own = [], model.backbone.mask_of
    model.backbone.mask_of = lambda *a: seen.append(a[5] if len(a) > 5 else None) or own(*a)
    make_trainer(tmp_path, model, EXAMPLES, max_steps=4, batch_size=4).train()
    shares = [1.0 if one is None else one[0].float().triu(1).sum().item() / one[0].triu(1).numel() for one in seen]
    assert [one is None for one in seen] == [False, False, True, True]
    assert shares[0] < shares[1]
    seen.clear()
    model.generate(QUESTIONS[:1], loops=2)
    assert seen == [None] * 2


@pytest.mark.parametrize("arch", ARCHS)
def test_padding_changes_nothing(arch):
    """2: alone, padded on the left, among longer rows, without a mask."""
    model = tiny_model(change(SHIFTED), arch)
    rows = model.rows(EXAMPLES)
    whole, batch = logits_of(model, rows)
    for row, part in zip(rows, whole.split(batch.n_targets)):
        assert_close(logits_of(model, [row])[0], part, 1e-5)
        noisy = [model.method.mask_id(model.encoder) if k in row.noise.hidden else i for k, i in enumerate(row.ids())]
        assert_close(reference.logits_of(model, noisy, True)[list(row.noise.hidden)], part, 1e-5)


def test_a_saved_run_is_a_decoder_and_opens_again_with_its_habits(tmp_path):
    """3, and what was trained otherwise is refused."""
    model = moved(tiny_model(SHIFTED))
    run = saved(model, tmp_path / "run")
    loaded = LatentModel.from_pretrained(run, device="cpu")
    assert torch.equal(logits_of(loaded, loaded.rows(EXAMPLES))[0], logits_of(model, model.rows(EXAMPLES))[0])
    again = LatentModel.from_pretrained(run, Dream(gen_length=8), device="cpu")
    assert again.method.shift and again.method.name == "dream"
    told = r"run was trained with shift=True, and here it is False: set method.shift to True, or start from the decoder"
    for other in (Llada(gen_length=G), Dream(gen_length=G, shift=False)):
        with pytest.raises(InputError, match=told):
            LatentModel.from_pretrained(run, other, device="cpu")
    with pytest.raises(InputError, match=r"trained with mask_token=<\|mask\|>, and here it is <m>"):
        LatentModel.from_pretrained(run, change(SHIFTED, mask_token="<m>"), device="cpu")
    LatentModel.from_pretrained(run, Cot(), device="cpu")


def test_fresh_weights_lose_log_v_and_the_mask_is_never_said():
    """7, 8."""
    model = tiny_model(SHIFTED, initializer_range=0.02)
    losses = model.loss(EXAMPLES).measured["loss_masked"].item()
    assert losses == pytest.approx(math.log(len(model.tokenizer)), rel=0.1)
    mask = model.method.mask_id(model.encoder)
    with torch.no_grad():
        head = model.backbone.lm.get_output_embeddings().weight
        head[mask] = 100 * head.abs().max()
    assert all(mask not in one.ids for one in model.generate(QUESTIONS))


def test_weights_alike_and_the_norm_of_tokens_are_a_mean():
    """9: the mean over hidden tokens, times their share."""
    model = tiny_model(change(SHIFTED, noise={"weight": "uniform", "norm": "token"}))
    rows = model.rows(EXAMPLES, seed="s")
    out, n = model(model.batch(rows)), sum(len(row.noise.hidden) for row in rows)
    logits, batch = logits_of(model, rows)
    mean = cross_entropy(logits, batch.targets_U)
    assert_close(out.loss.detach(), mean * n / (4 * G), 1e-5)


def test_chunks_together_are_chunks_apart():
    """10."""
    model = tiny_model(change(SHIFTED, noise={"norm": "token"})).double()
    model.encoder = PromptEncoder(model.tokenizer, running_text=True)
    rows = model.rows(TEXTS, seed="s")
    whole = model.batch(rows)
    apart = [model(model.batch([row]), n_items=whole.counts()).loss for row in rows]
    assert_close(sum(apart), model(whole).loss, 1e-6)


def test_running_text_is_cut_for_a_share_of_the_batches(tmp_path):
    method = Llada(noise={"truncate": 0.3})
    model = tiny_model(method)
    model.encoder = PromptEncoder(model.tokenizer, running_text=True)
    full = [len(row) for row in model.rows(TEXTS)]
    shares = []
    for seed in range(400):
        rows = model.rows(TEXTS, seed=f"0/{seed}/0/0")
        shares += [len(rows[-1]) / full[-1]]
        assert all(row.ids() == whole.ids()[: len(row)] for row, whole in zip(rows, model.rows(TEXTS)))
        assert min(map(len, rows)) >= 2
    short = [share for share in shares if share < 1]
    assert len(short) / 400 == pytest.approx(0.3, abs=0.08)
    assert np.mean(short) == pytest.approx(0.5, abs=0.1)
    assert len(cut(model.rows(TEXTS)[0], 3)) == 3
    assert model(model.batch(model.rows(TEXTS, seed="0/1/0/0"))).loss.isfinite()
    with pytest.raises(InputError, match=r"truncate cuts running text, and these are questions with answers"):
        make_trainer(tmp_path, tiny_model(change(method, gen_length=G)), EXAMPLES)


# A canvas that starts from random tokens


RANDOM = change(SHIFTED, noise={"filler": "random"})


def test_hidden_tokens_are_read_as_random_ones():
    model = tiny_model(RANDOM)
    mask, n_words = model.method.mask_id(model.encoder), len(model.tokenizer)
    rows = [row for s in range(60) for row in model.rows(EXAMPLES, seed=str(s))]
    drawn = [i for row in rows for i in row.noise.fillers]
    assert set(drawn) == set(range(n_words)) - {mask}
    batch = model.batch(rows[:4])
    assert not (batch.ids_BS == mask).any()
    plain = tiny_model(SHIFTED).rows(EXAMPLES, seed="0")
    assert [row.noise.hidden for row in plain] == [row.noise.hidden for row in rows[:4]]
    assert (batch.targets_U == tiny_model(SHIFTED).batch(plain).targets_U).all()
    assert bounds(model, EXAMPLES[:1], n_draws=2)[0].nll > 0


@pytest.mark.parametrize("sampler", [{}, {"steps": 5}, {"steps": 6, "block_length": 4}])
def test_a_canvas_starts_from_random_tokens_as_the_plain_sampler_does(sampler):
    method = change(RANDOM, gen_length=12, sampler=sampler)
    assert_equal(tiny_model(method).double(), method, reference.llada, 0.0)
    canvases = [Canvas(method.sampler, 12, 3, 1, [0, i]) for i in (0, 0, 1)]
    for canvas in canvases:
        canvas.fill(40)
        assert 3 not in canvas.read_G and len(canvas.masks()) == (sampler.get("block_length") or 12)
    assert (canvases[0].read_G == canvases[1].read_G).all() and (canvases[0].read_G != canvases[2].read_G).any()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"soft": {"share": 0.5}}, r"with noise\.filler=random none is read: set soft\.share to 0"),
        ({"sampler": {"guidance": 1.0}}, r"with noise\.filler=random no mask is learned: set it to 0"),
    ],
)
def test_what_needs_a_mask_is_refused_without_one(changes, told):
    with pytest.raises(InputError, match=told):
        change(RANDOM, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"anneal_steps": 50}, {"noise": {"filler": "random"}}])
def test_a_converted_decoder_learns_eight_rows_and_says_them_in_one_pass(changes):
    """6."""
    eight = list(chain_examples(8))
    model = tiny_model(change(SHIFTED, **changes), "gpt2", num_hidden_layers=2, initializer_range=0.1)
    learn(model, eight, 500, seed="0/{}/0/0")
    for loops in (None, 1):
        found = [one.answer for one in model.generate([example.question for example in eight], loops=loops)]
        assert found == [example.answer for example in eight]
