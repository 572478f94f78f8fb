"""LOTUS and LOTUS-aux as their card writes them: uncached passes of the bare model, one row at a time (lotus.md).

    slow = LotusReference(model)
    slow.terms(examples, stages)["step"], slow.loss(examples, stages), slow.run(question, stage)

Shapes: `L` positions, `N` latents, `D` width, `V` vocabulary, `c` latents of a block, `n` tokens of a step.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop import Example
from tests.methods.reference import Reference, Thoughts
from tests.methods.reference_codi import kd, states_at


@dataclass
class Run:
    """The passes t = 0..R over the latents: their inputs (N, D), and the states (1 + N, D) and logits (1 + N, V) of
    <bot> and the latents. ``last`` is the input (N, D) of the pass that the answer sees."""

    prefix: Tensor
    inputs: list[Tensor]
    states: list[Tensor]
    logits: list[Tensor]
    last: Tensor


class LotusReference(Reference):
    """A slow twin of a model under LOTUS."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model

    @property
    def last_stage(self) -> int:
        return self.method.n_blocks

    def rounds(self, stage: int) -> int:
        """R_e = r K_e, at most R; the last stage has R."""
        r, most = self.method.loops_per_block * stage, self.method.max_loops
        if stage == 0 or most is None:
            return r
        return most if stage == self.last_stage else min(r, most)

    def run(self, question: str, stage: int) -> Run:
        """h^(0) = f(E | C), h^(t) = f(E + h^(t-1) | C)."""
        method, n = self.method, stage * self.method.latents_per_block
        prefix = self.embed([*self.question(question), *self.marker("<bot>")])
        e = x = self.embed(self.marker("<lat>") * n)
        run = Run(prefix, [], [], [], x)
        for _ in range(self.rounds(stage) + 1):
            states, logits = self.read(torch.cat([prefix, x]))
            run.inputs.append(x)
            run.states.append(states[len(prefix) - 1 :])
            run.logits.append(logits[len(prefix) - 1 :])
            x = self.inject(e, x, run.states[-1])
        run.last = x if method.last_pass == "refeed" else run.inputs[-1]
        return run

    def inject(self, e: Tensor, x: Tensor, states: Tensor) -> Tensor:
        """The next pass' input (N, D) from the states of <bot> and the latents."""
        loop = self.method.loop
        return self.mix(loop.scale * self.rho(states[:-1] if loop.shift else states[1:]), e, x)

    def think(self, question: str, stage: int, n_steps: int | None = None) -> Thoughts:
        run = self.run(question, stage)
        return torch.cat([run.prefix, run.last, self.embed(self.marker("<eot>"))]), []

    def written(self, example: Example, stage: int) -> list[int]:
        """The steps beyond the blocks stay in the text."""
        return [*(token for step in self.steps(example)[stage:] for token in step), *self.answer(example)]

    def blocks(self, example: Example, stage: int) -> list[tuple[int, int, list[int]]]:
        """(block, pass t, tokens) of the steps that have left the text, 0-based."""
        post = self.method.supervision != "per_iter"
        steps = self.steps(example)[:stage]
        return [(i, self.rounds(stage) if post else i + 1, step) for i, step in enumerate(steps)]

    def shown(self, example: Example, stage: int) -> list[tuple[int, int, int]]:
        """(pass t, place among <bot> and the latents, token) of every token of a step that must be read."""
        c = self.method.latents_per_block
        found = []
        for i, t, step in self.blocks(example, stage):
            for j, token in enumerate(step):
                place = 1 + i * c + j + self.method.readout_offset
                fits = place <= stage * c if self.method.overflow == "spill" else j < c
                found += [(t, place, token)] if fits else []
        return found

    def n_counted(self, example: Example, stage: int) -> int:
        """By what the read tokens are divided: spill counts those too that find no latent."""
        spills, steps = self.method.overflow == "spill", self.steps(example)[:stage]
        return sum(map(len, steps)) if spills else len(self.shown(example, stage))

    def terms(self, examples: list[Example], stages: list[int] | int | None = None) -> dict[str, Tensor]:
        """L_ans, L_step and what else has a weight, of a batch."""
        if not isinstance(stages, list):
            stages = [self.last_stage if stages is None else stages] * len(examples)
        method, written, shown, told, students, teachers = self.method, [], [], [], [], []
        n_counted = sum(self.n_counted(example, stage) for example, stage in zip(examples, stages))
        for example, stage in zip(examples, stages):
            run, ids = self.run(example.question, stage), self.written(example, stage)
            thought, _ = self.think(example.question, stage)
            written.append(cross_entropy(self.logits_after(thought, ids), torch.tensor(ids), reduction="none"))
            if method.step_weight:
                for t, place, token in self.shown(example, stage):
                    shown.append(cross_entropy(run.logits[t][place], torch.tensor(token)))
            if method.aux.weight:
                told += self.every_told(example, run, stage)
            if method.hid.weight:
                students.append(states_at(self.lm, torch.cat([thought, self.embed(ids)]), len(thought)))
                gone = [token for step in self.steps(example)[:stage] for token in step]
                read = [*self.question(example.question), *gone]
                with torch.no_grad():
                    teachers.append(states_at(self.lm, self.embed([*read, *ids]), len(read)))
        terms = {"answer": torch.cat(written).mean()}
        if shown:
            terms["step"] = torch.stack(shown).sum() / n_counted
        if told:
            is_mean = method.aux.norm == "token_mean"
            terms["aux"] = torch.cat(told).mean() if is_mean else torch.stack([losses.sum() for losses in told]).mean()
        if students:
            terms["hid"] = kd(students, teachers, method.hid)
        return terms

    def every_told(self, example: Example, run: Run, stage: int) -> list[Tensor]:
        """The losses of each step told from its block, or of all steps told from all latents at once."""
        c, blocks = self.method.latents_per_block, self.blocks(example, stage)
        if self.method.supervision != "post_all":
            return [self.told(example, run.states[t][1 + i * c : 1 + (i + 1) * c], step) for i, t, step in blocks]
        text = [token for *_, step in blocks for token in step]
        return [self.told(example, run.states[self.rounds(stage)][1 : 1 + stage * c], text)] if text else []

    def told(self, example: Example, latents: Tensor, step: list[int]) -> Tensor:
        """LOTUS-aux: the losses (n,) of a step that g_phi must tell from the c latents of its block alone.

        With aux.question it reads the question and <bot> before them.
        """
        aux, decoder, c = self.method.aux, self.model.step_decoder, len(latents)
        reader = self.lm if decoder.own is None else decoder.own.lm
        embed = (reader if aux.embed == "own" else self.lm).get_input_embeddings()
        if self.method.loop.site == "pre_norm":  # h is what the head reads
            latents = self.norm(latents)
        latents = latents.detach() if aux.detach else latents
        x = torch.cat([latents, embed(torch.tensor(step[:-1], dtype=torch.long))])
        asked = [*self.question(example.question), *self.marker("<bot>")] if aux.question else []
        x = torch.cat([embed(torch.tensor(asked, dtype=torch.long)), x])
        positions = torch.arange(aux.position, aux.position + len(x))[None]
        with nullcontext() if decoder.lora is None else decoder.lora.at(1):
            logits = reader(inputs_embeds=x[None], position_ids=positions, use_cache=False).logits[0]
        return cross_entropy(logits[len(asked) + c - 1 :], torch.tensor(step), reduction="none")

    def norm(self, states: Tensor) -> Tensor:
        decoder = self.lm.get_decoder()
        return (decoder.norm if hasattr(decoder, "norm") else decoder.ln_f)(states)

    def loss(self, examples: list[Example], stages: list[int] | int | None = None) -> Tensor:
        terms = self.terms(list(examples), stages)
        return sum(self.method.term_weights[name] * term for name, term in terms.items())


def shortened(lm, n_layers: int):
    """A copy of a bare model with its first layers alone."""
    short = copy.deepcopy(lm)
    decoder = short.get_decoder()
    del (decoder.layers if hasattr(decoder, "layers") else decoder.h)[n_layers:]
    return short
