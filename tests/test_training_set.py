"""What is trained on is read whole, and what cannot be too long is not laid out to see it."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from innerloop.methods import METHODS
from innerloop.text.examples import Example
from innerloop.train.training_set import may_exceed
from tests.models import from_scratch, tiny_model

TEXTS = st.text(st.sampled_from("0123 ;+-*ab\u00e9\u4f60\ufdfa\U0001f600"), min_size=1, max_size=12)
SHAPE = {"type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
EXAMPLES = st.lists(st.builds(Example, TEXTS, st.lists(TEXTS, max_size=4), TEXTS), min_size=1, max_size=6)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token a byte, after the most expanding of Unicode's normal forms."""
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.normalizer = normalizers.NFKD()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("name", METHODS)
def test_whatever_is_too_long_is_found_without_laying_out_the_rest(name):
    options = {"block_size": 1} if name == "loop_regularised" else {}  # of three layers
    model = from_scratch(SHAPE, byte_tokenizer(), METHODS[name](**options), 0)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(EXAMPLES, st.integers(10, 200))
    def finds(examples, limit):
        asked = list(may_exceed(model, examples, limit))
        for example in examples:
            if model.method.longest(example, model.encoder) > limit:
                assert example in asked

    finds()


def test_short_examples_are_not_laid_out(monkeypatch):
    model = tiny_model(METHODS["coconut"](), "llama")
    asked = []
    longest = type(model.method).longest
    monkeypatch.setattr(type(model.method), "longest", lambda *args: asked.append(args[1]) or longest(*args))
    short, long = (Example("1 + 2", ["1 + 2 = 3"] * 2, "3"), Example("1 + 2" * 40, ["3", "4"], "3"))
    assert list(may_exceed(model, [short] * 50 + [long], 90)) == [long]
    assert len(asked) == 1
