"""Recurrent depth (Huginn, arXiv 2502.05171), and pretrained decoders made so afterwards (arXiv 2511.07384).

    e = prelude(Emb(x));   s_0 = noise;   s_i = core(A [s_{i-1}; e]), i = 1..r;   logits = Head(Norm(coda(s_r)))

Training draws r, r = Poisson(exp(N(log rbar - 1/8, 1/4))) + 1, and back-propagates through the last k iterations; e has
its gradient in all of these. The loop is the library's inner loop, so timestep embedding, loop-wise LoRA, residuals and
stop scores work here as well; a token stops by itself: `key_lookup` says which keys others then find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Count, Natural, Seed, SomeLoops, Weight
from innerloop.config.curriculum import Schedule
from innerloop.config.loop import BankKind, LoopSampling, LoopSettings, ResidualKind, Site, TimeKind
from innerloop.config.stopping import CommonStop
from innerloop.errors import refuse
from innerloop.loop.sampling import draw_loops
from innerloop.methods.depth.method import DepthMethod
from innerloop.methods.depth.ramp import RampKind, RampSchedule, ramped
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Row

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone

SPLIT = "recurrent_depth_layers"  # where the configuration of a rebuilt decoder says how many layers each part has

AdapterInit = Literal["pass_e", "pass_s", "mean", "default"]
LookupKind = Literal["latest", "always_last", "skip", "compress", "anchor"]
DEFAULT_SLOTS = {"compress": 4, "anchor": 8}


@dataclass(frozen=True)
class CoreLoop(LoopSettings):
    """How the core's output, which is no input of the head yet, becomes its next state."""

    residual: ResidualKind = "none"
    alpha: float = 0.7
    time: TimeKind = "none"
    lora: BankKind = "none"
    lora_rank: int = 8
    lora_gamma: float = 16.0

    site: ClassVar[Site] = "pre_norm"  # type: ignore[misc]


@dataclass(frozen=True)
class CoreStop(CommonStop):
    """Tokens stop one by one; the first state is noise, which a score may be kept from comparing with."""

    compare_init: bool = True


@dataclass(frozen=True)
class RecurrentDepth(DepthMethod):
    """Prelude, a core that runs r times on a state and is told e each time, coda.

    Args:
        n_prelude: l_P, the first layers; None: a fifth of the layers.
        n_core: l_R, the layers before the coda; None: 3/8 of a pretrained decoder's, else all between the other parts.
        n_coda: l_C, the last layers; None: a fifth of the layers.
        drops: of a pretrained decoder, drop the layers between prelude and core; off: they belong to the core.
        max_loops: rbar, the iterations when answering, and about the mean of those in training.
        loop_sampling: iterations of a training batch: rbar (fixed), uniform in 1..rbar, or log-normal Poisson around.
        ramp: in training rbar grows from 1 to max_loops: not at all, linear, or as 1-sqrt(1-u); k is never above it.
        ramp_steps: optimizer steps until it has grown (in the paper 0.25 of all for linear, 0.75 for 1-sqrt).
        bptt: k, back-propagate through the last so many iterations; the others run without a gradient; None: all.
        injection: how the core is told e: a linear map of [s; e] (concat), or s + e (add).
        adapter_init: concat: the map starts as e alone (pass_e), s alone (pass_s), their mean, or at random (default).
        state_std: standard deviation of s_0, cut at three; 0: zeros; None: sqrt(2 / (5 D)); retrofits' code has 0.0087.
        state_seed: of s_0 when answering: it depends on this and the position; training draws it anew.
        chains_state: when answering, s_0 of a new token is the last state of the token before. Approximate: tokens read
            together begin with noise.
        sandwich: norms of the sums of the state and what attention or MLP adds to it, as in Huginn.
        double_norm: the final norm also before the coda, as in Huginn; off: as in pretrained decoders made so.
        kv_lookup: which keys are found of tokens that ended before: their last (latest, exact), none (skip, exact), the
            last of all, even a later one (always_last, approximate; Huginn's code only where a token lacks its keys), m
            slots used round and round (compress, approximate beyond m iterations), m slots and one for all later
            (anchor, approximate beyond m + 1). Approximate all, where a stop.rule reads words through a coda.
        kv_slots: m; None: 4 for compress, 8 for anchor.
        write_steps: off: the answer alone is written, so that all thinking happens inside the tokens.
    """

    name: ClassVar[str] = "recurrent_depth"
    paper: ClassVar[str] = "arXiv 2502.05171, 2511.07384"
    summary: ClassVar[str] = "a core of layers refines a state any number of times, told the input each time"
    forward: ClassVar[str] = "innerloop.methods.depth.recurrent_depth_forward:RecurrentDecoder"

    n_prelude: Count | None = None
    n_core: Count | None = None
    n_coda: Natural | None = None
    drops: bool = True
    max_loops: SomeLoops = 32
    loop_sampling: LoopSampling = "lognormal_poisson"
    ramp: RampKind = "none"
    ramp_steps: Natural = 0
    bptt: SomeLoops | None = 8
    injection: Literal["concat", "add"] = "concat"
    adapter_init: AdapterInit = "pass_e"
    state_std: Weight | None = None
    state_seed: Seed = 0
    chains_state: bool = False
    sandwich: bool = False
    double_norm: bool = False
    kv_lookup: LookupKind = "latest"
    kv_slots: SomeLoops | None = None
    write_steps: bool = True
    loop: CoreLoop = CoreLoop()
    stop: CoreStop = CoreStop()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                not self.drops and self.n_core is not None,
                "with drops off the core is all between prelude and coda: leave n_core out, or set drops to true",
            ),
            (
                (self.ramp == "none") != (self.ramp_steps == 0),
                "ramp and ramp_steps belong together: set both, or neither",
            ),
            (
                self.injection != "concat" and self.adapter_init != "pass_e",
                "adapter_init is for injection=concat",
            ),
            (
                self.kv_slots is not None and self.kv_lookup not in DEFAULT_SLOTS,
                f"kv_slots is for kv_lookup={' or '.join(DEFAULT_SLOTS)}",
            ),
        )

    @property
    def curriculum(self) -> Schedule:  # type: ignore[override]
        """With a ramp, the stage is the mean number of iterations; it clears nothing of the optimizer."""
        return RampSchedule()

    @property
    def last_stage(self) -> int:
        """The mean number of iterations when the ramp is over; without one there is stage 0 alone."""
        return 0 if self.ramp == "none" else self.max_loops

    def stage_at(self, step: int, steps_per_epoch: int) -> int:
        """Return the mean number of iterations at an optimizer step, where there is a ramp."""
        return 0 if self.ramp == "none" else ramped(self.ramp, self.max_loops, step, self.ramp_steps)

    def stages(self) -> Sequence[int]:
        """Return the last stage: all lay examples out alike."""
        return (self.last_stage,)

    def n_loops(self, stage: int) -> int:
        """Return rbar at a stage."""
        return self.max_loops if self.ramp == "none" else min(max(stage, 1), self.max_loops)

    def depth(self) -> int:
        """Return rbar."""
        return self.max_loops

    def with_loops(self, loops: int) -> RecurrentDepth:
        """Return the method for answering with r = ``loops``."""
        return replace(self, max_loops=loops, ramp="none", ramp_steps=0)

    def prompt(self, question: str, encoder: PromptEncoder, stage: int = 0) -> Row:
        """Return ``[Q]``, to be read with the iterations of the stage."""
        row = super().prompt(question, encoder, stage)
        row.depth = self.n_loops(stage)
        return row

    def rows(
        self, examples: Sequence[Example], encoder: PromptEncoder, stage: int | None = None, seed: str = ""
    ) -> list[Row]:
        """Lay out examples; ``seed`` draws r, the same for the whole batch and in all processes."""
        rows = super().rows(examples, encoder, stage, seed)
        if seed:
            mean = self.n_loops(self.last_stage if stage is None else stage)
            drawn = draw_loops(self.loop_sampling, mean, seed)
            for row in rows:
                row.depth = drawn
        return rows

    def split(self, n_layers: int) -> tuple[int, int, int]:
        """Return (l_P, l_R, l_C) for a pretrained decoder of so many layers."""
        fifth = max(1, round(n_layers / 5))
        first = fifth if self.n_prelude is None else self.n_prelude
        last = fifth if self.n_coda is None else self.n_coda
        between = n_layers - first - last
        core = self.n_core
        if core is None:
            core = min(max(1, round(3 * n_layers / 8)), between) if self.drops else between
        refuse(
            (
                core < 1 or core > between,
                f"the model has {n_layers} layers, of which prelude and coda take {first + last}: too few are left for "
                f"a core{f' of {core}' if core > 0 else ''}; lower n_prelude, n_core or n_coda",
            )
        )
        return first, core, last

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the first l_P layers, and the l_R + l_C last."""
        n = backbone.n_layers
        first, core, last = self.split(n)
        kept = [*range(first), *range(n - core - last, n)]
        if len(kept) < n:
            backbone.replace_layers([backbone.layers[i] for i in kept], kept)
        setattr(backbone.config, SPLIT, [first, core, last])

    def begin(self, backbone: Backbone) -> None:
        """Draw fresh weights for the depth that they will have."""
        first, core, last = replace(self, drops=False, n_core=None).split(backbone.n_layers)
        backbone.expect_depth(first + self.max_loops * core + last)
