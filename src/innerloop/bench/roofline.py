"""The floor: the least time in which a machine could do the work of some answers, from rates measured on it.

    floor = max(FLOPs / matmul rate, bytes / bandwidth)

The bandwidth is that of a copy or of a matrix read in a product with a vector, whichever is higher. The bytes are those
that any engine must move that runs at most ``b`` rows together. A call of the decoder serves at most one pass of each
of b rows, so answers of P_1 .. P_n passes need at least

    calls = max(ceil(sum P_i / b), max P_i),    likewise  head calls  from how often each was read out,

and each call reads every weight of the layers once, each head call the output embeddings once, and each pass of a row
the keys and values of the positions that it finds in the cache:

    bytes = calls x layer weights + head calls x head weights + cached positions x bytes of a position's keys and values

It is a lower bound: what activations move, weights that a loop inside a pass reads again, and the caches of layers
that attend to a sliding window are left out. Two exceptions: weights that fit into the processor's own cache move
faster than a copy does; and a pass counts as one through every layer, also where a depth method skips some.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from innerloop.bench.timing import Turn, seconds_of, spread
from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import Cost
from innerloop.decoder.packed import PackedWeights

MATMUL_SIDE = {"cpu": 1024, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # well beyond what caches hold
MATMUL, COPY, READ = "matmul", "copy", "read"


class Ceilings:
    """Jobs that show what a device can do: a product of square matrices as the engine makes it, a copy, and a read.

    Args:
        device: the device.
        dtype: of the matrices; that of the models that are measured.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
        n_bytes = COPY_BYTES.get(device.type, COPY_BYTES["cpu"])
        generator = torch.Generator(device=device).manual_seed(0)
        self.left = torch.randn(side, side, generator=generator, device=device).to(dtype)
        self.linear = torch.nn.Linear(side, side, bias=False, device=device, dtype=dtype)
        self.packed = PackedWeights([self.linear])
        self.source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
        self.target = torch.zeros_like(self.source)
        self.matrix = self.source.view(torch.float32).view(-1, min(4096, n_bytes // 4))
        self.vector = torch.ones(self.matrix.shape[1], device=device)

    def jobs(self) -> dict[str, Callable[[], object]]:
        """Return the jobs, to take turns with what is measured."""
        return {
            MATMUL: self.product,
            COPY: lambda: self.target.copy_(self.source),
            READ: lambda: self.matrix @ self.vector,
        }

    @torch.no_grad()
    def product(self) -> Tensor:
        """Return the product; on a CPU the right matrix is packed, which is faster."""
        with self.packed.used():
            return self.linear(self.left)

    @property
    def flops(self) -> float:
        """FLOPs of the product: 2 n^3."""
        return 2.0 * self.left.shape[0] ** 3

    @property
    def n_bytes(self) -> float:
        """Bytes that the copy moves: as many are read as written."""
        return 2.0 * self.source.numel()

    def rates(self, turns: Mapping[str, Sequence[Turn]]) -> Rates:
        """Return the rates that turns of the jobs show: of bytes, that of the faster of the two jobs in each turn."""
        copied = [self.n_bytes / seconds for seconds in seconds_of(turns[COPY])]
        read = [self.source.numel() / seconds for seconds in seconds_of(turns[READ])]
        return Rates([self.flops / s for s in seconds_of(turns[MATMUL])], list(map(max, copied, read)))


@dataclass(frozen=True)
class Rates:
    """FLOPs and bytes per second, turn by turn. The ceiling is the best turn: a disturbed one shows less."""

    flops: Sequence[float]
    n_bytes: Sequence[float]

    def report(self) -> dict[str, dict[str, float]]:
        """Return the ceilings and how far the turns spread, in GFLOP/s and GB/s."""
        rates = {"matmul_gflops": self.flops, "memory_gb_s": self.n_bytes}
        return {name: {"best": max(of) / 1e9, **spread([rate / 1e9 for rate in of])} for name, of in rates.items()}


@dataclass(frozen=True)
class Floor:
    """The least work of some answers: FLOPs, bytes, and the seconds that each takes at the ceilings."""

    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        """The larger of the two."""
        return max(self.compute_seconds, self.memory_seconds)

    def report(self) -> dict[str, float | str]:
        """Return the floor's numbers, and which of the two rates sets it."""
        bound = "compute" if self.compute_seconds >= self.memory_seconds else "memory"
        return {**asdict(self), "seconds": self.seconds, "bound": bound}


def floor_of(backbone: Backbone, costs: Sequence[Cost], batch_size: int, rates: Rates) -> Floor:
    """Return the floor of answers of these costs, at most ``batch_size`` of them together."""
    flops, n_bytes = sum(cost.flops for cost in costs), bytes_of(backbone, costs, batch_size)
    return Floor(flops, n_bytes, flops / max(rates.flops), n_bytes / max(rates.n_bytes))


def bytes_of(backbone: Backbone, costs: Sequence[Cost], batch_size: int) -> float:
    """Return the least bytes that answers of these costs move; the formula stands at the head of this file."""
    calls = least_calls([cost.passes for cost in costs], batch_size)
    head_calls = least_calls([cost.logits for cost in costs], batch_size)
    cached = sum(cost.cached * cost.streams for cost in costs)
    return calls * layer_bytes(backbone) + head_calls * head_bytes(backbone) + cached * position_bytes(backbone)


def least_calls(passes: Sequence[int], batch_size: int) -> int:
    """Return the fewest calls that can serve rows of so many passes, at most ``batch_size`` rows together."""
    return max(math.ceil(sum(passes) / batch_size), max(passes, default=0))


def layer_bytes(backbone: Backbone) -> int:
    """Return the bytes of the weights of all layers."""
    return sum(p.numel() * p.element_size() for p in backbone.layers.parameters())


def head_bytes(backbone: Backbone) -> int:
    """Return the bytes of the output embeddings."""
    weight = backbone.lm.get_output_embeddings().weight
    return weight.numel() * weight.element_size()


def position_bytes(backbone: Backbone) -> int:
    """Return the bytes of one position's keys and values, in the layers that attend to all earlier positions."""
    config = backbone.config
    head_dim = getattr(config, "head_dim", None) or backbone.width // config.num_attention_heads
    n_shared = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * backbone.n_layers
    itemsize = next(backbone.layers.parameters()).element_size()
    return 2 * kinds.count("full_attention") * n_shared * head_dim * itemsize
