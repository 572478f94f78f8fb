"""SLR's invariants 10 and 12 to 14 (slr.md, section 9): rows know nothing of each other; what is trained, and what not.

On GPT-2 and Llama shapes.

10. A batch in which rows halt == single rows; a halted row is not changed by later iterations.
12. bptt = T == full, bptt = 0: no gradient through the loop; another LoRA_t changes the passes t alone.
13. Training the adapters alone leaves theta's checksum; L_hid = 0 where the student's states are the teacher's.
14. The prefix does not depend on t; permuting rows permutes results.
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
    PLAIN,
    QUESTIONS,
    REGIONS,
    ROUNDED,
    assert_close,
    assert_rows_do_as_alone,
    assert_same_answers,
    assert_same_gradients,
    base,
    by_answer,
    by_arch,
    by_region,
    by_scope,
    change,
    change_embedding,
    gradients,
    halting,
    on,
    same_weights,
    states,
    thought_of,
)
from tests.models import tiny_model


@by_answer
@pytest.mark.parametrize("stop", ["delta", "cos", "kl", "entropy", "halt"])
@by_scope
def test_10_a_batch_in_which_rows_halt_equals_single_rows(scope, stop, answer_from):
    arch = {"delta": "gpt2", "cos": "llama", "kl": "gpt2", "entropy": "llama", "halt": "gpt2"}[stop]
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop={"rule": stop})
    assert_rows_do_as_alone(halting(arch, method))


@by_answer
@pytest.mark.parametrize("stop", ["kl", "entropy", "argmax"])
@by_scope
def test_10_rows_that_halt_by_the_answers_first_word_do_as_alone(scope, stop, answer_from):
    arch = "llama" if (stop, answer_from) == ("argmax", "refeed") else "gpt2"  # where rows differ
    looks = {"rule": stop, "site": "answer", "agg": "last" if stop == "kl" else "mean"}  # of one position
    method = change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=6, stop=looks)
    assert_rows_do_as_alone(halting(arch, method))


@pytest.mark.parametrize("solver", ["plain", "damped", "anderson"])
@by_region
def test_10_rows_that_reach_their_fixed_points_at_different_times_do_as_alone(scope, solver):
    method = change(PLAIN, loop_scope=scope, max_loops=40, loop={"residual": "A", "alpha": 0.5, "rescale": "rms"})
    assert_rows_do_as_alone(on("gpt2", change(method, fixed_point={"solver": solver, "tol": 3e-3})))


@by_scope
def test_10_a_halted_row_is_not_changed_by_later_iterations(scope):
    model = halting("gpt2", change(FULL, loop_scope=scope, max_loops=4, stop={"rule": "delta", "agg": "last"}))
    result = thought_of(model, MIXED).loop
    for row, n_loops in enumerate(result.n_loops):
        rows, states_BND = result.states[n_loops - 1]
        assert torch.equal(result.state[row], states_BND[rows.index(row)])


@by_scope
@pytest.mark.parametrize("stop", [{"rule": "delta"}, {"rule": "kl", "site": "answer"}], ids=["delta", "answer"])
@by_answer
def test_10_generation_of_a_halting_batch_equals_that_of_single_questions(scope, stop, answer_from):
    model = halting("gpt2", change(FULL, loop_scope=scope, answer_from=answer_from, max_loops=4, stop=stop))
    together = model.generate(QUESTIONS, max_new_tokens=4, trace=True)
    for question, one in zip(QUESTIONS, together):
        (alone,) = model.generate([question], max_new_tokens=4, trace=True)
        assert one.text == alone.text
        assert one.cost.loops == alone.cost.loops == len(one.trace.iterations) == len(alone.trace.iterations)
        assert one.cost.passes == alone.cost.passes
        assert one.cost.positions == alone.cost.positions


@by_arch
@pytest.mark.parametrize(
    ("scope", "changed"), [("slots", "loop"), ("last", "loop"), ("append", "loop"), ("slots", "latents")]
)
def test_14_the_prefix_depends_neither_on_the_iterations_nor_on_the_latents(scope, changed, arch):
    model = on(arch, change(FULL, loop_scope=scope))
    with states(model) as seen, torch.no_grad():
        model.answer_logits(MIXED)
        n_passes = len(seen)
        if changed == "latents":
            change_embedding(model, "<lat>")
        for parameter in model.loop.parameters() if changed == "loop" else ():
            parameter.mul_(1.7)
        model.answer_logits(MIXED)
    assert torch.equal(seen[0], seen[n_passes])
    assert (seen[1] - seen[n_passes + 1]).abs().max() > 1e-3


@by_scope
@by_arch
def test_14_permuting_rows_permutes_results(scope, arch):
    model = on(arch, change(FULL, loop_scope=scope))
    order = [3, 0, 5, 1, 4, 2]
    logits = model.answer_logits(MIXED)
    for i, permuted in zip(order, model.answer_logits([MIXED[i] for i in order])):
        assert_close(permuted, logits[i], ROUNDED)


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
        for sites in batch.hidden_targets:
            for layer, state in enumerate(thought.layer_states[sites.iteration - 1]):
                for row, at in zip(sites.rows_F.tolist(), sites.targets_F.tolist()):
                    state[row] = targets[layer].flatten(0, 1)[at]
        assert follow_loss(inputs, targets, method.hid).abs() < 1e-5
