"""What is learned: terms inside the loop, of a teacher, of decoders of their own and at earlier exits.

Each group names all of its options, as constants; a method's own group is a frozen dataclass on it whose fields are
those that the method has.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Chance, Layers, Positive, SomePlaces, Weight, Width
from innerloop.errors import refuse
from innerloop.text.row import Row

Pull = Literal["geometric", "geometric_reverse", "uniform"]
HiddenLayers = Literal["last", "all", "all+emb"]
Distance = Literal["smooth_l1", "smooth_l1_raw", "l1", "l1_sum", "l2", "cosine"]


class HiddenSettings(Checked):
    """States are pulled to a teacher's.

    Args:
        weight: lambda_hid; 0: they are not.
        layers: the teacher's last layer, all layers, or all and the embeddings.
        distance: smooth L1, L1 (a mean or a sum over the width) or squared L2, in units of the teacher's spread; smooth
            L1 as it is (smooth_l1_raw); or one minus cosine.
        width: width of the teacher's states where it is not this model's; what follows them is then projected by a
            learned matrix, for all layers the same. 0: the same width.
        site: a teacher's state is followed by the mean of the latents, or by the last of them.
        teacher: folder of the run whose states are the targets, or self: the model's own.
    """

    weight: Weight = 0.0
    layers: HiddenLayers = "last"
    distance: Distance = "smooth_l1"
    width: Width = 0
    site: Literal["mean", "last"] = "mean"
    teacher: str | None = None


class KdSettings(Checked):
    """A teacher's predictions are learned.

    Args:
        weight: weight of the divergence from what the teacher predicts of each written token.
        temperature: by which both models' logits are divided first; the divergence is multiplied by its square.
        teacher: folder of the original model, whose predictions are learned.
    """

    weight: Weight = 0.0
    temperature: Positive = 1.0
    teacher: str | None = None


@dataclass(frozen=True)
class DeepSettings(Checked):
    """The answer is also decoded after every iteration.

    Args:
        weight: lambda_deep.
        schedule: weight of iteration t: proportional to t (linear), or softmax of t.
    """

    weight: Weight = 0.0
    schedule: Literal["linear", "softmax"] = "linear"


@dataclass(frozen=True)
class HaltSettings(Checked):
    """The gate of stop.rule=halt or halt_sample is trained (arXiv 2107.05407).

    Args:
        weight: lambda_halt.
        prior: chance of stopping per iteration that the gate is drawn to.
        beta: strength of that pull.
        pull: it is KL(p || G) from the geometric distribution G of the prior (geometric), or KL(G || p)
            (geometric_reverse).
    """

    weight: Weight = 0.0
    prior: Chance = 0.2
    beta: Weight = 0.01
    pull: Literal["geometric", "geometric_reverse"] = "geometric"


class AuxSettings(Checked):
    """Latents must tell their steps to an auxiliary decoder.

    Args:
        weight: of this term of the loss; 0: no decoder.
        source: begin as the model in this folder, or of this Hub name, instead of a copy. It must have the same tokens;
            if its width is another, a linear map brings the latents to it. It is needed again wherever the run is
            loaded with a weight above 0.
        layers: keep the first so many layers of the copy; 0: all. Small decoders were unstable in LOTUS' study.
        lora_rank: the decoder is no copy but the model itself, with low-rank updates that only it uses; 0: a copy.
        embed: step tokens are embedded by the model's table (base) or the decoder's (own).
        question: let the decoder read the question before the latents, too.
        position: the position id of a group's first latent, or of the question.
        norm: the sum over a step's tokens, averaged over rows and groups (per_row), or the mean over tokens.
        detach: let nothing flow back into the model: a probe.
        trains: train model and decoder (both), or one of them.
    """

    weight: Weight = 0.0
    source: str | None = None
    layers: Layers = 0
    lora_rank: Layers = 0
    embed: Literal["base", "own"] = "base"
    question: bool = False
    position: SomePlaces = 0
    norm: Literal["per_row", "token_mean"] = "per_row"
    detach: bool = False
    trains: Literal["both", "base", "decoder"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.is_shared and self.trains != "both",
                "a decoder that shares the model's weights trains with them: set aux.trains to both",
            ),
            (
                self.weight == 0 and self.trains == "decoder",
                "without a decoder nothing is trained: set aux.weight above 0, or aux.trains to both",
            ),
            (self.is_shared and self.layers > 0, "aux.layers cuts a copy: set aux.lora_rank to 0"),
            (
                self.source is not None and (self.is_shared or self.embed == "base"),
                "aux.source has weights and a table of its own: set aux.lora_rank to 0 and aux.embed to own",
            ),
            (
                self.is_shared and self.detach,
                "aux.detach makes a probe that leaves the model alone, so it needs weights of its own: set "
                "aux.lora_rank to 0",
            ),
            (
                self.is_shared and self.embed == "own",
                "a decoder that shares the model's weights has no table of its own: set aux.embed to base",
            ),
        )

    @property
    def is_shared(self) -> bool:
        """Whether the decoder is the model itself, with low-rank updates."""
        return self.lora_rank > 0

    def n_told_positions(self, row: Row) -> int:
        """Return the most positions that the decoder reads at once to tell a step of a row."""
        told = [told for segment in row.segments() for told in segment.aux_targets if told.ids]
        before = self.position + (row.region_start if self.question else 0)
        return max((before + one.n_latents + len(one.ids) - 1 for one in told), default=0)


@dataclass(frozen=True)
class DecoderSettings(Checked):
    """Who answers.

    Args:
        kind: the model itself (lm_head), a decoder of its own (separate), or a classifier (linear).
        layers: separate: the number of its layers.
        reads: separate: the final state alone, or the prompt's states too (state_and_prompt).
        table: separate: words are embedded and read out by the model's tables (shared), or by its own.
        classes: linear: the answers there are.
    """

    kind: Literal["lm_head", "separate", "linear"] = "lm_head"
    layers: Annotated[int, Bounds(1, 10_000)] = 2
    reads: Literal["state", "state_and_prompt"] = "state"
    table: Literal["shared", "own"] = "shared"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                (self.kind == "linear") != bool(self.classes),
                "decoder.kind=linear chooses among classes, and nothing else does: list the answers there are, for "
                "example decoder: {kind: linear, classes: ['True', 'False']}",
            ),
            (
                len(set(self.classes)) < len(self.classes) or len(self.classes) == 1,
                "decoder.classes must be two different answers or more",
            ),
        )


class ExitSettings(Checked):
    """What is learned at earlier exits than the last.

    Args:
        weight: weight of the loss after each iteration before the last.
        schedule: these iterations count alike (equal), or iteration t as t / T (linear).
        kd: weight, within that loss, of the divergence from what the last iteration says.
        gate: train the gate of stop.rule=halt by the loss expected over exits and their entropy (distribution), or,
            with everything else frozen, by whether each iteration lowered the loss (improvement); none: leave it.
        gate_beta: strength of the entropy, of the pull to leave everywhere alike.
    """

    weight: Weight = 0.0
    schedule: Literal["equal", "linear"] = "equal"
    kd: Weight = 0.0
    gate: Literal["none", "distribution", "improvement"] = "none"
    gate_beta: Weight = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (
                self.weight == 0 and (self.kd > 0 or self.schedule != "equal"),
                "exits.kd and exits.schedule are for losses at earlier exits: set exits.weight above 0",
            ),
            (
                self.gate != "none" and self.weight > 0,
                "the gate learns from every exit already: set exits.weight to 0, or exits.gate to none",
            ),
        )

    @property
    def wants_exits(self) -> bool:
        """Whether training reads earlier exits."""
        return self.weight > 0 or self.gate != "none"
