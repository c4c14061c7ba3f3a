"""What a checkpoint says of its run -> whether this run may go on from it, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dirl.errors import UserError


def changed_settings(
    checkpoint: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], fixed: Sequence[str]
) -> list[str]:
    """What this run is told that the run of the checkpoint was not, such as "learning_rate 1e-05 -> 2e-05".

    Args:
        saved: values by dotted key; a key that only one of the two has is of another version, and no change.
        fixed: keys and sections that may not differ.
    Raises:
        UserError: one of them does.
    """
    changed = {key: (saved[key], value) for key, value in ours.items() if key in saved and saved[key] != value}
    for key, (before, now) in changed.items():
        if any(key == name or key.startswith(f"{name}.") for name in fixed):
            raise UserError(
                f"{checkpoint} was written with {key}={before}, this run has {now}: it cannot change when a run goes "
                f"on; resume with {before}, or set resume_from_checkpoint=none to start afresh"
            )
    told = ("output_dir", "resume_from_checkpoint")  # by whoever resumes
    return [f"{key} {before} -> {now}" for key, (before, now) in changed.items() if key not in told]


def check_identity(checkpoint: Path, saved: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Whether this run can continue from a checkpoint of another model, backend or number of processes.

    One process and DDP resume with any number of processes. Shards (DeepSpeed, FSDP2) fit the number that wrote them.

    Raises:
        UserError: it cannot.
    """
    remedy = "or set resume_from_checkpoint=none to start afresh"
    _check_beside(checkpoint, saved.get("beside", {}), ours.get("beside", {}), remedy)
    if any(saved[name] != ours[name] for name in ("parameters_digest", "num_trained_tensors")):
        raise UserError(
            f"{checkpoint} holds another model: {saved['num_parameters']} parameters, {saved['num_trained_tensors']} "
            f"trained tensors; this run's has {ours['num_parameters']} and {ours['num_trained_tensors']}: resume with "
            f"the model.path and adapters it was started with, {remedy}"
        )
    if saved.get("started_from", ours.get("started_from")) != ours.get("started_from"):
        raise UserError(
            f"{checkpoint} is of a run that started from other weights than those of this run's model.path: resume "
            f"with the model it was started with, {remedy}"
        )
    form = {"plain": "ddp"}
    if form.get(saved["backend"], saved["backend"]) != form.get(ours["backend"], ours["backend"]):
        raise UserError(
            f"{checkpoint} was written under {saved['backend']}, this run is launched under {ours['backend']}: launch "
            f"with the ACCELERATE_CONFIG it was started with, {remedy}"
        )
    if saved["backend"] not in ("plain", "ddp") and saved["world_size"] != ours["world_size"]:
        raise UserError(
            f"{checkpoint} was written by {saved['world_size']} processes under {saved['backend']}, this run has "
            f"{ours['world_size']}: launch with NUM_PROCESSES={saved['world_size']}, {remedy}"
        )


def _check_beside(checkpoint: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], remedy: str) -> None:
    """Whether the same is trained beside the model."""
    for name in sorted({*saved, *ours}):
        if name not in saved or name not in ours:
            has, has_not = (f"{checkpoint}", "this run") if name in saved else ("this run", f"{checkpoint}")
            raise UserError(
                f"{has} has a {name}, {has_not} has none: resume with the objective it was started with, {remedy}"
            )
        if any(saved[name][key] != ours[name][key] for key in saved[name]):
            raise UserError(
                f"{checkpoint} holds another {name}: {saved[name]['num_parameters']} parameters, this run's has "
                f"{ours[name]['num_parameters']}: resume with the configuration it was started with, {remedy}"
            )
