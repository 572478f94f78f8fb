"""The methods as their cards write them, slowly: the bare Hugging Face model on one row, without cache or padding.

Every pass reads the whole row again from its input embeddings. Nothing here uses the library's layout, context, thought
or loop: only the model's weights, its tokenizer and the fields of its method.

    slow = Reference(model)
    slow.loss(examples, stages), slow.answer_logits(example, stage), slow.write(question, max_new_tokens=8)

Shapes: `L` positions, `N` latents, `D` width, `V` vocabulary, `U` written tokens.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from innerloop import Coconut, Cot, Example, LatentModel, NoCot, Pause, Slr

Thoughts = tuple[Tensor, list[Tensor]]
"""Input embeddings (L, D) of all that is read before the first written token, and what each iteration shows (N, V)."""


class Reference:
    """A slow twin of a model: it shares the weights, so gradients of both fall into the same place."""

    def __init__(self, model: LatentModel):
        self.lm, self.tokenizer, self.method = model.backbone.lm, model.tokenizer, model.method
        self.table = None if model.loop.time is None else model.loop.time.table

    # The model

    def embed(self, ids: list[int]) -> Tensor:
        return self.lm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))

    def read(self, x_LD: Tensor) -> tuple[Tensor, Tensor]:
        """One pass: the states (L, D) that are fed back, after the final norm or before it, and the logits (L, V)."""
        decoder, before = self.lm.get_decoder(), []
        norm = decoder.norm if hasattr(decoder, "norm") else decoder.ln_f
        handle = norm.register_forward_pre_hook(lambda module, args: before.append(args[0]))
        out = self.lm(inputs_embeds=x_LD[None], output_hidden_states=True, use_cache=False)
        handle.remove()
        is_pre_norm = self.method.loop.site == "pre_norm"
        return (before[0] if is_pre_norm else out.hidden_states[-1])[0], out.logits[0]

    # Tokens (cot.md, section 0)

    def question(self, text: str) -> list[int]:
        return self.tokenizer.encode(text + "\n")

    def steps(self, example: Example) -> list[list[int]]:
        return [self.tokenizer.encode(step + "\n", add_special_tokens=False) for step in example.steps]

    def answer(self, example: Example) -> list[int]:
        return [
            *self.tokenizer.encode("### " + example.answer, add_special_tokens=False),
            self.tokenizer.eos_token_id,
        ]

    def marker(self, name: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(name)]

    @property
    def last_stage(self) -> int:
        max_stage = self.method.curriculum.max_stage
        return max_stage + 1 if max_stage else 0

    def written(self, example: Example, stage: int) -> list[int]:
        """The supervised tokens: the steps that are still text, the answer, the end."""
        method, steps = self.method, self.steps(example)
        if isinstance(method, NoCot):
            steps = []
        elif not isinstance(method, Cot) and not getattr(method, "keep_steps", False):
            steps = [] if stage == self.last_stage else steps[stage:]
        return [*(token for step in steps for token in step), *self.answer(example)]

    # Thinking

    def think(self, question: str, stage: int, n_steps: int | None = None) -> Thoughts:
        """Think about a question; ``n_steps`` is the example's m, which only training knows."""
        asked, bot, lat, eot = self.question(question), *(self.marker(name) for name in ("<bot>", "<lat>", "<eot>"))
        match self.method:
            case NoCot():
                return self.embed(asked), []
            case Cot(with_markers=with_markers):
                return self.embed([*asked, *bot, *eot] if with_markers else asked), []
            case Pause() as method:
                m_pauses = method.n_pauses
                if stage < self.last_stage:
                    m_pauses = min(stage * method.per_stage, m_pauses)
                elif n_steps is None and method.n_pauses_inference is not None:
                    m_pauses = method.n_pauses_inference
                pauses = [*bot, *lat * m_pauses, *eot] if method.with_markers else lat * m_pauses
                return self.embed([*pauses, *asked] if method.placement == "prepend" else [*asked, *pauses]), []
            case Coconut() as method:
                k = min(stage, method.curriculum.max_stage) * method.latents_per_step
                if stage == self.last_stage and not method.pad_latent_to_max and n_steps is not None:
                    k = min(n_steps, method.curriculum.max_stage) * method.latents_per_step
                if method.latents_per_step == 0:  # "no thought": no markers either
                    return self.embed(asked), []
                if method.thought == "pause":
                    return self.embed([*asked, *bot, *lat * k, *eot]), []
                return self.coconut(self.embed([*asked, *bot]), k, method.loop.detach), []
            case Slr() as method:
                n_loops = method.max_loops
                if method.loops_per_stage and stage < self.last_stage:
                    n_loops = min(n_loops, method.loops_per_stage * stage)
                loop = self.slots if method.loop_scope == "slots" else self.append
                return loop(self.embed([*asked, *bot]), n_loops)
        raise NotImplementedError(self.method)

    def coconut(self, prefix_LD: Tensor, k: int, detach: bool = False) -> Tensor:
        """coconut.md, section 3: x_{a+j} := h_{a+j-1}, k times; every one of the k links is cut by ``detach``."""
        x_LD = prefix_LD
        for _ in range(k):
            h_1D = self.read(x_LD)[0][-1:]
            x_LD = torch.cat([x_LD, h_1D.detach() if detach else h_1D])
        return torch.cat([x_LD, self.embed(self.marker("<eot>"))])

    def slots(self, prefix_LD: Tensor, n_loops: int) -> Thoughts:
        """slr.md, section 3, scope `slots`: N latents at fixed positions, refined T times."""
        method, n = self.method, self.method.n_slots
        h_ND = x_ND = self.embed(self.marker("<lat>") * n)
        if method.h0 == "forward":
            h_ND = self.rho(self.read(torch.cat([prefix_LD, h_ND]))[0][-n:])
        first_ND, shown = h_ND, []
        for t in range(1, n_loops + 1):
            x_ND = h_ND + self.e(t)
            states, logits = self.read(torch.cat([prefix_LD, x_ND]))
            shown.append(logits[-n:])
            h_ND = self.mix(self.rho(states[-n:]), first_ND, h_ND)
        fed_ND = x_ND if method.answer_from == "kv_last" else h_ND
        return torch.cat([prefix_LD, fed_ND, self.embed(self.marker("<eot>"))]), shown

    def append(self, prefix_LD: Tensor, n_loops: int) -> Thoughts:
        """slr.md, section 3, scope `append`: every iteration reads z_t at a new position."""
        method = self.method
        h_1D = self.embed(self.marker("<lat>"))
        if method.h0 == "forward":
            h_1D = self.rho(self.read(prefix_LD)[0][-1:])
        first_1D, x_LD, shown = h_1D, prefix_LD, []
        for t in range(1, n_loops + 1):
            x_LD = torch.cat([x_LD, h_1D + self.e(t)])
            states, logits = self.read(x_LD)
            shown.append(logits[-1:])
            h_1D = self.mix(self.rho(states[-1:]), first_1D, h_1D)
        fed = [h_1D] if method.answer_from == "refeed" else []
        return torch.cat([x_LD, *fed, self.embed(self.marker("<eot>"))]), shown

    def lotus(self, question: str, n: int, n_loops: int) -> Tensor:
        """lotus.md, section 3: h^(0) = f(E | C), h^(t) = f(E + h^(t-1) | C); the answer sees the last pass."""
        prefix_LD = self.embed([*self.question(question), *self.marker("<bot>")])
        e_ND = self.embed(self.marker("<lat>") * n)
        x_ND = e_ND
        for _ in range(n_loops):
            x_ND = e_ND + self.read(torch.cat([prefix_LD, x_ND]))[0][-n:]
        return torch.cat([prefix_LD, x_ND, self.embed(self.marker("<eot>"))])

    def e(self, t: int) -> Tensor:
        """The timestep vector e_t (D,); iterations past the table use its last row."""
        if self.method.loop.time == "none":
            return torch.zeros(())
        return self.table[min(t, len(self.table)) - 1]

    def rho(self, u_ND: Tensor) -> Tensor:
        """rho(u) = u tau / RMS(u), tau the RMS of the embedding matrix."""
        if self.method.loop.rescale == "none":
            return u_ND
        tau = self.embed(list(range(self.lm.get_input_embeddings().weight.shape[0]))).detach().square().mean().sqrt()
        return u_ND * tau / u_ND.square().mean(-1, keepdim=True).sqrt()

    def mix(self, new: Tensor, first: Tensor, previous: Tensor) -> Tensor:
        alpha = self.method.loop.alpha
        return {
            "none": new,
            "sum": new + first,
            "A": alpha * new + (1 - alpha) * first,
            "B": alpha * new + (1 - alpha) * previous,
        }[self.method.loop.residual]

    # Writing

    def logits_after(self, thought_LD: Tensor, written: list[int]) -> Tensor:
        """The logits (U, V) that predict written tokens."""
        return self.read(torch.cat([thought_LD, self.embed(written)]))[1][len(thought_LD) - 1 : -1]

    def answer_logits(self, example: Example, stage: int | None = None) -> Tensor:
        stage = self.last_stage if stage is None else stage
        thought_LD, _ = self.think(example.question, stage, len(example.steps))
        return self.logits_after(thought_LD, self.written(example, stage))

    def loss(self, examples: list[Example], stages: list[int] | int | None = None) -> Tensor:
        """The loss of a batch: one mean over all written tokens, another over all step read-outs."""
        if not isinstance(stages, list):
            stages = [self.last_stage if stages is None else stages] * len(examples)
        written, shown = [], []
        for example, stage in zip(examples, stages):
            thought_LD, outputs = self.think(example.question, stage, len(example.steps))
            ids = self.written(example, stage)
            written.append(cross_entropy(self.logits_after(thought_LD, ids), torch.tensor(ids), reduction="none"))
            if self.method.step_weight:
                shown += self.shown_losses(self.steps(example), stage, outputs)
        loss = torch.cat(written).mean()
        return loss + self.method.step_weight * torch.stack(shown).mean() if shown else loss

    def shown_losses(self, steps: list[list[int]], stage: int, outputs: list[Tensor]) -> list[Tensor]:
        """L_step of one row: iteration t shows step sigma(t), c tokens of it, at one block of c slots."""
        gone = steps if stage == self.last_stage else steps[:stage]
        n_slots = self.method.n_slots if self.method.loop_scope == "slots" else 1
        m, n_loops, c = len(gone), len(outputs), self.method.slots_per_step or n_slots
        losses = []
        for t, logits_NV in enumerate(outputs, 1):
            sigma = -(-t * m // n_loops) if self.method.step_map == "stretch" else t
            if self.method.step_map == "one2one" and t == n_loops and m > n_loops:
                sigma = m
            if not 1 <= sigma <= m:
                continue
            n_blocks = math.floor(n_slots / c)
            first_slot = c * ((sigma - 1) % n_blocks)
            for j, token in enumerate(gone[sigma - 1][:c]):
                losses.append(cross_entropy(logits_NV[first_slot + j], torch.tensor(token)))
        return losses

    @torch.no_grad()
    def write(self, question: str, max_new_tokens: int, stage: int | None = None) -> list[int]:
        """Greedy decoding; markers are never written."""
        x_LD, _ = self.think(question, self.last_stage if stage is None else stage)
        ids: list[int] = []
        while len(ids) < max_new_tokens and self.tokenizer.eos_token_id not in ids:
            logits_V = self.read(x_LD)[1][-1]
            for marker in self.method.markers:
                logits_V[self.marker(marker)] = -math.inf
            ids.append(logits_V.argmax().item())
            x_LD = torch.cat([x_LD, self.embed(ids[-1:])])
        return ids
