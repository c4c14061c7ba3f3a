"""The model behind a server: what decodes with it, what writes pushed weights into it, and what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load as read_safetensors

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.decoded import check_thresholds, touched_tokens
from dirl.rollout.engine import Completion, EngineConfig, OpenEngine, RolloutEngine, SamplingConfig
from dirl.rollout.server.line import Conflict, Errand, Line, Ticket
from dirl.rollout.server.wire import Health, PromptRow, WeightsPart

SEEDS = 1 << 63  # seeds are below it


class RolloutServer:
    """An engine, the module its weights come through, the version of them, and the line of those who want something.

    Args:
        line: that looks on while the engine decodes, where it can be watched.
        config: of the engine.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        engine: RolloutEngine,
        *,
        has_weights: bool,
        bf16: bool | None = False,
        line: Line | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        self.model, self.engine, self.bf16 = model, engine, bf16
        self.is_open = isinstance(engine, OpenEngine)  # takes requests in while it decodes, each with its threshold
        self.weights_version: int | None = 0 if has_weights else None  # None: in the middle of a push, or never any
        self.config, self._next_part = config or EngineConfig(), 0
        # That a prompt and its completion may have together; 0: no bound is set.
        self._max_cached_tokens = self.config.max_cached_tokens if self.is_open else 0
        self._parameters = dict(model.named_parameters())
        self._line = line or Line()
        version = lambda: self.weights_version  # noqa: E731
        self._worker = threading.Thread(target=self._line.work, args=(engine, version), daemon=True)
        self._worker.start()

    @property
    def num_weight_bytes(self) -> int:
        """Of all parameters in the widest type they may be pushed in, float32."""
        return 4 * sum(parameter.numel() for parameter in self._parameters.values())

    def close(self) -> None:
        self._line.close()
        self._worker.join(timeout=5)  # a batch that is being decoded ends with the process
        self.engine.close()

    def health(self) -> Health:
        scheme = self.model.scheme
        return Health(
            weights_version=self.weights_version,
            block_length=scheme.block_length,
            block_origin=scheme.block_origin,
            shift=scheme.shift,
            mask_token_id=scheme.mask_token_id,
            vocab_size=self.model.config.vocab_size,
            bf16=self.bf16,
            approximate_cache=self.config.approximate_cache,
        )

    def ask(
        self,
        rows: Sequence[PromptRow],
        sampling: SamplingConfig,
        *,
        weights_version: int | None = None,
        watch: Callable[[int, list[int]], bool] | None = None,
    ) -> list[Future[Completion]]:
        """The completions to come, one a row. A future that is cancelled gives its place in the batch free.

        Args:
            weights_version: that must be here when their turn comes; None: any.
            watch: told an id and all tokens of finished blocks; says whether they are enough (see `Ticket`).
        Raises:
            ValueError: a row that would spoil the batch of others.
        """
        for row in rows:
            self._check(row)
        prompts, seeds = [row.prompt_ids for row in rows], [row.seed for row in rows]
        touched = touched_tokens(prompts, seeds, sampling, self.model.scheme)
        thresholds = [row.threshold for row in rows if row.threshold is not None]
        check_thresholds(thresholds or None, prompts, sampling)
        kind = sampling
        if self.is_open and self.model.scheme.block_length > 0:  # ends are each one's own
            kind = replace(kind, max_completion_length=1)
        if thresholds:
            kind = replace(kind, confidence_threshold=0.0)
        tickets = [
            Ticket(
                prompt_ids=row.prompt_ids,
                seed=row.seed,
                end=len(row.prompt_ids) + num_tokens,
                sampling=sampling,
                threshold=row.threshold,
                kind=(kind, row.threshold is None),
                weights_version=weights_version,
                watch=_watch_of(row.id, watch),
            )
            for row, num_tokens in zip(rows, touched, strict=True)
        ]
        longest, most = max((ticket.end for ticket in tickets), default=0), self._max_cached_tokens
        if 0 < most < longest:
            raise UserError(f"max_cached_tokens={most} has no room for a prompt and its completion, {longest} tokens")
        self._line.join(tickets)
        return [ticket.answer for ticket in tickets]

    def push(self, body: bytes, sent: WeightsPart) -> Future[dict[str, Any]]:
        """Write one bucket of weights when its turn comes."""
        errand = Errand(lambda: self._take_weights(body, sent))
        self._line.join([errand])
        return errand.answer

    def _check(self, row: PromptRow) -> None:
        vocab_size = self.model.config.vocab_size
        if not isinstance(row.prompt_ids, list) or not all(
            type(token) is int and 0 <= token < vocab_size for token in row.prompt_ids
        ):
            raise UserError(f"prompt_ids must be a list of token ids from 0 to {vocab_size - 1}")
        if type(row.seed) is not int or not -SEEDS <= row.seed < SEEDS:
            raise UserError(f"seed must be a whole number of 64 bits, got {row.seed!r}")
        if row.threshold is not None and not (isinstance(row.threshold, float | int) and 0 <= row.threshold <= 1):
            raise UserError(f"threshold must be from 0 to 1, got {row.threshold!r}")

    def _take_weights(self, body: bytes, sent: WeightsPart) -> dict[str, Any]:
        """A part that arrives twice, because its answer was lost, is written twice."""
        if sent.part == 0:
            self.weights_version, self._next_part = None, 0
        if sent.part not in (self._next_part, self._next_part - 1):
            raise Conflict(f"part {sent.part} of a push while part {self._next_part} is awaited; start again with 0")
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


def _watch_of(id: int, watch: Callable[[int, list[int]], bool] | None) -> Callable[[list[int]], bool] | None:
    return None if watch is None else lambda token_ids: watch(id, token_ids)
