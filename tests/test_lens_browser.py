"""The lens's page in a real browser: no console errors, controls respond, nothing overflows, both themes are drawn."""

import json
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from innerloop.lens import look, page_of
from innerloop.methods import Coconut, Cot, Looped, Lotus, Method, Mod, Pause, Slr
from innerloop.tasks import Chain
from tests.models import chain_examples, tiny_model

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed"),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
)
DARK = "--blink-settings=preferredColorScheme=0"
LOTUS = Lotus(n_blocks=2, latents_per_block=3, step_weight=1.0)
STOPPING = Slr(n_slots=3, max_loops=3, slots_per_step=1, step_weight=1.0, stop="delta", stop_threshold=9.0)
PAGES = [LOTUS, STOPPING, Coconut(latents_per_step=1, max_stage=3), Looped(max_loops=3), Mod(), Cot(), Pause()]


def made(method: Method, n: int = 3) -> str:
    examples = [*chain_examples(n)]
    examples[-1] = replace(examples[-1], question=examples[-1].question + " </script><b>")
    return page_of(look(tiny_model(method), Chain(n_ops=3), examples, max_new_tokens=6))


def browse(page: str, folder: Path, *flags: str) -> tuple[str, list[str]]:
    """Open a page; return what the browser prints and the lines of its console."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    own = f"--user-data-dir={folder / 'profile'}"
    where = f"file://{folder / 'page.html'}"
    command = [BROWSER, *FLAGS, own, "--virtual-time-budget=5000", *flags, where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


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


def pixels(path: Path) -> bytes:
    """Return the colours of a PNG of 8 bits per channel that is not interlaced."""
    data, at, packed = path.read_bytes(), 8, b""
    width, height, bits, colour, *_, interlace = struct.unpack(">IIBBBBB", data[16:29])
    assert (bits, interlace) == (8, 0)
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        packed += data[at + 8 : at + 8 + size] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += 12 + size
    n = {2: 3, 6: 4}[colour]
    raw, last, whole = zlib.decompress(packed), bytearray(width * n), bytearray()
    for row in range(height):
        start = row * (width * n + 1)
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + width * n])
        for i in range(len(line)):
            left, up, corner = (line[i - n] if i >= n else 0), last[i], (last[i - n] if i >= n else 0)
            guess = left + up - corner
            nearest = min((abs(guess - left), 0, left), (abs(guess - up), 1, up), (abs(guess - corner), 2, corner))[2]
            line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[kind]) & 255
        whole += line
        last = line
    return bytes(whole)


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
    page, brightness = made(LOTUS, 1), {}
    for name, flags in {"light": (), "dark": (DARK,)}.items():
        picture = tmp_path / f"{name}.png"
        browse(page, tmp_path, f"--screenshot={picture}", "--window-size=640,700", *flags)
        values = pixels(picture)
        assert pstdev(values) > 10 and len(set(values)) > 64
        brightness[name] = fmean(values)
    assert brightness["dark"] < 90 and brightness["light"] > 190
