"""A stage of training -> a finished run: step, log, save, evaluate when due, finish. The one loop of the package.

A step ends with its line, then its checkpoint, then its evaluation: a kill in between takes nothing that a run which
goes on does not make again. SFT, RL and whatever comes are subclasses of `Trainer` that say what a step and an
evaluation are; when they happen, what survives a stop, what is written and shown is decided here.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from dirl.config import bounded, config_to_dict
from dirl.errors import UserError
from dirl.files import append_json_lines
from dirl.show.model_card import Stage, finish_model
from dirl.show.terminal import Terminal
from dirl.training.background import MAX_WAITING, BackgroundConfig, BackgroundEvaluations
from dirl.training.distributed import Distributed
from dirl.training.interruption import SignalWatch, StopAsked
from dirl.training.metrics import Timings
from dirl.training.optimizer import Learner, OptimizerConfig
from dirl.training.run import Resumable, Run, logger
from dirl.training.run_lock import check_free, hold
from dirl.training.run_state import RunConfig
from dirl.training.stages import RunStage, StagedConfig, settings_of, stages_of


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(RunConfig, OptimizerConfig, StagedConfig):
    """What every stage that trains is told."""

    eval_steps: int = bounded(0, least=0)  # optimizer steps between evaluations; 0: only at the end
    eval: BackgroundConfig = field(default_factory=BackgroundConfig)


class NothingToLearn(UserError):
    """What is left has no gradient. In the first step that is an error, later the end of the run."""


class Trainer(ABC):
    """A stage of training. `train()` runs to the end; `step()` is one step, for notebooks.

    A subclass's constructor builds, after this one's, `learner` and `source`.
    """

    CONFIG: ClassVar[type[TrainingConfig]]  # what it is told

    stage: Stage
    learner: Learner
    source: Resumable  # what it takes its data from
    heldout: Sequence[Any] = ()  # what it is evaluated on
    tags: Sequence[str] = ("diffusion",)  # what the model is, for its card

    def __init__(self, config: TrainingConfig) -> None:
        self.stages = stages_of(config)
        self.now = self.stages[0]  # the stage of `stages` that holds
        self.config = config  # of that stage
        self.distributed = Distributed(bf16=config.bf16, timeout_seconds=2 * config.phase_timeout)
        # Before anything is loaded.
        check_free(config.output_dir, self.distributed, foreign=("samples.jsonl", "results.json"))
        self.timings = Timings()
        self.signals = SignalWatch(self.distributed.max)
        self.terminal = Terminal(is_main=self.distributed.is_main)
        self.steps_done = 0  # optimizer steps
        self.later = self._background(config)

    def count_steps(self, num_items: int, batch_key: str, steps_per_batch: int = 1) -> None:
        """Have `max_steps` say how many steps `num_train_epochs` are; nothing where that is not set.

        Args:
            num_items: what is drawn in an epoch.
            batch_key: of the configuration, how many of them a batch draws.
            steps_per_batch: optimizer steps that a batch is trained on for.
        Raises:
            UserError: batches do not keep one size.
        """
        epochs = self.config.num_train_epochs
        if not epochs:
            return
        if any(batch_key in stage.changes for stage in self.stages):
            raise UserError(f"num_train_epochs={epochs:g}: a stage changes {batch_key}; give max_steps instead")
        batches = max(math.ceil(epochs * num_items / settings_of(self.config)[batch_key]), 1)
        steps = batches * steps_per_batch
        self.terminal.say(f"num_train_epochs={epochs:g}: {num_items} rows or turns an epoch, max_steps={steps}")
        self.stages = stages_of(replace(self.config, max_steps=steps, num_train_epochs=0.0))
        self.now, self.config = self.stages[0], self.stages[0].config

    @abstractmethod
    def step(self) -> dict[str, float]:
        """One batch of data and its optimizer steps (`steps_done` counts them); its metrics.

        Calls `enter_stage` before anything else.

        Raises:
            StopAsked: a signal came before the update; what there is is kept for the next call.
            NothingToLearn: no data that would change the model.
        """

    @abstractmethod
    def write_final(self) -> Path:
        """The trained model as output_dir/final; collective."""

    @abstractmethod
    def headline(self, metrics: Mapping[str, float]) -> str:
        """A step in a line, for people."""

    def learners(self) -> dict[str, Learner]:
        """What is trained and saved, by name; the model first."""
        return {"model": self.learner}

    def begin(self) -> None:  # noqa: B027 - most stages have nothing to do
        """Called once, when the weights are those that the run starts or goes on with."""

    def enter_stage(self) -> None:
        """Take on the configuration that holds for the step to come."""
        stage = [stage for stage in self.stages if stage.from_step <= self.steps_done][-1]
        if stage is self.now:
            return
        self.now, self.config = stage, stage.config
        changes = ", ".join(f"{key}={value}" for key, value in stage.changes.items())
        self.terminal.say(f"stage {stage.number} of {len(self.stages) - 1} begins at step {self.steps_done}: {changes}")
        self.begin_stage(stage)

    def begin_stage(self, stage: RunStage[Any]) -> None:  # noqa: B027 - nothing that was built from the old values
        """Called once `config` is that of another stage: rebuild what was built from the one before."""

    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data; asked for where there are any."""
        return {}

    def write_snapshot(self, directory: Path) -> None:
        """The model as it is, whole, as a Hugging Face directory; collective. Asked for with `eval.background`."""
        raise NotImplementedError

    @classmethod
    def evaluate_snapshot(cls, config: Any, snapshot: Path) -> dict[str, float]:
        """What `evaluate` says of the model in a directory, by one process that does nothing else."""
        raise NotImplementedError

    def throughput(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Rates that need the seconds of the step, which only its end knows."""
        return {}

    def record(self, run: Run) -> None:  # noqa: B027 - likewise
        """Called after each step: write or show what it was made of."""

    def last_documents(self) -> list[Any]:
        """What this rank's last step was made of, as JSON rows; written down where the step is skipped."""
        return []

    def train(self) -> Path:
        """Train to max_steps (or from the newest checkpoint on) and write `final/`; returns its path."""
        config = self.stages[0].config
        with hold(config.output_dir, self.distributed), self._run(config) as run, self.later or nullcontext():
            self.steps_done = run.step
            if self.later is not None:
                self.later.restore(run.step, run.evaluated)
                run.later_steps = self.later.steps
            self.begin()
            if run.is_finished:
                run.say(f"all {run.step} steps are done; raise max_steps, or name another output_dir for another run")
            while not run.is_finished:
                run.stop_if_asked()
                self._evaluate_if_owed(run)
                try:
                    with self.timings.phase("step"):
                        metrics = self.step()
                except StopAsked:
                    continue
                except NothingToLearn as reason:
                    if self.steps_done == 0:
                        raise
                    run.say(f"training ends early: {reason}")
                    run.save()
                    break
                if len(self.stages) > 1:
                    metrics["stage"] = float(self.now.number)
                run.advance(self.steps_done)
                self.record(run)
                run.owes_evaluation = bool(self.heldout) and (run.is_due(config.eval_steps) or run.is_finished)
                metrics |= self.timings.drain()
                metrics |= self.throughput(metrics)
                run.log(metrics, self.headline(metrics))
                run.save_if_due(metrics)
                run.add(self.timings.drain())
            final = self.write_final()
            self._await_evaluations(run, MAX_WAITING)  # the last step is not left out
            self._evaluate_if_owed(run)
            self._await_evaluations(run, 0)
        return self._finish(final)

    def _evaluate_if_owed(self, run: Run) -> None:
        """Evaluate the step that ended last, into its line; it is saved already, so that a failure costs no training.

        A run that was killed before that owes it still when it goes on.
        """
        if self.later is not None:
            self._evaluate_later(run, self.later)
            return
        if not (run.owes_evaluation and self.heldout):
            return
        run.stop_if_asked()
        try:
            with self.timings.phase("eval"):
                evaluation = self.evaluate()
        except UserError as error:
            saved = Path(self.config.output_dir, "final" if run.is_finished else "checkpoints")
            raise UserError(
                f"the evaluation after step {run.step} failed, what is trained is in {saved}: {error}"
            ) from error
        run.owes_evaluation = False
        run.add(evaluation | self.timings.drain())
        run.save_if_due(evaluation)

    def _evaluate_later(self, run: Run, later: BackgroundEvaluations) -> None:
        """Take in what has been evaluated meanwhile, and hand on a snapshot of the step that ended last."""
        later.collect(run.add_evaluation)
        if not (run.owes_evaluation and self.heldout):
            return
        is_full, is_there = self.distributed.from_main((later.is_full, run.step in later.steps))
        if is_full and not is_there:
            run.say(f"step {run.step} is not evaluated: {MAX_WAITING} snapshots wait for it already")
        elif not is_there:
            with self.timings.phase("eval"):
                self.write_snapshot(later.prepare(run.step, replace(self.config, stages=[])))
            later.add(run.step)
            later.collect(run.add_evaluation)
        run.owes_evaluation = False
        run.add(self.timings.drain())

    def _await_evaluations(self, run: Run, num_left: int) -> None:
        """Wait until no more than so many are under way; collective."""
        later = self.later
        while later is not None and self.distributed.from_main(len(later.steps) > num_left):
            run.stop_if_asked()
            with self.timings.phase("eval"):
                time.sleep(0.2)
            later.collect(run.add_evaluation)
        run.add(self.timings.drain())

    def _background(self, config: TrainingConfig) -> BackgroundEvaluations | None:
        if not config.eval.background:
            return None
        limit, is_main = config.phase_timeout, self.distributed.is_main
        return BackgroundEvaluations(config.output_dir, config.eval, type(self), limit_seconds=limit, is_main=is_main)

    def refuse_beside(self, **given: object) -> None:
        """Objects that an evaluation reads must come from the configuration, where another process evaluates.

        Raises:
            UserError: one was given.
        """
        for name, value in given.items():
            if self.later is not None and value is not None:
                raise UserError(f"eval.background=true evaluates by the configuration alone: pass no {name}")

    def _finish(self, final: Path) -> Path:
        output_dir = Path(self.config.output_dir)
        if self.distributed.is_main:
            finish_model(final, output_dir, self.stage, self.tags, self.config.push_to_hub)
            from dirl.show.pictures import plot_run  # matplotlib: the first step need not wait for it

            plot_run(output_dir)
        self.distributed.barrier()
        return final

    def _run(self, config: TrainingConfig) -> Run:
        return Run(
            config,
            config_to_dict(config),
            self.learners(),
            self.source,
            signals=self.signals,
            timings=self.timings,
            terminal=self.terminal,
        )

    def show_micro_batch(self, done: int, total: int, num_tokens: int) -> None:
        """For the learner to call: so many of a step's micro-batches are done."""
        if done == 0:
            self.terminal.begin("training", total)
        else:
            self.terminal.advance(num_tokens)

    def record_skipped(self) -> None:
        """For the learner to call: what a skipped step was made of, to skipped_steps.jsonl; collective."""
        everyones, step = self.distributed.gather(self.last_documents()), self.steps_done + 1
        if self.distributed.is_main:
            path = Path(self.config.output_dir, "skipped_steps.jsonl")
            append_json_lines(path, [{"step": step, "documents": everyones}])
            logger.warning("step %d: loss or gradient not finite, step skipped; its documents: %s", step, path)
