"""The plain samplers of llada.md and dream.md, section 6: one row, the whole canvas, every pass, no early end.

They draw what `Canvas` draws, by the number of the step, and share nothing else with it.
"""

import numpy as np
import torch


@torch.no_grad()
def logits_of(model, ids, shift):
    """Return the logits (L, V) of a row in which everything sees everything."""
    backbone, n = model.backbone, len(ids)
    embeds = backbone.embed(torch.tensor([ids]))
    mask = backbone.mask_of(torch.ones(1, n, dtype=torch.long), n, 0, embeds.dtype, "all")
    logits = backbone.head(backbone(embeds, mask=mask, positions_BL=torch.arange(n)[None]))[0]
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


class Plain:
    """One question's canvas, and what is read of it."""

    def __init__(self, model, method, question, index=0, seed=0, temperature=0.0):
        self.model, self.method, self.sampler, self.temperature = model, method, method.sampler, temperature
        self.prompt, self.seed = model.prompts([question])[0].ids(), [seed, index, 0]
        self.mask, self.eos, self.nfe = method.mask_id(model.encoder), model.encoder.eos_id, 0
        self.x = [self.mask] * method.gen_length

    def numbers(self, at):
        return np.random.default_rng([*self.seed, at]).random((3, len(self.x)))

    def predict(self, drawn):
        """Return the token and the probability of every place, and the distribution that tokens are drawn from."""
        n, w = len(self.prompt), self.sampler.guidance
        logits = logits_of(self.model, self.prompt + self.x, self.method.shift)[n:]
        if w > 0:
            other = logits_of(self.model, [self.mask] * n + self.x, self.method.shift)[n:]
            logits = other + (1 + w) * (logits - other)
        self.nfe += 2 if w > 0 else 1
        logits[:, self.mask] = -torch.inf
        if self.sampler.eos == "never":
            logits[:, self.eos] = -torch.inf
        plain = logits.double().softmax(-1)
        if self.temperature == 0:
            return logits.argmax(-1), plain
        tempered = (logits.double() / self.temperature).softmax(-1)
        if self.sampler.top_p < 1:
            for row in tempered:
                order = row.argsort(descending=True)
                before = row[order].cumsum(0) - row[order]
                row[order[before >= self.sampler.top_p]] = 0
            tempered /= tempered.sum(-1, keepdim=True)
        tokens = [int(np.searchsorted(p.cumsum(0).numpy(), u, side="right")) for p, u in zip(tempered, drawn)]
        return torch.tensor(tokens), tempered if self.sampler.is_tempered else plain

    def text(self):
        return self.x[: self.x.index(self.eos) + 1] if self.eos in self.x else self.x


def llada(model, method, question, **options):
    """Return the canvas that llada.md's low-confidence or random remasking fills, and its passes."""
    plain = Plain(model, method, question, **options)
    sampler, length = method.sampler, method.gen_length
    block = sampler.block_length or length
    steps = (sampler.steps or length) // (length // block)
    for b in range(length // block):
        counts = [block // steps + (i < block % steps) for i in range(steps)]
        for i, n in enumerate(counts):
            if n == 0:
                continue
            drawn = plain.numbers(b * steps + i)
            tokens, probs = plain.predict(drawn[0])
            score = probs.gather(1, tokens[:, None])[:, 0].numpy().copy()
            if sampler.eos == "last":
                score[tokens.numpy() == plain.eos] = 0
            if sampler.commit == "random":
                score = drawn[1]
            free = [g for g in range((b + 1) * block) if plain.x[g] == plain.mask]
            for g in sorted(free, key=lambda g: (-round(score[g], 6), drawn[2][g]))[:n]:
                plain.x[g] = int(tokens[g])
    return plain


def threshold(model, method, question, **options):
    """Return the canvas that the threshold rule fills (Fast-dLLM)."""
    plain = Plain(model, method, question, **options)
    block = method.sampler.block_length or method.gen_length
    for start in range(0, method.gen_length, block):
        while free := [g for g in range(start, start + block) if plain.x[g] == plain.mask]:
            tokens, probs = plain.predict(plain.numbers(plain.nfe)[0])
            score = probs.gather(1, tokens[:, None])[:, 0].tolist()
            best = max(free, key=lambda g: score[g])
            for g in free:
                if g == best or score[g] >= method.sampler.threshold:
                    plain.x[g] = int(tokens[g])
    return plain


def dream(model, method, question, **options):
    """Return the canvas that one of Dream's four rules fills, passes that commit nothing among them."""
    plain = Plain(model, method, question, **options)
    sampler = method.sampler
    steps = sampler.steps or method.gen_length
    grid = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        drawn = plain.numbers(i)
        tokens, probs = plain.predict(drawn[0])
        free = [g for g in range(method.gen_length) if plain.x[g] == plain.mask]
        is_last, share = i == steps - 1, 1 - grid[i + 1] / grid[i]
        if sampler.commit == "origin":
            kept = [g for g in free if is_last or drawn[1][g] < share]
        else:
            score = probs.gather(1, tokens[:, None])[:, 0]
            if sampler.commit == "margin":
                top = probs.sort(-1, descending=True).values
                score = top[:, 0] - top[:, 1]
            if sampler.commit == "entropy":
                score = torch.special.xlogy(probs, probs).sum(-1)
            if sampler.position_temperature > 0:
                score = score / sampler.position_temperature - torch.from_numpy(np.log(-np.log(drawn[1])))
            n = len(free) if is_last else int(torch.tensor(float(len(free))) * share)
            kept = sorted(free, key=lambda g: -float(score[g]))[:n]
        for g in kept:
            plain.x[g] = int(tokens[g])
    return plain
