"""What prompts begin with alike is read once, and nobody notices but the meter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from innerloop import Cot, Pause, Slr
from innerloop.engine import shared_prefix as prefix
from innerloop.engine.decoding import DecodeBatch
from innerloop.loop.hooks import hooked
from innerloop.measure.latents import Recorder
from tests.close import assert_close
from tests.methods.tools import ROUNDED, lean_towards_end, passes, sharp_model, stir
from tests.models import tiny_model
from tests.test_engine_continuous import made, quiet, told

SHARED = ["cot", "pause", "coconut", "codi", "slots", "kv_last", "per_iter", "stops", "pccot", "lotus", "spiral"]
N = 5
texts = st.lists(st.sampled_from("1234+*-;="), max_size=8).map(" ".join)
HEADER = "3 ; + 1 = 4 ; 4 * 2 = 3 ;"
ASKED = [f"{HEADER} {end}" for end in ("2", "4 ; - 3", "1 ; + 1 ; + 2")]
PER_ITER = Slr(n_slots=2, max_loops=2, prefix_kv="per_iter", loop={"lora": "per_iter", "lora_rank": 2})


def answers(model, asked, spared_from, **options):
    """Return what is answered where sharing must spare so much, and the logits of each row's first token."""
    logits, start = {}, DecodeBatch.start

    def note(self, pending):
        start(self, pending)
        logits.update((repr(request.row.ids()), row) for request, row in zip(self.requests, self.logits_RV))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "SPARED_FROM", spared_from)
        patch.setattr(DecodeBatch, "start", note)
        found = model.generate(asked, max_new_tokens=N, **options)
    return found, torch.stack([logits[repr(row.ids())] for row in model.prompts(asked)])


def assert_shared_alike(model, asked, batch_size=8):
    (found, logits), (plain, expected) = (answers(model, asked, n, batch_size=batch_size) for n in (1, 10**9))
    assert [(one.ids, one.ended, one.cost.loops) for one in found] == [(p.ids, p.ended, p.cost.loops) for p in plain]
    assert_close(logits, expected, ROUNDED)
    return found, plain


@pytest.mark.parametrize("name", SHARED)
@settings(max_examples=4, **quiet)
@given(header=texts, ends=st.lists(texts, min_size=2, max_size=5), batch_size=st.integers(2, 5))
def test_rows_that_share_what_they_begin_with_answer_as_if_they_did_not(name, header, ends, batch_size):
    assert_shared_alike(made(name)[0], [f"1 {header} {end}" for end in ends], batch_size)


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
@pytest.mark.parametrize("method", [Cot(), Slr(n_slots=3, max_loops=2)], ids=["cot", "slr"])
def test_windows_shorter_than_what_is_shared_see_the_same(method, arch):
    model = tiny_model(method, arch).double()
    stir(model)
    assert_shared_alike(lean_towards_end(model, 1.0), ASKED)


@pytest.mark.parametrize("name", ["cot", "slots", "coconut"])
def test_one_row_is_charged_what_it_reads_for_all_and_time_is_everybodys(name):
    model, _ = made(name)
    n = len(model.prompts([HEADER])[0].prefix[0].ids) - 1  # without the line break
    with passes(model) as seen:
        found, plain = assert_shared_alike(model, ASKED)
    assert seen[0].shape[:2] == (1, n)
    billed = [one.cost.positions - other.cost.positions for one, other in zip(found, plain)]
    assert sorted(billed) == [-n, -n, 0]
    assert sorted(one.cost.passes - other.cost.passes for one, other in zip(found, plain)) == [0, 0, 1]
    assert [one.cost.positions + one.cost.cached >= p.cost.positions for one, p in zip(found, plain)] == [True] * 3
    assert len({one.cost.seconds["prefill"] for one in found}) == 1 and found[0].cost.seconds["prefill"] > 0
    asked_twice, _ = assert_shared_alike(model, [*ASKED, ASKED[1]])
    assert asked_twice[3].cost.positions < asked_twice[1].cost.positions  # and of what is the same, one alone is read


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: made("looped")[0], {}),
        (lambda: made("mod")[0], {}),
        (lambda: made("apart")[0], {}),
        (lambda: sharp_model(PER_ITER), {}),
        (lambda: made("slots")[0], {"trace": True}),
        (lambda: made("slots")[0], {"batch_size": 1}),
    ],
    ids=["looped", "mod", "apart", "per_iter", "trace", "alone"],
)
def test_where_the_prompt_is_not_read_once_and_alike_nothing_is_shared(model, options, monkeypatch):
    model = model()
    plain = model.generate(ASKED, max_new_tokens=N, **options)
    monkeypatch.setattr(prefix, "SPARED_FROM", 1)
    assert list(map(told, model.generate(ASKED, max_new_tokens=N, **options))) == list(map(told, plain))


def test_sharing_must_pay_for_its_pass_and_while_latents_are_edited_nothing_is_shared(monkeypatch):
    model = sharp_model(Pause())
    for n_words, n_rows, shares in ((60, 5, False), (64, 5, True), (260, 2, True), (300, 1, False)):
        rows = model.prompts([" ".join(["1"] * n_words + [end]) for end in "1234+"[:n_rows]])
        assert prefix.n_shared(model, rows) == (n_words if shares else 0)
    assert prefix.n_shared(model, model.prompts(["1", "1 ; + 2"])) == 0
    monkeypatch.setattr(prefix, "SPARED_FROM", 1)
    model, _ = made("slots")
    rows = model.prompts(ASKED)
    assert prefix.n_shared(model, rows) > 0
    with hooked(model.loop, Recorder()):
        assert prefix.n_shared(model, rows) == 0
