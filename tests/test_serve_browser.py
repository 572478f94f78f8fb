"""The page that asks, in a real browser: cells are drawn as loops run, the answer is shown, the console stays empty."""

import asyncio
import html
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from innerloop import Llada, Slr
from tests.browser import needs_browser, visit
from tests.methods.tools import QUESTIONS
from tests.models import tiny_model

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
from innerloop.serve import app as served_app
from tests import test_serve

pytestmark = [pytest.mark.slow, needs_browser]
ABOUT = '<script type="application/json" id="about">'
HOLD = """<img src="/hold" alt=""><script>const drawn = [];
new MutationObserver(() => { const n = document.querySelectorAll("#map tbody tr").length;
  if (n !== drawn.at(-1)) { drawn.push(n); document.body.dataset.drawn = drawn.join(" "); }
}).observe(document.getElementById("map"), { childList: true });</script>"""


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """Let the browser hold the page open until what it asks is answered, and note how many lines each drawing has."""
    page, app_of = served_app.live_page, test_serve.make_app

    def live_page(*of):
        return page(*of).replace("img-src data:", "img-src 'self' data:").replace(ABOUT, HOLD + ABOUT)

    def make_app(worker, *of):
        app, handed = app_of(worker, *of), []
        ask = worker.ask
        worker.ask = lambda *options: (handed.append(1), ask(*options))[1]

        @app.get("/hold")
        async def hold():
            for _ in range(200):
                await asyncio.sleep(0.01)
                if handed and worker.n_open == 0:
                    break
            await asyncio.sleep(0.3)

        return app

    monkeypatch.setattr(served_app, "live_page", live_page)
    monkeypatch.setattr(test_serve, "make_app", make_app)


def shown(dom: str, id: str) -> str:
    found = re.search(rf'<\w+[^>]* id="{id}"[^>]*>(.*?)</(pre|p|dl|h1)>', dom, re.DOTALL)
    assert found is not None, id
    return html.unescape(found[1])


def test_a_question_is_asked_its_loops_are_drawn_and_its_answer_is_shown(tmp_path: Path):
    model = tiny_model(Slr(n_slots=3, max_loops=4)).eval()
    (expected,) = model.generate(QUESTIONS[:1], max_new_tokens=12)
    with test_serve.served(model, key=None) as (url, worker):
        told = worker.engine.on_loop
        worker.engine.on_loop = lambda event: (told(event), time.sleep(0.1))  # as if each loop took so long
        dom, console = visit(f"{url}/?q={quote(QUESTIONS[0])}&most=12", tmp_path, "--dump-dom")
    assert console == [] and shown(dom, "error") == ""
    assert shown(dom, "text") == expected.text and shown(dom, "title") == "tiny"
    assert dom.count('class="cell"') == 4 * 3 and "loop 4" in dom
    assert re.search(r'data-drawn="([\d ]*)"', dom)[1] == "0 1 2 3 4"  # one by one
    assert f"<dt>loops</dt><dd>{expected.cost.loops}</dd>" in dom


def test_a_canvas_is_drawn_pass_by_pass(tmp_path: Path):
    model = tiny_model(Llada(gen_length=8, sampler={"block_length": 4, "eos": "never"}), "llama").eval()
    (expected,) = model.generate(QUESTIONS[:1], max_new_tokens=8)
    with test_serve.served(model, key=None) as (url, _):
        dom, console = visit(f"{url}/?q={quote(QUESTIONS[0])}&most=8", tmp_path, "--dump-dom")
    assert console == [] and shown(dom, "text") == expected.text
    assert dom.count('class="cell"') == 8 * expected.cost.loops


def test_what_is_refused_is_said_on_the_page(tmp_path: Path):
    with test_serve.served(tiny_model(Slr(n_slots=2, max_loops=2)), key=None) as (url, _):
        dom, _ = visit(f"{url}/?q={quote(QUESTIONS[0])}&most=99", tmp_path, "--dump-dom")
    assert "this server writes at most 12" in shown(dom, "error")
