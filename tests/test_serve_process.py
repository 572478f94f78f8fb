"""A server in a process of its own, which is asked to end, or killed, while it answers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from innerloop import LatentModel, Slr
from tests.methods.tools import QUESTIONS
from tests.models import tiny_model

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

LONG = {"model": "run", "prompt": QUESTIONS[0], "n": 6, "temperature": 1.0, "seed": 3, "max_tokens": 150}
SHORT = {"model": "run", "prompt": QUESTIONS[1], "max_tokens": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "run"
    tiny_model(Slr(n_slots=2, max_loops=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(run):
    """The answers to the long request, and to the short one."""
    model = LatentModel.from_pretrained(run)
    long = model.generate([LONG["prompt"]], temperature=1.0, seed=3, samples=6, max_new_tokens=150)
    return [one.text for one in long], model.generate([SHORT["prompt"]], max_new_tokens=8)[0].text


@contextmanager
def serving(run, port=0, *options):
    """Serve a run; yield its address and the process."""
    command = [sys.executable, "-m", "innerloop", "serve", str(run), "--port", str(port), "--batch_size", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            yield next(line for line in process.stdout if "http" in line).split(": ")[1].split(",")[0], process
        finally:
            process.kill()


def ask(url):
    return httpx.post(f"{url}/v1/completions", json=SHORT, timeout=60)


class Streaming(threading.Thread):
    """Asks for a long answer; what it is told is in ``texts`` and ``is_whole``."""

    def __init__(self, url, times):
        super().__init__()
        self.url, self.texts, self.is_whole, self.error = url, [""] * LONG["n"] * times, False, None
        self.asked = {**LONG, "prompt": [LONG["prompt"]] * times, "stream": True}
        self.has_begun = threading.Event()

    def run(self):
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=self.asked, timeout=60) as answer:
                for line in answer.iter_lines():
                    self.is_whole |= line == "data: [DONE]"
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:])["choices"]:
                            self.texts[choice["index"]] += choice["text"]
                            self.has_begun.set()
        except httpx.TransportError as error:
            self.error = error

    @classmethod
    def begun(cls, url, times=1):
        """Return one that has been told something."""
        one = cls(url, times)
        one.start()
        assert one.has_begun.wait(60)
        return one


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_end_answers_what_is_in_flight_first(how, run, expected):
    with serving(run) as (url, process):
        stream = Streaming.begun(url, times=20)
        process.send_signal(how)
        httpx.get(f"{url}/health")  # answered after the signal has been taken
        refused, ready = ask(url), httpx.get(f"{url}/ready").status_code
        stream.join(60)
        assert process.wait(30) == 0
    assert stream.is_whole and stream.texts == 20 * expected[0]
    assert (refused.status_code, ready, refused.headers["retry-after"]) == (503, 503, "1")
    assert "about to end" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_what_is_in_flight_is_waited_for_no_longer_than_was_said(run):
    with serving(run, 0, "--drain", "0") as (url, process):
        stream = Streaming.begun(url, times=40)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        stream.join(30)
    assert not stream.is_whole


@pytest.mark.slow
def test_a_server_that_is_killed_loses_what_is_in_flight_alone(run, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(run, port) as (url, process):
        assert ask(url).json()["choices"][0]["text"] == expected[1]
        stream = Streaming.begun(url, times=20)
        process.kill()
        stream.join(30)
    assert isinstance(stream.error, httpx.TransportError) and not stream.is_whole
    with serving(run, port) as (url, _):
        again = Streaming.begun(url)
        again.join(60)
        assert again.texts == expected[0]
        assert ask(url).json()["choices"][0]["text"] == expected[1]
