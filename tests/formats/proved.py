"""What is asked of every format: logits, greedy answers alone and in a batch, and what is refused."""

from collections.abc import Callable

import torch
from torch import Tensor

from innerloop import Example, LatentModel
from tests.close import assert_close
from tests.formats import plain

QUESTIONS = ["How many?", "What is 3 + 4 of them, and why is it so?", "?"]
TOLERANCE = 1e-4
Slow = Callable[[list[int]], Tensor]


@torch.no_grad()
def check_logits(model: LatentModel, slow: Slow, sees: str = "past") -> None:
    """Compare the logits of the decoder itself with those written out from the authors' tensors."""
    backbone, ids = model.backbone, [7, 3, 40, 41, 9, 200, 5, 8]
    embeds = backbone.embed(torch.tensor([ids]))
    mask = backbone.mask_of(torch.ones(1, len(ids), dtype=torch.long), len(ids), None, embeds.dtype, sees)
    states = backbone(embeds, mask=mask, positions_BL=torch.arange(len(ids))[None])
    assert_close(backbone.head(states)[0], slow(ids), TOLERANCE)


@torch.no_grad()
def check_canvases(model: LatentModel, slow: Callable[[list[int], int], list[int]]) -> None:
    """Compare greedy answers, all together and each alone, with what a slow sampler makes of a prompt and the mask."""
    mask, end = model.method.mask_id(model.encoder), model.encoder.eos_id
    expected = [plain.cut(slow(list(row.ids()), mask), end) for row in model.prompts(QUESTIONS)]
    assert [plain.cut(one.ids, end) for one in model.generate(QUESTIONS)] == expected
    assert [plain.cut(model.generate([question])[0].ids, end) for question in QUESTIONS] == expected


ANSWERS = ["12", "a", "-3.5 or so"]


@torch.no_grad()
def check_thoughts(model: LatentModel, begin: Callable[[list[int]], Tensor], states: Slow, table: Tensor) -> None:
    """Compare logits of answers and greedy answers with what a slow decoder writes behind a slow thought.

    Args:
        model: thinks in latents.
        begin: returns what is read (L, D) for the ids of a question up to <bot>: the thought and <eot> at its end.
        states: of what is read (L, D), after the final norm.
        table: the embeddings, and the head.
    """
    examples = [Example(question, (), answer) for question, answer in zip(QUESTIONS, ANSWERS)]
    rows, end = model.rows(examples), model.encoder.eos_id
    banned = model.tokenizer.convert_tokens_to_ids([*model.method.markers])
    banned = [i for i in banned if i < len(table)]  # <lat> may be a row of ours
    expected, answers = [], []
    for row in rows:
        read = begin([i for span in row.prefix for i in span.ids])
        written = [i for span in row.suffix[1:] for i in span.ids]
        shown = states(torch.cat([read, table[written[:-1]]])) @ table.T
        expected.append(shown[len(read) - 1 :])
        ids: list[int] = []
        while len(ids) < 8 and end not in ids:
            logits = states(torch.cat([read, table[ids]]))[-1] @ table.T
            logits[banned] = -torch.inf
            ids.append(int(logits.argmax()))
        answers.append(ids)
    found = [logits[:, : len(table)] for logits in model.answer_logits(examples)]
    assert_close(found, expected, TOLERANCE)
    assert [one.ids for one in model.generate(QUESTIONS, max_new_tokens=8)] == answers
    assert [model.generate([question], max_new_tokens=8)[0].ids for question in QUESTIONS] == answers


@torch.no_grad()
def check_decoder(model: LatentModel, slow: Slow) -> None:
    """Compare logits of answers and greedy answers of a model that only writes with those of a slow one."""
    examples = [Example(question, (), answer) for question, answer in zip(QUESTIONS, ANSWERS)]
    end, expected, answers = model.encoder.eos_id, [], []
    for row in model.rows(examples):
        asked = [i for span in row.prefix for i in span.ids]
        written = [i for span in row.suffix for i in span.ids]
        expected.append(slow([*asked, *written])[len(asked) - 1 : -1])
        ids: list[int] = []
        while len(ids) < 8 and end not in ids:
            ids.append(int(slow([*asked, *ids])[-1].argmax()))
        answers.append(ids)
    assert_close(model.answer_logits(examples), expected, TOLERANCE)
    assert [one.ids for one in model.generate(QUESTIONS, max_new_tokens=8)] == answers
    assert [model.generate([question], max_new_tokens=8)[0].ids for question in QUESTIONS] == answers
