"""The film of a canvas: what was committed when, what was masked again, in a trace, on the page and in the terminal."""

from itertools import pairwise

import pytest
from rich.console import Console

from innerloop import BlockDiffusion, Dream, Llada
from innerloop.lens import look, page_of
from innerloop.lens.film import film_grid
from innerloop.loop.trace import HIDDEN
from innerloop.tasks import Chain
from innerloop.terminal.views import answer_view
from tests.fields import change
from tests.models import chain_examples, tiny_model

G, ASKED = 12, ["3 ; + 4 ; * 2", "1 ; + 1", "2"]
REMDM = {"commit": "remdm", "steps": 8, "remask": {"cap": 0.4}}
MADE = {
    "one token a pass": Llada(gen_length=G),
    "blocks": change(Llada(gen_length=G), sampler={"steps": 6, "block_length": 4}),
    "a threshold": change(Llada(gen_length=G), sampler={"commit": "threshold", "threshold": 0.05}),
    "dream": change(Dream(gen_length=G), sampler={"steps": 5}),
    "masked again": change(Llada(gen_length=G), sampler=REMDM),
    "guidance": change(Llada(gen_length=G), sampler={"guidance": 1.5, "steps": 4}),
    "block diffusion": BlockDiffusion(gen_length=G, block_length=4),
}


@pytest.mark.parametrize("name", MADE)
def test_frames_follow_one_another_from_masks_to_the_answer(name):
    model = tiny_model(MADE[name])
    plain = model.generate(ASKED, max_new_tokens=G, temperature=0.7)
    answers = model.generate(ASKED, max_new_tokens=G, temperature=0.7, trace=True)
    assert [one.ids for one in answers] == [one.ids for one in plain]  # who is looked at answers the same
    for answer in answers:
        frames = answer.trace.frames
        assert len(frames) == answer.cost.loops
        assert set(frames[0].before) == {HIDDEN}
        assert all(frame.after == after.before for frame, after in pairwise(frames))
        assert frames[-1].after[: len(answer.ids)] == answer.ids
        for frame in frames:
            new = [i for i, (was, now) in enumerate(zip(frame.before, frame.after)) if was == HIDDEN != now]
            assert set(new) <= set(frame.places)
            assert frame.shown.top_ids.shape == (1, len(frame.places), model.new_trace().top_k)


def test_what_is_masked_again_is_told():
    model, states = tiny_model(MADE["masked again"]), set()
    for one in model.generate(ASKED * 2, max_new_tokens=G, trace=True):
        cells = [cell for line in film_grid(one.trace.frames, model.tokenizer)[0] for cell in line.cells if cell]
        states |= {cell.state for cell in cells}
    assert states >= {"committed", "kept", "masked again"}


def test_the_page_and_the_terminal_show_each_pass():
    model = tiny_model(MADE["blocks"])
    record = look(model, Chain(n_ops=2), chain_examples(2), max_new_tokens=G)
    one = record.looks[0]
    assert record.family == "canvas" and [column.name for column in one.columns] == [str(i + 1) for i in range(G)]
    assert [line.name for line in one.grid] == [f"pass {i + 1}" for i in range(one.cost.passes)]
    committed = [cell for line in one.grid for cell in line.cells if cell is not None and cell.state == "committed"]
    assert len(committed) >= len(one.text.split()) and all(0 <= cell.top[0][1] <= 1 for cell in committed)
    assert one.grid[0].cells[5] is None and any("no cell there" in note for note in one.notes)  # a block to come
    assert '"state":"committed"' in page_of(record)
    answer = model.generate(ASKED[:1], max_new_tokens=G, trace=True)[0]
    console = Console(width=200, record=True)
    console.print(answer_view(answer, model.tokenizer))
    lines = console.export_text().splitlines()
    passes = [line for line in lines if line.strip()[:1].isdigit() and "[" in line]
    assert len(passes) == answer.cost.passes
    assert sum(line.count("[") for line in passes) >= sum(token != HIDDEN for token in answer.trace.frames[-1].after)
