"""Answering in text against what people would run instead: transformers' `generate`, and its continuous batching.

Same weights, same prompts, greedy; sides take turns in one process, and must write the same tokens. Told is how many
times less CPU time, and wall time, the engine takes; a call is timed whole, packing of weights included once a process.

together: all rows write the same number of tokens; `generate` gets them as one batch.
apart: rows end at unlike tokens, as their end of sequence is a token that the model writes now and then. `generate`
    gets them sorted by how long they will write, which nobody knows before, a batch at a time; the engine, and
    `generate_batch`, let waiting rows in where others have ended.

    python benchmarks/peers.py --model models/smollm2-135m --threads 1 --out benchmarks/results/peers.json
    python benchmarks/peers.py --shape llama-1b --static --dtype bfloat16 --device cuda --out FILE
    python benchmarks/peers.py --smoke --out /tmp/peers.json                                      # seconds

``--static`` adds a rival where rows end together: `generate` with a static cache, whose passes transformers compiles on
a GPU.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import record
import subjects
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from innerloop.bench.timing import Turn, clock_of, cpu_ratio, ratio, seconds_of, spread, take_turns
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Cot

Ids = list[list[int]]
ENGINE, GENERATE, STATIC, CONTINUOUS = "engine", "generate", "generate_static", "generate_batch"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", help="a pretrained model, such as models/smollm2-135m")
    parser.add_argument("--shape", default="smoke", choices=list(subjects.SHAPES), help="without --model")
    parser.add_argument("--static", action="store_true", help="also against generate with a static cache")
    parser.add_argument("--questions", type=int, default=48, help="where rows end apart")
    options = record.begin(parser)
    length, n_apart, repeats = 40, options.questions, options.repeats or 5
    together, apart = [(1, 17), (1, 64), (8, 17), (32, 17)], [(8, 32), (32, 32)]
    if options.smoke:
        options.shape = "smoke"
        length, n_apart, repeats, together, apart = 8, 6, 2, [(1, 3), (4, 3)], [(4, 8)]
    if options.model is None:
        model = subjects.random_model(
            subjects.SHAPES[options.shape], Cot(), options.seed, options.device, options.dtype
        )
    else:
        model = LatentModel.from_pretrained(
            options.model, Cot(), device=options.device, dtype=options.dtype, chat=False
        )
        subjects.never_ending(model)
    peers = Peers(model, options.device)
    asked = subjects.questions(model, max(n_apart, 32), length, options.seed)
    jobs, rivals = [], [GENERATE, STATIC] if options.static else [GENERATE]
    for size, n in together:
        jobs.append(measure(peers, asked[:size], n, size, [ENGINE, *rivals], repeats))
    peers.end_at_common_token(asked[:n_apart], max(n for _, n in apart))
    for size, n in apart:
        jobs.append(measure(peers, asked[:n_apart], n, size, [ENGINE, GENERATE, CONTINUOUS], repeats))
    name = f"random, {options.shape}" if options.model is None else str(options.model).rstrip("/").rsplit("/", 1)[-1]
    record.write(options, "peers", {"model": name, "question_tokens": length, "repeats": repeats, "jobs": jobs})


class Peers:
    """The engine and its rivals over the same weights; each call returns the tokens written, without the end token."""

    def __init__(self, model: LatentModel, device: torch.device):
        self.model, self.device, self.end = model, device, None
        self.lm = copy.deepcopy(model.backbone.lm)  # `generate_batch` changes how its model attends
        self.never = model.suppressed_ids().tolist()

    def end_at_common_token(self, asked: Sequence[str], n_tokens: int) -> None:
        """Let rows end at the token that makes their lengths most unlike."""
        written = self.engine(asked, n_tokens, len(asked))
        found = {t: [ids.index(t) if t in ids else n_tokens for ids in written] for ids in written for t in ids}
        self.end = max(found, key=lambda token: statistics.pstdev(found[token]))
        self.order = sorted(range(len(asked)), key=found[self.end].__getitem__)
        self.model.encoder.eos_id = self.end

    def engine(self, asked: Sequence[str], n_tokens: int, size: int) -> Ids:
        found = self.model.generate(asked, max_new_tokens=n_tokens, batch_size=size)
        return [self._cut(one.ids) for one in found]

    def generate_static(self, asked: Sequence[str], n_tokens: int, size: int) -> Ids:
        return self.generate(asked, n_tokens, size, cache_implementation="static")

    def generate(self, asked: Sequence[str], n_tokens: int, size: int, **options: str) -> Ids:
        order = list(range(len(asked))) if self.end is None else self.order
        written: dict[int, list[int]] = {}
        for first in range(0, len(order), size):
            part = order[first : first + size]
            ids = torch.tensor(self._prompts([asked[i] for i in part]), device=self.device)
            config = self._config(n_tokens, **options)
            out = self.lm.generate(ids, generation_config=config, attention_mask=torch.ones_like(ids))
            written |= {i: self._cut(row) for i, row in zip(part, out[:, ids.shape[1] :].tolist())}
        return [written[i] for i in range(len(asked))]

    def generate_batch(self, asked: Sequence[str], n_tokens: int, size: int) -> Ids:
        if not hasattr(self, "paged"):
            self.paged = copy.deepcopy(self.lm)
        prompts = self._prompts(asked)
        blocks = -(-size * (len(prompts[0]) + n_tokens) // 32) + size
        batching = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=max(size, 256))
        found = self.paged.generate_batch(
            prompts, generation_config=self._config(n_tokens), continuous_batching_config=batching
        )
        return [self._cut(found[f"req_{i}"].generated_tokens) for i in range(len(asked))]

    def _prompts(self, asked: Sequence[str]) -> Ids:
        return [self.model.encoder.question(question).ids for question in asked]

    def _config(self, n_tokens: int, **options: str) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=n_tokens,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.model.encoder.pad_id,
            suppress_tokens=self.never or None,
            **options,
        )

    def _cut(self, ids: Sequence[int]) -> list[int]:
        """Return what comes before the end token."""
        return list(ids[: ids.index(self.end)] if self.end in ids else ids)


def measure(peers: Peers, asked: Sequence[str], n_tokens: int, size: int, sides: Sequence[str], repeats: int) -> dict:
    """Return how many times less time the engine takes than its rivals."""
    calls: dict[str, Callable[[], Ids]] = {side: partial(getattr(peers, side), asked, n_tokens, size) for side in sides}
    turns: dict[str, list[Turn[Ids]]] = take_turns(calls, repeats, clock_of(peers.device))
    written = {side: turns[side][0].result for side in sides}
    unlike = {side: sum(a != b for a, b in zip(written[side], written[ENGINE])) for side in sides if side != ENGINE}
    if any(unlike.values()):
        print(f"rows that differ from the engine's: {unlike}")
    lengths = [len(ids) for ids in written[ENGINE]]
    job = {
        "rows": "together" if peers.end is None else "apart",
        "batch_size": size,
        "questions": len(asked),
        "tokens": {"most": max(lengths), "least": min(lengths), "mean": statistics.mean(lengths)},
        "rows_that_differ": unlike,
        "ms": {side: spread([1000 * s for s in seconds_of(turns[side])]) for side in sides},
        "times_less_cpu": {side: cpu_ratio(turns[side], turns[ENGINE]) for side in unlike},
        "times_less_wall": {side: ratio(turns[side], turns[ENGINE]) for side in unlike},
    }
    print(job, flush=True)
    return job


if __name__ == "__main__":
    main()
