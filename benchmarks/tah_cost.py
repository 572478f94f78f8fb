"""What Think-at-Hard costs: time and FLOPs of batches in which 6 % of the tokens are read twice, against a plain model.

A Llama-shaped model with random weights reads rows (prefill) and answers questions of unlike length, each until the
context is full (decode; the time that reading the questions takes is taken off). Which tokens go on is given (pattern),
or said by a decider: it runs, but what it says is drawn, since an untrained one finds all tokens of some rows hard and
none of others. In the prefill every token is read out, as in scoring; what the decider has read out, to look at the
logits, is not read out again.
Plain and Think-at-Hard runs take turns on one thread. Seconds are CPU time; other work on the machine can only lengthen
it, so the ratio is that of the least times, and those of the turns tell the spread.

    python benchmarks/tah_cost.py --out benchmarks/results/tah_cost.json               # a minute and a half on a CPU
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from innerloop.decoder.backbone import Backbone
from innerloop.decoder.cost import CostMeter
from innerloop.engine.generation import Generation
from innerloop.engine.latent_model import LatentModel
from innerloop.measure.accuracy import device_name, versions
from innerloop.methods import Cot, Tah
from innerloop.methods.depth.decider import FREE, ONCE
from innerloop.tasks import Chain
from innerloop.text.tokenizer import train_tokenizer

SHARE = 0.06
BACKBONE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 192,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
METHOD = Tah(decider={"width": 64, "blocks": 2}, prompt_iterates=True)
PREFILL, DECODE = {"rows": 4, "tokens": 192}, {"rows": 16, "question": [48, 128]}
REPEATS = {"prefill": 4, "decode": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = {
        "backbone": {"type": "llama", **BACKBONE},
        "share_wanted": SHARE,
        "prefill": {"shape": PREFILL, **measure_prefill()},
        "decode": {"shape": DECODE, **measure_decode()},
        "seed": 0,
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


class Draws:
    """Lets the decider work, and says of 6 % of the tokens that they go on, whatever they are; alike in each run."""

    def __init__(self, tah: LatentModel):
        self.generator = torch.Generator()
        tah.depth.chooser.decider.register_forward_hook(self.say)

    def say(self, module: nn.Module, args: tuple, scores: Tensor) -> Tensor:
        """Return the logits of the decision."""
        return torch.where(torch.rand(scores.shape, generator=self.generator) < SHARE, 9.0, -9.0)


def models(method: Tah) -> tuple[LatentModel, LatentModel, Draws]:
    """Return the plain model and the one that reads hard tokens again, with the same weights."""
    tokenizer = train_tokenizer(Chain(n_train=64).examples("train"))
    backbone = Backbone(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **BACKBONE)))
    with torch.no_grad():
        backbone.lm.get_input_embeddings().weight[tokenizer.eos_token_id] = 0  # never the likeliest: no row ends
    twin = copy.deepcopy(backbone)
    plain, tah = LatentModel(twin, tokenizer, Cot()).eval(), LatentModel(backbone, tokenizer, method).eval()
    with torch.no_grad():
        for up in tah.loop.lora.up.values():
            up.normal_(std=0.02)
    return plain, tah, Draws(tah)


def times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each of some runs, which take turns; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - started)
    return seconds


def ratios(seconds: dict[str, list[float]], flops: dict[str, float], shares: dict[str, float]) -> dict:
    """Return what each run took, as a multiple of the plain one: its least time, and each turn's."""
    points = {}
    for name, found in seconds.items():
        points[name] = {"seconds": found, "flops": flops[name]}
        if name != "plain":
            by_turn = [mine / plain for mine, plain in zip(found, seconds["plain"], strict=True)]
            points[name] |= {
                "share": shares[name],
                "time_ratio": min(found) / min(seconds["plain"]),
                "time_ratio_by_turn": {"median": statistics.median(by_turn), "min": min(by_turn), "max": max(by_turn)},
                "flops_ratio": flops[name] / flops["plain"],
            }
            print(name, {k: v for k, v in points[name].items() if "ratio" in k or k == "share"}, flush=True)
    return points


@torch.inference_mode()
def measure_prefill() -> dict:
    """Read rows of random tokens and say what follows each: the pass of scoring, and of training's forward half."""
    plain, tah, draws = models(METHOD)
    n_rows, n_tokens = PREFILL["rows"], PREFILL["tokens"]
    ids = torch.randint(3, BACKBONE["vocab_size"], (n_rows, n_tokens))
    pattern, free = torch.where(torch.rand(ids.shape) < SHARE, 2, ONCE), torch.full_like(ids, FREE)
    everywhere = torch.arange(n_rows).repeat_interleave(n_tokens), torch.arange(n_tokens).repeat(n_rows)

    def read(model: LatentModel, wanted: Tensor | None, meter: CostMeter | None = None) -> Tensor:
        draws.generator.manual_seed(0)
        context = model.new_context(model.batch(model.prompts(["2"] * n_rows)), meter)
        run = context.depth
        if run is not None:
            run.wanted_BS = wanted
        context.read_out(context.read(model.backbone.embed(ids)), *everywhere)
        return run.passes[0].depths_BL if run is not None and run.passes else torch.ones_like(ids)

    runs = {"plain": (plain, None), "pattern": (tah, pattern), "decider": (tah, free)}
    flops, shares = {}, {}
    for name, (model, wanted) in runs.items():
        meter = CostMeter(n_rows, ids.device)
        depths = read(model, wanted, meter)
        shares[name] = (depths > 1).float().mean().item()
        # the decider reads out, and counts, all tokens; those that go on are read out once more at the end
        meter.logits += (depths > 1).sum(1) if name == "decider" else n_tokens
        flops[name] = sum(cost.flops for cost in meter.costs(model.backbone))
    seconds = times({n: (lambda m=m, w=w: read(m, w)) for n, (m, w) in runs.items()}, REPEATS["prefill"])
    return ratios(seconds, flops, shares)


def measure_decode() -> dict:
    """Answer questions, every row until the context is full."""
    plain, tah, draws = models(replace(METHOD, prompt_iterates=False))
    lengths = torch.randint(*DECODE["question"], (DECODE["rows"],)).tolist()
    questions = [" ".join(map(str, torch.randint(0, 5, (n,)).tolist())) for n in lengths]

    def write(model: LatentModel, n: int = BACKBONE["max_position_embeddings"]) -> list[Generation]:
        draws.generator.manual_seed(0)
        return model.generate(questions, max_new_tokens=n, batch_size=len(questions))

    flops, shares = {}, {}
    for name, model in {"plain": plain, "decider": tah}.items():
        found = write(model)
        assert not any(generation.ended for generation in found)
        flops[name] = sum(generation.cost.flops for generation in found)
        written = [
            depth for one, n in zip(found, lengths) for _, depth in one.depths[n:]
        ]  # after the question's digits
        shares[name] = sum(depth > 1 for depth in written) / max(len(written), 1)
    runs = {"plain": lambda: write(plain), "decider": lambda: write(tah)}
    reads = {"plain": lambda: write(plain, 1), "decider": lambda: write(tah, 1)}
    reading = {name: min(found) for name, found in times(reads, REPEATS["decode"]).items()}
    seconds = {n: [s - reading[n] for s in found] for n, found in times(runs, REPEATS["decode"]).items()}
    return ratios(seconds, flops, shares)


if __name__ == "__main__":
    main()
