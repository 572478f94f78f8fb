"""An exact denoiser without training: the marginals of all 576 Latin squares of order 4 that fit what is committed.

Token 0 is the mask, 1 the end of sequence, 2 to 5 the symbols.
"""

import numpy as np
import torch

from innerloop.engine.canvases import propose
from innerloop.methods.denoise.canvas import Canvas
from innerloop.tasks.latin import solutions

SQUARES = np.array(solutions([0] * 16, 4, 999))
ONE_HOT = np.eye(4)[SQUARES - 1].reshape(576, 64)
VALID = {tuple(square) for square in (SQUARES + 1).tolist()}


def marginals(tokens_RG, noise=0.0):
    """Return (R, 16, 4): with noise, squares that do not fit count exp(-3) a mismatch, and symbols are mixed."""
    known = np.zeros((len(tokens_RG), 16, 4))
    rows, cells = np.nonzero(tokens_RG >= 2)
    known[rows, cells, tokens_RG[rows, cells] - 2] = 1
    mismatches = (tokens_RG >= 2).sum(1, keepdims=True) - known.reshape(-1, 64) @ ONE_HOT.T
    fits = np.exp(-3 * mismatches) if noise else (mismatches < 0.5).astype(float)
    fits[fits.sum(1) == 0] = 1.0
    shares = ((fits @ ONE_HOT) / fits.sum(1, keepdims=True)).reshape(-1, 16, 4)  # counts, so that ties are exact
    return (1 - noise) * shares + noise / 4


def fill(sampler, n, temperature=1.0, noise=0.0, clues=0, seed=0):
    """Fill ``n`` canvases, ``clues`` cells of each given; return them."""
    canvases = [Canvas(sampler, 16, 0, 1, [seed, i]) for i in range(n)]
    rng = np.random.default_rng(seed)
    for canvas in canvases if clues else ():
        cells = rng.choice(16, clues, replace=False)
        canvas.start_from(cells, SQUARES[rng.integers(576), cells] + 1)
    while live := [canvas for canvas in canvases if not canvas.is_done]:
        asked = [canvas.asked() for canvas in live]
        rows, cells = np.repeat(np.arange(len(live)), [len(a) for a in asked]), np.concatenate(asked)
        shares = marginals(np.stack([canvas.tokens_G for canvas in live]), noise)[rows, cells]
        logits = torch.full((len(rows), 6), -torch.inf)
        logits[:, 2:] = torch.from_numpy(shares).clamp(min=1e-30).log().float()
        drawn = torch.from_numpy(np.stack([canvas.drawn() for canvas in live])[rows, :, cells])
        tokens, scores = (x.numpy() for x in propose(logits, sampler, temperature, drawn[:, 0], drawn[:, 2]))
        for canvas, end, own in zip(live, np.cumsum([len(a) for a in asked]), asked):
            canvas.commit(tokens[end - len(own) : end], scores[end - len(own) : end])
    return canvases


def is_valid(canvas):
    return tuple(canvas.tokens_G.tolist()) in VALID
