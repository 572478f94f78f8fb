"""Requests over HTTP, by OpenAI's own client and by curl, against a server that runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from innerloop import Llada, Slr
from innerloop.engine.events import Event
from tests.methods.tools import QUESTIONS, halting, lean_towards_end, sharp_model
from tests.models import tiny_model

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("fastapi")
from innerloop.serve.app import make_app  # noqa: E402
from innerloop.serve.settings import ServeSettings  # noqa: E402
from innerloop.serve.worker import PACE, Asked, Worker  # noqa: E402

KEY = "a key"
CLIENTS: list = []
NAME = "tiny"
STOPS = Slr(n_slots=3, max_loops=4, loop={"residual": "A", "rescale": "rms", "time": "lookup"}, stop={"rule": "delta"})


@contextmanager
def served(model, key=KEY, **settings):
    """Serve a model in a thread; yield its address and its worker."""
    settings = ServeSettings(max_new_tokens=12, **settings)
    worker = Worker(model.eval(), settings.most_waiting, batch_size=settings.batch_size)
    config = uvicorn.Config(make_app(worker, NAME, settings, key), port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", worker
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def model():
    return lean_towards_end(halting("gpt2", STOPS), 1.0)


@pytest.fixture(scope="module")
def server(model):
    with served(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return client_of(server[0])


@pytest.fixture(scope="module", autouse=True)
def hung_up():
    """Close the connections of all clients."""
    yield
    for one in CLIENTS:
        one.close()


def client_of(url, key=KEY):
    CLIENTS.append(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
    return CLIENTS[-1]


def chat(client, question=QUESTIONS[0], **options):
    return client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": question}], **options)


def is_idle(worker):
    for _ in range(200):
        if not worker.engine.is_at_work and worker.n_open == 0 and not worker.open:
            return True
        time.sleep(0.01)
    return False


def test_a_chat_is_answered_as_generate_does(client, model):
    (expected,) = model.generate(QUESTIONS[:1], max_new_tokens=12)
    found = chat(client)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, "stop" if expected.ended else "length")
    assert choice.innerloop["answer"] == expected.answer
    assert found.usage.completion_tokens == expected.cost.written
    assert found.usage.completion_tokens_details.reasoning_tokens == expected.cost.thought_tokens
    assert found.usage.innerloop["passes"] == expected.cost.passes


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"temperature": 1.0, "seed": 3, "n": 3}, {"temperature": 1.0, "seed": 3, "samples": 3}),
        ({"max_tokens": 2}, {"max_new_tokens": 2}),
        ({"max_completion_tokens": 3}, {"max_new_tokens": 3}),
        ({"extra_body": {"loops": 1}}, {"loops": 1}),
        ({"extra_body": {"stop_rule": {"rule": "fixed", "threshold": 2}}}, {"stop": {"rule": "fixed", "threshold": 2}}),
        ({"temperature": 0.7, "seed": 1, "stream": True, "n": 2}, {"temperature": 0.7, "seed": 1, "samples": 2}),
    ],
)
def test_options_are_those_of_generate(asked, options, client, model):
    expected = [one.text for one in model.generate([QUESTIONS[1]], **({"max_new_tokens": 12} | options))]
    found = chat(client, QUESTIONS[1], **asked)
    if "stream" in asked:
        texts = [""] * len(expected)
        for chunk in found:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    else:
        texts = [choice.message.content for choice in found.choices]
    assert texts == expected


def test_several_prompts_are_completed_in_order(client, model):
    found = client.completions.create(model=NAME, prompt=QUESTIONS, logprobs=2)
    expected = model.generate(QUESTIONS, max_new_tokens=12, likelihoods=True)
    assert [choice.text for choice in found.choices] == [one.text for one in expected]
    for choice, one in zip(found.choices, expected):
        assert choice.logprobs.token_logprobs == pytest.approx(one.log_probs)
        assert [len(more) for more in choice.logprobs.top_logprobs] == [2] * len(one.ids)


def test_log_probabilities_are_streamed_with_their_tokens(client, model):
    (expected,) = model.generate(QUESTIONS[:1], max_new_tokens=12, likelihoods=True)
    chunks = list(chat(client, logprobs=True, top_logprobs=1, stream=True))
    told = [one.logprob for chunk in chunks for c in chunk.choices if c.logprobs for one in c.logprobs.content]
    assert told == pytest.approx(expected.log_probs)


def test_a_stop_text_ends_an_answer_and_its_row(client, model, server):
    (text,) = (one.text for one in model.generate(QUESTIONS[:1], max_new_tokens=12))
    stop = text[len(text) // 2 :][:3]
    for streams in (False, True):
        found = chat(client, stop=[stop], stream=streams)
        told = "".join(c.choices[0].delta.content or "" for c in found) if streams else found.choices[0].message.content
        assert told == text[: text.find(stop)]
    assert is_idle(server[1])


def test_thoughts_come_before_the_text_and_say_what_they_are(client):
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, extra_body={"trace": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    kinds = ["reasoning" if getattr(d, "reasoning", None) else "content" for d in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"reasoning", "content"}
    told = "".join(getattr(d, "reasoning", None) or "" for d in deltas)
    assert told.startswith("[read-outs of the latents, not what the model says]\nloop 1: ") and told.count("[") == 1
    ours = [chunk.model_extra.get("innerloop") or {} for chunk in chunks]
    (thought,) = (one["thought"] for one in ours if "thought" in one)
    assert [one["loop"] for one in ours if "loop" in one] == thought  # each by itself, before all together
    assert chunks[-1].usage.innerloop["loops"] == len(thought) == told.count("\nloop ")


WRONG = [
    ("{", 400, "no JSON"),
    ({"prompt": " "}, 400, "the question is empty"),
    ({"prompt": ["1", ""]}, 400, "the question is empty"),
    ({"prompt": "1", "n": 2}, 400, "give one above 0"),
    ({"prompt": "1", "max_tokens": 99}, 400, "writes at most 12"),
    ({"prompt": "1", "temperature": -1}, 400, "temperature"),
    ({"prompt": "1", "top_p": 0.5}, 400, "top_p"),
    ({"prompt": "1", "tools": []}, 400, "tools"),
    ({"prompt": "1", "stop_rule": {"rule": "dlta"}}, 400, "must be one of"),
    ({"prompt": "1", "stop_rule": {"rule": "delta", "treshold": 1}}, 400, "did you mean 'threshold'"),
    ({"prompt": "1 " * 300}, 400, "reads at most"),
    ({"prompt": "1", "model": "other"}, 404, "this server has 'tiny'"),
    ({"prompt": "1" * 2_000_000}, 413, "longer than 1000000 bytes"),
]


@pytest.mark.parametrize(("body", "status", "told"), WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(body, status, told, server):
    data = body if isinstance(body, str) else json.dumps({"model": NAME} | body)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server[0]}/v1/completions", content=data, headers=headers)
    assert answer.status_code == status and told in answer.json()["error"]["message"]
    assert is_idle(server[1])


def test_several_messages_are_refused(client):
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1"}]
    with pytest.raises(openai.BadRequestError, match="send one message"):
        client.chat.completions.create(model=NAME, messages=turns)


def test_the_key_is_asked_for(server, client):
    for key in ("", "A key", "a ke", KEY + "x"):
        with pytest.raises((openai.AuthenticationError, openai.APIConnectionError, httpx.LocalProtocolError)):
            chat(client_of(server[0], key or "-"))
    assert [one.id for one in client.models.list()] == [NAME]
    assert httpx.get(f"{server[0]}/metrics").status_code == 401
    assert {httpx.get(f"{server[0]}/{name}").status_code for name in ("", "health", "ready")} == {200}


def test_a_client_that_goes_frees_its_row(model):
    with served(model, batch_size=1) as (url, worker):
        step, held = worker.engine.step, threading.Event()
        worker.engine.step = lambda: (time.sleep(0.05), step())[1]
        stream = chat(client_of(url), stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            chat(client_of(url).with_options(timeout=0.2), QUESTIONS[1])
        assert is_idle(worker)
        held.set()


def test_more_than_may_wait_are_told_to_come_again(model):
    with served(model, batch_size=1, most_waiting=1) as (url, worker):
        go = threading.Event()
        worker.calls.put(go.wait)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(chat, client_of(url)) for _ in range(3)]
            refused = next(one for one in _as_done(asked) if one.exception() is not None).exception()
            go.set()
        assert isinstance(refused, openai.RateLimitError) and refused.response.headers["retry-after"] == "1"
        assert sum(one.exception() is None for one in asked) == 2
        assert is_idle(worker)


def _as_done(futures):
    while True:
        yield from [one for one in futures if one.done()]
        time.sleep(0.01)


def test_many_clients_get_their_own_answers(server, model):
    asked = [" ; ".join(["1", *["+ 2"] * (i % 5)]) for i in range(60)]
    expected = [one.text for one in model.generate(asked, max_new_tokens=12)]
    client = client_of(server[0])
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda question: chat(client, question).choices[0].message.content, asked))
    assert found == expected
    counted = httpx.get(f"{server[0]}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    assert "innerloop_running 0.0" in counted and "innerloop_open 0.0" in counted


def test_a_pass_that_fails_is_told_and_the_next_request_is_answered(model, monkeypatch):
    with served(model) as (url, worker):
        with monkeypatch.context() as patch:
            patch.setattr(model.backbone, "head", lambda *_: 1 / 0)
            with pytest.raises(openai.InternalServerError) as error:
                chat(client_of(url))
        assert error.value.status_code == 503
        assert chat(client_of(url)).choices[0].message.content
        assert is_idle(worker)


def test_a_canvas_is_streamed_whole_and_as_what_is_final():
    model = tiny_model(Llada(gen_length=8, sampler={"block_length": 4, "eos": "never"}), "llama")
    (expected,) = model.generate(QUESTIONS[:1], max_new_tokens=8)
    with served(model, key=None) as (url, _):
        chunks = list(chat(client_of(url), max_tokens=8, stream=True, extra_body={"trace": True}))
    shown = [chunk.innerloop["canvas"] for chunk in chunks if "canvas" in (chunk.model_extra.get("innerloop") or {})]
    masks = [canvas.count(None) for canvas in shown]
    assert masks == sorted(masks, reverse=True) and masks[-1] == 0 and len(masks) == expected.cost.loops
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == expected.text


def test_a_body_that_does_not_come_is_not_waited_for(model):
    with served(model, key=None, patience=0.2) as (url, _):

        def slow():
            yield b"{"
            time.sleep(1)
            yield b"}"

        assert httpx.post(f"{url}/v1/completions", content=slow()).status_code == 408


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def curled(url, name):
    """Return what curl prints of a streamed completion."""
    body = json.dumps({"model": name, "prompt": "3 ; + 4", "stream": True})
    header = ["-H", f"Authorization: Bearer {KEY}", "-H", "Content-Type: application/json"]
    return subprocess.run(["curl", "-sN", *header, f"{url}/v1/completions", "-d", body], capture_output=True, text=True)


@needs_curl
def test_curl_reads_server_sent_events(server):
    events = curled(server[0], NAME).stdout.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert {json.loads(event[6:])["object"] for event in events[:-2]} == {"text_completion"}


@needs_curl
@pytest.mark.slow
def test_the_verb_serves_and_ends_when_it_is_asked_to(tmp_path):
    sharp_model(Slr(n_slots=2, max_loops=2)).save_pretrained(tmp_path / "run")
    command = [sys.executable, "-m", "innerloop", "serve", str(tmp_path / "run"), "--port", "0"]
    environment = os.environ | {"INNERLOOP_API_KEY": KEY}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        url = next(line for line in process.stdout if "http" in line).split(": ")[1].split(",")[0]
        done = curled(url, "run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert url.startswith("http://127.0.0.1:") and done.stdout.endswith("data: [DONE]\n\n")


def test_tokens_of_an_answer_are_told_at_a_pace_and_all_of_them():
    asked, end = Asked(2), Event(0, generation=object())
    words = [Event(0, ids=(i,), log_probs=(-float(i),)) for i in range(4)]
    assert asked.told(words[0], 0.0) == words[:1]
    assert asked.told(words[1], PACE / 2) == asked.told(words[2], PACE / 2) == []
    assert asked.told(Event(0, 1, ids=(7,)), PACE / 2) == [Event(0, 1, ids=(7,))]
    assert asked.told(words[3], PACE) == [Event(0, ids=(1, 2, 3), log_probs=(-1.0, -2.0, -3.0))]
    assert asked.told(end, PACE) == [end]
    whole = Asked(1, is_paced=False)
    assert [whole.told(event, 0.0) for event in (*words[:2], Event(0, canvas=(1,)), end)] == [
        [],
        [],
        [],
        [Event(0, ids=(0, 1), log_probs=(0.0, -1.0)), end],
    ]
