"""SLR's invariant 11 (slr.md, section 9): passes and their caches, on GPT-2 and Llama shapes.

11. Cached == uncached; the number of passes is the formula's.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from innerloop import Example, LatentModel
from innerloop.halting.evidence import StopInputs
from innerloop.passes.context import Context
from tests.methods.reference import Reference
from tests.methods.slowly import assert_thinks
from tests.methods.tools import (
    FULL,
    MIXED,
    PLAIN,
    QUESTIONS,
    ROUNDED,
    WITH_LORA,
    assert_close,
    by_answer,
    by_arch,
    by_region,
    by_scope,
    change,
    lean_towards_end,
    logits_of,
    on,
    passes,
    same_weights,
    thought_of,
)

STEADY = change(PLAIN, loop={"residual": "A", "rescale": "rms", "time": "lookup"})
LOOKS = {"rule": "kl", "site": "answer", "threshold": torch.inf}


@by_scope
@by_arch
@by_answer
@pytest.mark.parametrize("h0", ["embed", "forward"])
def test_11_cached_equals_uncached(scope, arch, answer_from, h0):
    model = on(arch, change(STEADY, loop_scope=scope, answer_from=answer_from, h0=h0))
    assert_thinks(model, lambda slow, example: uncached(model, example)[-1], ROUNDED)


def uncached(model: LatentModel, example: Example) -> list[Tensor]:
    """slr.md, section 3, with every pass over the whole row and nothing remembered.

    Returns the input embeddings of what <eot> follows, were the answer given after iteration 1, 2 and so on.
    """
    slow, method = Reference(model), model.method
    asked, bot, lat = slow.question(example.question), slow.marker("<bot>"), slow.marker("<lat>")
    prefix, region = {
        "slots": ([*asked, *bot], lat * method.n_slots),
        "all": ([], asked),
        "last": (asked, bot),
        "append": ([*asked, *bot], lat),
    }[method.loop_scope]
    past, h = slow.embed(prefix), slow.embed(region)
    n = len(h)
    if method.h0 == "forward":
        h = slow.rho(slow.read(past if method.loop_scope == "append" else torch.cat([past, h]))[0][-n:])
    first, seen = h, []
    for t in range(1, method.max_loops + 1):
        fed = h + slow.e(t)
        u = slow.read(torch.cat([past, fed]))[0][-n:]
        if method.loop_scope == "append":
            past = torch.cat([past, fed])
        h = slow.mix(slow.rho(u), first, h)
        last = {"refeed": [h], "kv_last": [] if method.loop_scope == "append" else [fed]}[method.answer_from]
        seen.append(torch.cat([past, *last]))
    return seen


# 11, of the answer's first word: stop.site = answer


def words_read(model: LatentModel, examples: Sequence[Example]) -> list[Tensor]:
    """Return what the stop score looks at after each iteration: logits (B, V)."""
    seen, rule = [], model.loop.stop
    score = rule.score

    def note(now: StopInputs) -> Tensor:
        assert now.logits.shape[1] == 1
        seen.append(now.logits[:, 0])
        return score(now)

    rule.score = note
    try:
        thought_of(model, examples, model.new_trace())  # a trace has the score of the last iteration too
    finally:
        del rule.score
    return seen


@by_scope
@by_arch
@by_answer
@pytest.mark.parametrize("h0", ["embed", "forward"])
def test_11_the_first_word_that_a_stop_score_sees_is_that_of_an_uncached_pass(scope, arch, answer_from, h0):
    model = on(arch, change(STEADY, loop_scope=scope, answer_from=answer_from, h0=h0, stop=LOOKS))
    slow, together = Reference(model), words_read(model, MIXED)
    assert len(together) == 3
    with torch.no_grad():
        eot = slow.embed([*slow.marker("<eot>"), *model.encoder.answer_prefix_ids()])
        for row, example in enumerate(MIXED):
            alone = words_read(model, [example])
            for batched, single, thought in zip(together, alone, uncached(model, example), strict=True):
                expected = slow.read(torch.cat([thought, eot]))[1][-1]
                assert_close(batched[row], expected, ROUNDED)
                assert_close(single[0], expected, ROUNDED)


@by_region
@by_answer
@pytest.mark.parametrize(
    "fields",
    [{}, {"decode_lora": True}, {"prefix_kv": "per_iter"}, {"loop.time_inject": "token"}, {"loop.site": "pre_norm"}],
    ids=str,
)
def test_11_the_first_word_that_a_stop_score_sees_is_that_of_the_answer_given_then(scope, answer_from, fields):
    if (scope != "slots" and "loop.time_inject" in fields) or (scope == "all" and "prefix_kv" in fields):
        return  # refused
    model = on("gpt2", change(FULL, loop_scope=scope, answer_from=answer_from, stop=LOOKS, **fields))
    for t, words_BV in enumerate(words_read(model, MIXED), 1):
        rows = model.rows(MIXED)
        for row in rows:
            row.n_loops = t
        for word_V, logits_UV in zip(words_BV, logits_of(model, rows)):
            assert_close(word_V, logits_UV[len(model.encoder.answer_prefix_ids())], ROUNDED)


@by_scope
@by_arch
@by_answer
@pytest.mark.parametrize("fields", [{}, {"prefix_kv": "per_iter"}, {"stop": LOOKS}], ids=["base", "per_iter", "looks"])
def test_11_passes_and_positions_counted_by_a_hook_are_those_of_the_formula(scope, arch, answer_from, fields):
    """The answer's first word is looked at in one more pass in every iteration but the last."""
    if "prefix_kv" in fields and scope in ("all", "append"):
        return  # refused
    model = lean_towards_end(on(arch, change(FULL, loop_scope=scope, answer_from=answer_from, **fields)), -100.0)
    with passes(model) as seen:
        (generation,) = model.generate(QUESTIONS[:1], max_new_tokens=4)
    n_prefix, until = model.batch(model.prompts(QUESTIONS[:1])).bounds
    width = 1 if scope == "append" else until - n_prefix
    fed = width if answer_from == "refeed" else 0
    prefill, again = [n_prefix] if scope != "all" else [], [n_prefix] if "prefix_kv" in fields else []
    looked = [fed + 1 + len(model.encoder.answer_prefix_ids())] if "stop" in fields else []
    expected = [*prefill, *[*again, width, *looked] * 2, *again, width, fed + 1, 1, 1, 1]
    assert [embeds.shape[1] for embeds in seen] == expected
    assert (generation.cost.passes, generation.cost.positions) == (len(expected), sum(expected))


@by_arch
@pytest.mark.parametrize("scope", ["slots", "last"])
def test_11_the_prompt_read_in_every_iteration_is_the_uncached_pass_with_its_weights(scope, arch):
    method = change(PLAIN, loop_scope=scope, prefix_kv="per_iter", **WITH_LORA)
    refeed = on(arch, method)
    kv_last = same_weights(refeed, change(method, answer_from="kv_last"))

    def iterate(slow, example):
        """The prefix, and h_0 to h_T."""
        asked, bot = slow.question(example.question), slow.marker("<bot>")
        prefix, region = ([*asked, *bot], slow.marker("<lat>") * 3) if scope == "slots" else (asked, bot)
        past, h = slow.embed(prefix), [slow.embed(region)]
        for t in (1, 2, 3):
            with torch.no_grad(), refeed.loop.lora.at(t):
                h.append(slow.read(torch.cat([past, h[-1]]))[0][-len(h[-1]) :])
        return past, h

    def fed_once_more(slow, example):
        past, h = iterate(slow, example)
        return torch.cat([past, h[-1]])

    assert_thinks(refeed, fed_once_more)
    slow = Reference(kv_last)
    for example, logits in zip(MIXED, kv_last.answer_logits(MIXED)):
        # the answer attends to the prompt and latents of the last pass, which had its weights
        (past, h), context = iterate(slow, example), Context(kv_last.backbone, 1)
        with torch.no_grad():
            context.read(torch.cat([past, h[-2]])[None], weights=lambda: kv_last.loop.lora.at(3))
            rest = slow.embed([*slow.marker("<eot>"), *slow.written(example, 0)])
            expected = kv_last.backbone.head(context.read(rest[None]))[0, :-1]
        assert_close(logits, expected)
