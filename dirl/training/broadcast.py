"""A group of processes that are no ranks of one run, beside whatever group a process is in already.

Member 0 opens it and sends, the others join and receive: gloo over TCP, or NCCL where each member has a GPU of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

_JOIN = timedelta(seconds=30)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Where a group meets, and who comes."""

    backend: Literal["gloo", "nccl"]
    host: str  # member 0 listens at no other address
    port: int
    token: str  # that no other meeting has
    size: int
    seconds: float  # the longest that a tensor may take


class BroadcastGroup:
    """One member's end.

    Args:
        listening: member 0's socket at the meeting's address; the others have none.
    Raises:
        RuntimeError: the others did not come within 30 seconds.
    """

    def __init__(self, meeting: Meeting, member: int, listening: socket.socket | None = None) -> None:
        self.device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
        door: dict[str, Any] = {} if listening is None else {"master_listen_fd": listening.detach()}
        store = TCPStore(meeting.host, meeting.port, None, bool(door), _JOIN, wait_for_workers=False, **door)
        make = _nccl if meeting.backend == "nccl" else _gloo
        self._group = make(PrefixStore(meeting.token, store), member, meeting)
        self._options = BroadcastOptions()
        self._options.timeout = timedelta(seconds=meeting.seconds)
        self.broadcast(torch.zeros(1, device=self.device))  # NCCL meets no earlier

    def broadcast(self, tensor: Tensor) -> None:
        """Member 0's numbers, in place, on every member.

        Args:
            tensor: contiguous, on `device`.
        Raises:
            RuntimeError: a member has gone, or they did not come in time; the group is then of no use.
        """
        self._group.broadcast([tensor], self._options).wait(self._options.timeout)

    def close(self) -> None:
        """Leave, so that nobody waits for this member; what holds the object, such as an error, no longer matters."""
        self._group = None


def hardware_of(device: torch.device) -> str:
    """A name that two processes have in common where they compute on the same device: NCCL refuses that."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _gloo(store: PrefixStore, member: int, meeting: Meeting) -> Any:
    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = _JOIN
    address = meeting.host if member == 0 else _address_towards(meeting.host, meeting.port)
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, member, meeting.size, options)


def _nccl(store: PrefixStore, member: int, meeting: Meeting) -> Any:
    from torch.distributed import ProcessGroupNCCL

    with _without_its_watchdog():
        return ProcessGroupNCCL(store, member, meeting.size, ProcessGroupNCCL.Options())


@contextmanager
def _without_its_watchdog() -> Iterator[None]:
    """NCCL's would end this process when another one dies; read while a group is made, for that group."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before, os.environ[name] = os.environ.get(name), "0"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _address_towards(host: str, port: int) -> str:
    """This machine's address as that host sees it: sockets are bound to it, not to all."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # nothing is sent
        return probe.getsockname()[0]
