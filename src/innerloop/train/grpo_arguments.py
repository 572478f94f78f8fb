"""The settings of group-relative policy optimisation, named as in TRL's GRPOConfig where they mean the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from innerloop.checks.values import MOST, Bounds, Count, Positive, Share, Weight
from innerloop.errors import refuse
from innerloop.train.training_arguments import LatentTrainingArguments

Several = Annotated[int, Bounds(2, MOST)]
Below1 = Annotated[float, Bounds(0, 1, above=True)]


@dataclass
class GrpoArguments(LatentTrainingArguments):
    """Training by reinforcement: of several samples to a question, those better than their mean become likelier.

    Args:
        algorithm: grpo.
        num_generations: G, samples of each question; batch_size counts samples, so it is a multiple.
        max_completion_length: the most tokens of a sample; None: as the task says.
        temperature: at which samples are drawn, and scored.
        reward_funcs: what samples are rewarded for: answer (it is right), format (exactly one answer's mark),
            strict_answer (both at once), fast_answer (it is right, and its canvas took few passes), length (minus its
            share of max_completion_length), loops (minus the iterations of a learned stop, or the passes over a
            canvas), or one's own my_module.my_reward.
        reward_weights: what each counts; None: 1.
        scale_rewards: divide what is above a group's mean by the spread of the group, of the batch, or not (none).
        loss_type: a mean over samples of means over tokens (grpo), over all tokens of the step (dapo), or over as many
            as there may be (dr_grpo).
        beta: what the divergence from the model before training (k3) counts in the loss; 0: no such model is kept.
        num_iterations: optimizer steps for each rollout; the model is saved after the last of them.
        p_mask_prompt: of canvases whose likelihood is estimated in one pass, the share of the question that is masked
            in it; None: 0.15.
        epsilon: how far a token's probability may move for a rollout before it is clipped, as a share.
        epsilon_high: the same upwards; None: epsilon.
    """

    learning_rate: Weight = field(default=1e-6)
    weight_decay: Weight = field(default=0.0)  # weights whose rewards say nothing stay as they are

    algorithm: Literal["grpo"] = field(default="grpo")  # type: ignore[assignment]
    num_generations: Several = field(default=8)
    max_completion_length: Count | None = field(default=None)
    temperature: Positive = field(default=1.0)
    reward_funcs: str | list[str] = field(default="answer")
    reward_weights: list[float] | None = field(default=None)
    scale_rewards: Literal["group", "batch", "none"] = field(default="group")
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = field(default="dapo")
    beta: Weight = field(default=0.0)
    num_iterations: Count = field(default=1)
    p_mask_prompt: Share | None = field(default=None)
    epsilon: Below1 = field(default=0.2)
    epsilon_high: Positive | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        n, cuts = self.num_iterations, {"max_steps": self.max_steps, "save_steps": self.save_steps}
        refuse(
            (
                self.batch_size % self.num_generations > 0,
                f"batch_size is {self.batch_size}, but counts samples, num_generations={self.num_generations} of each "
                "question: give a multiple",
            ),
            (self.loss_norm == "micro", "loss_norm has no effect with algorithm=grpo: loss_type says what is averaged"),
            *(
                (getattr(self, name) is not None, f"{name} has no effect with algorithm=grpo: leave it out")
                for name in ("teacher_cache", "unfreeze_after")
            ),
            *(
                (
                    not (name == "save_steps" and self.save_strategy != "steps") and value > 0 and value % n > 0,
                    f"{name} is {value}, but a rollout is learned from in num_iterations={n} steps: give a multiple",
                )
                for name, value in cuts.items()
            ),
        )

    @property
    def questions_per_batch(self) -> int:
        """Questions whose samples are one forward pass."""
        return max(self.batch_size // self.num_generations, 1)

    @property
    def steps_together(self) -> int:
        """Optimizer steps of a rollout, which no checkpoint holds."""
        return self.num_iterations

    @property
    def reward_names(self) -> list[str]:
        """What samples are rewarded for."""
        return [self.reward_funcs] if isinstance(self.reward_funcs, str) else list(self.reward_funcs)
