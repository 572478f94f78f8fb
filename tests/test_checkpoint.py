"""Folders on disk: what is saved comes back bit for bit, plain transformers reads it, and failures leave what was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from innerloop import Coconut, Cot, InputError, LatentModel, NoCot, Pause, Slr
from innerloop.decoder.backbone import Backbone
from innerloop.methods import METHODS as ALL_METHODS
from innerloop.model import checkpoint, run_folder
from tests.close import assert_close
from tests.methods.tools import learn
from tests.models import (
    answers_of,
    chain_examples,
    chain_tokenizer,
    from_scratch,
    moved,
    saved,
    text_logits,
    tiny_lm,
    tiny_model,
)

DECODERS = [
    Slr(decoder={"kind": "separate"}),
    Slr(decoder={"kind": "separate", "layers": 1, "reads": "state_and_prompt", "table": "own"}),
    Slr(decoder={"kind": "linear", "classes": ("0", "1", "2", "3", "4")}),
]
METHODS = [NoCot(), Cot(), Cot(with_markers=True), Pause(), Coconut(), Slr()]
METHODS += [Slr(loop_scope="append", h0="forward", loop={"residual": "B"}, curriculum={"max_stage": 2}), *DECODERS]
EXAMPLES = list(chain_examples(3))
LLAMA = {"type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reloaded(model: LatentModel, folder: Path, **options) -> LatentModel:
    return LatentModel.from_pretrained(saved(model, folder / "run"), **options)


# Saving and loading


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_saved_model_gives_the_same_logits_bit_for_bit(method, tmp_path):
    model = moved(tiny_model(method))
    loaded = reloaded(model, tmp_path)
    assert loaded.method == method and not loaded.training
    assert torch.equal(answers_of(loaded), answers_of(model))


SHORT = {  # of methods whose defaults do not fit two layers, or take long
    "loop_regularised": {"block_size": 2},
    "recurrent_depth": {"n_prelude": 1, "n_core": 1, "n_coda": 0, "max_loops": 2},
    "mor": {"n_recursions": 2, "sharing": "cycle"},
    "adainfer": {"layers": (1,)},
}
FULL = Slr(
    n_slots=2,
    max_loops=2,
    loop={"residual": "C", "rescale": "adapter", "lora": "per_iter", "lora_rank": 2},
    stop={"rule": "kl"},
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model of two layers that any method can be put on."""
    return saved(tiny_model(Cot(), num_hidden_layers=2), tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    "method",
    [*(cls(**SHORT.get(name, {})) for name, cls in ALL_METHODS.items()), FULL, *DECODERS],
    ids=lambda m: m.name,
)
def test_every_method_answers_and_learns_in_half_precision(method, plain):
    """What it adds, and what it decides by, stays in fp32."""
    model = LatentModel.from_pretrained(plain, method, dtype="bf16", device="cpu")
    assert model.backbone.lm.dtype == torch.bfloat16 and model.backbone.n_layers >= 1
    found = model.generate([example.question for example in EXAMPLES[:2]], max_new_tokens=2, temperature=0.7)
    assert [one.cost.passes > 0 for one in found] == [True, True]
    loss = model.train().loss([replace(example, answer="1") for example in EXAMPLES[:2]]).loss
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()


def test_types_of_weights_have_two_names_and_others_are_refused(plain):
    found = [LatentModel.from_pretrained(plain, dtype=name).backbone.lm.dtype for name in ("fp16", "float32", "auto")]
    assert found == [torch.float16, torch.float32, torch.float32]
    for name in ("int8", "softmax", "fp8"):
        with pytest.raises(InputError, match=f"dtype is '{name}'; choose one of auto, fp32"):
            LatentModel.from_pretrained(plain, dtype=name)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_of_every_architecture_gives_the_same_logits_and_heads_stay_tied(arch, tied, tmp_path):
    model = moved(tiny_model(Coconut(), arch, tie_word_embeddings=tied))
    loaded = reloaded(model, tmp_path)
    lm = loaded.backbone.lm
    assert (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight) == tied
    assert loaded.tokenizer.encode("3 + 4") == model.tokenizer.encode("3 + 4")
    assert torch.equal(answers_of(loaded), answers_of(model))


@pytest.mark.parametrize("method", [Coconut(), *DECODERS], ids=["coconut", "shared", "own", "linear"])
def test_what_has_been_learned_is_answered_after_loading(method, tmp_path, examples):
    model = tiny_model(method, num_hidden_layers=2, initializer_range=0.1)
    learn(model, examples, n_steps=40, learning_rate=2e-2)
    questions = [example.question for example in examples]
    texts = [generation.text for generation in model.generate(questions, max_new_tokens=6)]
    loaded = reloaded(model, tmp_path)
    assert [generation.text for generation in loaded.generate(questions, max_new_tokens=6)] == texts
    assert len(set(texts)) > 1


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    model = reloaded(moved(tiny_model(Coconut())).to(torch.bfloat16), tmp_path / "half")
    loaded = reloaded(model, tmp_path)
    assert model.backbone.lm.dtype == loaded.backbone.lm.dtype == torch.bfloat16
    assert torch.equal(answers_of(loaded), answers_of(model))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_plain_transformers_reads_the_folder(arch, tmp_path):
    model = moved(tiny_model(Coconut(), arch))
    folder = saved(model, tmp_path / "run")
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    own = text_logits(model.backbone.lm, model.tokenizer)
    assert_close(text_logits(lm, tokenizer), own)
    assert torch.equal(text_logits(Backbone(lm).lm, tokenizer), own)  # GPT-2's activation is one operator in both


def test_saving_changes_nothing_of_the_model_and_the_timestep_table_and_tau_come_back(tmp_path):
    model = moved(tiny_model(Slr()))
    before, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, answers_of(model)
    loaded, after = reloaded(model, tmp_path), model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(answers_of(model), logits)
    assert torch.equal(loaded.loop.time.table, model.loop.time.table) and model.loop.time.table.abs().max() > 0.01
    assert torch.equal(loaded.loop.rescale.tau, model.loop.rescale.tau)
    assert loaded.loop.rescale.tau != loaded.backbone.embed_rms()  # tau is that of the weights training began with


def test_a_record_is_kept_beside_the_settings_in_the_checkpoint_of_a_run_where_nothing_is_pickled(tmp_path):
    model = moved(tiny_model(Cot()))
    checkpoint.save(model, tmp_path / "a" / "run" / "checkpoint", {"seed": 3})  # missing parents are made
    assert torch.equal(answers_of(LatentModel.from_pretrained(tmp_path / "a" / "run")), answers_of(model))
    settings = run_folder.read_settings(tmp_path / "a" / "run" / "checkpoint")
    assert set(settings) == {"innerloop", "format", "method", "seed"} and settings["seed"] == 3
    assert settings["method"] == {"name": "cot", "with_markers": False} and settings["format"] == 2
    names = set(contents(tmp_path / "a" / "run" / "checkpoint"))
    assert {"config.json", "model.safetensors", "tokenizer.json", "innerloop.json", "innerloop.safetensors"} <= names
    others = {name for name in names if Path(name).suffix not in {".json", ".safetensors", ".jinja"}}
    assert others == {"custom_generate/generate.py"}


@pytest.mark.parametrize("method", DECODERS, ids=["shared", "own", "linear"])
def test_a_decoder_is_saved_beside_the_loop_and_must_be_there(method, tmp_path):
    model = moved(tiny_model(method))
    folder = saved(model, tmp_path / "run")
    stored = load_file(folder / "innerloop.safetensors")
    names = {name for name in model.state_dict() if name.startswith("decoder.")}
    assert names and {name for name in stored if name.startswith("decoder.")} == names
    assert not any(name.startswith("decoder.") for name in load_file(folder / "model.safetensors"))
    save_file({name: t for name, t in stored.items() if name not in names}, folder / "innerloop.safetensors")
    with pytest.raises(InputError, match=r"does not fit the method 'slr'.*decoder\."):
        LatentModel.from_pretrained(folder)


def test_a_decoder_with_more_layers_keeps_those_it_has_learned_and_may_be_new(tmp_path):
    method = Slr(decoder={"kind": "separate"})
    model = moved(tiny_model(Slr(decoder={"kind": "separate", "layers": 1})))
    loaded = reloaded(model, tmp_path, method=method)
    old, new = (one.decoder.layers.layers[0].state_dict() for one in (model, loaded))
    assert all(torch.equal(new[name], old[name]) for name in old)
    model = moved(tiny_model(Slr()))  # a run that wrote its answers goes on with a decoder of its own
    loaded = reloaded(model, tmp_path, method=method)
    assert torch.equal(loaded.loop.time.table, model.loop.time.table)
    assert loaded.loss(EXAMPLES).loss.isfinite()


def test_a_plain_model_is_loaded_with_a_method(tmp_path):
    lm, tokenizer = tiny_lm(), chain_tokenizer()
    for one in (lm, tokenizer):
        one.save_pretrained(tmp_path)
    model = LatentModel.from_pretrained(tmp_path, method=Cot())
    assert torch.equal(text_logits(model.backbone.lm, model.tokenizer), text_logits(lm, tokenizer))


# Another method on saved weights


def test_a_cot_run_goes_on_as_coconut_with_its_weights(tmp_path):
    model = moved(tiny_model(Cot()))
    loaded = reloaded(model, tmp_path, method=Coconut())
    assert loaded.method == Coconut()
    n_old = model.backbone.lm.get_input_embeddings().weight.shape[0]
    theirs = loaded.backbone.lm.state_dict()
    for name, tensor in model.backbone.lm.state_dict().items():
        same = theirs[name][:n_old] if name in ("model.embed_tokens.weight", "lm_head.weight") else theirs[name]
        assert torch.equal(same, tensor), name
    assert loaded.backbone.lm.get_input_embeddings().weight.shape[0] == n_old + 3
    plain = text_logits(model.backbone.lm, model.tokenizer)
    assert_close(text_logits(loaded.backbone.lm, loaded.tokenizer)[..., :n_old], plain)
    assert torch.isfinite(loaded.loss(EXAMPLES, stage=1).loss)


# From scratch


@pytest.mark.parametrize(
    "method",
    [Coconut(), Slr(loop={"lora": "per_iter"}), Slr(loop={"residual": "C"}), *DECODERS[1:]],
    ids=["plain", "lora", "gate", "separate", "linear"],
)
def test_from_scratch_draws_everything_by_its_seed(method):
    tokenizer = chain_tokenizer()
    first, again, other = (from_scratch(LLAMA, tokenizer, method, seed) for seed in (0, 0, 1))
    config = first.backbone.config
    assert config.vocab_size == len(tokenizer) + 3 == first.backbone.lm.get_input_embeddings().weight.shape[0]
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 2, None)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.backbone.lm.lm_head.weight, other.backbone.lm.lm_head.weight)
    drawn, others = (
        [p for part in one.trained_modules().values() for p in part.parameters()] for one in (first, other)
    )
    assert not drawn or any(not torch.equal(a, b) for a, b in zip(drawn, others, strict=True))


@pytest.mark.parametrize("method", [Cot(), Slr(decoder={"kind": "separate"})], ids=lambda m: m.name)
def test_from_scratch_leaves_the_global_generator_and_the_settings_alone(method):
    torch.manual_seed(5)
    expected, settings = torch.rand(1), dict(LLAMA)
    torch.manual_seed(5)
    from_scratch(settings, chain_tokenizer(), method)
    assert torch.equal(torch.rand(1), expected) and settings == LLAMA


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "lama"}, "did you mean 'llama'"),
        ({"type": "llama", "hiden_size": 32}, "a llama has no 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"type": "gpt2", "hiden_size": 32}, "a gpt2 has no 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"type": "bert", "hidden_size": 32, "num_attention_heads": 4}, "its BertModel has no list of layers"),
        ({"type": "distilbert"}, "distilbert"),
        ({**LLAMA, "hidden_size": 33}, "33"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size"),
        ({**LLAMA, "vocab_size": 100}, "vocab_size"),
    ],
)
def test_from_scratch_says_what_cannot_be(settings, expected):
    small = {"num_hidden_layers": 1, "intermediate_size": 8} if settings["type"] == "bert" else {}
    with pytest.raises(InputError) as caught:
        from_scratch({**settings, **small}, chain_tokenizer(), Cot())
    assert expected in str(caught.value)


@pytest.mark.parametrize("loops", [5, 1])
def test_another_setting_of_the_same_method_keeps_the_trained_parts_that_fit(tmp_path: Path, loops: int):
    model = tiny_model(Slr(n_slots=2, max_loops=3))
    model.loop.time.table.data.normal_()
    model.loop.rescale.tau.fill_(0.5)
    other = reloaded(model, tmp_path, method=Slr(n_slots=2, max_loops=loops, step_weight=0.5))
    assert torch.equal(other.loop.time.table[:3], model.loop.time.table[:loops])
    assert not other.loop.time.table[3:].any() and other.loop.rescale.tau == 0.5
