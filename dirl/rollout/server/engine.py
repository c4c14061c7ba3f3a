"""Rollouts from `dirl serve` processes: an engine for the trainer, any number of servers behind it.

Each request carries the version of the weights it wants, so that a server which another rank is still pushing to makes
it wait. Answers are matched by id, never by place; a lost connection is tried again, and a completion that is missing
is an error. A sample depends on its prompt and seed only, so trying again changes nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from http import HTTPStatus
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import save_tokenizer
from dirl.errors import UserError
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.decoded import check_thresholds, in_windows, make_completion, touched_tokens
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, RolloutError, SamplingConfig
from dirl.rollout.server.process import ServerProcess
from dirl.rollout.server.wire import (
    GENERATE,
    HEALTH,
    KEY_HEADER,
    KEY_VARIABLE,
    CompletionRow,
    GenerateRequest,
    Health,
    PromptRow,
    ServeConfig,
    WeightsPart,
    key_value,
    read_completions,
    read_refusal,
)
from dirl.rollout.weights import buckets
from dirl.training.full_parameters import named_full_parameters

_REQUEST_SECONDS = 4 * 3600.0  # the longest rollout
_CONFLICT_SECONDS = 600.0  # the longest push by another rank
_ATTEMPTS = 4


class _Unreachable(Exception):
    """No answer, or an answer that the server itself failed."""


class Server:
    """One server's address, and how to talk to it."""

    def __init__(self, url: str, key: str, process: ServerProcess | None = None) -> None:
        self.url, self.process, self._key = url.rstrip("/"), process, key
        self.restarts_left = 1 if process else 0

    def call(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        """The answer; waits while the server says that it is not there yet, and tries again where it does not answer.

        Raises:
            RolloutError: it refuses, or cannot be reached.
        """
        give_up = time.monotonic() + _CONFLICT_SECONDS
        failures, pause = 0, 0.1
        while True:
            try:
                return self._call_once(path, body)
            except _Unreachable as error:
                failures += 1
                if failures == _ATTEMPTS or (self.process and not self.process.is_alive):
                    raise RolloutError(f"server {self.url}{path.split('?')[0]}: {error}") from error
            except BlockingIOError as conflict:
                if time.monotonic() > give_up:
                    raise RolloutError(f"server {self.url}: {conflict}") from conflict
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _call_once(self, path: str, body: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, data=body, headers={KEY_HEADER: key_value(self._key)})
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            reason = read_refusal(error.read(), error.code)
            if error.code == HTTPStatus.CONFLICT:
                raise BlockingIOError(reason) from error
            if error.code >= 500:
                raise _Unreachable(reason) from error
            raise RolloutError(f"server {self.url}: {reason}") from error
        except (OSError, json.JSONDecodeError) as error:  # refused, reset, timed out, cut off
            raise _Unreachable(str(error)) from error

    def close(self) -> None:
        if self.process:
            self.process.close()


class ServerEngine:
    """A rollout engine whose work is done elsewhere."""

    def __init__(
        self,
        servers: Sequence[Server],
        model: BlockDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pushes: bool,  # False: another rank pushes to these servers
        bf16: bool = False,  # how the trainer scores
        approximate_cache: ApproximateCache = "none",  # that the servers shall decode over
    ) -> None:
        self.servers, self.tokenizer = list(servers), tokenizer
        self.block_length = model.scheme.block_length
        self.weights_version = 0
        self._pushes = pushes
        self._model: nn.Module = model  # what was pushed last, for a server that has to start again
        self._is_stale = True
        for server in self.servers:
            _check_same_model(server, model, bf16=bf16, approximate_cache=approximate_cache)
        self._push(model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        if self._is_stale:
            raise RolloutError("the last push of weights did not finish; call update_weights before generate")
        touched_tokens(prompts, seeds, sampling, self.block_length)
        check_thresholds(thresholds, prompts, sampling)
        own = [None] * len(prompts) if thresholds is None else thresholds
        rows = [
            PromptRow(i, list(prompt), seed, threshold)
            for i, (prompt, seed, threshold) in enumerate(zip(prompts, seeds, own, strict=True))
        ]
        count = len(self.servers)
        shares = [rows[n::count] for n in range(count)]
        with ThreadPoolExecutor(count) as pool:
            asked = [
                pool.submit(self._ask, server, share, sampling)
                for server, share in zip(self.servers, shares, strict=True)
            ]
            answers = {row.id: row for future in asked for row in future.result()}
        missing = [i for i in range(len(rows)) if i not in answers]
        if missing:
            raise RolloutError(f"{len(missing)} of {len(rows)} completions are missing, the first is {missing[0]}")
        completions = [
            make_completion(
                prompt,
                answers[i].token_ids,
                answers[i].step_map,
                answers[i].logprobs,
                tokenizer=self.tokenizer,
                block_length=self.block_length,
                confidence_threshold=own[i],
            )
            for i, prompt in enumerate(prompts)
        ]
        return [
            in_windows(completion, sampling, self.block_length, answers[i].hold_logprobs)
            for i, completion in enumerate(completions)
        ]

    def update_weights(self, model: nn.Module) -> None:
        self.weights_version += 1
        try:
            self._push(model)
        except BaseException:
            self.weights_version -= 1
            raise

    def sleep(self) -> None:
        """Nothing: servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def _ask(self, server: Server, rows: list[PromptRow], sampling: SamplingConfig) -> list[CompletionRow]:
        if not rows:
            return []
        body = GenerateRequest(self.weights_version, sampling, rows).to_json()
        try:
            return read_completions(server.call(GENERATE, body))
        except RolloutError:
            if not self._revive(server):
                raise
            return read_completions(server.call(GENERATE, body))

    def _revive(self, server: Server) -> bool:
        """Start a crashed server of our own again, once, with the weights it had."""
        is_sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self._model.parameters())
        if server.process is None or server.process.is_alive or not server.restarts_left or is_sharded:
            return False  # sharded weights can only be gathered by all ranks together
        server.restarts_left -= 1
        server.process.start()
        server.url = server.process.url
        self._send([server], self._model)
        return True

    def _push(self, model: nn.Module) -> None:
        self._is_stale = True
        if self._pushes:
            self._send(self.servers, model)
        else:
            for _ in named_full_parameters(model):  # sharded parameters are gathered by all ranks together
                pass
        self._model, self._is_stale = model, False

    def _send(self, servers: Sequence[Server], model: nn.Module) -> None:
        """All weights, a bucket at a time, each bucket to all servers before the next is gathered."""
        pending: list[tuple[str, Tensor]] | None = None
        part = 0
        with ThreadPoolExecutor(len(servers)) as pool:

            def send(bucket: list[tuple[str, Tensor]], *, is_last: bool) -> None:
                body = to_safetensors({name: tensor.contiguous().cpu() for name, tensor in bucket})
                path = WeightsPart(self.weights_version, part, is_last).path()
                for done in [pool.submit(server.call, path, body) for server in servers]:
                    done.result()

            for bucket in buckets(named_full_parameters(model)):
                if pending is not None:
                    send(pending, is_last=False)
                    part += 1
                pending = bucket
            if pending is not None:
                send(pending, is_last=True)


def connect(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, *, bf16: bool = False
) -> ServerEngine:
    """The engine of `mode: server`: over the given servers, or over one that is started here.

    Args:
        bf16: how the trainer scores; a server that is started here decodes so, others must have been told.
    Raises:
        UserError: servers are given without their key.
    """
    how: dict[str, Any] = {"bf16": bf16, "approximate_cache": config.approximate_cache}
    if not config.server_urls:
        return ServerEngine([_start(model, tokenizer, config, bf16=bf16)], model, tokenizer, pushes=True, **how)
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise UserError(f"rollout.server_urls: set {KEY_VARIABLE} to the key that the servers were started with")
    servers = [Server(url, key) for url in config.server_urls]
    return ServerEngine(servers, model, tokenizer, pushes=int(os.environ.get("RANK", "0")) == 0, **how)


def _start(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, *, bf16: bool
) -> Server:
    """A server of our own with the model's configuration and a random key, on this local rank's server device."""
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), config.server_devices
    if devices and local_rank >= len(devices):
        raise UserError(f"rollout.server_devices must name a device for each local rank, got {devices}")
    directory = tempfile.TemporaryDirectory(prefix="dirl-serve-")
    model.config.save_pretrained(directory.name)
    save_tokenizer(tokenizer, directory.name)
    settings = {f.name: getattr(config, f.name) for f in fields(EngineConfig)}
    served = ServeConfig(
        model=ModelConfig(path=directory.name, dtype="float32" if model.dtype == torch.float32 else "bfloat16"),
        engine=EngineConfig(**{**settings, "mode": "colocate", "sleep_level": 0, "server_devices": []}),
        bf16=bf16,
        empty=True,
    )
    key = secrets.token_hex(32)
    process = ServerProcess(served, key, directory, device=devices[local_rank] if devices else "")
    return Server(process.url, key, process)


def _check_same_model(
    server: Server, model: BlockDiffusionModel, *, bf16: bool, approximate_cache: ApproximateCache
) -> None:
    try:
        health = Health(**server.call(HEALTH))
    except (RolloutError, TypeError) as error:  # the latter: of another version of dirl
        if server.process is not None:
            raise
        raise UserError(f"rollout.server_urls: {error}; is `dirl serve` running there?") from error
    scheme = model.scheme
    for name, ours in (
        ("block_length", scheme.block_length),
        ("shift", scheme.shift),
        ("mask_token_id", scheme.mask_token_id),
        ("vocab_size", model.config.vocab_size),
    ):
        if (theirs := getattr(health, name)) != ours:
            raise UserError(f"server {server.url} has {name} {theirs}, the trainer {ours}; serve the same model")
    if health.approximate_cache != approximate_cache:
        raise UserError(
            f"server {server.url} decodes with approximate_cache={health.approximate_cache}, rollout.approximate_cache "
            f"is {approximate_cache}: its completions would be taken for what they are not; set both alike"
        )
    if health.bf16 is not None and health.bf16 != bf16:
        theirs, ours = str(health.bf16).lower(), str(bf16).lower()
        raise UserError(
            f"server {server.url} decodes with bf16={theirs}, the trainer scores with bf16={ours}: their numbers would "
            f"differ by rounding; start it with bf16={ours}"
        )
