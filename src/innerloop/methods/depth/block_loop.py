"""A block of layers that is applied over and over, inside the token (looped.md; relaxed_recursive.md).

    h = Emb(x);  h = prelude(h);  e = h
    for i = 1..L:  h = h + beta_i (block(h + gamma e) - h)                     beta_i = 1 and gamma = 0 unless asked for
    h = coda(h);  logits = Head(Norm(h))                                                                  (looped.md, 3)

The loop is the library's inner loop: its state are the tokens' states between two layers. Every (loop, layer) has keys
and values of its own. Stop scores that look at words see the block's output through the final norm and the head. What
is learned at earlier exits, such as the gate of Ouro (arXiv 2510.25741), is in `exits`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from innerloop.checks.values import Natural, SomeLoops
from innerloop.config.loop import LoopSampling, LoopSettings, Site
from innerloop.loop.sampling import draw_loops
from innerloop.methods.depth.method import DepthMethod

if TYPE_CHECKING:  # slow to import
    from innerloop.decoder.backbone import Backbone

KvShare = Literal["none", "last_loop", "first_loop", "mean"]
KvMissing = Literal["restrict", "share_step", "full_compute"]


class BlockStates(LoopSettings):
    """An iteration of a block gives back states between two layers."""

    site: Site = "pre_norm"


class BlockLoop(DepthMethod):
    """All layers but ``n_prelude`` first and ``n_coda`` last ones are one block, applied ``max_loops`` times."""

    forward: ClassVar[str] = "innerloop.methods.depth.block_loop_forward:LoopedDepth"

    n_prelude: Natural
    n_coda: Natural
    max_loops: SomeLoops
    loop_sampling: LoopSampling = "fixed"
    input_injection: bool = False
    sandwich: bool = False
    kv_missing: KvMissing = "share_step"
    kv_share: KvShare = "none"
    loop: LoopSettings = BlockStates()

    @property
    def n_iterations(self) -> int:
        """Each iteration may have a timestep embedding and LoRA of its own."""
        return self.max_loops

    def depth(self) -> int:
        """Return L."""
        return self.max_loops

    def sampled(self, seed: str) -> BlockLoop:
        """Draw L for a training batch."""
        if self.loop_sampling == "fixed" or not seed:
            return self
        drawn = draw_loops(self.loop_sampling, self.max_loops, seed)
        return replace(self, max_loops=drawn, loop_sampling="fixed")  # type: ignore[call-arg]

    def with_loops(self, loops: int) -> BlockLoop:
        """Return the method for answering with L = ``loops``; how it was trained no longer matters."""
        changes: dict[str, Any] = {"max_loops": loops, "exits": type(self.exits)()}
        if self.loop_sampling != "fixed":
            changes["loop_sampling"] = "fixed"
        return replace(self, **changes)

    def begin(self, backbone: Backbone) -> None:
        """Draw fresh weights for the depth that they will have."""
        n_looped = backbone.n_layers - self.n_prelude - self.n_coda
        backbone.expect_depth(backbone.n_layers + (self.max_loops - 1) * n_looped)
