"""Looped transformers (arXiv 2502.17416): a block of layers is applied L times; depth without parameters.

The block, its exits and its cache are those of `block_loop`; timestep embedding, loop-wise LoRA, residuals and stop
scores work inside the token as well, and beta_i is ``loop: {residual: B, alpha: 1, alpha_learn: free}``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Natural, SomeLoops
from innerloop.config.loop import AlphaLearn, BankKind, LoopSampling, ResidualKind, Site, TimeKind
from innerloop.config.losses import ExitSettings
from innerloop.config.stopping import GATED, CommonStop
from innerloop.errors import refuse
from innerloop.methods.depth.block_loop import BlockLoop, BlockStates, KvMissing, KvShare

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone
    from innerloop.loop.loop import InnerLoop
    from innerloop.passes.ragged import DepthForward


@dataclass(frozen=True)
class LoopedLoop(BlockStates):
    """How the block's output becomes its next input: site=post_norm norms it first, as in Ouro."""

    site: Site = "pre_norm"
    residual: ResidualKind = "none"
    alpha: float = 0.7
    alpha_learn: AlphaLearn = "fixed"
    time: TimeKind = "none"
    lora: BankKind = "none"
    lora_rank: int = 8
    lora_gamma: float = 16.0
    bptt: int | None = None


@dataclass(frozen=True)
class LoopedStop(CommonStop):
    """Tokens stop one by one; a gate may learn when."""

    untrained: ClassVar[tuple[str, ...]] = ("act",)


@dataclass(frozen=True)
class LoopedExits(ExitSettings):
    """Losses after earlier iterations, or Ouro's gate (arXiv 2510.25741)."""

    weight: float = 0.0
    gate: Literal["none", "distribution", "improvement"] = "none"
    gate_beta: float = 0.1


@dataclass(frozen=True)
class Looped(BlockLoop):
    """k(x)L: k layers applied L times; from scratch, or made of a pretrained model.

    Args:
        n_prelude: layers before the block.
        n_coda: layers after it.
        max_loops: L.
        loop_sampling: iterations of a training batch: L (fixed), uniform in 1..L, or log-normal Poisson around L.
        sandwich: norms of what attention and MLP add to the state, as in Ouro.
        input_injection: learn gamma, by which the block's first input is added to that of every iteration.
        kv_missing: tokens that stopped earlier than another are not attended to in later iterations (restrict), or as
            they were in their last (share_step), or run on, though their word is known (full_compute, no saving).
        kv_share: while answering, attend to the keys and values that earlier tokens had in one iteration, or to their
            mean, and keep only those: a smaller cache. Approximate; none is exact.
        init: what becomes the block of a pretrained model: all layers between prelude and coda (middle_dup), the first
            of them (first_k), some spread evenly (stepwise), or means over their depths (average).
        n_block: k, how many layers first_k, stepwise and average make.
        write_steps: off: the answer alone is written, so that all thinking happens inside the tokens.
    """

    name: ClassVar[str] = "looped"
    paper: ClassVar[str] = "arXiv 2502.17416"
    summary: ClassVar[str] = "a block of layers is applied several times"

    n_prelude: Natural = 0
    n_coda: Natural = 0
    max_loops: SomeLoops = 2
    loop_sampling: LoopSampling = "fixed"
    input_injection: bool = False
    sandwich: bool = False
    kv_missing: KvMissing = "share_step"
    kv_share: KvShare = "none"
    init: Literal["middle_dup", "first_k", "stepwise", "average"] = "middle_dup"
    n_block: Natural = 0
    write_steps: bool = True
    loop: LoopedLoop = LoopedLoop()
    stop: LoopedStop = LoopedStop()
    exits: LoopedExits = LoopedExits()

    def __post_init__(self) -> None:
        super().__post_init__()
        stops, gate = self.stop.stops, self.exits.gate
        refuse(
            (not stops and self.kv_missing != "share_step", "kv_missing is for tokens that stop: set stop.rule"),
            (
                stops and self.kv_share != "none",
                "kv_share is for tokens that all run every iteration: set stop.rule or kv_share to none",
            ),
            (
                gate != "none" and self.stop.rule not in GATED,
                f"exits.gate={gate} trains the gate of a learned stop: set stop.rule to halt or halt_sample",
            ),
            (
                gate == "improvement" and (self.max_loops < 2 or self.loop_sampling != "fixed"),
                "exits.gate=improvement compares iterations: set max_loops to at least 2 and loop_sampling to fixed",
            ),
            (
                (self.init == "middle_dup") != (self.n_block == 0),
                "n_block is how many layers first_k, stepwise and average make: give both init and n_block, or neither",
            ),
        )

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        """Make the block of the layers between prelude and coda."""
        from innerloop.methods.depth.tying import depths_of, rebuild, stepwise, with_ends

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

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward | None:
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
