"""The passes of recurrent depth: prelude, the core over and over, coda (`recurrent_depth` has the equations)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.ragged_cache import DepthCache
from innerloop.errors import refuse
from innerloop.loop.loop import InnerLoop
from innerloop.methods.depth.initial_state import mean_cosine, noise_at
from innerloop.methods.depth.key_lookup import ENDED, Lookup, LookupPass, LookupTokenPass
from innerloop.methods.depth.recurrent_depth import SPLIT, AdapterInit, RecurrentDepth
from innerloop.methods.depth.sandwich import SandwichNorms
from innerloop.passes.ragged import DepthForward
from innerloop.passes.tokens import PassInput, PassOutput, Tokens


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
        self.norms = SandwichNorms(backbone, "sums") if method.sandwich else None
        if loop.lora is not None:
            loop.lora.keep_layers(self.core)

    def empty_cache(self) -> DepthCache:
        """Return a cache that has read nothing."""
        return ChainCache() if self.method.chains_state else DepthCache()

    def forward(self, reading: PassInput) -> PassOutput:
        """Make one pass."""
        with nullcontext() if self.norms is None else self.norms.on():
            return self.go_round(reading)

    def go_round(self, reading: PassInput) -> PassOutput:
        """Run the core; where tokens may stop by themselves, each goes its own number of times round."""
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
