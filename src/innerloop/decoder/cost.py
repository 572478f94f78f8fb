"""What a generation or a loss cost: passes, positions, FLOPs and seconds per phase, row by row.

A *pass* is one call of the decoder; a *position* is one real (not padded) token or latent in a pass. Both are counted
where the decoder is called (`Context.read`), never estimated. Counters stay on the device, so counting does not
synchronise it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from innerloop.decoder.anatomy import head_dim_of
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.masks import Sees

PHASES = ("prefill", "thought", "answer")


@dataclass
class Cost:
    """What one example cost.

    ``loops`` are its inner iterations, ``seconds`` its share of the batch it ran in, ``cached`` the earlier positions
    that its passes found in the cache (each pass counts them anew), ``logits`` the positions that were read out,
    ``streams`` how many streams each pass ran side by side, ``written`` the tokens of the text.
    """

    passes: int = 0
    positions: int = 0
    flops: float = 0.0
    thought_tokens: int = 0
    loops: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    cached: int = 0
    logits: int = 0
    streams: int = 1
    written: int = 0

    @property
    def stream_passes(self) -> int:
        """Passes, counted for each stream."""
        return self.passes * self.streams


def mean_cost(costs: list[Cost]) -> dict:
    """Average the costs of examples into the ``cost`` object of result.json; several streams have their own count."""
    n = max(len(costs), 1)
    means = {
        name: sum(getattr(c, name) for c in costs) / n
        for name in ("passes", "positions", "flops", "thought_tokens", "loops", "written")
    }
    if any(c.streams > 1 for c in costs):
        means["stream_passes"] = sum(c.stream_passes for c in costs) / n
    return means | {"seconds": {phase: sum(c.seconds[phase] for c in costs) / n for phase in PHASES}}


def total_cost(costs: Sequence[Cost]) -> Cost:
    """Return what several answers cost together."""
    whole = Cost(streams=max((cost.streams for cost in costs), default=1))
    for cost in costs:
        for name in ("passes", "positions", "flops", "thought_tokens", "loops", "cached", "logits", "written"):
            setattr(whole, name, getattr(whole, name) + getattr(cost, name))
        for phase in PHASES:
            whole.seconds[phase] += cost.seconds[phase]
    return whole


class CostMeter:
    """Counts the work of ``n_rows`` rows while they run.

    Attributes:
        sharing: the rows that now share the time of what runs, set by who starts it; at first all.
        seconds: of each phase, the seconds of each row.
    """

    def __init__(self, n_rows: int, device: torch.device):
        zeros = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.passes, self.positions, self.keys, self.logits = zeros, zeros.clone(), zeros.clone(), zeros.clone()
        self.cached = zeros.clone()
        self.layer_positions: Tensor | None = None  # with layer_keys: where tokens do not all run every layer
        self.layer_keys = torch.zeros(n_rows, dtype=torch.float64, device=device)
        self.extra = self.layer_keys.clone()
        self.depths: list[tuple[Tensor | None, Tensor, Tensor | None]] = []
        self.known_depths: list[list[int]] = [[] for _ in range(n_rows)]
        self.sharing: Sequence[int] = range(n_rows)
        self.seconds = {phase: [0.0] * n_rows for phase in PHASES}

    def reset(self, rows: Tensor, places: Sequence[int]) -> None:
        """Forget what was counted for the rows ``rows``, which are ``places`` on the host: others take their place."""
        self.token_depths()
        counters = (self.passes, self.positions, self.keys, self.logits, self.cached, self.layer_keys, self.extra)
        for counter in counters if self.layer_positions is None else (*counters, self.layer_positions):
            counter[rows] = 0
        for row in places:
            self.known_depths[row] = []
            for seconds in self.seconds.values():
                seconds[row] = 0.0

    def count(
        self,
        rows: Tensor | None,
        new_B: Tensor | int,
        past_B: Tensor | int,
        sees: Sees = "past",
        keys_B: Tensor | None = None,
    ) -> None:
        """Count one pass of ``new_B`` positions over ``past_B`` earlier ones, for the rows ``rows`` (None: all).

        ``keys_B`` are the (query, key) pairs where these are neither of the past nor all.
        A row without a real position in the pass is not billed for it.
        """
        new = new_B if isinstance(new_B, Tensor) else self.passes.new_full((), new_B)  # filled there, not copied
        keys = new * past_B + (new * new if sees == "all" else new * (new + 1) // 2) if keys_B is None else keys_B
        passes, cached = (new > 0).long(), (new > 0) * past_B
        counted = (self.passes, passes), (self.positions, new), (self.keys, keys), (self.cached, cached)
        for counter, amount in counted:
            _increase(counter, rows, amount)

    def spend(self, rows: Tensor | None, new_B: Tensor, keys_B: Tensor, n_layers: float, extra: float = 0.0) -> None:
        """Count ``n_layers`` layers run on ``new_B`` tokens over ``keys_B`` (query, key) pairs, row by row.

        Once anything is counted so, FLOPs follow these counts, no longer the passes. ``extra`` FLOPs are added per
        token, for what is no part of the layers: routers, adapters, reading out.
        """
        if self.layer_positions is None:
            self.layer_positions, self.layer_keys = (torch.zeros_like(self.extra) for _ in range(2))
        _increase(self.layer_positions, rows, n_layers * new_B)
        _increase(self.layer_keys, rows, n_layers * keys_B)
        _increase(self.extra, rows, extra * new_B)

    def add(self, rows: Tensor | None, flops_B: Tensor) -> None:
        """Count FLOPs of the rows ``rows`` (None: all) for what is no pass: looking at states, reading them out."""
        _increase(self.extra, rows, flops_B)

    def count_logits(self, rows: Tensor | None, counted_B: Tensor | None) -> None:
        """Count one position per row at which the head was applied."""
        amount = torch.ones((), dtype=torch.long, device=self.logits.device) if counted_B is None else counted_B.long()
        _increase(self.logits, rows, amount)

    def token_depths(self) -> list[list[int]]:
        """Return how many iterations each token that was read had, row by row; empty where all have the same."""
        for rows, depths_BL, real_BL in self.depths:
            places = range(len(depths_BL)) if rows is None else rows.tolist()
            real = torch.ones_like(depths_BL, dtype=torch.bool) if real_BL is None else real_BL
            for row, values, is_real in zip(places, depths_BL.tolist(), real.tolist()):
                self.known_depths[row] += [value for value, r in zip(values, is_real) if r]
        self.depths = []
        return self.known_depths

    def now(self) -> float:
        """Return the time once the device has done what was asked of it."""
        if self.passes.device.type == "cuda":
            torch.cuda.synchronize(self.passes.device)
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Share the wall time of the block among the rows that share it; synchronises a GPU at both ends."""
        seconds, sharing = self.seconds[name], self.sharing
        start = self.now()
        yield
        share = (self.now() - start) / max(len(sharing), 1)
        for row in sharing:
            seconds[row] += share

    def costs(self, backbone: Backbone, rows: Sequence[int] | None = None) -> list[Cost]:
        """Return what each row, or each of some, cost so far."""
        positions, keys = self.positions, self.keys
        if self.layer_positions is not None:
            positions, keys = self.layer_positions / backbone.n_layers, self.layer_keys / backbone.n_layers
        flops = flops_of(backbone, positions, keys, self.logits) + self.extra
        places = range(len(self.passes)) if rows is None else rows
        counts = (self.passes.double(), self.positions.double(), flops, self.cached.double(), self.logits.double())
        counted = torch.stack(counts)[:, list(places)].tolist()
        return [
            Cost(
                int(passes),
                int(n),
                f,
                seconds={phase: self.seconds[phase][row] for phase in PHASES},
                cached=int(cached),
                logits=int(logits),
            )
            for row, passes, n, f, cached, logits in zip(places, *counted)
        ]


def _increase(counter: Tensor, rows: Tensor | None, amount: Tensor) -> None:
    """Add to the counts of some rows (None: all) what each of them, or all alike, have done."""
    if rows is None:
        counter += amount
    else:
        counter.index_add_(0, rows, amount.to(counter.dtype).expand(len(rows)))


def flops_of(backbone: Backbone, positions: Tensor, keys: Tensor, logits: Tensor) -> Tensor:
    """Return forward FLOPs (float64) of passes.

    They are 2 per weight of the layers and position, 4 d_attention per layer and key read, and 2 D V per row of logits.
    """
    config = backbone.config
    layer_weights = sum(p.numel() for p in backbone.layers.parameters())
    attention = 4 * backbone.n_layers * head_dim_of(config) * config.num_attention_heads
    head = 2 * backbone.width * config.vocab_size
    return 2.0 * layer_weights * positions.double() + attention * keys.double() + head * logits.double()
