"""ParScale (arXiv 2505.10475): parallel streams of one decoder, the library's axis of width.

    H_p = decoder(x | prefixes of stream p),  p = 1..P;    h = sum_p w_p H_p;    logits = Head(h)      (parscale.md, 3)

All that the streams have of their own are a few columns of keys and values in each layer, so a model of P streams has
about the weights of one. Trained as the paper does in two stages: a decoder first, then streams on it, with all weights
or with the decoder frozen (``backbone: {model: RUN, freeze: true}``). Runs that froze the same decoder share it, and P
is switched by choosing among them (`LatentModel.beside`).

With ``max_loops`` above 1 the streams run a looped block, so width and depth are two numbers of one method. One stream
has no prefixes, and is the decoder itself, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from innerloop.checks.values import Bounds, Natural, Share, SomeLoops, SomePlaces
from innerloop.methods.depth.block_loop import BlockLoop

Streams = Annotated[int, Bounds(1, 1000)]


@dataclass(frozen=True)
class ParScale(BlockLoop):
    """P streams of a decoder, each behind prefixes of its own, mixed by learnt weights before the head.

    Args:
        streams: P; 1 is the decoder itself, without prefixes.
        n_prefix: columns of keys and values that each layer begins with, in each stream; they count for no position.
        prefix_bias: what is added to what queries make of a prefix's keys, at first; it is learnt with them. About -8
            on a trained decoder, which then begins as it was; 0: nothing is added.
        smoothing: eps; each stream counts for at least eps / P.
        n_prelude: layers before the looped block.
        n_coda: layers after it.
        max_loops: how often the block between them is applied.
        write_steps: off: the answer alone is written, so that all thinking happens inside the tokens.
    """

    name: ClassVar[str] = "parscale"
    paper: ClassVar[str] = "arXiv 2505.10475"
    summary: ClassVar[str] = "parallel streams told apart by learnt prefixes, mixed before the head"
    passes_do: ClassVar[str] = "runs several streams"
    forward: ClassVar[str] = "innerloop.methods.depth.parscale_forward:StreamedDecoder"

    streams: Streams = 2
    n_prefix: SomePlaces = 48
    prefix_bias: float = 0.0
    smoothing: Share = 0.1
    n_prelude: Natural = 0
    n_coda: Natural = 0
    max_loops: SomeLoops = 1
    write_steps: bool = True

    def with_loops(self, loops: int) -> ParScale:
        """Return the method for answering with another number of loops."""
        return replace(self, max_loops=loops)
