"""Every field of SpiralThinker: changing it changes the results that it should change, and no others.

Gauges: `rows` and their `labels`, the `prompt`; the `weights` that are trained; the `logits` of training rows in
evaluation; in training the terms `answer` and `hid`, the `loss`, its `gradient` by the backbone and the number
of `passes`; when answering, what is `written` and `paid`.
"""

import functools

import pytest
import torch

from innerloop.config.typed import field_names, groups
from innerloop.methods import SpiralThinker
from tests.methods.spiralthinker_reference import ALIGNED, known, student
from tests.methods.tools import MIXED, QUESTIONS, change, gradients, lean_towards, passes

BASE = change(ALIGNED, max_blocks=2)
LEANS = {"<bol>": 2.0, "<eot>": 3.0, "<bot>": 1.0, "###": 1.0}
FORWARD = {"logits", "answer", "hid", "loss", "gradient"}
TRAINED = {"answer", "hid", "loss", "gradient"}
WORDS = {"written", "paid"}
FOLLOWED = {"hid", "loss", "gradient"}
LAID_OUT = {"rows", "labels"} | FORWARD


@functools.cache
def results(method: SpiralThinker) -> dict[str, torch.Tensor]:
    """Run a method on the shared weights; every result as one row of numbers."""
    model = student("gpt2", method, own=True)
    rows = model.rows(MIXED, seed="0")
    model.rows = lambda *_: rows
    links = [link for row in rows for link in row.links()]
    found = {
        "rows": [i for link in links for i in [*link.ids(), -1, len(link.prefix), len(link.region)]],
        "labels": [i for link in links for i in link.labels()],
        "prompt": [i for row in model.prompts(QUESTIONS) for i in row.ids()],
        "weights": [p.numel() for p in model.parameters() if p.requires_grad],
        "logits": torch.cat(model.answer_logits(MIXED)).flatten(),
    }
    torch.manual_seed(1)
    with passes(model) as seen:
        out = model.train().loss(MIXED)
    found |= {name: out.terms.get(name, torch.zeros(1)).flatten() for name in ("answer", "hid")}
    found |= {"loss": out.loss.detach().flatten(), "passes": [len(seen)]}
    grads = gradients(model, out.loss)
    found["gradient"] = torch.cat([grad.flatten() for name, grad in grads.items() if name.startswith("backbone")])
    texts, costs = [], []
    for generation in lean_towards(model.eval(), LEANS).generate(QUESTIONS, max_new_tokens=12):
        texts += [ord(letter) for letter in generation.text]
        costs += [generation.cost.passes, generation.cost.positions]
    found |= {"written": texts, "paid": costs}
    return {name: torch.as_tensor(values, dtype=torch.double) for name, values in found.items()}


def moved_by(base: SpiralThinker, **changes) -> set[str]:
    left, right = results(base), results(change(base, **changes))
    assert left.keys() == right.keys()
    return {
        n for n in left if left[n].shape != right[n].shape or not torch.allclose(left[n], right[n], rtol=0, atol=1e-7)
    }


BANKED = change(BASE, loop={"lora": "per_iter", "lora_rank": 2})
STOPPING = change(BASE, stop={"rule": "delta", "threshold": 0.3})

# base, change, what moves, what may move
CASES = [
    # its own fields
    (BASE, {"pattern": "even"}, {"rows", "labels", "prompt", "paid"} | FORWARD, WORDS),
    (BASE, {"pattern": "random_parity"}, LAID_OUT, {"passes"}),
    (BASE, {"pattern": "all"}, LAID_OUT, set()),
    (BASE, {"pattern": "random"}, LAID_OUT | {"prompt", "paid"}, WORDS | {"passes"}),
    (BASE, {"latents_per_block": 3}, {"rows", "labels", "prompt", "paid"} | FORWARD, WORDS),
    (BASE, {"max_loops": 2}, {"passes", "paid"} | FORWARD, WORDS),
    (BASE, {"count_static_pass": True}, {"passes", "paid"} | FORWARD, WORDS),
    (BASE, {"block_schedule": "sequential"}, (LAID_OUT - {"labels"}) | {"passes"}, set()),
    (BASE, {"align_schedule": "uniform"}, FOLLOWED, set()),
    (BASE, {"align_schedule": "last"}, FOLLOWED, set()),
    (BASE, {"align_alpha": 0.5}, FOLLOWED, set()),
    (BASE, {"align_static_pass": True}, FOLLOWED, set()),
    (BASE, {"ce_passes": "all"}, {"answer", "loss", "gradient", "passes"}, set()),
    (BASE, {"m0": "no_block"}, {"rows", "labels", "logits", "answer", "loss", "gradient"}, set()),
    (BASE, {"supervise_first_bol": True}, {"labels", "logits", "answer", "loss", "gradient"}, set()),
    (BASE, {"force_block_after_text": True}, WORDS, set()),
    (BASE, {"max_blocks": 1}, WORDS, set()),
    # what it is learned from
    (BASE, {"hid.weight": 0.3}, {"loss", "gradient"}, set()),
    (BASE, {"hid.layers": "last"}, FOLLOWED, set()),
    (BASE, {"hid.layers": "all+emb"}, FOLLOWED, set()),
    *[(BASE, {"hid.distance": kind}, FOLLOWED, set()) for kind in ("l1_sum", "l2", "smooth_l1", "cosine")],
    # the adapter
    *[(BASE, {"loop.rescale": kind}, {"weights"} | FORWARD, WORDS) for kind in ("none", "rms", "project")],
    (BASE, {"loop.width": 7}, {"weights"} | FORWARD, WORDS),
    (BASE, {"loop.gain": True}, {"weights"} | FORWARD, WORDS),
    # the loop
    (BASE, {"loop.site": "pre_norm"}, FORWARD, WORDS),
    (BASE, {"loop.residual": "sum"}, FORWARD, WORDS),
    (BASE, {"loop.bptt": 1}, {"gradient"}, set()),
    (BASE, {"stop.rule": "delta", "stop.threshold": 0.3}, {"logits", "written", "paid"}, {"weights"}),
    (STOPPING, {"stop.threshold": 9.0}, {"logits", "paid"}, {"written"}),
    (STOPPING, {"stop.min_loops": 3}, {"logits", "paid"}, {"written"}),
    (STOPPING, {"stop.patience": 3}, {"logits", "paid"}, {"written"}),
    # options of other loops
    (BASE, {"loop.scale": 0.5}, FORWARD, WORDS),
    (BASE, {"loop.time": "lookup"}, {"weights"} | FORWARD, WORDS),
    (BASE, {"loop.noise": 0.5}, TRAINED, set()),
    (BASE, {"loop.lora": "shared"}, {"weights"} | FORWARD, WORDS),
    (BANKED, {"loop.lora_beyond": "off"}, set(), set()),  # there is no iteration past the last
    (BASE, {"loop.detach": True}, {"gradient"}, set()),
]


@pytest.mark.parametrize(
    ("base", "changes", "moves", "may_move"), CASES, ids=["-".join(f"{k}={v}" for k, v in c[1].items()) for c in CASES]
)
def test_a_setting_changes_what_it_should_and_nothing_else(base, changes, moves, may_move):
    found = moved_by(base, **changes)
    assert found >= moves, f"did not move: {moves - found}"
    assert found <= moves | may_move, f"should not have moved: {found - moves - may_move}"


def test_no_setting_has_been_forgotten():
    tried = {name for _, changes, _, _ in CASES for name in changes}
    elsewhere = {
        "labeller",
        "hid.teacher",
        "stop.check_every",
        "stop.histogram",
    }
    assert set(field_names(SpiralThinker)) - groups(SpiralThinker).keys() <= tried | elsewhere


def test_the_cards_defaults():
    method = SpiralThinker()
    assert (method.pattern, method.latents_per_block, method.max_loops) == ("odd", 5, 5)
    assert (method.loop.rescale, method.loop.width, method.loop.gain) == ("adapter", 0, False)
    assert (method.hid.layers, method.hid.distance) == ("all", "l1")
    assert (method.align_schedule, method.align_alpha, method.count_static_pass) == ("softmax", 1.0, False)
    assert (method.block_schedule, method.m0, method.max_blocks) == ("parallel", "one_block_no_align", 8)
    assert not (method.supervise_first_bol or method.align_static_pass or method.force_block_after_text)
    assert (method.loop.residual, method.loop.site, method.loop.bptt) == ("none", "post_norm", None)
    assert (method.ce_passes, method.stop.rule) == ("last", "none")
    assert known("gpt2").loop.rescale.outer.weight.abs().max() == 0
