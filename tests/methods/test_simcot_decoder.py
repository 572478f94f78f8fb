"""SIM-CoT's decoder: what is trained, the shuffled control, telling, saving, resuming, settings (simcot.md, 4 to 8)."""

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from innerloop import Coconut, Example, LatentModel, NoCot
from innerloop.errors import InputError
from innerloop.methods import SimCot, SimCotCodi
from innerloop.model.step_decoder import aux_loss, group_latents
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_arguments import training_arguments
from tests.fields import make
from tests.methods.tools import (
    MIXED,
    QUESTIONS,
    assert_close,
    by_arch,
    change,
    gradients,
    learn,
    on,
    stir,
)
from tests.models import chain_examples, moved, tiny_model
from tests.test_trainer import assert_goes_on_as_if_uninterrupted, logged, make_trainer

ON_COCONUT = SimCot(curriculum={"max_stage": 2}, latents_per_step=1)
ON_CODI = SimCotCodi(n_latents_total=3, teacher_weight=0.0)
WITHOUT_ANSWER = [Example(e.question, e.steps[:2], e.answer) for e in MIXED]
by_host = pytest.mark.parametrize("method", [ON_COCONUT, ON_CODI], ids=lambda method: method.name)


def fresh(method, arch="gpt2", **changes):
    """Return a model whose backbone no other test has."""
    return tiny_model(method, arch, num_hidden_layers=2, **changes).double()


def thinking(model, examples):
    """Return a batch and its thought, with all that the auxiliary loss looks at."""
    batch = model.batch(model.rows(examples))
    thought = model.think(batch)
    model.written_logits(batch, thought)
    return batch, thought


def told(model, batch, thought, **options):
    """Return the auxiliary term."""
    return aux_loss(model.loss_inputs(batch, thought), model.step_decoder, model.loop, **options)


def tell(model, examples):
    """Return what each group of the examples' latents tells, by row."""
    with torch.no_grad():
        batch, thought = thinking(model, examples)
        texts = [[] for _ in examples]
        for sites in batch.aux_targets:
            latents = group_latents(model.loss_inputs(batch, thought), model.loop, sites)
            ids = model.step_decoder.tell(latents, model.backbone, model.encoder.eos_id)
            for row, one in zip(sites.rows_G.tolist(), ids):
                texts[row].append(model.tokenizer.decode(one).strip())
    return texts


# What is trained


@by_arch
@by_host
@pytest.mark.parametrize("trains", ["both", "base", "decoder"])
def test_base_and_decoder_are_trained_as_asked(trains, method, arch):
    model = fresh(change(method, aux={"trains": trains}), arch)
    stir(model)
    grads = gradients(model, model.loss(WITHOUT_ANSWER).loss)
    moved_parts = {name.split(".")[0] for name, grad in grads.items() if grad.abs().max() > 0}
    expected = {"both": {"backbone", "step_decoder"}, "base": {"backbone"}, "decoder": {"step_decoder"}}[trains]
    assert moved_parts - {"loop"} == expected
    assert ("loop" in moved_parts) == (trains != "decoder" and method is ON_CODI)
    unused = {name for name, p in model.named_parameters() if p.requires_grad and grads[name].abs().max() == 0}
    assert not {name for name in unused if name.startswith("step_decoder")}  # what is not read is not trained


@by_arch
def test_the_decoder_has_a_head_of_its_own(arch):
    """Also where the head is tied to a table that is not read."""
    model = fresh(ON_COCONUT, arch)
    grads = gradients(model, model.loss(WITHOUT_ANSWER).loss)
    assert grads["step_decoder.own.lm." + ("transformer.wte.weight" if arch == "gpt2" else "lm_head.weight")].any()
    lm = model.step_decoder.own.lm
    assert lm.get_output_embeddings().weight is not model.backbone.lm.get_output_embeddings().weight


def test_a_light_decoder_has_the_first_layers():
    model = fresh(change(ON_COCONUT, aux={"layers": 1}))
    assert model.step_decoder.own.n_layers == 1 and model.backbone.n_layers == 2
    assert fresh(change(ON_COCONUT, aux={"layers": 9})).step_decoder.own.n_layers == 2
    assert model.step_decoder.own.lm.config.num_hidden_layers == 1 and model.backbone.config.num_hidden_layers == 2


@by_arch
def test_updates_of_a_shared_decoder_are_its_own(arch):
    """Low-rank updates change what is told, and neither the latents nor the answer; at zero they are as a copy."""
    shared = change(ON_COCONUT, aux={"lora_rank": 2})
    copied, fresh_, model = (on(arch, m, s) for m, s in ((ON_COCONUT, False), (shared, False), (shared, True)))
    other, same, one = (twin.loss(MIXED).terms for twin in (copied, fresh_, model))
    assert_close(same, other)
    assert one["answer"] == other["answer"] and abs(one["aux"] - other["aux"]) > 1e-3
    grads = gradients(model, model.loss(MIXED).loss)
    assert any("lora" in name and grad.abs().max() > 0 for name, grad in grads.items())


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> str:
    """The folder of a model of the same tokens, but of twice the width and another number of layers."""
    folder = tmp_path_factory.mktemp("another") / "run"
    wide = {"hidden_size": 64, "num_hidden_layers": 1}
    moved(tiny_model(NoCot(), "llama", 7, **wide)).save_pretrained(folder)
    return str(folder)


@by_arch
@by_host
def test_a_decoder_may_be_another_model_of_another_width(method, arch, another, tmp_path: Path):
    """Latents go through a linear map; the loss is that of the bare model, and trains the map and the latents."""
    model = fresh(change(method, aux={"source": another, "embed": "own", "norm": "token_mean"}), arch)
    stir(model)
    decoder, lm = model.step_decoder, model.step_decoder.own.lm
    bare = LatentModel.from_pretrained(another).backbone.lm
    assert decoder.widen.weight.shape == (64, 32) and decoder.own.n_layers == 1
    assert {name: p.shape for name, p in lm.named_parameters()} == {n: p.shape for n, p in bare.named_parameters()}
    batch, thought = thinking(model, MIXED[:1])
    totals = []
    for sites in batch.aux_targets:
        latents = group_latents(model.loss_inputs(batch, thought), model.loop, sites)
        for z_cD, ids, targets in zip(latents, sites.ids_GL, sites.targets_GL):
            ids = ids[: (targets >= 0).sum()]
            read = z_cD @ decoder.widen.weight.T + decoder.widen.bias
            x_LD = torch.cat([read, lm.get_input_embeddings()(ids[:-1])])
            logits = lm(inputs_embeds=x_LD[None], use_cache=False).logits[0, len(z_cD) - 1 :]
            totals.append(torch.nn.functional.cross_entropy(logits, ids).item())
    assert told(model, batch, thought).item() == pytest.approx(sum(totals) / len(totals), rel=1e-6)
    grads = gradients(model, told(model, batch, thought))
    assert grads["step_decoder.widen.weight"].any() and any(g.any() for n, g in grads.items() if n[:8] == "backbone")
    model.float().save_pretrained(tmp_path / "run")
    loaded = LatentModel.from_pretrained(tmp_path / "run")
    assert loaded.loss(MIXED).loss == model.loss(MIXED).loss


def test_a_decoder_begins_as_the_model_that_is_named_unless_its_tokens_are_others(another, tmp_path: Path):
    own = change(ON_COCONUT, aux={"embed": "own"})
    model = fresh(change(own, aux={"source": another}))
    bare = LatentModel.from_pretrained(another).backbone.lm
    assert all(torch.equal(p, q.double()) for p, q in zip(model.step_decoder.own.lm.parameters(), bare.parameters()))
    other = LatentModel.from_scratch({"type": "gpt2", "hidden_size": 32, "num_attention_heads": 2}, MIXED[:1], NoCot())
    other.save_pretrained(tmp_path / "other")
    for name, message in (("nothing", "there is no folder"), ("other", "choose one of its family")):
        with pytest.raises(InputError, match=message):
            fresh(change(own, aux={"source": str(tmp_path / name)}))


@pytest.mark.parametrize(("fields", "more"), [({}, 1), ({"aux.question": True, "aux.position": 3}, 3 + 9)])
def test_what_the_decoder_reads_must_fit_into_the_context(fields, more, tmp_path: Path):
    """A long step is told after the latents, and after the question where that is read too."""
    (example,) = [Example("3 ; + 4 ; * 2", (" ".join(["3 + 4 = 2"] * 4), "2 * 2 = 4"), "4")]
    method = change(ON_COCONUT, curriculum={"max_stage": 2, "first_stage": 3}, surplus="ignore", **fields)
    needs = more + method.latents_per_step + 4 * 5  # the step's tokens with its end, of which the last is not read
    for room, fits in ((needs, True), (needs - 1, False)):
        model = tiny_model(method, "gpt2", max_position_embeddings=room)
        assert len(model.rows([example])[0]) < room  # the row itself would fit
        if fits:
            assert model.loss([example]).loss.isfinite()
            continue
        with pytest.raises(InputError, match=f"has {needs} positions"):
            model.loss([example])
        with pytest.raises(InputError, match=f"takes {needs} positions"):
            LatentTrainer(model, training_arguments(tmp_path, {"max_steps": 1, "use_cpu": True}), [example])


def test_a_decoder_of_a_smaller_context_than_the_models_refuses_steps_that_are_too_long(another, tmp_path: Path):
    model = fresh(change(ON_COCONUT, aux={"source": another, "embed": "own"}))
    model.step_decoder.own.config.max_position_embeddings = 6
    with pytest.raises(InputError, match="needs 9 positions to tell a step but reads at most 6"):
        model.loss([Example("3 ; + 4", ("3 + 4 = 2 = 2",), "2")])
    with pytest.raises(InputError, match="needs 9 positions to tell a step"):
        make_trainer(tmp_path, model, [Example("3 ; + 4", ("3 + 4 = 2 = 2",), "2")])


# The control


@by_arch
def test_the_shuffled_control_takes_the_latents_of_another_row(arch):
    """The loss of shuffled latents is that of texts told from the same group's latents in a row beside theirs."""
    model = on(arch, change(ON_COCONUT, latents_per_step=2, aux={"norm": "token_mean"}))
    examples = [example for example in MIXED if len(example.steps) > 1]
    batch, thought = thinking(model, examples)
    (sites,) = batch.aux_targets
    is_target = sites.targets_GL >= 0
    place = {(r, k): i for i, (r, k) in enumerate(zip(sites.rows_G.tolist(), sites.first_G.tolist()))}

    def loss_when_shifted(by):
        latents = group_latents(model.loss_inputs(batch, thought), model.loop, sites)
        latents = latents[[place[(r + by) % len(examples), k] for r, k in place]]
        logits = model.step_decoder(latents, sites.ids_GL, model.backbone).log_softmax(-1)
        losses = -logits.gather(-1, sites.ids_GL[..., None])[..., 0] * is_target
        groups = [sites.first_G == first for first in (0, 2)]
        return sum((losses[g].sum() / is_target[g].sum()).item() for g in groups) / 2

    with torch.no_grad():
        shuffled = told(model, batch, thought, shuffled=True).item()
        assert shuffled in [pytest.approx(loss_when_shifted(by), rel=1e-5) for by in (1, -1)]
        assert abs(shuffled - loss_when_shifted(0)) > 1e-3


def test_rows_that_stand_alone_keep_their_latents_in_the_control():
    model = on("gpt2", ON_COCONUT)
    batch, thought = thinking(model, MIXED[:1])
    assert told(model, batch, thought, shuffled=True) == told(model, batch, thought)


# Telling


def test_latents_tell_their_steps_after_training_and_only_by_being_read():
    model = tiny_model(ON_COCONUT, "gpt2", num_hidden_layers=2, initializer_range=0.1)
    examples = list(chain_examples(8, 2))  # of two different steps
    learn(model, examples, 150)
    assert tell(model.eval(), examples) == [list(example.steps) for example in examples]
    with torch.no_grad():
        batch, thought = thinking(model, examples)
        true, shuffled = (told(model, batch, thought, shuffled=which).item() for which in (False, True))
    assert shuffled > 3 * true


@by_host
def test_telling_is_greedy_decoding(method):
    """Token for token the likeliest of the whole sequence read anew, up to the end or the limit."""
    model = on("gpt2", method)
    latents = torch.randn(5, 1, 32, dtype=torch.double)
    found = model.step_decoder.tell(latents, model.backbone, model.encoder.eos_id, max_tokens=6)
    for one, ids in zip(latents, found):
        expected: list[int] = []
        while len(expected) < 6:
            x_LD = torch.cat([one, model.backbone.embed(torch.tensor(expected, dtype=torch.long))])
            at = method.aux.position + torch.arange(len(x_LD))[None]
            token = model.step_decoder.own.lm(inputs_embeds=x_LD[None], position_ids=at).logits[0, -1].argmax().item()
            if token == model.encoder.eos_id:
                break
            expected.append(token)
        assert ids == expected


# On disk and in training


@by_arch
@pytest.mark.parametrize("aux", [{}, {"embed": "own"}, {"layers": 1}, {"lora_rank": 2}], ids=str)
def test_a_saved_decoder_is_the_same(aux, arch, tmp_path: Path):
    model = moved(tiny_model(change(ON_COCONUT, aux=aux), arch))
    model.save_pretrained(tmp_path / "run")
    loaded = LatentModel.from_pretrained(tmp_path / "run")
    state, found = model.state_dict(), loaded.state_dict()
    assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in state)
    assert model.loss(MIXED).loss == loaded.loss(MIXED).loss
    if aux == {} and arch == "gpt2":
        lm = loaded.step_decoder.own.lm
        assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight


def test_a_run_answers_without_its_decoder_and_one_that_joins_begins_as_a_copy_of_the_host(tmp_path: Path):
    model, plain = moved(tiny_model(ON_COCONUT, "gpt2")), Coconut(curriculum={"max_stage": 2}, latents_per_step=1)
    model.save_pretrained(tmp_path / "run")
    bare = LatentModel.from_pretrained(tmp_path / "run", change(ON_COCONUT, aux={"weight": 0.0}))
    host = LatentModel.from_pretrained(tmp_path / "run", plain)
    assert bare.step_decoder is None and host.step_decoder is None
    texts = [[g.text for g in one.generate(QUESTIONS, max_new_tokens=8)] for one in (model, bare, host)]
    assert texts[0] == texts[1] == texts[2]
    host.save_pretrained(tmp_path / "host")
    joined = LatentModel.from_pretrained(tmp_path / "host", ON_COCONUT)
    for one, other in zip(host.backbone.lm.parameters(), joined.step_decoder.own.lm.parameters()):
        assert torch.equal(one, other)


@by_arch
def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one(arch, tmp_path: Path):
    """The decoder and its optimizer state are in the checkpoints."""
    steps = {"max_stage": 1, "unit": "step", "length": 2}
    method = SimCot(curriculum=steps, latents_per_step=1, aux={"norm": "token_mean"})
    made = partial(tiny_model, method, arch)
    assert_goes_on_as_if_uninterrupted(tmp_path, made, terms=("loss", "loss_aux"), max_steps=6)


def test_sums_over_a_step_are_not_taken_for_divergence(tmp_path: Path):
    """per_row sums the tokens of a step: at the start it is far above what one token's guess costs."""
    make_trainer(tmp_path, tiny_model(change(ON_COCONUT, curriculum={"first_stage": 3})), max_steps=2).train()
    assert logged(tmp_path, "loss_aux")[0] > 15


def distance(model, examples):
    """Dist: the mean over pairs of an example's latents of how far they are apart."""
    with torch.no_grad():
        result = model.think(model.batch(model.rows(examples))).loop
    z = torch.cat([result.first, *[state for _, state in result.states]], dim=1)
    pairs = itertools.combinations(range(z.shape[1]), 2)
    return torch.stack([(z[:, i] - z[:, j]).norm(dim=-1) for i, j in pairs]).mean()


def test_close_latents_are_close():
    """The distance knows a collapse when it sees one."""
    model = on("gpt2", SimCot(latents_per_step=1))
    model.loop.rescale.forward = torch.ones_like
    assert_close(distance(model, MIXED), torch.tensor(0.0, dtype=torch.double))


@pytest.mark.slow
def test_10_latents_stay_further_apart_than_the_hosts():
    examples, found = chain_examples(8, 5), []
    for cls in (SimCot, Coconut):
        method = cls(curriculum={"max_stage": 6}, latents_per_step=1)
        model = tiny_model(method, num_hidden_layers=2, initializer_range=0.1)
        learn(model, examples, 50, 5e-3)
        found.append(distance(model, examples))
    assert found[0] > 1.5 * found[1]


# Settings


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (SimCot, {"latents_per_step": 0}, "latents_per_step is 0, but must be"),
        (SimCot, {"curriculum.max_stage": 0}, "max_stage >= 1"),
        (SimCot, {"surplus": "none"}, "must be one of answer, ignore, repeat_last"),
        (SimCotCodi, {"n_latents_total": 0}, "n_latents_total is 0, but must be"),
        (SimCot, {"soft_beta": -0.1}, "soft_beta is -0.1, but must be"),
        (SimCotCodi, {"soft_alpha": -0.1}, "soft_alpha is -0.1, but must be"),
        (SimCot, {"aux.weight": -1.0}, "weight is -1.0, but must be"),
        (SimCot, {"aux.position": -1}, "position is -1, but must be"),
        (SimCot, {"aux.weight": 0.0, "aux.trains": "decoder"}, "set aux.weight above 0"),
        (SimCot, {"aux.lora_rank": 2, "aux.layers": 1}, "set aux.lora_rank to 0"),
        (SimCot, {"aux.lora_rank": 2, "aux.trains": "base"}, "set aux.trains to both"),
        (SimCot, {"aux.lora_rank": 2, "aux.embed": "own"}, "set aux.embed to base"),
        (SimCot, {"aux.lora_rank": 2, "aux.detach": True}, "set aux.lora_rank to 0"),
        (SimCot, {"aux.source": "runs/other"}, "aux.embed to own"),
        (SimCot, {"aux.source": "runs/other", "aux.embed": "own", "aux.lora_rank": 2}, "set aux.lora_rank to 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(cls, fields, message):
    with pytest.raises(InputError, match=message) as refused:
        make(cls, **fields)
    assert "\n" not in str(refused.value)


def test_the_cards_defaults():
    on_coconut, on_codi = SimCot(), SimCotCodi()
    assert (on_coconut.surplus, on_coconut.aux.norm, on_coconut.aux.weight) == ("answer", "per_row", 1.0)
    assert (on_codi.surplus, on_codi.aux.norm, on_codi.aux.weight) == ("ignore", "token_mean", 1.0)
    assert (on_coconut.aux.embed, on_coconut.aux.position, on_coconut.aux.trains) == ("base", 1, "both")
