"""Dream and A2D as released, against a Qwen written out from the authors' tensors."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from innerloop import BlockDiffusion, LatentModel, Llada
from tests.formats import authors, plain
from tests.formats.proved import check_canvases, check_logits

pytestmark = pytest.mark.filterwarnings("ignore::innerloop.errors.InputNote")
N, BLOCK = 16, 8


def slow_logits(w, ids, sees=plain.sees_all):
    x = w["model.embed_tokens.weight"][ids]
    states = plain.qwen(w, x, authors.HEADS, 700.0, sees(len(ids)))
    return states @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders with their tensors by name."""
    root = tmp_path_factory.mktemp("qwen")
    makers = {"Dream-v0-Base-7B": authors.dream, "Qwen3-0.6B-diffusion-mdlm-v0.1": authors.a2d}
    makers["Qwen3-0.6B-diffusion-bd3lm-v0.1"] = authors.a2d
    names = ("dream", "mdlm", "bd3lm")
    return {name: (root / one, make(root / one)) for name, (one, make) in zip(names, makers.items())}


def opened(made, name, **changes):
    """The model, and with changes to its method once more with these."""
    model = LatentModel.from_pretrained(made[name][0], device="cpu")
    if not changes:
        return model
    return LatentModel.from_pretrained(made[name][0], method=replace(model.method, **changes), device="cpu")


@pytest.mark.parametrize("name", ["dream", "mdlm", "bd3lm"])
def test_logits_are_those_of_the_authors_tensors(made, name):
    check_logits(opened(made, name), lambda ids: slow_logits(made[name][1], ids), sees="all")


def test_dream_predicts_from_the_place_before_and_ranks_by_entropy(made):
    method, grid = opened(made, "dream").method, torch.linspace(1, 1e-3, N + 1)
    assert (method.shift, method.mask_token, method.sampler.commit) == (True, "<|mask|>", "entropy")
    left, counts = N, []
    for t, s in itertools.pairwise(grid):
        counts.append(left if s is grid[-1] or len(counts) == N - 1 else math.floor(left * (1 - s / t)))
        left -= counts[-1]

    def predict(ids):
        logits = slow_logits(made["dream"][1], ids)
        return torch.cat([logits[:1], logits[:-1]])

    slow = lambda p, mask: plain.fill(predict, p, N, mask, N, "entropy", counts)  # noqa: E731
    check_canvases(opened(made, "dream", gen_length=N), slow)


def test_mdlm_fills_the_whole_answer(made):
    assert isinstance(opened(made, "mdlm").method, Llada)
    predict = lambda ids: slow_logits(made["mdlm"][1], ids)  # noqa: E731
    check_canvases(opened(made, "mdlm", gen_length=N), lambda p, mask: plain.fill(predict, p, N, mask, N, "confidence"))


def test_bd3lm_fills_blocks_that_see_those_before(made):
    method = opened(made, "bd3lm").method
    assert (type(method), method.block_length) == (BlockDiffusion, 32)

    def slow(prompt, mask):
        block = (torch.arange(len(prompt) + N) - len(prompt)).div(BLOCK, rounding_mode="floor")
        sees = lambda n: block[:n] <= block[:n, None]  # noqa: E731
        return plain.fill(lambda ids: slow_logits(made["bd3lm"][1], ids, sees), prompt, N, mask, BLOCK, "confidence")

    check_canvases(opened(made, "bd3lm", gen_length=N, block_length=BLOCK), slow)
