"""What an engine cannot answer fails alone; memory that runs out; how much it holds at most."""

import pytest
import torch

from innerloop import InputError, Pause
from innerloop.engine.requests import fits
from innerloop.passes.context import Context
from tests.methods.tools import QUESTIONS
from tests.models import tiny_model
from tests.test_engine_continuous import LONG, POOL, N, answered, engine_of, longest, made, told


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
