"""What a loop keeps for its gradient: peak memory of one training step against T, with and without checkpointing.

Bytes are those of torch's own allocator (every allocation and release of a forward and backward pass, as the profiler
reports them), so that two runs give the same figures. Gradients with checkpointing are compared with those without.

    python benchmarks/loop_memory.py --out benchmarks/results/loop_memory.json               # a minute on a CPU
"""

import argparse
import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from innerloop.engine.latent_model import LatentModel
from innerloop.measure.accuracy import device_name, versions
from innerloop.methods import Slr
from innerloop.tasks import Chain
from innerloop.text.examples import Example

LOOPS = (1, 2, 4, 8, 16)
BATCH, SLOTS = 16, 16
BACKBONE = {
    "type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    examples = Chain(n_ops=8, n_train=BATCH).examples("train")
    points = [measure(examples, loops) for loops in LOOPS]
    by_loops = {point["loops"]: point for point in points}
    report = {
        "backbone": BACKBONE,
        "batch": BATCH,
        "slots": SLOTS,
        "seed": 0,
        "points": points,
        "ratio_16_to_2": {name: by_loops[16][name] / by_loops[2][name] for name in ("plain_mib", "checkpointed_mib")},
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratio_16_to_2"]))


def measure(examples: list[Example], loops: int) -> dict:
    """Return the peak of one step with T loops, plain and checkpointed, and how far the gradients differ."""
    method = Slr(n_slots=SLOTS, max_loops=loops, lora="per_iter")
    model = LatentModel.from_scratch(BACKBONE, examples, method).train()
    plain, plain_gradients = step(model, examples)
    model.activation_checkpointing_enable()
    checkpointed, gradients = step(model, examples)
    scale = max(g.abs().max().item() for g in plain_gradients)
    gap = max((a - b).abs().max().item() for a, b in zip(plain_gradients, gradients, strict=True)) / scale
    point = {"loops": loops, "plain_mib": plain, "checkpointed_mib": checkpointed, "relative_gradient_gap": gap}
    print(point, flush=True)
    return point


def step(model: LatentModel, examples: list[Example]) -> tuple[float, list[torch.Tensor]]:
    """Run forward and backward; return the most MiB held beyond what was there before, and the gradients."""
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.loss(examples).loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20, [p.grad.clone() for p in model.parameters() if p.grad is not None]


if __name__ == "__main__":
    main()
