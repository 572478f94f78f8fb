"""Requests over HTTP against `generate` on the same questions: throughput, time to the first token, memory.

The server is a process of its own, and clients stream from this one, so many at a time. Every answer must be the text
that `generate` gives. `generate` knows all questions beforehand; the engine alone, asked one by one as clients do, says
what that is worth. Throughput is asked of a model at which a CPU takes milliseconds a pass (``--shape``), after a round
that warms up; memory, the server's resident set, of a tiny one and many requests. With ``--peer``, plain text of the
same model is also asked of transformers' own server. What has been measured is kept beside ``--out`` until all is, and
a run that was broken off goes on from there.

    python benchmarks/serve.py --threads 1 --out benchmarks/results/serve.json                    # minutes on a CPU
    python benchmarks/serve.py --smoke --out /tmp/serve.json                                      # seconds
"""

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import psutil
import record
import subjects
import torch

from innerloop.decoder.memory import MIB
from innerloop.engine.incremental import IncrementalEngine
from innerloop.engine.latent_model import LatentModel
from innerloop.methods import Cot, Method, Slr

METHODS: dict[str, Method] = {"slr": Slr(n_slots=6, max_loops=3), "cot": Cot()}
PEER = [sys.executable, "-m", "transformers.cli.transformers", "serve"]


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--shape", default="small", choices=list(subjects.SHAPES))
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--timed", type=int, default=400, help="requests of a timed round")
    parser.add_argument("--requests", type=int, default=10_000, help="requests to a tiny model while memory is watched")
    parser.add_argument("--n_tokens", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of a question")
    parser.add_argument("--peer", action="store_true", help="also ask transformers' own server")
    options = record.begin(parser)
    options.repeats = options.repeats or 3
    if options.smoke:
        options.shape, options.clients, options.timed, options.requests, options.n_tokens = "smoke", 4, 12, 40, 4
        options.repeats = 1
    names = ("shape", "clients", "timed", "requests", "n_tokens", "length", "repeats")
    work = {name: getattr(options, name) for name in names}
    parts = {name: partial(throughput, options, name, method) for name, method in METHODS.items()}
    found = measured(options, work, parts | {"memory": partial(steadiness, options)})
    record.write(options, "serve", {**work, "points": [found[name] for name in METHODS], "memory": found["memory"]})
    kept(options).unlink()


def measured(options, work: dict, parts: dict[str, Callable[[], dict]]) -> dict[str, dict]:
    """Return what each part measures; what an earlier run of the same work and commit has measured is not again."""
    same = work | {"commit": record.commit(), "threads": torch.get_num_threads(), "seed": options.seed}
    same |= {"device": str(options.device), "dtype": str(options.dtype), "peer": options.peer}
    known = json.loads(kept(options).read_text()) if kept(options).exists() else {}
    found = known["found"] if known.get("of") == same else {}
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
            kept(options).parent.mkdir(parents=True, exist_ok=True)
            kept(options).write_text(json.dumps({"of": same, "found": found}))
    return found


def kept(options) -> Path:
    """Return where parts are kept until all are there."""
    return options.out.with_suffix(".part.json")


def throughput(options, name: str, method: Method) -> dict:
    """Return how fast the same questions are answered by `generate` and over HTTP, in turns."""
    shape = subjects.SHAPES[options.shape]
    model = subjects.random_model(shape, method, options.seed, options.device, options.dtype)
    asked = subjects.questions(model, options.timed, options.length, options.seed)
    with saved(model) as folder, served(folder, options) as (url, process):
        turns, answers, n_ties = [], [], 0
        for turn in range(options.repeats + 1):
            start = time.perf_counter()
            answers = model.generate(asked, max_new_tokens=options.n_tokens)
            expected = [one.text for one in answers]
            alone = time.perf_counter() - start
            engine = one_by_one(model, asked, options)
            found = asyncio.run(ask(url, asked, options))
            n_ties += check(model, asked, found["texts"], expected, options)
            turns += [(alone, found, engine)] if turn > 0 else []
        mib, peer = psutil.Process(process.pid).memory_info().rss / MIB, None
        if options.peer and name == "cot":
            with peer_served(folder, options) as there:
                asyncio.run(ask(there, asked[:8], options, folder))
                peer = asyncio.run(ask(there, asked, options, folder))
    best = min(turns, key=lambda turn: turn[1]["seconds"])
    seconds, engine = (sorted(turn[i] for turn in turns)[len(turns) // 2] for i in (0, 2))
    http = sorted(found["seconds"] for _, found, _ in turns)[len(turns) // 2]
    point = {"method": name, "generate_per_s": options.timed / seconds, "http_per_s": options.timed / http}
    point |= {
        "engine_per_s": options.timed / engine,
        "ratio": seconds / http,
        "first_ms": quantiles(best[1]["first"]),
        "whole_ms": quantiles(best[1]["whole"]),
    }
    point |= {"flops": sum(one.cost.flops for one in answers) / len(answers), "mib": mib, "ties": n_ties}
    if peer is not None:
        told = {"per_s": options.timed / peer["seconds"], "first_ms": quantiles(peer["first"])}
        point["transformers"] = told | {"whole_ms": quantiles(peer["whole"])}
    print(json.dumps(point))
    return point


def one_by_one(model: LatentModel, asked: Sequence[str], options) -> float:
    """Return the seconds of the engine alone, where questions come as clients send them: one as another is answered.

    `generate` knows all of them from the beginning, and reads them in whole batches.
    """
    engine, left, start = IncrementalEngine(model, max_new_tokens=options.n_tokens), iter(asked), time.perf_counter()
    for question in itertools.islice(left, options.clients):
        engine.submit(question)
    while engine.is_at_work:
        n_done = sum(event.generation is not None for event in engine.step())
        for question in itertools.islice(left, n_done):
            engine.submit(question)
    return time.perf_counter() - start


def steadiness(options) -> dict:
    """Return how much memory the server takes while a tiny model answers many requests, all of them rightly."""
    model = subjects.random_model(subjects.SMOKE, METHODS["slr"], options.seed, options.device, options.dtype)
    lengths = [4 + i % 29 for i in range(options.requests)]
    asked = [subjects.questions(model, 1, n, options.seed + i)[0] for i, n in enumerate(lengths)]
    sizes, n_ties, start = [], 0, time.perf_counter()
    part = max(len(asked) // 20, 1)
    with saved(model) as folder, served(folder, options) as (url, process):
        for first in range(0, len(asked), part):
            some = asked[first : first + part]
            found = asyncio.run(ask(url, some, options))
            expected = [one.text for one in model.generate(some, max_new_tokens=options.n_tokens)]
            n_ties += check(model, some, found["texts"], expected, options)
            sizes.append(psutil.Process(process.pid).memory_info().rss / MIB)
            print(f"{first + len(some)} answered, {sizes[-1]:.0f} MiB")
    warm = len(sizes) // 4
    growth = sizes[-1] - sizes[warm]
    told = {"mib": sizes, "growth_mib": growth, "growth": growth / sizes[warm], "ties": n_ties}
    return told | {"seconds": time.perf_counter() - start}


async def ask(url: str, asked: Sequence[str], options, peer: Path | None = None) -> dict:
    """Ask all questions, so many clients at a time; return texts, and the seconds of all, of first tokens, of each."""
    texts, first, whole, numbers = [""] * len(asked), [0.0] * len(asked), [0.0] * len(asked), itertools.count()

    async def client(session: httpx.AsyncClient) -> None:
        while (i := next(numbers)) < len(asked):
            body = {"stream": True, "max_tokens": options.n_tokens, "temperature": 0}
            if peer is None:
                body, route = body | {"model": "served", "prompt": asked[i]}, "completions"
            else:
                turn = [{"role": "user", "content": asked[i]}]
                body, route = body | {"model": str(peer), "messages": turn}, "chat/completions"
            start = time.perf_counter()
            async with session.stream("POST", f"{url}/v1/{route}", json=body) as answer:
                if answer.status_code != 200:
                    raise SystemExit(f"status {answer.status_code}: {(await answer.aread())[:300]!r}")
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        text = "".join(c.get("text") or (c.get("delta") or {}).get("content") or "" for c in choices)
                        first[i] = first[i] or (time.perf_counter() - start if text else 0.0)
                        texts[i] += text
            whole[i] = time.perf_counter() - start

    limits = httpx.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
    start = time.perf_counter()
    async with httpx.AsyncClient(timeout=600, limits=limits) as session:
        await asyncio.gather(*(client(session) for _ in range(options.clients)))
    return {"texts": texts, "seconds": time.perf_counter() - start, "first": first, "whole": whole}


def check(model: LatentModel, asked: Sequence[str], found: Sequence[str], expected: Sequence[str], options) -> int:
    """Return how many answers are those of `generate` among other questions only, where two tokens are as likely.

    What is computed differs in the last bits with the rows that share a pass, so a tie may fall either way. Any other
    difference ends the script.
    """
    wrong = [i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other]
    for i in wrong:
        among = (asked[max(i + 1 - size, 0) : i + 1] for size in (1, 2, 3, 5, 8, 16, 32))
        if all(found[i] != model.generate(some, max_new_tokens=options.n_tokens)[-1].text for some in among):
            same = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(found[i], expected[i])))
            told = f"{found[i][same:][:80]!r}, not {expected[i][same:][:80]!r}, behind {same} letters"
            raise SystemExit(f"{len(wrong)} answers differ, as number {i}: {told}")
    return len(wrong)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    p50, p99 = torch.quantile(torch.tensor(seconds), torch.tensor([0.5, 0.99])).tolist()
    return {"p50": 1000 * p50, "p99": 1000 * p99}


@contextmanager
def saved(model: LatentModel) -> Iterator[Path]:
    """Yield a folder with a model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "served")
        yield Path(folder) / "served"


@contextmanager
def served(folder: Path, options) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serve a folder in a process of its own; yield its address."""
    command = [sys.executable, "-m", "innerloop", "serve", str(folder), "--port", "0", "--device", str(options.device)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | threads) as process:
        assert process.stdout is not None
        url = next(line for line in process.stdout if "http" in line).split(": ")[1].split(",")[0]
        try:
            yield url, process
        finally:
            process.terminate()


@contextmanager
def peer_served(folder: Path, options) -> Iterator[str]:
    """Serve a folder by transformers' own server, which asks for a chat template; yield its address."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*PEER, str(folder), "--continuous-batching", "--port", str(port), "--device", str(options.device)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # it tells each request
    with subprocess.Popen(command, env=os.environ | threads, **quiet) as process:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        try:
            yield url
        finally:
            process.kill()


if __name__ == "__main__":
    main()
