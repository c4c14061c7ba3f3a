"""What a loop stands in: the directory of a run, its log, its checkpoints, its progress bar."""

from __future__ import annotations

import json
import logging
import math
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dirl.config import save_config
from dirl.errors import RunInterrupted, UserError, one_line
from dirl.files import force_to_disk, write_json
from dirl.show.report.write import refresh_report
from dirl.show.terminal import Terminal
from dirl.training.full_parameters import model_size
from dirl.training.interruption import PhaseClock, SignalWatch
from dirl.training.metrics import MetricsLogger, Timings, Value
from dirl.training.optimizer import Learner
from dirl.training.run_identity import changed_settings, check_identity
from dirl.training.run_state import (
    RunConfig,
    hide_secrets,
    prune,
    resolve_resume,
    save_checkpoint,
    sweep,
    write_run_json,
)
from dirl.training.stages import settings_of

logger = logging.getLogger(__name__)

LOOP_STATE = "loop.json"  # the part of a checkpoint that is not weights, optimizer or RNG


class Resumable(Protocol):
    """What a loop takes its data from."""

    @property
    def is_amid(self) -> bool:
        """Whether it holds more than at the end of a step: work that a stop in between must not lose."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Run:
    """One training run on disk and on screen. `step` counts finished optimizer steps.

    Args:
        learners: what is trained, by name; the first is the model, which the run is counted and named by.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: Mapping[str, Any],
        learners: Mapping[str, Learner],
        source: Resumable,
        *,
        signals: SignalWatch,
        timings: Timings,
        terminal: Terminal,
    ) -> None:
        self.config, self.source = config, source
        self.learner, *_ = learners.values()
        self.beside = {name: learner for name, learner in learners.items() if learner is not self.learner}
        self.signals, self.timings, self.terminal = signals, timings, terminal
        self.max_steps, self.distributed = self.learner.config.max_steps, self.learner.distributed
        self.step = self._previous_step = 0
        self.owes_evaluation = False  # the newest step's; set by the loop, kept by checkpoints
        self._saved_step = self._reported_step = -1
        self._best: tuple[int, float] | None = None  # step and value of metric_for_best_model
        self.later_steps: Sequence[int] | None = None  # those that are evaluated meanwhile; None: the loop evaluates
        self._phases = PhaseClock(config.phase_timeout, self.distributed.rank, timings.standing)
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
        self.evaluated = self._recall(self.distributed.from_main(self.metrics.evaluations()))
        if self.distributed.is_main:
            write_run_json(config.output_dir, settings, model_size(self.learner.module))
            save_config(config, Path(config.output_dir, "config.yaml"))

    def __enter__(self) -> Run:
        self.signals.__enter__()
        self.timings.restart()
        self._phases.__enter__()
        self.terminal.start(self.max_steps, self.step)
        return self

    def __exit__(self, *_: object) -> None:
        self._phases.__exit__()  # first: a tracker that takes long to finish is no rank that is stuck
        self.terminal.stop()
        if self.config.metric_for_best_model and self._best is None and self.is_finished:
            logger.warning(
                "metric_for_best_model=%s was never logged: no checkpoint is the best",
                self.config.metric_for_best_model,
            )
        self.metrics.close()
        self._report()
        self.signals.__exit__()

    def advance(self, step: int) -> None:
        """So many optimizer steps are done."""
        self._previous_step, self.step = self.step, step

    @property
    def is_finished(self) -> bool:
        return self.step >= self.max_steps

    def log(self, metrics: Mapping[str, float], headline: str) -> None:
        """Record the numbers of the step that just ended; `headline` is for people."""
        self.terminal.step(self.step, self.max_steps, headline)
        if not (self.is_due(self.config.logging_steps) or self.is_finished or self.owes_evaluation):
            return
        self.metrics.log({**metrics, "perf/peak_memory_gb": peak_memory_gb()}, self.step)
        self.terminal.report(self.step, self.max_steps, metrics, headline)

    def add(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """More numbers of a step (None: the last) whose line is written, into that line; nowhere if it has none."""
        self.metrics.add(metrics, self.step if step is None else step)
        self._reported_step = -1

    def add_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation of an earlier step, which has only now ended."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if "decile" not in name)
        self.say(f"step {step}/{self.max_steps} evaluated: {numbers}")
        self.add(metrics, step)
        self._is_new_best(metrics, step)
        if self._saved_step >= 0:
            newest = Path(self.config.output_dir, "checkpoints", f"step_{self._saved_step:06d}")
            prune(newest, self.config.save_total_limit, self._kept_steps(judged=step))
        self._report()

    def say(self, text: str) -> None:
        """A line for people, above the progress bar."""
        self.terminal.say(text)

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) happens now.

        A batch of rollouts may be several optimizer steps: then at the first step on or after each multiple.
        """
        return every > 0 and self.step // every > self._previous_step // every

    def stop_if_asked(self) -> None:
        """Write a checkpoint of this moment (unless this step's exists) and end the run, if a signal asked for it.

        Raises:
            RunInterrupted: it did.
        """
        if not self.signals.is_stop_asked():
            return
        if self._saved_step != self.step or self.source.is_amid:
            with self.timings.phase("save"):
                self.save()
        raise RunInterrupted(self.signals.received, self.step)

    def save_if_due(self, metrics: Mapping[str, float] | None = None) -> None:
        """Write a checkpoint every `save_steps`, at the end, and of a new best of `metric_for_best_model`.

        And before a run's first evaluation: one that cannot work fails there. And of each step that may turn out to be
        the best when its evaluation has ended.
        """
        is_due = self._is_new_best(metrics or {}, self.step) or self.is_due(self.config.save_steps) or self.is_finished
        may_be_best = self.later_steps is not None and bool(self.config.metric_for_best_model)
        is_due |= self.owes_evaluation and (self._saved_step < 0 or may_be_best)
        if self._saved_step != self.step and is_due:
            with self.timings.phase("save"):
                self.save()
            self._report()

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        self._saved_step = self.step
        if self.metrics.path.is_file():
            force_to_disk(self.metrics.path)  # no checkpoint is without the lines of its steps
        return save_checkpoint(
            self.config.output_dir,
            self.step,
            self._write,
            limit=self.config.save_total_limit,
            is_main=self.distributed.is_main,
            barrier=self.distributed.barrier,
            kept_steps=self._kept_steps(),
        )

    def _kept_steps(self, judged: int = -1) -> list[int]:
        """The best, and those that may turn out to be; `judged` no longer."""
        open_steps = self.later_steps if self.later_steps and self.config.metric_for_best_model else []
        return [*([self._best[0]] if self._best else []), *(step for step in open_steps if step != judged)]

    def _report(self) -> None:
        """Bring report.html up to date."""
        if self.distributed.is_main and self._reported_step != self.step and self.metrics.path.is_file():
            self._reported_step = self.step
            refresh_report(self.config.output_dir)

    def _write(self, directory: Path) -> None:
        """Every rank's part of a checkpoint; an error on one rank is an error on all, not a wait without end."""
        error: Exception | None = None
        state = {
            "step": self.step,
            "source": self.source.state_dict(),  # on every rank: it may gather
            "tracker_id": self.metrics.tracker_id,
            "learner": self.learner.state_dict(),
            "beside": {name: learner.state_dict() for name, learner in self.beside.items()},
            "best": self._best,
            "owes_evaluation": self.owes_evaluation,
            "identity": self._identity(),
            "settings": self._settings(),
        }
        try:
            self.distributed.save_state(directory)
            if self.distributed.is_main:
                write_json(directory / LOOP_STATE, state)
        except Exception as caught:  # re-raised below
            error = caught
        if self.distributed.min(float(error is None)) == 0:
            raise error or UserError("another rank could not write its part of the checkpoint")

    def _is_new_best(self, metrics: Mapping[str, float | None], step: int) -> bool:
        value = metrics.get(self.config.metric_for_best_model)
        if value is None or not math.isfinite(value):
            return False
        sign = 1 if self.config.greater_is_better else -1
        is_best = self._best is None or sign * value > sign * self._best[1]
        if is_best:
            self._best = (step, float(value))
        return is_best

    def _recall(self, lines: Mapping[int, Mapping[str, Value]]) -> set[int]:
        """What came into the lines of steps after the checkpoint was written: evaluations; the steps that have one."""
        for step, line in lines.items():
            self._is_new_best(line, step)
        self.owes_evaluation &= self.step not in lines
        return set(lines)

    def _identity(self) -> dict[str, Any]:
        return {
            **self.learner.identity(),
            "beside": {name: learner.identity() for name, learner in self.beside.items()},
            "backend": self.distributed.backend,
            "world_size": self.distributed.world_size,
        }

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps(hide_secrets(settings_of(self.config))))
        return settings

    def _restore(self) -> str | None:
        """Continue from the checkpoint the configuration asks for; returns the tracker's run id."""
        checkpoint = self.distributed.from_main(resolve_resume(self.config))
        if checkpoint is None:
            return None
        if self.distributed.is_main and self.config.resume_from_checkpoint == "auto":
            sweep(checkpoint.parent)  # a run that is finished saves no more
        state = json.loads((checkpoint / LOOP_STATE).read_text(encoding="utf-8"))
        changes = changed_settings(checkpoint, state.get("settings", {}), self._settings(), self.config.FIXED)
        check_identity(checkpoint, state["identity"], self._identity())
        try:
            self.source.load_state_dict(state["source"])  # first: it refuses other data
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{checkpoint} does not hold what this run saves ({one_line(error)}): another stage or version of dirl "
                "wrote it; resume with that one, or set resume_from_checkpoint=none to start afresh"
            ) from error
        self.distributed.load_state(checkpoint)
        self.learner.load_state_dict(state["learner"])
        for name, learner in self.beside.items():
            learner.load_state_dict(state["beside"][name])
        self.step = self._previous_step = self._saved_step = state["step"]
        self._best = tuple(state["best"]) if state["best"] else None  # type: ignore[assignment]
        self.owes_evaluation = state.get("owes_evaluation", False)
        logger.info("resumed from %s at step %d", checkpoint, self.step)
        if changes:
            self.say(f"other settings than before step {self.step}: {', '.join(changes)}")
        return state["tracker_id"]


def peak_memory_gb() -> float:
    """Most memory in use since the last call: of the GPU where there is one, else of the process since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts in KiB
