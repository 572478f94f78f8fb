"""The passes of Think-at-Hard: everything is read once, and hard tokens again (`tah` has the equations)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from innerloop.decoder.backbone import Backbone
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.decider import FREE, ONCE, Choice, Chooser, charge
from innerloop.methods.depth.duo_attention import DuoCache, Unfinished, read_at
from innerloop.methods.depth.tah import Tah
from innerloop.methods.depth.token_labels import Oracle, hashes
from innerloop.passes.loss_inputs import LossInputs, PassTerms, Reference
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput, Tokens
from innerloop.text.batch import Batch


@dataclass
class TahOutput(PassOutput):
    """A pass, with the tokens (B, L) that were decided on at each depth and the decider's logits of them."""

    decisions: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class TahDepth(DepthForward):
    """Reads everything once, and hard tokens again."""

    method: Tah
    waits = True

    def __init__(self, method: Tah, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        head = backbone.lm.get_output_embeddings()
        is_linear = head.bias is None and getattr(backbone.config, "final_logit_softcapping", None) is None
        refuse(
            (
                method.residual_logits and method.max_loops > 1 and not is_linear,
                "this model's head is not linear (it caps logits, or has a bias), so its logits do not add up: set "
                "residual_logits to false",
            )
        )
        self.chooser = None
        if method.max_loops > 1:
            self.chooser = Chooser(method.decider, method, backbone, learns=method.trains == "decider")
        if method.trains == "decider":
            for part in (backbone, loop):
                part.requires_grad_(False)
        self.lora_flops = 0.0
        if loop.lora is not None:
            loop.lora.dropout, self.lora_flops = method.lora.dropout, loop.lora.flops
        self.oracle = None if method.oracle.reference is None else Oracle(method.oracle)

    def empty_cache(self) -> DuoCache:
        """Return a cache that has read nothing."""
        return DuoCache()

    # What is known beforehand

    def wanted(self, batch: Batch, reference: Reference | None = None) -> Tensor | None:
        """Return of each column (B, S) how many iterations it shall have, FREE or ONCE.

        Tokens that predict a written one are free; when answering, that is the last of the question. In training the
        oracle labels them, if it is to say.
        """
        if self.training and self.method.iterate == "oracle":
            assert reference is not None
            return self.labels(batch, reference)
        if self.method.prompt_iterates:
            return None
        known = torch.full_like(batch.ids_BS, ONCE)
        if len(batch.targets_U):
            return known.flatten().index_fill(0, batch.predict_at_U, FREE).view(known.shape)
        known[:, -1:] = FREE
        return known

    def labels(self, batch: Batch, reference: Reference) -> Tensor:
        """Return the oracle's depths (B, S); ONCE where nothing is predicted."""
        assert self.oracle is not None
        depths_U = self.oracle.depths(batch, reference, self.method.max_loops)
        if self.method.force_one and self.method.max_loops > 1:
            hashes_U = hashes(batch)
            is_forced = (hashes_U == hashes_U.max()) & (depths_U == 1).all()
            depths_U = torch.where(is_forced, 2, depths_U)
        known = torch.full_like(batch.ids_BS, ONCE)
        return known.flatten().index_copy(0, batch.predict_at_U, depths_U).view(known.shape)

    def known(self, reading: PassInput) -> Tensor:
        """Return what is known of a pass's tokens (B, L); columns that nothing was said of are free."""
        positions, wanted = reading.tokens.positions_RN, reading.wanted_BL
        if wanted is None:
            return torch.full_like(positions, FREE)
        rest = torch.full_like(positions[:, wanted.shape[1] :], FREE)
        return torch.cat([wanted.to(positions.dtype), rest], dim=1)

    # A pass

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass: all tokens, then those that go on, and so forth."""
        if reading.may_wait and reading.tokens.positions_RN.shape[1] == 1:
            return self.go_on(reading)
        part, known_BL, limit = reading.tokens, self.known(reading), self.limit(reading)
        deep = TahOutput(part.states_RND, part.real.long())
        for depth in range(1, limit + 1):
            with self.loop.weights(depth - 1):
                *layers, states = self.read(reading, part, depth)
            before = deep.states_BLD
            if depth == 1:
                deep.states_BLD = states
            else:
                states = part.take(before) + states if self.method.residual_logits else states
                deep.states_BLD = part.put(before, states)
                deep.depths_BL = part.put(deep.depths_BL, torch.full_like(part.positions_RN, depth))
            if reading.trace is not None:
                self.record(reading, depth, deep, before)
            choice = self.choose(reading, part, states, layers, part.take(known_BL), depth)
            if choice is None:
                break
            nowhere = torch.zeros_like(known_BL)
            asked_BL = part.put(nowhere.bool(), choice.asked_RN)
            deep.decisions.append((asked_BL, part.put(nowhere.to(choice.scores_RN.dtype), choice.scores_RN)))
            if choice.logits_AV is not None and depth == 1:
                deep.shown = choice.ends_A, choice.logits_AV
            going = part.with_states(choice.inputs_RND).pick(choice.goes_RN)
            if going is None:
                break
            part = going
        return deep

    def go_on(self, reading: PassInput) -> PassOutput:
        """Read one token of each row: the one that was left unfinished, at its next depth, or the new one."""
        cache, tokens, known_B1 = reading.cache, reading.tokens, self.known(reading)
        assert isinstance(cache, DuoCache)
        left, cache.unfinished = cache.unfinished, None
        depth_B1 = torch.ones_like(known_B1)
        if left is None:
            *layers, states = self.read(reading, tokens, 1)
        else:
            is_old, depth_B1 = left.active_B[:, None], left.depths_B1 + 1
            inputs = torch.where(is_old[..., None], left.inputs_B1D, tokens.states_RND)
            positions = torch.where(is_old, left.positions_B1, tokens.positions_RN)
            tokens = Tokens(inputs, positions, tokens.real | is_old)
            known_B1 = torch.where(is_old, left.known_B1, known_B1)
            with self.weights_of_rows(depth_B1):
                *layers, states = self.read(reading, tokens, depth_B1)
            if self.method.residual_logits:
                states = torch.where(is_old[..., None], left.states_B1D + states, states)
        logits = self.backbone.head(states)
        deep = TahOutput(states, depth_B1, done_BL=tokens.real, logits_BV=logits[:, -1])
        choice = self.choose(reading, tokens, states, layers, known_B1, depth_B1, logits)
        if choice is not None:
            goes, places = choice.goes_RN, tokens.positions_RN
            deep.done_BL = tokens.real & ~goes
            cache.unfinished = Unfinished(goes[:, 0], choice.inputs_RND, states, places, depth_B1 * goes, known_B1)
        return deep

    def limit(self, reading: PassInput) -> int:
        """Return D."""
        return self.method.max_loops if reading.loops is None else reading.loops

    def read(self, reading: PassInput, tokens: Tokens, depth: int | Tensor) -> tuple[Tensor, ...]:
        """Read tokens at a depth; return their states after each layer, if the decider looks at them, and the last."""
        assert isinstance(reading.cache, DuoCache)
        slot = reading.cache.whole(self.backbone.n_layers, reading.tokens.positions_RN)
        looks = self.chooser is not None and self.chooser.decider is not None
        if reading.cost_scope is not None and not (isinstance(depth, int) and depth == 1):
            charge(reading.cost_scope, tokens, (tokens.real & (depth > 1)).double() * self.lora_flops)
        return read_at(self.backbone, tokens, slot, depth, self.method.depth_attention, reading.cost_scope, looks)

    def choose(
        self,
        reading: PassInput,
        part: Tokens,
        states_RND: Tensor,
        layers: list[Tensor],
        known_RN: Tensor,
        depth: int | Tensor,
        logits_RNV: Tensor | None = None,
    ) -> Choice | None:
        """Say which tokens go on from a depth; None where none may."""
        if self.chooser is None:
            return None
        limit = self.limit(reading)
        return self.chooser(part, states_RND, layers, known_RN, depth, limit, logits_RNV, reading.cost_scope)

    def weights_of_rows(self, depth_R1: Tensor) -> AbstractContextManager[None]:
        """Return the block in which each row has the weights of its own depth."""
        if self.loop.lora is None:
            return nullcontext()
        rows: dict[int, list[int]] = {}
        for row, depth in enumerate(depth_R1[:, 0].tolist()):
            if depth > 1:
                rows.setdefault(depth - 1, []).append(row)
        return self.loop.lora.of_rows({loop: torch.tensor(of, device=depth_R1.device) for loop, of in rows.items()})

    def record(self, reading: PassInput, depth: int, deep: PassOutput, before: Tensor) -> None:
        """Note in the trace what the tokens read at a depth have come to."""
        assert reading.trace is not None
        mask_BL = (deep.depths_BL == depth).long()
        kept = torch.nonzero(mask_BL.any(1))[:, 0]
        rows = None if reading.cost_scope is None else reading.cost_scope.rows
        numbers = (kept if rows is None else rows[kept]).tolist()
        new, old = deep.states_BLD[kept], before[kept]
        reading.trace.record(depth, numbers, new, new, old, mask=mask_BL[kept])

    # Loss

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the decider's loss, and the shares of hard tokens and of those that went on."""
        batch, run = inputs.batch, inputs.thought.context.depth
        deep, at_U, terms = inputs.thought.deep[-1], batch.predict_at_U, PassTerms()
        assert isinstance(deep, TahOutput) and run is not None
        depths_U: Tensor | None = None
        if self.method.trains == "decider" and self.oracle is not None and inputs.reference is not None:
            depths_U = self.oracle.depths(batch, inputs.reference, self.method.max_loops)
            terms["decider"] = self.decider_loss(deep, at_U, depths_U), "answer"
        elif self.training and self.method.iterate == "oracle" and run.wanted_BS is not None:
            depths_U = run.wanted_BS.flatten()[at_U]
        if depths_U is not None:
            terms["hard"] = (depths_U > 1).sum(), "answer"
        terms["iterated"] = (deep.depths_BL.flatten()[at_U] > 1).sum(), "answer"
        return terms

    def decider_loss(self, deep: TahOutput, at_U: Tensor, depths_U: Tensor) -> Tensor:
        """Return, summed over written tokens, how badly the decider told those that shall go on from the others."""
        weight, total = torch.tensor(self.method.pos_weight, device=at_U.device), torch.zeros((), device=at_U.device)
        for depth, (asked_BL, scores_BL) in enumerate(deep.decisions, 1):
            scores_U, asked_U = scores_BL.flatten()[at_U], asked_BL.flatten()[at_U]
            wanted_U = (depths_U > depth).to(scores_U.dtype)
            losses_U = binary_cross_entropy_with_logits(scores_U, wanted_U, pos_weight=weight, reduction="none")
            total = total + (losses_U * asked_U).sum()
        return total
