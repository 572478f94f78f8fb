import pytest

from innerloop.errors import InputError
from innerloop.tasks import Gsm8k

EQUATIONS = [("<<1.5*2=3>>", "<<3+2.5=5.5>>", "<<1.5+3+5.5=10>>"), ("<<30/100*2000=600>>", "<<2000-600=1400>>")]
TEXT = [
    (
        "The second dog eats 1.5 x 2 = 3 cups of dog food.",
        "The third dog eats 3 + 2.5 = 5.5 cups.",
        "So, Hannah should prepare 1.5 + 3 + 5.5 = 10 cups.",
    ),
    ("The discount on the ticket is 30/100 * $2000 = $600.", "So Travis needs to pay $2000 - $600 = $1400."),
]


@pytest.mark.parametrize("steps, expected, folder", [("equations", EQUATIONS, "gsm8k_eq"), ("text", TEXT, "gsm8k_nl")])
def test_original_rows(fixtures, request, steps, expected, folder):
    examples = Gsm8k(train=str(fixtures / "gsm8k_original.jsonl"), steps=steps).examples("train")
    assert [e.steps for e in examples] == expected
    assert [e.answer for e in examples] == ["10", "1400"]
    assert [e.id for e in examples] == ["gsm8k_original-1", "gsm8k_original-2"]
    shared_data = request.getfixturevalue("shared_data")
    converted = {e.question: e for e in Gsm8k(valid=str(shared_data / folder / "valid.jsonl")).examples("valid")}
    for example in examples:
        same = converted[example.question]
        assert (same.steps, same.answer) == (example.steps, example.answer)


def test_aug_lines(fixtures):
    first, second = Gsm8k(test=str(fixtures / "gsm8k_aug.txt")).examples("test")
    assert first.question == "John cuts his grass to 2 inches. How much does he pay per year?"
    assert first.steps == ("<<4-2=2>>", "<<2/.5=4>>", "<<12/4=3>>", "<<100*3=300>>")
    assert (first.answer, second.answer, second.steps) == ("300", "2000", ())
    with pytest.raises(InputError, match=r"hold equations only: set task\.steps=equations"):
        Gsm8k(test=str(fixtures / "gsm8k_aug.txt"), steps="text").examples("test")


def test_broken_lines_are_named(tmp_path):
    aug = tmp_path / "train.txt"
    aug.write_text("q||<<1+1=2>> #### 2\nno bar #### 2\nq||<<1+1=2>> 2\nq||1+1=2 #### 2\nq||<<1+1=2>> ####\n")
    with pytest.raises(InputError) as caught:
        Gsm8k(train=str(aug)).examples("train")
    assert str(caught.value).splitlines() == [
        f"4 bad lines in {aug}:",
        "  line 2: no '||': a line must be 'question||steps #### answer'",
        "  line 3: no '####': a line must be 'question||steps #### answer'",
        "  line 4: the chain is not made of <<...>> alone: 1+1=2",
        "  line 5: 'answer' is empty",
    ]
    original = tmp_path / "train.jsonl"
    original.write_text('{"question": "q", "answer": "so it is 4"}\n')
    with pytest.raises(InputError, match="line 1: the solution has no '#### ANSWER', and the row has no 'steps'"):
        Gsm8k(train=str(original)).examples("train")


def test_options():
    assert Gsm8k().max_new_tokens == Gsm8k.max_new_tokens == 64
    assert Gsm8k(steps="text").max_new_tokens == 256
    with pytest.raises(InputError, match="steps is words, but must be one of equations, text"):
        Gsm8k(steps="words")
    with pytest.raises(InputError, match="match is float, but must be one of number, string"):
        Gsm8k(match="float")
