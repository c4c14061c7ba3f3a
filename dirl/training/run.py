"""The shell every training loop stands in: its directory, its log, its checkpoints, its progress bar."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dirl.training.metrics import MetricsLogger, Timings
from dirl.training.optimizer import Learner
from dirl.training.report.write import refresh_report
from dirl.training.run_state import RunConfig, resolve_resume, save_checkpoint, write_run_json
from dirl.training.terminal import Terminal

logger = logging.getLogger(__name__)

LOOP_STATE = "loop.json"  # the part of a checkpoint that is not weights, optimizer or RNG


class Resumable(Protocol):
    """What a loop draws its data from."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """One training run on disk and on screen. `step` counts finished optimizer steps."""

    def __init__(
        self, config: RunConfig, settings: Mapping[str, Any], learner: Learner, source: Resumable, max_steps: int
    ) -> None:
        self.config, self.learner, self.source, self.max_steps = config, learner, source, max_steps
        self.distributed = learner.distributed
        self.timings = Timings()
        self.step = 0
        self._saved_step = -1
        tracker_id = self._restore()
        self.metrics = MetricsLogger(
            config.output_dir,
            config.report_to,
            run_name=config.run_name,
            config=settings,
            is_main=self.distributed.is_main,
            resume_id=tracker_id,
        )
        self.metrics.truncate_after(self.step)
        if self.distributed.is_main:
            write_run_json(config.output_dir, settings)
        self.terminal = Terminal(is_main=self.distributed.is_main)
        self._reported_step = -1
        self._tokens = 0  # packed tokens since the last micro-batch

    def __enter__(self) -> Run:
        self.terminal.start(self.max_steps, self.step)
        self.learner.on_micro_batch = self._count_micro_batch
        self._hook = self.learner.module.register_forward_hook(self._count_tokens)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self.terminal.stop()
        self.metrics.close()
        self._report()

    @property
    def is_finished(self) -> bool:
        return self.step >= self.max_steps

    def log(self, metrics: Mapping[str, float], headline: str) -> None:
        """Record the numbers of the step that just ended; `headline` is for people."""
        self.terminal.step(self.step, self.max_steps, headline)
        if self.step % self.config.logging_steps and not self.is_finished:
            return
        self.metrics.log(metrics, self.step)
        self.terminal.report(self.step, self.max_steps, metrics, headline)
        if self._saved_step == self.step:
            self._report()

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        self.terminal.say(text)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens now."""
        return every > 0 and self.step % every == 0

    def save_if_due(self) -> None:
        if self._saved_step != self.step and (self.is_due(self.config.save_steps) or self.is_finished):
            with self.timings.phase("save"):
                self.save()

    def save(self) -> Path:
        """Write a checkpoint of this moment."""

        def write(directory: Path) -> None:
            self.distributed.save_state(directory)
            if self.distributed.is_main:
                state = {"step": self.step, "source": self.source.state_dict(), "tracker_id": self.metrics.tracker_id}
                (directory / LOOP_STATE).write_text(json.dumps(state), encoding="utf-8")

        self._saved_step = self.step
        return save_checkpoint(
            self.config.output_dir,
            self.step,
            write,
            limit=self.config.save_total_limit,
            is_main=self.distributed.is_main,
            barrier=self.distributed.barrier,
        )

    def _report(self) -> None:
        """Bring report.html up to date."""
        if self.distributed.is_main and self._reported_step != self.step and self.metrics.path.is_file():
            self._reported_step = self.step
            refresh_report(self.config.output_dir)

    def _count_micro_batch(self, done: int, total: int) -> None:
        if done == 0:
            self.terminal.begin("training", total)
        else:
            self.terminal.advance(self._tokens)
        self._tokens = 0

    def _count_tokens(self, module: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        """A forward pass: its first argument is the packed sequence."""
        self._tokens += len(arguments[0])

    def _restore(self) -> str | None:
        """Continue from the checkpoint the configuration asks for; returns the tracker's run id."""
        checkpoint = self.distributed.from_main(resolve_resume(self.config))
        if checkpoint is None:
            return None
        self.distributed.load_state(checkpoint)
        state = json.loads((checkpoint / LOOP_STATE).read_text(encoding="utf-8"))
        self.step = self._saved_step = state["step"]
        self.source.load_state_dict(state["source"])
        logger.info("resumed from %s at step %d", checkpoint, self.step)
        return state["tracker_id"]
