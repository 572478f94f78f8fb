"""Plain block diffusion (block_diffusion.md, sections 2 and 4): no cache, one row, every pass reads all from the start.

They draw what `Canvas` draws, by the number of the step, and share nothing else with it.
"""

from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from tests.methods.reference_denoise import Plain, softened


def blocks_of(n_prompt, n, method):
    """Return the block of each of ``n`` positions."""
    size = method.block_length
    before = 0 if method.block_origin == "row" else (size - n_prompt % size) % size
    return [(before + k) // size for k in range(n)]


def states_of(model, ids, positions, seen, embeds=None):
    """Return the states of a row (L, D) in which place q sees place k where ``seen[q][k]``."""
    backbone = model.backbone
    embeds = backbone.embed(torch.tensor([ids])) if embeds is None else embeds[None]
    seen = torch.as_tensor(seen)[None, None]
    mask = torch.zeros(seen.shape, dtype=embeds.dtype).masked_fill(~seen, torch.finfo(torch.float32).min)
    kinds = set(getattr(backbone.config, "layer_types", None) or ())
    mask = {kind: mask for kind in kinds} if len(kinds) > 1 else mask
    return backbone(embeds, mask=mask, positions_BL=torch.tensor([positions]))[0]


def in_2l(model, row, method):
    """Return the loss of a row, not yet divided by what is counted, from one pass over [noised | clean]."""
    ids, n, hidden = row.ids(), len(row), row.noise.hidden
    fillers = dict(zip(hidden, row.noise.fillers or [method.mask_id(model.encoder)] * len(hidden)))
    noised = [fillers.get(k, i) for k, i in enumerate(ids)]
    block = blocks_of(row.region_start, n, method) * 2
    seen = [
        [
            (block[k] == block[q] if k < n else block[k] < block[q]) if q < n else k >= n and block[k] <= block[q]
            for k in range(2 * n)
        ]
        for q in range(2 * n)
    ]
    before = [place - method.shift for place in hidden]
    at = [k if block[k] == block[place] else k + n for k, place in zip(before, hidden)]  # a block before, as written
    table, embeds = model.backbone.lm.get_input_embeddings().weight, None  # padding has a gradient where it is fed
    for _ in range(method.soft.unroll if row.noise.soft else 0):
        with torch.no_grad():
            logits = model.backbone.head(states_of(model, noised + ids, [*range(n)] * 2, seen, embeds))[at]
        embeds = model.backbone.embed(torch.tensor(noised + ids))
        fed = [softened(model.soft, table, own) for own in logits]
        embeds = embeds.index_copy(0, torch.tensor(hidden), torch.stack(fed)) if fed else embeds
    logits = model.backbone.head(states_of(model, noised + ids, [*range(n)] * 2, seen, embeds))[at]
    return sum(w * cross_entropy(own, torch.tensor(ids[k])) for own, k, w in zip(logits, hidden, row.noise.weights))


class Blocks(Plain):
    """One question's canvas, of which the blocks up to ``end`` are read."""

    def __init__(self, model, method, question, **options):
        super().__init__(model, method, question, **options)
        n, G = len(self.prompt), method.gen_length
        blocks = blocks_of(n, n + G, method)[n:]
        self.edges = [k for k in range(G) if k == 0 or blocks[k] != blocks[k - 1]] + [G]
        self.steps = None if self.sampler.steps is None else self.sampler.steps // max(G // method.block_length, 1)
        self.end, self.most = 0, min(method.block_length, G)

    @torch.no_grad()
    def read(self, ids):
        n = len(self.prompt) + self.end
        blocks = blocks_of(len(self.prompt), n, self.method)
        seen = [[blocks[k] <= blocks[q] for k in range(n)] for q in range(n)]
        embeds = self.soft(ids)
        embeds = None if embeds is None else embeds[:n]
        logits = self.model.backbone.head(states_of(self.model, ids[:n], [*range(n)], seen, embeds))
        logits = torch.cat([logits[:1], logits[:-1]]) if self.method.shift else logits
        return torch.cat([logits, torch.zeros(len(ids) - n, logits.shape[1])])  # the rest is not there yet

    def predict(self, drawn):
        found = super().predict(drawn)
        self.seen = self.end
        return found

    def blocks(self):
        """Yield the number, the places and the counts of each block, until an end of sequence is written."""
        for b, (start, end) in enumerate(pairwise(self.edges)):
            self.end = end
            if self.eos in self.x[:start]:
                return
            size, steps = self.end - start, self.steps or self.most
            yield b, range(start, self.end), [size // steps + (i < size % steps) for i in range(steps)]

    def masks(self, places):
        return [g for g in places if self.x[g] == self.mask]


def counted(model, method, question, **options):
    """Fill each block by counts: the most confident, or random places; with a token a pass that is first-hitting."""
    plain = Blocks(model, method, question, **options)
    for b, places, counts in plain.blocks():
        for i, n in enumerate(counts):
            if n == 0:
                continue
            drawn = plain.numbers(b * len(counts) + i)
            tokens, probs = plain.predict(drawn[0])
            score = probs.gather(1, tokens[:, None])[:, 0].numpy().copy()
            if method.sampler.commit == "margin":
                score = probs.sort(-1, descending=True).values[:, :2].diff().neg()[:, 0].numpy()
            if method.sampler.commit == "entropy":
                score = torch.special.xlogy(probs, probs).sum(-1).numpy()
            if method.sampler.commit == "random":
                score = drawn[1]
            if method.sampler.eos == "last":
                score[tokens.numpy() == plain.eos] = 0
            for g in sorted(plain.masks(places), key=lambda g: (-round(score[g], 6), drawn[2][g]))[:n]:
                plain.x[g] = int(tokens[g])
    return plain


def first_hitting(model, method, question, **options):
    """Fill each block by the authors' sampler: t <- t u^(1 / masks), and one place at random, at that time."""
    plain = Blocks(model, method, question, **options)
    plain.times = []
    for b, places, _ in plain.blocks():
        t = 1.0
        for i in range(len(places)):
            masks, drawn = plain.masks(places), plain.numbers(b * plain.most + i)
            t *= np.random.default_rng([b, i]).random() ** (1 / len(masks))
            tokens, _ = plain.predict(drawn[0])
            hit = max(masks, key=lambda g: drawn[1][g])
            plain.x[hit] = int(tokens[hit])
            plain.times.append(t)
    return plain


def editing(model, method, question, **options):
    """Fill each block by a threshold, and overwrite what has become unlikely (LLaDA2.1)."""
    plain = Blocks(model, method, question, **options)
    sampler = method.sampler
    for _, places, _ in plain.blocks():
        n_full = 0
        while n_full < sampler.edit_passes:
            masks = plain.masks(places)
            n_full = 0 if masks else n_full + 1
            tokens, probs = plain.predict(plain.numbers(plain.nfe)[0])
            score = probs.gather(1, tokens[:, None])[:, 0].tolist()
            edits = [g for g in places if g not in masks and plain.x[g] != tokens[g] and score[g] >= sampler.edit]
            kept = [g for g in masks if score[g] >= sampler.threshold or score[g] == max(score[m] for m in masks)]
            for g in edits + kept:
                plain.x[g] = int(tokens[g])
            if not masks and not edits:
                break
    return plain


def remdm(model, method, question, **options):
    """Fill each block by ReMDM's cap; passes that commit nothing are not made."""
    plain = Blocks(model, method, question, **options)
    steps, cap = plain.steps or plain.most, method.sampler.remask.cap
    for b, places, _ in plain.blocks():
        for i in range(steps):
            drawn, before, after = plain.numbers(b * steps + i), i / steps, (i + 1) / steps
            sigma = min(cap, 1.0 if i == 0 else (1 - after) / before)
            stay = ((1 - after) - sigma * before) / (1 - before)
            masks = plain.masks(places)
            kept = [g for g in masks if drawn[1][g] >= stay]
            again = [g for g in places if g not in masks and drawn[1][g] < sigma]
            if kept:
                tokens, _ = plain.predict(drawn[0])
            for g in kept:
                plain.x[g] = int(tokens[g])
            for g in again:
                plain.x[g] = plain.mask
    return plain
