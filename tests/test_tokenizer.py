"""The word tokenizer: one id a word, and text that comes back as it was."""

import pytest

from innerloop.text.examples import Example
from innerloop.text.tokenizer import END, PAD, UNKNOWN, train_tokenizer
from tests.models import chain_examples

WORDS = Example("Tom has 12 cats; who's Tom_2?\nÜber-naïve, 50% (x*y)", ("12 + 3 = 15", "cats - 1"), "Tom's # 7")
TEXTS = ["", "1", "Tom", "\n", "cats\nTom has", "12 + 3 = 15\n", "(x*y)", "who's", "a , b . c ! do n't"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Tom has 12 cats;", [" Tom", " has", " 1", "2", " cats", ";"]),
        ("cats - 1\n", [" cats", " -", " 1", "\n"]),
        ("### 7", [" ###", " 7"]),
        ("Tom zebra cats", [" Tom", UNKNOWN, " cats"]),
        ("cats", [" cats"]),  # the same id wherever it stands
    ],
)
def test_text_is_cut_into_words_digits_and_signs_with_the_space_before_them(text, pieces, tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == pieces


@pytest.mark.parametrize("examples", [[WORDS], [Example(t, (), t) for t in TEXTS], chain_examples(50)], ids=len)
def test_known_text_comes_back_as_it_was(examples):
    known = train_tokenizer(examples)
    for example in examples:
        for text in (example.question, *example.steps, "### " + example.answer, example.answer + "\n"):
            assert known.decode(known.encode(text)) == text
            assert known.unk_token_id not in known.encode(text)


def test_the_special_tokens_come_first_and_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer.convert_tokens_to_ids([PAD, UNKNOWN, END]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("Tom", add_special_tokens=True) == tokenizer.encode("Tom", add_special_tokens=False)


def test_the_vocabulary_keeps_the_commonest_pieces_and_is_the_same_when_trained_again():
    examples = [Example("common rare", (), "common")] + [Example("common", (), "common")] * 3
    small = train_tokenizer(examples, vocab_size=5).get_vocab()
    assert len(small) == 5 and " common" in small and " rare" not in small
    examples = chain_examples(50)
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
