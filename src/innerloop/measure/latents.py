"""What latents are fed, example by example: recorded, and replaced by something else while the model answers.

A latent meets the answer as an input: what it is *seen* through are the inputs of the passes whose keys and values the
answer attends to (or the final state, for a decoder of its own):

    slots, refeed     the final state z_T, which is read once more with the answer
    slots, kv_last    z_{T-1}, the input of the last iteration, whose cache the answer sees
    append            every latent as it is appended: z_0, .., z_{T-1}, and z_T where that is fed once more
    no iterations     the embeddings of the latents

Replacing these leaves nothing of the example's own latents; the pass itself still attends to the example's own
question, as it always does. Examples are told apart by the tokens of their prompts, whatever batch they run in. A block
of latents that is opened while answering is replaced as the first one is.

Shapes: `N` latents that are fed together, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.loop.hooks import LoopHook
from innerloop.loop.loop import Pass
from innerloop.measure.accuracy import Prediction
from innerloop.methods import Method
from innerloop.passes.region import join
from innerloop.passes.thought import Thought
from innerloop.text.batch import Batch
from innerloop.text.row import Row

Key = tuple[int, ...]
"""The tokens of a prompt, up to its first written one."""


@dataclass(frozen=True)
class Fed:
    """What the latents of one block were fed, or what they are to be fed.

    Attributes:
        fed: for each iteration its input z_{t-1} (N, D); None: left as it is.
        left: the final state z_T (N, D); None: left as it is.
    """

    fed: tuple[Tensor | None, ...]
    left: Tensor | None

    def at(self, loop: int) -> Tensor | None:
        """Return what a 1-based iteration is fed; more iterations than known are fed what the last one was."""
        return self.fed[min(loop, len(self.fed)) - 1] if self.fed else None


@dataclass(frozen=True)
class Record:
    """What the latents of some examples were fed, and the sizes of what the answer sees of them.

    Attributes:
        blocks: by prompt, block after block.
        keys: the prompts of the examples, in their order.
    """

    blocks: Mapping[Key, Sequence[Fed]]
    keys: Sequence[Key]

    @property
    def n_latents(self) -> int:
        """The number of latents that the answer sees of a first block; examples that open none have none."""
        first = next((blocks[0] for blocks in self.blocks.values() if blocks), None)
        return 0 if first is None else sum(map(len, states_of(first)))

    def map(self, change: Callable[[Key, int, Fed], Fed]) -> dict[Key, list[Fed]]:
        """Return a table of replacements, made from each prompt, block number and what was seen."""
        return {key: [change(key, i, block) for i, block in enumerate(blocks)] for key, blocks in self.blocks.items()}

    def seen(self, method: Method, stage: int) -> Record:
        """Return of everything that was fed what the answer sees."""
        return Record(self.map(lambda key, i, block: only_seen(method, stage, block)), self.keys)

    def spread(self) -> float:
        """Return how far latents are from their mean over examples (RMS), in units of their RMS; 0: all are alike."""
        mean = self.mean()
        blocks = [(own, mean[i]) for key in dict.fromkeys(self.keys) for i, own in enumerate(self.blocks[key])]
        states = [pair for own, middle in blocks for pair in zip(states_of(own), states_of(middle), strict=False)]
        if not states:
            return 0.0
        deviation, size = (
            torch.stack([of.square().mean() for of in some]).mean()
            for some in ([own - middle for own, middle in states], [own for own, _ in states])
        )
        return (deviation / size.clamp(min=1e-30)).sqrt().item()

    def mean(self) -> list[Fed]:
        """Return the mean over examples of each block, latent and iteration."""
        every = [self.blocks[key] for key in dict.fromkeys(self.keys)]
        means = []
        for i in range(max(map(len, every))):
            blocks = [blocks[i] for blocks in every if len(blocks) > i]
            n_fed = max(len(block.fed) for block in blocks)
            fed = [_mean([block.fed[t] for block in blocks if len(block.fed) > t]) for t in range(n_fed)]
            means.append(Fed(tuple(fed), _mean([block.left for block in blocks])))
        return means


def donors_of(keys: Sequence[Key], seed: int) -> dict[Key, Key]:
    """Draw for each prompt another one that lends its latents; no prompt lends to two."""
    different = list(dict.fromkeys(keys))
    if len(different) < 2:
        raise InputError("latents are exchanged between examples: give at least two different questions")
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(seed)).tolist()
    return {different[a]: different[b] for a, b in pairwise([*order, order[0]])}


def keys_of(rows: Sequence[Row]) -> list[Key]:
    """Return the keys of prompts."""
    return [tuple(i for span in [*row.prefix, *row.region] for i in span.ids) for row in rows]


def _mean(states: Sequence[Tensor | None]) -> Tensor | None:
    known = [state.float() for state in states if state is not None]
    return torch.stack(known).mean(0) if known else None


def states_of(block: Fed) -> list[Tensor]:
    """Return all states of a block, in fp32."""
    return [state.float() for state in [*block.fed, block.left] if state is not None]


def seen_in_words(method: Method, stage: int) -> str:
    """Say through what the answer sees the latents."""
    if not _loops(method, stage):
        return "the embeddings of the latents, which nothing refines"
    if method.plan.scope == "append":
        return "every latent as it is appended"
    if method.plan.answer_context == "kv_last":
        return "the state that the last iteration is fed"
    return "the final state, which is fed once more"


def _loops(method: Method, stage: int) -> bool:
    return method.n_loops(stage) > 0 or method.plan.first_state == "forward" or method.decoder.kind != "lm_head"


def unseen(model: LatentModel, stage: int | None = None) -> str | None:
    """Return why the latents of a method can be neither replaced nor probed; None where they can."""
    method, row = model.method, model.prompts(["?"], stage)[0]
    if method.family == "depth":
        return f"'{method.name}' thinks inside its tokens and has no latents that could be taken away."
    if not row.region and model.block() is None:
        return f"'{method.name}' has no latents between the question and the answer here."
    if method.plan.scope == "all":
        return f"'{method.name}' refines the question itself here: without it there is nothing to answer."
    if method.stop.rule != "none" and method.plan.answer_context == "kv_last" and method.plan.scope != "append":
        return (
            "the answer sees the last iteration, and which that is, is known only once it is over: "
            "set stop.rule to none to see what replacing its latents does."
        )
    return None


def only_seen(method: Method, stage: int, block: Fed) -> Fed:
    """Return of everything that was fed what the answer sees."""
    if method.plan.scope == "append":
        return block if method.plan.answer_context == "refeed" else Fed(block.fed, None)
    if method.plan.answer_context == "refeed" or not block.fed:
        return Fed((None,) * len(block.fed), block.left)
    return Fed((*[None] * (len(block.fed) - 1), block.fed[-1]), None)


class _Rows(LoopHook):
    """Follows which examples the rows of a loop are, and which of its positions are latents."""

    def __init__(self) -> None:
        self.keys: dict[int, Key] = {}  # by place; whoever takes over a place takes its entry

    def on_batch(self, batch: Batch, rows: Sequence[int]) -> None:
        """Learn the prompts of a batch."""
        end = batch.bounds[1]
        ids, mask = batch.ids_BS[:, :end].tolist(), batch.mask_BS[:, :end].tolist()
        self.keys |= {at: tuple(i for i, m in zip(*row) if m) for at, *row in zip(rows, ids, mask)}
        self.text_BN, self.order = batch.fixed_BN, list(rows)

    def on_start(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Learn which rows of the batch loop; a row none of whose positions is a latent does not."""
        context = getattr(f, "prefix", None) or getattr(f, "context", None)
        self.rows = self.order
        if context is not None:
            self.rows = list(range(len(state))) if context.rows is None else context.rows.tolist()
        mask, n = None if f is None else f.state_mask, state.shape[1]
        if f is None and self.text_BN is not None:
            mask = 1 - self.text_BN
        real = [[1] * n] * len(state) if mask is None else mask.tolist()
        self.places = [[column for column in range(n) if row[column]] for row in real]


class Recorder(_Rows):
    """Takes down what latents are fed.

    Attributes:
        blocks: by prompt, block after block; of prompts that occur twice those of the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: dict[Key, list[Fed]] = {}
        self.lists: dict[int, list[Fed]] = {}

    def on_batch(self, batch: Batch, rows: Sequence[int]) -> None:
        """Make room for each row of a batch."""
        super().on_batch(batch, rows)
        for place in rows:
            self.lists[place] = self.blocks[self.keys[place]] = []

    def on_start(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Make room for what iterations are fed."""
        super().on_start(f, state, n_loops)
        self.fed: list[list[Tensor]] = [[] for _ in self.rows]

    def on_input(self, state: Tensor, iteration: int, rows: Sequence[int]) -> Tensor:
        """Take down an iteration's input."""
        for row, own in zip(rows, state.detach().cpu()):
            self.fed[row].append(own[self.places[row]])
        return state

    def on_end(self, state: Tensor, ran: Sequence[int]) -> Tensor:
        """Take down the final state; what a row was fed after it had ended does not count."""
        for row, places, fed, own, n in zip(self.rows, self.places, self.fed, state.detach().cpu(), ran):
            if places:
                self.lists[row].append(Fed(tuple(fed[:n]), own[places]))
        return state


class Replacement(_Rows):
    """Feeds latents something else, or hides them or the question from the answer.

    What is hidden keeps its position, so that those after it keep theirs; only from <eot> on nobody can attend to it.

    Args:
        table: by prompt and block what to feed; blocks past the last are fed what the last one is.
        kept: how many latents the answer may attend to, from the first; None: all.
        hides_question: the answer may attend to the latents and to what follows them alone.
    """

    def __init__(
        self,
        table: Mapping[Key, Sequence[Fed]] | None = None,
        kept: int | None = None,
        hides_question: bool = False,
    ):
        super().__init__()
        self.table, self.kept, self.hides_question = table or {}, kept, hides_question
        self.n_blocks: dict[int, int] = {}

    def on_batch(self, batch: Batch, rows: Sequence[int]) -> None:
        """Learn the prompts of a batch; no row of it has had a block."""
        super().on_batch(batch, rows)
        self.n_blocks |= dict.fromkeys(rows, 0)

    def on_start(self, f: Pass | None, state: Tensor, n_loops: Sequence[int]) -> None:
        """Choose the block that each row is fed."""
        super().on_start(f, state, n_loops)
        self.blocks: list[Fed | None] = []
        for row, places in zip(self.rows, self.places):
            blocks = self.table.get(self.keys[row], ())
            self.blocks.append(blocks[min(self.n_blocks[row], len(blocks) - 1)] if blocks and places else None)
            self.n_blocks[row] += bool(places)

    def on_input(self, state: Tensor, iteration: int, rows: Sequence[int]) -> Tensor:
        """Return what the iteration is fed."""
        blocks = [self.blocks[row] for row in rows]
        return self._put(state, [None if block is None else block.at(iteration) for block in blocks], rows)

    def on_end(self, state: Tensor, ran: Sequence[int]) -> Tensor:
        """Return what is left."""
        return self._put(state, [None if block is None else block.left for block in self.blocks], range(len(state)))

    def _put(self, state: Tensor, values: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor:
        if all(value is None for value in values):
            return state
        new = torch.zeros(state.shape, dtype=torch.float32)
        chosen = torch.zeros(*state.shape[:2], 1, dtype=torch.bool)
        for i, (row, value) in enumerate(zip(rows, values)):
            if value is not None:
                new[i, self.places[row]] = value.float()
                chosen[i, self.places[row]] = True
        return torch.where(chosen.to(state.device), new.to(state.device, state.dtype), state)

    def on_answer(self, thought: Thought, batch: Batch) -> Thought:
        """Hide what is to be hidden; what was pending is read by itself, as nobody may see it later."""
        if self.kept is None and not self.hides_question:
            return thought
        context, (first, end) = thought.context, batch.bounds
        if thought.pending:
            context.read(*join(thought.pending))
        thought.pending, thought.first_column = [], end
        ones = context.next_position_B.new_ones(len(batch), context.length)
        mask = ones if context.mask_BP is None else context.mask_BP.clone()
        if self.hides_question:
            mask[:, :first] = 0
        if self.kept is not None:
            start = first + max(context.length - end, 0)  # a token for the time comes before the latents
            order = mask[:, start:].cumsum(1)
            mask[:, start:] *= order <= self.kept
            if self.kept == 0:
                mask[:, first:] = 0
        context.mask_BP = mask
        return thought


def answer_of(prediction: Prediction) -> str:
    """Return the answer of a prediction, or where it gives none, its text."""
    return f"text {prediction.text}" if prediction.predicted is None else f"answer {prediction.predicted}"


def same_answer(a: Prediction, b: Prediction) -> bool:
    """Say whether two predictions give the same answer, or where neither gives one, the same text."""
    return answer_of(a) == answer_of(b)
