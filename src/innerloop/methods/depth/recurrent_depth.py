"""Recurrent depth (Huginn, arXiv 2502.05171), and pretrained decoders made so afterwards (arXiv 2511.07384).

    e = prelude(Emb(x));   s_0 = noise;   s_i = core(A [s_{i-1}; e]), i = 1..r;   logits = Head(Norm(coda(s_r)))

Training draws r, r = Poisson(exp(N(log rbar - 1/8, 1/4))) + 1, and back-propagates through the last k iterations; e has
its gradient in all of these. The loop is the library's inner loop, so timestep embedding, loop-wise LoRA, residuals and
stop scores work here as well; a token stops by itself: `key_lookup` says which keys others then find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from innerloop.checks.values import Count, Natural, Seed, SomeLoops, Weight
from innerloop.config.curriculum import Schedule
from innerloop.config.loop import BankKind, LoopSampling, LoopSettings, ResidualKind, Site, TimeKind
from innerloop.config.stopping import CommonStop
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.loop.sampling import draw_loops
from innerloop.methods.depth.initial_state import RampKind, RampSchedule, mean_cosine, noise_at, ramped
from innerloop.methods.depth.key_lookup import DEFAULT_SLOTS, ENDED, Lookup, LookupKind, LookupPass, LookupTokenPass
from innerloop.methods.depth.method import DepthMethod
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput, Tokens
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import Row

SPLIT = "recurrent_depth_layers"  # where the configuration of a rebuilt decoder says how many layers each part has

AdapterInit = Literal["pass_e", "pass_s", "mean", "default"]


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

    def make_depth(self, backbone: Backbone, loop: InnerLoop) -> DepthForward:
        """Make the recurrent decoder."""
        return RecurrentDecoder(self, backbone, loop)


@dataclass
class ChainCache(DepthCache):
    """What has been read, and the final state (B, 1, D) of each row's last token."""

    state_B1D: Tensor | None = None

    def keep_rows(self, rows: Tensor) -> DepthCache:
        """Return the cache of some rows."""
        part = super().keep_rows(rows)
        return part if self.state_B1D is None else replace(part, state_B1D=self.state_B1D[rows])  # type: ignore[call-arg]

    def joined(self, caches: Sequence[DepthCache], gaps: Sequence[int], order: Tensor) -> DepthCache:
        """Return caches, of which this is the first, as one."""
        states = [cache.state_B1D for cache in caches if isinstance(cache, ChainCache) and cache.state_B1D is not None]
        return replace(super().joined(caches, gaps, order), state_B1D=torch.cat(states)[order])  # type: ignore[call-arg]


class RecurrentDecoder(DepthForward):
    """Prelude, the core over and over, coda."""

    method: RecurrentDepth

    def __init__(self, method: RecurrentDepth, backbone: Backbone, loop: InnerLoop):
        super().__init__(method, backbone, loop)
        first, core, last = parts = _parts(method, backbone)
        setattr(backbone.config, SPLIT, list(parts))
        self.prelude, self.core = range(first), range(first, first + core)
        self.coda = range(first + core, first + core + last)
        self.adapter = make_adapter(method.adapter_init, backbone.width) if method.injection == "concat" else None
        if loop.lora is not None:
            loop.lora.keep_layers(self.core)

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing."""
        return ChainCache() if self.method.chains_state else DepthCache()

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass; where tokens may stop by themselves, each goes its own number of times round."""
        tokens, method, limit = reading.tokens, self.method, reading.loops
        limit = method.max_loops if limit is None else limit
        told = self.run(reading, tokens, self.prelude, "prelude", inner=False)
        state, depths = self.first_state(reading, told), tokens.real.long() * limit
        prepare = partial(self.inject, reading, told)
        if reading.wanted_BL is not None or (self.loop.stop is not None and not self.training):
            beside = self.glimpses(reading, limit)
            each = LookupTokenPass(self.lookup(reading, limit), prepare, beside)
            lined = each.line_up(state)
            n_each = [limit] * len(lined)
            if reading.wanted_BL is not None:
                n_each = each.line_up(reading.wanted_BL)[:, 0].clamp(1, limit).tolist()
            glimpse = partial(self.glimpse, each, beside)
            result = self.loop(each, lined, n_each, None, glimpse, glimpse)
            each.finish()
            depths, state = each.place(result.n_loops, depths), each.place(result.state[:, 0], state)
        else:
            n_free = self.n_free(limit) if torch.is_grad_enabled() else 0
            assert n_free == 0 or reading.n_read == 0 or not self.training, "training reads a row in one pass"
            block = LookupPass(self.lookup(reading, limit, n_free if self.training else 0), prepare)
            state = self.loop(block, state, [limit] * len(state), reading.trace, n_free=n_free).state
            block.finish()
        self.remember(reading, state)
        out = self.backbone.norm(state) if method.double_norm else state
        if self.coda:
            out = self.run(reading, tokens.with_states(out), self.coda, "coda")
        measured = {"state_cosine": mean_cosine(state.detach(), tokens.real)} if state.shape[1] > 1 else {}
        return PassOutput(self.backbone.norm(out), depths, measured=measured)

    def n_free(self, n_loops: int) -> int:
        """Return how many of r iterations run without a gradient: r - min(r, k)."""
        k = self.method.bptt
        if k is not None and self.step is not None and self.method.ramp != "none":
            k = min(k, self.method.stage_at(self.step, 1))
        return 0 if k is None else max(n_loops - k, 0)

    def first_state(self, reading: PassInput, told_BLD: Tensor) -> Tensor:
        """Return s_0 (B, L, D)."""
        method, positions, width = self.method, reading.tokens.positions_RN, told_BLD.shape[-1]
        std = math.sqrt(2 / (5 * width)) if method.state_std is None else method.state_std
        state = torch.zeros_like(told_BLD)
        if std > 0:
            seeds = torch.full_like(positions[:, :1], method.state_seed)
            if self.training:
                seeds = torch.randint(2**62, seeds.shape, device=seeds.device)
            state = (std * noise_at(seeds, positions, width)).to(told_BLD.dtype)
        if isinstance(reading.cache, ChainCache) and reading.cache.state_B1D is not None:
            is_first = reading.tokens.real & (reading.tokens.real.cumsum(1) == 1) & (positions > 0)
            state = torch.where(is_first[..., None], reading.cache.state_B1D, state)
        return state

    def remember(self, reading: PassInput, state_BLD: Tensor) -> None:
        """Keep the final state of each row's last token, for the first of the next pass."""
        cache, real = reading.cache, reading.tokens.real
        if not isinstance(cache, ChainCache):
            return
        last_B = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1)
        state = state_BLD.gather(1, last_B[:, None, None].expand(-1, 1, state_BLD.shape[-1]))
        before = torch.zeros_like(state) if cache.state_B1D is None else cache.state_B1D
        cache.state_B1D = torch.where(real.any(1)[:, None, None], state, before)

    def inject(self, reading: PassInput, told_BLD: Tensor, tokens: Tokens, iteration: int) -> Tokens:
        """Return tokens with the core's input in place of their states: A [s; e], or s + e."""
        states, told, lora = tokens.states_RND, tokens.take(told_BLD), self.loop.lora
        flops = 0.0 if lora is None or lora.index(iteration) is None else lora.flops
        if self.adapter is None:
            fed = states + told
        else:
            weight = self.adapter.weight
            fed = self.adapter(torch.cat([states, told], dim=-1).to(weight.dtype)).to(states.dtype)
            flops += 2.0 * weight.numel()
        _spend(reading, tokens, flops)
        return tokens.with_states(fed)

    def lookup(self, reading: PassInput, limit: int, n_free: int = 0) -> Lookup:
        """Return the slots of the core in a pass."""
        method = self.method
        return Lookup(method.kv_lookup, method.kv_slots, self, reading, self.core, limit, n_free)

    def glimpses(self, reading: PassInput, limit: int) -> Lookup:
        """Return the slots of the coda while tokens have not ended; of those read before, the last keys are found."""
        aside = DepthCache()
        if "coda" in reading.cache.slots:
            aside.slots[ENDED, 0] = reading.cache.slots["coda"].fork()
        return Lookup("always_last", None, self, replace(reading, cache=aside), self.coda, limit)

    def glimpse(self, each: LookupTokenPass, beside: Lookup, states_A1D: Tensor, _: Tensor | None = None) -> Tensor:
        """Return the logits (A, 1, V) that the tokens' states would give, were they the last."""
        backbone = self.backbone
        states = backbone.norm(states_A1D) if self.method.double_norm else states_A1D
        tokens = each.active(states)
        if self.coda:
            read = beside.read(tokens, each.lookup.loop)
            states = each.line_up(tokens.put(each.spread(torch.zeros_like(states)), read))
        return backbone.head(backbone.norm(states))  # whose FLOPs the loop counts


def _spend(reading: PassInput, tokens: Tokens, flops: float) -> None:
    """Count FLOPs per token that are no part of the layers."""
    if reading.cost_scope is not None:
        reading.cost_scope.spend(tokens, torch.zeros_like(tokens.positions_RN), 0, flops)


def make_adapter(init: AdapterInit, width: int) -> nn.Linear:
    """Make A, which maps [s; e] (..., 2 D) to the core's input (..., D)."""
    adapter = nn.Linear(2 * width, width, bias=False)
    if init != "default":
        share_s, share_e = {"pass_e": (0.0, 1.0), "pass_s": (1.0, 0.0), "mean": (0.5, 0.5)}[init]
        with torch.no_grad():
            adapter.weight.copy_(torch.cat([share_s * torch.eye(width), share_e * torch.eye(width)], dim=1))
    return adapter


def _parts(method: RecurrentDepth, backbone: Backbone) -> tuple[int, int, int]:
    """Return (l_P, l_R, l_C) of a decoder that has the method's shape: as asked, as it was made, or by the rule."""
    n, known = backbone.n_layers, getattr(backbone.config, SPLIT, None)
    asked = replace(method, drops=False, n_core=None)
    if known is not None and sum(known) == n:
        ends = (asked.n_prelude, known[0]), (asked.n_coda, known[2])
        first, last = (theirs if mine is None else mine for mine, theirs in ends)
        asked = replace(asked, n_prelude=first, n_coda=last)
    first, core, last = asked.split(n)
    refuse(
        (
            method.n_core not in (None, core),
            f"a prelude of {first} and a coda of {last} leave {core} of the model's {n} layers for the core, not "
            f"n_core={method.n_core}: start from a pretrained model, or give another number of layers",
        )
    )
    return first, core, last
