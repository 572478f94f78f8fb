"""Replicas on a Ray cluster of two nodes: each serves, and whichever does, an answer is that of `generate`."""

import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from innerloop import InputError, LatentModel, Slr
from innerloop.serve.replicas import check_replicas
from tests.models import tiny_model
from tests.ray_cluster import two_nodes

ASKED = [" ; ".join(["1", *["+ 2"] * (i % 5)]) for i in range(40)]


def test_without_ray_serve_replicas_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.setattr("innerloop.serve.replicas.check_serve", lambda: None)
    with pytest.raises(InputError, match=r"replicas need Ray Serve: pip install 'innerloop\[serve,replicas\]'"):
        check_replicas()


def served_by(text: str) -> int:
    """Return how many completions the replica behind a page of metrics has answered."""
    found = re.search(r'innerloop_requests_total\{route="/v1/completions",status="200"\} (\d+)', text)
    return 0 if found is None else int(found[1])


@pytest.mark.slow
def test_replicas_share_what_is_asked_and_answer_as_generate_does(tmp_path, monkeypatch):
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed", exc_type=ImportError)
    tiny_model(Slr(n_slots=2, max_loops=2)).save_pretrained(tmp_path / "run")
    expected = [one.text for one in LatentModel.from_pretrained(tmp_path / "run").generate(ASKED, max_new_tokens=8)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "innerloop",
        "serve",
        str(tmp_path / "run"),
        "--port",
        str(port),
        "--replicas",
        "2",
    ]

    def ask(question):
        body = {"model": "run", "prompt": question, "max_tokens": 8}
        return httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]

    with (
        two_nodes(monkeypatch),
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process,
    ):
        try:
            url = next(line for line in process.stdout if "http" in line).split(": ")[1].split(",")[0]
            with ThreadPoolExecutor(8) as pool:
                assert list(pool.map(ask, ASKED)) == expected
            counts = {served_by(httpx.get(f"{url}/metrics", timeout=60).text) for _ in range(40)}
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert counts == {len(ASKED) // 2} or (len(counts) == 2 and sum(counts) == len(ASKED) and min(counts) > 0)
