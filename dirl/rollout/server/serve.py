"""A rollout engine behind HTTP, for trainers in other processes and on other machines: `dirl serve`.

The process holds a module on the host, into which pushed weights are written, and the engine that decodes with them.
LMDeploy's own HTTP server is not used: its /update_weights ends in Engine.update_params, which raises
NotImplementedError under the executor of one GPU, and it unpickles what it is sent. Here requests and answers are JSON,
weights are safetensors, every call carries the key of the run, and no byte of a request is ever code (see `wire`).
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load as read_safetensors

from dirl.data.chat import load_tokenizer
from dirl.errors import UserError, one_line
from dirl.files import write_whole
from dirl.model.checkpoint import default_device, load_model, random_model
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import ApproximateCache, RolloutEngine, RolloutError
from dirl.rollout.server.wire import (
    GENERATE,
    HEALTH,
    KEY_HEADER,
    KEY_VARIABLE,
    PARENT_VARIABLE,
    WEIGHTS,
    CompletionRow,
    GenerateRequest,
    Health,
    ServeConfig,
    WeightsPart,
    completions_answer,
    key_value,
    refusal,
)

logger = logging.getLogger(__name__)

_MIN_KEY_LENGTH = 16


class Conflict(Exception):
    """The server is not in the state the request supposes; it may be later."""


class RolloutServer:
    """An engine, the module its weights come through, and the version of them."""

    def __init__(
        self,
        model: BlockDiffusionModel,
        engine: RolloutEngine,
        *,
        has_weights: bool,
        bf16: bool | None = False,
        approximate_cache: ApproximateCache = "none",
    ) -> None:
        self.model, self.engine, self.bf16, self.approximate_cache = model, engine, bf16, approximate_cache
        self.weights_version: int | None = 0 if has_weights else None  # None: in the middle of a push, or never any
        self._next_part = 0
        self._lock = threading.Lock()
        self._parameters = dict(model.named_parameters())

    def health(self) -> Health:
        scheme = self.model.scheme
        return Health(
            weights_version=self.weights_version,
            block_length=scheme.block_length,
            shift=scheme.shift,
            mask_token_id=scheme.mask_token_id,
            vocab_size=self.model.config.vocab_size,
            bf16=self.bf16,
            approximate_cache=self.approximate_cache,
        )

    def generate(self, request: GenerateRequest) -> list[CompletionRow]:
        """Completions with the ids of their requests."""
        with self._lock:
            if self.weights_version != request.weights_version:
                raise Conflict(f"weights {request.weights_version} are asked for, {self.weights_version} are here")
            rows = request.requests
            thresholds = [row.threshold for row in rows if row.threshold is not None]
            completions = self.engine.generate(
                [row.prompt_ids for row in rows], request.sampling, [row.seed for row in rows], thresholds or None
            )
        return [
            CompletionRow(row.id, completion.token_ids, completion.step_map, completion.logprobs)
            for row, completion in zip(rows, completions, strict=True)
        ]

    def take_weights(self, body: bytes, sent: WeightsPart) -> dict[str, Any]:
        """Write one bucket; a part that arrives twice, because its answer was lost, is written twice."""
        with self._lock:
            if sent.part == 0:
                self.weights_version, self._next_part = None, 0
            if sent.part not in (self._next_part, self._next_part - 1):
                raise Conflict(
                    f"part {sent.part} of a push while part {self._next_part} is awaited; start again with 0"
                )
            with torch.no_grad():
                for name, tensor in read_safetensors(body).items():
                    self._write(name, tensor)
            self._next_part = sent.part + 1
            if sent.is_last and self.weights_version != sent.version:
                self.engine.update_weights(self.model)
                self.weights_version = sent.version
        return {"weights_version": self.weights_version}

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        ours = self._parameters.get(name)
        if ours is None or ours.shape != tensor.shape:
            have = "no such parameter" if ours is None else f"{tuple(ours.shape)}"
            raise ValueError(f"weights: {name} of shape {tuple(tensor.shape)} is pushed, the server has {have}")
        ours.copy_(tensor)


def serve(config: ServeConfig) -> None:
    """Serve until interrupted, or until the parent dies.

    Raises:
        UserError: no key in the environment.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < _MIN_KEY_LENGTH:
        raise UserError(
            f"{KEY_VARIABLE} must hold a key of at least {_MIN_KEY_LENGTH} characters, which server and trainer share; "
            f"export {KEY_VARIABLE}=$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
        )
    server = _load(config)
    with _listen(server, config, key) as http:
        host, port = http.server_address[:2]
        address = f"http://{host!s}:{port}"
        if config.ready_file:
            write_whole(config.ready_file, address)
        logger.info("serving rollouts at %s", address)
        if os.environ.get(PARENT_VARIABLE):
            threading.Thread(target=_die_with_parent, args=(http,), daemon=True).start()
        try:
            http.serve_forever()
        finally:
            server.engine.close()


def _load(config: ServeConfig) -> RolloutServer:
    tokenizer = load_tokenizer(config.model.path)
    if config.empty:
        model = random_model(config.model, tokenizer).eval()
    else:
        model = load_model(config.model, tokenizer).eval()
    if chosen_engine(config.engine, model) == "torch":
        model.to(default_device())  # it decodes with the module itself
    engine = build_engine(model, tokenizer, config.engine, bf16=config.bf16)
    bf16 = config.bf16 if chosen_engine(config.engine, model) == "torch" else None
    return RolloutServer(
        model,
        engine,
        has_weights=not config.empty,
        bf16=bf16,
        approximate_cache=config.engine.approximate_cache,
    )


def _die_with_parent(http: ThreadingHTTPServer) -> None:
    sys.stdin.buffer.read()
    http.shutdown()


def _listen(server: RolloutServer, config: ServeConfig, key: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"rollouts": server, "key": key})
    return ThreadingHTTPServer((config.host, config.port), handler)


class _Handler(BaseHTTPRequestHandler):
    rollouts: RolloutServer
    key: str
    wbufsize = -1  # one packet for head and body

    def do_GET(self) -> None:
        self._answer(lambda path, query: asdict(self.rollouts.health()) if path == HEALTH else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self._is_trusted() else b""
        self._answer(lambda path, query: self._post(path, query, body))

    def _post(self, path: str, query: str, body: bytes) -> dict[str, Any] | None:
        if path == GENERATE:
            return completions_answer(self.rollouts.generate(GenerateRequest.from_json(body)))
        if path == WEIGHTS:
            return self.rollouts.take_weights(body, WeightsPart.from_query(query))
        return None

    def _is_trusted(self) -> bool:
        return hmac.compare_digest(self.headers.get(KEY_HEADER, "").encode(), key_value(self.key).encode())

    def _answer(self, call: Callable[[str, str], dict[str, Any] | None]) -> None:
        if not self._is_trusted():
            return self._send(401, refusal(f"wrong key: set {KEY_VARIABLE} to that of the server"))
        url = urlsplit(self.path)
        try:
            answer = call(url.path, url.query)
        except Conflict as error:
            return self._send(HTTPStatus.CONFLICT, refusal(str(error)))
        except (ValueError, KeyError, TypeError) as error:
            return self._send(400, refusal(one_line(error)))
        except (RolloutError, RuntimeError) as error:
            logger.exception("%s failed", url.path)
            return self._send(500, refusal(str(error)))
        return self._send(200, answer) if answer is not None else self._send(404, refusal(f"no {url.path} here"))

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
