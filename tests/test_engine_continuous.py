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

from innerloop import (
    AdaInfer,
    Coconut,
    Codi,
    Cot,
    Icot,
    InputError,
    Lotus,
    Mod,
    Mor,
    Pause,
    Pccot,
    RecurrentDepth,
    Slr,
)
from innerloop.engine import engine
from innerloop.engine.engine import Engine
from innerloop.engine.options import EngineOptions
from innerloop.engine.requests import fits
from innerloop.methods import Looped, SpiralThinker
from innerloop.passes.context import Context
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
    elif isinstance(METHODS[name], Looped | RecurrentDepth | Mod | Mor):
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
    for i, question in enumerate(POOL):
        at_work.admit(i, question)
    return max(at_work.most_positions(request.row, request.budget) for request in at_work.waiting)


def assert_company_does_not_matter(name, asked, n, batch_size, room, check_every):
    model, alone = made(name)
    chosen, options = list(asked[:n]), {"batch_size": batch_size, "max_positions": room and room * longest(model)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CHECK_EVERY", check_every)
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
    monkeypatch.setattr(engine, "CHECK_EVERY", check_every)
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


def test_a_question_that_is_too_long_fails_alone_with_its_reason():
    model = tiny_model(Pause(), max_position_embeddings=16)
    asked = ["2", LONG, "4 ; - 3"]
    for questions in (asked, [QUESTIONS[3]]):
        with pytest.raises(InputError, match=r"1 ; \+ 1 ; \+ 2.*at most 16.*shorten the question"):
            model.generate(questions)
    first, second, third = model.generate(asked, max_new_tokens=2, strict=False)
    assert "at most 16" in second.error and (second.text, second.answer, second.ended) == ("", None, False)
    assert (second.cost.passes, first.error, third.error) == (0, None, None)
    assert [first.text, third.text] == [g.text for g in model.generate([asked[0], asked[2]], max_new_tokens=2)]


BAD = {"": "is empty", " \n": "is empty", 7: "is a int", None: "is a NoneType", "1 \ud800": "no encoding has"}


@pytest.mark.parametrize("trace", [False, True])
def test_requests_that_are_no_questions_fail_alone_with_their_reasons(trace):
    model, alone = made("slots")
    asked = [POOL[0], *BAD, POOL[2]]
    found = model.generate(asked, max_new_tokens=N, strict=False, trace=trace)
    assert [told(found[0]), told(found[-1])] == [alone[0], alone[2]]
    for one, (question, reason) in zip(found[1:-1], BAD.items(), strict=True):
        assert reason in one.error and (one.text, one.ended, one.cost.passes) == ("", False, 0)
        with pytest.raises(InputError, match=reason):
            model.generate([POOL[0], question])


def test_a_question_that_the_tokenizer_refuses_fails_alone(monkeypatch):
    model, alone = made("cot")
    encode = type(model.tokenizer).encode

    def fussy(self, text, **options):
        if text.startswith(LONG):
            raise Exception("WordLevel error: Missing [UNK] token from the vocabulary")
        return encode(self, text, **options)

    monkeypatch.setattr(type(model.tokenizer), "encode", fussy)
    model.encoder._memory.clear()
    assert [fits(model, question) for question in POOL] == [question != LONG for question in POOL]
    found = model.generate(POOL, max_new_tokens=N, strict=False)
    assert "Missing [UNK]" in found[POOL.index(LONG)].error
    assert [told(one) for one in found if one.error is None] == [alone[i] for i in range(len(POOL)) if POOL[i] != LONG]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


class Scarce:
    """Memory for ``room`` columns of all rows together; a pass finds out when it has been made."""

    def __init__(self, monkeypatch, room, error=OUT_OF_MEMORY):
        self.failed, read = [], Context.read

        def scarce(context, embeds, *args, **options):
            found = read(context, embeds, *args, **options)
            if len(embeds) * context.length > room:
                self.failed.append(embeds.shape[1] > 1)
                raise error
            return found

        monkeypatch.setattr(Context, "read", scarce)


@pytest.mark.parametrize("name", ["cot", "coconut", "slots", "stops", "apart", "mor", "tah", "spiral"])
def test_where_memory_runs_out_fewer_rows_run_together_and_nobody_notices(name, monkeypatch):
    model, alone = made(name)
    most = max(positions for _, _, _, _, positions, *_ in alone)  # as if each had taken a column
    memory = Scarce(monkeypatch, 2 * most)
    assert list(map(told, model.generate(POOL, max_new_tokens=N, batch_size=6))) == alone
    assert 0 < len(memory.failed) < 8  # what has run out once is not asked for again
    assert name != "cot" or False in memory.failed


@pytest.mark.parametrize("batch_size", [1, 6])
def test_a_row_that_does_not_fit_into_memory_alone_fails_alone(batch_size, monkeypatch):
    model, alone = made("cot")
    lengths = [len(row) for row in model.prompts(POOL)]
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    memory = Scarce(monkeypatch, max(lengths) - 1, error)
    at_work = engine_of(model, 3, batch_size=batch_size)
    found = answered(at_work, strict=False)
    assert set(memory.failed) >= {True}
    for one, length, (ids, *_) in zip(found, lengths, alone, strict=True):
        if length == max(lengths):
            assert f"takes {length} positions and does not fit" in one.error and "can't allocate" in one.error
        else:
            assert one.ids == ids[:3] and one.error is None
    with pytest.raises(RuntimeError, match="can't allocate"):
        model.generate(POOL, max_new_tokens=3, batch_size=batch_size)
    monkeypatch.undo()
    assert [one.ids for one in answered(at_work)] == [ids[:3] for ids, *_ in alone]
    Scarce(monkeypatch, 0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))  # nobody's memory
    with pytest.raises(RuntimeError, match="mat1"):
        model.generate(POOL, strict=False)


@pytest.mark.parametrize("name", ["slots", "spiral"])
@pytest.mark.parametrize("room", [1.0, 1.9, 5.0])
def test_the_engine_keeps_to_its_positions(name, room):
    model, _ = made(name)
    max_positions, most = int(room * longest(model)), 0
    at_work = engine_of(model, batch_size=8, max_positions=max_positions)
    for _ in at_work.groups(POOL):
        busy = [
            request
            for decode_batch in (at_work.decode_batch, at_work.ready)
            if decode_batch is not None
            for request in decode_batch.requests
        ]
        written = [len(request.row) + len(request.written) + request.n_latents for request in busy]
        assert (
            sum(written)
            <= sum(at_work.most_positions(request.row, request.budget) for request in busy)
            <= max_positions
        )
        most = max(most, len(busy))
    assert most > 1 or room < 5.0


def test_a_question_that_needs_more_than_all_positions_fails_alone():
    model, alone = made("slots")
    max_positions = longest(model) - 1
    with pytest.raises(InputError, match=rf"the {max_positions} of max_positions; raise it"):
        model.generate(POOL, max_new_tokens=N, max_positions=max_positions)
    found = model.generate(POOL, max_new_tokens=N, max_positions=max_positions, strict=False)
    for question, one, known in zip(POOL, found, alone, strict=True):
        if question == LONG:
            assert f"take {max_positions + 1} positions" in one.error
        else:
            assert told(one) == known
    with pytest.raises(InputError, match="max_positions"):
        model.generate([POOL[0]], max_new_tokens=N, beams=2, max_positions=max_positions)


@pytest.mark.parametrize("name", ["slots", "coconut", "mod", "tah", "spiral"])
def test_the_cache_holds_no_more_than_the_rows_that_write(name):
    """Columns that no row uses any more are dropped, or a cache that rows keep joining would grow without end."""
    model, _ = made(name)
    steady = engine_of(model, batch_size=3)
    for _ in steady.groups([f"{i % 5} ; + {i % 3}" for i in range(60)]):
        if steady.decode_batch is not None:
            longest = max(int(n) for n in steady.decode_batch.context.next_position_B)
            n_waits = N * (name in ("tah", "spiral"))  # a row that waits leaves columns that others use
            assert steady.decode_batch.context.length <= longest + 4 * n_waits + 8


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
    monkeypatch.setattr(engine, "CHECK_EVERY", 100)
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
