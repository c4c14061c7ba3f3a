"""Weights broadcast to servers: bit for bit what was pushed, and neither end waits long for one that has gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.errors import UserError  # noqa: E402
from dirl.rollout.engine import EngineConfig, RolloutError  # noqa: E402
from dirl.rollout.local.engine import TorchEngine  # noqa: E402
from dirl.rollout.server import collective, push  # noqa: E402
from dirl.rollout.server.client import Server  # noqa: E402
from dirl.rollout.server.collective import Collective  # noqa: E402
from dirl.rollout.server.engine import ServerEngine  # noqa: E402
from dirl.rollout.server.push import Pusher  # noqa: E402
from dirl.rollout.server.wire import PUSH, Push, PushedPart, to_json  # noqa: E402
from dirl.rollout.weights import kinds_of  # noqa: E402
from dirl.training.broadcast import BroadcastGroup  # noqa: E402
from dirl.training.full_parameters import named_full_parameters  # noqa: E402
from tests.oracle import sharp_tiny_model  # noqa: E402
from tests.rollout.engine_contract import DYNAMIC, likely_to_stop, random_prompts  # noqa: E402
from tests.rollout.server.serving import KEY, serving  # noqa: E402

CPU, TRAINER = torch.device("cpu"), "a" * 16
MODEL, TOKENIZER = likely_to_stop(seed=5)
OTHER, _ = likely_to_stop(seed=6)
ONLY = EngineConfig(weight_transfer="collective")

# A server in a process of its own, whose weights are written to a file when it is told to end.
SERVER = """
import sys, torch
from tests.oracle import sharp_tiny_model
from tests.rollout.server.serving import serving
model, tokenizer = sharp_tiny_model()
if sys.argv[2] == "untied":
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
with serving(model.to(getattr(torch, sys.argv[3])), tokenizer, has_weights=False) as (rollouts, url):
    print(url, flush=True)
    sys.stdin.read()
    torch.save(dict(rollouts.model.named_parameters()), sys.argv[1])
"""


@contextmanager
def server_process(saved: Path, *how: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SERVER, str(saved), *how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
        process.communicate(timeout=60)
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "ours", "theirs"),
    [("tied", "float32", "float32"), ("untied", "bfloat16", "bfloat16"), ("tied", "float32", "bfloat16")],
)
def test_another_process_has_the_same_bits(tmp_path: Path, head: str, ours: str, theirs: str) -> None:
    donor, tokenizer = sharp_tiny_model()
    if head == "untied":
        donor.lm_head.weight = torch.nn.Parameter(donor.lm_head.weight.detach().clone())
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.normal_()
    donor.to(getattr(torch, ours))
    with server_process(tmp_path / "weights", head, theirs) as (_, url):
        engine = ServerEngine(Pusher([Server(url, KEY)], config=ONLY), donor, tokenizer)
        for parameter in donor.parameters():
            parameter.data.mul_(2)
        engine.update_weights(donor)
        engine.close()
    found = torch.load(tmp_path / "weights", weights_only=True)
    assert found.keys() == dict(donor.named_parameters()).keys()
    for name, parameter in donor.named_parameters():
        assert torch.equal(found[name], parameter.to(found[name].dtype)), name


def test_two_servers_and_a_trainer() -> None:
    prompts, seeds = random_prompts([3, 6, 8]), [1, 2, 3]
    expected = TorchEngine(MODEL, TOKENIZER).generate(prompts, DYNAMIC, seeds)
    with serving(OTHER, TOKENIZER) as (_, one), serving(OTHER, TOKENIZER, has_weights=False) as (_, two):
        engine = ServerEngine(Pusher([Server(one, KEY), Server(two, KEY)], config=ONLY), OTHER, TOKENIZER)
        engine.update_weights(MODEL)
        found = engine.generate(prompts, DYNAMIC, seeds)
        engine.close()
    assert [(c.token_ids, c.step_map) for c in found] == [(c.token_ids, c.step_map) for c in expected]


def test_nobody_waits_for_what_is_there_already() -> None:
    with serving(OTHER, TOKENIZER) as (_, url):
        start = time.monotonic()
        for _ in range(2):
            pusher = Pusher([Server(url, KEY)], trainer=TRAINER, config=ONLY)
            pusher.push(MODEL)
            pusher.release()
        assert time.monotonic() - start < 60


def test_a_group_listens_at_the_loopback_alone() -> None:
    before = listening()
    with serving(MODEL, TOKENIZER) as (_, url):
        group = Collective([Server(url, KEY)], TRAINER, host="127.0.0.1", device=CPU)
        found = listening() - before
        del group
    assert len(found) >= 3, "the server, the meeting, gloo"
    assert {address for address, _ in found} == {"0100007F"}


def listening() -> set[tuple[str, str]]:
    """Addresses and ports at which this process listens, as /proc has them."""
    inodes = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    rows = [
        line.split() for name in ("tcp", "tcp6") for line in Path("/proc/self/net", name).read_text().splitlines()[1:]
    ]
    return {tuple(row[1].split(":")) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}  # type: ignore[misc]


@pytest.mark.parametrize("has_gone", [True, False])
def test_a_server_does_not_wait_for_a_trainer_that_has_gone(has_gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or that stands still: after a time it is as if it had gone."""
    monkeypatch.setattr(collective, "_TENSOR_SECONDS", 1.0)
    with serving(OTHER, TOKENIZER) as (rollouts, url):
        server, weights = Server(url, KEY), f"{TRAINER}.1"
        group = Collective([server], TRAINER, host="127.0.0.1", device=CPU)
        server.call(PUSH, to_json(Push(weights, "p", kinds_of(MODEL))))
        named = named_full_parameters(MODEL)
        two = iter([next(named), next(named)])
        failed: list[str] = []

        def send() -> None:
            try:
                group.send(two, PushedPart(weights, "p"))
            except RolloutError as error:
                failed.append(str(error))

        sending, start = threading.Thread(target=send), time.monotonic()
        sending.start()
        if has_gone:
            time.sleep(0.3)
            group._group.close()
        sending.join(30)
        assert failed and time.monotonic() - start < 15
        assert rollouts.receiver.weights is None
        engine = ServerEngine(Pusher([server], trainer=TRAINER, config=ONLY), MODEL, TOKENIZER)
        assert rollouts.receiver.weights == engine._pusher.weights
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_trainer_does_not_wait_for_a_server_that_has_gone(
    tmp_path: Path, is_sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor, tokenizer = sharp_tiny_model()
    with server_process(tmp_path / "weights", "tied", "float32") as (process, url):
        engine = ServerEngine(Pusher([Server(url, KEY, wait_seconds=1.0)], config=ONLY), donor, tokenizer)
        broadcast, times, start = BroadcastGroup.broadcast, [0], time.monotonic()

        def dying(self: BroadcastGroup, tensor: Any) -> None:
            times[0] += 1
            if times[0] == 3:
                process.kill()
                process.wait()
            broadcast(self, tensor)

        monkeypatch.setattr(BroadcastGroup, "broadcast", dying)
        monkeypatch.setattr(push, "is_sharded", lambda model: is_sharded)
        with pytest.raises(
            RolloutError, match="the broadcast of weights broke off" if is_sharded else "^server"
        ) as error:
            engine.update_weights(donor)
        assert time.monotonic() - start < 30
        assert "\n" not in str(error.value)


def test_a_group_that_broke_is_formed_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """At either end; what it broke at goes over HTTP."""
    broadcast, times = BroadcastGroup.broadcast, [0]
    with serving(OTHER, TOKENIZER) as (rollouts, url):
        engine = ServerEngine(Pusher([Server(url, KEY)], config=ONLY), OTHER, TOKENIZER)

        def broken(self: BroadcastGroup, tensor: Any) -> None:
            times[0] += 1
            if times[0] == 5:
                raise RuntimeError("the network is down")
            broadcast(self, tensor)

        monkeypatch.setattr(BroadcastGroup, "broadcast", broken)
        for model in (MODEL, OTHER):
            engine.update_weights(model)
            for name, tensor in rollouts.model.named_parameters():
                assert torch.equal(tensor, model.get_parameter(name))
        # The end that breaks says why; the other one only that its connection is gone.
        assert times[0] >= 5 and caplog.text.count("; weights are pushed over HTTP") == 1
        assert engine._pusher._group is not None
        engine.close()


def test_what_is_not_finite_is_refused_in_a_group_too() -> None:
    broken, _ = likely_to_stop(seed=5)
    with torch.no_grad():
        broken.model.norm.weight[1] = float("nan")
    with serving(OTHER, TOKENIZER) as (rollouts, url):
        engine = ServerEngine(Pusher([Server(url, KEY)], config=ONLY), OTHER, TOKENIZER)
        with pytest.raises(RolloutError, match=r"model.norm.weight has numbers that are not finite"):
            engine.update_weights(broken)
        assert rollouts.receiver.weights is None
        engine.close()


def test_where_no_group_can_be_formed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is HTTP, or an error, as was asked for."""
    nowhere = {"weight_transfer_host": "192.0.2.1"}
    with serving(OTHER, TOKENIZER) as (rollouts, url):
        for far in (False, True):
            if far:
                monkeypatch.setattr(collective, "_LOOPBACK", ("192.0.2.1",))
            words = "cannot reach 192.0.2.1; set" if far else "weight_transfer_host=192.0.2.1: OSError"
            config = EngineConfig(weight_transfer="collective", **nowhere)  # type: ignore[arg-type]
            with pytest.raises(UserError, match=rf"rollout.weight_transfer=collective: .*{words}.*; or use auto"):
                ServerEngine(Pusher([Server(url, KEY)], trainer=TRAINER, config=config), MODEL, TOKENIZER)
            config = EngineConfig(weight_transfer="auto", **nowhere)  # type: ignore[arg-type]
            caplog.clear()
            engine = ServerEngine(Pusher([Server(url, KEY)], trainer=TRAINER, config=config), MODEL, TOKENIZER)
            assert rollouts.receiver.weights == engine._pusher.weights and "weights go over HTTP: " in caplog.text
            engine.close()


def test_members_who_do_not_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second server is asked, and never comes."""
    from datetime import timedelta

    from dirl.training import broadcast

    monkeypatch.setattr(broadcast, "_JOIN", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as silent, serving(OTHER, TOKENIZER) as (_, url):
        monkeypatch.setattr(Server, "call", lambda self, path, body=None: {"hardware": "cpu"})
        start = time.monotonic()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RolloutError, match=r"timeout|[Tt]imed out"):
            Collective([Server(url, KEY), Server(address, KEY)], TRAINER, host="127.0.0.1", device=CPU)
        assert time.monotonic() - start < 20


SHARDED = """
import sys, torch
import torch.multiprocessing as mp

def rank(index, url, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=index, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from dirl.rollout.engine import EngineConfig
    from dirl.rollout.server.client import Server
    from dirl.rollout.server.engine import ServerEngine
    from dirl.rollout.server.push import Pusher
    from dirl.training.distributed import from_main
    from tests.oracle import sharp_tiny_model
    from tests.rollout.server.serving import KEY
    model, tokenizer = sharp_tiny_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    config = EngineConfig(weight_transfer="collective")
    pusher = Pusher([Server(url, KEY)], trainer=from_main("b" * 16), is_main=index == 0, config=config)
    engine = ServerEngine(pusher, model, tokenizer)
    engine.update_weights(model)
    assert pusher.weights == "b" * 16 + ".1"
    from_main(None)
    engine.close()
    torch.distributed.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(rank, (sys.argv[1], int(sys.argv[2])), nprocs=2)
"""


@pytest.mark.slow
def test_a_sharded_trainer(tmp_path: Path) -> None:
    """FSDP2 on two ranks: both gather, one of them broadcasts, beside the group that they are in already."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with server_process(tmp_path / "weights", "tied", "float32") as (_, url):
        run = [sys.executable, str(tmp_path / "sharded.py"), url, str(port)]
        subprocess.run(run, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})
    found, (model, _) = torch.load(tmp_path / "weights", weights_only=True), sharp_tiny_model()
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter * 3), name
