"""Progressive loss: a batch goes on from iterations without a gradient, and learns what is written alone."""

import dataclasses

import pytest
import torch

from innerloop import Slr
from innerloop.errors import InputError
from innerloop.loop.hooks import LoopHook, hooked
from innerloop.methods import Lotus, SpiralThinker
from tests.fields import change, make
from tests.methods.tools import FULL, MIXED, PLAIN, assert_close, assert_same_gradients, gradients, on, states, stir
from tests.models import tiny_model

WITH_STEPS = tuple(example for example in MIXED if example.steps)
SHOWN = {"step_weight": 1.0, "slots_per_step": 1}
ALWAYS = {"progressive": 1.0, "free_loops": [3, 3]}
METHODS = {
    "slr": change(PLAIN, step_map="one2one", **SHOWN),
    "slr, everything": change(FULL, **SHOWN),
    "slr, gated": change(PLAIN, loop={"residual": "C", "time": "lookup", "bptt": 1}),
    "slr, all": change(FULL, loop_scope="all", deep={"weight": 1.0}),
    "slr, last, kv_last": change(PLAIN, loop_scope="last", answer_from="kv_last", prefix_kv="per_iter"),
    "lotus": make(Lotus, n_blocks=2, latents_per_block=2, step_weight=0.5),
    "lotus, refeed": make(Lotus, n_blocks=2, latents_per_block=2, last_pass="refeed", aux={"weight": 1.0}),
    "spiralthinker": make(SpiralThinker, latents_per_block=2, max_loops=2, ce_passes="all"),
    "... sequential": make(SpiralThinker, latents_per_block=2, max_loops=2, block_schedule="sequential"),
}
by_method = pytest.mark.parametrize("name", METHODS)


def pair(name: str, n: int = 3):
    """Return a model, rows that go on from n free iterations, and rows with as many iterations to learn from."""
    model = tiny_model(METHODS[name], "llama", num_hidden_layers=2).double()
    stir(model)
    rows = model.rows(WITH_STEPS)
    plain = [row.going_on(0) for row in rows]
    for row in (segment for whole in plain for segment in whole.segments()):
        row.n_loops += n if row.n_loops else 0
    return model.train(), [row.going_on(n) for row in rows], plain


class Cut(LoopHook):
    """Cuts the gradient where an iteration begins."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def on_input(self, state, iteration, rows):
        return state.detach() if iteration == self.iteration else state


@by_method
def test_its_loss_and_gradient_are_those_of_a_loop_that_is_cut_after_the_free_iterations(name):
    model, free, plain = pair(name)
    ours = model(model.batch(free))
    got = gradients(model, ours.loss)
    with hooked(model.loop, Cut(4)):
        reference = model(model.batch(plain))
        assert_same_gradients(got, gradients(model, reference.loss))
    assert_close(ours.loss, reference.loss)
    assert set(ours.terms) == {"answer"}


WHOLE = [name for name, method in METHODS.items() if not method.learns_every_pass and method.deep.weight == 0]


@pytest.mark.parametrize("name", WHOLE)
def test_without_free_iterations_it_is_the_loss_of_the_whole_loop(name):
    model, _, plain = pair(name, 0)
    whole = [dataclasses.replace(row, n_free=None) for row in plain]
    ours, full = model(model.batch(plain)).loss, model(model.batch(whole)).loss
    assert torch.equal(ours, full)
    assert_same_gradients(gradients(model, ours), gradients(model, full))


@pytest.mark.parametrize("name", ["slr", "slr, everything", "lotus", "spiralthinker"])
def test_the_gradient_reaches_none_of_the_free_iterations(name):
    model, free, _ = pair(name)
    with states(model) as seen:
        model(model.batch(free)).loss.backward()
    prompt, *passes = seen
    assert prompt.requires_grad
    assert not any(state.requires_grad for state in passes[:3])
    assert len(passes[3:]) > 1 and all(state.grad.abs().max() > 0 for state in passes[3:])


@by_method
def test_a_batch_loses_what_its_rows_lose_alone(name):
    model, free, _ = pair(name)
    together = model(model.batch(free))
    n = [sum(segment.counts()["answer"] for segment in [model.batch([row])]) for row in free]
    alone = sum(count * model(model.batch([row])).terms["answer"] for count, row in zip(n, free)) / sum(n)
    assert_close(together.terms["answer"], alone, 1e-6)


def test_draws_depend_on_seed_and_step_alone_and_are_those_of_all_processes():
    method = change(PLAIN, loop={"progressive": 0.5, "free_loops": [2, 5]})
    drawn = [method.loop.draw_free(f"0/{step}/0/0") for step in range(2000)]
    assert drawn == [method.loop.draw_free(f"0/{step}/7/0") for step in range(2000)]
    assert drawn != [method.loop.draw_free(f"1/{step}/0/0") for step in range(2000)]
    assert 0.45 < sum(n is None for n in drawn) / len(drawn) < 0.55
    assert all(drawn.count(n) > 200 for n in (2, 3, 4, 5))
    assert set(drawn) == {None, 2, 3, 4, 5}
    assert PLAIN.loop.draw_free("0/1/0/0") is None


def test_batches_of_a_trainer_alone_are_drawn_and_an_answer_never_is():
    model = on("llama", change(METHODS["slr"], loop=ALWAYS, loop_sampling="uniform"))
    batches = [model.rows(WITH_STEPS, seed=f"0/{step}/0/0") for step in range(20)]
    assert {row.n_loops for rows in batches for row in rows} == {4, 5, 6}
    assert all(row.n_free == 3 and not row.token_targets for rows in batches for row in rows)
    assert all(row.n_free is None and row.token_targets for row in model.rows(WITH_STEPS))
    assert [row.n_loops for row in model.prompts(["1 ; + 1"], loops=7)] == [7]
    assert model.method.with_loops(0).max_loops == 0


def test_a_method_of_a_share_of_nothing_is_the_method_without_bit_for_bit():
    model = on("llama", METHODS["slr, everything"])
    rows = model.rows(WITH_STEPS, seed="0/1/0/0")
    other = on("llama", change(METHODS["slr, everything"], loop={"progressive": 0.0, "free_loops": [0, 99]}))
    assert other.rows(WITH_STEPS, seed="0/1/0/0") == rows


REFUSED = [
    (Slr, {"loop": {"progressive": 1.5}}, "between 0 and 1"),
    (Slr, {"loop": {"free_loops": [5, 2]}}, "the fewest and the most"),
    (Slr, {"loop": {"free_loops": [-1, 2]}}, "whole numbers"),
    (Slr, {"loop": ALWAYS, "max_loops": 0}, "max_loops to at least 1"),
    (Lotus, {"loop": ALWAYS, "max_loops": 0}, "max_loops to at least 1"),
    (SpiralThinker, {"loop": ALWAYS, "pattern": "none"}, "max_loops to at least 1"),
    (Slr, {"loop": ALWAYS, "loop_scope": "append"}, "leave loop_scope=append"),
    (Slr, {"loop": ALWAYS, "stop": {"rule": "act"}}, "stop.rule=act out"),
    (Slr, {"loop": {**ALWAYS, "time": "none"}, "fixed_point": {"solver": "plain"}}, "set loop.progressive to 0"),
]


@pytest.mark.parametrize("method, fields, message", REFUSED, ids=lambda value: getattr(value, "name", None))
def test_what_cannot_go_on_is_refused(method, fields, message):
    with pytest.raises(InputError, match=message):
        method(**fields)
