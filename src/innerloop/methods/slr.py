"""Stable Latent Reasoning: a latent state is refined T times by the same model, held stable by a loop residual.

Scopes `slots` (N latents refined together) and `append` (one latent per iteration); see slr.md, sections 2 and 3.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from innerloop.curriculum import Curriculum
from innerloop.errors import InputError
from innerloop.examples import Example
from innerloop.layout import IGNORE, Piece, Row, Speller
from innerloop.loop import LoopSettings
from innerloop.methods.method import AnswerContext, FirstState, LatentMethod, Scope
from innerloop.stabilize import RescaleKind, ResidualKind, TimeKind


@dataclass(frozen=True)
class Slr(LoopSettings, Curriculum, LatentMethod):
    """``[Q][<bot>] | [<lat> x N] | [<eot>][A][eos]``; the N latents are refined T times.

    Args:
        loop_scope: slots: N latents refined together; append: every iteration adds one latent.
        n_slots: N, for scope slots.
        max_loops: T.
        h0: h_0 is the <lat> embeddings (embed), or what one pass makes of them (forward; append: the state of <bot>).
        answer_from: the answer sees h_T fed once more (refeed), or the cache of the last iteration (kv_last).
        step_weight: lambda_step; iteration t must show step sigma(t) through the head. Scope slots only.
        slots_per_step: c; step i is shown at the i-th block of c slots, round and round, cut to c tokens; 0: all slots.
        step_map: sigma(t) = ceil(t m / T) (stretch), or t while there are steps (one2one).
        loops_per_stage: during a curriculum, stage s allows min(T, loops_per_stage * s) iterations; 0: always T.
    """

    name: ClassVar[str] = "slr"
    paper: ClassVar[str] = "Stable Latent Reasoning (proposal, 2024)"
    summary: ClassVar[str] = "latents refined in a loop, held stable by timestep embedding, rescaling and residual"

    loop_scope: Literal["slots", "append"] = "slots"
    n_slots: int = 8
    max_loops: int = 4
    h0: Literal["embed", "forward"] = "embed"
    answer_from: Literal["refeed", "kv_last"] = "refeed"
    residual: ResidualKind = "A"
    rescale: RescaleKind = "rms"
    time: TimeKind = "lookup"
    step_weight: float = 0.0
    slots_per_step: int = 0
    step_map: Literal["stretch", "one2one"] = "stretch"
    loops_per_stage: int = 0

    def __post_init__(self) -> None:
        LoopSettings.__post_init__(self)
        Curriculum.__post_init__(self)
        if self.max_loops < 0 or self.n_slots < 1 or self.loops_per_stage < 0:
            raise InputError("slr needs max_loops >= 0, n_slots >= 1 and loops_per_stage >= 0")
        if self.answer_from == "kv_last" and self.max_loops == 0:
            raise InputError("answer_from=kv_last reads the cache of the last iteration: set max_loops to at least 1")
        if self.slots_per_step < 0 or (self.slots_per_step and self.n_slots % self.slots_per_step):
            raise InputError(f"slots_per_step is {self.slots_per_step}, but must divide n_slots={self.n_slots}")
        if self.loops_per_stage and not self.max_stage:
            raise InputError("loops_per_stage ramps the iterations over a curriculum: set max_stage to at least 1")
        if self.step_weight and (self.loop_scope == "append" or self.max_loops == 0):
            raise InputError(
                "step_weight needs slots to read at each iteration: set loop_scope=slots and max_loops >= 1"
            )

    @property
    def needs_steps(self) -> bool:
        """Where iterations must show steps, or steps leave one by one."""
        return self.step_weight > 0 or self.max_stage > 0

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
    def term_weights(self) -> dict[str, float]:
        """L = L_ans + lambda_step L_step."""
        return {"answer": 1.0, "step": self.step_weight}

    def n_latents(self, stage: int) -> int:
        """Return N; in append one position per iteration, and one for h_T if it is fed once more."""
        if self.loop_scope == "slots":
            return self.n_slots
        return self.n_loops(stage) + (self.answer_from == "refeed")

    def n_loops(self, stage: int) -> int:
        """Return T_s = min(T, r s), or T without a ramp."""
        if stage == self.last_stage or not self.loops_per_stage:
            return self.max_loops
        return min(self.max_loops, self.loops_per_stage * stage)

    def lay_out(self, example: Example, spell: Speller, stage: int) -> Row:
        """Lay out, with the steps that each iteration must show."""
        row = super().lay_out(example, spell, stage)
        if self.step_weight:
            steps = spell.steps(example) if stage == self.last_stage else spell.steps(example)[:stage]
            row.readouts = self._readouts(steps, self.n_loops(stage))
        return row

    def _readouts(self, steps: list[Piece], n_loops: int) -> list[list[int]]:
        """Return for each iteration t the tokens that step sigma(t) must show, at the slots of its block.

        ``steps`` are those that have left the text; see slr.md, sections 2 and 4.
        """
        m, c = len(steps), self.slots_per_step or self.n_slots
        targets = []
        for t in range(1, n_loops + 1):
            index = math.ceil(t * m / n_loops) if self.step_map == "stretch" else t
            if self.step_map == "one2one" and t == n_loops:
                index = max(index, m)  # the last iteration takes the last step when there are more steps than loops
            row = [IGNORE] * self.n_slots
            if 1 <= index <= m:
                start = (index - 1) % (self.n_slots // c) * c
                ids = steps[index - 1].ids[:c]
                row[start : start + len(ids)] = ids
            targets.append(row)
        return targets
