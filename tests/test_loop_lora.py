"""Loop-wise LoRA: targets, iterations past the bank, merging, export, checkpointing and compilation."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from innerloop import InputError, Slr
from innerloop.decoder.backbone import Backbone
from innerloop.loop.lora import LoopLora
from innerloop.passes.context import Context
from tests.close import assert_close
from tests.methods.tools import MIXED, assert_same_gradients, by_arch, gradients
from tests.models import random_ids, tiny_backbone, tiny_lm, tiny_model

IDS = random_ids(2, 6)


def bank_on(backbone: Backbone, n_loops: int = 3, rank: int = 2, gamma: float = 4.0, **options) -> LoopLora:
    """Make a bank whose updates are not zero."""
    bank = LoopLora(backbone, n_loops, rank, gamma, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for up in bank.up.values():
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return bank


def logits(backbone: Backbone, bank: LoopLora | None = None, loop: int = 0) -> Tensor:
    with torch.no_grad(), nullcontext() if bank is None else bank.at(loop):
        return backbone.head(backbone(backbone.embed(IDS)))


MLP = {"gate_proj", "up_proj", "down_proj"}
LINEARS = {"gpt2": {"c_attn", "c_proj", "c_fc"}, "llama": {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}}


@pytest.mark.parametrize(
    ("arch", "targets", "names", "n_found"),
    [
        ("gpt2", (), LINEARS["gpt2"], 3 * 4),  # attention and MLP have a c_proj each
        ("llama", (), LINEARS["llama"], 3 * 7),
        ("gpt2", ("c_attn",), {"c_attn"}, 3),
        ("llama", ("q_proj",), {"q_proj"}, 3),
        ("llama", ("*_proj",), LINEARS["llama"], 3 * 7),
        ("llama", ("[qv]_proj",), {"q_proj", "v_proj"}, 3 * 2),
        ("llama", ("*.mlp.*",), MLP, 3 * 3),
        ("llama", ("1.mlp.*", "2.self_attn.q_proj"), {*MLP, "q_proj"}, 3 + 1),
    ],
    ids=str,
)
def test_targets_are_all_attention_and_mlp_linears_or_those_of_names_and_patterns(arch, targets, names, n_found):
    found = bank_on(tiny_backbone(arch), targets=targets).modules_by_name
    assert {name.rsplit(".", 1)[-1] for name in found} == names
    assert len(found) == n_found and not any("lm_head" in name for name in found)


@pytest.mark.parametrize(
    ("arch", "targets", "message"),
    [
        *(
            (arch, (one, f"{one}s"), f"no linear '{one}s' .did you mean '{one}'.*its linears are .*{one}")
            for arch, one in (("gpt2", "c_attn"), ("llama", "q_proj"))
        ),
        ("llama", ("q_proj", "9.mlp.*"), r"no linear '9\.mlp\.\*'"),
        ("gpt2", ("nonsense",), "c_attn"),
    ],
)
def test_a_target_that_the_model_lacks_is_refused_though_others_exist(arch, targets, message):
    with pytest.raises(InputError, match=message):
        LoopLora(tiny_backbone(arch), 2, 2, 4.0, targets=targets)


@by_arch
def test_every_iteration_has_weights_of_its_own_and_outside_the_block_the_base_is_used(arch):
    backbone = tiny_backbone(arch)
    plain = logits(backbone)
    bank = bank_on(backbone)
    each = [logits(backbone, bank, loop) for loop in (1, 2, 3)]
    for i, one in enumerate(each):
        assert (one - plain).abs().max() > 1e-3
        assert all((one - other).abs().max() > 1e-3 for other in each[:i])
    assert torch.equal(logits(backbone), plain)


@by_arch
def test_a_hooked_linear_is_w_plus_gamma_over_r_times_b_a(arch):
    backbone = tiny_backbone(arch)
    bank = bank_on(backbone, rank=2, gamma=6.0)
    for name, module in list(bank.modules_by_name.items())[:4]:
        key = name.replace(".", "/")
        x = torch.randn(3, bank.down[key].shape[2], generator=torch.Generator().manual_seed(2))
        expected = module(x) + 3.0 * (x @ bank.down[key][1].T @ bank.up[key][1].T)
        with bank.at(2):
            assert_close(module(x), expected)
        assert_close(bank.delta(name, 2), 3.0 * bank.up[key][1] @ bank.down[key][1])


def test_blocks_may_be_nested_and_are_left_after_an_error():
    backbone = tiny_backbone()
    bank = bank_on(backbone)
    with bank.at(1):
        with bank.at(2):
            assert bank.entry == 1
        assert bank.entry == 0
    with pytest.raises(ZeroDivisionError), bank.at(3):
        raise ZeroDivisionError
    assert bank.entry is None


@pytest.mark.parametrize("kind", ["per_iter", "shared"])
@pytest.mark.parametrize(
    ("beyond", "expected"),
    [("clamp", [0, 1, 2, 2, 2, 2, 2]), ("cycle", [0, 1, 2, 0, 1, 2, 0]), ("off", [0, 1, 2, *[None] * 4])],
)
def test_iterations_past_the_bank_use_the_last_update_or_start_over_or_none(tmp_path, kind, beyond, expected):
    backbone = tiny_backbone()
    plain = logits(backbone)
    bank = bank_on(backbone, kind=kind, beyond=beyond)
    expected = [None if one is None else one * (kind == "per_iter") for one in expected]
    assert [bank.index(loop) for loop in range(1, 8)] == expected
    assert torch.equal(logits(backbone, bank, 5), plain) == (beyond == "off")
    assert next(iter(bank.up.values())).shape[0] == (1 if kind == "shared" else 3)
    if beyond == "off":
        with pytest.raises(InputError, match="lora_beyond is off"):
            bank.export(tmp_path / "new", 4, "base")
        assert not (tmp_path / "new").exists()


@by_arch
def test_merged_weights_come_back_bit_for_bit(arch):
    backbone = tiny_backbone(arch)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    bank = bank_on(backbone)
    expected = logits(backbone, bank, 2)
    with bank.merged(2):
        assert_close(logits(backbone), expected)
    with pytest.raises(ZeroDivisionError), bank.merged(1):
        raise ZeroDivisionError
    after = backbone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize(
    ("arch", "targets"), [("gpt2", ()), ("gpt2", ("c_proj",)), ("llama", ()), ("llama", ("q_proj", "up_proj"))], ids=str
)
def test_peft_loads_an_exported_iteration_and_gives_the_same_logits(arch, targets, tmp_path):
    lm = tiny_lm(arch)
    lm.save_pretrained(tmp_path / "base")
    backbone = Backbone(lm)
    bank = bank_on(backbone, targets=targets, rank=2, gamma=5.0)
    bank.export(tmp_path / "loop2", 2, str(tmp_path / "base"))
    fresh = type(lm).from_pretrained(tmp_path / "base").eval()
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "loop2").eval()
    with torch.no_grad():
        theirs = loaded(input_ids=IDS).logits
    assert_close(theirs, logits(backbone, bank, 2))
    assert (theirs - logits(backbone)).abs().max() > 1e-3
    assert json.loads((tmp_path / "loop2" / "adapter_config.json").read_text())["r"] == 2


@by_arch
@pytest.mark.parametrize("solver", ["none", "anderson"])
def test_checkpointed_passes_give_equal_gradients_with_loop_wise_weights(arch, solver):
    loop = {"lora": "per_iter", "lora_rank": 2} | ({"lora": "shared", "time": "none"} if solver != "none" else {})
    model = tiny_model(Slr(n_slots=3, max_loops=3, loop=loop, fixed_point={"solver": solver}), arch).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for up in model.loop.lora.up.values():
            up.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    expected = gradients(model, model.loss(MIXED).loss)
    model.activation_checkpointing_enable()
    assert_same_gradients(gradients(model, model.loss(MIXED).loss), expected, 1e-4)
    assert min(expected[f"loop.lora.up.{name}"].abs().max() for name in model.loop.lora.up) > 0


def test_a_pass_run_again_in_the_backward_pass_has_its_own_weights():
    """The block is left long before the backward pass runs the pass again."""
    backbone = tiny_backbone()
    bank = bank_on(backbone)
    grads = []
    for checkpoint_passes in (False, True):
        context = Context(backbone, 2, checkpoint_passes=checkpoint_passes)
        for loop in (1, 2):
            states = context.read(backbone.embed(IDS), weights=lambda loop=loop: bank.at(loop))
        states.square().sum().backward()
        grads.append({name: p.grad.clone() for name, p in bank.named_parameters()})
        bank.zero_grad()
        backbone.zero_grad()
    assert_same_gradients(*grads, 1e-4)


def test_a_copy_of_a_model_has_a_bank_of_its_own():
    model = tiny_model(Slr(n_slots=3, max_loops=2, loop={"lora": "per_iter"}))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for up in twin.loop.lora.up.values():
            up.normal_()
    (ours,), (theirs,) = model.answer_logits(MIXED[:1]), twin.answer_logits(MIXED[:1])
    assert (ours - theirs).abs().max() > 1e-3


@pytest.mark.slow
def test_a_compiled_pass_follows_the_loop_index_and_is_compiled_once_for_all_iterations():
    backbone = tiny_backbone()
    bank, graphs = bank_on(backbone, n_loops=12), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(backbone.decoder, backend=count)
    with torch.no_grad():
        fed = {"inputs_embeds": backbone.embed(IDS), "use_cache": False}
        for loop in (*range(1, 13), 1):  # more than torch compiles a function for
            with bank.at(loop):
                expected = backbone.decoder(**fed).last_hidden_state
                assert_close(compiled(**fed).last_hidden_state, expected)
        assert len(graphs) == 1
        assert_close(compiled(**fed).last_hidden_state, backbone.decoder(**fed).last_hidden_state)
