"""Continuous batching: whoever comes and goes, a row writes what it writes alone, and all are answered once."""

import gc
import itertools
import resource
import time
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from innerloop import AdaInfer, Coconut, Codi, Cot, Icot, InputError, Lotus, Mod, Mor, Pause, Pccot, RecurrentDepth, Slr
from innerloop.engine import batching
from innerloop.engine.engine import Engine
from innerloop.engine.options import EngineOptions
from innerloop.methods import Looped, ParScale, SpiralThinker
from tests.methods.reference import Reference
from tests.methods.test_tah_answering import deciding
from tests.methods.tools import QUESTIONS, halting, lean_towards, lean_towards_end, sharp_model, stir
from tests.models import tiny_model

LONG = "1 ; + 1 ; + 2 ; - 4 ; * 3 ; + 4 ; * 2 ; - 1 ; + 2"
POOL = [*QUESTIONS, LONG, "3 ; + 1", "4 ; * 4 ; + 2"]
N = 14
STOPS = Slr(n_slots=3, max_loops=4, loop={"residual": "A", "rescale": "rms", "time": "lookup"}, stop={"rule": "delta"})
SPIRAL = SpiralThinker(pattern="odd", latents_per_block=2, max_loops=2)
OPENS = {"<bol>": 1.0, "<eot>": 1.0, "<bot>": 1.0, "<eos>": 2.5}
METHODS = {
    "cot": Cot(),
    "pause": Pause(),
    "icot": Icot(),
    "coconut": Coconut(),
    "codi": Codi(n_latents_total=3),
    "slots": Slr(n_slots=4, max_loops=2),
    "append": Slr(loop_scope="append", max_loops=2),
    "kv_last": Slr(n_slots=3, max_loops=2, answer_from="kv_last"),
    "per_iter": Slr(n_slots=3, max_loops=2, loop={"lora": "per_iter", "lora_rank": 2}, decode_lora=True),
    "stops": STOPS,
    "pccot": Pccot(n_slots=3, max_loops=2),
    "lotus": Lotus(n_blocks=2, latents_per_block=3, max_loops=2),
    "looped": Looped(max_loops=2),
    "recurrent_depth": RecurrentDepth(n_prelude=1, n_core=1, n_coda=1, max_loops=3),
    "chained": RecurrentDepth(n_prelude=1, n_core=1, n_coda=1, max_loops=2, chains_state=True),
    "mod": Mod(),
    "mor": Mor(n_recursions=2),
    "parscale": ParScale(streams=2, n_prefix=3, prefix_bias=-1.0),
    "apart": Slr(n_slots=2, max_loops=2, decoder={"kind": "separate"}),
}


@cache
def made(name: str):
    """Return a model whose rows end at different times, some never, and what it answers to each question alone."""
    if name == "tah":
        model = deciding("llama")
    elif name == "spiral":
        model = lean_towards(tiny_model(SPIRAL, "gpt2").double(), OPENS)
    elif name == "stops":
        model = lean_towards_end(halting("gpt2", STOPS), 1.0)
    elif name == "adainfer":
        model = tiny_model(AdaInfer(layers=(1, 2)), "llama").double()
    elif isinstance(METHODS[name], Looped | RecurrentDepth | Mod | Mor | ParScale):
        model = lean_towards_end(tiny_model(METHODS[name], "llama", num_hidden_layers=3).double(), 1.0)
    else:
        model = lean_towards_end(sharp_model(METHODS[name]), 1.0)
    model.eval()
    return model, [told(model.generate([question], max_new_tokens=N)[0]) for question in POOL]


def engine_of(model, n=N, **options):
    return Engine(model, EngineOptions(max_new_tokens=n, **options))


def answered(used, questions=POOL, **options):
    """Return what an engine answers, in the order of the questions."""
    found = dict(used.run(questions, **options))
    assert sorted(found) == list(range(len(questions)))
    return [found[i] for i in range(len(questions))]


def told(one):
    """Everything that must not depend on the company."""
    cost = one.cost
    counted = (cost.passes, cost.positions, round(cost.flops), cost.loops, cost.thought_tokens)
    return one.ids, one.text, one.ended, *counted, one.answer, one.depths


every_method = pytest.mark.parametrize("name", [*METHODS, "tah", "spiral", "adainfer"])
any_company = given(
    asked=st.permutations(range(len(POOL))),
    n=st.integers(1, len(POOL)),
    batch_size=st.integers(1, 5),
    room=st.sampled_from([None, 1, 3]),
    check_every=st.sampled_from([None, 3, 8]),
)
quiet = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


def longest(model):
    """Return the positions that the longest question of the pool may come to take."""
    at_work = engine_of(model)
    for question in POOL:
        at_work.submit(question)
    return max(at_work.most_positions(request.row, request.budget) for request in at_work.waiting)


def assert_company_does_not_matter(name, asked, n, batch_size, room, check_every):
    model, alone = made(name)
    chosen, options = list(asked[:n]), {"batch_size": batch_size, "max_positions": room and room * longest(model)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "CHECK_EVERY", check_every)
        found = model.generate([POOL[i] for i in chosen], max_new_tokens=N, **options)
    assert list(map(told, found)) == [alone[i] for i in chosen]


@every_method
@settings(max_examples=3, **quiet)
@any_company
def test_a_row_writes_and_costs_what_it_does_alone(name, **company):
    assert_company_does_not_matter(name, **company)


@pytest.mark.slow
@every_method
@settings(max_examples=25, **quiet)
@any_company
def test_a_row_writes_and_costs_what_it_does_alone_in_any_company(name, **company):
    assert_company_does_not_matter(name, **company)


def assert_as_alone(model, questions=POOL, n=N, batch_size=3):
    """Rows that come and go write and cost what they do alone."""
    together = model.generate(questions, max_new_tokens=n, batch_size=batch_size)
    for question, one in zip(questions, together, strict=True):
        assert told(one) == told(model.generate([question], max_new_tokens=n)[0])


@pytest.mark.parametrize("kv_share", ["first_loop", "last_loop", "mean"])
def test_rows_join_others_that_keep_one_iteration_for_all(kv_share):
    method = Looped(max_loops=2, kv_share=kv_share)
    model = tiny_model(method, "gpt2", num_hidden_layers=2).double()
    assert_as_alone(lean_towards_end(model, 2.0), POOL[:6], 6)


WINDOWED = {
    "append": Slr(loop_scope="append", max_loops=4, loop={"residual": "none"}, stop={"rule": "delta"}),  # rows stop
    "all": Slr(loop_scope="all", max_loops=2),  # regions are as long as questions
    "spiral": SPIRAL,  # rows wait for others
    "restrict": Looped(max_loops=3, kv_missing="restrict", stop={"rule": "delta", "threshold": 0.3}),  # tokens leave
    "run_on": Looped(max_loops=3, kv_missing="full_compute", stop={"rule": "delta", "threshold": 0.3}),
}


@pytest.mark.parametrize(
    ("name", "arch"), [(name, "mistral") for name in WINDOWED] + [("all", "gemma2"), ("append", "gemma2")]
)
def test_windows_do_not_count_padding(name, arch):
    if name == "append":
        model = lean_towards_end(halting(arch, WINDOWED[name]), 1.0)
    else:
        model = tiny_model(WINDOWED[name], arch).double()
        stir(model)
        model = lean_towards(model, OPENS if name == "spiral" else {"<eos>": 1.0})
    assert_as_alone(model, POOL[:7], 8, batch_size=4)


@pytest.mark.parametrize("name", ["cot", "coconut", "slots"])
def test_alone_is_what_the_plain_reference_writes(name):
    model, alone = made(name)
    slow = Reference(model)
    for question, (ids, *_) in zip(POOL, alone):
        assert ids == slow.write(question, N)


def test_rows_that_wait_join_those_that_write_and_answers_come_as_soon_as_they_are_there():
    model, alone = made("slots")
    with_company = engine_of(model, batch_size=3)
    sizes, ready = [], []
    for _ in with_company.groups(POOL):
        sizes.append(0 if with_company.decode_batch is None else len(with_company.decode_batch.requests))
        ready.append(with_company.ready is not None)
    assert max(sizes) == 3 and any(ready)
    lengths = sorted(len(ids) for ids, *_ in alone)
    by_threes = sum(max(lengths[i : i + 3]) for i in range(0, len(lengths), 3))  # the least that waves alone could need
    assert sum(size > 0 for size in sizes) < by_threes
    model, alone = made("cot")
    order = [index for index, _ in engine_of(model, batch_size=len(POOL)).run(POOL)]
    lengths = [len(alone[i][0]) for i in order]
    assert sorted(order) == list(range(len(POOL)))
    assert lengths == sorted(lengths) and len(set(lengths)) > 2


@pytest.mark.parametrize("n_seen", [1, 2, 3, 7])
@pytest.mark.parametrize("check_every", [1, 8])
def test_an_engine_left_early_leaves_the_model_as_it_was_and_answers_again(n_seen, check_every, monkeypatch):
    monkeypatch.setattr(batching, "CHECK_EVERY", check_every)
    model, alone = made("slots")
    used = engine_of(model, batch_size=2)
    model.train()
    model.loop.eval()  # a part that is in another mode than the rest
    groups = used.groups(POOL[::-1])
    for _ in range(n_seen):
        next(groups)
        assert model.training and model.backbone.training and not model.loop.training
    groups.close()
    assert model.training and model.backbone.training and not model.loop.training
    model.eval()
    assert list(map(told, answered(used))) == alone


def test_an_engine_answers_after_an_error_but_no_other_questions_while_it_is_at_work(monkeypatch):
    model, alone = made("slots")
    used = engine_of(model, batch_size=2)
    run = used.groups(POOL)
    for _ in range(3):
        next(run)
    with pytest.raises(InputError, match="still answering"):
        next(used.run(POOL))

    def fail(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(model.backbone, "head", fail)
        next(run)
    assert list(map(told, answered(used))) == alone


def test_two_engines_take_turns_on_one_model_and_one_ends_sooner():
    model = tiny_model(Cot(), "gpt2").double()
    expected = [told(one) for one in model.generate(POOL, max_new_tokens=N)]
    model.train()  # with dropout, which must stay off in both
    short, long = (engine_of(model, n, batch_size=2).groups(POOL[:k]) for n, k in ((2, 2), (N, len(POOL))))
    found = {}
    for _, group in itertools.zip_longest(short, long, fillvalue=[]):
        found |= dict(group)
    assert [told(found[i]) for i in range(len(POOL))] == expected
    assert model.training


def test_seconds_are_those_of_the_engine_not_of_who_reads_its_answers():
    model, _ = made("cot")
    start, slept, costs = time.perf_counter(), 0.0, []
    for _, one in engine_of(model, batch_size=3).run(POOL):
        costs.append(one.cost)
        time.sleep(0.03)
        slept += 0.03
    spent = sum(sum(cost.seconds.values()) for cost in costs)
    assert 0 < spent < time.perf_counter() - start - slept


@pytest.mark.parametrize("name", ["looped", "mod", "mor", "tah", "adainfer"])
def test_a_question_asked_twice_has_the_depths_of_its_own_tokens(name):
    model, alone = made(name)
    for first, second in itertools.pairwise([*range(len(POOL)), 0]):
        asked = [first, second, first, first]
        found = model.generate([POOL[i] for i in asked], max_new_tokens=N)
        assert [one.depths for one in found] == [alone[i][-1] for i in asked]


class Asked(TorchDispatchMode):
    """Counts what makes the host wait for a device: asking it for numbers, or handing it some."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put", "index_put_") else []
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh") or any(
            index.dtype in (torch.bool, torch.uint8) for index in indices
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_what_makes_the_host_wait_is_noticed():
    with Asked() as asked:
        bool(torch.zeros(1)[0] > 0)
        torch.as_tensor(5, device="cpu")
        torch.zeros(3)[torch.zeros(3) > 0]
    assert asked.found.count("_local_scalar_dense") == 1 and "lift_fresh" in asked.found and "index" in asked.found


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
@pytest.mark.parametrize("name", ["cot", "slots", "append", "coconut", "lotus", "pccot", "looped", "recurrent_depth"])
def test_the_host_never_waits_for_the_device_between_two_looks(name, arch, monkeypatch):
    """Neither in a loop nor in a step of writing, whatever is padded (style.md, section 4)."""
    monkeypatch.setattr(batching, "CHECK_EVERY", 100)
    model = tiny_model(METHODS[name], arch).eval()
    at_work = engine_of(model, batch_size=3)
    groups = at_work.groups([POOL[0], POOL[3], POOL[7]])
    next(groups)
    in_loops, inner = Asked(), model.loop.forward

    def watched(*args, **kwargs):
        with in_loops:
            return inner(*args, **kwargs)

    monkeypatch.setattr(model.loop, "forward", watched)
    next(groups)  # the prefill batch, and the first token
    with Asked() as in_steps:
        for _ in range(N - 2):
            next(groups)
    assert at_work.decode_batch is not None and len(at_work.unseen.tokens) == N - 1
    assert (in_loops.found, in_steps.found) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slots", "mod", "tah"])
def test_thousands_of_requests_leave_no_memory_behind(name):
    model, _ = made(name)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 8, (3000,), generator=generator).tolist()
    asked = [" ; ".join(["1", *["+ 2"] * n]) for n in lengths]
    peaks, seen = [], []
    for index, _ in engine_of(model, 8, batch_size=16).run(asked):
        seen.append(index)
        if len(seen) % 500 == 0:
            gc.collect()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert sorted(seen) == list(range(len(asked)))
    assert peaks[-1] - peaks[1] < 0.02 * peaks[1]
