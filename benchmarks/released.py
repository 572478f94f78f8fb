"""Released checkpoints: one command for each, and the number that its authors published beside it.

    python benchmarks/released.py                                             # the list; nothing is downloaded
    python benchmarks/released.py --run zen-E/CODI-gpt2 --out runs/released   # needs the network, and a GPU above 1B

What is run writes result.json (or lm_eval.json) into a folder of --out; the accuracy is printed beside the published
one. None has been run where this was written, which had no network.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HARNESS = ("--backend", "lm-eval", "--tasks", "gsm8k_cot")  # of models that write their reasoning
TASK = ("--task", "gsm8k", "--split", "test")  # of models that answer behind latents


@dataclass(frozen=True)
class Released:
    """A checkpoint.

    Attributes:
        name: on the Hub.
        published: accuracy on GSM8K in percent; None: none of theirs is known here.
        source: where that number stands, and how it was measured where that is said.
        asked: options of `innerloop eval`.
    """

    name: str
    published: float | None
    source: str
    asked: tuple[str, ...] = TASK

    def command(self, out: Path) -> list[str]:
        """Return the command that measures it."""
        return ["innerloop", "eval", self.name, *self.asked, "--out", str(out / self.name.replace("/", "--"))]


RELEASED = (
    Released("ModalityDance/latent-tts-coconut", 34.1, "Coconut, 2412.06769; this release has no number of its own"),
    Released("ModalityDance/latent-tts-codi", 43.7, "CODI, 2502.21074; this release has no number of its own"),
    Released("zen-E/CODI-gpt2", 43.7, "2502.21074"),
    Released("zen-E/CODI-llama3.2-1b-Instruct", 55.6, "2502.21074; run again in 2509.20317: 52.7"),
    Released("internlm/SIM_COT-GPT2-Coconut", 44.8, "2509.20317"),
    Released("internlm/SIM_COT-GPT2-CODI", 42.6, "2509.20317"),
    Released("internlm/SIM_COT-LLaMA3-CODI-1B", 56.1, "2509.20317"),
    Released("internlm/SIM_COT-LLaMA3-CODI-3B", 62.3, "2509.20317"),
    Released("internlm/SIM_COT-LLaMA3-CODI-8B", 64.1, "2509.20317"),
    Released("yingfanbot/gsm-lotus-llama3b", 70.05, "the repository yingfan-bot/lotus"),
    Released("yingfanbot/gsm-lotus-llama3b-codi", 70.58, "the repository yingfan-bot/lotus"),
    Released("yingfanbot/gsm-cot-gpt2", None, "the first stage of the repository yingfan-bot/lotus"),
    Released("yingfanbot/gsm-cot-llama1b", None, "the first stage of the repository yingfan-bot/lotus"),
    Released("yingfanbot/gsm-cot-llama3b", 71.5, "2606.31779, as CoT; this release has no number of its own"),
    Released("ByteDance/Ouro-1.4B", 78.92, "2510.25741", HARNESS),
    Released("ByteDance/Ouro-2.6B", None, "2510.25741", HARNESS),
    Released("ByteDance/Ouro-1.4B-Thinking", None, "2510.25741", HARNESS),
    Released("ByteDance/Ouro-2.6B-Thinking", None, "2510.25741", HARNESS),
    Released("tomg-group-umd/huginn-0125", 42.1, "2502.05171: flexible match at 32 iterations", HARNESS),
    Released("smcleish/Recurrent-Llama-3.2-train-recurrence-32", 49.4, "2511.07384: 32 iterations", HARNESS),
    Released("smcleish/Recurrent-TinyLlama-3T-train-recurrence-32", 45.0, "2511.07384: 32 iterations", HARNESS),
    Released("smcleish/Recurrent-OLMo-2-0425-train-recurrence-32", 51.6, "2511.07384: 32 iterations", HARNESS),
    Released("nics-efc/TaH-plus-1.7B", None, "2511.08577 gives the mean of nine benchmarks: 53.7", HARNESS),
    Released("GSAI-ML/LLaDA-8B-Base", 70.3, "2502.09992: 1024 tokens, as many passes", HARNESS),
    Released("GSAI-ML/LLaDA-8B-Instruct", 77.5, "the repository ML-GSAI/LLaDA: blocks of 32", HARNESS),
    Released("GSAI-ML/LLaDA-1.5", None, "the repository ML-GSAI/LLaDA-1.5", HARNESS),
    Released("Dream-org/Dream-v0-Base-7B", 77.2, "2508.15487, of a summary", HARNESS),
    Released("Dream-org/Dream-v0-Instruct-7B", None, "2508.15487", HARNESS),
    Released("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", 29.8, "the repository ZHZisZZ/dllm: 256 passes", HARNESS),
    Released("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", 46.6, "the repository ZHZisZZ/dllm: blocks of 32", HARNESS),
    Released("ParScale/ParScale-1.8B-P1", 28.7, "2505.10475", HARNESS),
    Released("ParScale/ParScale-1.8B-P2", None, "2505.10475, table 4", HARNESS),
    Released("ParScale/ParScale-1.8B-P4", None, "2505.10475, table 4", HARNESS),
    Released("ParScale/ParScale-1.8B-P8", 38.4, "2505.10475", HARNESS),
)


def measured(folder: Path) -> float | None:
    """Return the accuracy in percent that a command has written; None where there is none."""
    if (folder / "result.json").exists():
        return 100 * json.loads((folder / "result.json").read_text())["accuracy"]
    if not (folder / "lm_eval.json").exists():
        return None
    results = json.loads((folder / "lm_eval.json").read_text())["results"]
    found = [value for task in results.values() for name, value in task.items() if name.startswith("exact_match,")]
    return 100 * max(found) if found else None


def line(one: Released, found: float | None = None) -> str:
    """Return what is known of a checkpoint in one line."""
    told = "no number" if one.published is None else f"{one.published} %"
    ours = "" if found is None else f", here {found:.1f} %"
    return f"{one.name}: GSM8K {told} ({one.source}){ours}"


def main() -> None:
    """List all, or run some."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--run", nargs="+", default=[], metavar="NAME", help="checkpoints to measure")
    options.add_argument("--out", type=Path, default=Path("runs/released"), help="the folder for results")
    asked = options.parse_args()
    known = {one.name: one for one in RELEASED}
    if unknown := [name for name in asked.run if name not in known]:
        sys.exit(f"there is no {unknown[0]} in the list; without --run it is printed")
    for one in RELEASED:
        if not asked.run:
            print(line(one), f"    {shlex.join(one.command(asked.out))}", sep="\n")
        elif one.name in asked.run:
            command = one.command(asked.out)
            subprocess.run(command, check=True)
            print(line(one, measured(Path(command[-1]))))


if __name__ == "__main__":
    main()
