"""What every method of the depth family does: it learns, goes on after a stop, is saved and loaded, and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from innerloop import (
    AdaInfer,
    InputError,
    LatentModel,
    LatentTrainer,
    Looped,
    LoopRegularised,
    Mod,
    Mor,
    ParScale,
    RecurrentDepth,
    RelaxedRecursive,
    Tah,
)
from innerloop.methods import METHODS, Method
from innerloop.train.training_arguments import training_arguments
from tests.close import assert_close
from tests.fields import change, make
from tests.methods.tools import MIXED, gradients, learn, stir
from tests.models import answers_of, chain_examples, saved, tiny_model

SMALL_LORA = {"lora": "per_iter", "lora_rank": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GATED = {"stop": {"rule": "halt"}, "exits": {"gate": "distribution"}}
CORE = {"n_prelude": 1, "n_core": 2, "n_coda": 1, "max_loops": 5}
DEPTH: dict[str, Method] = {
    "looped": Looped(n_prelude=1, input_injection=True, loop=SMALL_LORA, exits={"weight": 0.5}),
    "looped, gate": Looped(n_coda=1, loop_sampling="uniform", loop={"time": "lookup"}, **GATED),
    "loop_regularised": LoopRegularised(block_size=2, ramp_steps=3),
    "relaxed_recursive": RelaxedRecursive(rank=2, exits={"weight": 0.1, "kd": 1.0}),
    "mod": Mod(capacity=0.4, gate="sigmoid", capacity_warmup=5),
    "mod, predictor": Mod(capacity=0.4, causality="predictor", gate="st"),
    "mod, calibrated": Mod(capacity=0.4, causality="calibrated", capacity_warmup=5),
    "mor": Mor(capacity_warmup=5),
    "mor, aux router": Mor(causality="aux_router", kv="recursive_sharing"),
    "mor, token": Mor(routing="token", balancing="loss_free"),
    "tah": Tah(tau=0.4, lora={"rank": 2, "dropout": 0.0}, decider={"width": 8, "blocks": 1, "dropout": 0.0}),
    "recurrent_depth": RecurrentDepth(**CORE, bptt=2, ramp="linear", ramp_steps=4, adapter_init="default"),
    "adainfer": AdaInfer(layers=(2, 3), exits={"weight": 0.7, "schedule": "linear"}, stop={"rule": "top_prob"}),
    "parscale": ParScale(streams=2, n_prefix=3, prefix_bias=-1.0),
    "parscale, looped": ParScale(streams=3, n_prefix=2, n_prelude=1, max_loops=2),
}
named = [pytest.param(method, id=name) for name, method in DEPTH.items()]
by_method = pytest.mark.parametrize("method", named)


def model_of(method: Method, arch: str = "llama", seed: int = 0) -> LatentModel:
    """Make a model of four layers without dropout, nothing of it at a start where it does nothing."""
    model = tiny_model(method, arch, seed, num_hidden_layers=4, **(NO_DROPOUT if arch == "gpt2" else {}))
    stir(model)
    return model


def test_they_are_listed():
    assert {type(method) for method in DEPTH.values()} == {m for m in METHODS.values() if m.family == "depth"}


@by_method
def test_a_saved_model_answers_as_before_and_needs_no_method_to_be_told(method, tmp_path: Path):
    model = model_of(method)
    for buffer in (one for one in model.depth.buffers() if one.is_floating_point()):
        buffer += 0.1
    again = LatentModel.from_pretrained(saved(model, tmp_path / "run"))
    assert again.method == method and torch.equal(answers_of(again), answers_of(model))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [name for name in DEPTH if not name.startswith(("mo", "tah", "adainfer"))])
def test_activation_checkpointing_changes_no_gradient(name, arch):
    """Also of a state that begins as noise; routers, oracles and exits between layers have tests of their own."""
    model = model_of(DEPTH[name], arch).double().train()
    plain, again = (_gradients(model, keeps_little) for keeps_little in (False, True))
    for weight in plain:
        assert_close(again[weight], plain[weight])


def _gradients(model: LatentModel, keeps_little: bool) -> dict[str, torch.Tensor]:
    if keeps_little:
        model.activation_checkpointing_enable()
    torch.manual_seed(0)
    return gradients(model, model.loss(MIXED).loss)


@pytest.mark.parametrize("method", [one for one in named if one.id not in ("tah", "mod", "mor, aux router")])
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(method, tmp_path: Path):
    if isinstance(method, RelaxedRecursive):
        folder = saved(tiny_model(Looped(max_loops=1), num_hidden_layers=4), tmp_path / "original")
        method = change(method, kd={"teacher": str(folder), "weight": 1.0})

    def trained(folder: str, n_steps: int, seed: int = 0, resume: bool = False) -> tuple[LatentModel, list[dict]]:
        settings: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "save_steps": 2, "logging_steps": 1}
        settings |= {"use_cpu": True, "activation_checkpointing": isinstance(method, Looped)}
        args = training_arguments(tmp_path / folder, {**settings, "max_steps": n_steps})
        model = model_of(method, seed=seed)
        LatentTrainer(model, args, list(chain_examples(8))).train(resume_from_checkpoint=resume)
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        logged = ({k: v for k, v in line.items() if k.startswith(("loss", "stage"))} for line in lines)
        return model, [line for line in logged if "loss" in line]

    whole, losses = trained("whole", 4)
    trained("part", 2)
    again, logged = trained("part", 4, seed=1, resume=True)
    assert logged == losses and len(losses) == 4
    for (name, ours), theirs in zip(again.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        Looped(n_prelude=1),
        RelaxedRecursive(rank=2),
        ParScale(n_prefix=2),
        RecurrentDepth(n_prelude=1, n_coda=0, max_loops=3, adapter_init="default"),
        Mor(),
        Mor(kv="recursive_sharing", gate="st", gate_target="delta", aux_weight=0.1),
        Mor(routing="token", balance_weight=0.01),  # the term itself never falls below 1
    ],
    ids=lambda method: f"{method.name}",
)
def test_eight_examples_are_learnt_by_heart(method, examples):
    model = tiny_model(method, num_hidden_layers=3 if isinstance(method, Mor) else 2, initializer_range=0.1)
    assert learn(model, examples) < 0.05
    generations = model.generate([example.question for example in examples], max_new_tokens=40)
    assert [generation.answer for generation in generations] == [example.answer for example in examples]


GATE, JUDGED = {"stop.rule": "halt", "exits.gate": "improvement"}, {"iterate": "oracle", "oracle.reference": "x"}
REFUSED: list[tuple[type[Method], dict[str, Any], str]] = [
    (Looped, {"n_prelude": -1}, "n_prelude is -1, but must be"),
    (Looped, {"max_loops": 0}, "max_loops is 0, but must be"),
    (Looped, {"kv_missing": "restrict"}, "kv_missing is for tokens that stop: set stop.rule"),
    (Looped, {"stop.rule": "kl", "kv_share": "mean"}, "set stop.rule or kv_share to none"),
    (Looped, {"exits.gate": "distribution"}, "set stop.rule to halt"),
    (Looped, {**GATE, "max_loops": 1}, "set max_loops to at least 2"),
    (Looped, {**GATE, "loop_sampling": "uniform"}, "loop_sampling to fixed"),
    (Looped, {**GATE, "exits.weight": 1.0}, "set exits.weight to 0, or exits.gate to none"),
    (Looped, {"exits.weight": -1.0}, "weight is -1.0, but must be"),
    (Looped, {"init": "average"}, "give both init and n_block, or neither"),
    (Looped, {"n_block": 2}, "give both init and n_block, or neither"),
    (Looped, {"init": "midle_dup"}, "did you mean 'middle_dup'"),
    (LoopRegularised, {"block_size": 0}, "block_size is 0, but must be"),
    (LoopRegularised, {"cosine_weight": -1.0}, "cosine_weight is -1.0, but must be"),
    (LoopRegularised, {"cosine_weight": 0.0, "ramp_steps": 3}, "set cosine_weight above 0, or ramp_steps to 0"),
    (RelaxedRecursive, {"rank": -1}, "rank is -1, but must be"),
    (RelaxedRecursive, {"rank": 0, "lora_init": "zero"}, "set rank, or leave lora_init out"),
    (RelaxedRecursive, {"kd.teacher": "runs/x"}, "give both kd.teacher and kd.weight, or neither"),
    (RelaxedRecursive, {"kd.weight": 1.0}, "give both kd.teacher and kd.weight, or neither"),
    (RelaxedRecursive, {"kd.weight": -1.0}, "weight is -1.0, but must be"),
    (RelaxedRecursive, {"kd.temperature": 0.0}, "temperature is 0.0, but must be"),
    (RelaxedRecursive, {"exits.kd": 1.0}, "set exits.weight above 0"),
    (Mod, {"capacity": 0.0}, "capacity is 0.0, but must be"),
    (Mod, {"capacity_warmup": -1}, "capacity_warmup is -1, but must be"),
    (Mod, {"aux_weight": -1.0}, "aux_weight is -1.0, but must be"),
    (Mod, {"alpha": 0.1}, "alpha is for gate=scaled_sigmoid"),
    (Mod, {"routed_layers": (1, 1)}, "routed_layers lists a layer twice"),
    (Mor, {"n_recursions": 0}, "n_recursions is 0, but must be"),
    (Mor, {"capacities": (1.0, 0.5)}, "capacities must list 3 shares"),
    (Mor, {"capacities": (1.0, 0.5, 0.6)}, "list capacities that never rise"),
    (Mor, {"z_weight": -1.0}, "z_weight is -1.0, but must be"),
    (Mor, {"alpha": 0.1, "gate": "st"}, "alpha is for gate=scaled_sigmoid"),
    (Mor, {"routing": "token", "routing_mode": "topk"}, "are for routing=expert"),
    (Mor, {"tc_weighting": "every"}, "are for routing=token"),
    (Mor, {"kv": "recursive_sharing", "sharing": "sequence"}, "set sharing to cycle or middle_cycle"),
    (Mor, {"kv": "recursive_sharing", "capacities": (0.9, 0.5, 0.2)}, "the first of capacities to 1"),
    (Tah, {"max_loops": 0}, "max_loops is 0, but must be"),
    (Tah, {"input_mix_topk": 0}, "input_mix_topk is 0, but must be"),
    (Tah, {"lora.rank": 0}, "lora.rank must be at least 1"),
    (Tah, {"lora.dropout": 1.0}, "dropout is 1.0, but must be"),
    (Tah, {"decider.width": 0}, "width is 0, but must be"),
    (Tah, {"decider.blocks": -1}, "blocks is -1, but must be"),
    (Tah, {"decider.dropout": -0.1}, "dropout is -0.1, but must be"),
    (Tah, {**JUDGED, "oracle.share": 0.3}, "mismatch has a share of its own"),
    (Tah, {"oracle.share": 1.0}, "share is 1.0, but must be"),
    (Tah, {"tau": -0.1}, "tau is -0.1, but must be"),
    (Tah, {"pos_weight": 0.0}, "pos_weight is 0.0, but must be"),
    (Tah, {**JUDGED, "trains": "decider"}, "set iterate to decider and max_loops to at least 2"),
    (Tah, {"trains": "decider", "max_loops": 1}, "set iterate to decider and max_loops to at least 2"),
    (Tah, {"trains": "decider"}, "set oracle.reference to the folder of a run, or to a model"),
    (Tah, {"iterate": "oracle"}, "set oracle.reference to the folder of a run, or to a model"),
    (Tah, {"oracle.reference": "x"}, "set iterate to oracle or trains to decider, or drop them"),
    (Tah, {"oracle.cache": "x"}, "set iterate to oracle or trains to decider, or drop them"),
    (RecurrentDepth, {"n_prelude": 0}, "n_prelude is 0, but must be"),
    (RecurrentDepth, {"n_coda": -1}, "n_coda is -1, but must be"),
    (RecurrentDepth, {"n_core": 0}, "n_core is 0, but must be"),
    (RecurrentDepth, {"bptt": 0}, "bptt is 0, but must be"),
    (RecurrentDepth, {"kv_lookup": "compress", "kv_slots": 0}, "kv_slots is 0, but must be"),
    (RecurrentDepth, {"max_loops": 0}, "max_loops is 0, but must be"),
    (RecurrentDepth, {"state_std": -1.0}, "state_std is -1.0, but must be"),
    (RecurrentDepth, {"drops": False, "n_core": 3}, "leave n_core out"),
    (RecurrentDepth, {"ramp": "linear"}, "ramp and ramp_steps belong together"),
    (RecurrentDepth, {"ramp_steps": 5}, "ramp and ramp_steps belong together"),
    (RecurrentDepth, {"injection": "add", "adapter_init": "mean"}, "adapter_init is for injection=concat"),
    (RecurrentDepth, {"kv_slots": 4}, "kv_slots is for kv_lookup=compress or anchor"),
    (RecurrentDepth, {"stop.rule": "halt"}, "choose another score"),
    (RecurrentDepth, {"stop.rule": "act"}, "choose another score"),
    (AdaInfer, {"layers": (3, 2)}, "ascending"),
    (AdaInfer, {"layers": (0, 2)}, "each at least 1"),
    (AdaInfer, {"stop.rule": "gap", "n_candidates": 1}, "at least 2"),
    (AdaInfer, {"n_candidates": 4}, "set stop.rule"),
    (AdaInfer, {"kv_missing": "propagate"}, "set stop.rule"),
    (AdaInfer, {"stop.rule": "act"}, "choose another score"),
    (ParScale, {"streams": 0}, "streams is 0, but must be"),
    (ParScale, {"n_prefix": -1}, "n_prefix is -1, but must be"),
    (ParScale, {"smoothing": 1.1}, "smoothing is 1.1, but must be"),
    (ParScale, {"max_loops": 0}, "max_loops is 0, but must be"),
]


def test_impossible_settings_are_refused_in_one_sentence():
    for cls, fields, message in REFUSED:
        with pytest.raises(InputError, match=message) as caught:
            make(cls, **fields)
        assert "\n" not in str(caught.value)
