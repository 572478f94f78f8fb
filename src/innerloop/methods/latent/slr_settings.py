"""SLR's groups of settings: every option of slr.md, section 3 and after."""

from dataclasses import dataclass
from typing import Literal

from innerloop.checks.values import Loops
from innerloop.config.curriculum import ResetOptimizer, Schedule, StageUnit
from innerloop.config.loop import (
    AlphaLearn,
    BankKind,
    Beyond,
    GateKind,
    GateShape,
    LoopSettings,
    NoiseLevel,
    RescaleKind,
    ResidualKind,
    TimeInject,
    TimeKind,
)
from innerloop.config.losses import AuxSettings, Distance, HiddenLayers, HiddenSettings, KdSettings
from innerloop.config.stopping import Agg, CommonStop


@dataclass(frozen=True)
class StabilisedLoop(LoopSettings):
    """A state is held stable by timestep embedding, loop-wise LoRA, rescaling and residual."""

    residual: ResidualKind = "A"
    alpha: float = 0.7
    alpha_learn: AlphaLearn = "fixed"
    gate_shape: GateShape = "scalar"
    gate_kind: GateKind = "softmax"
    rescale: RescaleKind = "rms"
    width: int = 0
    time: TimeKind = "lookup"
    time_inject: TimeInject = "add"
    time_norm: bool = False
    noise: float = 0.0
    random_starts: float = 0.0
    noise_level: NoiseLevel = "none"
    lora: BankKind = "none"
    lora_rank: int = 8
    lora_gamma: float = 16.0
    lora_targets: tuple[str, ...] = ()
    lora_beyond: Beyond = "clamp"
    shift: bool = False
    bptt: int | None = None
    detach: bool = False
    progressive: float = 0.0
    free_loops: tuple[Loops, Loops] = (1, 12)


@dataclass(frozen=True)
class SlrStop(CommonStop):
    """All that may end a loop."""

    site: Literal["latents", "answer"] = "latents"
    agg: Agg = "mean"
    act_output: Literal["weighted", "last"] = "weighted"

    untrained = ()


@dataclass(frozen=True)
class SlrStates(HiddenSettings):
    """States follow those of `teacher`."""

    weight: float = 0.0
    layers: HiddenLayers = "last"
    distance: Distance = "smooth_l1"
    width: int = 0
    site: Literal["mean", "last"] = "mean"


@dataclass(frozen=True)
class SlrKd(KdSettings):
    """Predictions of a `teacher` that thinks in latents are learned."""

    weight: float = 0.0
    temperature: float = 2.0


@dataclass(frozen=True)
class SlrAux(AuxSettings):
    """Iteration t must tell step sigma(t) to an auxiliary decoder, from the same block of slots."""

    weight: float = 0.0
    layers: int = 0


@dataclass(frozen=True)
class SlrSchedule(Schedule):
    """Steps leave the text one by one, or iterations are ramped."""

    first_stage: int = 0
    length: int = 3
    unit: StageUnit = "epoch"
    max_stage: int = 0
    reset_optimizer: ResetOptimizer = "never"
