"""Two processes, whole weights (DDP) or weights in parts (FSDP2): losses, gradients, logs and files of one process.

One process has the same micro-batches one after the other. accelerate shards over several GPUs alone; here it is told
that gloo's processes on a CPU are such, so that its own code and the trainer's run.
"""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as fsdp
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from innerloop import InputError, LatentModel, Llada, Mor, Slr
from innerloop.decoder.adapters import add_lora
from innerloop.methods import Looped
from tests.methods.tools import QUESTIONS
from tests.models import tiny_model
from tests.test_distributed import TORCHRUN, launched
from tests.test_trainer import At, make_trainer, uneven_examples

METHODS = {
    "lora": Slr(n_slots=3, max_loops=2, step_weight=1.0),
    "slr": Slr(n_slots=3, max_loops=3),
    "looped": Looped(max_loops=2),
    "mor": Mor(),
    "llada": Llada(gen_length=32),
}
CHECKPOINTED = ("lora", "mor")
KINDS = ["ddp", "fsdp"]
PARTS = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
SETTINGS = {
    "ema_decay": 0.5,
    "batch_size": 4,
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-2,  # divided by what is almost 0, a rounding would be a step
}


def trainer(folder: Path, name: str, kind: str, n_micro: int):
    model = tiny_model(METHODS[name])
    if name == "lora":
        torch.manual_seed(0)
        add_lora(model.backbone, model.marker_ids(), {"r": 4, "lora_alpha": 8})
    is_first = True

    def keep(step: int, given: dict) -> None:
        nonlocal is_first
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        full = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
        if is_first:
            torch.save({n: g.clone() for n, g in full.items()}, folder / "grads.pt")
        is_first = False

    class Keep(At):
        def on_step_end(self, *args, **given):
            pass

        def on_pre_optimizer_step(self, args, state, control, **given):
            if state.is_world_process_zero or kind == "fsdp":
                keep(state.global_step, given)

    folder.mkdir(parents=True, exist_ok=True)
    more = PARTS if kind == "fsdp" else {}
    settings = {**SETTINGS, "gradient_accumulation_steps": n_micro, **more}
    settings["activation_checkpointing"] = name in CHECKPOINTED
    return make_trainer(folder, model, uneven_examples(), callbacks=[Keep(None, None)], **settings)


def as_gpus(init=PartialState.__init__) -> None:
    """Let accelerate take the processes for such of GPUs from now on."""

    def taken(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = taken


@contextmanager
def gathers_counted():
    """Yield a list that grows with each time that weights are gathered."""
    found, gather = [], fsdp.foreach_all_gather
    fsdp.foreach_all_gather = lambda *args, **known: found.append(1) or gather(*args, **known)
    yield found
    fsdp.foreach_all_gather = gather


def of_two(folder: Path) -> None:
    """What each of two processes does."""
    try:
        trainer(folder / "refused", "slr", "fsdp", 2)
    except InputError as error:
        (folder / "refused.txt").write_text(str(error))
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # transformers has set it
    for kind in KINDS:
        if kind == "fsdp":
            as_gpus()
        for name in METHODS:
            with gathers_counted() as n:
                trainer(folder / kind / name, name, kind, 2).train()
            (folder / kind / name / "gathers").write_text(str(len(n)))
            again = trainer(folder / kind / f"{name}, resumed", name, kind, 2)
            again.train(resume_from_checkpoint=str(folder / kind / name / "checkpoint-2"))
            with again._averaged():  # as in validation
                texts = [one.text for one in again.model.generate(QUESTIONS, max_new_tokens=4)]
            (folder / kind / f"{name}, resumed" / f"texts_{os.environ['RANK']}").write_text(json.dumps(texts))


def killed_once(folder: Path) -> None:
    """Train in parts; the first time one of the two is killed after the third step."""
    as_gpus()
    again = (folder / "begun").exists()
    one = trainer(folder / "run", "slr", "fsdp", 2)
    if not again and os.environ["RANK"] == "1":
        one.add_callback(At(3, lambda *_: (folder / "begun").touch() or os.kill(os.getpid(), signal.SIGKILL)))
    one.train(resume_from_checkpoint=again or None)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launched(TORCHRUN, script(folder, "of_two"))
    return folder


def script(folder: Path, function: str) -> Path:
    """Write what calls a function of this file for its own folder."""
    code = f"from pathlib import Path\nfrom {__name__} import {function}\n{function}(Path(__file__).parent)"
    (folder / "run.py").write_text(code)
    return folder / "run.py"


def lines(folder: Path) -> list[dict]:
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if "loss" in line]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "innerloop.safetensors")
    return {f"{file}: {n}": t for file in files for n, t in load_file(folder / "checkpoint" / file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_losses_gradients_logs_and_files_are_those_of_one_process(name, two: Path, tmp_path: Path):
    trainer(tmp_path, name, "one", 4).train()
    for kind in KINDS:
        folder = two / kind / name
        assert len(lines(folder)) == SETTINGS["max_steps"]
        for line, expected in zip(lines(folder), lines(tmp_path), strict=True):
            norms = [one.pop("grad_norm") for one in (line, expected)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5), kind
            assert line == pytest.approx(expected, rel=2e-6), kind
        torch.testing.assert_close(
            torch.load(folder / "grads.pt"), torch.load(tmp_path / "grads.pt"), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(tensors(folder), tensors(tmp_path), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_resumed_to_the_same_weights_and_answers_meanwhile(name, kind, two: Path):
    folder = two / kind / f"{name}, resumed"
    torch.testing.assert_close(tensors(folder), tensors(two / kind / name), rtol=0, atol=0)
    saved = LatentModel.from_pretrained(folder / "checkpoint")
    texts = [one.text for one in saved.generate(QUESTIONS, max_new_tokens=4)]
    assert [json.loads((folder / f"texts_{rank}").read_text()) for rank in (0, 1)] == [texts, texts]


@pytest.mark.slow
def test_after_one_process_was_killed_both_go_on_to_the_same_weights(two: Path, tmp_path: Path):
    run = script(tmp_path, "killed_once")
    with pytest.raises(AssertionError, match="Signal 9"):
        launched(TORCHRUN, run)
    assert (tmp_path / "run" / "checkpoint-2").exists() and not (tmp_path / "run" / "checkpoint").exists()
    launched(TORCHRUN, run)
    torch.testing.assert_close(tensors(tmp_path / "run"), tensors(two / "fsdp" / "slr"), rtol=0, atol=0)


@pytest.mark.slow
def test_a_layer_is_gathered_once_for_a_batch_however_often_it_loops(two: Path):
    n_parts, n_batches = 3 + 1, SETTINGS["max_steps"] * 2  # layers, and what is in none
    for name in set(METHODS) - set(CHECKPOINTED):
        assert int((two / "fsdp" / name / "gathers").read_text()) == n_parts * n_batches
        assert int((two / "ddp" / name / "gathers").read_text()) == 0


@pytest.mark.slow
def test_weights_in_parts_are_refused_where_nobody_would_part_them(two: Path):
    assert "accelerate shards weights over several GPUs alone" in (two / "refused.txt").read_text()
