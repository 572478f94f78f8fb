"""Recursions of a shared stack that tokens leave at unlike depth, as passes of the inner loop (mor.md, 3).

In expert choice the tokens of one recursion with the highest scores go on to the next; in token choice each token
chooses beforehand how many recursions it runs. The state of a token that has left stays as it is.

Shapes: `B` rows, `L` tokens of a pass, `R` and `N` rows and columns of a packed part of them, `D` width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from innerloop.methods.depth.router import (
    GateTarget,
    Notes,
    Router,
    gate_of,
    membership_loss,
    mixed,
    row_means,
    share_chosen,
    share_of,
    tokens_in,
    top_k,
    warmed,
)
from innerloop.passes.ragged import BlockPass, DepthForward
from innerloop.passes.tokens import PassInput, Tokens


class RecursiveDepth(DepthForward):
    """What the passes below need of the recursive decoder; ``method`` is a `Mor`."""

    method: Any
    recursions: list[list[range]]
    routers: nn.ModuleList
    aux_routers: nn.ModuleList
    bias: Tensor
    sees_later: bool


class RecursionPass(BlockPass, ABC):
    """f: the shared stack over the tokens that go on, gated; the others stay.

    Args:
        depth: the method's parts.
        reading: the pass.
        notes: filled with what the routers tell.
    """

    depth: RecursiveDepth

    def __init__(self, depth: RecursiveDepth, reading: PassInput, notes: Notes):
        super().__init__(depth, reading, range(0))
        self.notes, self.real_BL = notes, reading.tokens.real
        self.depths_BL = torch.zeros_like(reading.tokens.positions_RN)
        self.first_BLD: Tensor | None = None

    def __call__(self, inputs_BLD: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return the states (B, L, D) after ``iteration``."""
        if self.first_BLD is None:
            self.first_BLD = inputs_BLD
        chosen_BL = self.choose(inputs_BLD, iteration)
        self.depths_BL = self.depths_BL + chosen_BL
        self.notes.measure("selected", share_chosen(chosen_BL, self.real_BL))
        picked = self.reading.tokens.with_states(inputs_BLD).pick(chosen_BL)
        if picked is None:
            return inputs_BLD
        return picked.put(inputs_BLD, self.gated(picked, self.run(picked, iteration), iteration))

    @abstractmethod
    def choose(self, states_BLD: Tensor, iteration: int) -> Tensor:
        """Return which tokens run ``iteration`` (B, L)."""

    @abstractmethod
    def gated(self, tokens: Tokens, after_RND: Tensor, iteration: int) -> Tensor:
        """Return the states (R, N, D) of tokens of which the stack made ``after_RND``."""

    def run(self, tokens: Tokens, iteration: int) -> Tensor:
        """Run the layers of ``iteration`` on some tokens."""
        shares = self.depth.method.kv == "recursive_sharing"
        state = tokens.states_RND
        for place, layers in enumerate(self.depth.recursions[iteration - 1]):
            key, writes = ((1, place), iteration == 1) if shares else ((iteration, place), True)
            state = self.depth.run(self.reading, tokens.with_states(state), layers, key, writes=writes)
        return state

    def scores(self, router: Router, states_BLD: Tensor) -> Tensor:
        """Return a router's scores (B, L, N) of all tokens."""
        if self.reading.cost_scope is not None:
            none = torch.zeros_like(self.reading.tokens.positions_RN)
            self.reading.cost_scope.spend(self.reading.tokens, none, 0, router.flops)
        return router(states_BLD)

    def mix(self, before: Tensor, after: Tensor, gate: Tensor, target: GateTarget | None = None) -> Tensor:
        """Return the gated states."""
        method = self.depth.method
        return mixed(before, after, gate, target or method.gate_target, straight=method.gate == "st")


class ExpertPass(RecursionPass):
    """The k_r highest scores among the tokens of recursion r - 1 go on; when answering, those that a rule lets."""

    def __init__(self, depth: RecursiveDepth, reading: PassInput, notes: Notes):
        super().__init__(depth, reading, notes)
        self.among_BL = self.real_BL
        self.logits_BL = torch.empty(0)

    def choose(self, states_BLD: Tensor, iteration: int) -> Tensor:
        """Return which candidates go on."""
        depth, method, among, notes = self.depth, self.depth.method, self.among_BL, self.notes
        rule = self.logits_BL = self.scores(depth.routers[iteration - 1], states_BLD)[..., 0]  # type: ignore[arg-type]
        if depth.aux_routers:
            rule = self.scores(depth.aux_routers[iteration - 1], states_BLD.detach())[..., 0]  # type: ignore[arg-type]
        share, before = method.shares[iteration - 1], (1.0, *method.shares)[iteration - 1]
        allowed = among if share == before else among & (rule.detach() >= 0)
        if not (depth.training or depth.sees_later):
            self.among_BL = allowed
            return allowed

        def highest() -> Tensor:
            step = depth.step if depth.training else None
            now = warmed(share, step, method.capacity_warmup, "cosine")
            return top_k(self.logits_BL, among, share_of(tokens_in(self.real_BL, method.capacity_base), now, "down"))

        chosen = self.among_BL = self.reading.choice(iteration, highest)
        notes.measure("agreement", share_chosen(allowed == chosen, among))
        notes.add("aux_router" if depth.aux_routers else "router", membership_loss(rule, chosen, among))
        notes.add("router_z", row_means(self.logits_BL.square(), among).sum())
        return chosen

    def gated(self, tokens: Tokens, after_RND: Tensor, iteration: int) -> Tensor:
        """Return H + g F(H), or with delta H + g (F(H) - H)."""
        method = self.depth.method
        gate = gate_of(tokens.take(self.logits_BL), method.gate, 0.1 if method.alpha is None else method.alpha)
        return self.mix(tokens.states_RND, after_RND, gate)


class TokenChoicePass(RecursionPass):
    """Each token runs as many recursions as its state before them says."""

    def choose(self, states_BLD: Tensor, iteration: int) -> Tensor:
        """Return which tokens have not reached their depth yet."""
        if iteration == 1:
            self._choose_depths(states_BLD)
        return self.real_BL & (self.wanted_BL >= iteration)

    def _choose_depths(self, states_BLD: Tensor) -> None:
        depth, real = self.depth, self.real_BL
        logits_BLN = self.scores(depth.routers[0], states_BLD)  # type: ignore[arg-type]
        shares_BLN = logits_BLN.softmax(-1)

        def likeliest() -> Tensor:
            biased = shares_BLN.detach() + (depth.bias if len(depth.bias) else 0.0)
            return biased.argmax(-1) + 1

        self.wanted_BL = self.reading.choice("depths", likeliest)
        self.shares_BL = shares_BLN.gather(-1, self.wanted_BL[..., None] - 1)[..., 0]
        n = depth.method.n_recursions
        load = torch.stack([((self.wanted_BL == i) & real).sum() for i in range(1, n + 1)])
        for count in load:
            self.notes.measure("load", count)
        if not depth.training:
            return
        if depth.method.balancing == "loss":
            mean_share = (shares_BLN * real[..., None]).sum((0, 1)) / real.sum()
            balance = (n * load / real.sum() * mean_share).sum()
            self.notes.add("balance", balance * len(real))
        self.notes.add("router_z", row_means(logits_BLN.logsumexp(-1).square(), real).sum())

    def gated(self, tokens: Tokens, after_RND: Tensor, iteration: int) -> Tensor:
        """Return F(H), for tokens in their last recursion g F(H) + H^1, or with delta H^1 + g (F(H) - H^1)."""
        method, going = self.depth.method, after_RND
        assert self.first_BLD is not None
        gate = tokens.take(self.shares_BL)
        if method.gate == "scaled_sigmoid" and method.alpha is not None:
            gate = method.alpha * gate
        if method.tc_weighting == "every":
            going = self.mix(tokens.states_RND, after_RND, gate, "replace" if method.gate_target == "full" else "delta")
        done = self.mix(tokens.take(self.first_BLD), after_RND, gate)
        return torch.where((tokens.take(self.wanted_BL) == iteration)[..., None], done, going)
