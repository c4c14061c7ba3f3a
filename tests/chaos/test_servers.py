"""Servers killed, slow, lying, fought over and crowded: each completion is of the right weights, or there is a line."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from dirl.errors import UserError
from dirl.rollout.engine import Completion, EngineConfig, RolloutError
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.server import client, push, walls
from dirl.rollout.server.client import Server
from dirl.rollout.server.engine import ServerEngine
from dirl.rollout.server.push import Pusher
from dirl.rollout.server.wire import KEY_HEADER, TAKEN, key_value
from dirl.rollout.weights import buckets
from dirl.training.broadcast import BroadcastGroup
from tests.chaos.conftest import Tally
from tests.rollout.engine_contract import DYNAMIC, likely_to_stop, random_prompts
from tests.rollout.server.serving import KEY, serving

MODELS = [likely_to_stop(seed=seed)[0] for seed in (5, 6)]
STRANGER, TOKENIZER = likely_to_stop(seed=7)  # whose weights no trainer asks for
PROMPTS, SEEDS = random_prompts([3, 6, 8, 1] * 4), list(range(16))
LONGER = replace(DYNAMIC, max_completion_length=60, temperature=3.0)
ONE_LINE = (RolloutError, UserError)


def decoded(completions: Sequence[Completion]) -> list[Any]:
    """All but logprobs, which rounding moves with what shares a batch."""
    return [(c.prompt_ids, c.token_ids, c.step_map, c.text) for c in completions]


EXPECTED = [decoded(TorchEngine(model, TOKENIZER).generate(PROMPTS, LONGER, SEEDS)) for model in MODELS]


def trainer(url: str, which: int, *, transfer: Any = "http", wait_seconds: float = 60.0) -> ServerEngine:
    servers = [Server(url, KEY, wait_seconds=wait_seconds)]
    return ServerEngine(Pusher(servers, config=EngineConfig(weight_transfer=transfer)), MODELS[which], TOKENIZER)


# Forks a server at each line that it reads, so that one is back as fast as a supervisor could have it.
KEEPER = """
import os, signal, sys
from tests.rollout.engine_contract import likely_to_stop
from tests.rollout.server.serving import serving
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
model, tokenizer = likely_to_stop(seed=7)
for line in sys.stdin:
    if not (pid := os.fork()):
        with serving(model, tokenizer, port=int(line)):
            signal.pause()
    print(pid, flush=True)
"""


class Mortal:
    """A server with a process of its own, of weights that nobody asks for, which can be killed and comes back."""

    def __init__(self) -> None:
        self._keeper = subprocess.Popen(
            [sys.executable, "-c", KEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.url, self._pid = f"http://127.0.0.1:{self._port}", 0
        self._coming = threading.Timer(0.0, self.start)
        self.start()

    def start(self) -> None:
        assert self._keeper.stdin and self._keeper.stdout
        self._keeper.stdin.write(f"{self._port}\n")
        self._keeper.stdin.flush()
        self._pid = int(self._keeper.stdout.readline())

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def kill_and_start(self, away_seconds: float = 0.0) -> None:
        self.kill()
        self._coming = threading.Timer(away_seconds, self.start)
        self._coming.start()
        if not away_seconds:
            self._coming.join()

    def close(self) -> None:
        if self._coming.is_alive():  # else it would wait for a keeper that is gone
            self._coming.join()
        self.kill()
        self._keeper.kill()
        self._keeper.wait()


@pytest.fixture
def mortal() -> Iterator[Mortal]:
    server = Mortal()
    yield server
    server.close()


def test_killed_between_and_amid_batches(mortal: Mortal, tally: Tally) -> None:
    tally.what = "server SIGKILLed at a random moment of a batch, and started again"
    draw, engine, which = random.Random(0), trainer(mortal.url, 0), 0
    start = time.monotonic()
    engine.generate(PROMPTS, LONGER, SEEDS)
    seconds = time.monotonic() - start
    for number in range(16):
        if number % 4 == 3:
            which = 1 - which
            engine.update_weights(MODELS[which])
        delay = draw.uniform(0, 1.1 * seconds)
        killing = threading.Timer(delay, mortal.kill_and_start, [draw.uniform(0, 0.5)])
        killing.start()
        found = engine.generate(PROMPTS, LONGER, SEEDS)
        killing.join()
        tally.count(decoded(found) == EXPECTED[which], f"batch {number}, killed after {delay:.3f} s")
    engine.close()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_each_request_of_a_push(
    moment: str, mortal: Mortal, tally: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally.what = f"server SIGKILLed {moment} each request of a push over HTTP"
    monkeypatch.setattr(push, "buckets", lambda named: buckets(named, 1 << 19))
    call, left, calls = Server._call_once, [-1], [0]

    def deadly(self: Server, path: str, *how: Any) -> Any:
        if not path.startswith(("/push", "/weights")):
            return call(self, path, *how)
        left[0], calls[0] = left[0] - 1, calls[0] + 1
        if moment == "before" and left[0] == 0:
            mortal.kill_and_start(0.2)
        answer = call(self, path, *how)
        if moment == "after" and left[0] == 0:
            mortal.kill_and_start()
        return answer

    monkeypatch.setattr(Server, "_call_once", deadly)
    engine, which = trainer(mortal.url, 0), 0
    for at in range(1, calls[0] + 1):
        which, left[0] = 1 - which, at
        engine.update_weights(MODELS[which])
        left[0] = -1
        tally.count(decoded(engine.generate(PROMPTS, LONGER, SEEDS)) == EXPECTED[which], f"request {at}")
    engine.close()


def test_killed_amid_a_broadcast(mortal: Mortal, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    tally.what = "server SIGKILLed at a tensor of a broadcast of weights, and started again"
    broadcast, left = BroadcastGroup.broadcast, [-1]

    def deadly(self: BroadcastGroup, tensor: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            mortal.kill_and_start(0.2)
        broadcast(self, tensor)

    monkeypatch.setattr(BroadcastGroup, "broadcast", deadly)
    engine, which = trainer(mortal.url, 0, transfer="auto"), 0
    for at in (1, 2, 9, 23, 40, 46):
        which, left[0] = 1 - which, at
        engine.update_weights(MODELS[which])
        tally.count(decoded(engine.generate(PROMPTS, LONGER, SEEDS)) == EXPECTED[which], f"tensor {at}")
    engine.close()


def test_two_trainers_on_one_server(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    tally.what = "act of one of two trainers that want the same server at once (push, decode, die)"
    monkeypatch.setitem(client._CONFLICT_SECONDS, TAKEN, 0.0)

    def live(url: str, which: int, rollouts: Any) -> None:
        draw, engine = random.Random(which), None
        for number in range(40):
            time.sleep(draw.uniform(0, 0.02))
            try:
                if engine is None:
                    engine = trainer(url, which)
                elif draw.random() < 0.3:
                    engine.update_weights(MODELS[which])
                elif draw.random() < 0.3:
                    engine.close()
                    engine = None
                elif draw.random() < 0.2:
                    rollouts.receiver._held_until = 0.0  # who holds it was not heard from for a minute
                else:
                    found = decoded(engine.generate(PROMPTS, LONGER, SEEDS))
                    tally.count(found == EXPECTED[which], f"trainer {which}, act {number}: another's completions")
                    continue
                tally.count(True, "")
            except Exception as error:
                tally.count(is_one_line(error), f"trainer {which}, act {number}: {error!r}")
        if engine:
            engine.close()

    with serving(STRANGER, TOKENIZER) as (rollouts, url), ThreadPoolExecutor(2) as both:
        for living in [both.submit(live, url, which, rollouts) for which in (0, 1)]:
            living.result()


def is_one_line(error: BaseException) -> bool:
    return isinstance(error, ONE_LINE) and "\n" not in str(error) and len(str(error)) < 1000


Lie = Callable[[str, bytes], bytes]


@contextmanager
def liar(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that asks the one at `url` and answers what `how` makes of it: {"lie": f, "status": int, "path": p}."""
    how: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            headers = {KEY_HEADER: key_value(KEY)}
            true = httpx.request(self.command, url + self.path, content=body, headers=headers, timeout=60)
            if self.path.partition("?")[0] != how.get("path"):
                self.say(true.status_code, true.content)
            elif "raw" in how:
                with suppress(OSError):
                    how["raw"](self.wfile)
                self.close_connection = True
            else:
                self.say(how.get("status", 200), how["lie"](true.content))

        do_GET = do_POST

        def say(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}", how
    finally:
        http.shutdown()
        http.server_close()


def row_lies() -> dict[str, Callable[[list[Any]], Any]]:
    """What is made of an honest server's rows."""

    def field(name: str, change: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
        return lambda rows: [{**rows[0], name: change(rows[0][name])}, *rows[1:]]

    junk = [None, 7, "7", {}, [], [None], ["7"], [7.5], [True], [[7]], [10**30], float("nan"), [float("nan")]]
    lies = {
        f"{name} {value!r:.20}": field(name, lambda _, value=value: value)
        for name in ("token_ids", "step_map", "logprobs", "id")
        for value in junk
        if not (name == "logprobs" and value is None)
    }
    lies |= {f"hold_logprobs {value!r:.20}": field("hold_logprobs", lambda _, value=value: value) for value in junk[1:]}
    for name in ("token_ids", "step_map", "logprobs"):
        lies[f"one more of {name}"] = field(name, lambda values: [*values, values[-1]])
        lies[f"one less of {name}"] = field(name, lambda values: values[:-1])
        lies[f"a block more of {name}"] = field(name, lambda values: [*values, *values[-4:]] * 9)
    lies |= {
        "a token that is none": field("token_ids", lambda ids: [*ids[:-1], 10**6]),
        "a negative token": field("token_ids", lambda ids: [-1, *ids[1:]]),
        "the mask token": field("token_ids", lambda ids: [STRANGER.scheme.mask_token_id, *ids[1:]]),
        "a step of zero": field("step_map", lambda steps: [0, *steps[1:]]),
        "a step too many": field("step_map", lambda steps: [5, *steps[1:]]),
        "a probability above one": field("logprobs", lambda logprobs: [0.5, *logprobs[1:]]),
        "one is missing": lambda rows: rows[1:],
        "one is there twice": lambda rows: [rows[0], {**rows[0], "token_ids": rows[1]["token_ids"]}, *rows[1:]],
        "one that nobody asked for": lambda rows: [*rows, {**rows[0], "id": 99}],
        "a field more": lambda rows: [{**rows[0], "x": 1}, *rows[1:]],
        "a field less": lambda rows: [{"id": 0}, *rows[1:]],
        "no rows": lambda rows: [],
        "a row that is none": lambda rows: [7, *rows[1:]],
        "null": lambda rows: None,
        "a mapping": lambda rows: {"0": rows[0]},
    }
    return lies


def lies_of_bodies() -> dict[str, dict[str, Any]]:
    def forever(stream: Any) -> None:
        stream.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            stream.write(b"100000\r\n" + b" " * (1 << 20) + b"\r\n")

    bodies = {"cut": lambda body: body[: len(body) // 2], "empty": lambda body: b"", "html": lambda body: b"<html>"}
    bodies |= {"a list": lambda body: b"[]", "null": lambda body: b"null", "deep": lambda body: b"[" * 100_000}
    bodies |= {"bytes": lambda body: bytes(range(256)), "no such key": lambda body: b"{}", "number": lambda body: b"7"}
    lies: dict[str, dict[str, Any]] = {name: {"lie": lie} for name, lie in bodies.items()}
    for status in (204, 302, 400, 404, 409, 413, 418, 500, 503):
        lies[f"status {status}"] = {"lie": lambda body: b"", "status": status}
        lies[f"status {status}, HTML"] = {"lie": lambda body: b"<html>\nno\n</html>", "status": status}
    for name, said in {
        "a head without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000,
        "no HTTP": b"220 smtp ready\r\n",
        "closed at once": b"",
        "less than announced": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        "wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}",
    }.items():
        lies[name] = {"raw": lambda stream, said=said: stream.write(said)}
    lies["a body without end"] = {"raw": forever}
    return lies


def test_servers_that_lie_about_completions(tally: Tally) -> None:
    tally.what = "answer to a batch with rows that are wrong in one way each"
    with serving(STRANGER, TOKENIZER) as (_, url), liar(url) as (false, how):
        engine = trainer(false, 0, wait_seconds=0.0)
        for name, lie in row_lies().items():
            told = lambda body, lie=lie: json.dumps({"completions": lie(json.loads(body)["completions"])}).encode()  # noqa: E731
            how |= {"path": "/generate", "lie": told}
            expect_one_line(tally, name, lambda: engine.generate(PROMPTS[:2], DYNAMIC, SEEDS[:2]))
        how.clear()
        tally.count(decoded(engine.generate(PROMPTS, LONGER, SEEDS)) == EXPECTED[0], "honest again")
        engine.close()


def test_servers_whose_answers_are_junk(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    tally.what = "answer to each endpoint that is cut, endless, no JSON, no HTTP or another status"
    monkeypatch.setattr(client, "_FAILED_SECONDS", 0.0)
    for kind in client._CONFLICT_SECONDS:
        monkeypatch.setitem(client._CONFLICT_SECONDS, kind, 0.0)
    with serving(STRANGER, TOKENIZER) as (_, url), liar(url) as (false, how):
        engine = trainer(false, 0, wait_seconds=0.0)
        for path in ("/generate", "/push", "/weights", "/health"):
            for name, lie in lies_of_bodies().items():
                if (path, name) == ("/push", "no such key"):
                    continue  # nothing is said to be there, so all of it is pushed: no lie
                how.clear()
                how |= {"path": path, **lie}
                act: Callable[[], Any] = lambda: engine.generate(PROMPTS[:2], DYNAMIC, SEEDS[:2])  # noqa: E731
                if path == "/health":
                    act = lambda: trainer(false, 0, wait_seconds=0.0)  # noqa: E731
                elif path != "/generate":
                    act = lambda: engine.update_weights(MODELS[0])  # noqa: E731
                expect_one_line(tally, f"{path}: {name}", act)
        how.clear()
        engine.update_weights(MODELS[1])
        tally.count(decoded(engine.generate(PROMPTS, LONGER, SEEDS)) == EXPECTED[1], "honest again")
        engine.close()


def expect_one_line(tally: Tally, name: str, act: Callable[[], Any]) -> None:
    try:
        act()
        tally.count(False, f"{name}: it was believed")
    except Exception as error:
        tally.count(is_one_line(error), f"{name}: {error!r:.300}")


def test_64_clients_of_whom_half_are_no_good(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    tally.what = (
        "client of 64 at once: trainers' batches and API requests beside some that leave, stall or send garbage"
    )
    monkeypatch.setattr(walls, "_PAUSE_SECONDS", 2.0)
    with serving(MODELS[0], TOKENIZER) as (_, url), ThreadPoolExecutor(64) as crowd:
        engine = trainer(url, 0)
        for round_number in range(3):
            crowd_of = [crowd.submit(one_client, url, engine, 64 * round_number + i) for i in range(64)]
            for number, client_of in enumerate(crowd_of):
                tally.count(client_of.result() in (None, EXPECTED[0]), f"client {number} of round {round_number}")
        engine.close()


def one_client(url: str, engine: ServerEngine, number: int) -> Any:
    """A trainer's completions; None: a client that is served as it should be, or is no good."""
    draw = random.Random(number)
    if number % 2:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n".encode()
        body = json.dumps({"model": "tiny", "prompt": "1+1=", "max_tokens": 60, "stream": number % 4 == 1}).encode()
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection, suppress(ConnectionError):
            kind = number // 2 % 4
            if kind == 0:  # leaves while it is served
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                time.sleep(draw.uniform(0, 0.3))
            elif kind == 1:  # stalls in the body, until it is left
                connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
                return None if b" 408 " in connection.recv(1000) else "a client that stalls was not left"
            elif kind == 2:
                connection.sendall(draw.randbytes(3000))
                connection.recv(1000)
            else:
                connection.sendall(head + b"Content-Length: 900\r\n\r\n" + draw.randbytes(900))
                return None if b" 400 " in connection.recv(1000) else "garbage was not refused"
        return None
    return decoded(engine.generate(PROMPTS, LONGER, SEEDS))
