"""The engine against the plain reference (single rows, no cache), and against the bare Hugging Face model.

Two questions, each answered by runs that take turns; before anything is timed the tokens must be the same.

reference: a GPT-2-sized model with random weights answers questions of unlike length in batches of 32; the reference of
    benchmarks/reference.py answers some of them one by one and reads everything anew in each pass. How many times fewer
    positions the engine reads for these questions is counted too: where positions cost alike, no engine gains more.
bare: a pretrained model (--model) reads 60 tokens, thinks in 6 latents (Coconut) and writes 8 tokens. The bare model is
    called as often, on the same shapes, with its own cache; it applies its head only where a token is written, and
    takes its tokens as the engine does. Without --model this part is left out.

    python benchmarks/engine.py --model models/smollm2-135m --out benchmarks/results/engine.json
    python benchmarks/engine.py --smoke --out /tmp/engine.json                                    # seconds
"""

import argparse
from functools import partial

import record
import subjects
import torch
from reference import Reference
from transformers import DynamicCache

from innerloop.bench.timing import Turn, clock_of, ratio, seconds_of, spread, take_turns
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Coconut, Cot, Lotus, Method, Slr

METHODS: dict[str, Method] = {
    "cot": Cot(),
    "coconut": Coconut(latents_per_step=2, curriculum={"max_stage": 3}),
    "slr": Slr(n_slots=6, max_loops=6),
    "lotus": Lotus(n_blocks=6, latents_per_block=4, max_loops=3),
    "lotus, 6 loops": Lotus(n_blocks=6, latents_per_block=4),
}
BARE = Coconut(latents_per_step=2, curriculum={"max_stage": 3})
ENGINE, PLAIN = "engine", "reference"


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--model", help="a pretrained model to compare with itself, such as models/smollm2-135m")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    options = record.begin(parser)
    report: dict = {"reference": against_reference(options)}
    if options.model is not None or options.smoke:
        report["bare"] = against_bare(options)
    record.write(options, "engine", report)


def against_reference(options: argparse.Namespace) -> dict:
    """Return examples per second of the engine and of the reference, method by method."""
    if options.smoke:
        shape, lengths, n, n_tokens, n_slow, repeats = subjects.SMOKE, (5, 12), 8, 3, 2, 2
    else:
        shape, lengths, n, n_tokens, n_slow, repeats = subjects.GPT2, (40, 80), 32, 32, 2, 3
    repeats, points = options.repeats or repeats, []
    for name in options.methods:
        model = subjects.random_model(shape, METHODS[name], options.seed, options.device, options.dtype)
        generator = torch.Generator().manual_seed(options.seed)
        sizes = torch.randint(lengths[0], lengths[1] + 1, (n,), generator=generator).tolist()
        asked = [subjects.questions(model, 1, size, seed)[0] for seed, size in enumerate(sizes)]
        slow, few = Reference(model), asked[:n_slow]
        first = subjects.answer(model, asked, n_tokens, 32)[:n_slow]
        written = [one.text for one in first]
        expected = [slow.write(question, n_tokens) for question in few]
        if written != expected:
            raise SystemExit(f"{name}: the engine writes {written}, the reference {expected}")
        fewer = slow.positions / sum(one.cost.positions for one in first)
        runs = {
            ENGINE: partial(subjects.answer, model, asked, n_tokens, 32),
            PLAIN: partial(write_all, slow, few, n_tokens),
        }
        turns = take_turns(runs, repeats, clock_of(options.device))
        answered = {ENGINE: n, PLAIN: n_slow}
        rates = {side: [answered[side] / s for s in seconds_of(turns[side])] for side in runs}
        point = {
            "method": name,
            "same_tokens": True,
            "times_fewer_positions": fewer,
            "examples_per_second": {side: spread(found) for side, found in rates.items()},
            "speedup": spread([a / b for a, b in zip(rates[ENGINE], rates[PLAIN])]),
        }
        print(point, flush=True)
        points.append(point)
    work = {"shape": shape, "question_tokens": lengths, "answer_tokens": n_tokens, "batch_size": min(n, 32)}
    return {**work, "questions": n, "reference_questions": n_slow, "repeats": repeats, "points": points}


def write_all(slow: Reference, asked: list[str], n_tokens: int) -> list[str]:
    """Answer questions one after the other."""
    return [slow.write(question, n_tokens) for question in asked]


def against_bare(options: argparse.Namespace) -> dict:
    """Return the time of the engine as a multiple of the bare model's, and what batches gain in each."""
    n_tokens, length, sizes, repeats = 8, 60, (1, 32), options.repeats or 5
    if options.model is None:
        model = subjects.random_model(subjects.SMOKE, BARE, options.seed, options.device, options.dtype)
        n_tokens, length, sizes, repeats = 3, 10, (1, 4), 2
    else:
        model = LatentModel.from_pretrained(options.model, BARE, device=options.device, dtype=options.dtype, chat=False)
        subjects.never_ending(model)
    asked = subjects.questions(model, max(sizes), length, options.seed)
    shapes = shapes_of(model, asked[0], n_tokens)
    runs = {}
    for size in sizes:
        runs[ENGINE, size] = partial(subjects.answer, model, asked[:size], n_tokens, size)
        runs["bare", size] = partial(bare, model, asked[:size], shapes)
    for size in sizes:
        texts = [one.text for one in runs[ENGINE, size]()]
        if texts != (found := runs["bare", size]()):
            raise SystemExit(f"the engine writes {texts}, the bare model {found}")
    turns: dict[tuple[str, int], list[Turn]] = take_turns(runs, repeats, clock_of(options.device))
    gains = {
        side: spread(
            [
                max(sizes) / min(sizes) * one / many
                for one, many in zip(seconds_of(turns[side, min(sizes)]), seconds_of(turns[side, max(sizes)]))
            ]
        )
        for side in (ENGINE, "bare")
    }
    report = {
        "model": "random" if options.model is None else str(options.model).rstrip("/").rsplit("/", 1)[-1],
        "shapes": shapes,
        "question_tokens": length,
        "answer_tokens": n_tokens,
        "latents": BARE.n_latents(BARE.last_stage),
        "repeats": repeats,
        "same_tokens": True,
        "points": [
            {
                "batch_size": size,
                "engine_ms": spread([1000 * s for s in seconds_of(turns[ENGINE, size])]),
                "bare_ms": spread([1000 * s for s in seconds_of(turns["bare", size])]),
                "time_ratio": ratio(turns[ENGINE, size], turns["bare", size]),
            }
            for size in sizes
        ],
        "batch_gain": gains,
    }
    print({"time_ratio": [point["time_ratio"] for point in report["points"]], "batch_gain": gains}, flush=True)
    return report


def shapes_of(model: LatentModel, question: str, n_tokens: int) -> list[int]:
    """Return how many positions each pass of a Coconut row reads; what the engine counts must agree."""
    (row,), k = model.prompts([question]), BARE.n_latents(BARE.last_stage)
    shapes = [len(row) - k - 1, *[1] * (k - 1), 2, *[1] * (n_tokens - 1)]
    cost = subjects.answer(model, [question], n_tokens, 1)[0].cost
    if (cost.passes, cost.positions) != (len(shapes), sum(shapes)):
        raise SystemExit(f"the engine makes {cost.passes} passes over {cost.positions} positions, not {shapes}")
    return shapes


@torch.inference_mode()
def bare(model: LatentModel, asked: list[str], shapes: list[int]) -> list[str]:
    """Read and write by calls of the Hugging Face model alone: the same passes, with its cache, side by side."""
    lm, encoder, k = model.backbone.lm, model.encoder, BARE.n_latents(BARE.last_stage)
    embed, decoder, never = lm.get_input_embeddings(), model.backbone.decoder, model.suppressed_ids()
    rows, cache = model.prompts(asked), DynamicCache(config=lm.config)
    prefix = torch.tensor([[i for span in row.prefix for i in span.ids] for row in rows], device=model.device)
    close = torch.tensor([rows[0].suffix[0].ids] * len(rows), device=model.device)
    state = decoder(inputs_embeds=embed(prefix), past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    for _ in range(k - 1):
        state = decoder(inputs_embeds=state, past_key_values=cache, use_cache=True).last_hidden_state
    read, written = torch.cat([state, embed(close)], dim=1), []
    for _ in shapes[k:]:
        logits = lm(inputs_embeds=read, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits[:, never] = -torch.inf
        written.append(logits.argmax(-1))
        read = embed(written[-1][:, None])
    tokens = torch.stack(written, dim=1).tolist()
    assert encoder.eos_id not in {token for ids in tokens for token in ids}
    return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


if __name__ == "__main__":
    main()
