"""What is learned: terms of the loss inside the loop, of a teacher, of decoders of their own and at earlier exits."""

from dataclasses import dataclass
from typing import Literal

from innerloop.config.stopping import StopSettings
from innerloop.errors import check_choices, refuse
from innerloop.text.row import Row

Pull = Literal["geometric", "geometric_reverse", "uniform"]


@dataclass(frozen=True)
class LossSettings:
    """What is learned inside the loop, besides the answer.

    Args:
        answer_weight: of the written tokens.
        step_weight: lambda_step; latents must show the steps through the head.
        hid_weight: lambda_hid; states are pulled to a teacher's.
        hid_layers: the teacher's last layer, all layers, or all and the embeddings.
        hid_distance: smooth L1, L1 (a mean or a sum over the width) or squared L2, in units of the teacher's spread; or
            one minus cosine.
        hid_width: width of the teacher's states where it is not this model's; what follows them is then projected by a
            learned matrix, for all layers the same. 0: the same width.
        teacher: folder of the run whose states are the targets (of a chain of thought, if the method does not say
            otherwise), or self: the model's own.
        teacher_weight: a model that is its own teacher also learns to write the chain of thought, with this weight.
        teacher_passes: read the targets in the pass that is learned from, or in a second one (they differ by dropout).
        deep_weight: lambda_deep; the answer is also decoded after every iteration.
        deep_schedule: weight of iteration t: proportional to t (linear), or softmax of t.
        halt_weight: lambda_halt; trains the gate of stop=halt or halt_sample (arXiv 2107.05407).
        halt_prior: chance of stopping per iteration that the gate is drawn to.
        halt_beta: strength of that pull.
        halt_pull: it is KL(p || G) from the geometric distribution G of halt_prior (geometric), KL(G || p)
            (geometric_reverse), or KL from stopping anywhere alike (uniform; arXiv 2510.25741).
        ponder_weight: stop=act: weight of the cost of thinking, N iterations and the remainder R (arXiv 1603.08983).
    """

    answer_weight: float = 1.0
    step_weight: float = 0.0
    hid_weight: float = 0.0
    hid_layers: Literal["last", "all", "all+emb"] = "last"
    hid_distance: Literal["smooth_l1", "l1", "l1_sum", "l2", "cosine"] = "smooth_l1"
    hid_width: int = 0
    teacher: str | None = None
    teacher_weight: float = 0.0
    teacher_passes: Literal[1, 2] = 1
    deep_weight: float = 0.0
    deep_schedule: Literal["linear", "softmax"] = "linear"
    halt_weight: float = 0.0
    halt_prior: float = 0.2
    halt_beta: float = 0.01
    halt_pull: Pull = "geometric"
    ponder_weight: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.answer_weight, *self.loop_term_weights.values(), self.halt_beta)
        refuse(
            (min(weights) < 0, "weights of the loss cannot be negative"),
            (
                self.hid_width < 0 or (self.hid_width > 0 and (self.hid_weight == 0 or self.teacher == "self")),
                "hid_width is the width of another model's states: set hid_weight above 0 and teacher to a folder, or "
                "hid_width to 0",
            ),
            (not 0 < self.halt_prior < 1, "halt_prior is a probability between 0 and 1"),
            (
                self.ponder_weight > 0 and not (isinstance(self, StopSettings) and self.stop == "act"),
                "ponder_weight is the cost of thinking in ACT: set stop=act",
            ),
            (
                self.hid_weight > 0 and self.teacher is None,
                "hid_weight needs states to follow: set teacher to the folder of a chain-of-thought run, or to self",
            ),
            (
                self.teacher != "self" and (self.teacher_weight > 0 or self.teacher_passes == 2),
                "teacher_weight and teacher_passes are for a model that teaches itself: set teacher to self",
            ),
        )

    @property
    def loop_term_weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {
            "step": self.step_weight,
            "hid": self.hid_weight,
            "teacher": self.teacher_weight,
            "deep": self.deep_weight,
            "halt": self.halt_weight,
            "ponder": self.ponder_weight,
        }


@dataclass(frozen=True)
class KdSettings:
    """What is learned of a teacher's predictions.

    Args:
        kd_weight: weight of the divergence from what the teacher predicts of each written token.
        kd_temperature: by which both models' logits are divided first; the divergence is multiplied by its square.
    """

    kd_weight: float = 0.0
    kd_temperature: float = 1.0

    def __post_init__(self) -> None:
        refuse(
            (self.kd_weight < 0, "weights of the loss cannot be negative"),
            (self.kd_temperature <= 0, "kd_temperature divides logits: choose a number above 0"),
        )


@dataclass(frozen=True)
class AuxSettings:
    """Whether and how latents must tell their steps.

    Args:
        aux_weight: of this term of the loss; 0: no decoder.
        aux_decoder: a copy of the model with weights of its own (copy), or the model itself (shared).
        aux_source: copy: begin as the model in this folder, or of this Hub name, instead. It must have the same tokens;
            if its width is another, a linear map brings the latents to it. It is needed again wherever the run is
            loaded with an aux_weight above 0.
        aux_layers: copy: keep its first so many layers; 0: all. Small decoders were unstable in LOTUS' study.
        aux_lora_rank: shared: low-rank updates of the model that only the decoder uses; 0: none.
        aux_embed: step tokens are embedded by the model's table (base) or the decoder's (own).
        aux_question: let the decoder read the question before the latents, too.
        aux_position: the position id of a group's first latent, or of the question.
        aux_norm: the sum over a step's tokens, averaged over rows and groups (per_row), or the mean over tokens.
        aux_detach: let nothing flow back into the model: a probe.
        aux_trains: train model and decoder (both), or one of them.
    """

    aux_weight: float = 0.0
    aux_decoder: Literal["copy", "shared"] = "copy"
    aux_source: str | None = None
    aux_layers: int = 0
    aux_lora_rank: int = 0
    aux_embed: Literal["base", "own"] = "base"
    aux_question: bool = False
    aux_position: int = 0
    aux_norm: Literal["per_row", "token_mean"] = "per_row"
    aux_detach: bool = False
    aux_trains: Literal["both", "base", "decoder"] = "both"

    def __post_init__(self) -> None:
        check_choices(self)
        refuse(
            (
                min(self.aux_weight, self.aux_layers, self.aux_lora_rank, self.aux_position) < 0,
                "aux_weight, aux_layers, aux_lora_rank and aux_position cannot be negative",
            ),
            (
                self.aux_decoder == "shared" and self.aux_trains != "both",
                "a decoder that shares the model's weights trains with them: set aux_trains to both",
            ),
            (
                self.aux_weight == 0 and self.aux_trains == "decoder",
                "without a decoder nothing is trained: set aux_weight above 0, or aux_trains to both",
            ),
            (self.aux_decoder == "shared" and self.aux_layers > 0, "aux_layers cuts a copy: set aux_decoder to copy"),
            (
                self.aux_source is not None and (self.aux_decoder == "shared" or self.aux_embed == "base"),
                "aux_source has weights and a table of its own: set aux_decoder to copy and aux_embed to own",
            ),
            (
                self.aux_decoder == "copy" and self.aux_lora_rank > 0,
                "aux_lora_rank is for a decoder that shares the model's weights: set aux_decoder to shared",
            ),
            (
                self.aux_decoder == "shared" and self.aux_detach,
                "aux_detach makes a probe that leaves the model alone, so it needs weights of its own: set aux_decoder "
                "to copy",
            ),
            (
                self.aux_decoder == "shared" and self.aux_embed == "own",
                "a decoder that shares the model's weights has no table of its own: set aux_embed to base",
            ),
        )

    def n_told_positions(self, row: Row) -> int:
        """Return the most positions that the decoder reads at once to tell a step of a row."""
        told = [told for link in row.links() for told in link.told if told.ids]
        before = self.aux_position + (row.region_start if self.aux_question else 0)
        return max((before + one.n_latents + len(one.ids) - 1 for one in told), default=0)


@dataclass(frozen=True)
class DecoderSettings:
    """Who answers.

    Args:
        decoder: the model itself (lm_head), a decoder of its own (separate), or a classifier (linear).
        decoder_layers: separate: the number of its layers.
        decoder_reads: separate: the final state alone, or the prompt's states too (state_and_prompt).
        decoder_table: separate: words are embedded and read out by the model's tables (shared), or by its own.
        classes: linear: the answers there are.
    """

    decoder: Literal["lm_head", "separate", "linear"] = "lm_head"
    decoder_layers: int = 2
    decoder_reads: Literal["state", "state_and_prompt"] = "state"
    decoder_table: Literal["shared", "own"] = "shared"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choices(self)
        object.__setattr__(self, "classes", tuple(self.classes))
        refuse(
            (self.decoder_layers < 1, "decoder_layers must be at least 1"),
            (
                (self.decoder == "linear") != bool(self.classes),
                "decoder=linear chooses among classes, and nothing else does: list the answers there are, for example "
                "classes: ['True', 'False']",
            ),
            (
                len(set(self.classes)) < len(self.classes) or len(self.classes) == 1,
                "classes must be two different answers or more",
            ),
        )


@dataclass(frozen=True)
class ExitSettings:
    """What is learned at earlier exits than the last.

    Args:
        exit_weight: weight of the loss after each iteration before the last.
        exit_schedule: these iterations count alike (equal), or iteration t as t / T (linear).
        exit_kd: weight, within that loss, of the divergence from what the last iteration says.
        gate: train the gate of stop=halt by the loss expected over exits and their entropy (distribution), or, with
            everything else frozen, by whether each iteration lowered the loss (improvement); none: leave it.
        gate_beta: strength of the entropy, of the pull to leave everywhere alike.
    """

    exit_weight: float = 0.0
    exit_schedule: Literal["equal", "linear"] = "equal"
    exit_kd: float = 0.0
    gate: Literal["none", "distribution", "improvement"] = "none"
    gate_beta: float = 0.1

    def __post_init__(self) -> None:
        refuse(
            (min(self.exit_weight, self.exit_kd, self.gate_beta) < 0, "weights of the loss cannot be negative"),
            (
                self.exit_weight == 0 and (self.exit_kd > 0 or self.exit_schedule != "equal"),
                "exit_kd and exit_schedule are for losses at earlier exits: set exit_weight above 0",
            ),
            (
                self.gate != "none" and self.exit_weight > 0,
                "the gate learns from every exit already: set exit_weight to 0, or gate to none",
            ),
        )

    @property
    def exit_term_weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {"exits": self.exit_weight, "gate": float(self.gate != "none")}

    @property
    def wants_exits(self) -> bool:
        """Whether training reads earlier exits."""
        return self.exit_weight > 0 or self.gate != "none"
