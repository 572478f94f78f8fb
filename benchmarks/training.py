"""A training step against the reference that re-runs everything: the question again in every loop, nothing cached.

Both sides share one model with random weights and the same batches, whose questions are at least four times as long as
what is supervised, with six iterations. A step is forward, backward and AdamW (with a learning rate of 0, so that both
sides see the same weights in every turn). First the gradients are compared: the largest difference over all weights, as
a multiple of the largest gradient; and for each weight by itself, as a multiple of the norm of its gradient.

    python benchmarks/training.py --out benchmarks/results/training.json
    python benchmarks/training.py --smoke --out /tmp/training.json                                # seconds
"""

from collections.abc import Callable
from functools import partial

import record
import subjects
import torch
from reference import Reference
from torch import Tensor

from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.decoder.memory import MIB, peak_memory
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Coconut, Lotus, Method, Slr
from innerloop.text.examples import Example

METHODS: dict[str, Method] = {
    "slr": Slr(n_slots=6, max_loops=6),
    "lotus": Lotus(n_blocks=6, latents_per_block=2, max_loops=6, step_weight=0.0),
    "coconut": Coconut(latents_per_step=1, curriculum={"max_stage": 7}),  # 7 latents: 6 iterations
}
OURS, PLAIN = "innerloop", "reference"
CLOSE = 1e-5
GAIN = 0.5  # as fresh weights usually are; where they stretch states, six iterations stretch rounding errors past CLOSE


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--question", type=int, default=128, help="tokens of a question")
    parser.add_argument("--answer", type=int, default=8, help="words of an answer; ### and the end come on top")
    options = record.begin(parser)
    repeats = options.repeats or 5
    if options.smoke:
        options.shape, options.batch_size, options.question, options.answer, repeats = "smoke", 2, 20, 2, 2
    points = [measure(options, name, method, repeats) for name, method in METHODS.items()]
    shape = {"name": options.shape, **subjects.SHAPES[options.shape]}
    record.write(
        options,
        "training",
        {
            "shape": shape,
            "batch_size": options.batch_size,
            "question_tokens": options.question,
            "answer_tokens": options.answer + 2,
            "repeats": repeats,
            "points": points,
        },
    )


def measure(options, name: str, method: Method, repeats: int) -> dict:
    """Return how a method's step compares with the reference's."""
    shape = subjects.SHAPES[options.shape]
    model = subjects.random_model(shape, method, options.seed, options.device, options.dtype, GAIN).train()
    switch_off_dropout(model)
    asked = subjects.questions(model, options.batch_size, options.question, options.seed)
    told = subjects.questions(model, options.batch_size, options.answer + 1, options.seed + 1)
    examples = [Example(question, ("w1",), answer) for question, answer in zip(asked, told)]
    slow = Reference(model)
    losses: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: model.loss(examples).loss,
        PLAIN: partial(slow.loss, examples),
    }
    found = {side: gradients(model, loss) for side, loss in losses.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    apart = gap(found[OURS], found[PLAIN])
    if options.dtype == torch.float32 and apart["relative_gap"] > CLOSE:
        raise SystemExit(f"{name}: gradients differ from the reference's by {apart['relative_gap']:.2g}")
    runs = {side: partial(step, model, optimizer, loss) for side, loss in losses.items()}
    turns = take_turns(runs, repeats, clock_of(options.device))
    model.zero_grad(set_to_none=True)
    stage = method.last_stage
    (row,) = method.rows(examples[:1], model.encoder, stage)
    point = {
        "method": name,
        "loops": row.n_loops,
        "positions": len(row),
        "latents": sum(len(span.ids) for span in row.region),
        "gradients": apart,
        "ms": {side: spread([1000 * s for s in seconds_of(turns[side])]) for side in runs},
        "peak_mib": {side: peak_of(model, run, options.device) for side, run in runs.items()},
        "speedup": ratio(turns[PLAIN], turns[OURS]),
    }
    print(point, flush=True)
    return point


def switch_off_dropout(model: LatentModel) -> None:
    """Let training draw nothing: both sides must compute the same."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def gradients(model: LatentModel, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Return the gradient of every weight that has one."""
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float | int]:
    """Return how far two sets of gradients lie apart."""
    if set(ours) != set(theirs):
        raise SystemExit(f"one side alone has gradients of {', '.join(sorted(set(ours) ^ set(theirs)))}")
    apart = {name: (ours[name] - theirs[name]).float() for name in ours}
    return {
        "n_weights": len(ours),
        "relative_gap": max(a.abs().max().item() for a in apart.values())
        / max(g.float().abs().max().item() for g in theirs.values()),
        "worst_weight_gap": max(
            apart[name].norm().item() / max(theirs[name].float().norm().item(), 1e-30) for name in ours
        ),
    }


def peak_of(model: LatentModel, run: Callable[[], None], device: torch.device) -> float:
    """Return the most MiB that a step holds, its gradients included."""
    model.zero_grad(set_to_none=True)
    return peak_memory(run, device) / MIB


def step(model: LatentModel, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Run one step."""
    optimizer.zero_grad(set_to_none=True)
    loss().backward()
    optimizer.step()


if __name__ == "__main__":
    main()
