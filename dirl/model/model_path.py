"""What `model.path` says -> where config.json and tokenizer lie, and the checkpoint whose weights count, if it is one.

A Hugging Face directory or a hub id is all of that itself. A run is its `final/`, or while it goes on its newest whole
checkpoint; `RUN@STEP`, `RUN@best` and the directory of a checkpoint are that checkpoint. Its weights are then read from
what the backend wrote, the rest from the model that the run began with. No process group, no launcher, no network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import load_tokenizer
from dirl.errors import UserError, one_line
from dirl.files import expand, is_hub_id
from dirl.show.metric_table import read_metrics
from dirl.training.full_parameters import merged_state, read_weights
from dirl.training.run import LOOP_STATE
from dirl.training.run_state import (
    CHECKPOINT_NAME,
    checkpoint_step,
    checkpoints_by_step,
    damage_of,
    missing_in,
    newest_checkpoint,
)
from dirl.training.stages import value_after

_SCORER = "model."  # what a run trains wraps the model under this name


@dataclass(frozen=True)
class ModelFiles:
    """Where a model is."""

    directory: str  # Hugging Face directory or hub id: config.json, tokenizer and, without a checkpoint, weights
    checkpoint: Path | None = None  # its weights count
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the run that wrote the checkpoint
    block_length: int = 0  # of the model in the checkpoint; 0: what config.json says

    @property
    def dtype(self) -> torch.dtype:
        """That the checkpoint's model was trained in."""
        return getattr(torch, self.settings["model"]["dtype"])

    def read_state(self) -> dict[str, Tensor]:
        """The checkpoint's numbers by the names of the model that was trained, adapters and all.

        Raises:
            UserError: a damaged checkpoint, or one that this installation cannot read.
        """
        assert self.checkpoint is not None
        if damage := damage_of(self.checkpoint):
            raise UserError(f"{self.checkpoint} is not whole: {damage}; name another step")
        state = read_weights(self.checkpoint, self.dtype)
        return {name.removeprefix(_SCORER): tensor for name, tensor in state.items() if name.startswith(_SCORER)}

    def read_weights(self) -> dict[str, Tensor]:
        """The same with adapters merged, by the names of the model itself."""
        lora = self.settings["lora"]
        return merged_state(self.read_state(), lora["lora_alpha"] / max(lora["r"], 1))


def find_model(path: str, within: tuple[Path, ...] = ()) -> ModelFiles:
    """What a path names; one that says nothing of a run is a Hugging Face directory or hub id, there or not.

    Args:
        within: runs that are being looked into: a run may have begun with another, but not with itself.
    Raises:
        UserError: a run without such a checkpoint, in one line that says which steps there are.
    """
    found, (name, at, which) = expand(path), path.rpartition("@")
    if found.is_dir():
        if (found / "config.json").is_file():
            return ModelFiles(path)
        if CHECKPOINT_NAME.fullmatch(found.resolve().name):
            return _of_checkpoint(found, within)
        return _of_run(found, within) if is_run(found) else ModelFiles(path)
    if at and name and expand(name).is_dir():
        return _of_checkpoint(_checkpoint_at(expand(name), which), within)
    return ModelFiles(path)


def tokenizer_of(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of what `model.path` names."""
    return load_tokenizer(find_model(path).directory)


def is_run(path: Path) -> bool:
    """Whether this is the output directory of a run."""
    return (path / "run.json").is_file()


def read_settings(run: Path) -> dict[str, Any]:
    """The configuration of a run that trains.

    Raises:
        UserError: there is none.
    """
    try:
        settings = json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]
        settings["max_steps"] + 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run}: run.json is not that of a training run ({one_line(error, 80)})") from error
    return settings


def best_of(run: Path, settings: Mapping[str, Any]) -> tuple[int, float] | None:
    """Step and value of `metric_for_best_model` up to the newest checkpoint; the first where several are as good.

    Checkpoints know the values of all steps before them, metrics.jsonl those that came after they were written.
    """
    complete = {step: path for step, path in checkpoints_by_step(run / "checkpoints").items() if not missing_in(path)}
    lines, name = run / "metrics.jsonl", settings.get("metric_for_best_model")  # older runs have none
    if not complete or not name:
        return None
    newest, rows = max(complete), read_metrics(lines) if lines.is_file() else []
    known = json.loads((complete[newest] / LOOP_STATE).read_text(encoding="utf-8")).get("best")
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None and row["step"] <= newest]
    found += [tuple(known)] if known else []
    sign = 1 if settings["greater_is_better"] else -1
    return max(found, key=lambda best: (sign * best[1], -best[0]), default=None)


def _of_run(run: Path, within: tuple[Path, ...]) -> ModelFiles:
    """A run's final/, unless it has gone on since, or has none: then its newest whole checkpoint."""
    steps, max_steps = checkpoints_by_step(run / "checkpoints"), read_settings(run)["max_steps"]
    if (run / "final/config.json").is_file() and max(steps, default=max_steps) >= max_steps:
        return ModelFiles(str(run / "final"))
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"{run} holds no model yet: it has {_what_is_there(run)}")
    return _of_checkpoint(newest, within)


def _of_checkpoint(checkpoint: Path, within: tuple[Path, ...]) -> ModelFiles:
    run = checkpoint.resolve().parent.parent
    settings = read_settings(run)
    base = _base_of(run, settings, within)
    length = value_after(settings, "model.block_length", checkpoint_step(checkpoint)) or base.block_length
    return ModelFiles(base.directory, checkpoint, settings, length)


def _base_of(run: Path, settings: Mapping[str, Any], within: tuple[Path, ...]) -> ModelFiles:
    """The model that a run began with; where it is gone, what the run made of it: config.json is the same."""
    path = settings["model"]["path"]
    choices = [ModelFiles(str(run / "final"))]
    if run not in within:
        with suppress(UserError):  # that run may have lost the step
            choices.insert(0, find_model(path, (*within, run)))
    for choice in choices:
        if (expand(choice.directory) / "config.json").is_file():
            return choice
    if is_hub_id(choices[0].directory):
        return choices[0]
    raise UserError(f"{run} began with model.path={path}, which is not there; put it back, or work where the run began")


def _checkpoint_at(run: Path, which: str) -> Path:
    settings, steps = read_settings(run), checkpoints_by_step(run / "checkpoints")
    step = int(which) if which.isdecimal() else -1
    if which == "best":
        if not settings.get("metric_for_best_model"):
            raise UserError(f"{run}@best: the run kept no best, metric_for_best_model was empty; name a step instead")
        step, _ = best_of(run, settings) or (-1, 0.0)
    if step not in steps:
        raise UserError(f"{run}@{which}: no such checkpoint; it has {_what_is_there(run)}")
    if missing := missing_in(steps[step]):
        raise UserError(f"{run}@{which} is not whole: {missing}; it has {_what_is_there(run)}")
    return steps[step]


def _what_is_there(run: Path) -> str:
    """The models of a run, in words."""
    complete = [step for step, path in checkpoints_by_step(run / "checkpoints").items() if not missing_in(path)]
    words = [f"step {step}" for step in sorted(complete)] + ["final/"] * (run / "final/config.json").is_file()
    return ", ".join(words) or "no checkpoint; set save_steps, or let it come to its end"
