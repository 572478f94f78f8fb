"""Make a run of a released ParScale checkpoint (huggingface.co/ParScale): Qwen2 with prefixes and a mixture of streams.

    python scripts/parscale_checkpoint.py FOLDER OUT
    innerloop ask OUT "..."

FOLDER is the checkpoint as it was downloaded; its own code is neither needed nor run.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from innerloop import InputError, LatentModel, ParScale
from innerloop.decoder.backbone import Backbone
from innerloop.errors import few

OWN = ("parscale_n", "parscale_n_tokens", "parscale_attn_smooth", "model_type", "architectures", "auto_map")
MIXTURE = {"model.aggregate_layer.0.": "depth.mix.inner.", "model.aggregate_layer.2.": "depth.mix.outer."}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the released checkpoint")
    parser.add_argument("out", type=Path, help="the run to write")
    options = parser.parse_args()
    opened(options.folder).save_pretrained(options.out)
    print(options.out)


def opened(folder: Path) -> LatentModel:
    """Return the model of a released checkpoint.

    Raises:
        InputError: it is none, or its weights are not those that its configuration says.
    """
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("model_type") != "qwen2_parscale":
        raise InputError(f"{folder} is no ParScale checkpoint: its model_type is {settings.get('model_type')}")
    method = ParScale(
        streams=settings["parscale_n"],
        n_prefix=settings["parscale_n_tokens"],
        smoothing=settings["parscale_attn_smooth"],
    )
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    parts = {own: weights.pop(name) for name in list(weights) if (own := part_of(name))}
    lm = Qwen2ForCausalLM(Qwen2Config(**{name: value for name, value in settings.items() if name not in OWN}))
    dtype = weights["model.embed_tokens.weight"].dtype
    missing, unexpected = lm.to(dtype).load_state_dict(weights, strict=False)
    model = LatentModel(Backbone(lm), AutoTokenizer.from_pretrained(folder), method)
    own = torch.nn.ModuleDict(model.trained_modules())
    wrong = {*missing, *unexpected} - ({"lm_head.weight"} if tied(lm) else set())
    wrong |= {name for name in own.state_dict() if name.startswith("depth.")} ^ parts.keys()
    if wrong:
        raise InputError(f"{folder} holds other weights than its configuration says: {few(sorted(wrong))} differ")
    own.load_state_dict({**own.state_dict(), **parts})
    return model.eval()


def part_of(name: str) -> str | None:
    """Return what a weight of the prefixes or of the mixture is called here; None: it is the decoder's."""
    for theirs, ours in MIXTURE.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    *_, layer, _, last = ("", "", *name.split("."))
    side = {"prefix_k": "keys", "prefix_v": "values"}.get(last)
    return f"depth.prefixes.{side}.{layer}" if side else None


def tied(lm: Qwen2ForCausalLM) -> bool:
    """Whether the head is the table of embeddings."""
    return lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


if __name__ == "__main__":
    main()
