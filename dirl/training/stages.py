"""A configuration with `stages` -> the configurations of a run, and the step from which each of them holds.

    stages:
      - {from_step: 200, model.block_length: 4}
      - {from_step: 400, model.block_length: 16, data.max_length: 8192}

A stage keeps what the stages before it changed. Which stage it is depends on the number of finished optimizer steps and
on nothing else, so that a run resumes in the stage it was in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, TypeVar

from dirl.config import Config, with_changes
from dirl.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StagedConfig(Config):
    """What may change on the way."""

    CHANGEABLE: ClassVar[tuple[str, ...]] = ()  # keys that a stage may give another value

    # other values from some finished step on, such as [{from_step: 200, model.block_length: 16}]
    stages: list[dict[str, object]] = field(default_factory=list)


StagedSchema = TypeVar("StagedSchema", bound=StagedConfig)


@dataclass(frozen=True)
class RunStage(Generic[StagedSchema]):
    """A part of a run."""

    number: int  # 0: before the first of `stages`
    from_step: int  # finished optimizer steps
    changes: Mapping[str, Any]  # by dotted key, what is other than in the stage before
    config: StagedSchema  # what holds in it


def stages_of(config: StagedSchema) -> list[RunStage[StagedSchema]]:
    """Every part of a run in order, each with its whole configuration.

    Raises:
        ConfigError: one line: a key that must not change, a value that the configuration refuses, or steps in disorder.
    """
    found = [RunStage(0, 0, {}, config)]
    for index, entry in enumerate(config.stages):
        where, changes = f"stages[{index}]", dict(_flat(entry))
        from_step = changes.pop("from_step", None)
        if not isinstance(from_step, int) or isinstance(from_step, bool) or from_step <= found[-1].from_step:
            raise ConfigError(
                f"{where}.from_step must be a whole number above {found[-1].from_step}, where the stage before begins, "
                f"got {from_step!r}"
            )
        if not changes:
            raise ConfigError(f"{where} changes nothing; give a key beside from_step, or remove it")
        if fixed := [key for key in changes if key not in config.CHANGEABLE]:
            raise ConfigError(
                f"{where}: {fixed[0]} cannot change within a run; those that can: {', '.join(config.CHANGEABLE)}"
            )
        # Without its own stages: the stages of a stage would never end.
        changed = with_changes(found[-1].config, {**changes, "stages": []}, where)
        found.append(RunStage(len(found), from_step, changes, changed))
    return found


def value_after(config: Mapping[str, Any], key: str, step: int) -> Any:
    """A dotted key's value in a run's written configuration, in the stage that its finished step `step` was in."""
    flat = dict(_flat({name: value for name, value in config.items() if name != "stages"}))
    for entry in config.get("stages", []):
        if entry["from_step"] < step:
            flat |= dict(_flat(entry))
    return flat[key]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; sections may be written either way."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_of(config: Config, prefix: str = "") -> dict[str, Any]:
    """Every key, dotted, with its value."""
    found: dict[str, Any] = {}
    for each in fields(config):
        value, key = getattr(config, each.name), prefix + each.name
        found |= settings_of(value, f"{key}.") if isinstance(value, Config) else {key: value}
    return found
