"""What stands between a network and a server: the key, bounds of size and time, and refusals that are JSON.

The key is looked at before anything else of a request is read. Bodies are bounded by what their path may need, and a
client that stops sending, or never starts, is left.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from http import HTTPStatus
from typing import Any, TypeVar

import anyio
import uvicorn
from safetensors import SafetensorError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dirl.errors import UserError, one_line
from dirl.rollout.engine import RolloutError
from dirl.rollout.server.line import Conflict
from dirl.rollout.server.wire import KEY_HEADER, KEY_VARIABLE, key_value, refusal

logger = logging.getLogger(__name__)

T = TypeVar("T")

_OF_CLIENTS = (ValueError, KeyError, TypeError, RecursionError, SafetensorError)
EXPECTED = (*_OF_CLIENTS, RuntimeError, Conflict, HTTPException, ClientDisconnect)  # what `refuse` knows

_PAUSE_SECONDS = 30.0  # the longest between two pieces of a body, and from a connection to its first request's head
_IDLE_SECONDS = 75  # a connection may wait for its next request


class Refused(ValueError):
    """A request that is wrong, with what the API says of it."""

    def __init__(
        self, reason: str, status: int = HTTPStatus.BAD_REQUEST, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(reason)
        self.status, self.answer = status, refusal(reason, status, param=param, code=code)


class KeyWall:
    """Refuses every request without the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._value = app, key_value(key).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = next((value for name, value in scope["headers"] if name == KEY_HEADER.lower().encode()), b"")
        if not hmac.compare_digest(said, self._value):
            reason = f"wrong key: set {KEY_VARIABLE} to that of the server"
            refused = JSONResponse(refusal(reason, 401, code="invalid_api_key"), HTTPStatus.UNAUTHORIZED)
            return await refused(scope, receive, send)
        return await self._app(scope, receive, send)


async def read_body(request: Request, most: int) -> bytes:
    """
    Args:
        most: bytes.
    Raises:
        Refused: there is more, or the client stopped sending.
    """
    too_large = Refused(f"the body has more than {most} bytes", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    body, pieces = bytearray(), aiter(request.stream())
    while True:
        try:
            with anyio.fail_after(_PAUSE_SECONDS):
                body += await anext(pieces)
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError as error:
            reason = f"nothing came for {_PAUSE_SECONDS:.0f} s"
            raise Refused(reason, HTTPStatus.REQUEST_TIMEOUT) from error
        if len(body) > most:
            raise too_large


def read_json(body: bytes) -> dict[str, Any]:
    """
    Raises:
        Refused: it is no JSON object.
    """
    try:
        read = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {one_line(error, 200)}") from error
    if not isinstance(read, dict):
        raise Refused("the body must be a JSON object", HTTPStatus.UNPROCESSABLE_ENTITY)
    return read


async def unless_gone(request: Request, futures: Sequence[Future[T]]) -> list[T]:
    """What takes long, all of it; it is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """

    async def wait_for_end() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def wait_for_all() -> list[T]:
        return await asyncio.gather(*map(asyncio.wrap_future, futures))

    working, leaving = asyncio.create_task(wait_for_all()), asyncio.create_task(wait_for_end())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def refuse(request: Request, error: Exception) -> Response:
    """Every error as JSON: ours to the log, the client's to the client alone."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=HTTPStatus.BAD_REQUEST)  # nobody reads it
    if isinstance(error, Refused):
        return JSONResponse(error.answer, error.status)
    if isinstance(error, Conflict):
        return JSONResponse(refusal(str(error), 409, code=error.code), HTTPStatus.CONFLICT)
    if isinstance(error, HTTPException):
        is_unknown = error.status_code == HTTPStatus.NOT_FOUND
        reason = f"no {request.url.path} here" if is_unknown else error.detail
        return JSONResponse(refusal(reason, error.status_code), error.status_code, error.headers)
    if isinstance(error, _OF_CLIENTS):
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        return JSONResponse(refusal(reason, 400), HTTPStatus.BAD_REQUEST)
    logger.error("%s failed: %s", request.url.path, one_line(error), exc_info=not isinstance(error, RolloutError))
    return JSONResponse(refusal(one_line(error), 500), HTTPStatus.INTERNAL_SERVER_ERROR)


class _Impatient(H11Protocol):
    """Leaves a client that connects and asks for nothing."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(_PAUSE_SECONDS, self._leave_the_silent)

    def _leave_the_silent(self) -> None:
        if self.cycle is None:
            self.transport.close()


def http_server(app: ASGIApp) -> uvicorn.Server:
    """Serves a listening socket with `run(sockets=[...])`, until `should_exit` is set."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=3,
        )
    )
