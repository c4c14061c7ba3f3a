"""The layers of a configuration before they are merged: presets that sections name, and values at dotted paths."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from dirl.errors import ConfigError
from dirl.files import expand

ABSENT = object()  # no value stands there
# A folder of NAME.yaml; or a preset's name and the model.path of the configuration -> the values of the section.
Presets: TypeAlias = Path | Callable[[str, str], Mapping[str, Any]]


def preset_in_full(override: str, presets: Mapping[str, Presets]) -> str:
    """`objective=NAME` as `objective.preset=NAME`."""
    key, separator, value = override.partition("=")
    return f"{key.strip()}.preset={value}" if separator and key.strip() in presets and value[:1] != "{" else override


def with_presets(
    layers: Sequence[dict[str, Any]], presets: Mapping[str, Presets], read: Callable[[Path], Any]
) -> list[Any]:
    """The layers, each over the values of the presets it names; a preset replaces the section of the layers below."""
    found: list[Any] = []
    for layer in layers:
        for section, source in presets.items():
            if isinstance(layer.get(section), str):
                layer[section] = {"preset": layer[section]}
            name = _in_section(layer, section, "preset")
            if not isinstance(name, str):
                raise ConfigError(f"{section}.preset must be text (quote it), got {name!r}")
            if name:
                found = [{key: value for key, value in below.items() if key != section} for below in found]
                if isinstance(source, Path):
                    found.append(read(_preset_path(section, name, source)))
                else:
                    del layer[section]["preset"]
                    found.append({section: dict(source(name, _model_path(layers)))})
        found.append(layer)
    return found


def _model_path(layers: Sequence[Mapping[str, Any]]) -> str:
    """What the last layer that says so opens; empty where none does."""
    return next((str(path) for layer in reversed(layers) if (path := _in_section(layer, "model", "path"))), "")


def _in_section(layer: Mapping[str, Any], section: str, key: str) -> Any:
    """A value of a section, which may be absent or wrongly no mapping; empty without one."""
    values = layer.get(section)
    return values.get(key, "") if isinstance(values, Mapping) else ""


def _preset_path(section: str, name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        return expand(name)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; {folder} has {', '.join(names) or 'none'}"
        raise ConfigError(f"{section}={name}: no such preset{hint} Your own: a path that ends in .yaml")
    return folder / f"{name}.yaml"


def take(values: dict[Any, Any], path: Sequence[str]) -> Any:
    """Remove and return what stands at a path (ABSENT: nothing does), with the sections that are then empty."""
    name, *rest = path
    if not rest:
        return values.pop(name, ABSENT)
    inner = values.get(name)
    taken = take(inner, rest) if isinstance(inner, dict) else ABSENT
    if taken is not ABSENT and not inner:
        del values[name]
    return taken


def put(values: dict[Any, Any], path: Sequence[str], value: Any) -> bool:
    """Set what stands at a path; False: something else does. Mappings are merged."""
    name, *rest = path
    if values.get(name) is None:  # not there, or a section left empty
        values[name] = {} if rest else value
    inner = values[name]
    if rest:
        return isinstance(inner, dict) and put(inner, rest, value)
    if isinstance(inner, dict) and isinstance(value, dict):
        return all(put(inner, [key], item) for key, item in value.items())
    return bool(inner == value)
