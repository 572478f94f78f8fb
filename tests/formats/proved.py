"""What is asked of every format: logits, greedy answers alone and in a batch, and what is refused."""

from collections.abc import Callable

import torch
from torch import Tensor

from innerloop import LatentModel
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
