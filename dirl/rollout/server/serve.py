"""A rollout engine behind HTTP, for trainers in other processes and on other machines, and for OpenAI's clients.

The process holds a module on the host, into which pushed weights are written, and the engine that decodes with them.
LMDeploy's own HTTP server is not used: its /update_weights ends in Engine.update_params, which raises
NotImplementedError under the executor of one GPU, and it unpickles what it is sent. Here requests and answers are JSON,
weights are safetensors, every call carries the key of the run, and no byte of a request is ever code (see `wire`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dirl.errors import UserError, one_line
from dirl.files import write_whole
from dirl.model.checkpoint import default_device, load_model, random_model
from dirl.model.model_path import tokenizer_of
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import Completion
from dirl.rollout.server.api import Api
from dirl.rollout.server.hosted import RolloutServer
from dirl.rollout.server.line import Line
from dirl.rollout.server.walls import EXPECTED, KeyWall, http_server, read_body, read_json, refuse, unless_gone
from dirl.rollout.server.wire import (
    BROADCAST,
    GENERATE,
    HEALTH,
    HOLD,
    JOIN,
    KEY_VARIABLE,
    PARENT_VARIABLE,
    PUSH,
    WEIGHTS,
    CompletionRow,
    GenerateRequest,
    Hold,
    Join,
    Push,
    PushedPart,
    ServeConfig,
)

logger = logging.getLogger(__name__)

_MIN_KEY_LENGTH = 16
_GENERATE_BYTES = 512 << 20  # of a trainer's prompts
_HEADER_BYTES = 16 << 20  # names and shapes of weights


def serve(config: ServeConfig) -> None:
    """Serve until interrupted, or until the parent dies.

    Raises:
        UserError: no key in the environment, or no such address to listen at.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < _MIN_KEY_LENGTH:
        raise UserError(
            f"{KEY_VARIABLE} must hold a key of at least {_MIN_KEY_LENGTH} characters, which server and trainer share; "
            f"export {KEY_VARIABLE}=$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
        )
    if folder := os.environ.get(PARENT_VARIABLE):
        threading.Thread(target=_die_with_parent, args=(folder,), daemon=True).start()
    api = load(config)
    http, listening = listen(api, config, key)
    address = "http://{}:{}".format(*listening.getsockname()[:2])
    if config.ready_file:
        write_whole(config.ready_file, address)
    logger.info("serving rollouts at %s", address)
    try:
        http.run(sockets=[listening])
    finally:
        api.rollouts.close()


def load(config: ServeConfig) -> Api:
    """The model and its engine, and what OpenAI's clients see of them."""
    tokenizer = tokenizer_of(config.model.path)
    if config.empty:
        model = random_model(config.model, tokenizer).eval()
    else:
        model = load_model(config.model, tokenizer).eval()
    is_torch = chosen_engine(config.engine, model) == "torch"
    if is_torch:
        model.to(default_device())  # it decodes with the module itself
    line = Line()
    engine = build_engine(model, tokenizer, config.engine, bf16=config.bf16, observer=line)
    rollouts = RolloutServer(
        model,
        engine,
        has_weights=not config.empty,
        bf16=config.bf16 if is_torch else None,
        line=line,
        config=config.engine,
    )
    return Api(rollouts, tokenizer, config.model.path, config.sampling)


def listen(api: Api, config: ServeConfig, key: str) -> tuple[uvicorn.Server, socket.socket]:
    """A server to be run, and the socket that listens already."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listening = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(f"host={config.host} port={config.port}: {one_line(error)}; choose another") from error
    trainers = [
        Route(HEALTH, partial(_health, api.rollouts)),
        Route(GENERATE, partial(_generate, api.rollouts), methods=["POST"]),
        Route(HOLD, partial(_hold, api.rollouts), methods=["POST"]),
        Route(PUSH, partial(_errand, api.rollouts, Push, api.rollouts.receiver.begin), methods=["POST"]),
        Route(JOIN, partial(_errand, api.rollouts, Join, api.rollouts.receiver.join), methods=["POST"]),
        Route(BROADCAST, partial(_errand, api.rollouts, PushedPart, api.rollouts.receiver.receive), methods=["POST"]),
        Route(WEIGHTS, partial(_weights, api.rollouts), methods=["POST"]),
    ]
    app = Starlette(
        routes=[*trainers, *api.routes()],
        middleware=[Middleware(KeyWall, key=key)],
        exception_handlers=dict.fromkeys(EXPECTED, refuse),
    )
    return http_server(app), listening


async def _health(rollouts: RolloutServer, request: Request) -> Response:
    return JSONResponse(asdict(rollouts.health()))


async def _generate(rollouts: RolloutServer, request: Request) -> Response:
    body = await read_body(request, _GENERATE_BYTES)
    asked = await run_in_threadpool(GenerateRequest.from_json, body)
    futures = await run_in_threadpool(rollouts.ask, asked.requests, asked.sampling, weights=asked.weights)
    completions = await unless_gone(request, futures)
    return await run_in_threadpool(_rows, asked, completions)


def _rows(asked: GenerateRequest, completions: list[Completion]) -> Response:
    """The completions with the ids of their requests."""
    rows = [
        CompletionRow(row.id, done.token_ids, done.step_map, done.logprobs, done.hold_logprobs)
        for row, done in zip(asked.requests, completions, strict=True)
    ]
    return JSONResponse({"completions": list(map(asdict, rows))})


async def _hold(rollouts: RolloutServer, request: Request) -> Response:
    return JSONResponse(rollouts.receiver.hold(Hold(**read_json(await read_body(request, _HEADER_BYTES)))))


async def _errand(
    rollouts: RolloutServer, kind: Callable[..., Any], act: Callable[[Any], dict[str, Any]], request: Request
) -> Response:
    """Something that is done while the engine stands still."""
    asked = kind(**read_json(await read_body(request, _HEADER_BYTES)))
    return JSONResponse(await asyncio.wrap_future(rollouts.send(partial(act, asked))))


async def _weights(rollouts: RolloutServer, request: Request) -> Response:
    sent = PushedPart.from_query(request.url.query)
    body = await read_body(request, rollouts.receiver.num_bytes + _HEADER_BYTES)
    return JSONResponse(await asyncio.wrap_future(rollouts.send(partial(rollouts.receiver.take, body, sent))))


def _die_with_parent(folder: str) -> None:
    """End with the process that alone calls here, and remove the folder that it may have had no time to remove."""
    while os.read(sys.stdin.fileno(), 4096):  # not by its buffer, whose lock would block the end
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
