"""What is added to a backbone: markers in its vocabulary, and low-rank updates that are saved merged and unmerged."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from innerloop import Coconut, Cot, InputError, LatentModel, Pause, Slr
from innerloop.decoder import adapters
from innerloop.decoder.adapters import add_lora, add_markers, merged_state
from innerloop.decoder.backbone import Backbone
from innerloop.model import checkpoint
from tests.close import assert_close
from tests.models import (
    SPELLED,
    answers_of,
    chain_examples,
    moved,
    saved,
    spelled_tokenizer,
    text_logits,
    tiny_lm,
    tiny_model,
)

EXAMPLES = list(chain_examples(3))
GPT2_LORA = pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft tells that it adapts to GPT-2's Conv1D


# Markers


IDS = [13, 14, 15]  # of <bot>, <lat> and <eot>, which come after the known words


def marked(
    n_known: int = IDS[0], init="token", twice: bool = False, **changes
) -> tuple[torch.Tensor, torch.Tensor, Backbone]:
    """Add the markers to a model that knows some words; return its table before and after, and the backbone."""
    tokenizer = spelled_tokenizer(n_known=n_known)
    backbone = Backbone(tiny_lm(**{"vocab_size": len(tokenizer), **changes}))
    before = backbone.lm.get_input_embeddings().weight.detach().clone()
    for _ in range(1 + twice):
        add_markers(backbone, tokenizer, Coconut().markers, init)
    assert n_known < IDS[0] or tokenizer.convert_tokens_to_ids(["<bot>", "<lat>", "<eot>"]) == IDS
    return before, backbone.lm.get_input_embeddings().weight.detach(), backbone


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("twice", [False, True])  # added again, markers change nothing
def test_new_markers_are_copies_of_the_row_of_double_angle(tied, twice):
    before, after, backbone = marked(tie_word_embeddings=tied, twice=twice)
    for table in (after, backbone.lm.get_output_embeddings().weight):
        assert table.shape[0] == 16 == backbone.config.vocab_size
        assert all(torch.equal(table[i], table[SPELLED.index("<<")]) for i in IDS)
    assert torch.equal(after[:13], before)


def test_markers_take_rows_that_a_padded_vocabulary_has_to_spare():
    before, after, _ = marked(vocab_size=20)
    assert after.shape[0] == 20 and torch.equal(after[16:], before[16:])
    assert all(torch.equal(after[i], before[SPELLED.index("<<")]) for i in IDS)


@pytest.mark.parametrize(("n_known", "init"), [(SPELLED.index("<<"), "token"), (IDS[0], "normal")])
def test_new_markers_may_be_drawn_around_the_mean_row_the_same_each_time(n_known, init):
    """Without a double angle they are."""
    (old, after, _), (_, again, _) = marked(n_known, init), marked(n_known, init)
    new = after[n_known:]
    assert torch.equal(after, again) and len({tuple(row.tolist()) for row in new}) == 3
    assert ((new - old.mean(0)).abs() <= 5 * old.std(0)).all()


def test_new_markers_may_start_as_the_mean_row():
    old, after, _ = marked(init="mean")
    assert torch.equal(after[13:], old.mean(0).expand(3, -1))


# LoRA


def trained(model: LatentModel, n_steps: int = 3, learning_rate: float = 0.1) -> LatentModel:
    """Take a few steps on what is trainable."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], learning_rate)
    for _ in range(n_steps):
        optimizer.zero_grad()
        model.loss(EXAMPLES).loss.backward()
        optimizer.step()
    return model


def with_lora(method=None, arch: str = "llama", **changes) -> tuple[LatentModel, dict[str, torch.Tensor]]:
    """Return a model with trained LoRA, and the base weights it was put on."""
    model = tiny_model(method or Coconut(), arch, **changes)
    base = {name: tensor.clone() for name, tensor in model.backbone.lm.state_dict().items()}
    add_lora(model.backbone, model.marker_ids(), {"r": 4, "lora_alpha": 8})
    return trained(model).eval(), base


def base_weights(model: LatentModel) -> dict[str, torch.Tensor]:
    """Return the frozen weights under the base model's names."""
    state = model.backbone.lm.state_dict()
    plain = {name.replace(".token_adapter", "").replace(".base_layer", ""): t for name, t in state.items()}
    return {name: tensor for name, tensor in plain.items() if ".lora" not in name}


@GPT2_LORA
@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_only_the_rows_of_the_markers_train(arch):
    model = tiny_model(Pause(), arch)  # reads all its markers
    ids = torch.arange(len(model.tokenizer))[None]
    before = model.backbone.embed(ids)[0].detach()
    add_lora(model.backbone, model.marker_ids(), {"r": 4})
    trained(model)
    after = model.backbone.embed(ids)[0].detach()
    has_moved = (before != after).any(dim=1)
    assert ids[0][has_moved].tolist() == model.tokenizer.convert_tokens_to_ids(["<bot>", "<lat>", "<eot>"])


def test_a_method_without_markers_trains_no_row_and_its_own_parts_train_beside_lora():
    model, _ = with_lora(Cot())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    model, _ = with_lora(Slr())
    assert model.loop.time.table.requires_grad and model.loop.time.table.abs().max() > 0


@GPT2_LORA
@pytest.mark.parametrize("method", [Cot(), Coconut()], ids=lambda m: m.name)
def test_training_and_merging_leave_the_base_weights_and_the_model_bit_for_bit_as_they_were(arch, method):
    model, base = with_lora(method, arch)
    now = base_weights(model)
    assert now.keys() == base.keys() and all(torch.equal(now[name], base[name]) for name in base)
    before, logits = {name: t.clone() for name, t in model.backbone.lm.state_dict().items()}, answers_of(model)
    merged = merged_state(model.backbone.lm)
    after = model.backbone.lm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(answers_of(model), logits)
    assert merged.keys() == base.keys()
    assert any(not torch.equal(merged[name], base[name]) for name in base)


@GPT2_LORA
@pytest.mark.parametrize("method", [Cot(), Coconut(), Slr()], ids=lambda m: m.name)
def test_a_saved_lora_run_gives_the_same_logits(method, tmp_path):
    model, _ = with_lora(method)
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert_close(answers_of(loaded), answers_of(model))
    assert not adapters.adapted(loaded.backbone.lm)


@GPT2_LORA
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3", "gemma3"])  # tied and untied, Conv1D, scaled embeddings
def test_plain_transformers_reads_a_lora_folder_with_the_updates_merged(arch, tmp_path):
    model, _ = with_lora(arch=arch)
    folder = saved(model, tmp_path / "run")
    assert not (folder / "adapter_config.json").exists()
    lm = AutoModelForCausalLM.from_pretrained(folder)
    assert type(lm) is type(tiny_lm(arch))
    ours = text_logits(model.backbone.lm, model.tokenizer)
    assert_close(text_logits(lm, model.tokenizer), ours)


def test_lora_on_a_bfloat16_model_is_saved_as_bfloat16(tmp_path):
    model = tiny_model(Coconut()).to(torch.bfloat16)
    add_lora(model.backbone, model.marker_ids(), {"r": 4})
    folder = saved(model, tmp_path / "run")
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_lora_weights_are_kept_before_merging_too(tmp_path):
    model, _ = with_lora()
    stored = load_file(saved(model, tmp_path / "run") / "innerloop.safetensors")
    twin = tiny_model(Coconut())
    add_lora(twin.backbone, twin.marker_ids(), {"r": 4, "lora_alpha": 8})
    checkpoint.load_parts(twin, tmp_path / "run")
    assert sum(".lora_A." in name for name in stored) == 3 * 7
    assert torch.equal(answers_of(twin), answers_of(model))


@GPT2_LORA
def test_new_lora_on_a_loaded_model_changes_no_logit(arch, tmp_path):
    model = moved(tiny_model(Coconut(), arch))
    loaded = LatentModel.from_pretrained(saved(model, tmp_path / "run"), lora={"r": 2})
    assert adapters.adapted(loaded.backbone.lm)
    assert torch.equal(answers_of(loaded), answers_of(model))


@pytest.mark.parametrize("settings", [{"rank": 4}, {"r": 0}, {"r": 4, "target_modules": ["nope"]}])
def test_lora_settings_that_cannot_be_are_refused(settings):
    model = tiny_model(Coconut())
    with pytest.raises(InputError, match="lora"):
        add_lora(model.backbone, model.marker_ids(), settings)
