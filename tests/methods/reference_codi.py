"""CODI and PCCoT as their card writes them: uncached full forwards of the bare model, one row at a time (codi.md).

    slow = CodiReference(model)
    slow.terms(examples)["hid"], slow.loss(examples)

Shapes: `L` positions, `k` latents, `M` hidden-state tensors (the embeddings and every layer), `D` width, `B` rows.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop import Example
from innerloop.config.losses import HiddenSettings
from innerloop.methods import Pccot
from tests.methods.reference import Reference, Thoughts


class CodiReference(Reference):
    """A slow twin of a model under CODI or PCCoT."""

    def __init__(self, model):
        super().__init__(model)
        self.model = model

    def written(self, example: Example, stage: int) -> list[int]:
        return self.answer(example)

    def think(self, question: str, stage: int = 0, n_steps: int | None = None) -> Thoughts:
        asked, bot, lat, eot = self.question(question), *(self.marker(name) for name in ("<bot>", "<lat>", "<eot>"))
        x_LD = self.embed([*asked, *bot])
        if isinstance(self.method, Pccot):
            x_LD = torch.cat([x_LD, self.iterate(x_LD, self.embed(lat * self.method.n_slots))])
        else:
            for _ in range(self.method.n_latents_total):
                x_LD = torch.cat([x_LD, self.prj(self.read(x_LD)[0][-1:])])
        return torch.cat([x_LD, self.embed(eot)]), []

    def iterate(self, prefix_LD: Tensor, z_kD: Tensor) -> Tensor:
        """Jacobi: in every iteration latent j becomes what position j - 1 made, the first what <bot> made."""
        k = len(z_kD)
        for _ in range(self.method.max_loops):
            z_kD = self.prj(self.read(torch.cat([prefix_LD, z_kD]))[0][-k - 1 : -1])
        return z_kD

    def prj(self, x: Tensor) -> Tensor:
        """prj(x) = LN(W_b GELU(W_a x + b_a) + b_b)."""
        rescale = self.model.loop.rescale
        if self.method.loop.rescale == "none":
            return x
        a, b, norm = rescale.inner, rescale.outer, rescale.norm
        u = x @ a.weight.T + a.bias
        v = u * 0.5 * (1 + torch.erf(u / 2**0.5)) @ b.weight.T + b.bias
        if norm is None:
            return v
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    def taught(self, example: Example) -> tuple[list[int], int]:
        """What the teacher reads, and how many tokens of it are the question."""
        steps = self.steps(example) if self.method.include_last_step else self.steps(example)[:-1]
        asked = self.question(example.question)
        return [*asked, *(token for step in steps for token in step), *self.answer(example)], len(asked)

    def states(self, x_LD: Tensor, at: int) -> Tensor:
        """The states (M, D) of one position, the embeddings' first."""
        return states_at(self.lm, x_LD, at)

    def terms(self, examples: list[Example]) -> dict[str, Tensor]:
        """L_S, L_T and L_KD of a batch."""
        written, learnt, students, teachers = [], [], [], []
        for example in examples:
            thought_LD, _ = self.think(example.question)
            ids, (read, n_asked) = self.answer(example), self.taught(example)
            written.append(cross_entropy(self.logits_after(thought_LD, ids), torch.tensor(ids), reduction="none"))
            predicting = self.read(self.embed(read))[1][n_asked - 1 : -1]
            learnt.append(cross_entropy(predicting, torch.tensor(read[n_asked:]), reduction="none"))
            # the last position before the answer's own tokens: that of ###
            students.append(self.states(torch.cat([thought_LD, self.embed(ids)]), len(thought_LD)))
            with torch.no_grad():
                teachers.append(self.states(self.embed(read), len(read) - len(ids)))
        terms = {"answer": torch.cat(written).mean()}
        if self.method.hid.weight:
            terms["hid"] = kd(students, teachers, self.method.hid)
        if self.method.teacher_weight:
            terms["teacher"] = torch.cat(learnt).mean()
        return terms

    def loss(self, examples: list[Example], stages: object = None) -> Tensor:
        """L = alpha L_S + beta L_KD + gamma L_T."""
        return sum(self.method.term_weights[name] * term for name, term in self.terms(list(examples)).items())


def states_at(lm, x_LD: Tensor, at: int) -> Tensor:
    """The states (M, D) that a bare model has at one position: what enters the layers, and what each makes."""
    out = lm(inputs_embeds=x_LD[None], output_hidden_states=True, use_cache=False)
    return torch.stack([layer[0, at] for layer in out.hidden_states])


def kd(students: list[Tensor], teachers: list[Tensor], settings: HiddenSettings) -> Tensor:
    """L_KD = (1 / M) sum_l d(s^l, t^l) / std(t^l), d a mean over rows and width, std over all the rows' values."""
    s_BMD, t_BMD = torch.stack(students), torch.stack(teachers).detach()
    total = torch.zeros(())
    first = {"last": s_BMD.shape[1] - 1, "all": 1, "all+emb": 0}[settings.layers]
    for layer in range(first, s_BMD.shape[1]):
        s, t = s_BMD[:, layer], t_BMD[:, layer]
        gap, std = (s - t).abs(), t.flatten().std()
        match settings.distance:
            case "l1":
                d = gap.mean() / std
            case "l1_sum":
                d = gap.sum(-1).mean() / std
            case "l2":
                d = gap.square().mean() / std / std
            case "smooth_l1" | "smooth_l1_raw":
                smooth = torch.where(gap < 1, 0.5 * gap.square(), gap - 0.5).mean()
                d = smooth / std if settings.distance == "smooth_l1" else smooth
            case "cosine":
                d = (1 - (s * t).sum(-1) / s.norm(dim=-1) / t.norm(dim=-1)).mean()
        total = total + d / (s_BMD.shape[1] - first)
    return total
