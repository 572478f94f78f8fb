"""Folders on disk: what is saved comes back bit for bit, plain transformers reads it, and failures leave what was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from innerloop import Coconut, Cot, LatentModel, NoCot, Pause, Slr, adapters, checkpoint
from innerloop.adapters import add_lora, add_markers, merged_state
from innerloop.backbone import Backbone
from innerloop.checkpoint import from_scratch
from innerloop.errors import InputError
from tests.models import SPELLED, chain_examples, chain_tokenizer, spelled_tokenizer, tiny_lm, tiny_model

METHODS = [NoCot(), Cot(), Cot(with_markers=True), Pause(), Coconut(), Slr(), Slr(loop_scope="append", residual="B")]
EXAMPLES = list(chain_examples(3))
LLAMA = {"type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
GPT2_LORA = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft tells that it adapts to GPT-2's Conv1D


def moved(model: LatentModel, seed: int = 0) -> LatentModel:
    """Move every weight a little, the timestep table too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def trained(model: LatentModel, n_steps: int = 3, learning_rate: float = 0.1) -> LatentModel:
    """Take a few steps on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model.loss(EXAMPLES).loss.backward()
        optimizer.step()
    return model


def logits_of(model: LatentModel) -> torch.Tensor:
    return torch.cat(model.answer_logits(EXAMPLES))


@torch.no_grad()
def text_logits(lm, tokenizer) -> torch.Tensor:
    return lm(input_ids=torch.tensor([tokenizer.encode("3 + 4 = 2\n")])).logits


def saved(model: LatentModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Saving and loading


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_saved_model_gives_the_same_logits_bit_for_bit(method, tmp_path):
    model = moved(tiny_model(method))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert loaded.method == method
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not loaded.training


def test_a_saved_model_of_every_architecture_gives_the_same_logits_bit_for_bit(arch, tmp_path):
    model = moved(tiny_model(Coconut(), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert loaded.tokenizer.encode("3 + 4") == model.tokenizer.encode("3 + 4")
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_stay_so(tied, tmp_path):
    model = moved(tiny_model(Coconut(), tie_word_embeddings=tied))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    lm = loaded.backbone.lm
    assert (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight) == tied
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_the_trained_timestep_table_and_tau_come_back(tmp_path):
    model = moved(tiny_model(Slr()))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert model.loop.time.table.abs().max() > 0.01
    assert torch.equal(loaded.loop.time.table, model.loop.time.table)
    assert torch.equal(loaded.loop.rescale.tau, model.loop.rescale.tau)
    assert loaded.loop.rescale.tau != loaded.backbone.embed_rms()  # tau is that of the weights training began with


def test_every_setting_of_the_method_comes_back(tmp_path):
    method = Slr(n_slots=3, max_loops=2, residual="B", alpha=0.5, h0="forward", max_stage=2, stage_mix="linear")
    loaded = LatentModel.from_pretrained(saved(tiny_model(method), tmp_path / "run"))
    assert loaded.method == method


def test_generation_is_the_same_after_loading(tmp_path):
    model = moved(tiny_model(Coconut()))
    questions = [example.question for example in EXAMPLES]
    texts = [generation.text for generation in model.generate(questions, max_new_tokens=6)]
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert [generation.text for generation in loaded.generate(questions, max_new_tokens=6)] == texts
    assert len(set(texts)) > 1


def test_bfloat16_weights_stay_bfloat16(tmp_path):
    half = moved(tiny_model(Coconut())).to(torch.bfloat16)
    model = LatentModel.from_pretrained(saved(half, tmp_path / "half"))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert model.backbone.lm.dtype == loaded.backbone.lm.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_plain_transformers_reads_the_folder(arch, tmp_path):
    model = moved(tiny_model(Coconut(), arch))
    folder = saved(model, tmp_path / "run")
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(text_logits(lm, tokenizer), text_logits(model.backbone.lm, model.tokenizer))


def test_saving_changes_nothing_of_the_model(tmp_path):
    model = moved(tiny_model(Slr()))
    before, logits = {name: tensor.clone() for name, tensor in model.state_dict().items()}, logits_of(model)
    saved(model, tmp_path / "run")
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits_of(model), logits)


def test_the_folder_of_a_run_means_its_checkpoint(tmp_path):
    model = moved(tiny_model(Cot()))
    saved(model, tmp_path / "run" / "checkpoint")
    assert torch.equal(logits_of(LatentModel.from_pretrained(tmp_path / "run")), logits_of(model))


def test_a_record_is_kept_beside_the_settings(tmp_path):
    checkpoint.save(tiny_model(Cot()), tmp_path / "run", {"seed": 3})
    settings = checkpoint.read_settings(tmp_path / "run")
    assert settings["seed"] == 3
    assert settings["method"] == {"name": "cot", "with_markers": False}
    assert set(settings) == {"innerloop", "method", "seed"}


def test_nothing_pickled_is_written(tmp_path):
    names = {path.name for path in saved(tiny_model(Slr()), tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "innerloop.json", "innerloop.safetensors"} <= names
    assert all(Path(name).suffix in {".json", ".safetensors", ".jinja"} for name in names)


def test_a_plain_model_is_loaded_with_a_method(tmp_path):
    lm, tokenizer = tiny_lm(), chain_tokenizer()
    lm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = LatentModel.from_pretrained(tmp_path / "base", method=Cot())
    assert torch.equal(text_logits(model.backbone.lm, model.tokenizer), text_logits(lm, tokenizer))


# Another method on saved weights


def test_a_cot_run_goes_on_as_coconut_with_its_weights(tmp_path):
    model = moved(tiny_model(Cot()))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "cot"), method=Coconut())
    assert loaded.method == Coconut()
    n_old = model.backbone.lm.get_input_embeddings().weight.shape[0]
    theirs = loaded.backbone.lm.state_dict()
    for name, tensor in model.backbone.lm.state_dict().items():
        same = theirs[name][:n_old] if name in ("model.embed_tokens.weight", "lm_head.weight") else theirs[name]
        assert torch.equal(same, tensor), name
    assert loaded.backbone.lm.get_input_embeddings().weight.shape[0] == n_old + 3
    plain = text_logits(model.backbone.lm, model.tokenizer)
    torch.testing.assert_close(
        text_logits(loaded.backbone.lm, loaded.tokenizer)[..., :n_old], plain, atol=1e-5, rtol=1e-5
    )
    assert torch.isfinite(loaded.loss(EXAMPLES, stage=1).loss)


def test_the_same_method_with_more_loops_keeps_the_rows_it_has_learned(tmp_path):
    model = moved(tiny_model(Slr(max_loops=4)))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), method=Slr(max_loops=6))
    assert loaded.loop.time.table.shape == (6, 32)
    assert torch.equal(loaded.loop.time.table[:4], model.loop.time.table) and model.loop.time.table.any()


@pytest.mark.parametrize("tied", [True, False])
def test_new_markers_are_copies_of_the_row_of_double_angle(tied):
    tokenizer = spelled_tokenizer(n_known=SPELLED.index("<bot>"))
    backbone = Backbone(tiny_lm(vocab_size=len(tokenizer), tie_word_embeddings=tied))
    before = backbone.lm.get_input_embeddings().weight.detach().clone()
    add_markers(backbone, tokenizer, Coconut().markers)
    ids = tokenizer.convert_tokens_to_ids(["<bot>", "<lat>", "<eot>"])
    assert ids == [13, 14, 15]
    for table in (backbone.lm.get_input_embeddings().weight, backbone.lm.get_output_embeddings().weight):
        assert table.shape[0] == 16
        assert all(torch.equal(table[i], table[SPELLED.index("<<")]) for i in ids)
    assert torch.equal(backbone.lm.get_input_embeddings().weight[:13], before)
    assert backbone.config.vocab_size == 16


def test_markers_take_rows_that_a_padded_vocabulary_has_to_spare():
    tokenizer = spelled_tokenizer(n_known=SPELLED.index("<bot>"))
    backbone = Backbone(tiny_lm(vocab_size=20))
    before = backbone.lm.get_input_embeddings().weight.detach().clone()
    add_markers(backbone, tokenizer, Coconut().markers)
    table = backbone.lm.get_input_embeddings().weight
    assert table.shape[0] == 20
    assert all(torch.equal(table[i], before[SPELLED.index("<<")]) for i in (13, 14, 15))
    assert torch.equal(table[16:], before[16:])


def test_without_a_double_angle_new_markers_are_drawn_around_the_mean_row_the_same_each_time():
    tables = []
    for _ in range(2):
        tokenizer = spelled_tokenizer(n_known=SPELLED.index("<<"))
        backbone = Backbone(tiny_lm(vocab_size=len(tokenizer)))
        add_markers(backbone, tokenizer, Coconut().markers)
        tables.append(backbone.lm.get_input_embeddings().weight.detach())
    old, new = tables[0][:12], tables[0][12:]
    assert torch.equal(tables[0], tables[1])
    assert len({tuple(row.tolist()) for row in new}) == 3
    assert ((new - old.mean(0)).abs() <= 5 * old.std(0)).all()


def test_new_markers_may_start_as_the_mean_row_or_around_it():
    rows = {}
    for init in ("mean", "normal"):
        tokenizer = spelled_tokenizer(n_known=SPELLED.index("<bot>"))
        backbone = Backbone(tiny_lm(vocab_size=len(tokenizer)))
        add_markers(backbone, tokenizer, Coconut().markers, init)
        table = backbone.lm.get_input_embeddings().weight.detach()
        old, rows[init] = table[:13], table[13:]
    assert torch.equal(rows["mean"], old.mean(0).expand(3, -1))
    assert ((rows["normal"] - old.mean(0)).abs() <= 5 * old.std(0)).all()
    assert len({tuple(row.tolist()) for row in rows["normal"]}) == 3


def test_adding_markers_again_changes_nothing():
    tokenizer = spelled_tokenizer(n_known=SPELLED.index("<bot>"))
    backbone = Backbone(tiny_lm(vocab_size=len(tokenizer)))
    add_markers(backbone, tokenizer, Coconut().markers)
    table = backbone.lm.get_input_embeddings().weight.detach().clone()
    add_markers(backbone, tokenizer, Coconut().markers)
    assert torch.equal(backbone.lm.get_input_embeddings().weight, table)


# LoRA


def with_lora(method=None, arch: str = "llama", **changes) -> tuple[LatentModel, dict[str, torch.Tensor]]:
    """Return a model with trained LoRA, and the base weights it was put on."""
    model = tiny_model(method or Coconut(), arch, **changes)
    base = {name: tensor.clone() for name, tensor in model.backbone.lm.state_dict().items()}
    add_lora(model, {"r": 4, "lora_alpha": 8})
    return trained(model).eval(), base


def base_weights(model: LatentModel) -> dict[str, torch.Tensor]:
    """Return the frozen weights under the base model's names."""
    state = model.backbone.lm.state_dict()
    plain = {name.replace(".token_adapter", "").replace(".base_layer", ""): t for name, t in state.items()}
    return {name: tensor for name, tensor in plain.items() if ".lora" not in name}


@GPT2_LORA
def test_new_lora_changes_no_logit(arch):
    model = tiny_model(Coconut(), arch)
    before = logits_of(model)
    add_lora(model, {"r": 4})
    assert torch.equal(logits_of(model), before)


@GPT2_LORA
def test_training_lora_leaves_the_base_weights_as_they_were(arch):
    model, base = with_lora(arch=arch)
    now = base_weights(model)
    assert now.keys() == base.keys()
    assert all(torch.equal(now[name], base[name]) for name in base)


@GPT2_LORA
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_only_the_rows_of_the_markers_train(arch):
    model = tiny_model(Pause(), arch)  # reads all its markers
    ids = torch.arange(len(model.tokenizer))[None]
    before = model.backbone.embed(ids)[0].detach()
    add_lora(model, {"r": 4})
    trained(model)
    after = model.backbone.embed(ids)[0].detach()
    has_moved = (before != after).any(dim=1)
    assert ids[0][has_moved].tolist() == model.tokenizer.convert_tokens_to_ids(["<bot>", "<lat>", "<eot>"])


def test_a_method_without_markers_trains_no_row():
    model, _ = with_lora(Cot())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)


def test_the_methods_own_parts_train_beside_lora():
    model, _ = with_lora(Slr())
    assert model.loop.time.table.requires_grad
    assert model.loop.time.table.abs().max() > 0


@GPT2_LORA
@pytest.mark.parametrize("method", [Cot(), Coconut()], ids=lambda m: m.name)
def test_merging_leaves_the_model_bit_for_bit_as_it_was(arch, method):
    model, base = with_lora(method, arch)
    before, logits = {name: t.clone() for name, t in model.backbone.lm.state_dict().items()}, logits_of(model)
    merged = merged_state(model.backbone.lm)
    after = model.backbone.lm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits_of(model), logits)
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@GPT2_LORA
@pytest.mark.parametrize("method", [Cot(), Coconut(), Slr()], ids=lambda m: m.name)
def test_a_saved_lora_run_gives_the_same_logits(method, tmp_path):
    model, _ = with_lora(method)
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    torch.testing.assert_close(logits_of(loaded), logits_of(model), atol=1e-5, rtol=1e-5)
    assert not adapters.adapted(loaded.backbone.lm)


@GPT2_LORA
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "gemma3"])  # tied and untied, Conv1D, scaled embeddings
def test_plain_transformers_reads_a_lora_folder_with_the_updates_merged(arch, tmp_path):
    model, _ = with_lora(arch=arch)
    folder = saved(model, tmp_path / "run")
    assert "adapter_config.json" not in contents(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert type(lm) is type(tiny_lm(arch))
    ours = text_logits(model.backbone.lm, model.tokenizer)
    torch.testing.assert_close(text_logits(lm, model.tokenizer), ours, atol=1e-5, rtol=1e-5)


def test_lora_on_a_bfloat16_model_is_saved_as_bfloat16(tmp_path):
    model = tiny_model(Coconut()).to(torch.bfloat16)
    add_lora(model, {"r": 4})
    folder = saved(model, tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_lora_weights_are_kept_before_merging_too(tmp_path):
    model, _ = with_lora()
    stored = load_file(saved(model, tmp_path / "run") / "innerloop.safetensors")
    twin = tiny_model(Coconut())
    add_lora(twin, {"r": 4, "lora_alpha": 8})
    checkpoint.load_parts(twin, tmp_path / "run")
    assert sum(".lora_A." in name for name in stored) == 3 * 7
    assert torch.equal(logits_of(twin), logits_of(model))


def test_lora_can_be_put_on_a_loaded_model(tmp_path):
    model = moved(tiny_model(Coconut()))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), lora={"r": 2})
    assert adapters.adapted(loaded.backbone.lm)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("settings", [{"rank": 4}, {"r": 0}, {"r": 4, "target_modules": ["nope"]}])
def test_lora_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(InputError, match="lora"):
        add_lora(tiny_model(Coconut()), settings)


# Failures


def test_a_failed_save_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    before = contents(folder)

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"could not save to .*run: No space left on device; .* untouched"):
        moved(model).save_pretrained(folder)
    assert contents(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_save_that_fails_at_the_last_rename_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    before, rename = contents(folder), Path.rename

    def refuse(self, target):
        if self.name == ".run.writing":
            raise OSError("Stale file handle")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="untouched"):
        moved(model).save_pretrained(folder)
    assert folder.exists(), sorted(path.name for path in tmp_path.iterdir())
    assert contents(folder) == before


def test_a_save_replaces_the_whole_old_folder(tmp_path):
    model = tiny_model(Cot())
    folder = saved(model, tmp_path / "run")
    (folder / "stale.txt").write_text("from another time")
    saved(moved(model), folder)
    assert "stale.txt" not in contents(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_a_killed_save_left_behind_does_not_hinder_the_next(tmp_path):
    (tmp_path / ".run.writing").mkdir()
    (tmp_path / ".run.writing" / "half.txt").write_text("half")
    assert "half.txt" not in contents(saved(tiny_model(Cot()), tmp_path / "run"))


def test_saving_makes_missing_parents(tmp_path):
    assert saved(tiny_model(Cot()), tmp_path / "a" / "b" / "run").is_dir()


@pytest.fixture(scope="module")
def slr_folder(tmp_path_factory):
    return saved(tiny_model(Slr()), tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def broken(slr_folder, tmp_path):
    """A copy of a saved folder to break, and what loading it then says."""
    folder = tmp_path / "run"
    shutil.copytree(slr_folder, folder)

    def message() -> str:
        with pytest.raises(InputError) as caught:
            LatentModel.from_pretrained(folder)
        return str(caught.value)

    return folder, message


def test_a_folder_without_settings_is_no_run(broken):
    folder, message = broken
    (folder / "innerloop.json").unlink()
    assert "no innerloop.json" in message() and "give a method" in message()
    assert LatentModel.from_pretrained(folder, method=Cot()).method == Cot()


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"method": "slr"}', '{"method": {}}'])
def test_broken_settings_are_named(broken, text):
    folder, message = broken
    (folder / "innerloop.json").write_text(text)
    assert "innerloop.json" in message()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [("name", "slt", "did you mean 'slr'"), ("max_lops", 3, "another version"), ("alpha", 7.0, "between 0 and 1")],
)
def test_settings_that_no_method_has_are_refused(broken, field, value, expected):
    folder, message = broken
    settings = json.loads((folder / "innerloop.json").read_text())
    settings["method"][field] = value
    (folder / "innerloop.json").write_text(json.dumps(settings))
    assert expected in message()


def test_settings_written_before_a_field_existed_still_load_the_trained_parts(tmp_path):
    """A new field has a default; a run from before it must not lose its timestep table over that."""
    model = moved(tiny_model(Slr()))
    folder = saved(model, tmp_path / "run")
    settings = json.loads((folder / "innerloop.json").read_text())
    del settings["method"]["detach"]
    (folder / "innerloop.json").write_text(json.dumps(settings))
    loaded = LatentModel.from_pretrained(folder)
    assert loaded.method == model.method
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_parts_of_another_shape_are_refused(broken):
    folder, message = broken
    settings = json.loads((folder / "innerloop.json").read_text())
    settings["method"]["max_loops"] = 9
    (folder / "innerloop.json").write_text(json.dumps(settings))
    assert "does not fit" in message()


def test_parts_of_another_method_are_refused(broken):
    folder, message = broken
    settings = json.loads((folder / "innerloop.json").read_text())
    settings["method"]["time"] = "none"
    (folder / "innerloop.json").write_text(json.dumps(settings))
    assert "does not fit the method 'slr'" in message() and "time.table" in message()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_cut_parts_are_named(broken, damage):
    folder, message = broken
    parts = folder / "innerloop.safetensors"
    if damage == "missing":
        parts.unlink()
    else:
        parts.write_bytes(parts.read_bytes()[:20])
    assert "innerloop.safetensors" in message()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_or_cut_weights_are_refused(broken, damage):
    folder, message = broken
    weights = folder / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:2000])
    assert str(folder) in message()


def test_weights_with_a_hole_are_refused(broken):
    """Transformers fills a hole with random numbers and only logs it."""
    folder, message = broken
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "model.norm.weight" in message()


def test_a_missing_folder_is_named_with_its_nearest_neighbour(slr_folder):
    with pytest.raises(InputError, match=r"rum.*did you mean 'run'"):
        LatentModel.from_pretrained(slr_folder.with_name("rum"))


# From scratch


def test_from_scratch_is_set_by_its_seed():
    first, again, other = (from_scratch(LLAMA, chain_tokenizer(), Coconut(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.backbone.lm.lm_head.weight, other.backbone.lm.lm_head.weight)


def test_from_scratch_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    from_scratch(LLAMA, chain_tokenizer(), Cot())
    assert torch.equal(torch.rand(1), expected)


def test_from_scratch_takes_the_vocabulary_and_special_tokens_of_the_tokenizer():
    tokenizer = chain_tokenizer()
    n = len(tokenizer)
    model = from_scratch(LLAMA, tokenizer, Coconut())
    config = model.backbone.config
    assert config.vocab_size == n + 3 == model.backbone.lm.get_input_embeddings().weight.shape[0]
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 2, None)


def test_from_scratch_leaves_the_settings_as_they_were():
    settings = dict(LLAMA)
    from_scratch(settings, chain_tokenizer(), Cot())
    assert settings == LLAMA


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "lama"}, "did you mean 'llama'"),
        ({"type": "llama", "hiden_size": 32}, "a llama has no 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"type": "gpt2", "hiden_size": 32}, "a gpt2 has no 'hiden_size' (did you mean 'hidden_size'?)"),
        ({"type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 4}, "GPTNeoXForCausalLM has no 'norm'"),
        ({"type": "distilbert"}, "distilbert"),
        ({**LLAMA, "hidden_size": 33}, "33"),
        ({**LLAMA, "hidden_size": "wide"}, "hidden_size"),
        ({**LLAMA, "vocab_size": 100}, "vocab_size"),
    ],
)
def test_from_scratch_says_what_cannot_be(settings, expected):
    small = {"num_hidden_layers": 1, "intermediate_size": 8} if settings["type"] == "gpt_neox" else {}
    with pytest.raises(InputError) as caught:
        from_scratch({**settings, **small}, chain_tokenizer(), Cot())
    assert expected in str(caught.value)


def test_saving_into_a_folder_of_something_else_leaves_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    model = tiny_model(Slr(n_slots=2, max_loops=2))
    model.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    monkeypatch.chdir(tmp_path / "thesis")
    model.save_pretrained(".")
    assert LatentModel.from_pretrained(tmp_path / "thesis").method == model.method


def test_another_setting_of_the_same_method_keeps_the_trained_parts_that_fit(tmp_path: Path):
    model = tiny_model(Slr(n_slots=2, max_loops=3))
    model.loop.time.table.data.normal_()
    model.loop.rescale.tau.fill_(0.5)
    model.save_pretrained(tmp_path)
    longer = LatentModel.from_pretrained(tmp_path, Slr(n_slots=2, max_loops=5, step_weight=0.5))
    assert torch.equal(longer.loop.time.table[:3], model.loop.time.table)
    assert not longer.loop.time.table[3:].any()
    assert longer.loop.rescale.tau == 0.5
    shorter = LatentModel.from_pretrained(tmp_path, Slr(n_slots=2, max_loops=1))
    assert torch.equal(shorter.loop.time.table, model.loop.time.table[:1])
