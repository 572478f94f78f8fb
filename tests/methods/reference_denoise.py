"""The plain samplers of llada.md and dream.md, section 6: one row, the whole canvas, every pass, no early end.

They draw what `Canvas` draws, by the number of the step, and share nothing else with it.
"""

import numpy as np
import torch


@torch.no_grad()
def logits_of(model, ids, shift, embeds=None):
    """Return the logits (L, V) of a row in which everything sees everything; ``embeds`` (L, D) in place of its own."""
    backbone, n = model.backbone, len(ids)
    embeds = backbone.embed(torch.tensor([ids])) if embeds is None else embeds[None]
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
        self.fillers = list(self.x)
        if method.noise.filler == "random":
            drawn = np.random.default_rng([*self.seed, 1, 1]).integers(0, len(model.tokenizer) - 1, len(self.x))
            self.fillers = [int(i) + (i >= self.mask) for i in drawn]
        self.fed = None  # with soft masks, the logits of the last pass and the tokens in it
        self.seen = len(self.x)  # how many places that pass saw

    def numbers(self, at):
        return np.random.default_rng([*self.seed, at]).random((3, len(self.x)))

    def read(self, ids):
        return logits_of(self.model, ids, self.method.shift, self.soft(ids))

    def predict(self, drawn):
        """Return the token and the probability of every place, and the distribution that tokens are drawn from."""
        n, w = len(self.prompt), self.sampler.guidance
        x = [f if i == self.mask else i for i, f in zip(self.x, self.fillers)]
        rows = self.prompt + x, [self.mask] * n + x
        logits = self.read(rows[0])[n:]
        other = self.read(rows[1])[n:] if w > 0 else None
        if self.model.soft is not None:
            self.fed = logits.clone(), list(self.x)
        if w > 0:
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

    @torch.no_grad()
    def soft(self, ids):
        """Return what a row is read as (L, D): the whole vocabulary is multiplied, one place at a time."""
        if self.fed is None:
            return None
        soft, first = self.model.soft, len(ids) - len(self.x)
        table = self.model.backbone.embed(torch.arange(len(self.model.tokenizer)))
        embeds = table[ids].clone()
        for g, (row, old) in enumerate(zip(self.fed[0].clone(), self.fed[1])):
            was_token = old != self.mask
            if self.x[g] != self.mask or g >= self.seen or (was_token and soft.settings.remasked == "drop"):
                continue
            if was_token and soft.settings.remasked == "carry":
                row[:], row[old] = -torch.inf, 0.0
            embeds[first + g] = softened(soft, table, row)
        return embeds

    def text(self):
        return self.x[: self.x.index(self.eos) + 1] if self.eos in self.x else self.x


def softened(soft, table, logits):
    """Return what a mask is read as (D,) after a pass that gave it some logits (V,), of soft_masked.md, section 3."""
    logits = logits.clone()
    logits[soft.mask_id] = -torch.inf
    p = logits.softmax(-1)
    lam = soft.scale * torch.sigmoid(soft.steepness * ((p * (p + 1e-10).log()).sum() - soft.centre))
    kept = torch.zeros_like(p).index_fill(0, p.topk(soft.settings.top_k or len(p)).indices, 1.0) * p
    return (1 - lam) * table[soft.mask_id] + lam * (kept / kept.sum()) @ table


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
        free = [g for g in range(method.gen_length) if plain.x[g] == plain.mask]
        is_last, share = i == steps - 1, 1 - grid[i + 1] / grid[i]
        if model.soft is not None and not _commits(sampler, free, drawn[1], share, is_last):
            continue  # a pass that is made changes what the next is fed
        tokens, probs = plain.predict(drawn[0])
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


def _commits(sampler, free, drawn, share, is_last):
    """Whether a step of Dream's commits anything."""
    if sampler.commit == "origin":
        return any(is_last or drawn[g] < share for g in free)
    return is_last or int(torch.tensor(float(len(free))) * share) > 0


def remdm(model, method, question, **options):
    """Return the canvas that ReMDM's cap fills; passes that commit nothing are not made."""
    plain = Plain(model, method, question, **options)
    steps, cap = method.sampler.steps, method.sampler.remask.cap
    for i in range(steps):
        drawn, before, after = plain.numbers(i), i / steps, (i + 1) / steps
        sigma = min(cap, 1.0 if i == 0 else (1 - after) / before)
        stay = ((1 - after) - sigma * before) / (1 - before)
        free = [g for g in range(method.gen_length) if plain.x[g] == plain.mask]
        kept = [g for g in free if drawn[1][g] >= stay]
        again = [g for g in range(method.gen_length) if g not in free and drawn[1][g] < sigma]
        if kept:
            tokens, _ = plain.predict(drawn[0])
        for g in kept:
            plain.x[g] = int(tokens[g])
        for g in again:
            plain.x[g] = plain.mask
    return plain
