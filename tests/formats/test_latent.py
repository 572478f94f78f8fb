"""Coconut, CODI, SIM-CoT and LOTUS as released, against a GPT-2 and a Llama written out from the authors' tensors."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from innerloop import Coconut, Codi, InputError, LatentModel, Lotus, SimCot, SimCotCodi
from innerloop.formats import bases
from tests.formats import authors_latent, plain
from tests.formats.authors import HEADS, LETTERS
from tests.formats.proved import check_decoder, check_thoughts
from tests.formats.released import RELEASED, read, write

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
PRJ, PROJECTOR = ("prj.1", "prj.3", "prj.ln"), ("projector.1", "projector.3", "projector.4")
PEFT = "codi.base_model.model."
START, STOP, LATENT = (len(LETTERS) + i for i in (1, 2, 3))


def opened(tmp_path, name):
    """The tensors of a layout, and the model that is opened."""
    tensors = RELEASED[name](tmp_path / name)
    return tensors, LatentModel.from_pretrained(tmp_path / name, device="cpu")


def unwrapped(w, alpha=32):
    """Add the updates, one matrix at a time."""
    own = {name.removeprefix(PEFT): one for name, one in w.items() if name.startswith(PEFT)}
    for name in [name for name in own if name.endswith(".base_layer.weight")]:
        module = name.removesuffix(".base_layer.weight")
        a, b = (own[f"{module}.lora_{half}.default.weight"] for half in "AB")
        update = torch.einsum("or,ri->oi", b, a) * alpha / authors_latent.RANK
        own[f"{module}.weight"] = own[name] + (update.T if "transformer." in name else update)
        if f"{module}.base_layer.bias" in own:
            own[f"{module}.bias"] = own[f"{module}.base_layer.bias"]
    return own


def gpt2_of(w):
    """States of what is read by a GPT-2, and its table."""
    states = lambda x: plain.gpt2(w, x, authors_latent.GPT2_HEADS, plain.sees_past(len(x)))  # noqa: E731
    return states, w["transformer.wte.weight"]


def llama_of(w):
    states = lambda x: plain.qwen(w, x, HEADS, 700.0, plain.sees_past(len(x)))  # noqa: E731
    return states, w["model.embed_tokens.weight"]


def thinking(states, table, n, stop, project=lambda state: state):
    """One latent after the other, from the state at <bot> on, and <eot>."""

    def begin(ids):
        read = table[ids]
        for _ in range(n):
            read = torch.cat([read, project(states(read)[-1])[None]])
        return torch.cat([read, table[[stop]]])

    return begin


def test_latent_tts_coconut_thinks_in_six_latents(tmp_path):
    w, model = opened(tmp_path, "latent-tts-coconut")
    assert model.method == Coconut()
    states, table = gpt2_of(w)
    check_thoughts(model, thinking(states, table, 6, STOP), states, table)
    assert model.prompts(["?"])[0].ids()[:3] == [*model.tokenizer.encode("?\n"), START]


def test_latent_tts_codi_projects_its_latents(tmp_path):
    w, model = opened(tmp_path, "latent-tts-codi")
    assert (type(model.method), model.method.n_latents_total) == (Codi, 6)
    states, table = gpt2_of(w)
    project = lambda state: plain.projected(w, PROJECTOR, state)  # noqa: E731
    check_thoughts(model, thinking(states, table, 6, STOP, project), states, table)
    assert model.prompts(["?"])[0].ids()[:2] == [*model.tokenizer.encode("?"), START]


@pytest.mark.parametrize(
    ("name", "of", "method"),
    [
        ("CODI-gpt2", gpt2_of, Codi),
        ("CODI-llama3.2-1b-Instruct", llama_of, Codi),
        ("SIM_COT-GPT2-CODI", gpt2_of, SimCotCodi),
    ],
)
def test_codi_adds_its_updates_and_ends_the_vocabulary_in_its_markers(name, of, method, tmp_path):
    w, model = opened(tmp_path, name)
    assert isinstance(model.method, method)
    assert model.tokenizer.convert_tokens_to_ids(["[PAD]", "<bot>", "<eot>"]) == [START, STOP, LATENT]
    states, table = of(unwrapped(w))
    project = lambda state: plain.projected(w, PRJ, state)  # noqa: E731
    n_rows = len(model.backbone.lm.get_input_embeddings().weight)  # one more: <lat>, which is never read
    assert n_rows == len(table) + 1
    check_thoughts(model, thinking(states, table, 6, LATENT, project), states, table)


def test_sim_cot_on_coconut_thinks_in_ten_latents(tmp_path):
    w, model = opened(tmp_path, "SIM_COT-GPT2-Coconut")
    assert isinstance(model.method, SimCot)
    prefix = "base_causallm."
    states, table = gpt2_of({name.removeprefix(prefix): one for name, one in w.items() if name.startswith(prefix)})
    check_thoughts(model, thinking(states, table, 10, STOP), states, table)


def test_lotus_loops_all_its_blocks(tmp_path):
    w, model = opened(tmp_path, "gsm-lotus-llama3b")
    assert model.method == Lotus(n_blocks=6, latents_per_block=25)
    states, table = llama_of(w)

    def begin(ids):
        latents = placeholder = table[[LATENT] * 150]
        for _ in range(6):
            latents = placeholder + states(torch.cat([table[ids], latents]))[len(ids) :]
        return torch.cat([table[ids], latents, table[[STOP]]])

    check_thoughts(model, begin, states, table)


def test_what_was_released_without_a_tokenizer_takes_that_of_its_base(tmp_path, monkeypatch):
    authors_latent.simcot_coconut(tmp_path / "base")
    folder = tmp_path / "SIM_COT-GPT2-Coconut"
    authors_latent.simcot_coconut(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    monkeypatch.setitem(bases.HUB, "gpt2", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"has no tokenizer, and that of .* cannot be loaded: copy its files there"):
        LatentModel.from_pretrained(folder, device="cpu")
    authors_latent.write_json(tmp_path / "base", "config.json", model_type="gpt2")
    monkeypatch.setitem(bases.HUB, "gpt2", str(tmp_path / "base"))
    model = LatentModel.from_pretrained(folder, device="cpu")
    assert model.tokenizer.convert_tokens_to_ids(["<bot>", "<eot>", "<lat>"]) == [START, STOP, LATENT]


def test_a_config_of_another_model_is_mended_where_its_base_is_known(tmp_path):
    authors_latent.simcot_codi(tmp_path / "model")
    authors_latent.write_json(tmp_path / "model", "config.json", model_type="llama", hidden_size=7)
    config = LatentModel.from_pretrained(tmp_path / "model", device="cpu").backbone.config
    assert (config.model_type, config.n_head, config.n_positions) == ("gpt2", 2, authors_latent.PLACES)


def test_a_llama_that_nobody_knows_needs_its_config(tmp_path):
    authors_latent.codi_llama(tmp_path / "model")
    (tmp_path / "model/config.json").unlink()
    with pytest.raises(InputError, match=r"2 layers of width 32, .* copy the config"):
        LatentModel.from_pretrained(tmp_path / "model", device="cpu")


def test_a_first_stage_of_lotus_writes_its_chain_of_thought(tmp_path):
    w = authors_latent.lotus(tmp_path / "gsm-cot-llama3b")
    model = LatentModel.from_pretrained(tmp_path / "gsm-cot-llama3b", device="cpu")
    states, table = llama_of(w)
    check_decoder(model, lambda ids: states(table[ids]) @ table.T)


@pytest.mark.parametrize("ids", [{}, dict.fromkeys(("latent_id", "latent_start_id", "latent_end_id"), -100)])
def test_markers_that_config_json_does_not_say_are_the_tokenizers(ids, tmp_path):
    authors_latent.latent_tts(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("latent_")}
    authors_latent.write_json(tmp_path / "model", "config.json", **{**config, **ids})
    model = LatentModel.from_pretrained(tmp_path / "model", device="cpu")
    assert model.method == Coconut()
    assert model.tokenizer.convert_tokens_to_ids(["<bot>", "<eot>", "<lat>"]) == [START, STOP, LATENT]


def test_two_markers_of_one_id_are_refused(tmp_path):
    authors_latent.latent_tts(tmp_path / "model", latent_end_id=START)
    with pytest.raises(InputError, match="give no three markers"):
        LatentModel.from_pretrained(tmp_path / "model", device="cpu")


def test_buffers_that_earlier_versions_saved_are_no_weights(tmp_path):
    authors_latent.latent_tts(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    write(path, {**read(path), "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)})
    assert LatentModel.from_pretrained(tmp_path / "model", device="cpu").method == Coconut()


TEMPLATE = "{% for turn in messages %}[{{ turn.content }}]{% endfor %}"


@pytest.mark.parametrize("name", ["gsm-lotus-llama3b", "gsm-cot-llama3b", "CODI-llama3.2-1b-Instruct"])
def test_what_was_trained_on_bare_questions_is_asked_them_whatever_its_base_is_used_to(name, tmp_path):
    RELEASED.get(name, authors_latent.lotus)(tmp_path / name)
    (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    model = LatentModel.from_pretrained(tmp_path / name, device="cpu")
    assert not model.encoder.wording.chat
    assert model.prompts(["?"])[0].ids()[:1] == model.tokenizer.encode("?")


@pytest.mark.parametrize("name", ["gsm-lotus-llama3b", "CODI-gpt2", "latent-tts-codi", "SIM_COT-GPT2-Coconut"])
def test_who_wants_a_chat_all_the_same_gets_it(name, tmp_path):
    RELEASED[name](tmp_path / name)
    (tmp_path / name / "chat_template.jinja").write_text(TEMPLATE)
    model = LatentModel.from_pretrained(tmp_path / name, device="cpu", chat=True)
    row = model.prompts(["?"])[0].ids()
    assert row[: row.index(model.tokenizer.convert_tokens_to_ids("<bot>"))] == model.tokenizer.encode("[?]")


@pytest.mark.parametrize("name", ["gsm-lotus-llama3b", "CODI-llama3.2-1b-Instruct"])
def test_the_beginning_that_a_tokenizer_writes_stands_before_a_question(name, tmp_path):
    """The authors' code lets Llama's tokenizer add its special tokens."""
    RELEASED[name](tmp_path / name)
    words = Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
    first = words.token_to_id(authors_latent.END)
    words.post_processor = TemplateProcessing(
        single=f"{authors_latent.END} $A", special_tokens=[(authors_latent.END, first)]
    )
    words.save(str(tmp_path / name / "tokenizer.json"))
    model = LatentModel.from_pretrained(tmp_path / name, device="cpu")
    ids = model.prompts(["?"])[0].ids()
    assert ids[:2] == [first, words.encode("?", add_special_tokens=False).ids[0]] and ids.count(first) == 1
    model.save_pretrained(tmp_path / "ours")
    assert LatentModel.from_pretrained(tmp_path / "ours", device="cpu").prompts(["?"])[0].ids() == ids


def test_others_are_asked_as_a_chat_where_they_have_one(tmp_path):
    RELEASED["Ouro-1.4B"](tmp_path / "Ouro-1.4B-Thinking")
    (tmp_path / "Ouro-1.4B-Thinking/chat_template.jinja").write_text(TEMPLATE)
    model = LatentModel.from_pretrained(tmp_path / "Ouro-1.4B-Thinking", device="cpu")
    assert model.encoder.wording.chat
    assert model.prompts(["?"])[0].ids() == model.tokenizer.encode("[?]")
