"""SLR's invariants 12 and 13 (slr.md, section 9): what is trained, and what is not, on GPT-2 and Llama shapes.

12. bptt = T == full, bptt = 0: no gradient through the loop; another LoRA_t changes the passes t alone.
13. Training the adapters alone leaves theta's checksum; L_hid = 0 where the student's states are the teacher's.
"""

import hashlib

import pytest
import torch

from innerloop import LatentModel, Slr
from innerloop.decoder import adapters
from innerloop.model.losses import follow_loss, read_teacher
from tests.methods.tools import (
    FULL,
    MIXED,
    REGIONS,
    assert_same_answers,
    assert_same_gradients,
    base,
    by_answer,
    by_arch,
    by_scope,
    change,
    gradients,
    on,
    same_weights,
    states,
)
from tests.models import tiny_model

# 12


@by_scope
@by_arch
def test_12_bptt_cuts_the_gradient_before_the_last_iterations(scope, arch):
    method = change(FULL, loop_scope=scope)
    full = on(arch, method)
    expected = gradients(full, full.loss(MIXED).loss)
    for last_k in (3, 2, 1, 0):
        model = same_weights(full, change(method, loop={"bptt": last_k}))
        assert_same_answers(full, model, 0)
        with states(model) as seen:
            ours = gradients(model, model.loss(MIXED).loss)
        passed = seen[scope != "all" :][:3]
        flows = [u.grad is not None and u.grad.abs().max().item() > 0 for u in passed]
        if scope == "append":  # the state is cut; what later latents read of earlier ones in the cache is not
            assert last_k == 3 or not flows[2 - last_k]
        else:
            assert flows == [t > 3 - last_k for t in (1, 2, 3)]
        if last_k == 3:
            assert_same_gradients(ours, expected, 1e-6)
        for name, grad in ours.items() if scope != "append" else ():  # there the latents stay in the cache
            if name.startswith("loop.lora"):
                assert [part.abs().max().item() > 0 for part in grad] == flows, (last_k, name)
            elif name.startswith("loop.") and last_k == 0:
                assert grad.abs().max() == 0, name


@by_scope
@by_answer
@by_arch
def test_12_bptt_zero_leaves_the_passes_of_the_loop_without_a_gradient_whatever_the_answer_reads(
    scope, answer_from, arch
):
    model = on(arch, change(FULL, loop_scope=scope, answer_from=answer_from, loop={"bptt": 0}))
    with states(model) as seen:
        grads = gradients(model, model.loss(MIXED).loss)
    looped = seen[scope != "all" :][:3]
    assert all(u.grad is None for u in looped) and len(looped) == 3
    assert all(grad.abs().max() == 0 for name, grad in grads.items() if name.startswith("loop."))
    assert max(grad.abs().max() for name, grad in grads.items() if name.startswith("backbone.")) > 1e-3


@by_arch
def test_12_another_lora_update_changes_the_passes_of_its_iteration_alone(arch):
    """With alpha = 0 every iteration reads the same state, so that passes do not depend on those before them."""
    for scope in REGIONS:
        model = on(arch, change(FULL, loop_scope=scope, loop={"residual": "A", "alpha": 0.0}))
        with states(model) as seen, torch.no_grad():
            model.answer_logits(MIXED)
            n_passes = len(seen)
            for up in model.loop.lora.up.values():
                up[1] *= 3
            model.answer_logits(MIXED)
        same = [torch.equal(a, b) for a, b in zip(seen[:n_passes], seen[n_passes:])]
        assert same == [*([True] if scope != "all" else []), True, False, True, True]


# 13


def checksum(tensors) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in tensors)).hexdigest()


@by_arch
def test_13_training_the_adapters_alone_leaves_the_base_weights(arch):
    method = change(FULL, loop={"residual": "C", "rescale": "adapter", "time_inject": "concat"}, distinct_slots=True)
    model = LatentModel(tiny_model(Slr(), arch).backbone, base(arch).tokenizer, method)
    adapters.freeze(model.backbone, model.marker_ids())
    frozen = [p for p in model.backbone.parameters() if not p.requires_grad]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("loop.") or "trainable_tokens" in name for name in trained)
    assert {id(p) for p in trained.values()} >= {id(p) for p in model.loop.parameters()}
    before, parts = checksum(frozen), checksum(model.loop.parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(MIXED).loss.backward()
        optimizer.step()
    assert checksum(frozen) == before
    assert checksum(model.loop.parameters()) != parts


@by_arch
@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("distance", ["smooth_l1", "cosine"])
def test_13_the_teachers_own_states_have_no_distance_to_it(arch, layers, distance):
    method = change(FULL, hid={"weight": 1.0, "layers": layers, "distance": distance}, teacher="-")
    model = on(arch, method)
    model._frozen["teacher"] = base(arch)
    batch = model.batch(model.rows(MIXED))
    with torch.no_grad():
        thought = model.think(batch)
        targets = read_teacher(model.teacher, batch.teacher, False, 1, None).layers
        inputs = model.loss_inputs(batch, thought)
        assert follow_loss(inputs, targets, method.hid) > 0.1
        for sites in batch.follows:
            for layer, state in enumerate(thought.layer_states[sites.loop - 1]):
                for row, at in zip(sites.rows_F.tolist(), sites.targets_F.tolist()):
                    state[row] = targets[layer].flatten(0, 1)[at]
        assert follow_loss(inputs, targets, method.hid).abs() < 1e-5
