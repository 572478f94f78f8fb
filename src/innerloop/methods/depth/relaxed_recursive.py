"""Relaxed recursive transformers (arXiv 2410.20672): a pretrained decoder's layers are tied, then told apart again.

    depth l = b K + j (iteration b of block layer j):   W_l = W'_j + B_l A_l            (relaxed_recursive.md, 2 and 3)

B_l A_l is the best rank-r approximation of what tying took away, so at full rank the model is the original one. It
loops as `looped` does; the block's layers are on disk once, what tells depths apart is with the method's own parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Natural, SomeLoops, Width
from innerloop.config.losses import ExitSettings, KdSettings
from innerloop.config.stopping import CommonStop
from innerloop.errors import refuse
from innerloop.methods.depth.block_loop import BlockLoop

if TYPE_CHECKING:  # slow to import
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone


@dataclass(frozen=True)
class RelaxedExits(ExitSettings):
    """Losses after earlier iterations (relaxed_recursive.md, 4)."""

    weight: float = 0.0
    kd: float = 0.0


@dataclass(frozen=True)
class OriginalModel(KdSettings):
    """Predictions of the original model are learned."""

    weight: float = 0.0
    temperature: float = 1.0
    teacher: str | None = None


@dataclass(frozen=True)
class RelaxedRecursive(BlockLoop):
    """A decoder of n layers, all but prelude and coda tied to a block of n / ``max_loops``, with low-rank corrections.

    Args:
        n_prelude: first layers that are not tied.
        n_coda: last layers that are not tied.
        max_loops: B, how many depths share a layer.
        init: the tied layers: spread evenly (stepwise), means over their depths (average), the first (lower), the last
            (upper), or drawn afresh (random).
        rank: r of the attention's matrices, cut to their smaller side; 0: none.
        mlp_rank: r of the others; None: as ``rank``.
        lora_init: B_l = U S and A_l = V^T (svd), B_l = U sqrt(S) and A_l = sqrt(S) V^T (split_sqrt), or no correction
            at first (zero).
        tie_1d: share gains and biases too, their means over depths; off: each depth keeps its own.
    """

    name: ClassVar[str] = "relaxed_recursive"
    paper: ClassVar[str] = "arXiv 2410.20672"
    summary: ClassVar[str] = "a pretrained model's layers are tied and looped, each depth with a low-rank correction"
    forward: ClassVar[str] = "innerloop.methods.depth.relaxed_recursive_forward:RelaxedDepth"

    n_prelude: Natural = 0
    n_coda: Natural = 0
    max_loops: SomeLoops = 2
    init: Literal["stepwise", "average", "lower", "upper", "random"] = "average"
    rank: Width = 64
    mlp_rank: Width | None = None
    lora_init: Literal["svd", "split_sqrt", "zero"] = "svd"
    tie_1d: bool = False
    stop: CommonStop = CommonStop()
    exits: RelaxedExits = RelaxedExits()
    kd: OriginalModel = OriginalModel()

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = (self.rank, self.other_rank)
        refuse(
            (
                max(ranks) == 0 and self.lora_init != "svd",
                "lora_init says how corrections begin, of which rank 0 has none: set rank, or leave lora_init out",
            ),
            (
                (self.kd.teacher is None) != (self.kd.weight == 0),
                "kd.weight is for what a teacher predicts: give both kd.teacher and kd.weight, or neither",
            ),
        )

    @property
    def other_rank(self) -> int:
        """The rank of the MLP's matrices."""
        return self.rank if self.mlp_rank is None else self.mlp_rank

    @property
    def reference_source(self) -> str | None:
        """The original model predicts every row along."""
        return self.kd.teacher

    def with_loops(self, loops: int) -> RelaxedRecursive:
        """Return the method for answering with fewer iterations."""
        refuse((loops > self.max_loops, f"there are corrections for {self.max_loops} loops: ask for no more"))
        return replace(super().with_loops(loops), kd=OriginalModel())  # type: ignore[return-value, type-var, call-arg]

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Tie the layers between prelude and coda; return what tells their depths apart."""
        import torch

        from innerloop.methods.depth.residual_lora import key_of, rank_of, truncated, vectors_of
        from innerloop.methods.depth.tying import check_kinds, depths_of, draw, rebuild, stepwise, with_ends

        p, between = self.n_prelude, backbone.n_layers - self.n_prelude - self.n_coda
        refuse(
            (
                between < 1 or between % self.max_loops > 0,
                f"{between} layers cannot be run as a block of {self.max_loops} loops: choose a max_loops that divides "
                "them, or leave some layers untied with n_prelude and n_coda",
            )
        )
        k = between // self.max_loops
        depths = depths_of(between, k)
        check_kinds(backbone, [[p + depth for depth in group] for group in depths])
        match self.init:
            case "stepwise":
                block = [[j] for j in stepwise(between, k)]
            case "lower" | "random":
                block = [[j] for j in range(k)]
            case "upper":
                block = [[j] for j in range(between - k, between)]
            case _:
                block = depths
        matrices = [backbone.matrices(p + depth) for depth in range(between)]
        vectors = [vectors_of(backbone.layers[p + depth]) for depth in range(between)]
        kinds = with_ends([[j] for j in range(k)], p, backbone.n_layers, self.n_coda)
        rebuild(backbone, with_ends(block, p, backbone.n_layers, self.n_coda), [kind for (kind,) in kinds])
        tied = range(p, p + k)
        if self.init == "random":
            draw(backbone, tied)
        start: dict[str, Tensor] = {}
        with torch.no_grad():
            for j, layer in enumerate(tied):
                for name, own in vectors_of(backbone.layers[layer]).items():
                    each = torch.stack([vectors[depth][name] for depth in depths[j]])
                    if self.tie_1d:
                        own.copy_(each.mean(0))
                    else:
                        start[f"depth.vectors.copies.{key_of(j, name)}"] = each
                for name, matrix in backbone.matrices(layer).items():
                    rank = rank_of(name, self.rank, self.other_rank)
                    if rank == 0 or self.lora_init == "zero":
                        continue
                    lost = [matrices[depth][name].weight - matrix.weight for depth in depths[j]]
                    pairs = [truncated(residual, rank, self.lora_init) for residual in lost]
                    start[f"depth.lora.up.{key_of(j, name)}"] = torch.stack([up for up, _ in pairs])
                    start[f"depth.lora.down.{key_of(j, name)}"] = torch.stack([down for _, down in pairs])
        return start
