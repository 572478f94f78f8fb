"""Models whose weights are set by hand, so that it is known what their latents do.

The question names a digit among other words, and the answer is that digit. Channels of the width: a token's own, ten
for a digit that was *noted*, ten for a digit that is *said*, and a flag. Every layer has two heads: one with which some
positions note the digit of the question while the others look at its first word, and one that looks everywhere alike
and turns noted digits, or the question's, into said ones. The head of the model writes ``### D`` of the said digit.

    model, examples = built(Slr(n_slots=4, ...), LATENTS)
"""

from dataclasses import dataclass
from itertools import islice, product

import torch
from torch import Tensor

from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Method
from innerloop.tasks import Chain
from innerloop.text.examples import Example
from innerloop.text.row import EOL, EOT, LAT
from innerloop.text.tokenizer import train_tokenizer
from tests.models import from_scratch

TASK = Chain()  # for its check of answers alone
WORDS = ("a", "b", "c", "d", "e")
SINK = "q"
LOUD = 100.0


@dataclass(frozen=True)
class Built:
    """What the layers do, one after the other.

    Attributes:
        noting: who notes the digit of the question in each layer: everybody, latents, latent 3, or nobody.
        saying: what is turned into said digits in each layer: noted ones, the question's, or nothing.
    """

    noting: tuple[str, ...]
    saying: tuple[str, ...]


LATENTS = Built(("all",), ("noted",))  # noted in one pass, said in the next: nothing without a state that is fed back
QUESTION = Built(("nobody",), ("question",))  # the answer looks at the question itself
THIRD = Built(("latent 3",), ("noted",))
ROOM = Built(("latents", "nobody"), ("nothing", "noted"))  # noted and said in the same pass, by way of the latents


def digit_examples(n: int = 40) -> list[Example]:
    """Return examples with different questions, their digits in turn."""
    pairs = product(WORDS, WORDS, range(10))
    chosen = islice(((f"{SINK} {a} {d} {b}", str(d)) for a, b, d in pairs), n)
    return [Example(question, (f"{SINK} = {d}",), d, f"digit-{i}") for i, (question, d) in enumerate(chosen)]


def built(method: Method, what: Built, n: int = 40) -> tuple[LatentModel, list[Example]]:
    """Return a model of hand-set weights, and examples that it answers."""
    examples = digit_examples(n)
    tokenizer = train_tokenizer(digit_examples(100))
    n_layers = len(what.noting)
    settings = {"type": "gpt2", "num_hidden_layers": n_layers, "num_attention_heads": 2, "tie_word_embeddings": False}
    settings |= {"hidden_size": 128, "max_position_embeddings": 64, "activation_function": "relu"}
    model = from_scratch(settings, tokenizer, method).eval()
    with torch.no_grad():
        _set(model, what)
    return model, examples


def _set(model: LatentModel, what: Built) -> None:
    lm, encoder = model.backbone.lm, model.encoder
    vocab, width = lm.get_input_embeddings().weight.shape
    noted, said, flag = vocab, vocab + 10, vocab + 20
    assert flag < width - 1, "the vocabulary is too large for the width"
    for name, parameter in lm.named_parameters():
        parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
    lm.get_input_embeddings().weight.copy_(torch.eye(vocab, width))
    tokens = {word: model.tokenizer.convert_tokens_to_ids(word) for word in (LAT, EOT, EOL)}
    asked = [encoder.question(f"{SINK} a {d} a").ids for d in range(10)]
    column = next(i for i in range(len(asked[0])) if len({ids[i] for ids in asked}) == 10)
    digits, sink = [ids[column] for ids in asked], asked[0][0]

    half = width // 2
    for layer, noting, saying in zip(model.backbone.layers, what.noting, what.saying):
        query, key, value = (torch.zeros(width, width) for _ in range(3))
        bias = torch.zeros(3 * width)
        if noting != "all":  # head 0: those who note look at the digit, the others at the first word
            query_bias = bias[:width]
            query_bias[1] = LOUD
            key[digits, 0], key[sink, 1] = 1.0, 1.0
            who = {"latents": tokens[LAT], "latent 3": flag}.get(noting)
            if who is not None:
                query[who, 0], query[who, 1] = LOUD, -LOUD
        value[digits, range(10)] = 4.0  # head 0: what is noted
        if saying == "noted":  # head 1
            value[range(noted, noted + 10), range(half, half + 10)] = 4.0
        elif saying == "question":
            value[digits, range(half, half + 10)] = 4.0
        out = torch.zeros(width, width)
        out[range(10), range(noted, noted + 10)] = 1.0
        out[range(half, half + 10), range(said, said + 10)] = 1.0
        layer.attn.c_attn.weight.copy_(_balanced(torch.cat([query, key, value], dim=1)))
        layer.attn.c_attn.bias.copy_(bias)
        layer.attn.c_proj.weight.copy_(out)

    if model.loop.slots is not None:
        model.loop.slots.table[3, flag] = 1.0
    head: Tensor = lm.get_output_embeddings().weight
    answers = [encoder.answer(str(d)).ids for d in range(10)]
    mark, _, end = answers[0]
    for opening in {tokens[EOT], tokens[EOL]} & set(range(vocab)) - {model.tokenizer.unk_token_id}:
        head[mark, opening] = LOUD
    for d, (_, digit, _) in enumerate(answers):
        head[digit, said + d] = 1.0
        head[digit, mark] = head[end, digit] = LOUD
    head.copy_(_balanced(head.T).T)


def _balanced(weights: Tensor) -> Tensor:
    """Take off in the last channel, which nothing uses, what a layer norm adds to all channels alike."""
    weights = weights.clone()
    weights[-1] = -weights[:-1].sum(0)
    return weights
