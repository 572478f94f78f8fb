"""Stable Latent Reasoning: a latent state is refined T times by the same model, held stable by a loop residual.

Every option of slr.md; the stabilisers and stop rules are `LoopSettings`, which every looping method has.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from innerloop.checks.values import Loops, Places, SomePlaces, Weight
from innerloop.config.loop import FixedPointSettings, LoopSampling
from innerloop.config.losses import DecoderSettings, DeepSettings, HaltSettings
from innerloop.config.method import LatentMethod
from innerloop.config.plan import AnswerContext, FirstState, Plan, PrefixKV, Scope
from innerloop.config.stopping import GATED
from innerloop.errors import InputError, refuse
from innerloop.loop.sampling import draw_loops
from innerloop.methods.latent.slr_settings import SlrAux, SlrKd, SlrSchedule, SlrStates, SlrStop, StabilisedLoop
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example
from innerloop.text.row import BOT, EOT, AuxTarget, HiddenTarget, Kind, Row, Span, TokenTarget


@dataclass(frozen=True)
class Slr(LatentMethod):
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
        step_weight: lambda_step; iteration t must show step sigma(t) through the head (append: its first token).
        step_map: sigma(t) = ceil(t m / T) (stretch), or t while there are steps (one2one); m is the number of steps,
            or with teacher_thinks=latents of the teacher's iterations.
        write_steps: during a curriculum the steps that have not left are written; off: none ever is, so that its stages
            do nothing but ramp the iterations.
        loops_per_stage: during a curriculum, stage s allows min(T, loops_per_stage * s) iterations; 0: always T.
        teacher: folder of the run whose states (hid) or predictions (kd) are learned.
        teacher_thinks: the teacher writes its steps, and the states at their ends are followed (steps); or it is a run
            that thinks in latents laid out as this model's, and each of their states h_t is followed (latents).
        ponder_weight: stop.rule=act: weight of the cost of thinking, N iterations and the remainder R
            (arXiv 1603.08983).
    """

    name: ClassVar[str] = "slr"
    paper: ClassVar[str] = "Stable Latent Reasoning (proposal, 2024)"
    summary: ClassVar[str] = (
        "latents refined in a loop, held stable by timestep embedding, LoRA, rescaling and residual"
    )

    loop_scope: Scope = "slots"
    n_slots: Places = 8
    distinct_slots: bool = False
    max_loops: Loops = 4
    h0: FirstState = "embed"
    answer_from: AnswerContext = "refeed"
    prefix_kv: PrefixKV = "base"
    decode_lora: bool = False
    loop_sampling: LoopSampling = "fixed"
    slots_per_step: SomePlaces = 0
    step_weight: Weight = 0.0
    step_map: Literal["stretch", "one2one"] = "stretch"
    write_steps: bool = True
    loops_per_stage: Loops = 0
    teacher: str | None = None  # type: ignore[assignment]
    teacher_thinks: Literal["steps", "latents"] = "steps"
    ponder_weight: Weight = 0.0
    loop: StabilisedLoop = StabilisedLoop()
    fixed_point: FixedPointSettings = FixedPointSettings()
    stop: SlrStop = SlrStop()
    hid: SlrStates = SlrStates()
    kd: SlrKd = SlrKd()
    deep: DeepSettings = DeepSettings()
    halt: HaltSettings = HaltSettings()
    aux: SlrAux = SlrAux()
    decoder: DecoderSettings = DecoderSettings()
    curriculum: SlrSchedule = SlrSchedule()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.curriculum.check(self.last_stage)
        self.fixed_point.check(self.loop, self.stop.stops)
        self._check_loop()
        self._check_losses()
        self._check_teacher()

    @property
    def _is_region(self) -> bool:
        return self.loop_scope != "append"

    @property
    def _is_solved(self) -> bool:
        return self.fixed_point.solver != "none"

    @property
    def _decodes_all(self) -> bool:
        return self.deep.weight > 0 or self.halt.weight > 0

    @property
    def _is_refed(self) -> bool:
        return self.answer_from == "refeed" and self._is_region

    def _check_loop(self) -> None:
        """Refuse what cannot be looped, or answered from."""
        refuse(
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
                self.loop_scope != "slots"
                and (self.distinct_slots or self.loop.time_inject == "token" or self.loop.random_starts > 0),
                "distinct_slots, loop.random_starts and loop.time_inject=token are for loop_scope=slots",
            ),
            (
                self.loop.shift and (self.loop_scope != "slots" or self.prefix_kv == "per_iter"),
                "loop.shift is for latents side by side on one prefix: set loop_scope to slots and prefix_kv to base",
            ),
            (
                self.decoder.kind != "lm_head"
                and (self.max_loops == 0 or self.decode_lora or self.answer_from == "kv_last"),
                "a decoder of its own reads the final state: set max_loops >= 1, answer_from=refeed and decode_lora "
                "off",
            ),
            (
                self.decoder.kind != "lm_head" and self.stop.site == "answer",
                "stop.site=answer reads the answer that the model itself would write: set decoder.kind to lm_head, or "
                "stop.site to latents",
            ),
            (
                self.decode_lora and self.loop.lora == "none",
                "decode_lora needs loop-wise LoRA: set loop.lora to per_iter or shared",
            ),
            (
                self.last_stage == 0 and (self.loops_per_stage > 0 or not self.write_steps),
                "loops_per_stage and write_steps are for a curriculum: set curriculum.max_stage to at least 1",
            ),
            (
                self.loop.progressive > 0 and (self.loop_scope == "append" or self.stop.rule == "act"),
                "loop.progressive needs latents that are refined together, to a known end: leave loop_scope=append and "
                "stop.rule=act out",
            ),
            (
                (self.stop.rule, self.stop.act_output, self.answer_from) == ("act", "weighted", "kv_last"),
                "the answer sees the last iteration's cache, not ACT's mean: set stop.act_output to last",
            ),
        )

    def _check_losses(self) -> None:
        """Refuse terms of the loss that this loop leaves nothing to."""
        refuse(
            (
                self.decoder.kind == "linear" and (self._writes_steps or self._decodes_all),
                "decoder.kind=linear writes nothing: set curriculum.max_stage, deep.weight and halt.weight to 0, or "
                "write_steps off",
            ),
            (
                bool(self.slots_per_step and self.n_slots % self.slots_per_step),
                f"slots_per_step is {self.slots_per_step}, but must divide n_slots={self.n_slots}",
            ),
            (
                self.aux.weight > 0 and (self.loop_scope != "slots" or self.max_loops == 0 or self._is_solved),
                "aux.weight needs slots to read at each iteration: set loop_scope=slots, max_loops >= 1 and "
                "fixed_point.solver to none",
            ),
            (
                self.step_weight > 0 and (self.loop_scope not in ("slots", "append") or self.max_loops == 0),
                "step_weight needs latents to read: set loop_scope to slots or append, and max_loops >= 1",
            ),
            (
                self._decodes_all and (not self._is_refed or self.max_loops == 0 or self._is_solved),
                "deep.weight and halt.weight decode every iteration's state: set answer_from=refeed, max_loops >= 1, "
                "loop_scope to slots, all or last, and fixed_point.solver to none",
            ),
            (
                self.halt.weight > 0 and self.stop.rule not in GATED,
                "halt.weight trains the gate of a learned stop: set stop.rule=halt or halt_sample",
            ),
            (
                self.ponder_weight > 0 and self.stop.rule != "act",
                "ponder_weight is the cost of thinking in ACT: set stop.rule=act",
            ),
            (
                self._is_solved and (not self._is_refed or self.step_weight > 0 or self.hid.weight > 0),
                "a solver finds one state: set loop_scope to slots, all or last, answer_from to refeed, and "
                "step_weight and hid.weight to 0",
            ),
        )

    def _check_teacher(self) -> None:
        """Refuse a teacher that is missing, or whose states have no like here."""
        refuse(
            (
                self.hid.weight > 0 and self.teacher is None,
                "hid.weight needs states to follow: set teacher to the folder of a chain-of-thought run",
            ),
            (
                self.hid.width > 0 and self.hid.weight == 0,
                "hid.width is the width of another model's states: set hid.weight above 0, or hid.width to 0",
            ),
            (
                self.hid.weight > 0 and (self.max_loops == 0 or not self._is_region),
                "hid.weight needs states to pull: set max_loops >= 1 and loop_scope to slots, all or last",
            ),
            (
                self.kd.weight > 0 and not self.has_latent_teacher,
                "kd.weight is for what a teacher predicts on the same rows: set teacher to the folder of a run like "
                "this one, and teacher_thinks to latents",
            ),
            (
                self.has_latent_teacher
                and (self.teacher in (None, "self") or self.hid.weight + self.kd.weight == 0 or not self._is_region),
                "teacher_thinks=latents follows another run: set teacher to its folder, hid.weight or kd.weight above "
                "0, and loop_scope to slots, all or last",
            ),
            (
                self.has_latent_teacher and (self.hid.layers != "last" or self.hid.site != "mean"),
                "with teacher_thinks=latents every latent follows its like: leave hid.layers and hid.site out",
            ),
            (
                self.has_latent_teacher and self._writes_steps,
                "a teacher that thinks in latents knows no written steps: set curriculum.max_stage to 0, or "
                "write_steps off",
            ),
            (
                self.kd.weight > 0 and self.decoder.kind == "linear",
                "decoder.kind=linear writes nothing that could be predicted alike: set kd.weight to 0",
            ),
        )

    @property
    def needs_steps(self) -> bool:
        """Where iterations must show steps or follow a teacher's, or steps leave one by one."""
        return self.step_weight > 0 or self.aux.weight > 0 or self._follows_steps or self._writes_steps

    @property
    def _writes_steps(self) -> bool:
        return self.last_stage > 0 and self.write_steps

    @property
    def _follows_steps(self) -> bool:
        return self.hid.weight > 0 and not self.has_latent_teacher

    @property
    def has_latent_teacher(self) -> bool:
        """Whether the teacher thinks in latents."""
        return self.teacher_thinks == "latents"

    def followed(self, n_loops: int, n_taught: int) -> list[int | None]:
        """Return sigma(t) - 1 of the teacher's iterations for each t; a loop cut short does not reach the last."""
        cut = n_loops < self.max_loops
        return [self._step_of(t, n_taught, n_loops, cut) for t in range(1, n_loops + 1)]

    @property
    def plan(self) -> Plan:
        """Where the loop works, and what the answer sees."""
        return replace(
            super().plan,
            scope=self.loop_scope,
            first_state=self.h0,
            answer_context=self.answer_from,
            prefix_kv=self.prefix_kv,
            decode_lora=self.decode_lora,
            reads_state=self.decoder.kind != "lm_head",
            reads_answer=self.stop.site == "answer",
        )

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
        unlearned: dict[str, Any] = {name: type(getattr(self, name))() for name in ("aux", "kd", "deep", "halt")}
        unlearned |= {"hid": replace(self.hid, weight=0.0, width=0), "step_weight": 0.0, "teacher_thinks": "steps"}
        unlearned |= {"loop": replace(self.loop, progressive=0.0), "loop_sampling": "fixed"}
        return replace(self, max_loops=loops, **unlearned)

    def sampled(self, seed: str) -> "Slr":
        """Draw T for a training batch."""
        if self.loop_sampling == "fixed" or not seed:
            return self
        drawn = draw_loops(self.loop_sampling, self.max_loops, seed)
        method = replace(self, max_loops=drawn, loop_sampling="fixed")
        object.__setattr__(method, "_cut_short", drawn < self.max_loops)
        return method

    def prompt(self, question: str, encoder: PromptEncoder, stage: int) -> Row:
        """Return the row up to <eot>: the region is the slots, the prompt (all) or <bot> (last)."""
        asked, bot, eot = encoder.question(question), encoder.marker(BOT), encoder.marker(EOT)
        if self.loop_scope == "all":
            return Row([], [asked], [eot], n_loops=self.n_loops(stage))
        if self.loop_scope == "last":
            return Row([asked], [bot], [eot], n_loops=self.n_loops(stage))
        return super().prompt(question, encoder, stage)

    def lay_out(self, example: Example, encoder: PromptEncoder, stage: int) -> Row:
        """Lay out, with the steps that each iteration must show or follow."""
        row = super().lay_out(example, encoder, stage)
        if not self.write_steps:
            row.suffix = [span for span in row.suffix if span.kind is not Kind.STEP]
        if self.decoder.kind == "linear":
            row.suffix.pop()  # the answer is chosen, not written
            row.answer_class = self._class_of(example)
        all_gone = stage == self.last_stage or not self.write_steps
        steps = encoder.steps(example) if all_gone else encoder.steps(example)[:stage]
        cut = getattr(self, "_cut_short", False)
        taught = {t: self._step_of(t, len(steps), row.n_loops, cut) for t in range(1, row.n_loops + 1)}
        pairs = [(t, index) for t, index in taught.items() if index is not None]
        if self.step_weight:
            shown = (self._readouts(t, row.region_start, index, steps[index]) for t, index in pairs)
            row.token_targets = [readout for token_targets in shown for readout in token_targets]
        if self.aux.weight:
            texts, c = example.steps, self._block_length
            row.aux_targets = [
                AuxTarget(t - 1, t, self._block_of(i), c, encoder.aux_target(texts[i])) for t, i in pairs
            ]
        if self._follows_steps:
            written = [*encoder.steps(example), encoder.answer(example.answer)]
            row.teacher = Row([encoder.question(example.question)], [], written)
            ends = row.teacher.step_ends()
            at = None if self.hid.site == "mean" else row.region_start + sum(len(span.ids) for span in row.region) - 1
            row.hidden_targets = [HiddenTarget(t, at, ends[index]) for t, index in pairs]
        return row

    def _class_of(self, example: Example) -> int:
        if example.answer not in self.decoder.classes:
            raise InputError(
                f"example '{example.id}' has the answer '{example.answer}', which is none of the classes "
                f"{', '.join(self.decoder.classes)}; list it in decoder.classes"
            )
        return self.decoder.classes.index(example.answer)

    def _step_of(self, t: int, m: int, n_loops: int, cut: bool) -> int | None:
        """Return the 0-based step of iteration t, sigma(t) - 1, of m steps that have left the text (slr.md, 2).

        With ``cut`` fewer iterations were drawn than there are.
        """
        index = math.ceil(t * m / n_loops) if self.step_map == "stretch" else t
        if self.step_map == "one2one" and t == n_loops and not cut:
            index = max(index, m)  # the last iteration takes the last step when there are more steps than loops
        return index - 1 if 1 <= index <= m else None

    @property
    def _block_length(self) -> int:
        return self.slots_per_step or self.n_slots

    def _readouts(self, t: int, start: int, index: int, step: Span) -> list[TokenTarget]:
        """Return the first c tokens of a step, for iteration t to show in the block of slots, or in the new latent."""
        is_new = self.loop_scope == "append"
        first, c = (start + t - 1, 1) if is_new else (start + self._block_of(index), self._block_length)
        return [TokenTarget(t, first + j, token) for j, token in enumerate(step.ids[:c])]

    def _block_of(self, index: int) -> int:
        """Return the first of the slots that show the 0-based step."""
        return index % (self.n_slots // self._block_length) * self._block_length


_BARE: dict[str, Any] = {"residual": "none", "rescale": "none", "time": "none"}
_SEQUENTIAL: dict[str, Any] = {"loop_scope": "append", "max_loops": 6, "h0": "forward", "answer_from": "kv_last"}
Slr.presets = {
    "default": Slr(loop=StabilisedLoop(lora="per_iter")),
    "readme": Slr(loop_scope="all", loop=StabilisedLoop(**{**_BARE, "residual": "sum"})),
    "pause": Slr(max_loops=0, loop=StabilisedLoop(**_BARE)),
    "coconut": Slr(**_SEQUENTIAL, loop=StabilisedLoop(**_BARE)),
    "codi": Slr(**_SEQUENTIAL, loop=StabilisedLoop(**{**_BARE, "rescale": "project"})),
    "lotus": Slr(n_slots=150, max_loops=6, loop=StabilisedLoop(**{**_BARE, "residual": "sum"})),
    "spiral": Slr(n_slots=5, max_loops=5, loop=StabilisedLoop(**{**_BARE, "rescale": "adapter"})),
}
"""Named settings (slr.md, sections 3 and 9): a recipe's ``method: {name: slr, preset: readme, max_loops: 6}``."""
