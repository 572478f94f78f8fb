"""The terms of the loss that look inside the loop, against sums written by hand (slr.md, section 4)."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, smooth_l1_loss

from innerloop import InputError, LatentModel, Slr
from innerloop.passes.thought import Thought
from innerloop.text.row import IGNORE
from tests.methods.tools import MIXED, assert_close, halting, labels_by_loop, rows_at, same_weights, thought_of
from tests.models import tiny_model

SMALL = Slr(n_slots=3, max_loops=3, time="lookup")
RAMP = dataclasses.replace(SMALL, max_stage=2, loops_per_stage=1)
HALT = {"stop": "halt", "halt_weight": 0.5}


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
    model = model_of(dataclasses.replace(SMALL, loop_scope=scope, deep_weight=0.5, deep_schedule=schedule))
    out = model.loss(MIXED)
    weights = [1 / 6, 2 / 6, 3 / 6] if schedule == "linear" else torch.tensor([1.0, 2, 3]).softmax(0).tolist()
    means = [torch.cat(after(model, t)).mean().item() for t in (1, 2, 3)]
    assert out.terms["deep"].item() == pytest.approx(sum(w * m for w, m in zip(weights, means)), rel=1e-5)
    assert out.terms["answer"].item() == pytest.approx(means[2], rel=1e-5)
    assert out.loss.item() == pytest.approx((out.terms["answer"] + 0.5 * out.terms["deep"]).item(), rel=1e-5)


@pytest.mark.parametrize("term", ["deep", "halt"])
def test_rows_with_fewer_iterations_have_the_terms_of_single_rows(term):
    model = model_of(dataclasses.replace(RAMP, **({"deep_weight": 1.0} if term == "deep" else HALT)))
    rows = rows_at(model, MIXED, [3, 1, 2, 3, 1, 2])
    assert [row.n_loops for row in rows] == [3, 1, 2, 3, 1, 2]
    total, count = 0.0, 0
    for row in rows:
        batch = model.batch([row])
        n = len(batch.targets_U) if term == "deep" else 1
        total, count = total + model(batch).terms[term].item() * n, count + n
    assert model(model.batch(rows)).terms[term].item() == pytest.approx(total / count, rel=1e-5)


def test_deep_and_halt_are_for_training_alone():
    model = model_of(dataclasses.replace(SMALL, deep_weight=1.0, **HALT)).eval()
    assert set(model.loss(MIXED).terms) == {"answer"}


# L_halt


def brute_force(rates: list[float]) -> list[float]:
    """P(stop after t): go on t - 1 times, then stop; the last iteration stops whoever is left."""
    n = len(rates)
    p = []
    for t in range(n):
        outcome = 1.0
        for rate in rates[:t]:
            outcome *= 1 - rate
        p.append(outcome * (rates[t] if t < n - 1 else 1.0))
    return p


def gates_of(model: LatentModel) -> Tensor:
    """Return lambda_t (T, B) as a hand-written mean over slots and a linear gate give it."""
    with torch.no_grad():
        thought = model.think(model.batch(model.rows(MIXED)))
        gate = model.loop.stop.gate
        return torch.stack([(s.mean(1) @ gate.weight[0] + gate.bias).sigmoid() for _, s in thought.loop.states])


def test_the_halting_distribution_sums_to_one_and_is_that_of_brute_force():
    for rates in itertools.product([0.1, 0.5, 0.95], repeat=3):
        assert sum(brute_force(list(rates))) == pytest.approx(1.0)
    model = model_of(dataclasses.replace(SMALL, **HALT, halt_beta=0.0))
    rates_TB, losses = gates_of(model), [after(model, t) for t in (1, 2, 3)]
    expected = 0.0
    for row in range(len(MIXED)):
        p = brute_force(rates_TB[:, row].tolist())
        expected += sum(p_t * losses[t][row].mean().item() for t, p_t in enumerate(p)) / len(MIXED)
    assert model.loss(MIXED).terms["halt"].item() == pytest.approx(expected, rel=1e-5)


def test_halt_draws_the_distribution_to_a_truncated_geometric():
    terms = []
    for beta in (0.0, 1.0):
        model = model_of(dataclasses.replace(SMALL, **HALT, halt_beta=beta, halt_prior=0.3))
        terms.append(model.loss(MIXED).terms["halt"].item())
    geometric = [0.3 * 0.7**t for t in range(3)]
    prior = [g / sum(geometric) for g in geometric]
    divergence = 0.0
    for row in range(len(MIXED)):
        p = brute_force(gates_of(model)[:, row].tolist())
        divergence += sum(a * math.log(a / b) for a, b in zip(p, prior)) / len(MIXED)
    assert terms[1] - terms[0] == pytest.approx(divergence, rel=1e-5)


def test_halt_trains_the_gate():
    model = model_of(dataclasses.replace(SMALL, **HALT))
    model.loss(MIXED).loss.backward()
    assert model.loop.stop.gate.weight.grad.abs().max() > 0


# L_hid


def student_and_teacher(**fields) -> LatentModel:
    model = model_of(dataclasses.replace(SMALL, hid_weight=1.0, teacher="-", **fields))
    model._frozen["teacher"] = copy.deepcopy(tiny_model(Slr(), seed=5, num_hidden_layers=2)).double()
    return model


@pytest.mark.parametrize("hid_layers", ["last", "all"])
@pytest.mark.parametrize("hid_distance", ["smooth_l1", "cosine"])
def test_hid_is_the_distance_to_the_teachers_states_at_the_end_of_the_steps(hid_layers, hid_distance):
    model = student_and_teacher(hid_layers=hid_layers, hid_distance=hid_distance)
    example = MIXED[0]  # three steps, three iterations: t <-> step t
    with torch.no_grad():
        tokenizer, teacher = model.tokenizer, model.teacher
        ids, ends = tokenizer.encode(example.question + "\n"), []
        for step in example.steps:
            ids += tokenizer.encode(step + "\n", add_special_tokens=False)
            ends.append(len(ids) - 1)
        hidden = teacher.lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        batch = model.batch(model.rows([example]))
        thought = model.think(batch)
        expected = []
        for t, end in enumerate(ends):
            layers = [1, 2] if hid_layers == "all" else [2]
            for layer in layers:
                target, ours = hidden[layer][0, end].float(), thought.layer_states[t][layer][0].mean(0).float()
                if hid_distance == "cosine":
                    distance = 1 - (target @ ours / target.norm() / ours.norm())
                else:
                    distance = smooth_l1_loss(ours, target) / hidden[layer][0, ends].float().std()
                expected.append(distance.item() / len(layers))
        assert model.loss([example]).terms["hid"].item() == pytest.approx(sum(expected) / 3, rel=1e-5)
        _, output = thought.loop.outputs[-1]
        assert_close(thought.layer_states[-1][-1], output)


def test_hid_trains_the_student_and_not_the_teacher():
    model = student_and_teacher()
    model.loss(MIXED).loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any("teacher" in name for name in model.state_dict())
    assert model.loop.time.table.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("site", ["post_norm", "pre_norm"])
def test_following_a_teacher_changes_no_logits(site):
    model = student_and_teacher(feedback_site=site)
    plain = LatentModel(model.backbone, model.tokenizer, dataclasses.replace(SMALL, feedback_site=site)).double()
    plain.loop.load_state_dict(model.loop.state_dict())
    for left, right in zip(model.eval().answer_logits(MIXED), plain.eval().answer_logits(MIXED)):
        assert torch.equal(left, right)


def test_following_needs_a_teacher():
    with pytest.raises(InputError, match="set teacher"):
        Slr(hid_weight=1.0)


# Halted rows in evaluation


@pytest.mark.parametrize("term", ["step", "hid"])
def test_rows_that_stop_early_in_evaluation_keep_their_last_output_in_the_terms(term):
    model = student_and_teacher() if term == "hid" else model_of(dataclasses.replace(SMALL, step_weight=1.0))
    stopping = dataclasses.replace(model.method, stop="delta", stop_threshold=-math.inf)
    twin = LatentModel(model.backbone, model.tokenizer, stopping).double().eval()
    twin._frozen = model._frozen
    assert math.isfinite(twin.loss(MIXED).terms[term].item())


def stopping(method: Slr) -> tuple[LatentModel, list[Thought], list[int]]:
    """Return a model whose rows stop early, what each row alone does without stopping, and after how many it stops."""
    model = halting("llama", dataclasses.replace(method, max_loops=4, stop="delta"))
    never = same_weights(model, dataclasses.replace(model.method, stop_threshold=math.inf))
    n_loops = thought_of(model, MIXED).loop.n_loops
    assert len(set(n_loops)) > 1 and min(n_loops) < 4
    return model, [thought_of(never, [example]) for example in MIXED], n_loops


def shown_step(t: int, m: int) -> int | None:
    """The 0-based step of the 1-based iteration t of four."""
    return math.ceil(t * m / 4) - 1 if m else None


@pytest.mark.parametrize("scope", ["slots", "all", "last"])
@pytest.mark.parametrize("hid_distance", ["smooth_l1", "cosine"])
def test_a_row_that_has_stopped_follows_the_teacher_with_its_last_state(scope, hid_distance):
    method = dataclasses.replace(SMALL, loop_scope=scope, hid_weight=1.0, teacher="-", hid_distance=hid_distance)
    model, alone, n_loops = stopping(dataclasses.replace(method, hid_layers="all"))
    model._frozen["teacher"] = tiny_model(Slr(), seed=5, num_hidden_layers=2).double()
    total, count = 0.0, 0
    for layer in (1, 2):
        pairs = []
        for t, (row, example) in itertools.product((1, 2, 3, 4), enumerate(MIXED)):
            step = shown_step(t, len(example.steps))
            if step is None:
                continue
            ids = model.tokenizer.encode(example.question + "\n")
            for text in example.steps[: step + 1]:
                ids += model.tokenizer.encode(text + "\n", add_special_tokens=False)
            with torch.no_grad():
                hidden = model.teacher.lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
            ours = alone[row].layer_states[min(t, n_loops[row]) - 1][layer][0].mean(0)
            pairs.append((ours.float(), hidden[layer][0, -1].float()))
        spread = torch.stack(list({tuple(target.tolist()): target for _, target in pairs}.values())).std()  # each once
        for ours, target in pairs:
            if hid_distance == "cosine":
                total += 1 - cosine_similarity(ours, target, dim=0).item()
            else:
                total += smooth_l1_loss(ours, target).item() / spread.item()
        count += len(pairs)
    assert count == 2 * 4 * 4  # four examples have steps
    assert model.loss(MIXED).terms["hid"].item() == pytest.approx(total / count, rel=1e-5)


def test_a_row_that_has_stopped_shows_its_last_output_as_every_later_step():
    model, alone, n_loops = stopping(dataclasses.replace(SMALL, step_weight=1.0))
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
def test_the_gain_is_penalised_above_the_bound_alone_and_changes_nothing_else(fields):
    plain = model_of(dataclasses.replace(SMALL, **fields))
    terms = {}
    for bound in (0.0, 1e6):
        method = dataclasses.replace(SMALL, spectral_weight=2.0, spectral_bound=bound, **fields)
        guarded = LatentModel(plain.backbone, plain.tokenizer, method).double().train()
        guarded.loop.load_state_dict(plain.loop.state_dict())
        out = guarded.loss(MIXED)
        terms[bound] = out.terms["gain"].item()
        assert out.terms["answer"].item() == pytest.approx(plain.loss(MIXED).terms["answer"].item(), abs=1e-9)
        assert out.loss.item() == pytest.approx(out.terms["answer"].item() + 2 * terms[bound], rel=1e-5)
    assert terms[0.0] > 0 and terms[1e6] == 0


def test_the_gain_penalty_is_the_square_of_what_is_above_the_bound():
    penalties = []
    for bound in (0.0, 0.1):
        model = model_of(dataclasses.replace(SMALL, spectral_weight=1.0, spectral_bound=bound))
        penalties.append(model.loss(MIXED).terms["gain"].item())
    gain = penalties[0] ** 0.5
    assert gain > 0.1
    assert penalties[1] == pytest.approx((gain - 0.1) ** 2, rel=1e-5)


def test_terms_are_divided_by_the_counts_of_the_global_batch():
    model = model_of(dataclasses.replace(SMALL, deep_weight=1.0, **HALT))
    whole = model.loss(MIXED).terms
    halves = [model.batch(model.rows(part)) for part in (MIXED[:3], MIXED[3:])]
    counts = {name: sum(half.counts()[name] for half in halves) for name in halves[0].counts()}
    outs = [model(half, n_items=counts).terms for half in halves]
    for name in ("answer", "deep", "halt"):
        assert sum(out[name].item() for out in outs) == pytest.approx(whole[name].item(), rel=1e-5)


def test_the_gain_penalty_of_micro_batches_is_their_mean():
    model = model_of(dataclasses.replace(SMALL, spectral_weight=1.0, spectral_bound=0.1))
    parts = [model.batch(model.rows(part)) for part in (MIXED[:2], MIXED[2:])]
    alone = [model(part).terms["gain"].item() for part in parts]
    shares = [model(part, n_items={**part.counts(), "rows": len(MIXED)}).terms["gain"].item() for part in parts]
    assert min(alone) > 1e-3
    assert shares == pytest.approx([alone[0] * 2 / 6, alone[1] * 4 / 6])
