"""Training by reinforcement: group-relative policy optimisation (GRPO) of any policy that draws rollouts.

Before an optimizer step the model answers some questions, several times each (`innerloop.engine.rollouts`); answers are
rewarded, and those better than the mean of their question become likelier. What was fed is gone through again in one
pass. All else - checkpoints, resuming, validation by generation - is `LatentTrainer`'s.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from innerloop.checks.arguments import checked
from innerloop.engine.latent_model import LatentModel
from innerloop.engine.requests import check_length
from innerloop.engine.rollouts import Policy, Rollout
from innerloop.errors import InputError
from innerloop.phases.phase import phase
from innerloop.tasks import Task
from innerloop.text.examples import Example
from innerloop.train import checkpoints
from innerloop.train.grpo_arguments import GrpoArguments
from innerloop.train.policies import policy_for
from innerloop.train.policy_loss import Played, advantages, is_flat, policy_loss, spread_of, weights_of
from innerloop.train.rewards import Reward, RewardError, Rewards
from innerloop.train.trainer import LatentTrainer
from innerloop.train.training_set import given


class Repeated(Sampler):
    """An order of questions: as many as a rollout takes, so often as it is learned from, then the next.

    Args:
        n: questions there are; those that fill no rollout are left out of an epoch.
        n_asked: questions of a rollout, over all processes.
        n_times: optimizer steps of each.
        seed: of the order, which is another in every epoch.
    """

    def __init__(self, n: int, n_asked: int, n_times: int, seed: int):
        self.n, self.n_asked, self.n_times, self.seed, self.epoch = n, n_asked, n_times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw another order in another epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n // self.n_asked * self.n_asked * self.n_times

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.epoch + self.seed)
        order = torch.randperm(self.n, generator=generator).tolist()
        for first in range(0, self.n // self.n_asked * self.n_asked, self.n_asked):
            yield from order[first : first + self.n_asked] * self.n_times


@dataclass
class Micro:
    """Samples of one forward pass: as they are gone through again, and what they are worth."""

    batch: Any  # as the policy makes it
    played: Played


class GrpoTrainer(LatentTrainer):
    """Trains a `LatentModel` by reinforcement.

    Args:
        model: the model; what it is before training stays as the reference where ``beta`` is above 0.
        args: how to train.
        train_dataset: examples; their steps are not used.
        eval_dataset: examples to validate on by generation.
        task: extracts and checks answers.
        callbacks: transformers' TrainerCallbacks.
        reward_funcs: rewards in place of those that ``args`` names: names, or functions with the signature of TRL's.
        policy: draws the rollouts; None: the model writes them.
    """

    args: GrpoArguments

    @checked
    def __init__(
        self,
        model: LatentModel,
        args: GrpoArguments,
        train_dataset: Any,
        eval_dataset: Any = None,
        task: Task | None = None,
        callbacks: Sequence[Any] = (),
        reward_funcs: Sequence[str | Reward] | None = None,
        policy: Policy | None = None,
    ):
        own_length = task.max_new_tokens if task is not None else args.max_new_tokens
        if (longest := args.max_completion_length or own_length) is None:
            raise InputError("without a task nobody knows how long an answer is: set max_completion_length")
        self.longest = longest
        names = args.reward_names if reward_funcs is None else list(reward_funcs)
        self.rewards = Rewards(names, args.reward_weights, task, longest, model.encoder.wording.mark)
        self.policy = policy_for(model, args) if policy is None else policy
        if self.policy.depends and args.num_iterations > 1:
            raise InputError(
                f"what '{model.method.name}' is fed depends on its weights, so a rollout serves one step: "
                "set num_iterations to 1"
            )
        super().__init__(model, args, train_dataset, eval_dataset, task, callbacks)
        n_asked, n = self._n_asked, len(self.train_dataset)
        if n < n_asked:
            raise InputError(f"a step asks {n_asked} questions, but there are {n}: lower batch_size")
        self.reference = _frozen(model) if args.beta > 0 else None
        self.played: list[Micro] = []
        self._rolling, self._since = 0.0, time.perf_counter()

    # Questions

    @property
    def _n_asked(self) -> int:
        """Questions of a rollout, over all processes."""
        args = self.args
        return args.questions_per_batch * args.gradient_accumulation_steps * args.world_size

    def _training_examples(self, model: LatentModel, source: Any) -> tuple[list[Example], int]:
        """Return the examples that are asked, and how many are left out as they are too long."""
        examples, kept, limit = given(source, "train_dataset"), list[Example](), self.args.max_length
        with phase(f"laying out {len(examples)} training questions"):
            for example in examples:
                row = model.method.prompt(example.question, model.encoder, model.method.last_stage)
                if limit is None:
                    check_length(model, example.question, row)
                if limit is None or len(row) <= limit:
                    kept.append(example)
        if not kept:
            raise InputError(f"every training question is longer than max_length={limit}; raise it")
        return kept, len(examples) - len(kept)

    def _taught_states(self, model: LatentModel, examples: Sequence[Example]) -> None:
        """No teacher is followed."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        seed = self.args.data_seed or self.args.seed
        return Repeated(len(self.train_dataset), self._n_asked, self.args.num_iterations, seed)

    def steps_per_epoch(self) -> int:
        """Return the number of optimizer steps in an epoch."""
        return len(self.train_dataset) // self._n_asked * self.args.num_iterations

    def stage_at(self, step: int) -> int:
        """Return the last stage, in which questions are answered."""
        return self.model.method.last_stage

    # Rollouts

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Return the next step's micro-batches: of a new rollout, or of the last one where it serves several steps."""
        step = self.state.global_step
        if self._n_logged_steps is None:
            self._n_logged_steps, self._since = step, time.perf_counter()
        drawn = [examples for _, examples in zip(range(num_batches), epoch_iterator)]
        if step % self.args.num_iterations == 0:
            start = time.perf_counter()
            self.played = self._roll_out(drawn, step) if drawn else []
            self._rolling += time.perf_counter() - start
        return [{"micro": micro} for micro in self.played], None

    def _roll_out(self, drawn: Sequence[list[Example]], step: int) -> list[Micro]:
        """Let the model answer, and return the samples of each micro-batch with what they are worth."""
        args = self.args
        examples = [example for batch in drawn for example in batch]
        seed = int.from_bytes(blake2b(f"{args.seed}/{step}/0".encode(), digest_size=4).digest())
        questions, places = [example.question for example in examples], self._places([len(batch) for batch in drawn])
        rollouts = self.policy.roll_out(questions, args.num_generations, seed, self.longest, places)
        try:
            rewards_NF = self.rewards(examples, rollouts)
        except RewardError as error:
            kept = checkpoints.last_kept(args.output_dir)
            raise RewardError(f"training stopped at step {step}: {error}; {kept}") from error
        gains_N = self._advantages(self.rewards.total(rewards_NF).to(args.device))
        self._measure(rewards_NF, rollouts)
        sizes = [len(batch) * args.num_generations for batch in drawn]
        ends = list(itertools.accumulate(sizes))
        batches = [self.policy.batch(rollouts[end - n : end]).to(args.device) for n, end in zip(sizes, ends)]
        n_actions = float(self._over_processes(sum(sum(batch.n_targets) for batch in batches), args.device))
        return [self._micro(batch, gains, n_actions) for batch, gains in zip(batches, gains_N.split(sizes))]

    def _places(self, sizes: Sequence[int]) -> list[int]:
        """Return the places of this process's questions, so many in each micro-batch, among those of all processes."""
        args, n = self.args, self.args.questions_per_batch
        starts = [(i * args.world_size + args.process_index) * n for i in range(len(sizes))]
        return [start + k for start, size in zip(starts, sizes) for k in range(size)]

    def _advantages(self, rewards_N: Tensor) -> Tensor:
        """Return the advantages of this process's samples; what they are divided by may be of all processes."""
        args, n = self.args, len(rewards_N)
        if args.world_size == 1 or args.scale_rewards != "batch":
            return advantages(rewards_N, args.num_generations, args.scale_rewards)
        every_N = self.accelerator.gather(rewards_N)
        return advantages(every_N, args.num_generations, "batch")[args.process_index * n :][:n]

    def _micro(self, batch: Any, gains_N: Tensor, n_actions: float) -> Micro:
        """Return some samples as one forward pass goes through them; ``n_actions`` are those of the global batch."""
        lengths_N = torch.tensor(batch.n_targets, device=self.args.device)
        n_samples = self._n_asked * self.args.num_generations
        weights_U = weights_of(lengths_N, self.args.loss_type, n_samples, n_actions, self.longest)
        played = Played(gains_N.repeat_interleave(lengths_N), weights_U)
        if self.reference is not None:
            with torch.no_grad():
                played.reference_U = self.policy.replay(self.reference, batch, is_reference=True)
        return Micro(batch, played)

    def _measure(self, rewards_NF: Tensor, rollouts: Sequence[Rollout]) -> None:
        """Note what is told of a rollout."""
        n = self.args.num_generations
        groups = self.rewards.total(rewards_NF).view(-1, n)
        found = {
            "reward": groups.nanmean(),
            "reward_std": spread_of(groups).mean(),
            "frac_reward_zero_std": is_flat(groups).double().mean(),
            "completion_length": torch.tensor([float(len(one.ids)) for one in rollouts]).mean(),
            "clipped_completions": torch.tensor([float(not one.generation.ended) for one in rollouts]).mean(),
        }
        if any(one.n_loops is not None for one in rollouts):
            found["n_loops"] = torch.tensor([float(one.n_loops or 0) for one in rollouts]).mean()
        if len(self.rewards.names) > 1:
            found |= {f"reward/{name}": rewards_NF[:, i].nanmean() for i, name in enumerate(self.rewards.names)}
        self._note({name: value.nan_to_num(0.0) for name, value in found.items()})

    def _note(self, found: dict[str, Tensor], n_of: int = 1) -> None:
        """Add means, each of so many things, to those since the last log."""
        for name, value in found.items():
            total, n = self._measured.get(name, (torch.zeros_like(value), 0))
            self._measured[name] = total + value * n_of, n + n_of

    # Loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of one micro-batch, normalised over the global batch."""
        micro: Micro = inputs["micro"]
        log_probs_U = model(micro.batch, instead=self.policy.replay)
        loss, measured = policy_loss(log_probs_U, micro.played, self.args)
        if self.args.num_iterations > 1 and micro.played.old_U is None:
            micro.played = replace(micro.played, old_U=log_probs_U.detach())
        self._finite &= torch.isfinite(loss.detach())
        self._note(measured, len(log_probs_U))
        self._note(getattr(self.policy, "measured", {}))
        loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        return (loss, log_probs_U) if return_outputs else loss

    def _means(self) -> dict[str, float]:
        """Return what was measured since the last log, and which share of its seconds went into rollouts."""
        now = time.perf_counter()
        share, self._rolling, self._since = self._rolling / max(now - self._since, 1e-9), 0.0, now
        return {**super()._means(), "rollout_share": share}

    def _loss_of_text(self, logs: dict[str, float]) -> float | None:
        """There is none: the loss is of no text."""
        return None


def _frozen(model: LatentModel) -> LatentModel:
    """Return a copy of a model that learns no more; weights that are not trained, as below adapters, are held once."""
    held = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, held).requires_grad_(False).eval()
