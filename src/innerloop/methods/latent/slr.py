"""Stable Latent Reasoning: a latent state is refined T times by the same model, held stable by a loop residual.

Every option of slr.md; the stabilisers and stop rules are `LoopSettings`, which every looping method has.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from innerloop.config.curriculum import Curriculum
from innerloop.config.loop import LoopSettings, RescaleKind, ResidualKind, TimeKind
from innerloop.config.losses import AuxSettings, DecoderSettings, KdSettings, LossSettings
from innerloop.config.method import AnswerContext, FirstState, LatentMethod, PrefixKV, Scope
from innerloop.errors import InputError, refuse
from innerloop.loop.sampling import LoopSampling, draw_loops
from innerloop.text.encoder import Speller
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, Follow, Kind, Piece, Readout, Row, Told


@dataclass(frozen=True)
class Slr(LoopSettings, LossSettings, KdSettings, AuxSettings, DecoderSettings, Curriculum, LatentMethod):
    """``[Q][<bot>] | [<lat> x N] | [<eot>][A][eos]``; the N latents are refined T times.

    Args:
        loop_scope: slots: N latents refined together; all: the whole prompt; last: its last position, <bot>;
            append: every iteration adds one latent.
        n_slots: N, for scope slots.
        distinct_slots: give each slot an embedding of its own.
        max_loops: T.
        h0: h_0 is the embeddings (embed), or what one pass makes of them (forward; append: the state of <bot>).
        answer_from: the answer sees h_T fed once more (refeed), or the cache of the last iteration (kv_last).
        prefix_kv: the prompt is read once with the base weights (base), or in every iteration with its own (per_iter).
        decode_lora: read h_T and the answer with the last iteration's LoRA weights instead of the base weights.
        loop_sampling: iterations of a training batch: T (fixed), uniform in 1..T, or log-normal Poisson around T.
        slots_per_step: c; step i is shown at the i-th block of c slots, round and round, cut to c tokens; 0: all slots.
        aux_weight: iteration t must tell step sigma(t) to an auxiliary decoder, from the same block of slots.
        teacher_thinks: the teacher writes its steps, and the states at their ends are followed (steps); or it is a run
            that thinks in latents laid out as this model's, and each of their states h_t is followed (latents).
        hid_site: a teacher's state is followed by the mean of the latents, or by the last of them.
        step_map: sigma(t) = ceil(t m / T) (stretch), or t while there are steps (one2one); m is the number of steps,
            or with teacher_thinks=latents of the teacher's iterations.
        write_steps: during a curriculum the steps that have not left are written; off: none ever is, so that its stages
            do nothing but ramp the iterations.
        loops_per_stage: during a curriculum, stage s allows min(T, loops_per_stage * s) iterations; 0: always T.
    """

    name: ClassVar[str] = "slr"
    paper: ClassVar[str] = "Stable Latent Reasoning (proposal, 2024)"
    summary: ClassVar[str] = (
        "latents refined in a loop, held stable by timestep embedding, LoRA, rescaling and residual"
    )

    presets: ClassVar[dict[str, "Slr"]]

    loop_scope: Literal["slots", "all", "last", "append"] = "slots"
    n_slots: int = 8
    distinct_slots: bool = False
    max_loops: int = 4
    h0: Literal["embed", "forward"] = "embed"
    answer_from: Literal["refeed", "kv_last"] = "refeed"
    prefix_kv: PrefixKV = "base"
    decode_lora: bool = False
    residual: ResidualKind = "A"
    rescale: RescaleKind = "rms"
    time: TimeKind = "lookup"
    loop_sampling: LoopSampling = "fixed"
    slots_per_step: int = 0
    teacher_thinks: Literal["steps", "latents"] = "steps"
    kd_temperature: float = 2.0
    hid_site: Literal["mean", "last"] = "mean"
    step_map: Literal["stretch", "one2one"] = "stretch"
    write_steps: bool = True
    loops_per_stage: int = 0
    reset_optimizer: Literal["stage", "epoch", "never"] = "never"

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        Curriculum.__post_init__(self)
        LossSettings.__post_init__(self)
        KdSettings.__post_init__(self)
        AuxSettings.__post_init__(self)
        DecoderSettings.__post_init__(self)
        is_region = self.loop_scope != "append"
        decodes_all = self.deep_weight > 0 or self.halt_weight > 0
        is_refed = self.answer_from == "refeed" and is_region
        refuse(
            (
                self.max_loops < 0 or self.n_slots < 1 or self.loops_per_stage < 0,
                "slr needs max_loops >= 0, n_slots >= 1 and loops_per_stage >= 0",
            ),
            (
                self.max_loops == 0 and self.loop_sampling != "fixed",
                "loop_sampling draws a number of iterations around max_loops: set max_loops to at least 1",
            ),
            (
                self.max_loops == 0 and self.answer_from == "kv_last",
                "answer_from=kv_last reads the cache of the last iteration: set max_loops to at least 1",
            ),
            (
                self.prefix_kv == "per_iter" and self.loop_scope in ("all", "append"),
                "prefix_kv=per_iter reads the prompt again in every iteration: set loop_scope to slots or last",
            ),
            (
                self.loop_scope != "slots" and (self.distinct_slots or self.time_inject == "token"),
                "distinct_slots and time_inject=token are for loop_scope=slots",
            ),
            (
                self.decoder != "lm_head"
                and (self.max_loops == 0 or self.decode_lora or self.answer_from == "kv_last"),
                "a decoder of its own reads the final state: set max_loops >= 1, answer_from=refeed and decode_lora "
                "off",
            ),
            (
                self.decoder != "lm_head" and self.stop_site == "answer",
                "stop_site=answer reads the answer that the model itself would write: set decoder to lm_head, or "
                "stop_site to latents",
            ),
            (
                self.decoder == "linear" and (self._writes_steps or decodes_all),
                "decoder=linear writes nothing: set max_stage, deep_weight and halt_weight to 0, or write_steps off",
            ),
            (
                self.decode_lora and self.lora == "none",
                "decode_lora needs loop-wise LoRA: set lora to per_iter or shared",
            ),
            (
                self.slots_per_step < 0 or bool(self.slots_per_step and self.n_slots % self.slots_per_step),
                f"slots_per_step is {self.slots_per_step}, but must divide n_slots={self.n_slots}",
            ),
            (
                self.loops_per_stage > 0 and self.max_stage == 0,
                "loops_per_stage ramps the iterations over a curriculum: set max_stage to at least 1",
            ),
            (
                not self.write_steps and self.max_stage == 0,
                "write_steps is for a curriculum: set max_stage to at least 1",
            ),
            (
                self.aux_weight > 0 and (self.loop_scope != "slots" or self.max_loops == 0 or self.solver != "none"),
                "aux_weight needs slots to read at each iteration: set loop_scope=slots, max_loops >= 1 and solver to "
                "none",
            ),
            (
                self.step_weight > 0 and (self.loop_scope != "slots" or self.max_loops == 0),
                "step_weight needs slots to read at each iteration: set loop_scope=slots and max_loops >= 1",
            ),
            (
                self.hid_weight > 0 and (self.max_loops == 0 or not is_region),
                "hid_weight needs states to pull: set max_loops >= 1 and loop_scope to slots, all or last",
            ),
            (
                self.kd_weight > 0 and not self.thinks_along,
                "kd_weight is for what a teacher predicts on the same rows: set teacher to the folder of a run like "
                "this one, and teacher_thinks to latents",
            ),
            (
                self.thinks_along
                and (self.teacher in (None, "self") or self.hid_weight + self.kd_weight == 0 or not is_region),
                "teacher_thinks=latents follows another run: set teacher to its folder, hid_weight or kd_weight above "
                "0, and loop_scope to slots, all or last",
            ),
            (
                self.thinks_along and (self.hid_layers != "last" or self.hid_site != "mean"),
                "with teacher_thinks=latents every latent follows its like: leave hid_layers and hid_site out",
            ),
            (
                self.thinks_along and self._writes_steps,
                "a teacher that thinks in latents knows no written steps: set max_stage to 0, or write_steps off",
            ),
            (
                self.kd_weight > 0 and self.decoder == "linear",
                "decoder=linear writes nothing that could be predicted alike: set kd_weight to 0",
            ),
            (
                decodes_all and (not is_refed or self.max_loops == 0 or self.solver != "none"),
                "deep_weight and halt_weight decode every iteration's state: set answer_from=refeed, max_loops >= 1, "
                "loop_scope to slots, all or last, and solver to none",
            ),
            (
                self.halt_weight > 0 and self.stop not in ("halt", "halt_sample"),
                "halt_weight trains the gate of a learned stop: set stop=halt or halt_sample",
            ),
            (
                self.solver != "none" and (not is_refed or self.step_weight > 0 or self.hid_weight > 0),
                "a solver finds one state: set loop_scope to slots, all or last, answer_from to refeed, and "
                "step_weight and hid_weight to 0",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """Where iterations must show steps or follow a teacher's, or steps leave one by one."""
        follows_steps = self.hid_weight > 0 and not self.thinks_along
        weights = (self.step_weight, self.aux_weight, self.teacher_weight)
        return max(weights) > 0 or follows_steps or self._writes_steps

    @property
    def _writes_steps(self) -> bool:
        return self.max_stage > 0 and self.write_steps

    @property
    def thinks_along(self) -> bool:
        """Whether the teacher thinks in latents."""
        return self.teacher_thinks == "latents"

    def followed(self, n_loops: int, n_taught: int) -> list[int | None]:
        """Return sigma(t) - 1 of the teacher's iterations for each t; a loop cut short does not reach the last."""
        cut = n_loops < self.max_loops
        return [self._step_of(t, n_taught, n_loops, cut) for t in range(1, n_loops + 1)]

    @property
    def scope(self) -> Scope:
        """Where the loop works."""
        return self.loop_scope

    @property
    def first_state(self) -> FirstState:
        """Which reading of h_0."""
        return self.h0

    @property
    def answer_context(self) -> AnswerContext:
        """What the answer sees."""
        return self.answer_from

    @property
    def n_distinct_slots(self) -> int:
        """N, if slots differ."""
        return self.n_slots if self.distinct_slots else 0

    def n_latents(self, stage: int) -> int:
        """Return N; in append one position per iteration, and one for h_T if it is fed once more."""
        if self.loop_scope == "slots":
            return self.n_slots
        return self.n_loops(stage) + (self.answer_from == "refeed") if self.loop_scope == "append" else 0

    def n_loops(self, stage: int) -> int:
        """Return T_s = min(T, r s), or T without a ramp."""
        if stage == self.last_stage or not self.loops_per_stage:
            return self.max_loops
        return min(self.max_loops, self.loops_per_stage * stage)

    def with_loops(self, loops: int) -> "Slr":
        """Return the method for answering with T = ``loops``; how it was trained no longer matters."""
        no_terms = {f"{term}_weight": 0.0 for term in ("step", "aux", "hid", "kd", "deep", "halt")}
        untaught: dict[str, Any] = {"hid_width": 0, "teacher_thinks": "steps", **no_terms}
        return replace(self, max_loops=loops, loop_sampling="fixed", aux_trains="both", **untaught)

    def sampled(self, seed: str) -> "Slr":
        """Draw T for a training batch."""
        if self.loop_sampling == "fixed" or not seed:
            return self
        drawn = draw_loops(self.loop_sampling, self.max_loops, seed)
        method = replace(self, max_loops=drawn, loop_sampling="fixed")
        object.__setattr__(method, "_cut_short", drawn < self.max_loops)
        return method

    def prompt(self, question: str, spell: Speller, stage: int) -> Row:
        """Return the row up to <eot>: the region is the slots, the prompt (all) or <bot> (last)."""
        asked, bot, eot = spell.question(question), spell.marker(BOT), spell.marker(EOT)
        if self.loop_scope == "all":
            return Row([], [asked], [eot], n_loops=self.n_loops(stage))
        if self.loop_scope == "last":
            return Row([asked], [bot], [eot], n_loops=self.n_loops(stage))
        return super().prompt(question, spell, stage)

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out, with the steps that each iteration must show or follow."""
        row = super().lay_out(example, spell, stage)
        if not self.write_steps:
            row.suffix = [piece for piece in row.suffix if piece.kind is not Kind.STEP]
        if self.decoder == "linear":
            row.suffix.pop()  # the answer is chosen, not written
            row.answer_class = self._class_of(example)
        all_gone = stage == self.last_stage or not self.write_steps
        steps = spell.steps(example) if all_gone else spell.steps(example)[:stage]
        cut = getattr(self, "_cut_short", False)
        pairing = [self._step_of(t, len(steps), row.n_loops, cut) for t in range(1, row.n_loops + 1)]
        follows_steps = self.hid_weight > 0 and not self.thinks_along
        if self.step_weight:
            row.readouts = [
                readout
                for t, index in enumerate(pairing, 1)
                if index is not None
                for readout in self._readouts(t, row.region_start, index, steps[index])
            ]
        if self.aux_weight:
            c = self.slots_per_step or self.n_slots
            row.told = [
                Told(t - 1, t, self._block_of(index), c, spell.told(example.steps[index]))
                for t, index in enumerate(pairing, 1)
                if index is not None
            ]
        if follows_steps or self.teacher_weight:
            row.teacher = Row(
                [spell.question(example.question)], [], [*spell.steps(example), spell.answer(example.answer)]
            )
        if follows_steps and row.teacher is not None:
            ends = row.teacher.step_ends()
            at = None if self.hid_site == "mean" else row.region_start + sum(len(piece.ids) for piece in row.region) - 1
            row.follows = [Follow(t, at, ends[index]) for t, index in enumerate(pairing, 1) if index is not None]
        return row

    def _class_of(self, example: Example) -> int:
        if example.answer not in self.classes:
            raise InputError(
                f"example '{example.id}' has the answer '{example.answer}', which is none of the classes "
                f"{', '.join(self.classes)}; list it in classes"
            )
        return self.classes.index(example.answer)

    def _step_of(self, t: int, m: int, n_loops: int, cut: bool) -> int | None:
        """Return the 0-based step of iteration t, sigma(t) - 1, of m steps that have left the text (slr.md, 2).

        With ``cut`` fewer iterations were drawn than there are.
        """
        index = math.ceil(t * m / n_loops) if self.step_map == "stretch" else t
        if self.step_map == "one2one" and t == n_loops and not cut:
            index = max(index, m)  # the last iteration takes the last step when there are more steps than loops
        return index - 1 if 1 <= index <= m else None

    def _readouts(self, t: int, start: int, index: int, step: Piece) -> list[Readout]:
        """Return the first c tokens of a step, to be shown in iteration t by the slots of its block."""
        first, c = start + self._block_of(index), self.slots_per_step or self.n_slots
        return [Readout(t, first + j, token) for j, token in enumerate(step.ids[:c])]

    def _block_of(self, index: int) -> int:
        """Return the first of the slots that show the 0-based step."""
        c = self.slots_per_step or self.n_slots
        return index % (self.n_slots // c) * c


Slr.presets = {
    "default": Slr(lora="per_iter"),
    "readme": Slr(loop_scope="all", residual="sum", rescale="none", time="none"),
    "pause": Slr(max_loops=0, residual="none", rescale="none", time="none"),
    "coconut": Slr(
        loop_scope="append",
        max_loops=6,
        h0="forward",
        answer_from="kv_last",
        residual="none",
        rescale="none",
        time="none",
    ),
    "codi": Slr(
        loop_scope="append",
        max_loops=6,
        h0="forward",
        answer_from="kv_last",
        residual="none",
        rescale="project",
        time="none",
    ),
    "lotus": Slr(n_slots=150, max_loops=6, residual="sum", rescale="none", time="none"),
    "spiral": Slr(n_slots=5, max_loops=5, residual="none", rescale="adapter", time="none"),
}
"""Named settings (slr.md, sections 3 and 9): a recipe's ``method: {name: slr, preset: readme, max_loops: 6}``."""
