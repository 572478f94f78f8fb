"""How a state is carried from one iteration to the next: stabilisers, low-rank updates by iteration, fixed points.

Each group names all of its options, as constants. A method's own group is a small frozen dataclass on it whose fields
are those that the method has, so a method says once what it accepts, and the loop reads one and the same thing of all.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Bounds, Loops, Positive, Share, Weight, Width
from innerloop.config.curriculum import shared_seed, uniforms
from innerloop.errors import refuse

ResidualKind = Literal["none", "sum", "A", "B", "C"]
RescaleKind = Literal["none", "rms", "adapter", "project"]
TimeKind = Literal["none", "lookup", "sinusoidal"]
TimeInject = Literal["add", "concat", "token"]
NoiseLevel = Literal["none", "injected", "delta"]
GateShape = Literal["scalar", "channel"]
GateKind = Literal["softmax", "sigmoid", "attention"]
AlphaLearn = Literal["fixed", "shared", "per_iter", "free"]
BankKind = Literal["none", "per_iter", "shared"]
Beyond = Literal["clamp", "cycle", "off"]
Site = Literal["post_norm", "pre_norm"]
Solver = Literal["none", "plain", "damped", "anderson"]
Gradient = Literal["unroll", "implicit", "phantom"]
LoopSampling = Literal["fixed", "uniform", "lognormal_poisson"]


class LoopSettings(Checked):
    """What an iteration does to a state.

    Args:
        residual: how an iteration's output is mixed with the initial and the previous state (slr.md, 3.6).
        alpha: share of the new state in residuals A, B and C, in [0, 1].
        alpha_learn: keep alpha fixed, learn one (shared), or one for each iteration (per_iter), in (0, 1); or one for
            each that may be any number (free).
        gate_shape: residual C: one gate for a position (scalar) or for each channel.
        gate_kind: residual C: softmax, sigmoid, or attention over the three candidates.
        rescale: leave outputs (none), bring them to the RMS of the embeddings (rms), learn an adapter that does, or
            project them by an MLP with a layer norm (project).
        width: inner width of adapter and project; 0: that of the model.
        gain: adapter: learn a gain per channel.
        norm: project: end with a layer norm.
        scale: factor on the rescaled output before the residual.
        shift: each latent receives what the position before it made, the first what <bot> made (Jacobi form).
        time: timestep embedding: none, a table (lookup), or an MLP on sines (sinusoidal).
        time_inject: add it, concat it and project, or give it a position of its own (token).
        time_norm: sinusoidal: tell t / T instead of t.
        noise: standard deviation of the noise on each iteration's input in training, in units of the embeddings' RMS.
        random_starts: share of the training rows that begin at a random state of z_0's size instead of z_0, so that the
            loop learns to come back from anywhere (arXiv 2605.21488); what it recalls stays its own z_0.
        noise_level: also tell the noise that was injected, or the last relative change of the state (delta).
        lora: low-rank updates of the weights inside the loop: none, one for each iteration (per_iter), or shared.
        lora_rank: r.
        lora_gamma: the update is scaled by gamma / r.
        lora_targets: patterns of module names within the layers, such as q_proj, 1.mlp.up_proj or *_proj; empty: all
            attention and MLP linears.
        lora_beyond: iterations past max_loops use the last update (clamp), start over (cycle) or none (off).
        bptt: back-propagate through the last so many iterations only, 0 through none; None: all.
        site: what an iteration gives back: the state after the final norm, or before it.
        detach: cut the gradient from each iteration's input, and from what is fed once more in append, to the output
            that it was.
        progressive: share of the training batches that go on from free iterations, which run without a gradient, and
            learn what is written alone (progressive loss, Bansal et al. 2022): so the loop learns to hold.
        free_loops: the fewest and the most free iterations, drawn uniformly for each of those batches.
    """

    residual: ResidualKind = "none"
    alpha: Share = 0.7
    alpha_learn: AlphaLearn = "fixed"
    gate_shape: GateShape = "scalar"
    gate_kind: GateKind = "softmax"
    rescale: RescaleKind = "none"
    width: Width = 0
    gain: bool = False
    norm: bool = True
    scale: float = 1.0
    shift: bool = False
    time: TimeKind = "none"
    time_inject: TimeInject = "add"
    time_norm: bool = False
    noise: Weight = 0.0
    random_starts: Share = 0.0
    noise_level: NoiseLevel = "none"
    lora: BankKind = "none"
    lora_rank: Annotated[int, Bounds(most=100_000)] = 8
    lora_gamma: float = 16.0
    lora_targets: tuple[str, ...] = ()
    lora_beyond: Beyond = "clamp"
    bptt: Loops | None = None
    site: Site = "post_norm"
    detach: bool = False
    progressive: Share = 0.0
    free_loops: tuple[Loops, Loops] = (1, 12)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse(
            (self.rescale not in ("adapter", "project") and self.width != 0, "width is for rescale=adapter or project"),
            (self.rescale != "adapter" and self.gain, "gain is for rescale=adapter"),
            (self.rescale != "project" and not self.norm, "norm is for rescale=project"),
            (self.lora_rank < 1, "lora_rank must be at least 1; to do without, set lora to none"),
            (
                self.time == "none" and (self.noise_level != "none" or self.time_inject != "add"),
                "noise_level and time_inject need a timestep embedding: set time to lookup or sinusoidal",
            ),
            (
                self.noise_level == "injected" and self.noise == 0,
                "noise_level=injected tells the size of the injected noise: set noise above 0",
            ),
            (
                self.alpha_learn != "fixed" and self.residual not in ("A", "B"),
                "alpha_learn has nothing to learn without residual A or B",
            ),
            (
                self.free_loops[0] > self.free_loops[1],
                f"free_loops is {list(self.free_loops)}, but must be the fewest and the most, such as [1, 12]",
            ),
            (self.time_norm and self.time != "sinusoidal", "time_norm is for time=sinusoidal"),
            (
                self.gate_kind == "attention" and self.gate_shape == "channel",
                "gate_kind=attention weighs whole candidates: set gate_shape to scalar",
            ),
        )

    def draw_free(self, seed: str) -> int | None:
        """Draw how many free iterations a training batch goes on from; None: it begins at z_0 and learns everything.

        ``seed`` is the batch's; all processes draw alike.
        """
        if self.progressive == 0 or not seed:
            return None
        chosen, length, _ = uniforms(f"free/{shared_seed(seed)}")
        low, high = self.free_loops
        return low + int(length * (high - low + 1)) if chosen < self.progressive else None


@dataclass(frozen=True)
class FixedPointSettings(Checked):
    """Iterating to a fixed point, and keeping the loop from stretching what it is given.

    Args:
        solver: iterate to a fixed point: plain, damped by alpha, or Anderson-accelerated; none: a fixed number.
        gradient: through all iterations (unroll), by the implicit function theorem, or through one (phantom).
        tol: relative change at which a fixed point is reached.
        spectral_weight: weight of the penalty on a loop whose gain exceeds spectral_bound; 0: none.
        spectral_bound: the largest gain (estimated spectral radius of the loop's Jacobian) that is not penalised.
    """

    solver: Solver = "none"
    gradient: Gradient = "implicit"
    tol: Positive = 1e-3
    spectral_weight: Weight = 0.0
    spectral_bound: Weight = 0.95

    def check(self, loop: LoopSettings, stops: bool) -> None:
        """Refuse a solver for a loop whose iterations are not alike, or that may stop by itself."""
        refuse(
            (
                self.solver != "none"
                and (
                    loop.time != "none"
                    or loop.lora == "per_iter"
                    or max(loop.noise, loop.random_starts) > 0
                    or stops
                    or loop.alpha_learn in ("per_iter", "free")
                ),
                "a solver looks for one fixed point, so iterations must be alike: set loop.time to none, loop.lora to "
                "none or shared, loop.noise and loop.random_starts to 0, stop.rule to none and loop.alpha_learn to "
                "fixed or shared",
            ),
            (
                self.solver != "none" and (loop.bptt is not None or loop.detach),
                "with a solver, fixed_point.gradient says where gradients flow: leave loop.bptt and loop.detach out",
            ),
            (
                self.solver != "none" and loop.progressive > 0,
                "a solver iterates until nothing changes, so there is nothing to go on from: set loop.progressive to 0",
            ),
        )
