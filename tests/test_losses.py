"""The terms of the loss that look inside the loop, against sums written by hand (slr.md, section 4)."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, smooth_l1_loss

from innerloop import Example, InputError, LatentModel, Slr
from innerloop.passes.thought import Thought
from innerloop.text.row import IGNORE
from tests.fields import change
from tests.methods.tools import MIXED, assert_close, halting, labels_by_loop, rows_at, same_weights, thought_of
from tests.models import tiny_model
from tests.test_halting_learned import brute_force

SMALL = Slr(n_slots=3, max_loops=3, loop={"time": "lookup"})
HALT = change(SMALL, stop={"rule": "halt"}, halt={"weight": 0.5})


def model_of(method: Slr, seed: int = 0) -> LatentModel:
    """Make a model in double precision whose loop has no zeros, in training mode but without dropout."""
    model = tiny_model(method, num_hidden_layers=2).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.loop.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model.train()


def after(model: LatentModel, t: int) -> list[Tensor]:
    """Return for each example the losses of its written tokens when it answers after iteration t."""
    rows = model.rows(MIXED)
    for row in rows:
        row.n_loops = t
    batch = model.batch(rows)
    with torch.no_grad():
        logits = model.written_logits(batch, model.think(batch)).float()
    return list(cross_entropy(logits, batch.targets_U, reduction="none").split(batch.n_targets))


# L_deep


@pytest.mark.parametrize("scope", ["slots", "all", "last"])
@pytest.mark.parametrize("schedule", ["linear", "softmax"])
def test_deep_is_the_weighted_mean_of_the_answers_after_every_iteration(scope, schedule):
    model = model_of(change(SMALL, loop_scope=scope, deep={"weight": 0.5, "schedule": schedule}))
    out = model.loss(MIXED)
    weights = [1 / 6, 2 / 6, 3 / 6] if schedule == "linear" else torch.tensor([1.0, 2, 3]).softmax(0).tolist()
    means = [torch.cat(after(model, t)).mean().item() for t in (1, 2, 3)]
    assert out.terms["deep"].item() == pytest.approx(sum(w * m for w, m in zip(weights, means)), rel=1e-5)
    assert out.terms["answer"].item() == pytest.approx(means[2], rel=1e-5)
    assert out.loss.item() == pytest.approx((out.terms["answer"] + 0.5 * out.terms["deep"]).item(), rel=1e-5)


@pytest.mark.parametrize("term", ["deep", "halt"])
def test_rows_with_fewer_iterations_have_the_terms_of_single_rows(term):
    ramp = {"curriculum": {"max_stage": 2}, "loops_per_stage": 1}
    model = model_of(change(HALT, deep={"weight": 1.0}, **ramp))
    rows = rows_at(model, MIXED, [3, 1, 2, 3, 1, 2])
    assert [row.n_loops for row in rows] == [3, 1, 2, 3, 1, 2]
    total, count = 0.0, 0
    for row in rows:
        batch = model.batch([row])
        n = len(batch.targets_U) if term == "deep" else 1
        total, count = total + model(batch).terms[term].item() * n, count + n
    assert model(model.batch(rows)).terms[term].item() == pytest.approx(total / count, rel=1e-5)
    assert set(model.eval().loss(MIXED).terms) == {"answer"}  # the others are for training alone


# L_halt


def gates_of(model: LatentModel) -> list[list[float]]:
    """Return lambda_t of each row, as a hand-written mean over slots and a linear gate give it."""
    with torch.no_grad():
        thought, gate = model.think(model.batch(model.rows(MIXED))), model.loop.stop.gate
        rates = [(s.mean(1) @ gate.weight[0] + gate.bias).sigmoid() for _, s in thought.loop.states]
    return torch.stack(rates, dim=1).tolist()


def test_halt_is_the_loss_expected_over_the_iterations_that_the_gate_may_stop_after():
    model = model_of(change(HALT, halt={"beta": 0.0}))
    losses = [[loss.mean().item() for loss in after(model, t)] for t in (1, 2, 3)]
    expected = [sum(p * loss for p, loss in zip(brute_force(r), row)) for r, row in zip(gates_of(model), zip(*losses))]
    assert model.loss(MIXED).terms["halt"].item() == pytest.approx(sum(expected) / len(MIXED), rel=1e-5)


def test_halt_draws_the_distribution_to_a_truncated_geometric():
    model, other = (model_of(change(HALT, halt={"beta": beta, "prior": 0.3})) for beta in (1.0, 0.0))
    terms = [one.loss(MIXED).terms["halt"].item() for one in (model, other)]
    geometric = [0.3 * 0.7**t for t in range(3)]
    prior = [g / sum(geometric) for g in geometric]
    divergence = 0.0
    for rates in gates_of(model):
        divergence += sum(a * math.log(a / b) for a, b in zip(brute_force(rates), prior)) / len(MIXED)
    assert terms[0] - terms[1] == pytest.approx(divergence, rel=1e-5)
    model.loss(MIXED).loss.backward()
    assert model.loop.stop.gate.weight.grad.abs().max() > 0


# L_hid


def frozen_teacher() -> LatentModel:
    return tiny_model(Slr(), seed=5, num_hidden_layers=2).double()


def student_and_teacher(method: Slr = SMALL, **hid) -> LatentModel:
    model = model_of(change(method, hid={"weight": 1.0, **hid}, teacher="-"))
    model._frozen["teacher"] = frozen_teacher()
    return model


def states_at(model: LatentModel, example: Example, n_steps: int) -> list[Tensor]:
    """Return the teacher's states (D,) after every layer, where it has read so many steps by itself."""
    ids = model.tokenizer.encode(example.question + "\n")
    for step in example.steps[:n_steps]:
        ids += model.tokenizer.encode(step + "\n", add_special_tokens=False)
    with torch.no_grad():
        hidden = model.teacher.lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [states[0, -1].float() for states in hidden]


def distance(ours: Tensor, target: Tensor, kind: str, spread: Tensor) -> float:
    """Return the distance of two states, in units of a spread."""
    if kind == "cosine":
        return 1 - cosine_similarity(ours, target, dim=0).item()
    return smooth_l1_loss(ours, target).item() / spread.item()


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_hid_is_the_distance_to_the_teachers_states_at_the_end_of_the_steps(layers, kind):
    model, example = student_and_teacher(layers=layers, distance=kind), MIXED[0]
    targets = [states_at(model, example, n) for n in (1, 2, 3)]  # three steps, three iterations: t <-> step t
    with torch.no_grad():
        thought = model.think(model.batch(model.rows([example])))
    expected = []
    for layer in [1, 2] if layers == "all" else [2]:
        spread = torch.stack([target[layer] for target in targets]).std()
        for t, target in enumerate(targets):
            ours = thought.layer_states[t][layer][0].mean(0).float()
            expected.append(distance(ours, target[layer], kind, spread))
    assert model.loss([example]).terms["hid"].item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert_close(thought.layer_states[-1][-1], thought.loop.outputs[-1][1])


@pytest.mark.parametrize("site", ["post_norm", "pre_norm"])
def test_following_a_teacher_changes_no_logits(site):
    method = change(SMALL, loop={"site": site})
    model = student_and_teacher(method)
    plain = LatentModel(model.backbone, model.tokenizer, method).double()
    plain.loop.load_state_dict(model.loop.state_dict())
    assert all(map(torch.equal, model.eval().answer_logits(MIXED), plain.eval().answer_logits(MIXED)))
    model.train().loss(MIXED).loss.backward()  # it trains the student and not the teacher
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert model.loop.time.table.grad.abs().sum(1).min() > 0


def test_following_needs_a_teacher():
    with pytest.raises(InputError, match="set teacher"):
        Slr(hid={"weight": 1.0})


# Halted rows in evaluation


def stopping(method: Slr) -> tuple[LatentModel, list[Thought], list[int]]:
    """Return a model whose rows stop early, what each row alone does without stopping, and after how many it stops."""
    model = halting("llama", change(method, max_loops=4, stop={"rule": "delta"}))
    never = same_weights(model, change(model.method, stop={"threshold": math.inf}))
    n_loops = thought_of(model, MIXED).loop.n_loops
    assert len(set(n_loops)) > 1 and min(n_loops) < 4
    return model, [thought_of(never, [example]) for example in MIXED], n_loops


@pytest.mark.parametrize("scope", ["slots", "all", "last"])
@pytest.mark.parametrize("kind", ["smooth_l1", "cosine"])
def test_a_row_that_has_stopped_follows_the_teacher_with_its_last_state(scope, kind):
    following = change(SMALL, loop_scope=scope, hid={"weight": 1.0, "distance": kind, "layers": "all"}, teacher="-")
    model, alone, n_loops = stopping(following)
    model._frozen["teacher"] = frozen_teacher()
    total, count = 0.0, 0
    for layer in (1, 2):
        pairs = []
        for t, (row, example) in itertools.product((1, 2, 3, 4), enumerate(MIXED)):
            if example.steps:
                target = states_at(model, example, math.ceil(t * len(example.steps) / 4))[layer]
                pairs.append((alone[row].layer_states[min(t, n_loops[row]) - 1][layer][0].mean(0).float(), target))
        spread = torch.stack(list({tuple(target.tolist()): target for _, target in pairs}.values())).std()  # each once
        total, count = total + sum(distance(*pair, kind, spread) for pair in pairs), count + len(pairs)
    assert count == 2 * 4 * 4  # four examples have steps
    assert model.loss(MIXED).terms["hid"].item() == pytest.approx(total / count, rel=1e-5)


def test_a_row_that_has_stopped_shows_its_last_output_as_every_later_step():
    model, alone, n_loops = stopping(change(SMALL, step_weight=1.0))
    losses = []
    for row, ran, thought in zip(model.rows(MIXED), n_loops, alone):
        for t, labels in enumerate(labels_by_loop(row), 1):
            logits = model.backbone.head(thought.loop.outputs[min(t, ran) - 1][1][0]).detach()
            losses += [cross_entropy(logits[j], torch.tensor(i)) for j, i in enumerate(labels) if i != IGNORE]
    assert model.loss(MIXED).terms["step"].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


# gain


@pytest.mark.parametrize(
    "fields", [{}, {"loop_scope": "append"}, {"answer_from": "kv_last"}, {"loop_scope": "all"}], ids=str
)
def test_the_square_of_the_gain_above_the_bound_is_penalised_and_nothing_else_changes(fields):
    plain, terms = model_of(change(SMALL, **fields)), {}
    for bound in (0.0, 0.1, 1e6):
        method = change(plain.method, fixed_point={"spectral_weight": 2.0, "spectral_bound": bound})
        guarded = LatentModel(plain.backbone, plain.tokenizer, method).double().train()
        guarded.loop.load_state_dict(plain.loop.state_dict())
        out = guarded.loss(MIXED)
        terms[bound] = out.terms["gain"].item()
        assert out.terms["answer"].item() == pytest.approx(plain.loss(MIXED).terms["answer"].item(), abs=1e-9)
        assert out.loss.item() == pytest.approx(out.terms["answer"].item() + 2 * terms[bound], rel=1e-5)
    gain = terms[0.0] ** 0.5
    assert terms[0.1] == pytest.approx(max(gain - 0.1, 0) ** 2, rel=1e-5) and terms[1e6] == 0 < gain
    assert fields or gain > 0.1


def test_terms_are_divided_by_the_counts_of_the_global_batch():
    model = model_of(change(HALT, deep={"weight": 1.0}))
    whole = model.loss(MIXED).terms
    halves = [model.batch(model.rows(part)) for part in (MIXED[:3], MIXED[3:])]
    counts = {name: sum(half.counts()[name] for half in halves) for name in halves[0].counts()}
    outs = [model(half, n_items=counts).terms for half in halves]
    for name in ("answer", "deep", "halt"):
        assert sum(out[name].item() for out in outs) == pytest.approx(whole[name].item(), rel=1e-5)


def test_the_gain_penalty_of_micro_batches_is_their_mean():
    model = model_of(change(SMALL, fixed_point={"spectral_weight": 1.0, "spectral_bound": 0.1}))
    parts = [model.batch(model.rows(part)) for part in (MIXED[:2], MIXED[2:])]
    alone = [model(part).terms["gain"].item() for part in parts]
    shares = [model(part, n_items={**part.counts(), "rows": len(MIXED)}).terms["gain"].item() for part in parts]
    assert min(alone) > 1e-3
    assert shares == pytest.approx([alone[0] * 2 / 6, alone[1] * 4 / 6])
