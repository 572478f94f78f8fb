"""What logits cost a training step in memory, with a large vocabulary: all at once, and so many rows at a time.

A tiny decoder with a vocabulary of tens of thousands learns to write long answers, so that logits are nearly all there
is. Bytes are those of torch's own allocator (`innerloop.decoder.memory`); gradients are compared with those of the
whole.

    python benchmarks/loss_memory.py --out benchmarks/results/loss_memory.json                    # a minute on a CPU
    python benchmarks/loss_memory.py --smoke --out /tmp/loss_memory.json                          # seconds
"""

from functools import partial

import record
import subjects
import torch
from training import gap, gradients, step, switch_off_dropout

from innerloop.bench.timing import clock_of, ratio, seconds_of, spread, take_turns
from innerloop.decoder.memory import MIB, peak_memory
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Cot
from innerloop.text.examples import Example

CHUNKS = (None, 256, 64, 16)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--answer", type=int, default=62, help="words of an answer; ### and the end come on top")
    options = record.begin(parser)
    repeats = options.repeats or 3
    if options.smoke:
        options.vocab, options.batch_size, options.answer, repeats = 512, 2, 38, 2
    shape = {**subjects.SMOKE, "vocab_size": options.vocab}
    model = subjects.random_model(shape, Cot(), options.seed, options.device, options.dtype, gain=0.5).train()
    switch_off_dropout(model)
    asked = subjects.questions(model, options.batch_size, 8, options.seed)
    told = subjects.questions(model, options.batch_size, options.answer + 1, options.seed + 1)
    examples = [Example(question, (), answer) for question, answer in zip(asked, told)]
    n_tokens = sum(model.batch(model.rows(examples)).n_targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    step(model, optimizer, lambda: model.loss(examples).loss)  # so that the optimizer's own states are there
    runs = {chunk: partial(train, model, optimizer, examples, chunk) for chunk in CHUNKS}
    turns = take_turns(runs, repeats, clock_of(options.device))
    whole = gradients(model, partial(loss_of, model, examples, None))
    points = []
    for chunk in CHUNKS:
        found = gradients(model, partial(loss_of, model, examples, chunk))
        model.zero_grad(set_to_none=True)
        point = {
            "loss_chunk": chunk,
            "peak_mib": peak_memory(runs[chunk], options.device) / MIB,
            "ms": spread([1000 * seconds for seconds in seconds_of(turns[chunk])]),
            "time_against_whole": ratio(turns[chunk], turns[None]),
            "gradients": gap(found, whole),
        }
        print(point, flush=True)
        points.append(point)
    work = {"batch_size": options.batch_size, "supervised_tokens": n_tokens, "repeats": repeats}
    logits = n_tokens * options.vocab * torch.float32.itemsize / MIB
    record.write(options, "loss_memory", {"shape": shape, **work, "logits_mib": logits, "points": points})


def loss_of(model: LatentModel, examples: list[Example], chunk: int | None) -> torch.Tensor:
    """Return the loss, made so many rows of logits at a time."""
    model.loss_chunk = chunk
    return model.loss(examples).loss


def train(model: LatentModel, optimizer: torch.optim.Optimizer, examples: list[Example], chunk: int | None) -> None:
    """Run one step."""
    step(model, optimizer, partial(loss_of, model, examples, chunk))


if __name__ == "__main__":
    main()
