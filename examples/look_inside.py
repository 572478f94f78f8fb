"""Look inside a model that thinks in latents: what do they show, loop by loop, and does the answer need them?

python examples/train_slr.py
python examples/look_inside.py
"""

import argparse
from pathlib import Path

from train_slr import TASK

import innerloop as il
from innerloop.measure.controls import controls
from innerloop.measure.subject import Subject


def main(run: Path, n: int) -> None:
    """Show one thought, then what all have in common, then what happens when thoughts are exchanged or hidden."""
    model = il.LatentModel.from_pretrained(run)
    examples = TASK.examples("test", n)
    answers = model.generate([example.question for example in examples], trace=True)

    print(f"{examples[0].question}   (steps: {', '.join(examples[0].steps)})")
    for loop in answers[0].trace.iterations:  # top_ids: the likeliest words of each latent, (1, latents, 5)
        words = model.tokenizer.convert_ids_to_tokens(loop.top_ids[0, :, 0])
        print(f"  after loop {loop.loop} the latents show {' '.join(words)}; they moved by {loop.delta[0].item():.2f}")
    print(f"  answer {answers[0].answer}, right is {examples[0].answer}")

    print(f"\nHow often a latent shows the first number of its step, {len(examples)} questions:")
    print("  " + " ".join(f"{f'latent {i + 1}':>9}" for i in range(TASK.n_ops)))
    for t in range(len(answers[0].trace.iterations)):
        hits = [0] * TASK.n_ops
        for example, answer in zip(examples, answers):
            shown = model.tokenizer.convert_ids_to_tokens(answer.trace.iterations[t].top_ids[0, :, 0])
            for i, step in enumerate(example.steps):
                hits[i] += shown[i].strip() == step.split()[0]
        print("  " + " ".join(f"{hit / len(examples):9.0%}" for hit in hits) + f"   loop {t + 1}")

    print("\nIs the answer read off the latents? The same questions with latents exchanged, emptied or hidden:")
    found = controls(Subject(model, TASK, examples))
    for name, effect in found.effects.items():
        print(f"  {name:16} {effect.compared.accuracies[0]:6.1%}")
    print(found.sentence)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/examples/slr"), help="a model of train_slr.py")
    parser.add_argument("--n", type=int, default=200, help="questions to answer")
    main(**vars(parser.parse_args()))
