"""FLOPs by hand and by torch's own counter, seconds per phase, and averages."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from innerloop.decoder.cost import PHASES, CostMeter, flops_of, mean_cost
from innerloop.passes.context import Context
from tests.models import VOCAB, random_ids, tiny_backbone

CPU = torch.device("cpu")
ATEN = torch.ops.aten


def flops(backbone, positions: int = 0, keys: int = 0, logits: int = 0) -> float:
    return flops_of(backbone, torch.tensor([positions]), torch.tensor([keys]), torch.tensor([logits])).item()


def test_flops_of_a_llama_by_hand():
    backbone = tiny_backbone("llama")  # width 32, 4 heads of 8, 2 key-value heads, 48 in the MLP, 3 layers
    attention, mlp, norms = 32 * 32 + 2 * 32 * 16 + 32 * 32, 3 * 32 * 48, 2 * 32
    assert flops(backbone, positions=5) == 2 * 5 * 3 * (attention + mlp + norms)
    assert flops(backbone, keys=7) == 7 * 3 * 4 * 32
    assert flops(backbone, logits=2) == 2 * 2 * 32 * VOCAB
    assert flops(backbone, 5, 7, 2) == flops(backbone, 5) + flops(backbone, 0, 7) + flops(backbone, 0, 0, 2)


def test_flops_of_attention_count_heads_that_are_wider_together_than_the_model():
    assert flops(tiny_backbone("qwen3"), keys=1) == 3 * 4 * (4 * 16)
    assert flops(tiny_backbone("gpt2"), keys=1) == 3 * 4 * 32


def test_flops_are_exact_beyond_single_precision():
    backbone = tiny_backbone()
    assert flops(backbone, positions=10**9 + 1) - flops(backbone, positions=10**9) == flops(backbone, positions=1)


def test_flops_of_matrix_products_equal_torchs_count(arch):
    """Exactly, once the norms and biases, 2 per weight in the formula and none in torch's count, are taken off."""
    backbone, n_rows, length = tiny_backbone(arch), 2, 6
    meter = CostMeter(n_rows, CPU)
    context = Context(backbone, n_rows, meter)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        states = context.read(backbone.embed(random_ids(n_rows, length)))
        backbone.head(states[:, -1])
    meter.count_logits(None, None)
    counts = counter.get_flop_counts()["Global"]
    products = counts.get(ATEN.mm, 0) + counts.get(ATEN.addmm, 0)
    vectors = sum(p.numel() for p in backbone.layers.parameters() if p.ndim == 1)
    without_attention = flops_of(backbone, meter.positions, 0 * meter.keys, meter.logits).sum().item()
    assert without_attention - 2 * vectors * n_rows * length == products
    assert without_attention == pytest.approx(products, rel=0.05)


def test_flops_of_attention_equal_torchs_count_when_decoding():
    """One new position over 6 earlier ones; GPT-2 has no rotary products in the way."""
    backbone = tiny_backbone("gpt2", attn_implementation="eager")
    meter, ids = CostMeter(1, CPU), random_ids(1, 7)
    context = Context(backbone, 1, meter)
    with torch.no_grad():
        context.read(backbone.embed(ids[:, :6]))
        before = meter.keys.clone()
        with FlopCounterMode(display=False) as counter:
            context.read(backbone.embed(ids[:, 6:]))
    assert counter.get_flop_counts()["Global"][ATEN.bmm] == flops(backbone, keys=(meter.keys - before).item())


def test_a_batch_costs_what_its_rows_cost():
    backbone = tiny_backbone()
    meter = CostMeter(2, CPU)
    with torch.no_grad():
        Context(backbone, 2, meter).read(torch.zeros(2, 5, 32), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]))
        singles = []
        for length in (5, 3):
            single = CostMeter(1, CPU)
            Context(backbone, 1, single).read(torch.zeros(1, length, 32))
            singles += single.costs(backbone)
    assert [(c.passes, c.positions, c.flops) for c in meter.costs(backbone)] == [
        (c.passes, c.positions, c.flops) for c in singles
    ]


def test_logits_are_counted_for_the_rows_that_count():
    meter = CostMeter(3, CPU)
    meter.count_logits(None, None)
    meter.count_logits(None, torch.tensor([True, False, True]))
    meter.count_logits(torch.tensor([2, 0]), None)
    meter.count_logits(torch.tensor([2, 0]), torch.tensor([False, True]))
    assert meter.logits.tolist() == [4, 1, 3]


def test_counters_do_not_share_memory():
    meter = CostMeter(2, CPU)
    meter.count(None, 3, 1)
    assert [c.tolist() for c in (meter.passes, meter.positions, meter.keys, meter.logits)] == [
        [1, 1],
        [3, 3],
        [9, 9],
        [0, 0],
    ]


def test_phases_add_up_and_are_shared_by_the_rows(monkeypatch):
    ticks = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    meter = CostMeter(2, CPU)
    monkeypatch.setattr(meter, "now", lambda: next(ticks))
    for name in ("prefill", "answer", "prefill"):
        with meter.phase(name):
            pass
    assert meter.seconds == {"prefill": [3.0, 3.0], "thought": [0.0, 0.0], "answer": [0.25, 0.25]}
    costs = meter.costs(tiny_backbone())
    assert [c.seconds for c in costs] == [{"prefill": 3.0, "thought": 0.0, "answer": 0.25}] * 2
    costs[0].seconds["answer"] = 9.0
    assert costs[1].seconds["answer"] == 0.25


def test_an_unknown_phase_is_an_error():
    with pytest.raises(KeyError), CostMeter(1, CPU).phase("lunch"):
        pass


def test_mean_cost_of_nothing_is_zero():
    assert mean_cost([]) == {
        "passes": 0,
        "positions": 0,
        "flops": 0,
        "thought_tokens": 0,
        "loops": 0,
        "written": 0,
        "seconds": dict.fromkeys(PHASES, 0),
    }
