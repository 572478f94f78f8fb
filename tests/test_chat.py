"""Questions as turns of a chat: where a model has a template for it, in answering, training and after loading again."""

import re
import warnings
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from innerloop import Cot, InputError, LatentModel, Slr
from innerloop.errors import UnreadWarning
from innerloop.text.row import Kind
from innerloop.train.recipe import parse_recipe
from innerloop.train.run import run_recipe
from tests.models import saved, tiny_model

TEMPLATE = "{% for m in messages %}<unk>{{ m.content }}<pad>{% endfor %}{% if add_generation_prompt %}= {% endif %}"


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """A plain model's folder that has a chat template."""
    folder = tmp_path / "chatty"
    model = tiny_model(Cot())
    model.backbone.lm.save_pretrained(folder)
    model.tokenizer.chat_template = TEMPLATE
    model.tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, method=None, **options) -> LatentModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadWarning)
        return LatentModel.from_pretrained(folder, method, **options)


def test_a_question_is_a_turn_where_there_is_a_template(chatty: Path):
    with pytest.warns(UnreadWarning, match="is asked through its chat template; chat: false asks bare questions"):
        model = LatentModel.from_pretrained(chatty, Cot())
    asked = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 ; + 4"}], add_generation_prompt=True, return_dict=False
    )
    span = model.encoder.question("3 ; + 4")
    assert list(span.ids) == list(asked) and span.kind is Kind.QUESTION and not span.supervised
    assert model.tokenizer.unk_token_id == span.ids[0]


def test_a_special_token_in_a_question_is_no_turn(chatty: Path):
    model = load(chatty, Cot())
    with pytest.warns(match="read letter by letter"):
        ids = model.encoder.question("3 <pad> 4").ids
    assert ids.count(model.tokenizer.pad_token_id) == 1  # the template's own


@pytest.mark.parametrize("chat", [False, "auto"])
def test_bare_questions_are_as_ever(chatty: Path, chat):
    plain = tiny_model(Cot())
    if chat == "auto":
        tokenizer = AutoTokenizer.from_pretrained(chatty)
        tokenizer.chat_template = None
        (chatty / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(chatty)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LatentModel.from_pretrained(chatty, Cot(), chat=chat)
    assert model.encoder.question("3 ; + 4").ids == plain.encoder.question("3 ; + 4").ids


def test_a_run_is_asked_as_it_was_trained(chatty: Path, tmp_path: Path):
    recipe = parse_recipe({
        "task": {"name": "chain", "n_ops": 2, "modulus": 5, "n_train": 8, "n_valid": 4, "n_test": 4},
        "backbone": {"model": str(chatty), "chat": True},
        "method": {"name": "slr", "n_slots": 2, "max_loops": 2},
        "train": {"max_steps": 1, "batch_size": 4, "use_cpu": True},
        "out": str(tmp_path / "run"),
    })  # fmt: skip
    with pytest.warns(UnreadWarning, match="chat template"):
        run_recipe(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LatentModel.from_pretrained(tmp_path / "run")
    assert model.encoder.wording.chat and model.encoder.wording.question_end == "<pad>= "
    assert model.encoder.question("3 ; + 4").ids == load(chatty, Slr()).encoder.question("3 ; + 4").ids
    with pytest.raises(InputError, match="was trained in a chat: leave chat out"):
        LatentModel.from_pretrained(tmp_path / "run", chat=False)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "chat is true, but the model has no chat template"),
        ("{{ raise_exception('no') }}", "does not show a question as it is (no)"),
        ("hello", "does not show a question as it is: set chat to false"),
    ],
)
def test_what_is_no_chat_is_refused(tmp_path: Path, template, words: str):
    model = tiny_model(Cot())
    model.backbone.lm.save_pretrained(tmp_path)
    model.tokenizer.chat_template = template
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape(words)):
        LatentModel.from_pretrained(tmp_path, Cot(), chat=True)


def test_a_run_of_bare_questions_is_no_chat(tmp_path: Path):
    folder = saved(tiny_model(Cot()), tmp_path / "run")
    with pytest.raises(InputError, match="was trained without a chat: leave chat out"):
        LatentModel.from_pretrained(folder, chat=True)
    assert not LatentModel.from_pretrained(folder, chat=False).encoder.wording.chat
