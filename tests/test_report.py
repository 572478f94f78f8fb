"""report.html: what it says is what was measured, the same bytes twice, and a browser shows it without complaint."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import get_args

import pytest
from plotly.offline import get_plotlyjs

from innerloop.experiments.charts import Cell, Curve, bars, curves, heat_map, pareto, scatter
from innerloop.experiments.report import KINDS, document, table, write_report
from innerloop.experiments.summary import Mark, MethodResult, against_cot, caption, columns, failures
from innerloop.measure.control_verdict import Kind
from tests.browser import PHONE, needs_browser, screenshot, width_on_a_phone


def result(method: str, accuracy: float, passes: float = 3.0, seconds: float = 0.01, seed: int = 0, **more) -> dict:
    cost = {"passes": passes, "positions": 9.0, "flops": 2e6, "thought_tokens": 1.0, "loops": 0.0}
    return {
        "task": {"name": "chain"},
        "split": "test",
        "n": 50,
        "accuracy": accuracy,
        "ci95": [max(accuracy - 0.1, 0.0), min(accuracy + 0.1, 1.0)],
        "cost": {**cost, "seconds": {"prefill": 0.0, "thought": 0.0, "answer": seconds}},
        "method": {"name": method, "max_loops": 2},
        "seed": seed,
        "versions": {"innerloop": "0"},
        "device": "cpu",
        **more,
    }


CONTROLS = {
    "method": "slr",
    "seed": 0,
    "unedited": {"accuracy": 0.9, "ci95": [0.8, 0.95]},
    "commonest": 0.2,
    "controls": [
        {"control": "zeroed", "title": "zeroed latents", "accuracy": 0.3, "difference": -0.6, "told_apart": True}
    ],
    "loops": [{"loops": n, "accuracy": 0.3 * n, "ci95": [0.2 * n, 0.31 * n]} for n in (0, 1, 2, 3)],
    "kept_latents": [{"kept": k, "of": 2, "accuracy": 0.4 * k, "ci95": [0.3 * k, 0.45 * k]} for k in (0, 1, 2)],
    "verdict": {"kind": "carried", "sentence": "Zeroing costs 60 points."},
}
SPREAD = {"mean": 0.5, "std": 0.1, "low": 0.3, "median": 0.5, "high": 0.7}
MEASURED = dict.fromkeys(("change", "cosine", "drift", "radius", "kl"), SPREAD) | {"step_cosine": None, "growth": None}
STABILITY = {
    "loops": [{"loop": t, **MEASURED} for t in (1, 2)],
    "diverged": 0.02,
    "sentences": ["The loop contracts."],
}


@pytest.fixture
def rows(tmp_path: Path) -> list[MethodResult]:
    folder = tmp_path / "slr"
    folder.mkdir()
    (folder / "controls.json").write_text(json.dumps(CONTROLS))
    (folder / "stability.json").write_text(json.dumps(STABILITY))
    (folder / "config.yaml").write_text("method: {name: slr}\n")
    turns = {"turns": (0.011, 0.010, 0.012)}
    return [
        MethodResult("cot", [result("cot", 0.8, 15.0)], turns=(0.022, 0.020, 0.024), memory=2**21),
        MethodResult("slr <b>", [result("slr", 0.9, 6.0)], [folder], [folder], memory=2**20, **turns),
    ]


class Reader(HTMLParser):
    """Checks that elements close in order and ask for nothing; collects what is shown, and the figures."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.figures: list[dict] = []
        self.is_figure = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert tag not in ("link", "iframe", "img"), tag
        assert not any(name in ("src", "href") or name.startswith("on") for name, _ in attrs)
        self.is_figure = ("class", "figure") in attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.figures += [json.loads(data)] if self.is_figure else []
        else:
            self.text += data


def parsed(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert not reader.open and "default-src 'none'" in page
    return reader


def read(page: str) -> str:
    return re.sub(r"\s+", " ", parsed(page).text)


def test_a_caption_says_who_could_not_answer_everything():
    whole, part = MethodResult("cot", [result("cot", 0.8)]), MethodResult("slr", [result("slr", 0.4, seed=0, failed=9)])
    assert "Costs are means of an example." in caption([whole]) and "answered" not in caption([whole])
    told = caption([whole, part])
    assert told.startswith("Could not be answered, and count as wrong: slr 9 of 50. Intervals")
    assert "Costs are means over what each could answer." in told
    seeds = MethodResult("slr", [result("slr", 0.4, seed=0, failed=9), result("slr", 0.4, seed=1)])
    assert "count as wrong: slr 9 of 100 in 2 seeds, slr 9 of 50." in caption([seeds, part])
    timed = [replace(s, turns=(0.1, 0.2)) for s in (whole, part)]
    assert "on one machine, answering what all can answer, with the middle" in caption(timed)
    assert "what all can answer" not in caption(timed[:1])


def test_the_report_says_what_was_measured_and_is_the_same_twice(tmp_path: Path, rows: list[MethodResult]):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, "Two methods", rows, ["slr is better"], {"OOM": ["x seed 1"]}, {"seeds": [0]})
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    text = read(page)
    for words in (
        "50 examples of chain/test; seed 0; cpu; innerloop 0.",
        "slr is better",
        "x seed 1: OOM",
        "Accuracy against passes",
        "Accuracy against time",
        "Accuracy against loops",
        "Zeroing costs 60 points.",
        "carry the answer",
        "30.0 (-60.0)*",
        "The loop contracts.",
        "method: {name: slr}",
        "0.50",  # the time against written steps
    ):
        assert words in text, words
    own = page.replace(get_plotlyjs(), "")
    assert "slr <b>" in text and "<b>" not in own and "slr &lt;b&gt;" in str(parsed(page).figures)


def test_times_against_written_steps_are_of_turns_or_of_the_same_machine(rows: list[MethodResult]):
    cot, slr = against_cot(rows)
    assert cot["median"] == 1.0 and slr["median"] == pytest.approx(0.5)
    alone = [MethodResult(s.name, s.results) for s in rows]
    assert against_cot(alone)[1]["median"] == 1.0
    elsewhere = MethodResult("pause", [result("pause", 0.1, device="another")])
    assert against_cot([alone[0], elsewhere])[1] is None
    assert against_cot([elsewhere]) == [None] and "time / CoT" not in columns([elsewhere])[0]


def test_means_over_seeds_have_t_intervals_and_one_seed_has_wilsons():
    several = MethodResult("a", [result("a", x, seed=i) for i, x in enumerate((0.5, 0.6, 0.7))])
    assert several.mark.share == pytest.approx(0.6)
    assert several.mark.high - several.mark.share == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)
    one = MethodResult("a", [result("a", 0.5)])
    assert (one.mark.low, one.mark.high) == (0.4, 0.6)
    head, rows = columns([several])
    assert rows[0][head.index("by seed")] == "50 60 70"


def test_pictures_have_a_mark_for_every_number_and_words_that_tell_it():
    marks = [Mark(f"m{i}", i / 10, i / 20, i / 10, 5.0) for i in range(12)]
    drawn = scatter(marks, "passes")
    front, *shown = drawn["data"]
    assert front["x"] == [5.0] and front["y"] == [1.1] and [trace["y"] for trace in shown] == [[m.share] for m in marks]
    assert shown[3]["name"] == "m3" and "m3 30.0% at 5" in drawn["label"]
    assert shown[3]["error_y"]["array"] == [0.0] and shown[3]["error_y"]["arrayminus"] == [pytest.approx(0.15)]
    assert scatter([Mark("", 0.5, 0.4, 0.6, 0.0)], "ms", log=True)["layout"]["xaxis"]["type"] == "linear"
    beaten = [Mark(n, s, s, s, x) for n, s, x in (("a", 0.5, 1), ("b", 0.4, 2), ("c", 0.9, 3), ("d", 0.9, 4))]
    assert [m.name for m in pareto(beaten)] == ["a", "c"]  # the front is what nothing beats
    (bar,) = bars(marks)["data"]
    assert bar["x"] == [mark.share for mark in marks]
    lines = curves([Curve("a", marks[:3], 5.0), Curve("b", marks[:3])], "loops")["data"]
    assert lines[1]["y"] == lines[4]["y"] == [0.0, 0.1, 0.2] and [len(lines[i]["x"]) for i in (2, 5)] == [3, 0]
    assert lines[0]["y"] == [0.0, 0.1, 0.2, 0.1, 0.05, 0.0]  # the band: up along the upper ends, back along the lower


def test_a_heat_map_frames_the_best_and_says_what_failed():
    cells = [[Cell(0.5, "40 to 60"), Cell(None, "failed")], [Cell(0.9, "80 to 95", True), Cell(0.5, "40 to 60")]]
    drawn = heat_map(["1", "2"], ["x", "y"], cells, "rows", "columns")
    (frame,), (gap,) = drawn["layout"]["shapes"], drawn["layout"]["annotations"]
    assert (frame["x0"], frame["y0"]) == (-0.5, 0.5) and (gap["x"], gap["y"], gap["text"]) == (1, 0, "failed")
    assert drawn["data"][0]["z"] == [[0.5, None], [0.9, 0.5]]
    assert "rows 2, columns x: 90.0% 80 to 95" in drawn["label"] and "rows 1, columns y: failed" in drawn["label"]


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_report_without_complaint(tmp_path: Path, rows: list[MethodResult]):
    write_report(tmp_path / "report.html", "Two methods", rows, ["slr is better"], suite={"seeds": [0]})
    shown, said = screenshot((tmp_path / "report.html").read_text(), tmp_path)
    assert not said and shown > 4 * screenshot(document("", []), tmp_path)[0]


@pytest.mark.slow
@needs_browser
def test_the_report_fits_on_a_phone_whatever_names_are_in_it(tmp_path: Path, rows: list[MethodResult]):
    long = "/a/folder/" + "of_a_very_long_name" * 8
    rows = [*rows, replace(rows[0], name=long)]
    failed = failures([{"variant": long, "seed": 0, "error": f"no such file: {long}"}])
    write_report(tmp_path / "report.html", long, rows, [f"{long} is better"], failed, suite={"out": long})
    assert width_on_a_phone((tmp_path / "report.html").read_text(), tmp_path) == PHONE


def test_cells_are_text_what_failed_is_listed_and_every_verdict_has_its_words(tmp_path: Path):
    page = document("t", [table(["a"], [["<i>"]])])
    assert "<i>" not in page and read(page).count("<i>") == 1 and "Plotly" not in page
    write_report(tmp_path / "r.html", "Nothing", [], [], failures([{"variant": "a", "seed": 0, "error": "why"}]))
    assert "a seed 0: why" in read((tmp_path / "r.html").read_text())
    assert set(KINDS) == set(get_args(Kind))
