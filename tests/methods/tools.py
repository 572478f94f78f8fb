"""What the tests of the methods share: examples of many shapes, models that share weights, and gauges."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from innerloop import Example, LatentModel, Slr
from innerloop.halting.evidence import RowInfo
from innerloop.loop.loop import InnerLoop, LoopResult
from innerloop.loop.trace import Trace
from innerloop.methods import Method
from innerloop.passes.thought import Thought
from innerloop.text.row import IGNORE, Row
from tests.close import ROUNDED, assert_close
from tests.fields import change
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

# Settings of SLR: nothing but the loop, and everything at once.
SCOPES = ("slots", "all", "last", "append")
REGIONS = ("slots", "all", "last")
PLAIN = Slr(n_slots=3, max_loops=3, loop={"residual": "none", "rescale": "none", "time": "none"})
FULL = Slr(n_slots=3, max_loops=3,
           loop={"residual": "B", "alpha": 0.6, "time": "sinusoidal", "lora": "per_iter", "lora_rank": 2})  # fmt: skip
SMALL = Slr(n_slots=4, max_loops=3)
RAMP = Slr(n_slots=3, max_loops=4, curriculum={"max_stage": 2}, loops_per_stage=2)  # 0, 2, 4 and 4 loops in its stages
RAMP_STAGES = [3, 0, 1, 2, 1, 0]
SHOWN = {"step_weight": 0.5, "slots_per_step": 2}
WITH_LORA = {"loop.lora": "per_iter", "loop.lora_rank": 2}

by_arch = pytest.mark.parametrize("arch", ["gpt2", "llama"])
by_scope = pytest.mark.parametrize("scope", SCOPES)
by_answer = pytest.mark.parametrize("answer_from", ["refeed", "kv_last"])
by_region = pytest.mark.parametrize("scope", REGIONS)


def choices(**fields):
    """Every possible combination of settings, named by its values."""
    combinations = [dict(zip(fields, values)) for values in itertools.product(*fields.values())]
    combinations = [one for one in combinations if (one.get("answer_from"), one.get("max_loops")) != ("kv_last", 0)]
    return pytest.mark.parametrize("settings", combinations, ids=lambda one: "-".join(map(str, one.values())))


def labels_by_loop(row: Row) -> list[list[int]]:
    """Return what each latent of the region must show in each iteration, IGNORE for nothing."""
    n_latents = sum(len(span.ids) for span in row.region)
    labels = [[IGNORE] * n_latents for _ in range(row.n_loops)]
    for readout in row.token_targets:
        labels[readout.iteration - 1][readout.at - row.region_start] = readout.token
    return labels


Function = Callable[[Tensor, int], Tensor]


class FunctionPass:
    """A function (x_t, t) -> u_t of the loop as a pass; rows that end leave it, or stand still in it."""

    def __init__(self, f: Function, compacts: bool = True):
        self.f, self.compacts, self.state_mask, self.before = f, compacts, None, None
        self.row_info: RowInfo | None = None
        self.kept: list[list[int]] = []
        self.actives: list[Tensor | None] = []

    def __call__(self, inputs: Tensor, loop: int, active_B: Tensor | None = None, n_extra: int = 0) -> Tensor:
        self.actives.append(active_B)
        return self.f(inputs, loop)[:, n_extra:]

    def keep_rows(self, rows: list[int]) -> None:
        self.kept.append(rows)
        self.row_info = None if self.row_info is None else self.row_info.keep_rows(torch.tensor(rows))

    def count(self, flops_B: Tensor) -> None:
        pass

    def probe(self) -> "FunctionPass":
        return FunctionPass(self.f, self.compacts)


def iterate(
    loop: InnerLoop, f: Function, state: Tensor, n_loops: int | list[int], compacts: bool = True, **options
) -> LoopResult:
    """Run a loop on a function; all rows alike, or each its own number of iterations."""
    n_loops = [n_loops] * len(state) if isinstance(n_loops, int) else n_loops
    return loop(FunctionPass(f, compacts), state, n_loops, **options)


def sharp_model(method: Method, arch: str = "gpt2", seed: int = 0, **changes) -> LatentModel:
    """Make a model in double precision that knows every marker, with a timestep table that is not zero."""
    return under(tiny_model(Slr(), arch, seed, **changes).double(), method)


def exact(model: LatentModel) -> LatentModel:
    """Let a model compute in double precision alone; most norms take their squares in fp32, whatever the weights."""

    def normed(norm: nn.Module, states: Tensor) -> Tensor:
        gemma = "Gemma" in type(norm).__name__
        weight, eps = (1 + norm.weight, norm.eps) if gemma else (norm.weight, norm.variance_epsilon)
        return nn.functional.rms_norm(states, states.shape[-1:], weight, eps)

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(normed, module)
    return model


def under(model: LatentModel, method: Method) -> LatentModel:
    """Put another method on the same weights."""
    twin = LatentModel(model.backbone, model.tokenizer, method).to(model.backbone.embed(torch.tensor([0])).dtype)
    if twin.loop.time is not None:
        nn.init.normal_(twin.loop.time.table, std=0.3, generator=torch.Generator().manual_seed(0))
    return twin.eval()


_BASES: dict[str, tuple[LatentModel, dict[str, Tensor]]] = {}
_LEANING: list[tuple[nn.Module, RemovableHandle]] = []  # heads, and what raises their logits


def base(arch: str) -> LatentModel:
    """Return a model of an architecture whose weights many tests share; it knows every marker."""
    if arch not in _BASES:
        model = tiny_model(Slr(), arch, num_hidden_layers=2).double()
        _BASES[arch] = model, {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    return _BASES[arch][0]


def restore_bases() -> None:
    """Give the shared models the weights back that they began with, and take away what a test has hung on them."""
    for model, weights in _BASES.values():
        model.backbone.double().load_state_dict(weights)
        for head, handle in _LEANING:
            if head is model.backbone.lm.get_output_embeddings():
                handle.remove()
    _LEANING.clear()


def on(arch: str, method: Method, stirred: bool = True) -> LatentModel:
    """Put a method on the weights of an architecture; all that begins at zero is moved, unless told not to."""
    base(arch).backbone.requires_grad_(True)  # whatever another method has frozen
    model = LatentModel(base(arch).backbone, base(arch).tokenizer, method).double()
    if stirred:
        stir(model)
    return model.eval()


@torch.no_grad()
def stir(model: LatentModel, by: float = 0.2) -> None:
    """Move all that a method adds to a backbone, so that nothing is at a start where it does nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for part in model.trained_modules().values() for p in part.parameters()):
        parameter += by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def same_weights(model: LatentModel, method: Method) -> LatentModel:
    """Put another method on the weights of a model, those of its loop and decoder included where they fit."""
    twin = LatentModel(model.backbone, model.tokenizer, method).double().eval()
    for name, part in twin.trained_modules().items():
        if name in model.trained_modules():
            part.load_state_dict(model.trained_modules()[name].state_dict(), strict=False)
    return twin


def rows_at(model: LatentModel, examples: Sequence[Example], stages: Sequence[int]) -> list[Row]:
    """Lay out each example at a stage of its own, as stage mixing does."""
    return [model.rows([example], stage)[0] for example, stage in zip(examples, stages)]


def logits_of(model: LatentModel, rows: Sequence[Row]) -> list[Tensor]:
    """Return the logits (U, V) of laid-out rows, run as one batch."""
    batch = model.batch(rows)
    with torch.no_grad():
        return list(model.written_logits(batch, model.think(batch)).split(batch.n_targets))


def thought_of(model: LatentModel, examples: Sequence[Example], trace: Trace | None = None) -> Thought:
    """Think about examples, as one batch."""
    with torch.no_grad():
        return model.think(model.batch(model.rows(examples)), trace)


def gradients(model: LatentModel, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of a loss by every weight, zeros where it has none, and leave the weights without any."""
    model.zero_grad()
    loss.backward()
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return grads


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = ROUNDED) -> None:
    """Compare gradients by all weights; losses are taken in fp32, hence the tolerance."""
    assert left.keys() == right.keys()
    for name in left:
        scale = max(right[name].abs().max().item(), 1e-3)
        assert (left[name] - right[name]).abs().max().item() <= tolerance * scale, name


def assert_same_answers(left: LatentModel, right: LatentModel, tolerance: float | None = None) -> None:
    for a, b in zip(left.answer_logits(MIXED), right.answer_logits(MIXED)):
        assert_close(a, b, tolerance)


def differs(left: LatentModel, right: LatentModel) -> bool:
    pairs = zip(left.answer_logits(MIXED), right.answer_logits(MIXED))
    return max((a - b).abs().max().item() for a, b in pairs) > 1e-4


def halting(arch: str, method: Method) -> LatentModel:
    """Put a stop rule on a model, with a threshold at which the rows of `MIXED` stop at as many times as possible."""
    model, limit = on(arch, change(method, stop={"threshold": torch.inf})), method.n_loops(method.last_stage)
    traces = [Trace() for _ in MIXED]
    for example, trace in zip(MIXED, traces):
        thought_of(model, [example], trace)
    scores_TB = torch.tensor([[entry.score.item() for entry in trace.iterations] for trace in traces]).T
    known = scores_TB[scores_TB.isfinite()].unique()
    wide = [(a + b).item() / 2 for a, b in itertools.pairwise(known) if b - a > 1e-4]

    def stops(threshold: float) -> list[int]:
        column = [torch.nonzero(scores >= threshold)[:, 0].tolist() for scores in scores_TB.T]
        return [at[0] + 1 if at else limit for at in column]

    threshold = max(wide, key=lambda kappa: len(set(stops(kappa))))
    assert len(set(stops(threshold))) > 1
    return same_weights(model, change(method, stop={"threshold": threshold}))


def assert_rows_do_as_alone(model: LatentModel) -> None:
    """The iterations, states, scores and answers of a batch in which rows end at different times are single rows'."""
    trace = Trace()
    together = thought_of(model, MIXED, trace).loop
    assert len(set(together.n_loops)) > 1
    for row, (example, logits) in enumerate(zip(MIXED, model.answer_logits(MIXED))):
        alone_trace = Trace()
        alone = thought_of(model, [example], alone_trace).loop
        n = alone.state.shape[1]  # in scope all, shorter rows are padded on the right
        assert alone.n_loops[0] == together.n_loops[row]
        assert_close(together.state[row, :n], alone.state[0], ROUNDED)
        assert_close(logits, model.answer_logits([example])[0], ROUNDED)
        ours, single = trace.row(row).iterations, alone_trace.iterations
        assert [entry.loop for entry in ours] == [entry.loop for entry in single]
        for one, other in zip(ours, single):
            assert_close(one.delta, other.delta)
            assert_close(one.score, other.score)  # None where there is no score


@contextmanager
def passes(model: LatentModel) -> Iterator[list[Tensor]]:
    """Record the input embeddings (B, L, D) of every call of the decoder."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(kwargs["inputs_embeds"])

    with model.backbone.decoder.register_forward_pre_hook(note, with_kwargs=True):
        yield seen


@contextmanager
def states(model: LatentModel) -> Iterator[list[Tensor]]:
    """Record the final-norm states (B, L, D) that every call of the decoder returns; their gradients are kept."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple, output) -> None:
        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    with model.backbone.decoder.register_forward_hook(note):
        yield seen


def change_embedding(model: LatentModel, token: str) -> None:
    """Give a token another embedding (not a shifted or scaled one, which a norm might undo)."""
    table = model.backbone.lm.get_input_embeddings().weight
    with torch.no_grad():
        table[model.tokenizer.convert_tokens_to_ids(token)] += torch.linspace(-1, 1, table.shape[1]).sin().flip(0)


def lean_towards_end(model: LatentModel, by: float) -> LatentModel:
    """Raise the end-of-sequence logit, so that rows end, each at a time of its own."""
    return lean_towards(model, {model.tokenizer.eos_token: by})


def lean_towards(model: LatentModel, by: dict[str, float]) -> LatentModel:
    """Raise the logits of tokens, such as ``{"<bol>": 2.0, "###": 1.0}``."""
    head = model.backbone.lm.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype)
    for token, value in by.items():
        bias[model.tokenizer.encode(token, add_special_tokens=False)[0]] = value
    _LEANING.append((head, head.register_forward_hook(lambda module, args, logits: logits + bias.to(logits))))
    return model


def learn(
    model: LatentModel,
    examples: Sequence[Example],
    n_steps: int = 200,
    learning_rate: float = 5e-3,
    seed: str = "",
) -> float:
    """Train on a handful of examples, all of them at every step; return the last loss.

    ``seed`` is that of a step's draws, such as ``0/{}/0/0``; by default nothing is drawn.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    loss = torch.tensor(torch.inf)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss = model.loss(examples, seed=seed.format(step)).loss
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
        for i, span in enumerate(segment):
            if at <= position < at + len(span.ids):
                ids = list(span.ids)
                ids[position - at] = token
                segment[i] = dataclasses.replace(span, ids=tuple(ids))
            at += len(span.ids)
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
