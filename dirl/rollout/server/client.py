"""One `dirl serve` as a trainer talks to it: calls that wait for a server which is away or not ready."""

from __future__ import annotations

import logging
import socket
import time
from http import HTTPStatus
from typing import Any

import httpx

from dirl.errors import one_line
from dirl.rollout.engine import RolloutError
from dirl.rollout.server.process import ServerProcess
from dirl.rollout.server.wire import (
    HOLD,
    KEY_HEADER,
    LEASE_SECONDS,
    LOST,
    NOT_YET,
    TAKEN,
    Hold,
    key_value,
    read_object,
    read_refusal,
    to_json,
)

logger = logging.getLogger(__name__)

_REQUEST_SECONDS = 4 * 3600.0  # the longest rollout
_CONNECT_SECONDS = 5.0
_HOLD_SECONDS = 5.0
_ANSWER_BYTES = 1 << 20  # the most that a server may say, but for completions
_FAILED_SECONDS = 0.7  # what the server itself failed at may be tried again, but hardly helps
# The longest push by another rank; the time in which a trainer that has died is forgotten.
_CONFLICT_SECONDS = {NOT_YET: 600.0, TAKEN: 1.5 * LEASE_SECONDS}
# A machine that is gone says nothing, and a rollout takes long: after 90 s without a sign the connection is lost.
_SIGNS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
_SOCKET_OPTIONS = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _SIGNS.items() if hasattr(socket, name)),
]


class LostWeights(RolloutError):
    """The server has nothing, or no longer what it had, of this trainer: it was started again."""


class _NotNow(Exception):
    """No answer, or none yet; worth trying again for so many seconds."""

    def __init__(self, reason: str, seconds: float) -> None:
        super().__init__(reason)
        self.seconds = seconds


class Server:
    """One server's address, and how to talk to it.

    Args:
        process: where it is one of our own; a crashed one is started again.
        wait_seconds: how long it may be away.
    """

    def __init__(
        self, url: str, key: str, process: ServerProcess | None = None, *, wait_seconds: float = 120.0
    ) -> None:
        self._url, self.process, self._wait_seconds = url.rstrip("/"), process, wait_seconds
        transport = httpx.HTTPTransport(socket_options=_SOCKET_OPTIONS)
        self._http = httpx.Client(headers={KEY_HEADER: key_value(key)}, transport=transport)

    @property
    def url(self) -> str:
        return self.process.url if self.process else self._url

    def call(self, path: str, body: bytes | None = None, most: int = _ANSWER_BYTES) -> dict[str, Any]:
        """The answer. Waits while the server is away, or says that it is not there yet.

        Args:
            most: bytes that the answer may have.
        Raises:
            LostWeights: it has not what the call supposes.
            RolloutError: it refuses, answers what is none, or was waited for too long.
        """
        waited, pause, is_told = 0.0, 0.1, False
        while True:
            try:
                return self._call_once(path, body, _REQUEST_SECONDS, most)
            except _NotNow as reason:
                if self.process and not self.process.is_alive:
                    self.process.restart()
                    continue
                if waited >= reason.seconds:
                    raise RolloutError(f"server {self.url}{path.partition('?')[0]}: {reason}") from reason
                if waited > 1 and not is_told:
                    logger.warning("server %s: %s; waiting for up to %.0f s", self.url, reason, reason.seconds)
                    is_told = True
            time.sleep(pause)
            waited, pause = waited + pause, min(2 * pause, 5.0)

    def hold(self, trainer: str, seconds: float = LEASE_SECONDS) -> None:
        """Tell the server, if it is there, that a trainer wants it still; 0: no longer."""
        try:
            self._call_once(HOLD, to_json(Hold(trainer, seconds)), _HOLD_SECONDS)
        except (_NotNow, RolloutError) as error:  # whoever wants its answers next will see
            logger.debug("server %s: %s", self.url, error)

    def close(self) -> None:
        self._http.close()
        if self.process:
            self.process.close()

    def _call_once(self, path: str, body: bytes | None, seconds: float, most: int = _ANSWER_BYTES) -> dict[str, Any]:
        method, timeout = "GET" if body is None else "POST", httpx.Timeout(seconds, connect=_CONNECT_SECONDS)
        try:
            with self._http.stream(method, self.url + path, content=body, timeout=timeout) as answer:
                said = bytearray()
                for piece in answer.iter_bytes():
                    said += piece
                    if len(said) > most:
                        raise ValueError(f"{path.partition('?')[0]} answers more than {most} bytes")
            if answer.is_success:
                return read_object(bytes(said))
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.DecodingError, ValueError) as error:
            raise RolloutError(f"server {self.url}: {one_line(error, 200)}") from error
        except httpx.TransportError as error:  # refused, reset, timed out, cut off
            raise _NotNow(str(error) or one_line(error), self._wait_seconds) from error
        reason, code = read_refusal(bytes(said), answer.status_code)
        if answer.status_code == HTTPStatus.CONFLICT and code == LOST:
            raise LostWeights(f"server {self.url}: {reason}")
        if answer.status_code == HTTPStatus.CONFLICT:
            raise _NotNow(reason, _CONFLICT_SECONDS.get(code or "", 0.0))
        if answer.status_code >= 500:
            raise _NotNow(reason, _FAILED_SECONDS)
        raise RolloutError(f"server {self.url}: {reason}")
