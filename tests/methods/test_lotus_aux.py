"""LOTUS-aux: blocks must tell their steps to an auxiliary decoder, which is left out when answering (lotus.md, 4)."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Lotus
from innerloop.model.step_decoder import group_latents, told_loss
from tests.methods.reference_lotus import LotusReference, shortened
from tests.methods.slowly import assert_terms_of_the_reference
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    ROUNDED,
    assert_close,
    assert_same_gradients,
    by_arch,
    change,
    choices,
    gradients,
    on,
    passes,
    same_weights,
    thought_of,
)
from tests.models import answers_of, moved, saved, tiny_model

HOST = Lotus(n_blocks=3, latents_per_block=4, step_weight=0.0)
AUX = change(HOST, aux_weight=0.5)
SHARED = {"aux_decoder": "shared", "aux_lora_rank": 2}
DECODERS = [
    {},
    {"aux_decoder": "shared"},
    SHARED,
    {"aux_layers": 1},
    {"aux_embed": "own", "aux_norm": "per_row", "aux_position": 3},
    {"step_weight": 0.5, "feedback_site": "pre_norm"},
    {"aux_question": True},
    {**SHARED, "aux_question": True, "aux_position": 2},
]
STAGES = [3, 0, 1, 2, 3, 1]

by_decoder = pytest.mark.parametrize("fields", DECODERS, ids=str)


def train(model, examples=MIXED):
    """One step of plain gradient descent."""
    model.loss(examples).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0.0


@by_decoder
@by_arch
def test_the_terms_of_a_mixed_batch_equal_the_reference(arch, fields):
    model = on(arch, change(AUX, **fields))
    assert_terms_of_the_reference(model, LotusReference(model), STAGES)


@choices(supervision=["post", "per_iter"], last_pass=["kv", "refeed"], feedback_site=["post_norm", "pre_norm"])
def test_what_is_told_comes_from_the_pass_of_h(settings):
    """post: h^(R); per_iter: block i from h^(i); after the final norm, whichever pass computes it."""
    model = on("gpt2", change(AUX, **settings))
    assert_close(model.loss(MIXED).terms["aux"], LotusReference(model).terms(list(MIXED))["aux"].detach())


@by_arch
def test_told_loss_is_the_mean_over_tokens_of_steps_told_one_by_one(arch):
    """g_phi is the bare copy; its prompt the block's latents, then the step's own tokens, nothing else."""
    model = on(arch, AUX)
    batch = model.batch(model.rows(MIXED))
    thought = model.think(batch)
    model.written_logits(batch, thought)
    (sites,) = batch.told
    decoder, losses = model.step_decoder.own.lm, []
    for latents, ids, targets in zip(
        group_latents(model.loss_inputs(batch, thought), model.loop, sites), sites.ids_GL, sites.targets_GL
    ):
        ids = ids[: (targets >= 0).sum()]
        prompt = torch.cat([latents, model.backbone.embed(ids[:-1])])
        logits = decoder(inputs_embeds=prompt[None], use_cache=False).logits[0, 3:]
        losses.append(cross_entropy(logits, ids, reduction="none"))
    told = told_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop)
    assert_close(told, torch.cat(losses).mean())
    assert len(losses) == sum(min(len(example.steps), 3) for example in MIXED)


def test_steps_of_one_row_do_not_depend_on_those_of_others():
    model = on("gpt2", AUX)
    total, n = 0.0, 0
    for example in MIXED:
        batch = model.batch(model.rows([example]))
        if batch.told:
            count = (batch.told[0].targets_GL >= 0).sum().item()
            total, n = total + model(batch).terms["aux"] * count, n + count
    assert_close(model.loss(MIXED).terms["aux"], total / n)
    assert "aux" not in model.loss([MIXED[1], MIXED[5]]).terms  # no steps: nothing to tell, and no division by zero


@by_decoder
@by_arch
def test_the_gradient_reaches_the_latents_of_every_block_that_has_a_step(arch, fields):
    model = on(arch, change(AUX, **{**fields, "step_weight": 0.0}))
    batch = model.batch(model.rows(MIXED[2:3] + MIXED[4:5]))  # one step and two
    thought = model.think(batch)
    model.written_logits(batch, thought)
    thought.answer = tuple(state.detach().requires_grad_() for state in thought.answer)
    told_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop).backward()
    reached = thought.answer[-1].grad[:, :12].abs().amax(2).unflatten(1, (3, 4)) > 0
    assert reached.all(2).tolist() == reached.any(2).tolist() == [[True, False, False], [True, True, False]]
    model.zero_grad()


@by_decoder
@by_arch
def test_answers_and_their_cost_are_the_hosts(arch, fields):
    model = on(arch, change(AUX, **fields))
    host = on(arch, change(HOST, **{name: value for name, value in fields.items() if not name.startswith("aux")}))
    for one, other in zip(model.answer_logits(MIXED), host.answer_logits(MIXED)):
        assert torch.equal(one, other)
    answers = [twin.generate(QUESTIONS, max_new_tokens=5) for twin in (model, host)]
    assert [one.text for one in answers[0]] == [one.text for one in answers[1]]
    assert [one.cost.passes for one in answers[0]] == [one.cost.passes for one in answers[1]]


@pytest.mark.parametrize("fields", [{}, {"aux_embed": "own"}, {"aux_layers": 1}, {"aux_norm": "per_row"}], ids=str)
@by_arch
def test_a_probe_leaves_the_gradients_of_the_host_as_they_are_bit_for_bit(arch, fields):
    host = on(arch, HOST)
    probe = same_weights(host, change(AUX, aux_detach=True, **fields))
    alone, beside = gradients(host, host.loss(MIXED).loss), gradients(probe, probe.loss(MIXED).loss)
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    assert any(grad.abs().max() > 0 for name, grad in beside.items() if name.startswith("step_decoder"))


def test_without_weight_there_is_no_decoder_and_no_draw_is_made():
    torch.manual_seed(3)
    on("gpt2", HOST, stirred=False)
    assert on("gpt2", HOST).step_decoder is None
    after_host = torch.rand(1)
    torch.manual_seed(3)
    on("gpt2", AUX, stirred=False)
    assert torch.equal(after_host, torch.rand(1))  # copying draws nothing either


@pytest.mark.parametrize("n_layers", [1, 2, 9])
@by_arch
@torch.no_grad()
def test_a_copy_begins_as_the_first_layers_of_the_model(arch, n_layers):
    model = on(arch, change(AUX, aux_layers=n_layers), stirred=False)
    x = torch.randn(2, 7, model.backbone.width, dtype=torch.float64)
    expected = shortened(model.backbone.lm, min(n_layers, 2))(inputs_embeds=x).logits
    assert_close(model.step_decoder.own.head(model.step_decoder.own(x)), expected, ROUNDED)
    assert len(model.step_decoder.own.layers) == min(n_layers, 2) and len(model.backbone.layers) == 2


@by_arch
def test_lora_of_a_shared_decoder_is_used_by_it_alone(arch):
    plain = on(arch, change(AUX, aux_decoder="shared"))
    model = on(arch, change(AUX, **SHARED))
    assert abs(model.loss(MIXED).terms["aux"] - plain.loss(MIXED).terms["aux"]) > 1e-4
    with passes(model):
        assert model.step_decoder.lora.entry is None
    with torch.no_grad():
        for up in model.step_decoder.lora.up.values():
            up.zero_()
    assert_close(model.loss(MIXED).terms["aux"], plain.loss(MIXED).terms["aux"])


@by_arch
def test_lora_of_a_shared_decoder_and_of_the_loop_live_side_by_side(arch):
    fields = {"lora": "per_iter", "lora_rank": 2}
    host, model = on(arch, change(HOST, **fields)), on(arch, change(AUX, **fields, **SHARED))
    model.loop.load_state_dict(host.loop.state_dict())
    for one, other in zip(host.answer_logits(MIXED), model.answer_logits(MIXED)):
        assert torch.equal(one, other)
    told = LotusReference(plain := same_weights(model, change(AUX, **SHARED)))
    assert plain.loss(MIXED).terms["aux"] != model.loss(MIXED).terms["aux"]  # the latents are others
    assert_close(plain.loss(MIXED).terms["aux"], told.terms(list(MIXED))["aux"].detach())


@pytest.mark.parametrize("trains", ["both", "base", "decoder"])
@by_arch
def test_what_is_trained(arch, trains):
    model = tiny_model(change(AUX, aux_trains=trains), arch, num_hidden_layers=2).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    of_decoder = {name for name in before if name.startswith("step_decoder")}
    assert bool(changed & of_decoder) == (trains != "base")
    assert bool(changed - of_decoder) == (trains != "decoder")


@by_arch
def test_all_of_a_copy_that_is_read_trains_its_head_too(arch):
    """With the model's embeddings the copy's own table is read by nobody, unless its head is the same (GPT-2)."""
    model = tiny_model(AUX, arch, num_hidden_layers=2)
    grads = gradients(model, model.loss(MIXED).loss)
    frozen = {name for name, p in model.step_decoder.own.lm.named_parameters() if not p.requires_grad}
    assert frozen == (set() if arch == "gpt2" else {"model.embed_tokens.weight"})
    head = "transformer.wte" if arch == "gpt2" else "lm_head"
    assert grads[f"step_decoder.own.lm.{head}.weight"].abs().max() > 0


@pytest.mark.parametrize("fields", [{}, SHARED, {"aux_layers": 1, "aux_embed": "own"}], ids=str)
@by_arch
def test_a_saved_model_gives_the_same_answers_and_tells_the_same(tmp_path, arch, fields):
    model = moved(tiny_model(change(AUX, **fields), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), device="cpu")
    assert torch.equal(answers_of(loaded), answers_of(model))
    assert loaded.loss(MIXED).terms == model.loss(MIXED).terms
    without = LatentModel.from_pretrained(tmp_path / "run", method=HOST, device="cpu")
    assert without.step_decoder is None and torch.equal(answers_of(without), answers_of(model))


def test_shuffled_latents_are_those_of_the_same_block_of_another_row():
    """simcot.md, section 8: a decoder that ignores the latents would not notice."""
    model = on("gpt2", AUX)
    examples = [MIXED[0], MIXED[3]]
    batch = model.batch(model.rows(examples))
    thought = thought_of(model, examples)
    with torch.no_grad():
        model.written_logits(batch, thought)
        own, shuffled = (
            told_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop, shuffled)
            for shuffled in (False, True)
        )
        thought.answer = (thought.answer[-1].flip(0),)
        assert_close(shuffled, told_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop))
    assert abs(shuffled - own) > 1e-3


@torch.no_grad()
def test_latents_tell_their_steps_greedily():
    model = on("gpt2", AUX)
    batch = model.batch(model.rows(MIXED))
    thought = thought_of(model, MIXED)
    model.written_logits(batch, thought)
    latents, decoder = group_latents(model.loss_inputs(batch, thought), model.loop, batch.told[0]), model.step_decoder
    eos = model.tokenizer.eos_token_id
    for one, ids in zip(latents, decoder.tell(latents, model.backbone, eos, max_tokens=5)):
        written = []
        while len(written) < 5 and eos not in written:
            prompt = torch.cat([one, model.backbone.embed(torch.tensor(written, dtype=torch.long))])
            written.append(decoder.own.lm(inputs_embeds=prompt[None]).logits[0, -1].argmax().item())
        assert ids == [token for token in written if token != eos]


def test_gradients_do_not_change_when_passes_are_checkpointed():
    model = on("llama", change(AUX, **SHARED, step_weight=0.5, lora="per_iter", lora_rank=2)).train()
    kept = gradients(model, model.loss(MIXED).loss)
    model.checkpoint_passes = True
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), kept)
    assert copy.deepcopy(model).loss(MIXED).terms == model.loss(MIXED).terms
