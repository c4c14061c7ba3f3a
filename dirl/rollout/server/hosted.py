"""The model behind a server: what decodes with it, and what it refuses to decode."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.decoded import check_thresholds, touched_tokens
from dirl.rollout.engine import Completion, EngineConfig, OpenEngine, RolloutEngine, SamplingConfig
from dirl.rollout.server.line import Errand, Line, Ticket
from dirl.rollout.server.receiver import WeightsReceiver
from dirl.rollout.server.wire import Health, PromptRow

SEEDS = 1 << 63  # seeds are below it


class RolloutServer:
    """An engine, the module its weights come through, and the line of those who want something.

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
        self.receiver = WeightsReceiver(model, engine, "its-own" if has_weights else None)
        self.config = config or EngineConfig()
        # That a prompt and its completion may have together; 0: no bound is set.
        self._max_cached_tokens = self.config.max_cached_tokens if self.is_open else 0
        self._line = line or Line()
        self._worker = threading.Thread(target=self._line.work, args=(engine, self.receiver.why_not), daemon=True)
        self._worker.start()

    def close(self) -> None:
        self._line.close()
        self._worker.join(timeout=5)  # a batch that is being decoded ends with the process
        self.engine.close()

    def health(self) -> Health:
        scheme = self.model.scheme
        return Health(
            weights=self.receiver.weights,
            block_length=scheme.block_length,
            block_origin=scheme.block_origin,
            shift=scheme.shift,
            mask_token_id=scheme.mask_token_id,
            vocab_size=self.model.config.vocab_size,
            bf16=self.bf16,
            approximate_cache=self.config.approximate_cache,
            hardware=self.receiver.hardware,
        )

    def ask(
        self,
        rows: Sequence[PromptRow],
        sampling: SamplingConfig,
        *,
        weights: str | None = None,
        watch: Callable[[int, list[int]], bool] | None = None,
    ) -> list[Future[Completion]]:
        """The completions to come, one a row. A future that is cancelled gives its place in the batch free.

        Args:
            weights: that must be here when their turn comes; None: any.
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
                weights=weights,
                watch=_watch_of(row.id, watch),
            )
            for row, num_tokens in zip(rows, touched, strict=True)
        ]
        longest, most = max((ticket.end for ticket in tickets), default=0), self._max_cached_tokens
        if 0 < most < longest:
            raise UserError(f"max_cached_tokens={most} has no room for a prompt and its completion, {longest} tokens")
        self._line.join(tickets)
        return [ticket.answer for ticket in tickets]

    def send(self, act: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
        """Do something while the engine stands still, when its turn comes."""
        errand = Errand(act)
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


def _watch_of(id: int, watch: Callable[[int, list[int]], bool] | None) -> Callable[[list[int]], bool] | None:
    return None if watch is None else lambda token_ids: watch(id, token_ids)
