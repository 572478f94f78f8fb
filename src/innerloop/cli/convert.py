"""The verb that makes a folder of ours of weights that others have released."""

from __future__ import annotations

from shlex import join

from innerloop.cli.arguments import console, writable
from innerloop.disk.names import check_folder
from innerloop.errors import refuse
from innerloop.model import run_folder


def convert(name: str, out: str, dtype: str = "auto") -> None:
    """Write released weights of a known format as a folder of ours: safetensors, under the names of a stock class.

    Args:
        name: a folder or a Hub name.
        out: the folder to write.
        dtype: of the weights: fp32, bf16 or fp16; auto keeps the file's.
    """
    folder = check_folder(out, "OUT")
    refuse(
        (run_folder.is_run(name), f"{name} is a folder of ours already"),
        (
            not run_folder.says_method(name),
            f"{name} has none of the formats that can be converted, which docs/formats.md lists; put a method on it "
            "with --method instead, as in innerloop ask",
        ),
        (folder.exists() and any(folder.iterdir()), f"{folder} is not empty: give another OUT"),
    )
    from innerloop.engine.latent_model import LatentModel

    LatentModel.from_pretrained(name, dtype=dtype, device="cpu").save_pretrained(writable(folder))
    console.print(f"{folder} is written; next: {join(['innerloop', 'ask', str(folder), '...'])}", soft_wrap=True)
