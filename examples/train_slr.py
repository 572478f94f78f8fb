"""Train a small model to think in latents, and compare it with one that writes its steps.

Both go on from the same chain-of-thought model, for as many steps on the same data. One to three minutes on a CPU:

    python examples/train_slr.py
"""

import argparse
from pathlib import Path

import innerloop as il
from innerloop.measure import evaluate, wilson
from innerloop.train.callbacks import LiveProgress

TASK = il.Chain(n_ops=3, modulus=5, n_train=5_000, n_test=500)  # "3 ; + 4 ; * 2 ; - 1": one number, modulo five
DECODER = {"type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "max_position_embeddings": 128}
METHODS = [
    il.Cot(),  # writes "3 + 4 = 2", "2 * 2 = 4", "4 - 1 = 3" and the answer
    il.Slr(n_slots=3, max_loops=3, slots_per_step=1, step_weight=1.0),  # refines three latents three times, and answers
]


def train(model: il.LatentModel, folder: Path, steps: int) -> None:
    """Train a model on the chain task and leave it in ``folder``."""
    args = il.LatentTrainingArguments(
        output_dir=str(folder), max_steps=steps, batch_size=64, learning_rate=1e-3, save_strategy="no"
    )
    il.LatentTrainer(model, args, TASK.examples("train"), task=TASK, callbacks=[LiveProgress(folder.name)]).train()


def main(steps: int, n_test: int, out: Path) -> None:
    """Train both methods, then print how often each is right and what an answer costs."""
    start = il.LatentModel.from_scratch(DECODER, TASK.examples("train"), il.Cot())
    train(start, out / "start", steps // 2)

    questions, lines = TASK.examples("test", n_test), []
    for method in METHODS:
        model = il.LatentModel.from_pretrained(out / "start", method=method)
        train(model, out / method.name, steps)
        answers = evaluate(model, TASK, questions)
        n_right, passes = sum(a.correct for a in answers), sum(a.cost.passes for a in answers) / len(answers)
        low, high = wilson(n_right, len(answers))
        lines.append(f"{method.name:8} {n_right / len(answers):8.1%} {f'{low:.1%} to {high:.1%}':>17} {passes:8.1f}")
    print("\n".join([f"{'method':8} {'accuracy':>8} {'95 % interval':>17} {'passes':>8}", *lines]))
    print(f"The models are in {out}. Next: python examples/look_inside.py --run {out / 'slr'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each method")
    parser.add_argument("--n-test", type=int, default=500, help="questions to answer")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"), help="where the models go")
    main(**vars(parser.parse_args()))
