"""OpenAI's endpoints: what they answer, what they refuse, and that no client notices another."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from dirl.data.chat import decode, encode, render_prompt
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.server import api, walls
from dirl.rollout.server.line import Conflict, Line
from dirl.rollout.server.wire import PromptRow
from tests.oracle import sharp_tiny_model
from tests.rollout.server.serving import KEY, serving

THRESHOLD = 0.1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Recording(Line):
    """A line that remembers how long completions became."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths: list[int] = []

    def finished(self, completion: Completion) -> None:
        self.lengths.append(len(completion.token_ids))


LINE = Recording()
MODEL, TOKENIZER = sharp_tiny_model()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(MODEL, TOKENIZER, line=LINE) as (_, url):
        yield url


def ask(url: str, path: str, body: Any = None, key: str = KEY) -> Any:
    """The answer, or what was refused and with which status."""
    sent = body if isinstance(body, bytes | None) else json.dumps({"model": "tiny", **body}).encode()
    request = urllib.request.Request(url + path, data=sent, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def stream(url: str, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events up to the [DONE]."""
    sent = json.dumps({"model": "tiny", "stream": True, **body}).encode()
    request = urllib.request.Request(url + path, data=sent, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = [line for line in iter(answer.readline, b"") if line.strip()]
    assert lines[-1] == b"data: [DONE]\n"
    for line in lines[:-1]:
        yield json.loads(line.removeprefix(b"data: "))


def alone(prompt: list[int], seed: int, max_tokens: int, **sampling: Any) -> Completion:
    """What the engine gives without a server; a multiple of four tokens with the prompt."""
    config = SamplingConfig(max_completion_length=max_tokens, confidence_threshold=THRESHOLD, **sampling)
    return TorchEngine(MODEL, TOKENIZER).generate([prompt], config, [seed])[0]


def test_models(url: str) -> None:
    listed = ask(url, "/v1/models")
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert ask(url, "/v1/models/tiny")["id"] == "tiny"
    status, error = ask(url, "/v1/models/other")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_completions_are_the_engines(url: str) -> None:
    prompts = ["1+2=", [7, 8, 9], ""]
    ids = [encode(TOKENIZER, p) if isinstance(p, str) else p for p in prompts]
    body = {"max_tokens": 12, "confidence_threshold": THRESHOLD, "seed": 5, "n": 2, "logprobs": 1}
    for prompt, tokens in zip(prompts, ids, strict=True):
        answer = ask(url, COMPLETIONS, {**body, "prompt": prompt})
        assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
        for number, choice in enumerate(answer["choices"]):
            expected = alone(tokens, 5 + number, 15)
            length = min(expected.completion_length, 12)
            assert choice["index"] == number
            logprobs = choice["logprobs"]
            assert logprobs["token_logprobs"] == pytest.approx((expected.logprobs or [])[:length], abs=1e-4)
            ended = expected.finish_reason == "stop" and expected.completion_length <= 12
            assert choice["finish_reason"] == ("stop" if ended else "length")
            assert choice["text"] == decode(TOKENIZER, expected.token_ids[: length - ended])
        assert answer["usage"]["prompt_tokens"] == len(tokens)
    listed = ask(url, COMPLETIONS, {**body, "prompt": prompts[:1] * 3})
    assert [choice["index"] for choice in listed["choices"]] == list(range(6))
    assert len({choice["text"] for choice in listed["choices"]}) == 2, "two seeds, three times the prompt"


def test_chat_is_the_template_and_a_completion(url: str) -> None:
    body = {"max_completion_tokens": 8, "confidence_threshold": THRESHOLD, "seed": 3, "logprobs": True}
    messages = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]}]
    answer = ask(url, CHAT, {**body, "messages": messages})
    prompt = render_prompt(TOKENIZER, "1+2=")
    same = ask(url, COMPLETIONS, {**body, "logprobs": 0, "prompt": prompt})
    (choice,), (other,) = answer["choices"], same["choices"]
    assert choice["message"] == {"role": "assistant", "content": other["text"], "refusal": None}
    assert [row["logprob"] for row in choice["logprobs"]["content"]] == other["logprobs"]["token_logprobs"]
    assert answer["usage"] == same["usage"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_adds_up_to_the_answer(url: str, path: str) -> None:
    asks = {"prompt": "1+2="} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "1+2="}]}
    logprobs: Any = 1 if path == COMPLETIONS else True
    body = {**asks, "n": 3, "seed": 1, "max_tokens": 30, "confidence_threshold": THRESHOLD, "logprobs": logprobs}
    whole = ask(url, path, body)
    events = list(stream(url, path, {**body, "stream_options": {"include_usage": True}}))
    assert events.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        if path == COMPLETIONS:
            parts, text = [row["text"] for row in mine], choice["text"]
        else:
            assert mine[0]["delta"]["role"] == "assistant"
            parts, text = [row["delta"].get("content", "") for row in mine], choice["message"]["content"]
        assert "".join(parts) == text
        assert sum(map(bool, parts)) > 2, "not block by block"
        assert [row["finish_reason"] for row in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        assert mine[-1]["logprobs"] == choice["logprobs"]


def test_a_stop_text_ends_a_completion_and_is_never_shown(url: str) -> None:
    body = {"prompt": "7+7=", "seed": 2, "max_tokens": 200, "confidence_threshold": THRESHOLD}
    text = ask(url, COMPLETIONS, body)["choices"][0]["text"]
    start = next(i for i in range(9, len(text)) if "\ufffd" not in text[i : i + 3])
    stop = text[start : start + 3]
    LINE.lengths.clear()
    choice = ask(url, COMPLETIONS, {**body, "stop": ["never in it", stop]})["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.find(stop)], "stop")
    assert LINE.lengths[0] < 150, "it was decoded to the end"
    events = [event["choices"][0] for event in stream(url, COMPLETIONS, {**body, "stop": stop})]
    assert "".join(event["text"] for event in events) == choice["text"]


def test_echo_puts_the_prompt_first(url: str) -> None:
    body = {"prompt": ["1+2=", [55, 56]], "seed": 2, "max_tokens": 8}
    plain, echoed = (ask(url, COMPLETIONS, {**body, "echo": echo})["choices"] for echo in (False, True))
    for prompt, before, after in zip(["1+2=", decode(TOKENIZER, [55, 56])], plain, echoed, strict=True):
        assert after["text"] == prompt + before["text"]


REFUSED: dict[str, tuple[dict[str, Any] | bytes, int, str | None, str]] = {
    "no JSON": (b"{", 400, None, "the body is no JSON"),
    "too deep": (b"[" * 100_000, 400, None, "the body is no JSON"),
    "no object": (b"[]", 422, None, "must be a JSON object"),
    "another model": ({"model": "gpt"}, 404, "model", "'gpt' is not here"),
    "no prompt": ({}, 400, "prompt", "prompt must be"),
    "mixed prompt": ({"prompt": [1, "a"]}, 400, "prompt", "prompt must be"),
    "unknown token": ({"prompt": [9999]}, 400, None, "token ids from 0 to"),
    "negative token": ({"prompt": [5, -1]}, 400, "prompt", "a list of token ids"),
    "token without a number": ({"prompt": [1 << 40]}, 400, "prompt", "a list of token ids"),
    "unknown field": ({"prompt": "a", "temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
    "no number": ({"prompt": "a", "max_tokens": "x"}, 400, "max_tokens", "max_tokens must be a whole number"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "max_tokens must be at least 1"),
    "not finite": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature", "a finite number"),
    "huge": ({"prompt": "a", "temperature": 10**400}, 400, None, "too large"),
    "too many": ({"prompt": "a", "n": 129}, 400, "n", "n must be at least 1 and at most 128"),
    "too many of them": ({"prompt": ["a"] * 41, "n": 100}, 400, "n", "must be at most 4096"),
    "strategy": ({"prompt": "a", "unmasking_strategy": "x"}, 400, "unmasking_strategy", "must be one of"),
    "stop": ({"prompt": "a", "stop": [""]}, 400, "stop", "stop must be"),
    "not done here": ({"prompt": "a", "frequency_penalty": 1}, 400, "frequency_penalty", "is not supported"),
    "too long": ({"prompt": "a", "max_tokens": 5000}, 400, "prompt", "the model reads 4096 tokens"),
    "echo with logprobs": ({"prompt": "a", "echo": True, "logprobs": 1}, 400, "echo", "echo with logprobs"),
    "alternatives": ({"prompt": "a", "logprobs": 5}, 400, "logprobs", "at most 1, got 5"),
}


@pytest.mark.parametrize(("body", "status", "param", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_said(url: str, body: Any, status: int, param: str | None, words: str) -> None:
    found, error = ask(url, COMPLETIONS, body)
    assert (found, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize("messages", [[], "hello", [{"role": "user"}], [{"role": "wizard", "content": "a"}]])
def test_messages_that_are_none(url: str, messages: Any) -> None:
    status, error = ask(url, CHAT, {"messages": messages})
    assert (status, error["param"]) == (400, "messages")


def test_strangers_and_unknown_paths(url: str) -> None:
    status, error = ask(url, CHAT, {"messages": []}, key="wrong")
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert ask(url, "/v1/embeddings", {})[0] == 404
    assert ask(url, COMPLETIONS)[0] == 405


def test_no_answer_before_weights_are_there() -> None:
    with serving(MODEL, TOKENIZER, has_weights=False) as (rollouts, url):
        status, error = ask(url, COMPLETIONS, {"prompt": "a"})
        (late,) = rollouts.ask([PromptRow(0, [1], 0)], SamplingConfig())  # who asked before a push began
        with pytest.raises(Conflict, match="no weights are here"):
            late.result(60)
    assert (status, error["type"]) == (503, "server_error")


def test_a_body_is_bounded_before_it_is_read(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_BODY_BYTES", 1000)
    status, error = ask(url, COMPLETIONS, {"prompt": "a" * 1000})
    assert (status, error["message"]) == (413, "the body has more than 1000 bytes")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with raw(url, f"{head}Content-Length: {10**12}\r\n\r\n") as connection:  # nothing of it is sent
        assert b" 413 " in connection.recv(1000)
    for length in ("much", "-5"):
        with raw(url, f"{head}Content-Length: {length}\r\n\r\n") as connection:
            assert b" 400 " in connection.recv(1000)
    with raw(url, f"{head}Transfer-Encoding: chunked\r\n\r\n") as connection:  # it does not say how much
        connection.sendall(b"%x\r\n%s\r\n" % (2000, b"a" * 2000))
        assert b" 413 " in connection.recv(1000)


def test_slow_clients_are_left_and_harm_nobody(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walls, "_PAUSE_SECONDS", 1.0)
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n{{"
    slow = [raw(url, head) for _ in range(20)] + [raw(url, "POST /v1/comp") for _ in range(20)]
    assert ask(url, COMPLETIONS, {"prompt": "1+1=", "max_tokens": 4})["choices"]
    for connection in slow:
        with connection:
            said = connection.recv(1000)
            assert b" 408 " in said or said == b""


def raw(url: str, text: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(text.encode())
    return connection


def test_64_clients_at_once_get_what_each_gets_alone(url: str) -> None:
    """Different lengths, thresholds and samplings; a third of them stream."""

    def body(i: int) -> dict[str, Any]:
        sampling = {"top_k": 5} if i % 5 == 0 else {}
        limits = {"max_tokens": 4 + i % 13, "confidence_threshold": 0.05 * (1 + i % 4)}
        return {"prompt": f"{i}+{i}=", "seed": i, **limits, **sampling}

    def one(i: int) -> str:
        if i % 3 == 0:
            return "".join(event["choices"][0]["text"] for event in stream(url, COMPLETIONS, body(i)))
        return ask(url, COMPLETIONS, body(i))["choices"][0]["text"]

    with ThreadPoolExecutor(64) as clients:
        together = list(clients.map(one, range(64)))
    assert together == [ask(url, COMPLETIONS, body(i))["choices"][0]["text"] for i in range(64)]


LONG = {"prompt": "1+2=", "max_tokens": 3000, "temperature": 5.0, "unmasking_strategy": "sequential"}


def test_a_short_request_does_not_wait_for_a_long_one(url: str) -> None:
    ended = threading.Event()
    seen = count()

    def long() -> None:
        for _ in stream(url, COMPLETIONS, {**LONG, "seed": 1}):
            next(seen)
        ended.set()

    thread = threading.Thread(target=long)
    thread.start()
    wait_until(lambda: LINE._in_flight)
    short = ask(url, COMPLETIONS, {**LONG, "prompt": "3", "seed": 2, "max_tokens": 8})
    was_over = ended.is_set()
    thread.join()
    assert not was_over, "it waited"
    assert short["choices"][0]["text"] == sequential("3", 2, 8)


def sequential(prompt: str, seed: int, max_tokens: int) -> str:
    """The text that LONG's sampling gives alone."""
    whole = alone(encode(TOKENIZER, prompt), seed, max_tokens + 3, temperature=5.0, unmasking_strategy="sequential")
    ended = whole.finish_reason == "stop" and whole.completion_length <= max_tokens
    return whole.text if ended else decode(TOKENIZER, whole.token_ids[:max_tokens])


def test_another_sampling_has_its_turn_though_others_keep_coming(url: str) -> None:
    is_over = threading.Event()

    def keep_coming(first: int) -> None:
        for i in count(first, 100):
            if is_over.is_set():
                return
            ask(url, COMPLETIONS, {"prompt": "1", "max_tokens": 40, "seed": i, "temperature": 5.0})

    with ThreadPoolExecutor(3) as clients:
        for first in range(3):
            clients.submit(keep_coming, first)
        wait_until(lambda: LINE._in_flight)
        try:
            assert ask(url, COMPLETIONS, {"prompt": "2", "max_tokens": 4, "top_k": 3})["choices"]
        finally:
            is_over.set()


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_dies_gives_its_place_free(url: str, is_streamed: bool) -> None:
    LINE.lengths.clear()
    body = json.dumps({"model": "tiny", **LONG, "stream": is_streamed, "seed": 3}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    dying = raw(url, f"{head}Content-Length: {len(body)}\r\n\r\n{body.decode()}")
    wait_until(lambda: LINE._in_flight)
    if is_streamed:
        dying.recv(100)
    with ThreadPoolExecutor(1) as clients:
        other = clients.submit(ask, url, COMPLETIONS, {**LONG, "prompt": "5", "seed": 4, "max_tokens": 40})
        dying.close()
        found = other.result()["choices"][0]["text"]
    assert found == sequential("5", 4, 40)
    wait_until(lambda: not LINE._in_flight)
    assert len(LINE.lengths) == 2 and max(LINE.lengths) < 3000, "it was decoded to the end for nobody"


def test_a_model_of_full_attention_streams_windows() -> None:
    model, tokenizer = sharp_tiny_model(block_length=0)
    body = {"prompt": "1+2=", "seed": 1, "max_tokens": 13, "generation_window": 4, "confidence_threshold": THRESHOLD}
    config = SamplingConfig(max_completion_length=13, generation_window=4, confidence_threshold=THRESHOLD)
    expected = TorchEngine(model, tokenizer).generate([encode(tokenizer, "1+2=")], config, [1])[0].text
    with serving(model, tokenizer) as (_, url):
        assert ask(url, COMPLETIONS, body)["choices"][0]["text"] == expected
        texts = [event["choices"][0]["text"] for event in stream(url, COMPLETIONS, body)]
    assert "".join(texts) == expected and sum(map(bool, texts)) > 2


def test_a_failure_of_the_engine_is_told_to_those_it_concerns(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "_forward", fail)
        status, error = ask(url, COMPLETIONS, {"prompt": "1"})
        assert (status, error["type"], error["message"]) == (500, "server_error", "RuntimeError: out of memory")
        with pytest.raises(AssertionError):
            list(stream(url, COMPLETIONS, {"prompt": "1"}))
    assert ask(url, COMPLETIONS, {"prompt": "1", "max_tokens": 4})["choices"]


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
