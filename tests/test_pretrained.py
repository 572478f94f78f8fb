"""The real model that `make pretrained` puts into models/smollm2-135m, under the methods."""

from pathlib import Path

import pytest
import torch

from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Coconut, Cot, Method, Slr
from innerloop.text.examples import Example
from tests.close import assert_close

FOLDER = Path(__file__).parents[1] / "models" / "smollm2-135m"
EXAMPLES = [
    Example("Tom has 3 cats with 4 legs each. How many legs is that?", ("<<3*4=12>>",), "12", "a"),
    Example(
        "Ann buys 2 books at 5 dollars and a pen at 1 dollar. What does she pay?",
        ("<<2*5=10>>", "<<10+1=11>>"),
        "11",
        "b",
    ),
]
METHODS = [Cot(), Coconut(max_stage=2, latents_per_step=2), Slr(n_slots=4, max_loops=2, lora="per_iter", lora_rank=4)]

pytestmark = [
    pytest.mark.pretrained,
    pytest.mark.skipif(not FOLDER.exists(), reason="models/smollm2-135m is not there: make pretrained"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_real_model_learns_answers_and_does_not_mind_its_neighbours(method: Method):
    model = LatentModel.from_pretrained(FOLDER, method, dtype=torch.float32)
    together = model.answer_logits(EXAMPLES)
    for example, logits in zip(EXAMPLES, together):
        assert_close(logits, model.answer_logits([example])[0], 2e-3)
    texts = [g.text for g in model.generate([e.question for e in EXAMPLES], max_new_tokens=6)]
    assert texts == [model.generate([e.question], max_new_tokens=6)[0].text for e in EXAMPLES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(4):
        loss = model.loss(EXAMPLES).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
