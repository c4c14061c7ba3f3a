"""Rollouts over HTTP: the contract of every engine, and what goes wrong between processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.cli import main  # noqa: E402
from dirl.errors import UserError  # noqa: E402
from dirl.model.checkpoint import save_model  # noqa: E402
from dirl.model.families.block_diffusion import BlockDiffusionModel  # noqa: E402
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, RolloutError, SamplingConfig  # noqa: E402
from dirl.rollout.local.engine import TorchEngine  # noqa: E402
from dirl.rollout.server import client, process  # noqa: E402
from dirl.rollout.server import engine as server_engine  # noqa: E402
from dirl.rollout.server.client import Server  # noqa: E402
from dirl.rollout.server.engine import ServerEngine, connect  # noqa: E402
from dirl.rollout.server.process import ServerProcess  # noqa: E402
from dirl.rollout.server.push import Pusher  # noqa: E402
from dirl.rollout.server.serve import RolloutServer, serve  # noqa: E402
from dirl.rollout.server.wire import KEY_VARIABLE, GenerateRequest, PromptRow, PushedPart, ServeConfig  # noqa: E402
from tests.rollout.engine_contract import (  # noqa: E402
    DYNAMIC,
    EngineContract,
    PreTrainedTokenizerBase,
    likely_to_stop,
    random_prompts,
)
from tests.rollout.server.serving import KEY, serving  # noqa: E402

_running = ExitStack()


@pytest.fixture(autouse=True)
def _closing() -> Iterator[None]:
    with _running:
        yield


def start_server(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
) -> tuple[RolloutServer, str]:
    """A server in a thread of this process, over a copy of the model; and its address."""
    return _running.enter_context(serving(model, tokenizer, has_weights=False, max_batch_size=max_batch_size))


def over_threads(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, count: int = 1, max_batch_size: int = 256
) -> ServerEngine:
    servers = [start_server(model, tokenizer, max_batch_size=max_batch_size)[1] for _ in range(count)]
    return ServerEngine(Pusher([Server(url, KEY) for url in servers]), model, tokenizer)


class TestServerEngine(EngineContract):
    def make_engine(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> ServerEngine:
        return over_threads(model, tokenizer, max_batch_size=max_batch_size)


@pytest.mark.parametrize("count", [2, 3])
def test_servers_share_the_work_and_answers_keep_their_order(count: int) -> None:
    model, tokenizer = likely_to_stop()
    prompts, seeds = random_prompts([1, 9, 3, 8, 4, 2, 17]), range(7)
    engine = over_threads(model, tokenizer, count=count)
    expected = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    assert what_was_decoded(engine.generate(prompts, DYNAMIC, seeds)) == what_was_decoded(expected)


def what_was_decoded(completions: Sequence[Completion]) -> list[Any]:
    """All but logprobs, which rounding moves with what shares a batch."""
    return [(c.prompt_ids, c.token_ids, c.step_map, c.text) for c in completions]


def test_answers_are_matched_by_id(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    prompts, seeds = random_prompts([1, 9, 3, 8]), range(4)
    engine = over_threads(model, tokenizer)
    expected = engine.generate(prompts, DYNAMIC, seeds)
    stock = Server.call

    def shuffled(self: Server, path: str, body: bytes | None = None, most: int = 1 << 20) -> dict[str, Any]:
        return {"completions": stock(self, path, body)["completions"][::-1]}

    monkeypatch.setattr(Server, "call", shuffled)
    assert engine.generate(prompts, DYNAMIC, seeds) == expected

    def short(self: Server, path: str, body: bytes | None = None, most: int = 1 << 20) -> dict[str, Any]:
        return {"completions": stock(self, path, body)["completions"][1:]}

    monkeypatch.setattr(Server, "call", short)
    with pytest.raises(RolloutError, match="1 of 4 completions are missing, the first is 0"):
        engine.generate(prompts, DYNAMIC, seeds)


def test_completions_that_no_engine_gives_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    engine, stock = over_threads(model, tokenizer), Server.call
    false = {
        "token_ids": ([10**6], ["7"], 7, [model.scheme.mask_token_id], []),
        "step_map": ([0], [5], None),
        "logprobs": ([0.5], ["0"], [[]]),
        "hold_logprobs": ([], [-1.0], {}),
        "id": (1, "0", [0]),
        "of_another_version": (1,),
    }
    for name, values in false.items():
        for value in values:

            def lie(*how: Any, name: str = name, value: Any = value) -> dict[str, Any]:
                (row,) = stock(*how)["completions"]
                rest = row[name][1:] if isinstance(value, list) and isinstance(row.get(name), list) and value else []
                return {"completions": [{**row, name: value + rest if isinstance(value, list) else value}]}

            monkeypatch.setattr(Server, "call", lie)
            with pytest.raises(
                RolloutError, match=r"its completions are not what was asked for \(.*\); is it"
            ) as error:
                engine.generate([[1, 2]], DYNAMIC, [0])
            assert "\n" not in str(error.value)


def test_an_answer_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = over_threads(*likely_to_stop())
    endless = httpx.Response(200, content=(b" " * 1000 for _ in iter(int, 1)))
    monkeypatch.setattr(httpx.Client, "send", lambda *_, **__: endless)
    with pytest.raises(RolloutError, match=r"/generate answers more than \d+ bytes"):
        engine.generate([[1, 2]], DYNAMIC, [0])


def test_lost_connections_are_tried_again_and_then_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = over_threads(*likely_to_stop())
    expected = engine.generate([[1, 2]], DYNAMIC, [0])
    real, failures, slept = httpx.Client.send, [0], [0.0]

    def flaky(*args: Any, **kwargs: Any) -> Any:
        failures[0] += 1
        if failures[0] <= 2:
            raise httpx.ReadError("reset by peer")
        return real(*args, **kwargs)

    monkeypatch.setattr(httpx.Client, "send", flaky)
    assert engine.generate([[1, 2]], DYNAMIC, [0]) == expected

    def dead(*_: Any, **__: Any) -> Any:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx.Client, "send", dead)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: slept.append(slept[-1] + seconds))
    with pytest.raises(RolloutError, match=r"server http://127\.0\.0\.1:\d+/generate: refused"):
        engine.generate([[1, 2]], DYNAMIC, [0])
    assert 120 <= slept[-1] < 126, "server_wait_seconds"


def test_a_rank_that_does_not_push_waits_for_the_one_that_does() -> None:
    prompts, seeds = random_prompts([3, 6]), [1, 2]
    (model, tokenizer), (donor, _) = likely_to_stop(seed=6), likely_to_stop(seed=5)
    _, url = start_server(model, tokenizer)
    pushing, waiting = (
        ServerEngine(Pusher([Server(url, KEY)], trainer="a" * 16, is_main=is_main), model, tokenizer)
        for is_main in (True, False)
    )
    waiting.update_weights(donor)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(waiting.generate(prompts, DYNAMIC, seeds)))
    thread.start()
    time.sleep(0.3)
    assert not found, "it decoded with the weights of before"
    pushing.update_weights(donor)
    thread.join(timeout=30)
    assert found == [TorchEngine(donor, tokenizer).generate(prompts, DYNAMIC, seeds)]


def test_strangers_are_refused() -> None:
    _, url = start_server(*likely_to_stop())
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for path, body in (("/health", None), ("/generate", b"{}"), ("/weights?version=1&part=0&last=1", b"")):
            request = urllib.request.Request(url + path, data=body, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request)
            assert refused.value.code == 401
    with pytest.raises(RolloutError, match=f"wrong key: set {KEY_VARIABLE}"):
        Server(url, "x" * 32).call("/health")


@pytest.mark.parametrize("key", ["", "short"])
def test_no_server_without_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} must hold a key of at least 16 characters"):
        serve(ServeConfig(host="0.0.0.0"))


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert main(["serve", str(Path(__file__).parents[3] / "configs/tiny/serve.yaml")]) == 2
    assert KEY_VARIABLE in capsys.readouterr().err


def test_a_server_without_its_extra_is_one_line() -> None:
    script = "import sys; sys.modules['uvicorn'] = None; from dirl.cli import main; sys.exit(main(['serve', '.']))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == "dirl: error: dirl serve needs the package uvicorn: pip install 'dirl[serve]'"


def test_a_server_that_is_not_there_is_one_line() -> None:
    model, tokenizer = likely_to_stop(block_length=4)
    for url, words in (("http://127.0.0.1:1", "/health: .*refused"), ("node:1", ": UnsupportedProtocol")):
        with pytest.raises(UserError, match=rf"rollout.server_urls: server {url}{words}.*`dirl serve` running"):
            ServerEngine(Pusher([Server(url, KEY, wait_seconds=0.0)]), model, tokenizer)


def test_another_model_is_refused() -> None:
    _, url = start_server(*likely_to_stop(block_length=8))
    model, tokenizer = likely_to_stop(block_length=4)
    with pytest.raises(ValueError, match=r"has block_length 8, the trainer 4; serve the same model"):
        ServerEngine(Pusher([Server(url, KEY)]), model, tokenizer)


@pytest.mark.parametrize(("theirs", "ours"), [("dual", "none"), ("none", "prefix")])
def test_a_server_over_another_cache_is_refused(theirs: ApproximateCache, ours: ApproximateCache) -> None:
    """Its completions would be taken for exact ones, or exact ones corrected."""
    model, tokenizer = likely_to_stop(block_length=0)
    rollouts, url = start_server(model, tokenizer)
    rollouts.config = EngineConfig(approximate_cache=theirs)
    with pytest.raises(UserError, match=rf"approximate_cache={theirs}, rollout.approximate_cache is {ours}.*set both"):
        ServerEngine(Pusher([Server(url, KEY)]), model, tokenizer, approximate_cache=ours)
    rollouts.config = EngineConfig(approximate_cache=ours)
    ServerEngine(Pusher([Server(url, KEY)]), model, tokenizer, approximate_cache=ours)


@pytest.mark.slow
def test_a_server_of_our_own_restarts_after_crashes_and_dies_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes: started, killed in between, started again with the weights pushed; gone when the trainer is."""
    monkeypatch.setattr(process, "_MOST_STARTS", 3)
    (model, tokenizer), (donor, _) = likely_to_stop(seed=6), likely_to_stop(seed=5)
    prompts, seeds = random_prompts([3, 6, 8]), [1, 2, 3]
    engine = connect(model, tokenizer, EngineConfig(mode="server", engine="torch"))
    try:
        ours = engine.servers[0].process
        assert ours is not None and KEY_VARIABLE not in os.environ
        assert ours._environment[KEY_VARIABLE] not in " ".join(map(str, ours._process.args))  # type: ignore[arg-type]
        engine.update_weights(donor)
        expected = TorchEngine(donor, tokenizer).generate(prompts, DYNAMIC, seeds)
        assert engine.generate(prompts, DYNAMIC, seeds) == expected
        for _ in range(2):
            kill(ours)
            assert engine.generate(prompts, DYNAMIC, seeds) == expected
        kill(ours)
        with pytest.raises(RolloutError, match=r"(?s)dirl serve ended 3 times in 30 minutes:.*serving rollouts at"):
            engine.generate(prompts, DYNAMIC, seeds)
        monkeypatch.setattr(process, "_WITHIN_SECONDS", 0.0)
        assert engine.generate(prompts, DYNAMIC, seeds) == expected, "the bound is one of the rate"
    finally:
        engine.close()
    assert not ours.is_alive


def kill(ours: ServerProcess) -> None:
    os.kill(ours._process.pid, signal.SIGKILL)
    ours._process.wait()


def test_a_server_of_ones_own_decodes_with_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeConfig] = []

    class NotStarted:
        url = "http://127.0.0.1:1"

        def __init__(self, settings: Callable[[Path], ServeConfig], *_: object, device: str) -> None:
            started.append(settings(tmp_path))

    monkeypatch.setattr(server_engine, "ServerProcess", NotStarted)
    asked = EngineConfig(
        mode="server",
        engine="torch",
        max_batch_size=7,
        max_cached_tokens=99,
        compile="never",
        server_devices=["1"],
        approximate_cache="prefix",
    )
    for bf16 in (False, True):
        server_engine.start_server(*likely_to_stop(), asked, bf16=bf16)
    assert started[0].engine == replace(asked, mode="colocate", sleep_level=0, server_devices=[])
    assert [settings.bf16 for settings in started] == [False, True]


def test_a_server_that_cannot_start_shows_its_log() -> None:
    model, tokenizer = likely_to_stop()
    with pytest.raises(RolloutError, match=r"(?s)dirl serve ended with code 2:.*lmdeploy"):
        connect(model, tokenizer, EngineConfig(mode="server", engine="lmdeploy"))


@pytest.mark.slow
def test_no_orphan(tmp_path: Path) -> None:
    """The trainer is killed without a chance to clean up: no server is left, and nothing on the disk."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    save_model(*likely_to_stop(), tmp_path / "model")
    script = (
        "import sys, time\n"
        "from dirl.model.checkpoint import load\n"
        "from dirl.rollout.build import build_engine\n"
        "from dirl.rollout.engine import EngineConfig\n"
        f"engine = build_engine(*load({str(tmp_path / 'model')!r}), EngineConfig(mode='server', engine='torch'))\n"
        "print(engine.servers[0].url, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = os.environ | {"TMPDIR": str(temporary)}
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert trainer.stdout is not None
    port = int(trainer.stdout.readline().rsplit(":", 1)[1])
    trainer.kill()
    trainer.wait()
    assert not list(temporary.glob("dirl-*"))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.1)
    pytest.fail("the server outlived its trainer by 30 s")


@dataclass(frozen=True, kw_only=True)
class LargerConfig(SamplingConfig):
    num_generations: int = 8


def test_what_is_sent_is_what_is_read() -> None:
    sampling = LargerConfig(temperature=0.7, top_k=9, unmasking_strategy="entropy_bounded")
    sent = GenerateRequest("ab.5", sampling, [PromptRow(0, [], 1), PromptRow(1, [7, 8], (1 << 63) - 1)])
    read = GenerateRequest.from_json(sent.to_json())
    assert (read.weights, read.requests) == ("ab.5", sent.requests)
    assert read.sampling == SamplingConfig(temperature=0.7, top_k=9, unmasking_strategy="entropy_bounded")
    part = PushedPart("ab.5", "cd", 11)
    path, _, query = part.path().partition("?")
    assert (path, PushedPart.from_query(query)) == ("/weights", part)


def test_answers_are_plain_json() -> None:
    engine = over_threads(*likely_to_stop())
    whole = json.loads(GenerateRequest(engine._pusher.weights, DYNAMIC, [PromptRow(3, [1, 2], seed=4)]).to_json())
    answer = engine.servers[0].call("/generate", json.dumps(whole).encode())
    fields = {"id", "token_ids", "step_map", "logprobs", "hold_logprobs"}
    assert [row.keys() for row in answer["completions"]] == [fields]
    for broken, words in (([{"id": 3, "seed": 4}], "TypeError: .*'prompt_ids'"), ([{"idd": 3}], "TypeError: .*'idd'")):
        with pytest.raises(RolloutError, match=words):
            engine.servers[0].call("/generate", json.dumps({**whole, "requests": broken}).encode())
    with pytest.raises(RolloutError, match="no /nothing here"):
        engine.servers[0].call("/nothing")
