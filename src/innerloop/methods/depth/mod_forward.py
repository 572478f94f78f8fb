"""The passes of Mixture-of-Depths: some layers run on the tokens that their router lets through (`mod`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from innerloop.decoder.backbone import Backbone
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.mod import Mod
from innerloop.methods.depth.router import (
    Notes,
    Router,
    gate_of,
    membership_loss,
    mixed,
    share_chosen,
    share_of,
    tokens_in,
    top_k,
    warmed,
)
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput, Tokens

SLOWEST = 0.02  # the least weight that a training batch has in the running mean of a threshold
NARROWER = 4  # how many times narrower a predictor is inside than the model


class Predictor(nn.Module):
    """W_b GELU(W_a x): whether a token is among the chosen, told from it alone and without a say in the router."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, max(width // NARROWER, 1)), nn.Linear(max(width // NARROWER, 1), 1)

    def forward(self, states_BLD: Tensor) -> Tensor:
        """Return a logit for each token (B, L)."""
        with torch.autocast(states_BLD.device.type, enabled=False):
            return self.outer(gelu(self.inner(states_BLD.detach().to(self.inner.weight.dtype))))[..., 0]

    @property
    def flops(self) -> float:
        """What a token's logit costs."""
        return 2.0 * sum(p.numel() for p in self.parameters())


class ModDepth(DepthForward):
    """The layers one after the other, some of them on the tokens that their router lets through.

    A pass's ``depths_BL`` count the layers that a token ran. ``measured`` has, for each routed layer, the share of
    tokens that were chosen (selected) and, where later tokens were seen, the share for which the causal rule says the
    same (agreement).
    """

    method: Mod
    thresholds: Tensor
    n_batches: Tensor

    def __init__(self, method: Mod, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n, width = backbone.n_layers, backbone.width
        self.routed = sorted(method.routed_layers) or list(range(1, n, 2))
        refuse(
            (
                not self.routed or self.routed[0] < 1 or self.routed[-1] >= n,
                f"the model has {n} layers, of which 1 to {n - 1} may be routed (layer 0 is run by all tokens): set "
                "routed_layers accordingly",
            )
        )
        self.routers = nn.ModuleList(Router(width) for _ in self.routed)
        has_predictors = method.causality == "predictor" and method.capacity < 1
        self.predictors = nn.ModuleList(Predictor(width) for _ in self.routed if has_predictors)
        self.register_buffer("thresholds", torch.zeros(len(self.routed)))
        self.register_buffer("n_batches", torch.zeros(()))
        self.sees_later = method.routing_mode == "topk"  # when answering

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""
        tokens, n, notes = reading.tokens, self.backbone.n_layers, Notes()
        state, depths, done = tokens.states_RND, tokens.real.long() * (n - len(self.routed)), 0
        for index, layer in enumerate([*self.routed, n]):
            if done < layer:  # what lies between two routed layers is run by all
                state = self.run(reading, tokens.with_states(state), range(done, layer), done, inner=done > 0)
            if layer < n:
                chosen, logits = self._choose(reading, index, state, notes)
                depths = depths + chosen
                state = self._run_routed(reading, tokens.with_states(state), layer, chosen, logits)
            done = layer + 1
        return PassOutput(self.backbone.norm(state), depths, sums=notes.sums, measured=notes.measured)

    def _run_routed(
        self, reading: PassInput, tokens: Tokens, layer: int, chosen_BL: Tensor, logits_BL: Tensor
    ) -> Tensor:
        """Return the states (B, L, D) after a routed layer."""
        picked, method = tokens.pick(chosen_BL), self.method
        if picked is None:
            return tokens.states_RND
        after = self.run(reading, picked, range(layer, layer + 1), layer)
        gate = gate_of(picked.take(logits_BL), method.gate, 1.0 if method.alpha is None else method.alpha)
        new = mixed(picked.states_RND, after, gate, method.gate_target, straight=method.gate == "st")
        return picked.put(tokens.states_RND, new)

    def _choose(self, reading: PassInput, index: int, state_BLD: Tensor, notes: Notes) -> tuple[Tensor, Tensor]:
        """Return which tokens run a routed layer, and the router's scores, both (B, L)."""
        method, real = self.method, reading.tokens.real
        rule = logits = self.routers[index](state_BLD)[..., 0]
        flops = float(self.routers[index].flops)  # type: ignore[arg-type]
        if self.predictors:
            rule = self.predictors[index](state_BLD)
            flops += float(self.predictors[index].flops)  # type: ignore[arg-type]
        if reading.cost_scope is not None:
            reading.cost_scope.spend(reading.tokens, torch.zeros_like(reading.tokens.positions_RN), 0, flops)
        if method.capacity == 1:
            notes.measure("selected", share_chosen(real, real))
            return real, logits
        allowed = real & (rule.detach() > self.thresholds[index])
        if not (self.training or self.sees_later):
            notes.measure("selected", share_chosen(allowed, real))
            return allowed, logits

        def highest() -> Tensor:
            share = warmed(method.capacity, self.step if self.training else None, method.capacity_warmup, "linear")
            return top_k(logits, real, share_of(tokens_in(real, method.capacity_base), share, "up"))

        chosen = reading.choice(index, highest)
        notes.measure("selected", share_chosen(chosen, real))
        notes.measure("agreement", share_chosen(allowed == chosen, real))
        if method.causality == "calibrated":
            notes.measure("quantile", torch.quantile(logits.detach()[real], 1 - method.capacity))
        else:
            name = "router" if method.causality == "aux_bce" else "predictor"
            notes.add(name, membership_loss(rule, chosen, real) / len(self.routed))
        return chosen, logits

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return the routers' or predictors' term; thresholds follow the quantiles of the training batches."""
        for deep in inputs.thought.deep if self.training else ():
            if "quantile" in deep.measured:
                self.n_batches += 1
                weight = (1 / self.n_batches).clamp(min=SLOWEST)
                self.thresholds += weight * (deep.measured["quantile"] - self.thresholds)
        return super().loss_terms(inputs)
