"""What Think-at-Hard costs: time and FLOPs of batches in which 6 % of the tokens are read twice, against a plain model.

A Llama-shaped model with random weights reads questions (prefill) and writes (decode). Which tokens go on is given
(pattern), or said by a decider whose tau is set so that about 6 % do. In the prefill every token is read out, as it is
in scoring; tokens that the decider has read out, to look at their logits, are not read out again.
Plain and Think-at-Hard runs take turns. Seconds are those of this process's CPU time on one thread, which other work on
the machine does not lengthen; those of the clock are given beside them.

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
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from innerloop.backbone import Backbone
from innerloop.cost import Cost, Meter, mean_cost
from innerloop.decider import FREE, ONCE
from innerloop.engine import Generation
from innerloop.measure.accuracy import device_name, versions
from innerloop.methods import Cot, Tah
from innerloop.model import LatentModel
from innerloop.tasks import Chain
from innerloop.tokenizer import train_tokenizer

SHARE = 0.06
BACKBONE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
METHOD = Tah(decider_width=64, decider_blocks=2, prompt_iterates=True)
PREFILL, DECODE = {"rows": 4, "tokens": 256}, {"rows": 16, "question": 16, "written": 96}
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


def models(method: Tah) -> tuple[LatentModel, LatentModel]:
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
    return plain, tah


def times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the seconds of each of some runs, which take turns; the first turn is not counted."""
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    clock: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started, began = time.process_time(), time.perf_counter()
            run()
            if turn:
                cpu[name].append(time.process_time() - started)
                clock[name].append(time.perf_counter() - began)
    return {
        name: {
            "median": statistics.median(cpu[name]),
            "min": min(cpu[name]),
            "max": max(cpu[name]),
            "clock": statistics.median(clock[name]),
        }
        for name in runs
    }


def ratios(seconds: dict[str, dict[str, float]], flops: dict[str, float], shares: dict[str, float]) -> dict:
    """Return what each run took, as a multiple of the plain one."""
    plain = seconds["plain"]
    points = {}
    for name in seconds:
        points[name] = {"seconds": seconds[name], "flops": flops[name]}
        if name != "plain":
            points[name] |= {
                "share": shares[name],
                "time_ratio": seconds[name]["median"] / plain["median"],
                "time_ratio_range": [seconds[name]["min"] / plain["max"], seconds[name]["max"] / plain["min"]],
                "clock_ratio": seconds[name]["clock"] / plain["clock"],
                "flops_ratio": flops[name] / flops["plain"],
            }
            print(name, {k: v for k, v in points[name].items() if "ratio" in k or k == "share"}, flush=True)
    return points


@torch.inference_mode()
def measure_prefill() -> dict:
    """Read rows of random tokens and say what follows each: the pass of scoring, and of training's forward half."""
    plain, tah = models(METHOD)
    ids = torch.randint(3, BACKBONE["vocab_size"], (PREFILL["rows"], PREFILL["tokens"]))
    pattern = torch.where(torch.rand(ids.shape) < SHARE, 2, ONCE)
    scores: list[Tensor] = []
    tah.depth.chooser.decider.register_forward_hook(lambda module, args, out: scores.append(out))

    places = (torch.arange(len(ids)).repeat_interleave(ids.shape[1]), torch.arange(ids.shape[1]).repeat(len(ids)))

    def read(model: LatentModel, wanted: Tensor | None, meter: Meter | None = None) -> Tensor:
        context = model.new_context(model.batch(model.prompts(["2"] * len(ids))), meter)
        context.wanted_BS = wanted
        context.read_out(context.read(model.backbone.embed(ids)), *places)
        return context.deep[0].depths_BL if context.deep else torch.ones_like(ids)

    free = torch.full_like(ids, FREE)
    tah.depth.chooser.settings = replace(METHOD, tau=1.0)
    read(tah, free)
    tau = scores[0].sigmoid().quantile(1 - SHARE).item()
    tah.depth.chooser.settings = replace(METHOD, tau=tau)
    runs = {"plain": (plain, None), "pattern": (tah, pattern), "decider": (tah, free)}
    flops, shares = {}, {}
    for name, (model, wanted) in runs.items():
        meter = Meter(len(ids), ids.device)
        depths = read(model, wanted, meter)
        shares[name] = (depths > 1).float().mean().item()
        # the decider reads out, and counts, all tokens; those that go on are read out once more at the end
        meter.logits += (depths > 1).sum(1) if name == "decider" else ids.shape[1]
        flops[name] = sum(cost.flops for cost in meter.costs(model.backbone))
    seconds = times({n: (lambda m=m, w=w: read(m, w)) for n, (m, w) in runs.items()}, REPEATS["prefill"])
    return {"tau": tau, **ratios(seconds, flops, shares)}


def measure_decode() -> dict:
    """Answer questions greedily, all rows for the same number of tokens."""
    plain, tah = models(replace(METHOD, prompt_iterates=False))
    questions = [" ".join(str((row + i) % 5) for i in range(DECODE["question"])) for row in range(DECODE["rows"])]
    scores: list[Tensor] = []
    tah.depth.chooser.decider.register_forward_hook(lambda module, args, out: scores.append(out))

    def write(model: LatentModel) -> list[Generation]:
        return model.generate(questions, max_new_tokens=DECODE["written"], batch_size=len(questions))

    tah.depth.chooser.settings = replace(METHOD, tau=1.0)
    write(tah)
    tau = torch.cat(scores).sigmoid().quantile(1 - SHARE).item()
    tah.depth.chooser.settings = replace(METHOD, tau=tau)
    flops, shares = {}, {}
    for name, model in {"plain": plain, "decider": tah}.items():
        found = write(model)
        flops[name] = mean_cost([Cost(flops=g.cost.flops) for g in found])["flops"]
        written = [depth for g in found for _, depth in g.depths[-DECODE["written"] :]]
        shares[name] = sum(depth > 1 for depth in written) / max(len(written), 1)
    seconds = times({"plain": lambda: write(plain), "decider": lambda: write(tah)}, REPEATS["decode"])
    return {"tau": tau, **ratios(seconds, flops, shares)}


if __name__ == "__main__":
    main()
