"""Looking inside: the record is the trace, and the page holds the record and nothing that could break it."""

import json
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Literal

import pytest
from rich.console import Console

from innerloop import methods
from innerloop.engine.latent_model import LatentModel
from innerloop.errors import InputError
from innerloop.lens import Look, Record, look, page_of, page_path, terminal_view, write_page
from innerloop.lens.latents import names_of_columns
from innerloop.lens.record import answer_alone
from innerloop.measure.readout import shown_steps
from innerloop.methods import Coconut, Cot, Looped, Lotus, Method, NoCot, Pause, Slr, SpiralThinker
from innerloop.tasks import Chain
from innerloop.terminal.views import answer_view, trace_view
from innerloop.text.examples import Example
from tests.fields import change
from tests.methods.tools import lean_towards
from tests.models import chain_examples, tiny_model

TASK = Chain(n_ops=3)
LOTUS = Lotus(n_blocks=2, latents_per_block=3, step_weight=1.0)
COCONUT = Coconut(latents_per_step=1, curriculum={"max_stage": 3})
SLR = Slr(n_slots=3, max_loops=2, slots_per_step=1, step_weight=1.0)
THOUGHT: list[Method] = [
    LOTUS,
    SLR,
    Slr(loop_scope="all", max_loops=2, loop={"residual": "sum", "rescale": "none", "time": "none"}),
    COCONUT,
    methods.Codi(n_latents_total=3),
    methods.SimCot(),
    Pause(n_pauses=2),
    SpiralThinker(latents_per_block=2, max_loops=2),
]
DEPTH: list[Method] = [
    Looped(max_loops=3),
    Looped(max_loops=3, stop={"rule": "delta", "threshold": 0.4}),
    methods.RecurrentDepth(max_loops=2),
    methods.Mor(),
    methods.Mod(),
    methods.Tah(),
]


def named(method: Method) -> str:
    return method.name


def seen(method: Method, n: int = 2, **options: object) -> tuple[LatentModel, Record]:
    model = tiny_model(method)
    return model, look(model, TASK, chain_examples(n), max_new_tokens=6, **options)


def answered(model: LatentModel, i: int = 0, most: int = 6):
    return answer_alone(model, TASK, chain_examples(i + 1)[i], max_new_tokens=most)


def firsts(cells) -> list[float]:
    return [cell.top[0][1] for cell in cells]


def tops(cells) -> list[list[float]]:
    return [[p for _, p in cell.top] for cell in cells]


class Scripts(HTMLParser):
    """What a browser finds in the script elements of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "script"
        if self.inside:
            self.found.append((dict(attrs), ""))

    def handle_data(self, data):
        if self.inside:
            attrs, text = self.found[-1]
            self.found[-1] = attrs, text + data

    def handle_endtag(self, tag):
        self.inside = False

    def record(self) -> dict:
        (text,) = (text for attrs, text in self.found if attrs.get("id") == "record")
        return json.loads(text)


@pytest.fixture
def no_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")


@pytest.mark.parametrize("method", [LOTUS, SLR, SpiralThinker(latents_per_block=2, max_blocks=1)], ids=named)
def test_the_map_is_the_trace(method: Method):
    model, record = seen(method)
    for i, one in enumerate(record.looks):
        answer = answered(model, i)
        assert one.text == answer.text and one.cost.passes == answer.cost.passes
        assert [line.loop for line in one.grid] == [*(entry.loop for entry in answer.trace.iterations), 0]
        for line, entry in zip(one.grid, answer.trace.iterations):
            assert line.cells[0] is None  # the position before the latents is read once, not in every loop
            cells = line.cells[1:]
            assert tops(cells) == entry.top_probs[0].tolist()
            assert [cell.change for cell in cells] == entry.changes[0].tolist()
            words = [[model.tokenizer.decode([i]).strip() for i in ids] for ids in entry.top_ids[0].tolist()]
            assert [[w.strip("␣⏎") for w, _ in cell.top] for cell in cells] == words
        assert tops(one.grid[-1].cells) == answer.trace.last.top_probs[0].tolist()
        for loop, entry in zip(one.loops, answer.trace.iterations):
            assert (loop.change, loop.cosine, loop.rms) == (entry.delta.item(), entry.cosine.item(), entry.rms.item())
            assert entry.changes.min() <= entry.delta[0] <= entry.changes.max()  # positions' make up the row's


@pytest.mark.parametrize("pattern", ["odd", "even"])
def test_the_map_has_the_blocks_that_were_opened_beside_the_first(pattern: Literal["odd", "even"]):
    method = SpiralThinker(pattern=pattern, latents_per_block=2, max_loops=2, max_blocks=3)
    model = lean_towards(tiny_model(method), {"<bol>": 30.0})
    (example,) = chain_examples(1)
    answer = answer_alone(model, TASK, example, max_new_tokens=6)
    one = look(model, TASK, [example], max_new_tokens=6).looks[0]
    blocks = [*([answer.trace] if pattern == "odd" else []), *answer.trace.opened]
    assert len(blocks) == 3 and [column.group for column in one.columns] == [1] * 4 + [2] * 4 + [3] * 4
    assert [column.name for column in one.columns] == ["<bol>", "1", "2", "<eol>"] * 3
    assert [line.loop for line in one.grid] == [1, 2, 0]
    for n, block in enumerate(blocks):
        own = slice(4 * n + 1, 4 * n + 3)
        for line, entry in zip(one.grid, block.iterations):
            assert tops(line.cells[own]) == entry.top_probs[0, :2].tolist()
        assert tops(one.grid[2].cells[4 * n : 4 * n + 4]) == block.last.top_probs[0].tolist()
        curve = [loop for loop in one.loops if loop.series == f"block {n + 1}"]
        assert [loop.change for loop in curve] == [entry.delta.item() for entry in block.iterations]
    assert one.stop.why == "No stop rule is on: the loop ran 2 iterations, as set."
    console = Console(record=True, width=200, file=StringIO())
    console.print(answer_view(answer, model.tokenizer, *names_of_columns(model, example.question)))
    text = console.export_text()
    headers = [re.findall(r"latent \d|<eol>", line) for line in text.splitlines() if "change" in line]
    assert headers == [["latent 1", "latent 2", "<eol>"]] * 3
    assert all(f"what the latents of block {n} held" in text for n in (1, 2, 3))
    shown = [float(line.split()[-2]) for line in text.splitlines() if line.startswith("│ answer")]  # before the frame
    wanted = [block.last.top_probs[0, 3, 0].item() for block in blocks]  # of what closes the block
    assert shown == pytest.approx(wanted, abs=0.0051)


@pytest.mark.parametrize("method", [LOTUS, SLR], ids=named)
def test_gold_tokens_stand_where_they_are_expected(method: Method):
    model, record = seen(method)
    for example, one, shown in zip(chain_examples(2), record.looks, shown_steps(model, chain_examples(2))):
        lines = {line.loop: line for line in one.grid}
        marked = [cell for line in one.grid for cell in line.cells if cell is not None and cell.gold is not None]
        assert len(marked) == len(shown) > 0
        for entry in shown:
            cell = lines[0 if entry.position < 0 else entry.loop].cells[1 + entry.position]
            assert cell.rank == entry.rank and cell.gold.strip("␣⏎") == entry.gold.strip()
            assert (cell.top[0][0] == cell.gold) == (entry.rank == 0)
        assert one.steps == tuple(example.steps)


def test_blocks_and_single_latents_stand_beside_their_gold_steps():
    model, record = seen(LOTUS)
    for i, (example, one) in enumerate(zip(chain_examples(2), record.looks)):
        blocks = answered(model, i).blocks
        assert [step.gold for step in one.shown] == list(example.steps[:2])
        assert [step.decoded for step in one.shown] == [block.text.strip() for block in blocks]
        assert [step.is_right for step in one.shown] == [all(rank == 0 for rank in block.ranks) for block in blocks]
        assert [column.group for column in one.columns] == [1, 1, 1, 2, 2, 2, None]  # read one position before
    model, record = seen(replace(SLR, max_loops=3))
    steps = record.looks[0].shown
    assert [step.where for step in steps] == ["latent 1, loop 1", "latent 2, loop 2", "latent 3, loop 3"]
    first = [model.tokenizer.decode(model.encoder.step(step, 0).ids[:1]).strip() for step in chain_examples(1)[0].steps]
    assert [step.gold for step in steps] == first


def test_coconut_has_one_line_of_latents_and_other_numbers_of_loops_are_shown():
    _, record = seen(COCONUT)
    one = record.looks[0]
    assert [column.name for column in one.columns] == ["1", "2", "3"] and len(one.grid) == 1
    assert [cell is None for cell in one.grid[0].cells] == [False, False, True] and len(one.loops) == 2
    _, record = seen(SLR, loops=4)
    assert [loop.loop for loop in record.looks[0].loops] == [1, 2, 3, 4] and not record.looks[0].shown
    _, record = seen(LOTUS, loops=4)
    assert len(record.looks[0].shown) == 2 and record.looks[0].grid[-1].cells[1].gold is not None


def test_the_stop_decision_is_told_and_a_score_that_is_not_finite_is_left_out(no_plotly):
    _, record = seen(SLR)
    assert record.looks[0].stop.why == "No stop rule is on: the loop ran 2 iterations, as set."
    stops = change(SLR, max_loops=4, stop={"rule": "delta", "threshold": -9.0})
    _, record = seen(stops)
    stop, score = record.looks[0].stop, record.looks[0].loops[-1].score
    assert (stop.ran, stop.limit, stop.threshold) == (1, 4, -9.0) and "after 1 of 4 iterations" in stop.why
    assert score >= stop.threshold and f"{score:.3g}" in stop.why
    _, record = seen(change(stops, stop={"threshold": 1e9, "patience": 2}))
    stop = record.looks[0].stop
    assert stop.ran == 4 and "did not end" in stop.why and "patience 2" in stop.why
    _, record = seen(change(SLR, max_loops=3, stop={"rule": "kl", "threshold": 1e9}))
    scores = [loop.score for loop in record.looks[0].loops]
    assert scores[0] is None and None not in scores[1:]
    assert Scripts(page_of(record)).record()["looks"][0]["loops"][0]["score"] is None


@pytest.mark.parametrize("method", DEPTH, ids=named)
def test_tokens_have_the_depths_of_the_answer(method: Method, no_plotly):
    model, record = seen(method)
    assert record.family == "depth"
    for i, (one, example) in enumerate(zip(record.looks, chain_examples(2))):
        answer = answered(model, i)
        depths = [depth for _, depth in answer.depths]
        assert [column.depth for column in one.columns] == depths[: len(one.columns)]
        assert len(depths) - len(one.columns) == (answer.ended and answer.depths[-1][0] == model.tokenizer.eos_token)
        n_asked = len(model.tokenizer.encode(example.question + "\n"))
        assert [column.kind for column in one.columns[:n_asked]] == ["asked"] * n_asked
        for line in one.grid:
            for column, cell in zip(one.columns, line.cells):
                assert cell is None or column.depth >= line.loop
    assert Scripts(page_of(record)).record()["family"] == "depth"


def test_iterations_of_tokens_are_those_of_the_trace():
    model, record = seen(Looped(max_loops=3))
    one, answer = record.looks[0], answered(model)
    n_asked = sum(column.kind == "asked" for column in one.columns)
    for line, entry in zip(one.grid, answer.trace.iterations):  # the first pass reads the question
        assert firsts(line.cells[:n_asked]) == entry.top_probs[0, :, 0].tolist()
    second = answer.trace.iterations[3:6]
    assert [line.cells[n_asked].top[0][1] for line in one.grid] == [e.top_probs[0, 0, 0].item() for e in second]
    assert [loop.change for loop in one.loops[:3]] == [entry.delta.item() for entry in answer.trace.iterations[:3]]
    written = [loop for loop in one.loops if loop.series == "mean of written tokens"]
    n_written = len(one.columns) - n_asked
    changes = [answer.trace.iterations[3 * k].delta.item() for k in range(1, n_written + 1)]
    assert written[0].change == pytest.approx(sum(changes) / n_written)


@pytest.mark.parametrize("method", [*THOUGHT, NoCot(), Cot()], ids=named)
def test_every_family_makes_a_page(method: Method, no_plotly):
    _, record = seen(method, n=1)
    is_text = method.name in ("cot", "no_cot")
    assert record.family == ("text" if is_text else "latents") and bool(record.looks[0].grid) != is_text
    assert not is_text or "no latents to look into" in record.looks[0].notes[0]
    widths = {len(line.cells) for line in record.looks[0].grid}
    assert widths <= {len(record.looks[0].columns)}
    assert Scripts(page_of(record)).record()["method"] == method.name


def test_the_page_holds_the_record(no_plotly):
    _, record = seen(LOTUS)
    data = Scripts(page_of(record)).record()

    def same(ours: object, theirs: object) -> bool:
        if isinstance(ours, dict):
            return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
        if isinstance(ours, list | tuple):
            return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs))
        return ours == pytest.approx(theirs, rel=1e-5) if isinstance(ours, float) else ours == theirs

    assert same(asdict(record), data)


def test_nothing_of_the_record_becomes_markup(no_plotly):
    evil = "</script><img src=x onerror=alert(1)><!-- <script> & '\" \u2028\u2029 é ⏎"
    looks = (Look("i", evil, (evil,), evil, evil, None, False, True, answered(tiny_model(NoCot())).cost),)
    record = Record(evil, evil, evil, evil, evil, evil, "text", {"python": evil}, looks)
    page = Scripts(page_of(record))
    assert page.record()["looks"][0]["question"] == evil and page.record()["run"] == evil
    assert "img" not in page.tags and page.tags.count("script") == 3


def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path):
    _, record = seen(SLR, n=1)
    write_page(record, tmp_path / "lens.html")
    text = (tmp_path / "lens.html").read_text()
    assert "default-src 'none'" in text and "Plotly.react(plot" in text and len(text) < 8_000_000
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:|//)", own)
    assert "{{" not in own


def test_where_the_page_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_model(SLR).save_pretrained(tmp_path / "run")
    assert page_path(str(tmp_path / "run")) == tmp_path / "run" / "lens.html"
    assert page_path(str(tmp_path / "run"), str(tmp_path / "new" / "a.html")) == tmp_path / "new" / "a.html"
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(InputError, match="is a folder"):
        page_path(str(tmp_path / "run"), str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written to"):
        page_path(str(tmp_path / "run"), str(tmp_path / "file" / "a.html"))
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(InputError, match=r"innerloop\[viz\]"):
        page_path(str(tmp_path / "run"))


def test_examples_without_steps_or_answer_and_none_at_all():
    asked = [Example("3 ; + 4", (), "7", "a")]
    for method in (SLR, LOTUS, Looped(max_loops=2)):
        one = look(tiny_model(method), TASK, asked, max_new_tokens=2).looks[0]
        assert one.steps == () and one.predicted is None and not one.is_right
        assert all(step.is_right is None for step in one.shown)
    with pytest.raises(InputError, match="no example"):
        look(tiny_model(SLR), TASK, [])


def printed(model: LatentModel, example: Example, most: int = 2) -> str:
    """Return what a wide terminal shows of an example."""
    out = StringIO()
    Console(file=out, width=200).print(terminal_view(model, TASK, example, max_new_tokens=most))
    return out.getvalue()


def probabilities(text: str) -> list[float]:
    """Return the numbers of the lines of the answer's pass."""
    lines = [line for line in text.splitlines() if line.startswith("│ answer")]
    return [float(p) for line in lines for p in re.findall(r"[01]\.\d\d", line)]


def test_the_terminal_shows_the_same():
    (example,) = chain_examples(1)
    text = printed(tiny_model(LOTUS), example, 4)
    assert example.question in text and "what the latents held" in text and "gold step 1: " + example.steps[0] in text
    assert "block 1, the answer's pass" in text and "No stop rule is on" in text
    assert re.search(r"predicted .*, gold \d: (correct|wrong)", text)


def test_the_terminal_lines_up_the_answer_where_nothing_stands_before_the_latents():
    model = tiny_model(THOUGHT[2])
    example = Example("3 ; + 4", ("3 + 4 = 2",), "2", "a")
    answer, text = answer_alone(model, TASK, example, max_new_tokens=2), printed(model, example)
    shown = probabilities(text)
    assert shown == pytest.approx(answer.trace.last.top_probs[0, :, 0].tolist(), abs=0.0051)
    (headers,) = (line for line in text.splitlines() if "change" in line)
    named = [header.strip() for header in headers.split("┃")[-1 - len(shown) : -1]]
    assert named == ["3", ";", "+", "4", "⏎"]  # the words of the question are what is looped, as on the page


@pytest.mark.parametrize("width", [40, 80, 300])
def test_the_terminal_cuts_no_header_and_no_token_and_takes_none_for_markup(width: int):
    model = tiny_model(Lotus(n_blocks=5, latents_per_block=3))
    trace, out = answered(model, most=2).trace, StringIO()
    names, _ = names_of_columns(model, chain_examples(1)[0].question)
    console = Console(file=out, width=width)
    console.print(trace_view(trace, model.tokenizer, names=names))
    lines = out.getvalue().splitlines()
    headers = [word for line in lines for word in re.findall(r"latent \d+", line)]
    assert headers == [f"latent {n}" for n in range(1, 13)] and len(names) > 12
    assert f"latents 1 to 12 of {len(names)}" in " ".join(lines)
    assert "…" not in out.getvalue() and max(map(len, lines)) <= width
    assert probabilities(out.getvalue()) == pytest.approx(trace.last.top_probs[0, 1:13, 0].tolist(), abs=0.0051)
    console.print(trace_view(trace, model.tokenizer, names=["[/b]", *names[1:]]))
    assert "[/b]" in out.getvalue()


def test_the_terminal_shows_the_pass_of_the_answer_where_there_is_no_loop_and_the_latent_of_each_loop():
    model, (example,) = tiny_model(Pause(n_pauses=2)), chain_examples(1)
    trace, text = answered(model, most=2).trace, printed(model, example)
    assert probabilities(text) == pytest.approx(trace.last.top_probs[0, 1:, 0].tolist(), abs=0.0051)
    assert "latent 2" in text and "latent 3" not in text and "change" not in text
    text = printed(tiny_model(COCONUT), example)
    assert "latent ┃" in text and "latent 1" not in text
