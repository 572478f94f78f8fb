"""The word tokenizer: one id a word, and text that comes back as it was."""

import pytest

from innerloop.text.examples import Example
from innerloop.text.tokenizer import END, PAD, UNKNOWN, train_tokenizer
from tests.models import chain_examples

WORDS = Example("Tom has 12 cats; who's Tom_2?\nÜber-naïve, 50% (x*y)", ("12 + 3 = 15", "cats - 1"), "Tom's # 7")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS])


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_text_is_cut_into_words_digits_and_signs_with_the_space_before_them(tokenizer):
    assert pieces(tokenizer, "Tom has 12 cats;") == [" Tom", " has", " 1", "2", " cats", ";"]
    assert pieces(tokenizer, "cats - 1\n") == [" cats", " -", " 1", "\n"]


def test_a_run_of_number_signs_is_one_piece(tokenizer):
    assert pieces(tokenizer, "### 7") == [" ###", " 7"]


def test_a_word_has_one_id_wherever_it_stands(tokenizer):
    (first,), (*_, last) = tokenizer.encode("cats"), tokenizer.encode("has cats")
    assert first == last


@pytest.mark.parametrize(
    "text",
    [
        WORDS.question,
        *WORDS.steps,
        WORDS.answer,
        "",
        "1",
        "Tom",
        "\n",
        "cats\nTom has",
        "12 + 3 = 15\n",
        "(x*y)",
        "who's",
    ],
)
def test_known_text_comes_back_as_it_was(tokenizer, text):
    known = train_tokenizer([WORDS, Example(text, (), text)])
    assert known.decode(known.encode(text)) == text
    assert known.unk_token_id not in known.encode(text)


def test_every_question_step_and_answer_of_a_task_comes_back_as_it_was():
    examples = chain_examples(50)
    tokenizer = train_tokenizer(examples)
    for example in examples:
        for text in (example.question, *example.steps, "### " + example.answer):
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode(text + "\n")) == text + "\n"
            assert tokenizer.unk_token_id not in tokenizer.encode(text)


def test_spaces_before_signs_are_not_cleaned_away(tokenizer):
    known = train_tokenizer([Example("a , b . c ! do n't", (), "x")])
    assert known.decode(known.encode("a , b . c ! do n't")) == "a , b . c ! do n't"


def test_an_unknown_word_is_unknown_and_the_rest_is_not(tokenizer):
    assert pieces(tokenizer, "Tom zebra cats") == [" Tom", UNKNOWN, " cats"]


def test_the_special_tokens_come_first_and_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.convert_tokens_to_ids([PAD, UNKNOWN, END]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("Tom", add_special_tokens=True) == tokenizer.encode("Tom", add_special_tokens=False)


def test_the_vocabulary_keeps_the_commonest_pieces():
    examples = [Example("common rare", (), "common")] + [Example("common", (), "common")] * 3
    tokenizer = train_tokenizer(examples, vocab_size=5)
    assert len(tokenizer) == 5
    assert " common" in tokenizer.get_vocab() and " rare" not in tokenizer.get_vocab()


def test_training_again_gives_the_same_vocabulary():
    examples = chain_examples(50)
    assert train_tokenizer(examples).get_vocab() == train_tokenizer(examples).get_vocab()
    assert train_tokenizer(iter(examples)).get_vocab() == train_tokenizer(examples).get_vocab()


def test_markers_added_later_are_one_token_each_and_change_nothing_else():
    tokenizer = train_tokenizer([WORDS])
    before = tokenizer.encode(WORDS.question)
    tokenizer.add_tokens(["<bot>", "<lat>"], special_tokens=True)
    assert tokenizer.encode(WORDS.question) == before
    n = len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(["<bot>", "<lat>"]) == [n - 2, n - 1]
    assert tokenizer.decode([n - 2, *before], skip_special_tokens=True) == WORDS.question


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    ids = tokenizer.encode(WORDS.question + "\n")
    assert loaded.encode(WORDS.question + "\n") == ids
    assert loaded.decode(ids) == WORDS.question + "\n"
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
