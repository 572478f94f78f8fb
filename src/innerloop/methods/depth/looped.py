"""Looped transformers (arXiv 2502.17416): a block of layers is applied L times; depth without parameters.

    h = Emb(x);  h = prelude(h);  e = h
    for i = 1..L:  h = h + beta_i (block(h + gamma e) - h)                     beta_i = 1 and gamma = 0 unless asked for
    h = coda(h);  logits = Head(Norm(h))                                                                  (looped.md, 3)

The loop is the library's inner loop: its state are the tokens' states between two layers, so timestep embedding,
loop-wise LoRA, residuals and stop scores work here as well; beta_i is ``residual: B, alpha: 1, alpha_learn: free``.
Every (loop, layer) has keys and values of its own. Stop scores that look at words see the block's output through the
final norm and the head. What is learned at earlier exits, such as the gate of Ouro (arXiv 2510.25741), is in
`innerloop.methods.depth.exits`.
"""

import copy
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from innerloop.config.loop import LoopSettings
from innerloop.config.losses import ExitSettings
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache, Slot
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.loop.sampling import LoopSampling, draw_loops
from innerloop.methods.depth.exits import exit_terms
from innerloop.methods.depth.kv_sharing import KvMissing, KvShare, SharedKv, stopped_earlier
from innerloop.methods.depth.method import DepthMethod
from innerloop.methods.depth.tying import depths_of, rebuild, stepwise, with_ends
from innerloop.passes.loss_inputs import LossInputs, PassTerms
from innerloop.passes.ragged import BlockPass, DepthForward, TokenPass
from innerloop.passes.tokens import PassInput, PassOutput, Tokens, read_layers


@dataclass(frozen=True)
class BlockLoop(LoopSettings, ExitSettings, DepthMethod):
    """All layers but ``n_prelude`` first and ``n_coda`` last ones are one block, applied ``max_loops`` times.

    Args:
        n_prelude: layers before the block.
        n_coda: layers after it.
        max_loops: L.
        loop_sampling: iterations of a training batch: L (fixed), uniform in 1..L, or log-normal Poisson around L.
        input_injection: learn gamma, by which the block's first input is added to that of every iteration.
        kv_missing: tokens that stopped earlier than another are not attended to in later iterations (restrict), or as
            they were in their last (share_step).
        kv_share: while answering, attend to the keys and values that earlier tokens had in one iteration, or to their
            mean, and keep only those: a smaller cache. Approximate; none is exact.
        feedback_site: an iteration gives back the block's output (pre_norm), or the final norm of it (post_norm).
    """

    n_prelude: int = 0
    n_coda: int = 0
    max_loops: int = 2
    loop_sampling: LoopSampling = "fixed"
    input_injection: bool = False
    kv_missing: KvMissing = "share_step"
    kv_share: KvShare = "none"
    feedback_site: Literal["post_norm", "pre_norm"] = "pre_norm"

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        ExitSettings.__post_init__(self)
        name, stops = self.name, self.stop != "none"
        refuse(
            (min(self.n_prelude, self.n_coda) < 0, "n_prelude and n_coda cannot be negative"),
            (self.max_loops < 1, f"{name} needs max_loops >= 1"),
            (
                self.shift or self.time_inject == "token" or self.stop_site == "answer",
                f"shift, time_inject=token and stop_site=answer are for latents: leave them out with {name}",
            ),
            (
                self.solver != "none",
                "every iteration of a block has keys and values of its own, so there is no fixed point: set solver to "
                "none",
            ),
            (
                self.noise_level == "delta",
                "noise_level=delta would tell a token how much later ones have changed: set it to none or injected",
            ),
            (self.stop_agg != "mean", "tokens stop one by one, so there is nothing to reduce: leave stop_agg out"),
            (not stops and self.kv_missing != "share_step", "kv_missing is for tokens that stop: set a stop score"),
            (
                stops and self.kv_share != "none",
                "kv_share is for tokens that all run every iteration: set stop or kv_share to none",
            ),
            (
                self.gate != "none" and self.stop not in ("halt", "halt_sample"),
                f"gate={self.gate} trains the gate of a learned stop: set stop to halt or halt_sample",
            ),
            (self.stop == "act", "stop=act mixes the iterations of whole rows: it is for latents"),
            (
                self.gate == "improvement" and (self.max_loops < 2 or self.loop_sampling != "fixed"),
                "gate=improvement compares iterations: set max_loops to at least 2 and loop_sampling to fixed",
            ),
            (
                self.gate == "improvement" and self.spectral_weight > 0,
                "gate=improvement trains the gate alone: set spectral_weight to 0",
            ),
        )

    @property
    def n_iterations(self) -> int:
        """Each iteration may have a timestep embedding and LoRA of its own."""
        return self.max_loops

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        return {**super().term_weights, **self.exit_term_weights}

    def depth(self) -> int:
        """Return L."""
        return self.max_loops

    def sampled(self, seed: str) -> "BlockLoop":
        """Draw L for a training batch."""
        if self.loop_sampling == "fixed" or not seed:
            return self
        return replace(self, max_loops=draw_loops(self.loop_sampling, self.max_loops, seed), loop_sampling="fixed")

    def with_loops(self, loops: int) -> "BlockLoop":
        """Return the method for answering with L = ``loops``; how it was trained no longer matters."""
        untrained = {"exit_weight": 0.0, "exit_kd": 0.0, "exit_schedule": "equal", "gate": "none"}
        return replace(self, max_loops=loops, loop_sampling="fixed", **untrained)  # type: ignore[arg-type]

    def begin(self, backbone: Backbone) -> None:
        """Draw fresh weights for the depth that they will have."""
        n_looped = backbone.n_layers - self.n_prelude - self.n_coda
        backbone.expect_depth(backbone.n_layers + (self.max_loops - 1) * n_looped)

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the looping decoder."""
        return LoopedDepth(self, backbone, loop)


@dataclass(frozen=True)
class Looped(BlockLoop):
    """k(x)L: k layers applied L times; from scratch, or made of a pretrained model.

    Args:
        init: what becomes the block of a pretrained model: all layers between prelude and coda (middle_dup), the first
            of them (first_k), some spread evenly (stepwise), or means over their depths (average).
        n_block: k, how many layers first_k, stepwise and average make.
    """

    name: ClassVar[str] = "looped"
    paper: ClassVar[str] = "arXiv 2502.17416"
    summary: ClassVar[str] = "a block of layers is applied several times"

    init: Literal["middle_dup", "first_k", "stepwise", "average"] = "middle_dup"
    n_block: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                (self.init == "middle_dup") != (self.n_block == 0) or self.n_block < 0,
                "n_block is how many layers first_k, stepwise and average make: give both init and n_block, or neither",
            ),
        )

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the block of the layers between prelude and coda."""
        if self.init == "middle_dup":
            return
        k, between = self.n_block, backbone.n_layers - self.n_prelude - self.n_coda
        refuse((between < k, f"the model has {between} layers between prelude and coda: lower n_block, which is {k}"))
        match self.init:
            case "first_k":
                block = [[j] for j in range(k)]
            case "stepwise":
                block = [[j] for j in stepwise(between, k)]
            case _:
                block = depths_of(between, k)
        rebuild(backbone, with_ends(block, self.n_prelude, backbone.n_layers, self.n_coda))

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the looping decoder."""
        looped = backbone.n_layers - self.n_prelude - self.n_coda
        refuse(
            (
                self.n_block not in (0, looped),
                f"the model has {looped} layers between prelude and coda, not n_block={self.n_block}: start from a "
                "pretrained model, or set init to middle_dup and n_block to 0",
            )
        )
        return super().make_depth(backbone, loop)


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
        if loop.lora is not None:
            loop.lora.keep_layers(self.block)
        if method.gate == "improvement":
            assert loop.stop is not None
            for part in (backbone, loop, self):
                part.requires_grad_(False)
            loop.stop.requires_grad_(True)

    @property
    def norms(self) -> bool:
        """Whether an iteration gives back a state after the final norm."""
        return self.method.feedback_site == "post_norm"

    def weights(self, loop: int) -> AbstractContextManager[None]:
        """Return the block in which iteration ``loop`` runs."""
        return self.loop.weights(loop)

    def extra_flops(self, loop: int) -> float:
        """Return what an iteration costs per token besides its layers."""
        lora = self.loop.lora
        return 0.0 if lora is None or lora.index(loop) is None else lora.flops

    def read_out(self, states: Tensor) -> Tensor:
        """Return the logits that what an iteration gives back shows."""
        return self.backbone.head(states if self.norms else self.backbone.norm(states))

    def leave(self, reading: PassInput, state_BLD: Tensor, key: Hashable = "coda") -> Tensor:
        """Return the states after coda and final norm."""
        if self.coda:
            state_BLD = self.run(reading, reading.tokens.with_states(state_BLD), self.coda, key)
        elif self.norms:
            return state_BLD
        return self.backbone.norm(state_BLD)

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass; where tokens may stop by themselves, each goes its own number of times round."""
        tokens, method = reading.tokens, self.method
        n_loops = method.max_loops if reading.loops is None else reading.loops
        if self.prelude:
            first = self.run(reading, tokens, self.prelude, "prelude", inner=False)
        else:
            first = self.backbone.enter(tokens.states_RND, tokens.positions_RN)
        deep = PassOutput(first, tokens.real.long() * n_loops)
        if self.loop.stop is not None and not self.training:
            each = LoopedTokenPass(self, reading, first, n_loops)
            lined = each.line_up(first)
            result = self.loop(each, lined, [n_loops] * len(lined), None, self.read_out)
            deep.depths_BL = each.place(result.n_loops, deep.depths_BL)
            deep.states_BLD = self.leave(reading, each.place(result.state[:, 0], first))
            return deep
        block = LoopedPass(self, reading, first, n_loops)
        result = self.loop(block, first, [n_loops] * len(first), reading.trace, self.read_out)
        if method.kv_share != "none" and not self.training and reading.n_read == 0 and n_loops > 0:
            SharedKv(method.kv_share, reading.cache, n_loops)  # now, as rows may join that have read more
        deep.states_BLD = self.leave(reading, result.state)
        if self.training and method.wants_exits:
            states = [state for _, state in result.states]
            deep.exits = [self.leave(reading, state, ("coda", t)) for t, state in enumerate(states[:-1], 1)]
            deep.exits.append(deep.states_BLD)
            if method.gate != "none" and self.loop.stop is not None:
                stop, shape = self.loop.stop, tokens.positions_RN.shape
                deep.gates = [stop.halting_logit(state.flatten(0, 1)[:, None]).view(shape) for state in states]
        if result.gain is not None:
            penalty = (result.gain - method.spectral_bound).clamp(min=0).square()
            deep.sums["gain"] = penalty * len(first)
        return deep

    def loss_terms(self, inputs: LossInputs) -> PassTerms:
        """Return what is learned at the exits, too."""
        terms = super().loss_terms(inputs)
        return terms | exit_terms(self.method, inputs) if inputs.thought.deep[-1].exits else terms


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
        self.first, self.n_loops, self.forgets = first_BLD, n_loops, False
        shares = depth.method.kv_share != "none" and not depth.training and reading.n_read > 0
        self.shared = SharedKv(depth.method.kv_share, reading.cache, n_loops) if shares else None

    def weights(self, loop: int) -> AbstractContextManager[None]:
        """Return the block in which iteration ``loop`` runs."""
        return self.depth.weights(loop)

    def run(self, tokens: Tokens, loop: int) -> Tensor:
        """Run the block on some tokens."""
        depth, spending = self.depth, self.reading.spending
        if depth.gamma is not None:
            added = depth.gamma.to(self.first.dtype) * tokens.take(self.first)
            tokens = tokens.with_states(tokens.states_RND + added)
        if spending is not None and (extra := depth.extra_flops(loop)):
            spending.spend(tokens, torch.zeros_like(tokens.positions_RN), 0, extra)
        if self.shared is not None:
            slot = self.shared.slot()
            states = read_layers(depth.backbone, tokens, slot, spending=spending)
            self.shared.remember(slot, loop)
        else:
            cache = DepthCache() if self.forgets else self.reading.cache
            slot = cache.slot(loop, self.layers, self.reading.tokens.positions_RN)
            states = read_layers(depth.backbone, tokens, slot, self.also(tokens, loop), spending=spending)
        return depth.backbone.norm(states) if depth.norms else states

    def also(self, tokens: Tokens, loop: int) -> Sequence[Slot]:
        """Return further slots that are attended to."""
        return ()

    def probe(self) -> BlockPass:
        """Return a pass that is forgotten; nothing was read before it, since only training probes."""
        twin = copy.copy(self)
        twin.reading, twin.forgets = replace(self.reading, spending=None), True
        return twin


class LoopedTokenPass(LoopedPass, TokenPass):
    """f: the block over tokens that may stop one by one."""

    def also(self, tokens: Tokens, loop: int) -> Sequence[Slot]:
        """Return the slots of tokens that stopped earlier."""
        if self.depth.method.kv_missing == "restrict":
            return ()
        return stopped_earlier(self.reading, tokens, loop)
