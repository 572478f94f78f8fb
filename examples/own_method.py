"""A latent method of one's own in twenty lines: as many latents as steps, refined together, each told what to hold.

Below it is trained twice, with and without being told. One to two minutes on a CPU:

    python examples/own_method.py

A recipe takes the same class by its import path, and a run that it has trained is loaded again by that path:

    PYTHONPATH=examples innerloop train recipes/chain/slr.yaml --method "{name: own_method.Scratchpad}" --out runs/own
"""

import argparse
from dataclasses import dataclass

import innerloop as il
from innerloop.measure import evaluate, verdict
from innerloop.text.row import TokenTarget
from innerloop.train.callbacks import LiveProgress


@dataclass(frozen=True)
class Scratchpad(il.LatentMethod):
    """``[Q][<bot>] | [<lat> x n_cells] | [<eot>][### A]``; after the last loop, latent i shows how step i begins.

    Args:
        n_cells: latents, one for each step.
        max_loops: how often they are refined.
        step_weight: weight of the loss of what latents show; 0: they may hold what they like.
    """

    name, paper, summary = "scratchpad", "none", "one latent a step, refined together, told what to hold at the end"
    n_cells: int = 2
    max_loops: int = 2
    step_weight: float = 1.0

    def n_latents(self, stage: int) -> int:
        return self.n_cells

    def n_loops(self, stage: int) -> int:
        return self.max_loops

    def lay_out(self, example: il.Example, encoder, stage: int):
        row = super().lay_out(example, encoder, stage)
        for i, step in enumerate(encoder.steps(example)[: self.n_cells]):
            row.token_targets.append(TokenTarget(self.max_loops, row.region_start + i, step.ids[0]))
        return row


TASK = il.Chain(n_ops=2, modulus=7, steps="results", n_train=1_500, n_test=200)
DECODER = {"type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "max_position_embeddings": 128}


def right(step_weight: float, steps: int) -> list[bool]:
    """Train the method from scratch; return which test questions it answers rightly."""
    examples = TASK.examples("train")
    model = il.LatentModel.from_scratch(DECODER, examples, Scratchpad(step_weight=step_weight))
    args = il.LatentTrainingArguments(
        output_dir=f"runs/examples/scratchpad-{step_weight}", max_steps=steps, batch_size=64, learning_rate=1e-3
    )
    il.LatentTrainer(model, args, examples, callbacks=[LiveProgress(f"step_weight {step_weight}")]).train()
    return [answer.correct for answer in evaluate(model, TASK, TASK.examples("test"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    steps = parser.parse_args().steps
    told, alone = right(1.0, steps), right(0.0, steps)
    print(f"right: {sum(told) / len(told):.1%} told what to hold, {sum(alone) / len(alone):.1%} left alone")
    print(verdict(told, alone, ("the method told what to hold", "the method left alone")).sentence)
