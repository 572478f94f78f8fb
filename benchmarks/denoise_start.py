"""Does a decoder's start help a mask predictor? Losses of hidden tokens of held-out text, while some steps are trained.

A decoder with its habit of predicting the next token (shift), with attention annealed or not, the same decoder
predicting in place, and the same shape with random weights; all see the same text, masks and number of steps.

    python benchmarks/denoise_start.py models/smollm2-135m --text FILE.txt --out benchmarks/results/denoise_start.json
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from innerloop import LatentModel, Llada
from innerloop.decoder.backbone import Backbone
from innerloop.measure.accuracy import device_name, versions
from innerloop.model.loading import load_tokenizer
from innerloop.tasks import Text
from innerloop.text.encoder import PromptEncoder
from innerloop.text.examples import Example

ARMS = {
    "decoder, shift, annealed": (True, True, True),
    "decoder, shift": (True, True, False),
    "decoder, in place": (True, False, False),
    "random weights, shift": (False, True, False),
}
N_HELD_OUT, N_WORDS = 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a decoder's folder or name on the Hub")
    parser.add_argument("--text", required=True, help="a text file; its first chunks are held out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--every", type=int, default=20, help="steps between two looks at the held-out loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chunks = Text(train=options.text, n_words=N_WORDS, n_continued=1).examples("train")
    held_out, learned = chunks[:N_HELD_OUT], chunks[N_HELD_OUT:]
    report = {
        "kind": "denoise_start",
        "model": Path(options.model).name,
        "points": [],
        **{name: getattr(options, name) for name in ("steps", "batch_size", "learning_rate", "seed")},
        "n": N_HELD_OUT,
        "n_words": N_WORDS,
        "versions": versions(),
        "device": device_name(torch.device("cpu")),
    }
    for name, (is_decoder, shift, anneals) in ARMS.items():
        method = Llada(shift=shift, anneal_steps=options.steps // 3 if anneals else 0)
        model = made(options.model, method, is_decoder, options.seed)
        losses = trained(model, learned, held_out, options)
        report["points"].append({"start": name, "losses": losses})
        print(name, losses, flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def made(source: str, method: Llada, is_decoder: bool, seed: int) -> LatentModel:
    """Return a model with the weights of a decoder, or of its shape alone."""
    if is_decoder:
        return LatentModel.from_pretrained(source, method, device="cpu", dtype=torch.float32, chat=False)
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source), dtype=torch.float32)
    return LatentModel(Backbone(lm), load_tokenizer(source), method)


def trained(
    model: LatentModel, learned: list[Example], held_out: list[Example], options: argparse.Namespace
) -> dict[str, float]:
    """Return the loss of a hidden token of held-out text by the number of steps."""
    model.encoder = PromptEncoder(model.tokenizer, running_text=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01)
    found = {"0": measured(model, held_out)}
    model.train()
    for step in range(options.steps):
        first = step * options.batch_size % max(len(learned) - options.batch_size, 1)
        optimizer.zero_grad()
        batch = learned[first : first + options.batch_size]
        model.loss(batch, seed=f"{options.seed}/{step}/0/0").loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % options.every == 0:
            found[str(step + 1)] = measured(model, held_out)
            model.train()
    return found


@torch.no_grad()
def measured(model: LatentModel, examples: list[Example]) -> float:
    """Return the mean loss of the hidden tokens of examples, the same tokens each time."""
    model.eval()
    return round(model.loss(examples).measured["loss_masked"].item(), 4)


if __name__ == "__main__":
    main()
