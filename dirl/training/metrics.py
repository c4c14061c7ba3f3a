"""Named numbers and timers of a run -> metrics.jsonl, wandb, tensorboard.

The file is the record: one JSON line per call, flushed at once, never NaN. Trackers are copies of it for looking at;
one that fails is switched off with a warning, and training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dirl.errors import UserError, one_line
from dirl.files import append_json_lines, write_whole
from dirl.show.metric_table import read_metrics

logger = logging.getLogger(__name__)

Value = int | float | None  # None: the number was not finite


class Tracker(Protocol):
    """A service that shows metrics while the run goes on."""

    run_id: str | None  # what lets a resumed run continue the same curve

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class WandbTracker:
    """Weights & Biases; offline, never asking, when there is no WANDB_API_KEY or the service cannot be reached."""

    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], resume_id: str | None) -> None:
        import wandb

        def start(mode: Any) -> Any:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT", "dirl"),
                name=run_name or None,
                config=dict(config),
                dir=output_dir,
                id=resume_id,
                resume="allow" if resume_id else None,
                mode=mode,
                # No metadata: wandb would record the command line as it is typed, tokens and all, and the host's name.
                settings=wandb.Settings(init_timeout=30, silent=True, x_disable_meta=True, x_disable_machine_info=True),
            )

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        try:
            self._run = start(mode)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            logger.warning("wandb cannot go online, so it records offline: %s", one_line(error))
            wandb.teardown()  # the failed attempt still holds the run's id
            self._run = start("offline")
        self.run_id: str | None = self._run.id
        # An axis of our own: wandb's internal step refuses to go back when a run is resumed from a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """TensorBoard event files in output_dir/tensorboard; needs the tensorboard package."""

    run_id: str | None = None

    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], resume_id: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(output_dir / "tensorboard"))
        self._writer.add_text("config", json.dumps(dict(config), indent=2, default=str))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any], str | None], Tracker]] = {
    "wandb": WandbTracker,
    "tensorboard": TensorboardTracker,
}


def check_tracker_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that `report_to` does not know."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report_to: {name!r} is no tracker: use any of {', '.join(TRACKERS)}, or [] for none")


class MetricsLogger:
    """Writes each step's numbers to output_dir/metrics.jsonl and to the trackers; silent on all but the main rank."""

    def __init__(
        self,
        output_dir: str | Path,
        report_to: Sequence[str] = (),
        *,
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        is_main: bool = True,
        resume_id: str | None = None,
    ) -> None:
        check_tracker_names(report_to)
        self.path = Path(output_dir) / "metrics.jsonl"
        self._is_main = is_main
        self._trackers: dict[str, Tracker] = {}
        if not is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.truncate_after(math.inf)
        for name in report_to:
            self._guard(name, "start", partial(self._start, name, run_name, config or {}, resume_id))

    @property
    def tracker_id(self) -> str | None:
        """What to save in a checkpoint and hand back as `resume_id`; None when no tracker needs it."""
        return next((tracker.run_id for tracker in self._trackers.values() if tracker.run_id), None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line and forward the finite numbers."""
        if not self._is_main:
            return
        line: dict[str, Value] = {"step": step, **{name: finite_or_none(value) for name, value in metrics.items()}}
        append_json_lines(self.path, [line])
        self._show(line, step)

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """More numbers of a step, into its line; nothing where it has none."""
        lines = self._lines() if metrics else []
        more = {name: finite_or_none(value) for name, value in metrics.items()}
        if any(line["step"] == step for line in lines):
            self._replace([line | more if line["step"] == step else line for line in lines])
            self._show(more, step)

    def evaluations(self) -> dict[int, dict[str, Value]]:
        """The lines that hold an evaluation, by step; none on all but the main rank."""
        lines = self._lines()
        return {line["step"]: line for line in lines if any(name.startswith("eval/") for name in line)}

    def _show(self, line: Mapping[str, Value], step: int) -> None:
        finite = {name: value for name, value in line.items() if value is not None and name != "step"}
        for name, tracker in list(self._trackers.items()):
            self._guard(name, "log", partial(tracker.log, finite, step))

    def truncate_after(self, step: float) -> None:
        """Drop the lines of later steps, which a run resumed at `step` writes again, and a line cut short by a kill."""
        self._replace([line for line in self._lines() if line["step"] <= step])

    def close(self) -> None:
        """Finish the trackers; the file needs no closing."""
        for name, tracker in list(self._trackers.items()):
            self._guard(name, "close", tracker.close)
        self._trackers.clear()

    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.path) if self._is_main and self.path.exists() else []

    def _replace(self, lines: Sequence[Mapping[str, Value]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if self._is_main and self.path.exists() and text != self.path.read_text(encoding="utf-8"):
            write_whole(self.path, text)

    def _start(self, name: str, run_name: str, config: Mapping[str, Any], resume_id: str | None) -> None:
        self._trackers[name] = TRACKERS[name](self.path.parent, run_name, config, resume_id)

    def _guard(self, name: str, act: str, call: Callable[[], None]) -> None:
        try:
            call()
        # Whatever a service raises (its network, its protocol, a missing package), days of training outweigh it.
        except Exception as error:
            self._trackers.pop(name, None)
            logger.warning("%s is switched off, metrics.jsonl goes on: %s failed: %s", name, act, one_line(error))


def finite_or_none(value: float) -> Value:
    """A number JSON can hold; None for NaN and infinities, which it cannot."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


class Timings:
    """Seconds spent in named phases since the last drain."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._latest = ("before the first phase", clock())  # where a phase last began or ended, and when

    def restart(self) -> None:
        """A run begins now: what came before it is not its time."""
        self._seconds.clear()
        self._latest = ("before the first phase", self._clock())

    def standing(self) -> tuple[str, float]:
        """Where the run stands, in words, and the seconds since a phase last began or ended: either is progress."""
        where, since = self._latest
        return where, self._clock() - since

    def is_in(self, name: str) -> bool:
        """Whether this is the innermost phase that is going on."""
        return bool(self._open) and self._open[-1] == name

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside the `with` block to `name`."""
        start = self._clock()
        self._open.append(name)
        self._latest = (f"in phase {name!r}", start)
        try:
            yield
        finally:
            self._open.pop()
            end = self._clock()
            around = f"in phase {self._open[-1]!r}" if self._open else "between phases"
            self._latest = (f"{around}, after {name!r}", end)
            self._seconds[name] += end - start

    def drain(self) -> dict[str, float]:
        """The sums as metrics, `timing_s/{phase}`; starts again from zero."""
        drained = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds.clear()
        return drained
