"""Weights on their way to servers: whose they are, what is refused, and servers that go and come back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.cli import main  # noqa: E402
from dirl.errors import UserError  # noqa: E402
from dirl.model.checkpoint import save_model  # noqa: E402
from dirl.rollout.engine import EngineConfig, RolloutError  # noqa: E402
from dirl.rollout.local.engine import TorchEngine  # noqa: E402
from dirl.rollout.server import client, push  # noqa: E402
from dirl.rollout.server.client import LostWeights, Server  # noqa: E402
from dirl.rollout.server.engine import ServerEngine  # noqa: E402
from dirl.rollout.server.hosted import RolloutServer  # noqa: E402
from dirl.rollout.server.line import Line  # noqa: E402
from dirl.rollout.server.push import Pusher  # noqa: E402
from dirl.rollout.server.wire import (  # noqa: E402
    GENERATE,
    KEY_VARIABLE,
    NOT_YET,
    PUSH,
    TAKEN,
    Push,
    PushedPart,
    to_json,
)
from dirl.rollout.weights import buckets, kinds_of  # noqa: E402
from dirl.training.full_parameters import named_full_parameters  # noqa: E402
from tests.rollout.engine_contract import DYNAMIC, likely_to_stop, random_prompts  # noqa: E402
from tests.rollout.server.serving import KEY, serving  # noqa: E402

MODEL, TOKENIZER = likely_to_stop(seed=5)
OTHER, _ = likely_to_stop(seed=6)
PROMPTS, SEEDS = random_prompts([3, 6, 8]), [1, 2, 3]


@pytest.fixture(scope="module")
def expected() -> Any:
    return TorchEngine(MODEL, TOKENIZER).generate(PROMPTS, DYNAMIC, SEEDS)


@pytest.fixture
def running() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def served(running: ExitStack) -> tuple[RolloutServer, str]:
    """A server with weights of its own."""
    return running.enter_context(serving(OTHER, TOKENIZER))


def over(url: str, model: Any = MODEL, **kwargs: Any) -> ServerEngine:
    config = EngineConfig(weight_transfer="http")
    return ServerEngine(Pusher([Server(url, KEY)], config=config, **kwargs), model, TOKENIZER)


def test_weights_go_in_buckets_in_order(served: tuple[RolloutServer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    rollouts, url = served
    sent: list[str] = []
    call = Server.call
    monkeypatch.setattr(push, "buckets", lambda named: buckets(named, 1 << 16))
    monkeypatch.setattr(Server, "call", lambda self, path, body=None: sent.append(path) or call(self, path, body))
    engine = over(url)
    parts = [path for path in sent if path.startswith("/weights")]
    assert len(parts) > 3 and all(path.endswith(f"part={n}") for n, path in enumerate(parts))
    for name, tensor in rollouts.model.named_parameters():
        assert torch.equal(tensor, MODEL.get_parameter(name))
    assert rollouts.receiver.weights == engine._pusher.weights


@pytest.mark.parametrize("has_weights", [True, False])
def test_a_server_that_was_started_again_is_pushed_to_again(has_weights: bool, expected: Any) -> None:
    """It has weights of its own, or none; answers are never those of its own."""
    with serving(OTHER, TOKENIZER) as (_, url):
        engine = over(url)
        assert engine.generate(PROMPTS, DYNAMIC, SEEDS) == expected
    with serving(OTHER, TOKENIZER, has_weights=has_weights, port=int(url.rsplit(":", 1)[1])):
        assert engine.generate(PROMPTS, DYNAMIC, SEEDS) == expected
        engine.close()


@pytest.mark.parametrize("why", ["is sharded", "has moved on"])
def test_weights_that_cannot_be_pushed_again_end_the_run(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = likely_to_stop(seed=5)
    with serving(OTHER, TOKENIZER) as (_, url):
        engine = over(url, model)
    if why == "is sharded":
        monkeypatch.setattr(push, "is_sharded", lambda model: True)
    else:
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-3
    words = {"is sharded": "by all ranks together", "has moved on": "the trainer has moved on"}[why]
    with serving(OTHER, TOKENIZER, port=int(url.rsplit(":", 1)[1])):
        with pytest.raises(RolloutError, match=rf"weights \w+\.0 are asked for, its-own are here; .*{words}") as error:
            engine.generate(PROMPTS, DYNAMIC, SEEDS)
        assert "\n" not in str(error.value)
        engine.close()


def test_a_server_that_is_away_is_waited_for(expected: Any) -> None:
    """Gone between two calls, and gone in the middle of a push."""
    with serving(OTHER, TOKENIZER) as (_, url):
        engine = over(url)
    port = int(url.rsplit(":", 1)[1])
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(engine.generate(PROMPTS, DYNAMIC, SEEDS)))
    waiting.start()
    time.sleep(2)
    with serving(OTHER, TOKENIZER, port=port):
        waiting.join(60)
    assert found == [expected]
    pushing = threading.Thread(target=lambda: found.append(engine.update_weights(MODEL)))
    pushing.start()
    time.sleep(2)
    with serving(OTHER, TOKENIZER, port=port):
        pushing.join(60)
        assert engine.generate(PROMPTS, DYNAMIC, SEEDS) == expected
        engine.close()


def test_a_push_whose_server_was_started_again_begins_anew(monkeypatch: pytest.MonkeyPatch, expected: Any) -> None:
    monkeypatch.setattr(push, "buckets", lambda named: buckets(named, 1 << 16))
    with serving(OTHER, TOKENIZER) as (rollouts, url):
        engine = over(url)
        take, times = rollouts.receiver.take, [0]

        def forgetful(body: bytes, sent: PushedPart) -> Any:
            times[0] += 1
            if times[0] == 3:
                rollouts.receiver._coming = None
            return take(body, sent)

        monkeypatch.setattr(rollouts.receiver, "take", forgetful)
        engine.update_weights(MODEL)
        assert times[0] > 6
        assert engine.generate(PROMPTS, DYNAMIC, SEEDS) == expected
        times[0] = 0
        monkeypatch.setattr(push, "is_sharded", lambda model: True)
        with pytest.raises(
            RolloutError, match=r"part \d of a push .*|no push of \w+\.2 is under way; .* by all ranks together"
        ):
            engine.update_weights(MODEL)
        engine.close()


def test_a_second_trainer_is_refused_until_the_first_has_gone(
    served: tuple[RolloutServer, str], monkeypatch: pytest.MonkeyPatch, expected: Any
) -> None:
    rollouts, url = served
    monkeypatch.setitem(client._CONFLICT_SECONDS, TAKEN, 0.0)
    first = over(url)
    for _ in range(2):
        with pytest.raises(RolloutError, match="it serves another trainer; give each trainer servers of its own"):
            over(url, OTHER)
        assert first.generate(PROMPTS, DYNAMIC, SEEDS) == expected
        first.update_weights(MODEL)
    rollouts.receiver._held_until = 0.0  # the first was not heard from, as if it were stopped
    second = over(url, OTHER)
    with pytest.raises(RolloutError, match="it serves another trainer"):
        first.generate(PROMPTS, DYNAMIC, SEEDS)
    assert second.generate(PROMPTS, DYNAMIC, SEEDS) == TorchEngine(OTHER, TOKENIZER).generate(PROMPTS, DYNAMIC, SEEDS)
    second.close()
    third = over(url)
    assert third.generate(PROMPTS, DYNAMIC, SEEDS) == expected
    third.close()


def test_a_trainer_that_works_for_long_keeps_its_server(
    served: tuple[RolloutServer, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is forgotten without a word does not."""
    rollouts, url = served
    monkeypatch.setattr(push, "LEASE_SECONDS", 0.2)
    engine = over(url)
    before = rollouts.receiver._held_until
    wait_until(lambda: rollouts.receiver._held_until > before + 0.2)
    del engine
    wait_until(lambda: rollouts.receiver._held_until < time.monotonic())


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


WEIGHTS = {name: tensor.clone() for name, tensor in named_full_parameters(MODEL)}
NORM = "model.norm.weight"


def pushed(server: Server, tensors: dict[str, Tensor], weights: str = "a" * 16 + ".7", **announced: Any) -> None:
    """A push of one part, of tensors that may not be those that were announced."""
    kinds = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()} | announced
    server.call(PUSH, to_json(Push(weights, "p", kinds)))
    server.call(PushedPart(weights, "p", 0).path(), save(tensors))


ANNOUNCED = {
    "one of many": ({NORM: WEIGHTS[NORM]}, r"is absent in the pushed model and \("),
    "of integers": (WEIGHTS | {NORM: WEIGHTS[NORM].long()}, f"{NORM} is pushed as int64; push one of float32"),
    "of another shape": (WEIGHTS | {NORM: WEIGHTS[NORM][:3]}, rf"{NORM} is \(3,\) in the pushed model"),
    "of an unknown": (WEIGHTS | {"x": WEIGHTS[NORM]}, "x is .* in the pushed model and absent in the engine"),
}


@pytest.mark.parametrize(("tensors", "words"), ANNOUNCED.values(), ids=ANNOUNCED.keys())
def test_a_push_that_does_not_fit_is_refused_before_it_begins(
    served: tuple[RolloutServer, str], tensors: dict[str, Tensor], words: str
) -> None:
    rollouts, url = served
    with pytest.raises(RolloutError, match=words):
        pushed(Server(url, KEY), tensors)
    assert rollouts.receiver.weights == "its-own"
    assert torch.equal(rollouts.model.get_parameter(NORM), OTHER.get_parameter(NORM))


def test_a_push_of_no_tensors_by_name_is_refused(served: tuple[RolloutServer, str]) -> None:
    said = {"weights": "a" * 16 + ".7", "pusher": "p", "tensors": [NORM]}
    with pytest.raises(RolloutError, match=r"tensors must be names with a dtype and a shape each, got \['"):
        Server(served[1], KEY).call(PUSH, to_json(said))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_decoded_with(
    served: tuple[RolloutServer, str], number: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, url = served
    broken = WEIGHTS[NORM].clone()
    broken[1] = number
    with pytest.raises(RolloutError, match=f"{NORM} has numbers that are not finite"):
        pushed(Server(url, KEY), WEIGHTS | {NORM: broken})
    assert rollouts.receiver.weights is None
    with pytest.raises(LostWeights):  # nor may it go on with the next part
        Server(url, KEY).call(PushedPart("a" * 16 + ".7", "p", 1).path(), save(WEIGHTS))
    engine = over(url, trainer="a" * 16)  # but begin anew
    assert rollouts.receiver.weights == engine._pusher.weights
    engine.close()


def test_what_is_sent_must_be_what_was_announced(served: tuple[RolloutServer, str]) -> None:
    rollouts, url = served
    for changed in (WEIGHTS[NORM].bfloat16(), WEIGHTS[NORM][:3]):
        with pytest.raises(RolloutError, match=rf"{NORM} comes as .*, .*'float32'.* was announced"):
            pushed(Server(url, KEY), WEIGHTS | {NORM: changed}, **{NORM: kinds_of(MODEL)[NORM]})
    for name in ("-3", "a.1", "a" * 16 + ".-1", "A" * 16 + ".1"):
        with pytest.raises(RolloutError, match="weights must be named"):
            Server(url, KEY).call(PUSH, json.dumps({"weights": name, "pusher": "p", "tensors": {}}).encode())
    with pytest.raises(RolloutError, match="SafetensorError"):
        Server(url, KEY).call(PUSH, to_json(Push("a" * 16 + ".8", "p", kinds_of(MODEL))))
        Server(url, KEY).call(PushedPart("a" * 16 + ".8", "p", 0).path(), b"no tensors")
    with pytest.raises(RolloutError, match=r"ValueError|KeyError"):
        Server(url, KEY).call("/weights?weights=a&pusher=b", b"")
    assert rollouts.receiver.weights is None


def test_half_a_push_is_none(served: tuple[RolloutServer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not there, another process of the trainer waits for it, and a part may be repeated."""
    _, url = served
    server, name, half = Server(url, KEY), "a" * 16 + ".7", dict(list(WEIGHTS.items())[:10])
    rest = {key: tensor for key, tensor in WEIGHTS.items() if key not in half}
    monkeypatch.setitem(client._CONFLICT_SECONDS, NOT_YET, 0.0)
    server.call(PUSH, to_json(Push(name, "p", kinds_of(MODEL))))
    for _ in range(2):
        assert server.call(PushedPart(name, "p", 0).path(), save(half)) == {"weights": None}
    with pytest.raises(RolloutError, match=f"weights {name} are asked for, {name} are here"):
        server.call(GENERATE, asking(name))
    with pytest.raises(RolloutError, match=f"weights {name} are being pushed"):
        server.call(PUSH, to_json(Push(name, "another", kinds_of(MODEL))))
    with pytest.raises(LostWeights, match="part 5 of a push while part 1 is awaited"):
        server.call(PushedPart(name, "p", 5).path(), save(rest))
    for _ in range(2):
        assert server.call(PushedPart(name, "p", 1).path(), save(rest)) == {"weights": name}
    assert server.call(PUSH, to_json(Push(name, "another", kinds_of(MODEL)))) == {"weights": name}
    assert server.call(GENERATE, asking(name))["completions"]


def asking(weights: str, sampling: str = "{}", prompt: list[int] | None = None) -> bytes:
    rows = json.dumps([{"id": 0, "prompt_ids": prompt or [1], "seed": 1}])
    return f'{{"weights": "{weights}", "sampling": {sampling}, "requests": {rows}}}'.encode()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (asking("its-own", '{"temperature": NaN}'), "temperature must be a finite number"),
        (asking("its-own", '{"confidence_threshold": Infinity}'), "confidence_threshold must be a finite number"),
        (asking("its-own", prompt=[-1]), "token ids from 0 to"),
        (asking("its-own", prompt=[10**9]), "token ids from 0 to"),
        (b"{", "JSONDecodeError"),
    ],
)
def test_a_wrong_request_is_the_clients(served: tuple[RolloutServer, str], body: bytes, words: str) -> None:
    with pytest.raises(RolloutError, match=words):
        Server(served[1], KEY).call(GENERATE, body)


def test_a_trainer_that_went_away_is_not_decoded_for(running: ExitStack) -> None:
    line = Line()
    _, url = running.enter_context(serving(MODEL, TOKENIZER, line=line))
    sampling = '{"max_completion_length": 100000, "temperature": 5.0, "unmasking_strategy": "sequential"}'
    dying = Server(url, KEY)
    with pytest.raises(client._NotNow):
        dying._call_once(GENERATE, asking("its-own", sampling), 1.0)
    dying.close()
    wait_until(lambda: not line._in_flight)


def test_a_port_in_use_is_one_line(
    served: tuple[RolloutServer, str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(MODEL, TOKENIZER, tmp_path / "model")
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    port = served[1].rsplit(":", 1)[1]
    assert main(["serve", str(tmp_path / "model"), f"port={port}", "engine.engine=torch"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dirl: error: host=127.0.0.1 port={port}: OSError: [Errno")
    assert said.endswith("; choose another")


def test_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from dirl.rollout.build import build_engine

    for name in [name for name in sys.modules if name.startswith("dirl.rollout.server.") or name == "httpx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"rollout.mode=server needs the package httpx: pip install 'dirl\[serve\]'"):
        build_engine(MODEL, TOKENIZER, EngineConfig(mode="server"))
