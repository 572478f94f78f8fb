"""The passes of a looped block: prelude, the block over and over, coda (`block_loop` has the equations)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import Slot
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.block_loop import BlockLoop
from innerloop.methods.depth.exits import exit_terms
from innerloop.methods.depth.kv_sharing import SharedKv, stopped_earlier
from innerloop.methods.depth.sandwich import SandwichNorms
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import BlockPass, DepthForward, TokenPass
from innerloop.passes.tokens import PassInput, PassOutput, Tokens, read_layers


class LoopedDepth(DepthForward):
    """Prelude, the block over and over, coda."""

    method: BlockLoop

    def __init__(self, method: BlockLoop, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        n = backbone.n_layers
        refuse(
            (
                method.n_prelude + method.n_coda >= n,
                f"the model has {n} layers, which leaves none to loop: lower n_prelude or n_coda",
            )
        )
        self.prelude = range(method.n_prelude)
        self.block = range(method.n_prelude, n - method.n_coda)
        self.coda = range(n - method.n_coda, n)
        self.gamma = nn.Parameter(torch.zeros(())) if method.input_injection else None
        self.norms = SandwichNorms(backbone, "outputs") if method.sandwich else None
        self.is_normed = method.loop.site == "post_norm"
        if loop.lora is not None:
            loop.lora.keep_layers(self.block)
        if method.exits.gate == "improvement":
            assert loop.stop is not None
            for part in (backbone, loop, self):
                part.requires_grad_(False)
            loop.stop.requires_grad_(True)

    def weights(self, iteration: int) -> AbstractContextManager[None]:
        """Return the block in which ``iteration`` runs."""
        return self.loop.weights(iteration)

    def extra_flops(self, iteration: int) -> float:
        """Return what an iteration costs per token besides its layers."""
        lora = self.loop.lora
        return 0.0 if lora is None or lora.index(iteration) is None else lora.flops

    def read_out(self, states: Tensor) -> Tensor:
        """Return the logits that what an iteration gives back shows."""
        return self.backbone.head(states if self.is_normed else self.backbone.norm(states))

    def leave(self, reading: PassInput, state_BLD: Tensor, key: Hashable = "coda") -> Tensor:
        """Return the states after coda and final norm."""
        if self.coda:
            state_BLD = self.run(reading, reading.tokens.with_states(state_BLD), self.coda, key)
        elif self.is_normed and reading.loops != 0:
            return state_BLD
        return self.backbone.norm(state_BLD)

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""
        with nullcontext() if self.norms is None else self.norms.on():
            return self.go_round(reading)

    def go_round(self, reading: PassInput) -> PassOutput:
        """Run the loop; where tokens may stop by themselves, each goes its own number of times round."""
        tokens, method = reading.tokens, self.method
        n_loops = method.max_loops if reading.loops is None else reading.loops
        if self.prelude:
            first = self.run(reading, tokens, self.prelude, "prelude", inner=False)
        else:
            first = self.backbone.enter(tokens.states_RND, tokens.positions_RN)
        deep = PassOutput(first, tokens.real.long() * n_loops)
        if self.loop.stop is not None and not self.training:
            runs_on = method.kv_missing == "full_compute"
            each = (LoopedRunOnPass if runs_on else LoopedTokenPass)(self, reading, first, n_loops)
            lined = each.line_up(first)
            result = self.loop(each, lined, [n_loops] * len(lined), None, self.read_out)
            each.finish()
            deep.depths_BL = each.place(result.n_loops, deep.depths_BL)
            deep.states_BLD = self.leave(reading, each.place(result.state[:, 0], first))
            return deep
        block = LoopedPass(self, reading, first, n_loops)
        result = self.loop(block, first, [n_loops] * len(first), reading.trace, self.read_out)
        if method.kv_share != "none" and not self.training and reading.n_read == 0 and n_loops > 0:
            SharedKv(method.kv_share, reading.cache, n_loops)  # now, as rows may join that have read more
        deep.states_BLD = self.leave(reading, result.state)
        if self.training and method.exits.wants_exits:
            states = [state for _, state in result.states]
            deep.exits = [self.leave(reading, state, ("coda", t)) for t, state in enumerate(states[:-1], 1)]
            deep.exits.append(deep.states_BLD)
            if method.exits.gate != "none" and self.loop.stop is not None:
                stop, shape = self.loop.stop, tokens.positions_RN.shape
                deep.gates = [stop.halting_logit(state.flatten(0, 1)[:, None]).view(shape) for state in states]
        return deep

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return what is learned at the exits, too."""
        terms = super().loss_terms(inputs)
        return terms | exit_terms(self.method.exits, inputs) if inputs.thought.deep[-1].exits else terms


class LoopedPass(BlockPass):
    """f: the block over all tokens, with the block's first input added and keys and values shared as the method says.

    Args:
        depth: the method.
        reading: the pass.
        first_BLD: the block's first input.
        n_loops: the number of iterations.
    """

    depth: LoopedDepth

    def __init__(self, depth: LoopedDepth, reading: PassInput, first_BLD: Tensor, n_loops: int):
        super().__init__(depth, reading, depth.block)
        self.first, self.n_loops = first_BLD, n_loops
        shares = depth.method.kv_share != "none" and not depth.training and reading.n_read > 0
        self.shared = SharedKv(depth.method.kv_share, reading.cache, n_loops) if shares else None

    def weights(self, iteration: int) -> AbstractContextManager[None]:
        """Return the block in which ``iteration`` runs."""
        return self.depth.weights(iteration)

    def run(self, tokens: Tokens, iteration: int) -> Tensor:
        """Run the block on some tokens."""
        depth, cost_scope = self.depth, self.reading.cost_scope
        if depth.gamma is not None:
            added = depth.gamma.to(self.first.dtype) * tokens.take(self.first)
            tokens = tokens.with_states(tokens.states_RND + added)
        if cost_scope is not None and (extra := depth.extra_flops(iteration)):
            cost_scope.spend(tokens, torch.zeros_like(tokens.positions_RN), 0, extra)
        if self.shared is not None:
            slot = self.shared.slot()
            states = read_layers(depth.backbone, tokens, slot, cost_scope=cost_scope)
            self.shared.remember(slot, iteration)
        else:
            slot = self.reading.cache.slot(iteration, self.layers, self.reading.tokens.positions_RN)
            states = read_layers(depth.backbone, tokens, slot, self.also(tokens, iteration), cost_scope=cost_scope)
        return depth.backbone.norm(states) if depth.is_normed else states

    def also(self, tokens: Tokens, iteration: int) -> Sequence[Slot]:
        """Return further slots that are attended to."""
        return ()


class LoopedTokenPass(LoopedPass, TokenPass):
    """f: the block over tokens that may stop one by one."""

    def also(self, tokens: Tokens, iteration: int) -> Sequence[Slot]:
        """Return the slots of tokens that stopped earlier."""
        if self.depth.method.kv_missing == "restrict":
            return ()
        return stopped_earlier(self.reading, tokens, iteration)

    def finish(self) -> None:
        """Do what is left once all tokens have stopped."""


class LoopedRunOnPass(LoopedTokenPass):
    """f: the block over all tokens in every iteration; those that have stopped go on, so that others see them whole."""

    def __init__(self, depth: LoopedDepth, reading: PassInput, first_BLD: Tensor, n_loops: int):
        super().__init__(depth, reading, first_BLD, n_loops)
        self.state_BLD, self.n_ran = first_BLD, 0

    def __call__(self, inputs_A1D: Tensor, iteration: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        """Return the states (A, 1, D) after the block of the tokens that go on."""
        loop, active_BL1 = self.depth.loop, self.active_BL[..., None]
        inputs_BLD = torch.where(active_BL1, self.spread(inputs_A1D), loop.inject(self.state_BLD, iteration))
        output_BLD = BlockPass.__call__(self, inputs_BLD, iteration)
        self.state_BLD = loop.residual(loop.feed_back(output_BLD, None), self.first, self.state_BLD, iteration)
        self.n_ran = iteration
        return self.line_up(output_BLD)

    def also(self, tokens: Tokens, iteration: int) -> Sequence[Slot]:
        """Return no further slots: every one has all tokens."""
        return ()

    def finish(self) -> None:
        """Run what is left of the iterations."""
        self.flat_A, self.active_BL = self.flat_A[:0], torch.zeros_like(self.active_BL)
        for iteration in range(self.n_ran + 1, self.n_loops + 1):
            self(self.line_up(self.first), iteration)
