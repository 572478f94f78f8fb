"""The lens's page in a real browser: no console errors, controls respond, nothing overflows, both themes are drawn."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from innerloop.lens import look, page_of
from innerloop.methods import Coconut, Cot, Looped, Lotus, Method, Mod, Pause, Slr
from innerloop.tasks import Chain
from tests.browser import browse, needs_browser, screenshot
from tests.models import chain_examples, tiny_model

pytestmark = [pytest.mark.slow, needs_browser]
DARK = "--blink-settings=preferredColorScheme=0"
LOTUS = Lotus(n_blocks=2, latents_per_block=3, step_weight=1.0)
STOPPING = Slr(n_slots=3, max_loops=3, slots_per_step=1, step_weight=1.0, stop="delta", stop_threshold=9.0)
PAGES = [LOTUS, STOPPING, Coconut(latents_per_step=1, max_stage=3), Looped(max_loops=3), Mod(), Cot(), Pause()]


def made(method: Method, n: int = 3) -> str:
    examples = [*chain_examples(n)]
    examples[-1] = replace(examples[-1], question=examples[-1].question + " </script><b>")
    return page_of(look(tiny_model(method), Chain(n_ops=3), examples, max_new_tokens=6))


def asked(page: str, folder: Path, script: str, *flags: str) -> tuple[dict, list[str]]:
    """Run a script, a function body that returns an object, at the end of a page; return the object and the console."""
    tail = f"""<pre id="result"></pre><script>
      const press = (node, key) => node.dispatchEvent(new KeyboardEvent("keydown", {{ key, bubbles: true }}));
      const all = (what) => [...document.querySelectorAll(what)];
      const one = (what) => document.querySelector(what);
      window.addEventListener("load", () => setTimeout(() => {{
        one("#result").textContent = JSON.stringify((() => {{ {script} }})());
      }}, 500));
    </script></body>"""
    dom, console = browse(page.replace("</body>", tail), folder, "--dump-dom", *flags)
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None and found[1], console
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console


@pytest.mark.parametrize("method", PAGES, ids=lambda m: m.name)
def test_pages_have_no_console_errors_and_do_not_overflow(method: Method, tmp_path: Path):
    state, console = asked(
        made(method),
        tmp_path,
        """return { width: document.documentElement.scrollWidth, window: innerWidth, markup: all("main b").length,
          question: one("#question").textContent, cells: all(".cell").length, plots: all(".plot svg.main-svg").length,
          nameless: all("button, select, input").filter((n) => !(n.getAttribute("aria-label") || n.textContent.trim()
            || n.labels?.length)).length,
          doubled: all("[id]").filter((n) => !n.closest("svg")).map((n) => n.id)
            .filter((id, i, ids) => ids.indexOf(id) !== i),
          requests: performance.getEntriesByType("resource").length,
          focusable: all(".cell").filter((n) => n.tabIndex === 0).length }""",
        "--window-size=500,900",
    )
    assert console == []
    assert state["width"] <= state["window"] and state["markup"] == state["nameless"] == state["requests"] == 0
    assert state["question"] == chain_examples(1)[0].question and state["doubled"] == []
    has_map = method.name not in ("cot", "mod")
    assert (state["cells"] > 0) == has_map and state["focusable"] == int(has_map)
    assert (state["plots"] > 0) == (has_map and method.name != "pause")


def test_the_console_would_tell(tmp_path: Path):
    page = made(Cot(), 1)
    for fault in ("throw Error('on purpose')", "fetch('https://example.invalid/x').catch(() => 0)"):
        _, console = browse(page.replace("</body>", f"<script>{fault}</script></body>"), tmp_path, "--dump-dom")
        assert console, fault


def test_examples_are_picked_by_hand_and_by_keys(tmp_path: Path):
    state, console = asked(
        made(LOTUS),
        tmp_path,
        """const seen = [], note = () => seen.push([one("#example").selectedIndex, one("#question").textContent]);
          note(); one("#next").click(); note();
          press(document.body, "ArrowRight"); note(); press(document.body, "ArrowRight"); note();
          const end = one("#next").disabled;
          press(document.body, "ArrowLeft"); note(); one("#previous").click(); note();
          const select = one("#example"); select.value = 2; select.dispatchEvent(new Event("change")); note();
          return { seen, end, markup: all("main b").length, said: one("#announce").textContent }""",
    )
    questions = [example.question for example in chain_examples(3)]
    questions[2] += " </script><b>"
    assert console == [] and state["end"] and state["markup"] == 0 and state["said"].startswith("Example 3 of 3")
    assert [i for i, _ in state["seen"]] == [0, 1, 2, 2, 1, 0, 2]
    assert [text for _, text in state["seen"]] == [questions[i] for i in (0, 1, 2, 2, 1, 0, 2)]


def test_cells_are_picked_and_coloured(tmp_path: Path):
    record = look(tiny_model(LOTUS), Chain(n_ops=3), chain_examples(1), max_new_tokens=6)
    one = record.looks[0]
    state, console = asked(
        page_of(record),
        tmp_path,
        """const cell = (i, j) => one(`.cell[data-line="${i}"][data-column="${j}"]`);
          const detail = () => [one("#detail-title").textContent, all("#detail tbody th").map((n) => n.textContent)];
          cell(0, 2).click(); const clicked = detail(), pressed = all('.cell[aria-pressed="true"]').length;
          cell(0, 2).focus(); press(document.activeElement, "ArrowRight"); const right = detail();
          press(document.activeElement, "ArrowDown"); const down = detail(), example = one("#example").selectedIndex;
          const values = () => all(".cell .value").map((n) => n.textContent), probabilities = values();
          const ground = cell(0, 2).style.background;
          one("input[value=change]").click(); const changes = values(), other = cell(0, 2).style.background;
          const focus = document.activeElement.className;
          return { clicked, pressed, right, down, example, probabilities, changes, ground, other, focus }""",
    )
    assert console == [] and state["pressed"] == 1 and state["example"] == 0 and "cell" in state["focus"]
    words = [
        [word for word, _ in cell.top] for cell in (one.grid[0].cells[2], one.grid[0].cells[3], one.grid[1].cells[3])
    ]
    assert [state["clicked"], state["right"], state["down"]] == [
        ["loop 1, latent 2", words[0]],
        ["loop 1, latent 3", words[1]],
        ["loop 2, latent 3", words[2]],
    ]
    cells = [cell for line in one.grid for cell in line.cells if cell is not None]
    for text, cell in zip(state["probabilities"], cells, strict=True):
        assert text == "<.01" or float(text) == pytest.approx(cell.top[0][1], abs=0.0051)
    for text, cell in zip(state["changes"], cells, strict=True):
        assert text == "–" if cell.change is None else float(text) == pytest.approx(cell.change, rel=0.06)
    assert state["ground"] != state["other"]


def test_the_plain_table_has_every_cell(tmp_path: Path):
    state, _ = asked(
        made(LOTUS, 1),
        tmp_path,
        """one("#plain").open = true; one("#plain").dispatchEvent(new Event("toggle"));
          const count = (what) => all(what).length;
          return { rows: count("#plain-table tbody tr"), cells: count(".cell"), loops: count("#loops tbody tr") }""",
    )
    assert state["rows"] == state["cells"] > 0 and state["loops"] == 2


def test_tokens_of_depth_methods_are_picked(tmp_path: Path):
    state, console = asked(
        made(Looped(max_loops=3), 1),
        tmp_path,
        """all("button.word")[1].click(); const first = one("#detail-title").textContent;
          all("button.word")[1].focus(); press(document.activeElement, "ArrowRight");
          const subs = all("#tokens sub").map((n) => n.textContent);
          return { first, then: one("#detail-title").textContent, subs }""",
    )
    second, third = chain_examples(1)[0].question.split()[1:3]
    assert console == [] and set(state["subs"]) == {"3"}
    assert state["first"] == f"iteration 3, token {second} of the question"
    assert state["then"] == f"iteration 3, token {third} of the question"


def test_screenshots_are_not_blank_and_follow_the_theme(tmp_path: Path):
    page, empty = made(LOTUS, 1), screenshot("<!doctype html>", tmp_path)[0]
    brightness = []
    for flags in ((), (DARK,)):
        assert screenshot(page, tmp_path, *flags)[0] > 4 * empty
        ground = asked(page, tmp_path, "return { ground: getComputedStyle(document.body).backgroundColor }", *flags)[0]
        brightness.append(sum(map(int, re.findall(r"\d+", ground["ground"]))))
    assert brightness[0] > 600 and brightness[1] < 150
