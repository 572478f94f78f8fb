"""Mixture-of-Recursions (arXiv 2507.10524): tokens run a shared stack F of layers up to N_r times, each its own number.

    expert choice: z = H w_r;  I_r = the k_r tokens of I_{r-1} with the highest z;  H <- H + alpha sigmoid(z) F(H)
    token choice:  P = softmax(H^1 W);  i = argmax P;  r < i: H <- F(H);  r = i: H <- alpha P_i F(H) + H^1
    L = CE + 0.001 sum_r mean_{I_{r-1}} BCE(z_r, [in I_r]),  or  CE + 0.1 sum_i f_i P_i              (mor.md, 3 and 4)

In recursion r tokens attend to those alone that are in it. Which tokens are the highest depends on later ones, so
answers are written by sigmoid(z) >= 0.5, which sees one token alone. The recursions are the library's inner loop.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from innerloop.checks.values import Natural, SomeLoops, SomeShare, Weight
from innerloop.config.loop import LoopSettings, Site
from innerloop.config.routing import CapacityBase
from innerloop.errors import refuse
from innerloop.methods.depth.method import DepthMethod

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from innerloop.decoder.backbone import Backbone


class RecursionStates(LoopSettings):
    """A recursion gives back states between two layers; gate and router take the place of the loop's options."""

    site: Site = "pre_norm"


@dataclass(frozen=True)
class Mor(DepthMethod):
    """A shared stack of layers is run up to N_r times, by fewer and fewer tokens.

    Args:
        n_recursions: N_r.
        sharing: which layers the recursions run: the whole stack over and over, AB AB AB (cycle); each layer N_r times
            in a row, AA AB BB (sequence); or so with the first and the last layer left unshared, which all tokens run
            (middle_cycle, middle_sequence).
        init: the shared layers of a pretrained decoder that is rebuilt: layers spread evenly (stepwise), the first
            (lower) or last (upper) ones, the mean of those that are tied (average), or fresh ones (random).
        routing: which tokens go on: the highest scores of a row (expert), or each chooses its depth beforehand (token).
        capacities: expert: share of the row's tokens in each recursion; empty: 1, (N_r - 1) / N_r, ..., 1 / N_r.
        capacity_base: expert: the share is of a row's own tokens (valid), or of the columns of the batch (static).
        capacity_warmup: expert: optimizer steps in which capacities fall from 1, along a cosine.
        gate: g: alpha times sigmoid(z) (scaled_sigmoid), sigmoid(z), or one with the gradient of sigmoid(z) (st), which
            leaves a pretrained model as it was; with token choice P_i is in place of sigmoid(z).
        alpha: of scaled_sigmoid; None: 0.1 with expert choice, 1 with token choice.
        gate_target: what g scales: the stack's whole output, beside the state (full), or what it adds (delta).
        causality: expert: how a token goes on when answering: by the router's own z >= 0 (aux_loss), or by that of
            another router, which learns it on the side (aux_router).
        aux_weight: expert: weight of the term that teaches aux_loss.
        routing_mode: expert: when answering, choose by causality (causal); or as in training (topk), which sees later
            tokens: scores measured so are too good, and what is written token by token has another depth.
        tc_weighting: token: g scales the last recursion alone (last_only), or each of them (every).
        balancing: token: depths are balanced by a term of the loss (loss), or by a bias on the choice that follows the
            load (loss_free).
        balance_weight: token: weight of that term.
        bias_rate: token: how far the bias moves with each training batch.
        z_weight: weight of the squared scores, added up over recursions; None: 0 with expert choice, 1e-5 with token
            choice.
        kv: each recursion keeps the keys and values of its own tokens (recursion_wise), or all read those of the first
            and make none (recursive_sharing).
        write_steps: off: the answer alone is written, so that all thinking happens inside the tokens.
    """

    name: ClassVar[str] = "mor"
    paper: ClassVar[str] = "arXiv 2507.10524"
    summary: ClassVar[str] = "tokens run a shared stack of layers a number of times of their own"
    forward: ClassVar[str] = "innerloop.methods.depth.mor_forward:MorDepth"

    n_recursions: SomeLoops = 3
    sharing: Literal["cycle", "sequence", "middle_cycle", "middle_sequence"] = "middle_cycle"
    init: Literal["stepwise", "average", "lower", "upper", "random"] = "stepwise"
    routing: Literal["expert", "token"] = "expert"
    capacities: tuple[SomeShare, ...] = ()
    capacity_base: CapacityBase = "valid"
    capacity_warmup: Natural = 0
    gate: Literal["scaled_sigmoid", "sigmoid", "st"] = "scaled_sigmoid"
    alpha: float | None = None
    gate_target: Literal["full", "delta"] = "full"
    causality: Literal["aux_loss", "aux_router"] = "aux_loss"
    aux_weight: Weight = 0.001
    routing_mode: Literal["causal", "topk"] = "causal"
    tc_weighting: Literal["last_only", "every"] = "last_only"
    balancing: Literal["loss", "loss_free"] = "loss"
    balance_weight: Weight = 0.1
    bias_rate: Weight = 0.001
    z_weight: Weight | None = None
    kv: Literal["recursion_wise", "recursive_sharing"] = "recursion_wise"
    write_steps: bool = True

    loop: ClassVar[LoopSettings] = RecursionStates()  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        n, shares, is_token = self.n_recursions, self.capacities, self.routing == "token"
        by_experts = (shares, self.capacity_base, self.capacity_warmup, self.causality, self.routing_mode)
        by_tokens = (self.tc_weighting, self.balancing)
        refuse(
            (
                bool(shares) and len(shares) != n,
                f"capacities must list {n} shares (n_recursions), each above 0 and up to 1",
            ),
            (
                any(later > earlier for earlier, later in itertools.pairwise(shares)),
                "only tokens of one recursion go on to the next: list capacities that never rise",
            ),
            (self.alpha is not None and self.gate != "scaled_sigmoid", "alpha is for gate=scaled_sigmoid"),
            (
                is_token and by_experts != ((), "valid", 0, "aux_loss", "causal"),
                "capacities, capacity_base, capacity_warmup, causality and routing_mode are for routing=expert",
            ),
            (
                not is_token and by_tokens != ("last_only", "loss"),
                "tc_weighting and balancing are for routing=token",
            ),
            (
                self.kv == "recursive_sharing" and (self.sharing.endswith("sequence") or self.shares[0] < 1),
                "kv=recursive_sharing reads the keys that the same layers made of all tokens in recursion 1: set "
                "sharing to cycle or middle_cycle, and the first of capacities to 1",
            ),
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """The capacity of each recursion."""
        n = self.n_recursions
        return self.capacities or tuple((n - r) / n for r in range(n))

    @property
    def is_middle(self) -> bool:
        """Whether the first and the last layer are unshared."""
        return self.sharing.startswith("middle")

    @property
    def term_weights(self) -> dict[str, float]:
        """The weight of each term of the loss."""
        z_weight = self.z_weight
        if z_weight is None:
            z_weight = 1e-5 if self.routing == "token" else 0.0
        own = {"router": self.aux_weight, "aux_router": 1.0, "balance": self.balance_weight, "router_z": z_weight}
        return {**super().term_weights, **own}

    def recursions(self, n_layers: int) -> list[list[int]]:
        """Return the layers that each recursion runs, of a decoder of ``n_layers`` kept layers."""
        edge = int(self.is_middle)
        shared = range(edge, n_layers - edge)
        refuse((not shared, f"the model has {n_layers} layers, which leaves none to share: set sharing to cycle"))
        m, n = len(shared), self.n_recursions
        depths = [shared[i // n if self.sharing.endswith("sequence") else i % m] for i in range(m * n)]
        return [depths[r * m : (r + 1) * m] for r in range(n)]

    def convert(self, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep one layer of each N_r that are tied, and the unshared ones."""
        from innerloop.methods.depth.tying import check_kinds, initialise, rebuild, stepwise

        n, edge = self.n_recursions, int(self.is_middle)
        inner = range(edge, backbone.n_layers - edge)
        m = len(inner) // n
        fits = [k for k in range(1, len(inner) + 1) if len(inner) % k == 0]
        refuse(
            (
                len(inner) % n != 0 or m == 0,
                f"{len(inner)} layers cannot be shared by {n} recursions: set n_recursions to one of "
                f"{', '.join(map(str, fits))}, or another sharing",
            )
        )
        is_cycle = self.sharing.endswith("cycle")
        tied = [[inner[j + r * m if is_cycle else j * n + r] for r in range(n)] for j in range(m)]
        match self.init:
            case "stepwise":
                sources = [[inner[i]] for i in stepwise(len(inner), m)]
            case "lower" | "upper":
                sources = [[i] for i in (inner[:m] if self.init == "lower" else inner[-m:])]
            case _:
                sources = tied
        check_kinds(backbone, tied)
        ends = ([[0]], [[backbone.n_layers - 1]]) if edge else ([], [])
        kinds = [group[0] for group in (*ends[0], *tied, *ends[1])]
        rebuild(backbone, [*ends[0], *sources, *ends[1]], kinds)
        if self.init == "random":
            initialise(backbone, range(edge, edge + m))
