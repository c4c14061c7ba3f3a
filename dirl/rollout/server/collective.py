"""Weights broadcast from a trainer to its servers, parameter by parameter, through a group of just these processes.

The trainer asks each server over HTTP, with the key, to join it; what a group then carries is as safe as the network.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dirl.errors import one_line
from dirl.rollout.engine import RolloutError
from dirl.rollout.server.client import Server
from dirl.rollout.server.wire import BROADCAST, HEALTH, JOIN, Join, PushedPart, to_json
from dirl.training.broadcast import BroadcastGroup, Meeting, hardware_of

_TENSOR_SECONDS = 120.0  # the longest that one may take, between any two members
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Collective:
    """A group of a trainer and all its servers.

    Args:
        host: at which the trainer listens.
        device: the trainer's.
    Raises:
        RolloutError: it cannot be formed.
    """

    def __init__(self, servers: Sequence[Server], trainer: str, *, host: str, device: torch.device) -> None:
        far = [server.url for server in servers if urlsplit(server.url).hostname not in _LOOPBACK]
        if far and host in _LOOPBACK:
            raise RolloutError(f"{far[0]} cannot reach {host}; set rollout.weight_transfer_host to an address it can")
        self._servers = servers
        places = [hardware_of(device), *(server.call(HEALTH)["hardware"] for server in servers)]
        has_own = "cpu" not in places and len(set(places)) == len(places)
        try:
            listening = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            raise RolloutError(f"rollout.weight_transfer_host={host}: {one_line(error)}") from error
        meeting = Meeting(
            backend="nccl" if has_own else "gloo",
            host=host,
            port=listening.getsockname()[1],
            token=secrets.token_hex(16),
            size=len(places),
            seconds=_TENSOR_SECONDS,
        )
        with ThreadPoolExecutor(len(servers)) as pool:
            joins = [to_json(Join(trainer, i, vars(meeting))) for i in range(1, len(places))]
            joining = [pool.submit(server.call, JOIN, join) for server, join in zip(servers, joins, strict=True)]
            try:
                self._group = BroadcastGroup(meeting, 0, listening)
                for answer in joining:
                    answer.result()
            except RuntimeError as error:
                raise RolloutError(one_line(error, 200)) from error

    def send(self, named: Iterable[tuple[str, Tensor]], sent: PushedPart) -> None:
        """All tensors of a push that was announced.

        Raises:
            RolloutError: the group broke, or a server refuses; the group is then of no use.
        """
        with ThreadPoolExecutor(len(self._servers)) as pool:
            receiving = [pool.submit(server.call, BROADCAST, to_json(sent)) for server in self._servers]
            try:
                for _, tensor in named:
                    self._group.broadcast(tensor.contiguous().to(self._group.device))
            except RuntimeError as error:
                self._group.close()
                raise RolloutError(f"the broadcast of weights broke off: {one_line(error, 200)}") from error
            for answer in receiving:
                answer.result()
