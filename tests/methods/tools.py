"""What the tests of the methods share: examples of many shapes, models that share weights, and gauges."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from innerloop import Example, LatentModel, Slr
from innerloop.layout import Row
from innerloop.loop import InnerLoop, LoopResult
from innerloop.methods import Method
from tests.methods.reference import Reference
from tests.models import tiny_model

# Questions and step counts of all lengths: 3, 0, 1, 4, 2 and 0 steps. The words are those of the chain task.
MIXED = (
    Example("3 ; + 4 ; * 2 ; - 1", ("3 + 4 = 2", "2 * 2 = 4", "4 - 1 = 3"), "3"),
    Example("2", (), "2"),
    Example("4 ; - 3", ("4 - 3 = 1",), "1"),
    Example("1 ; + 1 ; + 2 ; - 4 ; * 3", ("1 + 1 = 2", "2 + 2 = 4", "4 - 4 = 0", "0 * 3 = 0"), "0"),
    Example("0 ; + 3 ; * 4", ("0 + 3", "3 * 4 = 2 = 2"), "2"),
    Example("1 ; + 0 ; * 1", (), "1"),
)
QUESTIONS = [example.question for example in MIXED]
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


class FunctionPass:
    """A function (x_t, t) -> u_t of the loop as a pass; rows that end leave it, or stand still in it."""

    def __init__(self, f: Callable[[Tensor, int], Tensor], compacts: bool = True):
        self.f, self.compacts, self.state_mask = f, compacts, None
        self.kept: list[list[int]] = []
        self.actives: list[Tensor | None] = []

    def __call__(self, inputs: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        self.actives.append(active_B)
        return self.f(inputs, loop)[:, n_extra:]

    def keep_rows(self, rows: list[int]) -> None:
        self.kept.append(rows)

    def probe(self) -> "FunctionPass":
        return FunctionPass(self.f, self.compacts)


def iterate(
    loop: InnerLoop,
    f: Callable[[Tensor, int], Tensor],
    state: Tensor,
    n_loops: int | list[int],
    compacts: bool = True,
    **options,
) -> LoopResult:
    """Run a loop on a function; all rows alike, or each its own number of iterations."""
    n_loops = [n_loops] * len(state) if isinstance(n_loops, int) else n_loops
    return loop(FunctionPass(f, compacts), state, n_loops, **options)


def sharp_model(method: Method, arch: str = "gpt2", seed: int = 0, **changes) -> LatentModel:
    """Make a model in double precision that knows every marker, with a timestep table that is not zero."""
    return under(tiny_model(Slr(), arch, seed, **changes).double(), method)


def under(model: LatentModel, method: Method) -> LatentModel:
    """Put another method on the same weights."""
    twin = LatentModel(model.backbone, model.tokenizer, method).to(model.backbone.embed(torch.tensor([0])).dtype)
    if twin.loop.time is not None:
        nn.init.normal_(twin.loop.time.table, std=0.3, generator=torch.Generator().manual_seed(0))
    return twin.eval()


def rows_at(model: LatentModel, examples: Sequence[Example], stages: Sequence[int]) -> list[Row]:
    """Lay out each example at a stage of its own, as stage mixing does."""
    return [model.rows([example], stage)[0] for example, stage in zip(examples, stages)]


def logits_of(model: LatentModel, rows: Sequence[Row]) -> list[Tensor]:
    """Return the logits (U, V) of laid-out rows, run as one batch."""
    batch = model.batch(rows)
    with torch.no_grad():
        states, _ = model._states(batch)
        return list(model.backbone.head(states).split(batch.n_targets))


def gradients(model: LatentModel, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a loss by every weight, zeros where it has none, and leave the weights without any."""
    model.zero_grad()
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    """Compare gradients by all weights; losses are taken in fp32, hence the tolerance."""
    assert left.keys() == right.keys()
    for name in left:
        scale = max(right[name].abs().max().item(), 1e-3)
        assert (left[name] - right[name]).abs().max().item() <= tolerance * scale, name


def assert_close(left: Tensor, right: Tensor, tolerance: float = 1e-10) -> None:
    assert left.shape == right.shape
    assert (left - right).abs().max().item() <= tolerance


@contextmanager
def passes(model: LatentModel) -> Iterator[list[Tensor]]:
    """Record the input embeddings (B, L, D) of every call of the decoder."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])

    handle = model.backbone.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def states(model: LatentModel) -> Iterator[list[Tensor]]:
    """Record the final-norm states (B, L, D) that every call of the decoder returns; their gradients are kept."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    handle = model.backbone.decoder.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def change_embedding(model: LatentModel, token: str) -> None:
    """Give a token another embedding (not a shifted or scaled one, which a norm might undo)."""
    table = model.backbone.lm.get_input_embeddings().weight
    with torch.no_grad():
        table[model.tokenizer.convert_tokens_to_ids(token)] += torch.linspace(-1, 1, table.shape[1]).sin().flip(0)


def lean_towards_end(model: LatentModel, by: float) -> LatentModel:
    """Raise the end-of-sequence logit, so that rows end, each at a time of its own."""
    eos = model.tokenizer.eos_token_id

    def raise_eos(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
        return logits + by * torch.nn.functional.one_hot(torch.tensor(eos), logits.shape[-1]).to(logits)

    model.backbone.lm.get_output_embeddings().register_forward_hook(raise_eos)
    return model


def learn(model: LatentModel, examples: Sequence[Example], n_steps: int = 200, learning_rate: float = 5e-3) -> float:
    """Train on a handful of examples, all of them at every step; return the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    loss = torch.tensor(torch.inf)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = model.loss(examples).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


def assert_learns_by_heart(method: Method, examples: Sequence[Example], arch: str = "gpt2") -> None:
    """Eight examples, 200 steps: cross-entropy below 0.05, and all eight answered by greedy decoding (cot.md, I8)."""
    model = tiny_model(method, arch, num_hidden_layers=2, initializer_range=0.1)
    assert learn(model, examples) < 0.05
    generations = model.generate([example.question for example in examples], max_new_tokens=40)
    assert [generation.answer for generation in generations] == [example.answer for example in examples]


def assert_writes_like_the_reference(model: LatentModel, passes_before: int, max_new_tokens: int = 20) -> None:
    """Greedy decoding, cached and batched == one row at a time == the slow reference, token for token.

    ``passes_before`` is the card's number of passes besides one for each written token.
    """
    slow = Reference(lean_towards_end(model, 1.0))
    expected = [slow.write(question, max_new_tokens) for question in QUESTIONS]
    assert len({len(ids) for ids in expected}) > 1  # the rows end at different times
    together = model.generate(QUESTIONS, max_new_tokens=max_new_tokens)
    alone = [model.generate([question], max_new_tokens=max_new_tokens)[0] for question in QUESTIONS]
    for one, other, ids in zip(together, alone, expected):
        assert one.text == other.text == model.tokenizer.decode(ids, skip_special_tokens=True)
        assert one.ended == other.ended == (model.tokenizer.eos_token_id in ids)
        assert one.cost.passes == other.cost.passes == passes_before + len(ids)
        assert one.cost.positions == other.cost.positions


def with_token(row: Row, position: int, token: int) -> Row:
    """Return a row with another token at a position, everything else alike."""
    row, at = copy.deepcopy(row), 0
    for segment in (row.prefix, row.region, row.suffix):
        for i, piece in enumerate(segment):
            if at <= position < at + len(piece.ids):
                ids = list(piece.ids)
                ids[position - at] = token
                segment[i] = dataclasses.replace(piece, ids=tuple(ids))
            at += len(piece.ids)
    return row


def assert_causal(model: LatentModel, example: Example) -> None:
    """A token changes no logits before it, and those after it (cot.md, I6)."""
    (row,) = model.rows([example])
    logits = logits_of(model, [row])[0]
    first = len(row) - len(logits)  # position of the first written token
    for written in range(len(logits) - 1):
        changed = logits_of(model, [with_token(row, first + written, row.ids()[first + written] + 1)])[0]
        assert torch.equal(changed[: written + 1], logits[: written + 1])
        assert ((changed - logits).abs().amax(1)[written + 1 :] > 1e-6).all()
