"""Answers that the model does not write itself: by a decoder of its own, or by a classifier (slr.md, section 3)."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu

from innerloop import Example, InputError, LatentModel, Slr
from innerloop.config.losses import DecoderSettings
from innerloop.engine import batching, decoding
from innerloop.model.answer_decoder import AnswerDecoder
from innerloop.text.row import Kind, Span
from tests.methods.reference import Reference
from tests.methods.tools import (
    FULL,
    MIXED,
    QUESTIONS,
    ROUNDED,
    SCOPES,
    SMALL,
    assert_close,
    by_arch,
    by_scope,
    change,
    gradients,
    lean_towards_end,
    learn,
    logits_of,
    on,
    passes,
    rows_at,
    same_weights,
    sharp_model,
    thought_of,
)
from tests.models import tiny_model

APART = change(SMALL, max_loops=2, decoder={"kind": "separate"})
CLASSES = ("0", "1", "2", "3", "yes")
CHOOSING = change(SMALL, max_loops=2, decoder={"kind": "linear", "classes": CLASSES})

by_reads = pytest.mark.parametrize("reads", ["state", "state_and_prompt"])
by_table = pytest.mark.parametrize("table", ["shared", "own"])


def taught(method: Slr) -> LatentModel:
    """Make a model that has begun to repeat questions, so that what it writes differs in words and in length."""
    model = tiny_model(method, num_hidden_layers=2, initializer_range=0.1)
    learn(model, [Example(question, (), question) for question in QUESTIONS], n_steps=40)
    return model.double().eval()


# A decoder of its own


def layer_by_hand(layer: torch.nn.Module, x_SD: Tensor, memory_MD: Tensor) -> Tensor:
    """A decoder layer on one row: self-attention, cross-attention, MLP, each on what a norm makes of its input."""
    later = torch.ones(len(x_SD), len(x_SD)).triu(1).bool()
    normed = layer.norm1(x_SD)
    x_SD = x_SD + layer.self_attn(normed, normed, normed, attn_mask=later)[0]
    x_SD = x_SD + layer.multihead_attn(layer.norm2(x_SD), memory_MD, memory_MD)[0]
    return x_SD + layer.linear2(gelu(layer.linear1(layer.norm3(x_SD))))


def by_hand(model: LatentModel, example: Example) -> Tensor:
    """The logits (U, V) of one row without padding: every word sees those before it, z_T and maybe the prompt."""
    slow, decoder, width = Reference(model), model.decoder, model.backbone.width
    state_ND = thought_of(model, [example]).loop.state[0]
    prompt = [*slow.question(example.question), *slow.marker("<bot>")]
    prompt = {"all": [], "last": prompt[:-1]}.get(model.method.loop_scope, prompt)
    read = [slow.read(slow.embed(prompt))[0]] if model.method.decoder.reads == "state_and_prompt" and prompt else []
    memory_MD = decoder.memory_norm(torch.cat([state_ND, *read]))

    ids = [*slow.marker("<eot>"), *slow.written(example, 0)]
    x_SD = slow.embed(ids) if decoder.table is None else decoder.table(torch.tensor(ids))
    x_SD = (x_SD - x_SD.mean(-1, keepdim=True)) / (x_SD.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    times = [[s / 10000 ** (2 * i / width) for i in range(width // 2)] for s in range(len(ids))]
    sines = [[*map(math.sin, row), *map(math.cos, row)] for row in times]
    x_SD = x_SD + torch.tensor(sines, dtype=x_SD.dtype)
    for layer in decoder.layers.layers:
        x_SD = layer_by_hand(layer, x_SD, memory_MD)
    states = decoder.layers.norm(x_SD)
    return (model.backbone.lm.get_output_embeddings() if decoder.head is None else decoder.head)(states)[:-1]


@by_scope
@by_arch
@by_reads
@by_table
def test_a_padded_batch_has_the_logits_of_rows_by_hand(scope, arch, reads, table):
    decoder = {"kind": "separate", "reads": reads, "table": table}
    model = on(arch, change(FULL, loop_scope=scope, loop={"time": "lookup"}, decoder=decoder))
    with torch.no_grad():
        for example, logits in zip(MIXED, model.answer_logits(MIXED)):
            assert_close(logits, by_hand(model, example), ROUNDED)


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder": {"kind": "lm_head"}},
        {"decoder": {"layers": 1}},
        {"decoder": {"reads": "state_and_prompt"}},
        {"decoder": {"table": "own"}},
        {"max_loops": 1},
        {"n_slots": 2},
    ],
    ids=str,
)
def test_every_field_of_the_decoder_changes_the_answer(fields):
    model = sharp_model(change(APART, loop={"time": "none"}))
    other = same_weights(model, change(model.method, **fields))
    assert (model.answer_logits(MIXED[:1])[0] - other.answer_logits(MIXED[:1])[0]).abs().max() > 1e-3
    n_layers = 0 if other.decoder is None else len(other.decoder.layers.layers)
    assert n_layers == {"lm_head": 0}.get(other.method.decoder.kind, other.method.decoder.layers)


@by_reads
@by_table
def test_generated_tokens_are_the_likeliest_when_the_answer_is_read_whole(reads, table, monkeypatch):
    model = taught(change(APART, decoder={"reads": reads, "table": table}))
    choose, chosen = decoding.choose, []

    def note(logits, *rest):
        chosen.append(choose(logits, *rest))
        return chosen[-1]

    together = model.generate(QUESTIONS, max_new_tokens=12)
    monkeypatch.setattr(decoding, "choose", note)
    monkeypatch.setattr(batching, "CHECK_EVERY", 1)
    rows = model.prompts(QUESTIONS)
    for row, question, one in zip(rows, QUESTIONS, together):
        chosen.clear()
        (alone,) = model.generate([question], max_new_tokens=12)
        row.suffix.append(Span(tuple(ids.item() for ids in chosen), Kind.ANSWER, supervised=True))
        assert one.text == alone.text == model.tokenizer.decode(row.suffix[-1].ids, skip_special_tokens=True)
        assert one.ended == alone.ended == (row.suffix[-1].ids[-1] == model.tokenizer.eos_token_id)
    assert len({len(row.suffix[-1].ids) for row in rows}) > 1  # rows end at different times
    assert len({row.suffix[-1].ids for row in rows}) > 2
    for row, logits in zip(rows, logits_of(model, rows)):
        logits[:, model.suppressed_ids()] = -torch.inf
        assert logits.argmax(-1).tolist() == list(row.suffix[-1].ids)


@pytest.mark.parametrize("check_every", [1, 3])
def test_rows_that_end_leave_the_batch_and_the_others_go_on_unchanged(check_every, monkeypatch):
    model = taught(change(APART, decoder={"reads": "state_and_prompt"}))
    found = []
    for every in (1000, check_every):
        monkeypatch.setattr(batching, "CHECK_EVERY", every)
        found.append([(g.text, g.ended, g.cost.flops) for g in model.generate(QUESTIONS, max_new_tokens=12)])
    assert found[0] == found[1] and len({text for text, _, _ in found[0]}) > 1


def test_writing_takes_no_pass_of_the_model():
    model = lean_towards_end(sharp_model(APART), -100.0)
    with passes(model) as seen:
        (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=6)
    assert len(seen) == generation.cost.passes == 1 + 2  # the prompt and two iterations


@pytest.mark.parametrize(
    ("decoder", "flows_past"),
    [
        ({"kind": "separate", "table": "own"}, False),
        ({"kind": "separate", "table": "own", "reads": "state_and_prompt"}, True),
        ({"kind": "linear", "classes": CLASSES}, False),
    ],
    ids=str,
)
def test_the_backbone_learns_through_what_the_decoder_attends_to(decoder, flows_past):
    """With tables of its own a decoder touches the model nowhere else; bptt = 0 cuts the state off."""
    model = sharp_model(change(SMALL, max_loops=2, decoder=decoder)).train()
    grads = gradients(model, model.loss(MIXED).loss)
    layers = [name for name in grads if ".h." in name and name.endswith("weight")]
    assert len(layers) == 3 * 6
    assert all(grads[name].abs().max() > 0 for name in [*layers, "backbone.lm.transformer.wte.weight"])
    cut = same_weights(model, change(model.method, loop={"bptt": 0})).train()
    learning = {name for name, grad in gradients(cut, cut.loss(MIXED).loss).items() if grad.any()}
    own = {name for name in grads if name.startswith("decoder.")}
    assert own < learning and any(name in learning for name in layers) if flows_past else own == learning


def test_deep_supervision_reads_the_decoder_after_every_iteration():
    model, expected = on("llama", change(APART, deep={"weight": 1.0})).train(), 0.0
    for t, weight in ((1, 1 / 3), (2, 2 / 3)):
        rows = model.rows(MIXED)
        for row in rows:
            row.n_loops = t
        logits, targets = torch.cat(logits_of(model, rows)), [i for row in rows for i in row.suffix[-1].ids]
        expected += weight * cross_entropy(logits.float(), torch.tensor(targets)).item()
    assert model.loss(MIXED).terms["deep"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_at_stages_with_and_without_iterations_are_decoded_from_their_own_state(scope):
    curriculum = {"curriculum": {"max_stage": 2}, "loops_per_stage": 1}
    model = on("gpt2", change(FULL, loop_scope=scope, decoder={"kind": "separate"}, **curriculum))
    stages = [2, 0, 1, 3, 0, 1]
    rows = rows_at(model, MIXED, stages)
    assert [row.n_loops for row in rows] == [2, 0, 1, 3, 0, 1]
    for row, together in zip(rows, logits_of(model, rows)):
        assert_close(together, logits_of(model, [row])[0], ROUNDED)
    assert model.loss(MIXED, stage=0).loss.isfinite()  # no row iterates
    assert len(model.generate(QUESTIONS, max_new_tokens=2, stage=0)) == len(QUESTIONS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@by_table
def test_a_decoder_in_fp32_serves_a_backbone_in_half_precision(dtype, table):
    half = tiny_model(Slr(), "llama", num_hidden_layers=2)
    half.backbone.lm.to(dtype)
    model = LatentModel(half.backbone, half.tokenizer, change(APART, decoder={"table": table, "reads": "state"}))
    assert model.decoder.memory_norm.weight.dtype == torch.float32
    assert model.answer_logits(MIXED)[0].isfinite().all()
    assert len(model.generate(QUESTIONS[:2], max_new_tokens=2)) == 2
    model.loss(MIXED).loss.backward()
    assert model.backbone.layers[0].self_attn.q_proj.weight.grad.isfinite().all()


# A classifier


@by_scope
@by_arch
def test_a_classifier_reads_the_mean_of_the_final_state_in_a_padded_batch(scope, arch):
    model = on(arch, change(FULL, loop_scope=scope, decoder={"kind": "linear", "classes": CLASSES}))
    linear, norm = model.decoder.linear, model.decoder.norm
    for example, logits in zip(MIXED, model.answer_logits(MIXED)):
        mean = norm(thought_of(model, [example]).loop.state[0].mean(0))
        assert_close(logits, (linear.weight @ mean + linear.bias)[None], ROUNDED)


def test_the_loss_of_a_classifier_is_the_cross_entropy_of_its_logits_over_the_global_batch():
    model = sharp_model(CHOOSING)
    logits = torch.cat(model.answer_logits(MIXED)).float()
    gold = torch.tensor([CLASSES.index(example.answer) for example in MIXED])
    out, parts = model.loss(MIXED), [model.batch(model.rows(part)) for part in (MIXED[:2], MIXED[2:])]
    assert out.loss.item() == pytest.approx(cross_entropy(logits, gold).item(), rel=1e-5)
    assert out.terms["answer"].item() == pytest.approx(out.loss.item(), abs=1e-9)
    for row, prompt, label in zip(model.rows(MIXED), model.prompts(QUESTIONS), gold.tolist(), strict=True):
        assert row.ids() == prompt.ids() and row.answer_class == label  # nothing is written after the thought
        assert not any(span.supervised for span in row.spans)
    counts = {"rows": len(MIXED), "answer": 0, "step": 0, "hid": 0}
    assert sum(model(part, n_items=counts).loss.item() for part in parts) == pytest.approx(out.loss.item(), rel=1e-5)
    shown = sharp_model(change(CHOOSING, step_weight=0.5)).loss(MIXED)
    assert shown.loss.item() == pytest.approx((shown.terms["answer"] + 0.5 * shown.terms["step"]).item(), rel=1e-5)


@by_scope
def test_a_classifier_answers_with_the_class_of_the_largest_logit_and_takes_no_pass_for_it(scope):
    model = on("gpt2", change(FULL, loop_scope=scope, decoder={"kind": "linear", "classes": CLASSES}))
    with torch.no_grad():  # so that rows differ in what they answer
        model.decoder.linear.bias -= torch.cat(model.answer_logits(MIXED)).mean(0)
    best = [CLASSES[logits.argmax()] for logits in model.answer_logits(MIXED)]
    assert len(set(best)) > 1
    together = model.generate(QUESTIONS, trace=True)
    for question, answer, one in zip(QUESTIONS, best, together):
        with passes(model) as seen:
            (alone,) = model.generate([question], trace=True)
        assert one.answer == alone.answer == answer
        assert one.text == alone.text == f"### {answer}"
        assert one.ended and [entry.loop for entry in one.trace.iterations] == [1, 2, 3]
        assert one.cost.passes == alone.cost.passes == len(seen) == 3 + (scope != "all")
        assert one.cost.positions == alone.cost.positions == sum(embeds.shape[1] for embeds in seen)


def test_an_answer_that_is_no_class_is_refused_in_one_sentence():
    model = sharp_model(CHOOSING)
    strange = Example("2 ; + 2", (), "4", id="row 7")
    with pytest.raises(InputError) as caught:
        model.loss([*MIXED, strange])
    assert str(caught.value) == (
        "example 'row 7' has the answer '4', which is none of the classes 0, 1, 2, 3, yes; list it in decoder.classes"
    )


@pytest.mark.parametrize(
    "decoder",
    [
        {"kind": "separate"},
        {"kind": "separate", "reads": "state_and_prompt"},
        {"kind": "linear", "classes": ("0", "1", "2", "3", "4")},
    ],
    ids=str,
)
def test_a_decoder_learns_eight_examples(decoder, examples):
    method, chooses = change(SMALL, max_loops=2, decoder=decoder), decoder["kind"] == "linear"
    model = tiny_model(method, num_hidden_layers=2, initializer_range=0.1).train()
    before = model.loss(examples).loss.item()
    assert learn(model, examples, 60 if chooses else 50, 3e-2 if chooses else 5e-3) < 0.1 * before
    if chooses:
        found = model.generate([example.question for example in examples])
        assert [one.answer for one in found] == [example.answer for example in examples]


# Settings


def test_the_model_itself_answers_unless_told_otherwise():
    assert Slr().decoder == DecoderSettings() == DecoderSettings(kind="lm_head", layers=2, classes=())
    plain, apart = tiny_model(SMALL), tiny_model(APART)
    assert plain.decoder is None and plain.trained_modules().keys() == {"loop"}
    assert isinstance(apart.decoder, AnswerDecoder) and apart.trained_modules().keys() == {"loop", "decoder"}


TWO = ("a", "b")
LISTED, MANY = "list the answers there are", "two different answers or more"
APARTS = ({"kind": "separate"}, {"kind": "linear", "classes": TWO})


@pytest.mark.parametrize(
    ("decoder", "fields", "mend"),
    [
        ({"layers": 0}, {}, "layers is 0, but must be a whole number, at least 1"),
        ({"kind": "linear"}, {}, LISTED),
        ({"classes": TWO}, {}, "decoder.kind=linear chooses among classes"),
        ({"kind": "separate", "classes": TWO}, {}, "decoder.kind=linear chooses among classes"),
        ({"kind": "linear", "classes": ("a",)}, {}, MANY),
        ({"kind": "linear", "classes": (*TWO, "a")}, {}, MANY),
        *(({field: "nonsense"}, {}, field) for field in ("kind", "reads", "table")),
        *((decoder, {"max_loops": 0}, "max_loops >= 1") for decoder in APARTS),
        *((decoder, {"answer_from": "kv_last"}, "answer_from=refeed") for decoder in APARTS),
        *((decoder, {"decode_lora": True, "loop": {"lora": "shared"}}, "decode_lora off") for decoder in APARTS),
        *((decoder, {"stop": {"rule": "kl", "site": "answer"}}, "set decoder.kind to lm_head") for decoder in APARTS),
        *(
            (APARTS[1], fields, "decoder.kind=linear writes nothing: set curriculum.max_stage, deep.weight and halt")
            for fields in (
                {"curriculum": {"max_stage": 1}},
                {"deep": {"weight": 1.0}},
                {"halt": {"weight": 1.0}, "stop": {"rule": "halt"}},
            )
        ),
    ],
    ids=str,
)
def test_impossible_settings_of_a_decoder_are_refused(decoder, fields, mend):
    with pytest.raises(InputError, match=mend):
        Slr(decoder=decoder, **fields)
