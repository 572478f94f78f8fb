"""SpiralThinker as its card writes it, slowly (spiralthinker.md): whole rows, one at a time, without a cache.

    slow = Spiral(model)
    slow.logits(example), slow.loss(examples), slow.write(question, 20)

Shapes: `L` positions, `J` blocks, `N` latents of a block, `D` width, `V` vocabulary, `U` written tokens.
"""

import copy
import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from innerloop import Example, LatentModel
from innerloop.methods import SpiralThinker
from tests.methods.reference import Reference
from tests.methods.reference_codi import kd
from tests.methods.tools import stir
from tests.models import tiny_model

SPIRAL = SpiralThinker(latents_per_block=2, max_loops=2)
ALIGNED = SpiralThinker(latents_per_block=2, max_loops=3, hid={"weight": 0.7, "teacher": "-"})


@functools.cache
def known(arch: str, seed: int = 0) -> LatentModel:
    """Return a model without dropout that knows every marker, whose weights many tests share."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if arch == "gpt2" else {}
    return tiny_model(SpiralThinker(), arch, seed, num_hidden_layers=2, **still).double()


def student(arch: str = "gpt2", method: SpiralThinker = SPIRAL, stirred: bool = True, own: bool = False) -> LatentModel:
    """Put SpiralThinker on the weights of an architecture (or a copy of its own), with another model as its teacher."""
    base = copy.deepcopy(known(arch)) if own else known(arch)
    torch.manual_seed(0)  # the same weights of the adapter in every call
    model = LatentModel(base.backbone, base.tokenizer, method).double()
    if stirred:
        stir(model)
    if method.hid.weight > 0:
        model._frozen["teacher"] = known(arch, 5)
    return model.eval()


@dataclass
class Laid:
    """A row: its tokens, which of them are learned, the positions of each block's latents, and what its <eol> follows.

    ``ends`` has for each block the position of its <eol> and the 0-based step that it stands for, None for no step.
    """

    ids: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    ends: list[tuple[int, int | None]] = field(default_factory=list)

    def add(self, ids: list[int], learned: bool = False) -> None:
        self.learned += range(len(self.ids), len(self.ids) + len(ids)) if learned else []
        self.ids += ids


@dataclass
class Passes:
    """What the passes of a row showed: the logits of the last, and each block's states at <eol>.

    ``shown[i]`` are the logits of the passes of the i-th turn, of which there is one, or one for each block.
    ``at_eol[j][k]`` are block j's n_layers + 1 states (D,) in pass k; ``fed[j]`` its final inputs (N, D).
    """

    logits_LV: Tensor
    at_eol: list[list[list[Tensor]]]
    fed: list[Tensor]
    shown: list[list[Tensor]]


class Spiral(Reference):
    """A slow twin of a model: it shares the weights, so gradients of both fall into the same place."""

    method: SpiralThinker

    def __init__(self, model: LatentModel):
        super().__init__(model)
        self.rescale = model.loop.rescale
        self.teacher = model._frozen["teacher"].backbone.lm if model._frozen else None
        self.read_blocks: list[tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]] = []

    @property
    def n_updates(self) -> int:
        return self.method.max_loops - self.method.count_static_pass

    # Section 2: rows

    def lay_out(self, example: Example, parity: int = 0) -> Laid:
        m, row = self.method, Laid()
        bot, eot = self.marker("<bot>"), self.marker("<eot>")
        row.add(self.question(example.question))
        first_latent = {"odd": 0, "even": 1, "random_parity": parity}
        drawn = {i for i in range(len(example.steps)) if m.pattern == "random" and parity & 2**i}
        for i, step in enumerate(self.steps(example)):
            if m.pattern == "all" or i in drawn or i % 2 == first_latent.get(m.pattern):
                self.add_block(row, i)
            else:
                row.add([*bot, *step, *eot], learned=True)
        if not example.steps and m.pattern != "none" and m.m0 == "one_block_no_align":
            self.add_block(row, None)
        row.add(self.answer(example), learned=True)
        return row

    def add_block(self, row: Laid, step: int | None) -> None:
        """Add <bol> <latent>xN <eol>; the first <bol> after the question is given, unless rows begin with text."""
        is_given = not row.learned and not row.blocks and self.method.pattern not in ("even", "random")
        row.add(self.marker("<bol>"), learned=not is_given or self.method.supervise_first_bol)
        row.blocks.append(list(range(len(row.ids), len(row.ids) + self.method.latents_per_block)))
        row.add(self.marker("<lat>") * self.method.latents_per_block)
        row.ends.append((len(row.ids), step))
        row.add(self.marker("<eol>"))

    # Section 3: passes

    def g(self, h_ND: Tensor) -> Tensor:
        """g_phi(h) = RMSNorm(h + W_2 SiLU(W_1 h)) tau."""
        if self.method.loop.rescale == "none":
            return h_ND
        r = self.rescale
        h_ND = h_ND + silu(h_ND @ r.inner.weight.T) @ r.outer.weight.T
        h_ND = h_ND / h_ND.square().mean(-1, keepdim=True).sqrt() * r.tau
        return h_ND if r.gain is None else h_ND * r.gain

    def run(self, x_LD: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """One pass over all of a row: what is fed back (L, D), the states after every layer, the logits (L, V)."""
        out = self.lm(inputs_embeds=x_LD[None], output_hidden_states=True, use_cache=False)
        layers = [h[0] for h in out.hidden_states]
        return self.read(x_LD)[0] if self.method.loop.site == "pre_norm" else layers[-1], layers, out.logits[0]

    def run_blocks(self, row: Laid) -> Passes:
        """Pass 0 reads the embeddings; after each pass the blocks that are worked on are written anew, K times."""
        x_LD = self.embed(row.ids)
        together = [list(range(len(row.blocks)))]
        turns = together if self.method.block_schedule == "parallel" else [[j] for j in range(len(row.blocks))]
        at_eol: list[list[list[Tensor]]] = [[] for _ in row.blocks]
        shown: list[list[Tensor]] = []
        for blocks in turns:
            shown.append([])
            for k in range(self.n_updates + 1):
                fed_LD, layers, logits_LV = self.run(x_LD)
                shown[-1].append(logits_LV)
                for j in blocks:
                    at_eol[j].append([h_LD[row.ends[j][0]] for h_LD in layers])
                if k < self.n_updates and blocks:
                    at = torch.tensor([p for j in blocks for p in row.blocks[j]])
                    x_LD = x_LD.index_copy(0, at, self.g(fed_LD[at]))
        return Passes(self.run(x_LD)[2], at_eol, [x_LD[at] for at in row.blocks], shown)

    def logits(self, example: Example, parity: int = 0) -> Tensor:
        """The logits (U, V) of the last pass that predict the learned tokens."""
        row = self.lay_out(example, parity)
        return self.run_blocks(row).logits_LV[[at - 1 for at in row.learned]]

    # Section 4: losses

    def taught(self, example: Example) -> list[list[Tensor]]:
        """t_b: the teacher's states after every layer, at the <eot> of each step of its row."""
        ids, ends = self.question(example.question), []
        for step in self.steps(example):
            ids = [*ids, *self.marker("<bot>"), *step, *self.marker("<eot>")]
            ends.append(len(ids) - 1)
        with torch.no_grad():
            whole = torch.tensor([[*ids, *self.answer(example)]])
            layers = self.teacher(whole, output_hidden_states=True).hidden_states
        return [[h[0, end] for h in layers] for end in ends]

    def weights(self) -> list[float]:
        """v_k of passes 0..K."""
        m, n = self.method, self.n_updates
        first = 0 if m.align_static_pass else 1
        v = {"softmax": [math.exp(m.align_alpha * k) for k in range(n + 1)], "uniform": [1.0] * (n + 1)}
        raw = [0.0] * first + v.get(m.align_schedule, [0.0] * n + [1.0])[first:]
        return [v / sum(raw) for v in raw]

    def align(self, examples: list[Example], parities: list[int] | None = None) -> list[Tensor]:
        """L_align of passes 0..K, the mean over the blocks of the batch that stand for a step."""
        pairs = []
        for example, parity in zip(examples, parities or [0] * len(examples)):
            row, taught = self.lay_out(example, parity), self.taught(example)
            for (_, step), states in zip(row.ends, self.run_blocks(row).at_eol):
                pairs += [] if step is None else [(states, taught[step])]
        taught, passes = [torch.stack(target) for _, target in pairs], range(self.n_updates + 1)
        return [kd([torch.stack(states[k]) for states, _ in pairs], taught, self.method.hid) for k in passes]

    def progressive(self, examples: list[Example], parities: list[int] | None = None) -> Tensor:
        """L_prog = sum_k v_k L_align^(k)."""
        return sum(v * align for v, align in zip(self.weights(), self.align(examples, parities)))

    def loss(self, examples: list[Example], parities: list[int] | None = None) -> Tensor:
        """L = L_CE + lambda L_prog."""
        losses, m = [], self.method
        for example, parity in zip(examples, parities or [0] * len(examples)):
            row = self.lay_out(example, parity)
            targets = torch.tensor([row.ids[at] for at in row.learned])
            if m.ce_passes == "last":
                losses.append(cross_entropy(self.logits(example, parity), targets, reduction="none"))
            else:
                losses.append(self.every_pass(row, targets))
        loss = torch.cat(losses).mean()
        return loss + m.hid.weight * self.progressive(examples, parities) if m.hid.weight > 0 else loss

    def every_pass(self, row: Laid, targets_U: Tensor) -> Tensor:
        """The losses (U,) of the learned tokens, a mean over the passes of the turn that reads them.

        One after the other, a block's turn reads what follows it up to and with the next <bol>.
        """
        shown = self.run_blocks(row).shown or [[self.run(self.embed(row.ids))[2]]]
        losses = []
        for at, target in zip(row.learned, targets_U):
            begun = sum(block[0] < at for block in row.blocks) if self.method.block_schedule == "sequential" else 1
            is_before = not row.blocks or at <= row.blocks[0][0]  # predicted by what no pass changes
            logits = shown[0] if is_before else shown[begun - 1]
            losses.append(torch.stack([cross_entropy(one[at - 1], target) for one in logits]).mean())
        return torch.stack(losses)

    # Section 6: writing

    @torch.no_grad()
    def write(self, question: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Greedy decoding: what is written, and the number of blocks that were read."""
        m, x_LD, self.read_blocks = self.method, self.embed(self.question(question)), []
        bol, eot, eos = self.marker("<bol>")[0], self.marker("<eot>")[0], self.tokenizer.eos_token_id
        answer = self.tokenizer.encode("### ", add_special_tokens=False)[0]
        n_blocks, ids = 0, []
        if m.pattern not in ("none", "even"):
            x_LD, n_blocks = self.read_block(torch.cat([x_LD, self.embed([bol])])), 1
        while len(ids) < max_new_tokens and eos not in ids:
            logits_V = self.run(x_LD)[2][-1]
            read_only = ["<eol>", "<lat>"] if m.pattern != "none" else []
            for marker in [*read_only, *(["<bol>"] if n_blocks >= m.max_blocks else [])]:
                logits_V[self.marker(marker)] = -math.inf
            token = logits_V.argmax().item()
            if m.force_block_after_text and ids[-1:] == [eot] and token != answer and n_blocks < m.max_blocks:
                token = bol
            ids.append(token)
            x_LD = torch.cat([x_LD, self.embed([token])])
            if token == bol and m.pattern != "none" and len(ids) < max_new_tokens:
                x_LD, n_blocks = self.read_block(x_LD), n_blocks + 1
        return ids, n_blocks

    def read_block(self, x_LD: Tensor) -> Tensor:
        """Append a block after its <bol>: K updates on what came before, then <eol>.

        ``read_blocks`` gets for each update the logits (N, V) of its pass and the latents after and before it, and the
        logits (1 + N + 1, V) that <bol>, the final latents and <eol> show.
        """
        z_ND, updates = self.embed(self.marker("<lat>") * self.method.latents_per_block), []
        for _ in range(self.n_updates):
            fed_LD, _, logits_LV = self.run(torch.cat([x_LD, z_ND]))
            updates.append((logits_LV[len(x_LD) :], self.g(fed_LD[len(x_LD) :]), z_ND))
            z_ND = updates[-1][1]
        whole_LD = torch.cat([x_LD, z_ND, self.embed(self.marker("<eol>"))])
        self.read_blocks.append((updates, self.run(whole_LD)[2][len(x_LD) - 1 :]))
        return whole_LD
