"""A rollout engine behind HTTP, for trainers in other processes and on other machines: `dirl serve`.

The process holds a module on the host, into which pushed weights are written, and the engine that decodes with them.
LMDeploy's own HTTP server is not used: its /update_weights ends in Engine.update_params, which raises
NotImplementedError under the executor of one GPU, and it unpickles what it is sent. Here requests and answers are JSON,
weights are safetensors, every call carries the key of the run, and no byte of a request is ever code.

    GET  /health     what is served, and the version of its weights
    POST /generate   {weights_version, sampling, requests: [{id, prompt_ids, seed}]} -> {completions: [{id, ...}]}
    POST /weights?version=V&part=I&last=0|1   safetensors, in order; the engine changes over at the last
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import sys
import threading
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from safetensors.torch import load as read_safetensors
from transformers import AutoConfig, AutoModelForCausalLM

from dirl.config import PATH, Config, bounded
from dirl.data.chat import load_tokenizer
from dirl.errors import UserError, one_line
from dirl.files import write_whole
from dirl.model.checkpoint import ModelConfig, default_device, load_model
from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.build import EngineConfig, build_engine, chosen_engine
from dirl.rollout.engine import RolloutEngine, RolloutError, SamplingConfig

logger = logging.getLogger(__name__)

KEY_VARIABLE = "DIRL_SERVER_KEY"
PARENT_VARIABLE = "DIRL_SERVER_HAS_PARENT"  # set: standard input is a pipe that closes when the parent dies
_MIN_KEY_LENGTH = 16


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Config):
    """What `dirl serve` decodes with, and where it listens."""

    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = bounded(8100, least=0, most=65535)  # 0: any free one
    empty: bool = False  # start from config.json alone; a trainer pushes the weights
    ready_file: str = field(default="", metadata=PATH)  # written with the address once the server listens

    def check(self) -> None:
        if self.engine.mode != "colocate":
            raise ValueError("engine.mode must be colocate in a server: it is the one that decodes")


class Conflict(Exception):
    """The server is not in the state the request supposes; it may be later."""


class RolloutServer:
    """An engine, the module its weights come through, and the version of them."""

    def __init__(self, model: BlockDiffusionModel, engine: RolloutEngine, *, has_weights: bool) -> None:
        self.model, self.engine = model, engine
        self.weights_version: int | None = 0 if has_weights else None  # None: in the middle of a push, or never any
        self._next_part = 0
        self._lock = threading.Lock()
        self._parameters = dict(model.named_parameters())

    def health(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "weights_version": self.weights_version,
            "block_length": config.block_size,
            "mask_token_id": config.mask_token_id,
            "vocab_size": config.vocab_size,
            "num_parameters": sum(parameter.numel() for parameter in self._parameters.values()),
        }

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """Completions with the ids of their requests."""
        with self._lock:
            if self.weights_version != request["weights_version"]:
                raise Conflict(f"weights {request['weights_version']} are asked for, {self.weights_version} are here")
            rows = request["requests"]
            completions = self.engine.generate(
                [row["prompt_ids"] for row in rows], SamplingConfig(**request["sampling"]), [r["seed"] for r in rows]
            )
        kept = ("token_ids", "step_map", "logprobs")
        return {
            "completions": [
                {"id": row["id"], **{name: getattr(completion, name) for name in kept}}
                for row, completion in zip(rows, completions, strict=True)
            ]
        }

    def take_weights(self, body: bytes, *, version: int, part: int, is_last: bool) -> dict[str, Any]:
        """Write one bucket; a part that arrives twice, because its answer was lost, is written twice."""
        with self._lock:
            if part == 0:
                self.weights_version, self._next_part = None, 0
            if part not in (self._next_part, self._next_part - 1):
                raise Conflict(f"part {part} of a push while part {self._next_part} is awaited; start again with 0")
            with torch.no_grad():
                for name, tensor in read_safetensors(body).items():
                    self._write(name, tensor)
            self._next_part = part + 1
            if is_last and self.weights_version != version:
                self.engine.update_weights(self.model)
                self.weights_version = version
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
        model_config = AutoConfig.from_pretrained(config.model.path)
        model: Any = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, config.model.dtype)).eval()
    else:
        model = load_model(config.model, tokenizer).eval()
    if chosen_engine(config.engine) == "torch":
        model.to(default_device())  # it decodes with the module itself
    engine = build_engine(model, tokenizer, config.engine)
    return RolloutServer(model, engine, has_weights=not config.empty)


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
        self._answer(lambda path, query: self.rollouts.health() if path == "/health" else None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self._is_trusted() else b""
        self._answer(lambda path, query: self._post(path, query, body))

    def _post(self, path: str, query: dict[str, list[str]], body: bytes) -> dict[str, Any] | None:
        if path == "/generate":
            return self.rollouts.generate(json.loads(body))
        if path == "/weights":
            version, part, last = (int(query[name][0]) for name in ("version", "part", "last"))
            return self.rollouts.take_weights(body, version=version, part=part, is_last=bool(last))
        return None

    def _is_trusted(self) -> bool:
        sent = self.headers.get("Authorization", "").encode()
        return hmac.compare_digest(sent, f"Bearer {self.key}".encode())

    def _answer(self, call: Any) -> None:
        if not self._is_trusted():
            return self._send(401, {"error": f"wrong key: set {KEY_VARIABLE} to that of the server"})
        url = urlsplit(self.path)
        try:
            answer = call(url.path, parse_qs(url.query))
        except Conflict as error:
            return self._send(409, {"error": str(error)})
        except (ValueError, KeyError, TypeError) as error:
            return self._send(400, {"error": one_line(error)})
        except (RolloutError, RuntimeError) as error:
            logger.exception("%s failed", url.path)
            return self._send(500, {"error": str(error)})
        return self._send(200, answer) if answer is not None else self._send(404, {"error": f"no {url.path} here"})

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def sampling_fields(sampling: SamplingConfig) -> dict[str, Any]:
    """The fields of SamplingConfig alone, whatever larger configuration holds them."""
    names = SamplingConfig.__dataclass_fields__
    return {name: value for name, value in asdict(sampling).items() if name in names}
