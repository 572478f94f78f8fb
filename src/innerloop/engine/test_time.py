"""Several attempts at one question, of which one answer counts: what compute at test time can do without training.

    TestTimeCompute(samples=16)                        # self-consistency: the answer that most of 16 samples give
    TestTimeCompute(samples=16, pick="likelihood")     # best of n: the sample whose text is likeliest
    TestTimeCompute(starts=4, pick="convergence")      # breadth: of 4 starts of the loop, the one that came to rest
    TestTimeCompute(beams=4)                           # the likeliest text that a beam search finds

    predictions = evaluate(model, task, examples, attempts=TestTimeCompute(samples=16))

A question costs what all its attempts cost; the question, and the thought of methods that think in latents, is read
once for all samples and billed once (`innerloop.engine.prefill`). Sample j of question i depends on the seed, i and j
alone, so the first 4 of 16 are those that 4 samples give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from innerloop.checks.settings import Checked
from innerloop.checks.values import Weight
from innerloop.engine.options import EngineOptions, Many
from innerloop.errors import refuse
from innerloop.tasks import Task

if TYPE_CHECKING:  # slow to import
    from innerloop.engine.generation import Generation
    from innerloop.engine.latent_model import LatentModel

Pick = Literal["vote", "likelihood", "convergence"]
TEMPERATURE = 0.7
"""Of several samples, where none is given; as in Wang et al., Self-Consistency (arXiv 2203.11171)."""


@dataclass(frozen=True)
class TestTimeCompute(Checked):
    """How often a question is tried, and which answer counts.

    Args:
        samples: answers that are drawn.
        pick: which of several answers counts: the one with most votes, the one of the largest likelihood, or of several
            starts the one whose latents changed least in the end (convergence).
        temperature: at which they are drawn; by default 0.7 for several, and 0, the likeliest tokens, for one.
        beams: texts that a search for the likeliest one follows; 1 searches for nothing.
        starts: states that latents begin at: the method's own, and random ones; each has an answer.
    """

    __test__: ClassVar[bool] = False  # pytest takes classes of such names for tests

    samples: Many = 1
    pick: Pick = "vote"
    temperature: Weight | None = None
    beams: Many = 1
    starts: Many = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        EngineOptions(  # refuses what makes no sense
            temperature=self.drawn_at, samples=self.samples, starts=self.starts, beams=self.beams
        )
        refuse(
            (self.pick == "convergence" and self.starts == 1, "pick=convergence chooses among starts: give several"),
            (
                self.pick == "likelihood" and self.samples == self.starts == 1,
                "pick=likelihood chooses among samples or starts: give several",
            ),
        )

    @property
    def is_plain(self) -> bool:
        """Whether there is but one attempt, which writes the likeliest tokens."""
        return self.samples == self.starts == self.beams == 1 and not self.temperature

    def asked(self, seed: int) -> dict[str, Any]:
        """Return what is asked for, as result.json has it; nothing for one plain attempt."""
        if self.is_plain:
            return {}
        if self.beams > 1:
            return {"beams": self.beams}
        if self.starts > 1:
            drawn = {"temperature": self.drawn_at} if self.drawn_at else {}
            return {"starts": self.starts, "pick": self.pick, **drawn, "seed": seed}
        picked = {"pick": self.pick} if self.samples > 1 else {}
        return {"samples": self.samples, **picked, "temperature": self.drawn_at, "seed": seed}

    @property
    def told(self) -> str:
        """What is done in words, to stand behind a method's name."""
        if self.beams > 1:
            return f", {self.beams} beams"
        picked = {"vote": "vote", "likelihood": "likeliest", "convergence": "calmest"}[self.pick]
        warmth = f" at temperature {self.drawn_at}" if self.drawn_at else ""
        if max(self.samples, self.starts) > 1:
            return f", {picked} of {max(self.samples, self.starts)}{' starts' * (self.starts > 1)}{warmth}"
        return f", at temperature {self.temperature}" if self.temperature else ""

    @property
    def drawn_at(self) -> float:
        """The temperature of the draws."""
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURE if self.samples > 1 else 0.0

    def answer(
        self,
        model: LatentModel,
        questions: Sequence[str],
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
        **options: Any,
    ) -> list[list[Generation]]:
        """Return the attempts at each question; see `innerloop.engine.options` for the options.

        ``progress`` is called with the number of questions answered since the last call.
        """
        n, done = self.samples * self.starts, 0

        def tell(answered: int) -> None:
            nonlocal done
            before, done = done, done + answered
            if progress is not None and done // n > before // n:
                progress(done // n - before // n)

        if not self.is_plain:
            options |= {"samples": self.samples, "starts": self.starts, "beams": self.beams}
            options |= {"temperature": self.drawn_at, "seed": seed}
            options["likelihoods"] = self.pick == "likelihood"
        found = model.generate(questions, progress=tell, **options)
        return [found[i : i + n] for i in range(0, len(found), n)]

    def choose(self, task: Task, tried: Sequence[Generation]) -> tuple[Generation, list[str | None]]:
        """Return the attempt that counts, and the answer of each, None where a text holds none.

        Texts without an answer have no vote, and are the last to be picked. Answers are the same where the task takes
        one for the other. Of answers with as many votes the one that was first given counts, in its first text; of
        equally likely texts, or equally calm latents, the first.
        """
        answers = [None if one.error is not None else task.extract(one.text) for one in tried]
        places = [i for i, answer in enumerate(answers) if answer is not None] or list(range(len(tried)))
        if self.pick == "likelihood":
            return tried[max(places, key=lambda i: mean_log_likelihood(tried[i]))], answers
        if self.pick == "convergence":
            return tried[min(places, key=lambda i: _unrest(tried[i]))], answers
        votes: list[list[int]] = []
        for i in places:
            same = (v for v in votes if answers[i] == answers[v[0]] or _agree(task, answers[i], answers[v[0]]))
            if (group := next(same, None)) is None:
                votes.append([i])
            else:
                group.append(i)
        return tried[max(votes, key=len)[0]], answers


ONCE = TestTimeCompute()
"""One attempt, which writes the likeliest tokens."""


def mean_log_likelihood(generation: Generation) -> float:
    """Return the log-likelihood of a text for each of its tokens; longer texts are not less likely for their length."""
    if generation.log_likelihood is None:
        return -float("inf")
    return generation.log_likelihood / max(len(generation.ids), 1)


def _unrest(generation: Generation) -> float:
    return float("inf") if generation.change is None else generation.change


def _agree(task: Task, answer: str | None, other: str | None) -> bool:
    return answer is not None and other is not None and task.is_correct(answer, other)
