"""A small word-level tokenizer trained on a task's own text, for backbones made from scratch; names of tokens."""

from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from innerloop.phases.phase import phase
from innerloop.text.examples import ANSWER_PREFIX, Example

PAD, UNKNOWN, END = "<pad>", "<unk>", "<eos>"
# A word, one digit, a run of '#', or one other sign, each with the space before it; a newline stands alone.
PIECES = r" ?[^\W\d_]+| ?\d| ?#+| ?[^\w\s]| ?_|\s"


def token_names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return the tokens of ids; tables may have more rows than there are tokens, and such a row is its number."""
    return [f"<{i}>" if name is None else name for i, name in zip(ids, tokenizer.convert_ids_to_tokens([*ids]))]


def train_tokenizer(examples: Iterable[Example], vocab_size: int = 8192) -> PreTrainedTokenizerBase:
    """Train a tokenizer on the text of examples.

    Every text starts as if after a space, so a word has one id wherever it stands, and decoding gives the text back
    exactly as long as its pieces are known.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=[PAD, UNKNOWN, END], show_progress=False)
    texts = (
        text
        for example in examples
        for text in (f"{example.question}\n", *(f"{step}\n" for step in example.steps), ANSWER_PREFIX + example.answer)
    )
    with phase("training a tokenizer"):
        tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        clean_up_tokenization_spaces=False,
    )
