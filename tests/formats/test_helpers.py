"""Released weights that help to train another model: they tell steps, read along, or are followed."""

import pytest
import torch

from innerloop import Cot, InputError, LatentModel, LoopRegularised, Lotus, SimCot, Tah
from innerloop.text.examples import Example
from tests.formats.released import RELEASED
from tests.models import tiny_model

MIXED = [Example("How many?", ["a b"], "c"), Example("How many more?", ["b", "c"], "d e")]

pytestmark = [
    pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote"),
    pytest.mark.usefixtures("short_canvases"),
]


@pytest.fixture
def released(tmp_path):
    def write(name):
        RELEASED[name](tmp_path / name)
        return str(tmp_path / name)

    return write


def test_steps_are_told_to_a_decoder_that_was_released(released):
    folder = released("latent-tts-coconut")
    theirs = LatentModel.from_pretrained(folder, device="cpu").backbone.lm
    own = SimCot(latents_per_step=1, aux={"source": folder, "embed": "own"})
    told = LatentModel.from_pretrained(folder, method=own, device="cpu").step_decoder.own.lm
    assert all(torch.equal(p, q) for p, q in zip(told.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["Ouro-1.4B", "TaH-plus-1.7B", "LLaDA-8B"])
def test_a_decoder_that_is_no_model_by_itself_tells_no_steps(released, name):
    with pytest.raises(
        InputError, match=r"is no model by itself, as '\w+' (repeats|fills).*: choose one that writes text"
    ):
        tiny_model(SimCot(latents_per_step=1, aux={"source": released(name), "embed": "own"}))


def test_an_ordinary_decoder_tells_steps_however_it_was_trained(tmp_path):
    model = tiny_model(LoopRegularised(block_size=1))
    model.save_pretrained(tmp_path / "run")
    told = tiny_model(SimCot(latents_per_step=1, aux={"source": str(tmp_path / "run"), "embed": "own"}))
    theirs = model.backbone.lm.get_input_embeddings().weight
    assert torch.equal(told.step_decoder.own.lm.get_input_embeddings().weight, theirs)


def test_a_released_model_reads_along(released):
    folder = released("Ouro-1.4B")
    theirs = LatentModel.from_pretrained(folder, device="cpu")
    method = Tah(iterate="oracle", oracle={"reference": folder})
    model = LatentModel.from_pretrained(folder, method=method, device="cpu")
    batch = model.batch(model.rows(MIXED, None))
    assert torch.equal(model.reference.logits(batch), torch.cat(theirs.answer_logits(MIXED)))


@pytest.mark.parametrize(
    ("name", "does"), [("latent-tts-coconut", "thinks in latents first"), ("LLaDA-8B", "fills canvases")]
)
def test_what_does_not_read_text_as_it_is_written_is_no_reference(released, name, does):
    folder = released(name)
    model = LatentModel.from_pretrained(folder, method=Cot(), device="cpu")
    tah = LatentModel(model.backbone, model.tokenizer, Tah(iterate="oracle", oracle={"reference": folder}))
    with pytest.raises(InputError, match=f"cannot read along what was written, as '.*' {does}: choose a run that"):
        tah.reference.model  # noqa: B018


def test_states_of_a_decoder_that_is_no_model_by_itself_are_not_followed(released, tmp_path):
    folder = released("Ouro-1.4B")
    model = LatentModel.from_pretrained(folder, method=Lotus(hid={"weight": 1.0, "teacher": folder}), device="cpu")
    with pytest.raises(InputError, match="is no model by itself, as 'looped' repeats or skips its layers"):
        model.load_teacher()
