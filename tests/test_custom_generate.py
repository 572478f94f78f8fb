"""A saved folder in plain transformers: it answers with the thought, or says what is missing."""

import json

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from transformers import AutoModelForCausalLM, AutoTokenizer

import innerloop as il
from innerloop.errors import UnreadWarning
from innerloop.methods import METHODS as ALL
from innerloop.model.exported import lacking
from innerloop.tasks import Chain
from tests.formats import authors_latent
from tests.models import moved, saved, tiny_model
from tests.test_chat import TEMPLATE

FEW = {"max_new_tokens": 6}
SLR = {"time": "sinusoidal", "alpha_learn": "per_iter"}
METHODS = {
    "cot": il.Cot(),
    "no_cot": il.NoCot(),
    "pause": il.Pause(n_pauses=3),
    "pause_before": il.Pause(n_pauses=2, placement="prepend"),
    "coconut": il.Coconut(),
    "coconut_1": il.Coconut(latents_per_step=1, curriculum={"max_stage": 1}),
    "codi": il.Codi(n_latents_total=3),
    "codi_raw": il.Codi(n_latents_total=3, loop={"rescale": "none"}),
    "simcot": il.SimCot(soft_beta=0.5),
    "pccot": il.Pccot(n_slots=4, max_loops=2),
    "lotus": il.Lotus(n_blocks=2, latents_per_block=2),
    "lotus_refeed": il.Lotus(n_blocks=2, latents_per_block=2, last_pass="refeed"),
    "slr": il.Slr(n_slots=3, max_loops=3, distinct_slots=True),
    "slr_told": il.Slr(n_slots=3, max_loops=3, loop={**SLR, "time_inject": "token"}),
    "slr_mixed": il.Slr(n_slots=3, max_loops=2, h0="forward", loop={"residual": "B", "time_inject": "concat"}),
    "slr_adapter": il.Slr(n_slots=3, max_loops=2, answer_from="kv_last", loop={"rescale": "adapter"}),
    "slr_all": il.Slr(loop_scope="all", max_loops=2),
    "slr_last": il.Slr(loop_scope="last", max_loops=2),
    "slr_append": il.Slr(loop_scope="append", max_loops=3, h0="forward", answer_from="kv_last"),
    "slr_lora": il.Slr(n_slots=3, max_loops=3, loop={"lora": "per_iter", "lora_rank": 2}, decode_lora=True),
    "slr_lora_again": il.Slr(
        n_slots=3, max_loops=2, prefix_kv="per_iter", answer_from="kv_last", loop={"lora": "shared", "lora_rank": 2}
    ),
    "slr_gates": il.Slr(n_slots=3, max_loops=2, loop={"residual": "C", "gate_shape": "channel"}),
    "slr_attention": il.Slr(n_slots=3, max_loops=2, loop={"residual": "C", "gate_kind": "attention"}),
    "icot": il.Icot(),
    "simcot_codi": il.SimCotCodi(n_latents_total=3, aux={"weight": 0.0}),
    "loop_regularised": il.LoopRegularised(block_size=1),
    "slr_0": il.Slr(n_slots=3, max_loops=0, distinct_slots=True),
}
MAIN = ("cot", "pause", "coconut", "codi", "slr", "lotus")  # tried with a hundred questions, and on another decoder
REFUSED = {
    "it runs several streams": il.ParScale(),
    "it repeats or skips its layers": il.Looped(),
    "it fills in a canvas of masks": il.Llada(),
    "it thinks again while it writes": il.SpiralThinker(),
    "its loop ends by itself": il.Slr(stop={"rule": "kl"}),
    "it feeds latents beside the tokens that it writes": il.Hrpo(),
}


NEEDED = {"adainfer": {"layers": (1, 2)}}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Keep the copies of remote code that transformers makes."""
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def questions(n):
    """Return questions of mixed lengths."""
    return [e.question for ops in (2, 3, 5) for e in Chain(n_ops=ops, n_train=64).examples("train", -(-n // 3))][:n]


def asked(folder, texts, end="\n", **options):
    """Return the ids that plain transformers writes for questions."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer([text + end for text in texts], return_tensors="pt", padding=True)
    options = FEW | {"custom_generate": str(folder), "trust_remote_code": True} | options
    out = lm.generate(**inputs.to(lm.device), **options)
    assert torch.equal(out[:: len(out) // len(texts), : inputs.input_ids.shape[1]], inputs.input_ids)
    return out[:, inputs.input_ids.shape[1] :]


def told(folder):
    """Return what the generation config says of the thought."""
    return json.loads((folder / "generation_config.json").read_text()).get("innerloop", "")


def same(written, generations, eos):
    """Whether rows hold what our engine wrote; behind the end there is padding."""
    rows = [row[: len(one.ids)] for row, one in zip(written.tolist(), generations, strict=True)]
    ended = [one.ids[-1] == eos or len(one.ids) == FEW["max_new_tokens"] for one in generations]
    return rows == [one.ids for one in generations] and all(ended)


CASES = [*((name, "llama") for name in METHODS), *((name, "gpt2") for name in MAIN)]
HUNDREDS = [(name, "llama") for name in MAIN]


@pytest.mark.parametrize(
    ("name", "arch", "n"),
    [
        *((*case, 100 if case in HUNDREDS else 9) for case in CASES),
        *(pytest.param(*case, 100, marks=pytest.mark.slow) for case in CASES if case not in HUNDREDS),
    ],
)
def test_plain_transformers_writes_what_the_engine_writes(name, arch, n, tmp_path):
    model = moved(tiny_model(METHODS[name], arch))
    folder, texts = saved(model, tmp_path / "run"), questions(n)
    expected = model.generate(texts, **FEW)
    assert len({tuple(one.ids) for one in expected}) > 1
    assert same(asked(folder, texts), expected, model.encoder.eos_id)
    assert same(asked(folder, texts[-1:]), expected[-1:], model.encoder.eos_id)


@pytest.mark.parametrize("name", ALL)
def test_every_method_is_tried_here_or_says_why_it_cannot_be(name):
    if not any(method.name == name for method in METHODS.values()):
        assert lacking(tiny_model(ALL[name](**NEEDED.get(name, {}))))


def test_the_thought_matters(tmp_path):
    folder, texts = saved(moved(tiny_model(il.Coconut())), tmp_path / "run"), questions(9)
    assert not torch.equal(asked(folder, texts), asked(folder, texts, custom_generate=None))


def test_an_answer_with_two_ends_has_both(tmp_path):
    model, texts = moved(tiny_model(il.Icot(), seed=4)), questions(60)
    expected, eos = model.generate(texts, max_new_tokens=30), model.encoder.eos_id
    assert sum(len(one.ids) < 30 for one in expected) >= 5
    written = asked(saved(model, tmp_path / "run"), texts, max_new_tokens=30)
    ends = [one.ids + [model.encoder.pad_id] * (30 - len(one.ids)) for one in expected]
    assert written.tolist() == ends and all(one.ids.count(eos) in (0, 1, 2) for one in expected)


@pytest.mark.parametrize("arch", ["mistral", "gemma3", "qwen3"])
def test_windows_and_scaled_embeddings(arch, tmp_path):
    model, texts = moved(tiny_model(il.Lotus(n_blocks=2, latents_per_block=2), arch)), questions(6)
    assert same(asked(saved(model, tmp_path / "run"), texts), model.generate(texts, **FEW), model.encoder.eos_id)


def test_other_options_of_generate_are_those_of_transformers(tmp_path):
    model, texts = moved(tiny_model(il.Codi(n_latents_total=2))), questions(3)
    folder = saved(model, tmp_path / "run")
    assert asked(folder, texts, do_sample=True, num_return_sequences=4, temperature=3.0).unique(dim=0).shape[0] > 3
    beams = asked(folder, texts, num_beams=3)
    one = asked(folder, texts[1:2], num_beams=3)
    assert torch.equal(beams[1, : one.shape[1]], one[0])


def test_a_model_that_is_trusted_when_it_is_loaded_thinks_whenever_it_generates(tmp_path):
    model, texts = moved(tiny_model(il.Codi(n_latents_total=2))), questions(3)
    folder = saved(model, tmp_path / "run")
    lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = model.tokenizer([text + "\n" for text in texts], return_tensors="pt", padding=True)
    out = lm.generate(**inputs, **FEW)[:, inputs.input_ids.shape[1] :]
    assert same(out, model.generate(texts, **FEW), model.encoder.eos_id)


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_missing_is_said_on_load_and_instead_of_an_answer(reason, tmp_path):
    folder = saved(tiny_model(REFUSED[reason]), tmp_path / "run")
    assert reason in told(folder)
    with pytest.warns(UserWarning, match=reason):
        lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(NotImplementedError, match=f"{reason}; answer with innerloop"):
        lm.generate(torch.ones(1, 2).long())


def test_the_generation_config_speaks_of_this_method_alone(tmp_path):
    folder = saved(tiny_model(il.Coconut()), tmp_path / "run")
    assert "custom_generate=FOLDER" in told(folder)
    again = il.LatentModel.from_pretrained(folder, method=il.Cot())
    assert told(saved(again, tmp_path / "cot")) == ""


def test_another_layout_for_each_question_is_refused():
    class Own(il.Pause):
        def prompt(self, question, encoder, stage):
            return self._row(question, encoder, len(question))

    assert lacking(tiny_model(Own())) == "its latents are laid out otherwise for each question"


def test_weights_of_another_folder_are_no_guess(tmp_path):
    folder = saved(tiny_model(il.Coconut()), tmp_path / "run")
    lm = AutoModelForCausalLM.from_pretrained(folder)
    lm.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match="load the model from its own folder"):
        lm.generate(torch.ones(1, 2).long(), custom_generate=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("name", ["codi", "codi_llama", "simcot_coconut", "latent_tts_codi", "lotus"])
@pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
def test_released_weights_that_were_converted_answer_in_plain_transformers(name, tmp_path):
    getattr(authors_latent, name)(tmp_path / name)
    model = il.LatentModel.from_pretrained(tmp_path / name, device="cpu")
    folder, texts = saved(model, tmp_path / "ours"), ["two and two", "a", "what is it now"]
    end = json.loads((folder / "custom_generate/thought.json").read_text())["question_end"]
    written = asked(folder, texts, end=end)
    assert same(written, model.generate(texts, **FEW), model.encoder.eos_id)


def test_a_chat_is_asked_by_its_template(tmp_path):
    first = tiny_model(il.Codi(n_latents_total=2))
    first.tokenizer.chat_template = TEMPLATE
    first.tokenizer.save_pretrained(tmp_path)
    first.backbone.lm.save_pretrained(tmp_path)
    with pytest.warns(UnreadWarning, match="is asked through its chat template"):
        model = moved(il.LatentModel.from_pretrained(tmp_path, il.Codi(n_latents_total=2)))
    folder, (question,) = saved(model, tmp_path / "run"), questions(1)
    lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    turn = [{"role": "user", "content": question}]
    inputs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = lm.generate(**inputs, **FEW)[:, inputs["input_ids"].shape[1] :]
    assert same(out, model.generate([question], **FEW), model.encoder.eos_id)
