"""A trainer's module -> the modules of its servers: weights under names, and the servers held for this trainer."""

from __future__ import annotations

import logging
import secrets
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from dirl.errors import UserError
from dirl.rollout.engine import EngineConfig, RolloutError
from dirl.rollout.server.client import LostWeights, Server
from dirl.rollout.server.collective import Collective
from dirl.rollout.server.wire import LEASE_SECONDS, PUSH, Push, PushedPart, to_json
from dirl.rollout.weights import buckets, kinds_of
from dirl.training.full_parameters import is_sharded, named_full_parameters

logger = logging.getLogger(__name__)

_ATTEMPTS = 3
_SHARDED = "sharded weights can only be gathered by all ranks together: continue from the last checkpoint"


class Pusher:
    """Pushes to servers under names of its trainer's, which no other trainer's weights have.

    Args:
        trainer: the same for all ranks of a run; empty: a new one.
        is_main: False: another rank pushes what is new, this one only to servers that have lost it.
        config: how weights are transferred.
    """

    def __init__(
        self, servers: Sequence[Server], *, trainer: str = "", is_main: bool = True, config: EngineConfig | None = None
    ) -> None:
        self._config, self._group = config or EngineConfig(), cast(Collective | None, None)
        self._is_over_http = self._config.weight_transfer == "http"
        self.servers, self.weights = list(servers), ""
        self._trainer, self._is_main = trainer or new_trainer(), is_main
        self._process, self._number = secrets.token_hex(8), -1
        self._model: nn.Module | None = None
        self._sums: list[float] = []
        self.release = lambda: None
        if is_main:
            has_gone = threading.Event()
            thread = threading.Thread(target=_hold, args=(self.servers, self._trainer, has_gone), daemon=True)
            thread.start()
            self.release = weakref.finalize(self, _release, thread, has_gone)

    def push(self, model: nn.Module) -> None:
        """To all servers, under a name that was never used: one that failed may be half there.

        Raises:
            RolloutError: a server refuses, was away for too long, or cannot be sent what it has lost.
        """
        self._number += 1
        self.weights = f"{self._trainer}.{self._number}"
        if self._is_main:
            self._send(self.servers, model, self._formed(model))
        else:
            for _ in named_full_parameters(model):  # sharded parameters are gathered by all ranks together
                pass
        self._model, self._sums = model, _sums(model)

    def restore(self, server: Server, lost: LostWeights) -> None:
        """Push the same once more, to a server that was started again.

        Raises:
            RolloutError: that is not possible any more.
        """
        if self._model is None or is_sharded(self._model):
            raise RolloutError(f"{lost}; {_SHARDED}") from lost
        if _sums(self._model) != self._sums:
            raise RolloutError(
                f"{lost}; the trainer has moved on from them: continue from the last checkpoint"
            ) from lost
        logger.warning("%s; they are pushed again", lost)
        self._group = None  # which the server was a member of
        self._send([server], self._model)

    def _formed(self, model: nn.Module) -> Collective | None:
        config = self._config
        if self._group is None and not self._is_over_http:
            device = next(model.parameters()).device
            try:
                self._group = Collective(self.servers, self._trainer, host=config.weight_transfer_host, device=device)
            except RolloutError as error:
                if config.weight_transfer == "collective":
                    raise UserError(f"rollout.weight_transfer=collective: {error}; or use auto") from error
                logger.warning("weights go over HTTP: %s", error)
                self._is_over_http = True
        return self._group

    def _send(self, servers: Sequence[Server], model: nn.Module, group: Collective | None = None) -> None:
        """Again from the beginning where a server was started again; over HTTP where the group broke."""
        for _ in range(_ATTEMPTS):
            try:
                return self._send_once(servers, model, group)
            except RolloutError as error:
                if group is None and not isinstance(error, LostWeights):
                    raise
                self._group = group = None
                if is_sharded(model):
                    raise RolloutError(f"{error}; {_SHARDED}") from error
                logger.warning("%s; weights are pushed over HTTP", error)
        raise RolloutError(f"weights {self.weights}: {_ATTEMPTS} pushes were broken off by servers that started again")

    def _send_once(self, servers: Sequence[Server], model: nn.Module, group: Collective | None) -> None:
        """All weights: parameter by parameter, or a bucket at a time to all servers before the next is gathered."""
        named, push = named_full_parameters(model), Push(self.weights, self._process, kinds_of(model))
        with ThreadPoolExecutor(len(servers)) as pool:
            try:
                there = pool.map(lambda server: server.call(PUSH, to_json(push)).get("weights"), servers)
                takers = [server for server, name in zip(servers, there, strict=True) if name != self.weights]
                if group is not None and len(takers) == len(servers):
                    return group.send(named, PushedPart(self.weights, self._process))
                answers: list[dict[str, Any]] = []  # to the last part
                for part, bucket in enumerate(buckets(named) if takers else ()):
                    body = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in bucket})
                    path = PushedPart(self.weights, self._process, part).path()
                    answers = list(pool.map(partial(Server.call, path=path, body=body), takers))
                for server, answer in zip(takers, answers, strict=True):
                    if answer.get("weights") != self.weights:
                        here = f"{answer.get('weights')!r:.60} there"
                        raise RolloutError(f"server {server.url}: all of {self.weights} was pushed, it has {here}")
            finally:
                for _ in named:  # other ranks gather to the end
                    pass


def new_trainer() -> str:
    """A name that is nobody's yet."""
    return secrets.token_hex(8)


def _sums(model: nn.Module) -> list[float]:
    """What changes when weights do; empty where one rank lacks them."""
    sums = (
        [] if is_sharded(model) else [parameter.detach().sum(dtype=torch.float64) for parameter in model.parameters()]
    )
    return torch.stack(sums).tolist() if sums else []


def _hold(servers: Sequence[Server], trainer: str, has_gone: threading.Event) -> None:
    while not has_gone.wait(LEASE_SECONDS / 4):
        for server in servers:
            server.hold(trainer)
    for server in servers:
        server.hold(trainer, 0.0)


def _release(thread: threading.Thread, has_gone: threading.Event) -> None:
    has_gone.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5)
