"""Every configuration class of the package, however it is made: no choice, bound or path of it goes unchecked."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

import dirl
from dirl.config import Config, ConfigError, load_config, marks_of
from dirl.errors import UserError

OUTSIDE = {"least": -1, "above": 0, "most": 1, "below": 0}  # added to a bound, a value that is refused
ANY_NUMBER = {"RewardConfig.weights"}  # every number makes sense: a reward may be a penalty


def every_config() -> list[type[Config]]:
    for module in pkgutil.walk_packages(dirl.__path__, "dirl."):
        if not module.name.startswith(("dirl.__main__", "dirl.rollout.lmdeploy.")):  # the latter needs lmdeploy
            importlib.import_module(module.name)
    found: list[type[Config]] = []
    waiting: list[type[Config]] = [Config]
    while waiting:
        children = waiting.pop().__subclasses__()
        waiting += children
        found += [child for child in children if child.__module__.startswith("dirl.") and child not in found]
    return sorted(found, key=lambda schema: schema.__qualname__)


CONFIGS = every_config()


def fields(*schemas: type[Config]) -> Iterator[tuple[type[Config], str, Any, dict[str, Any]]]:
    """Class, name, type and marks of every field of these classes."""
    for schema in schemas:
        hints, marks = typing.get_type_hints(schema), marks_of(schema)
        for field in dataclasses.fields(schema):
            yield schema, field.name, hints[field.name], marks[field.name]


def item_type(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint


def refused_by(hint: Any, marks: dict[str, Any]) -> list[Any]:
    """Values that a field of this type and these bounds must refuse."""
    item = item_type(hint)
    refused: list[Any] = [marks[key] + off for key, off in OUTSIDE.items() if key in marks]
    if typing.get_origin(item) is Literal:
        refused += ["no_such_choice", True]
    elif item in (int, float):
        refused += ["many", True, 1.5 if item is int else float("nan"), float("inf")]
    return refused if item is hint else [[value] for value in refused]


def required(schema: type[Config]) -> dict[str, Any]:
    fields = dataclasses.fields(schema)
    return {f.name: "x" for f in fields if f.default is f.default_factory is dataclasses.MISSING}


def test_the_walk_finds_them() -> None:
    names = {schema.__name__ for schema in CONFIGS}
    assert names >= {"SFTConfig", "RLConfig", "EvalConfig", "ServeConfig", "ObjectiveConfig", "NoiseConfig"}
    assert not [schema for schema in CONFIGS if "__post_init__" in vars(schema)], "write check(self) instead"


@pytest.mark.parametrize("schema", CONFIGS)
def test_python_and_yaml_refuse_unknown_choices_and_values_out_of_bounds(schema: type[Config], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for _, name, hint, marks in fields(schema):
        for value in refused_by(hint, marks):
            values = required(schema) | {name: value}
            with pytest.raises(UserError, match=rf"^{name}(\[0\])? must be "):
                schema(**values)
            file.write_text(yaml.safe_dump(values))
            with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))}: {name}(\[0\])? must be "):
                load_config(schema, file)


def test_every_number_has_a_bound() -> None:
    bounds = OUTSIDE.keys()
    free = {
        f"{schema.__name__}.{name}"
        for schema, name, hint, marks in fields(*CONFIGS)
        if item_type(hint) in (int, float) and not bounds & marks.keys()
    }
    assert free == ANY_NUMBER, "give the field a bound (dirl.config.bounded), or list it here"


@pytest.mark.parametrize("schema", CONFIGS)
def test_a_path_may_begin_with_a_tilde(schema: type[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "c.yaml"
    for _, name, hint, marks in fields(schema):
        if "path" in marks:
            for written, meant in (("~/x", f"{tmp_path}/x"), *((same, same) for same in ("./x", "a~b", "~no_one/x"))):
                value, expected = (written, meant) if hint is str else ([written], [meant])
                values = required(schema) | {name: value}
                file.write_text(yaml.safe_dump(values))
                assert getattr(schema(**values), name) == getattr(load_config(schema, file), name) == expected


def test_every_field_that_names_a_path_is_marked() -> None:
    named = re.compile(r"(^|_)(path|dir|file|datasets|functions)$|^resume_from_checkpoint$")
    unmarked = [
        f"{s.__name__}.{name}" for s, name, _, marks in fields(*CONFIGS) if named.search(name) and "path" not in marks
    ]
    assert not unmarked, "metadata=PATH lets a ~ in it find the home"
