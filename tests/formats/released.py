"""All layouts by the name of a folder: what writes each, and the weights of it that a test may change."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.formats import authors, authors_depth, authors_latent

RELEASED = {
    "LLaDA-8B": authors.llada,
    "Dream-v0": authors.dream,
    "mdlm": authors.a2d,
    "bd3lm": authors.a2d,
    "latent-tts-coconut": authors_latent.latent_tts,
    "latent-tts-codi": authors_latent.latent_tts_codi,
    "CODI-gpt2": authors_latent.codi,
    "CODI-llama3.2-1b-Instruct": authors_latent.codi_llama,
    "SIM_COT-GPT2-CODI": authors_latent.simcot_codi,
    "SIM_COT-GPT2-Coconut": authors_latent.simcot_coconut,
    "gsm-lotus-llama3b": authors_latent.lotus,
    "Ouro-1.4B": authors_depth.ouro,
    "huginn-0125": authors_depth.huginn,
    "Recurrent-Llama-3.2-train-recurrence-32": authors_depth.retrofit,
    "Recurrent-OLMo-2-0425-train-recurrence-32": authors_depth.retrofit_olmo,
    "ParScale-1.8B-P2": authors_depth.parscale,
    "TaH-plus-1.7B": authors_depth.tah,
}


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a layout."""
    names = ("*.safetensors", "pytorch_model*.bin", "checkpoint_*")
    return sorted(path for name in names for path in folder.glob(name))


def read(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
