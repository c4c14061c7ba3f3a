"""Rollouts from `dirl serve` processes: an engine for the trainer, any number of servers behind it.

Each request carries the version of the weights it wants, so that a server which another rank is still pushing to makes
it wait. Answers are matched by id, never by place; a lost connection is tried again, and a completion that is missing
is an error. A sample depends on its prompt and seed only, so trying again changes nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import save_tokenizer
from dirl.errors import UserError, one_line
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.decoded import check_thresholds, in_windows, make_completion, touched_tokens
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, RolloutError, SamplingConfig
from dirl.rollout.server.client import LostWeights, Server
from dirl.rollout.server.process import ServerProcess
from dirl.rollout.server.push import Pusher, new_trainer
from dirl.rollout.server.wire import (
    GENERATE,
    HEALTH,
    KEY_VARIABLE,
    CompletionRow,
    GenerateRequest,
    Health,
    PromptRow,
    ServeConfig,
)
from dirl.training.distributed import from_main

_HEAD_BYTES, _NUMBER_BYTES = 1 << 20, 64  # of an answer: what it may have at all, and for each number
_ATTEMPTS = 3  # of a server that loses its weights again and again


class ServerEngine:
    """A rollout engine whose work is done elsewhere."""

    def __init__(
        self,
        pusher: Pusher,  # to the servers
        model: BlockDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        bf16: bool = False,  # how the trainer scores
        approximate_cache: ApproximateCache = "none",  # that the servers shall decode over
    ) -> None:
        self.servers, self.tokenizer = pusher.servers, tokenizer
        self.scheme, self._vocab_size = model.scheme, model.config.vocab_size
        self.weights_version = 0
        self._pusher = pusher
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
            after = f"the push of weights after version {self.weights_version} did not finish"
            raise RolloutError(f"{after}; call update_weights before generate")
        touched_tokens(prompts, seeds, sampling, self.scheme)
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
                scheme=self.scheme,
                confidence_threshold=own[i],
            )
            for i, prompt in enumerate(prompts)
        ]
        return [
            in_windows(completion, sampling, self.scheme, answers[i].hold_logprobs)
            for i, completion in enumerate(completions)
        ]

    def update_weights(self, model: nn.Module) -> None:
        self._push(model)
        self.weights_version += 1

    def sleep(self) -> None:
        """Nothing: servers have devices of their own."""

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        self._pusher.release()
        for server in self.servers:
            server.close()

    def _ask(self, server: Server, rows: list[PromptRow], sampling: SamplingConfig) -> list[CompletionRow]:
        if not rows:
            return []
        body = GenerateRequest(self._pusher.weights, sampling, rows).to_json()
        touched = touched_tokens([row.prompt_ids for row in rows], [row.seed for row in rows], sampling, self.scheme)
        holds = self._most_steps(sampling) if sampling.record_holds else 0
        most = _HEAD_BYTES + _NUMBER_BYTES * (3 + holds) * sum(touched)
        for attempt in range(_ATTEMPTS):
            try:
                answer = server.call(GENERATE, body, most)
                return self._read(server, answer, list(zip(rows, touched, strict=True)), sampling)
            except LostWeights as lost:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._pusher.restore(server, lost)
        raise AssertionError

    def _read(
        self, server: Server, said: Any, asked: Sequence[tuple[PromptRow, int]], sampling: SamplingConfig
    ) -> list[CompletionRow]:
        """The rows of an answer.

        Args:
            asked: each prompt, and the tokens that its completion may have.
        Raises:
            RolloutError: they are not what was asked for.
        """
        waiting = {row.id: (len(row.prompt_ids), most) for row, most in asked}
        try:
            rows = [CompletionRow(**row) for row in said["completions"]]
            for row in rows:
                prompt_length, most = waiting.pop(row.id)
                row.check(most, self._vocab_size, self._most_steps(sampling))
                length = self.scheme.tail(prompt_length) + len(row.token_ids)
                if self.scheme.block_length and length % self.scheme.block_length:
                    raise ValueError(f"{len(row.token_ids)} tokens end amid a block")
                if row.hold_logprobs is not None and not sampling.record_holds:
                    raise ValueError("hold_logprobs were not asked for")
                if self.scheme.mask_token_id in row.token_ids:
                    raise ValueError("a completion has the mask token")
        except (ValueError, KeyError, TypeError) as error:
            reason = f"its completions are not what was asked for ({one_line(error, 200)})"
            raise RolloutError(f"server {server.url}: {reason}; is it of this version of dirl?") from error
        return rows

    def _most_steps(self, sampling: SamplingConfig) -> int:
        """Denoising steps that a block may take, or all windows together: each reveals something."""
        return self.scheme.block_length or sampling.max_completion_length

    def _push(self, model: nn.Module) -> None:
        self._is_stale = True
        self._pusher.push(model)
        self._is_stale = False


def connect(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, *, bf16: bool = False
) -> ServerEngine:
    """The engine of `mode: server`: over the given servers, or over one that is started here. All ranks call together.

    Args:
        bf16: how the trainer scores; a server that is started here decodes so, others must have been told.
    Raises:
        UserError: servers are given without their key.
    """
    how: dict[str, Any] = {"bf16": bf16, "approximate_cache": config.approximate_cache}
    if not config.server_urls:
        return ServerEngine(
            Pusher([start_server(model, tokenizer, config, bf16=bf16)], config=config), model, tokenizer, **how
        )
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise UserError(f"rollout.server_urls: set {KEY_VARIABLE} to the key that the servers were started with")
    servers = [Server(url, key, wait_seconds=config.server_wait_seconds) for url in config.server_urls]
    is_main = int(os.environ.get("RANK", "0")) == 0
    pusher = Pusher(servers, trainer=from_main(new_trainer()), is_main=is_main, config=config)
    engine = ServerEngine(pusher, model, tokenizer, **how)
    from_main(None)  # nobody asks for what the main rank has not pushed yet
    return engine


def start_server(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, *, bf16: bool
) -> Server:
    """A server of our own with the model's configuration and a random key, on this local rank's server device."""
    local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), config.server_devices
    if devices and local_rank >= len(devices):
        raise UserError(f"rollout.server_devices must name a device for each local rank, got {devices}")
    key = secrets.token_hex(32)
    settings = partial(_settings, model, tokenizer, config, bf16=bf16)
    process = ServerProcess(settings, key, device=devices[local_rank] if devices else "")
    return Server("", key, process, wait_seconds=config.server_wait_seconds)


def _settings(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig, folder: Path, *, bf16: bool
) -> ServeConfig:
    """Of a server of our own, with the files that they name, all but the weights."""
    model.config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    engine = {f.name: getattr(config, f.name) for f in fields(EngineConfig)}
    return ServeConfig(
        model=ModelConfig(path=str(folder), dtype="float32" if model.dtype == torch.float32 else "bfloat16"),
        engine=EngineConfig(**{**engine, "mode": "colocate", "sleep_level": 0, "server_devices": []}),
        bf16=bf16,
        empty=True,
    )


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
        ("block_origin", scheme.block_origin),
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
