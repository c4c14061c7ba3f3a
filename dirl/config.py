"""YAML and dotted overrides -> frozen, typed dataclasses, or one line that says what is wrong.

Precedence: dataclass default < YAML (with `${oc.env:NAME,default}`) < `key=value` on the command line. Configuration
stands beside what it configures; this file only reads and writes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirl.errors import UserError, one_line
from dirl.files import write_whole

Config = TypeVar("Config")


class ConfigError(UserError):
    """A configuration that cannot be used: one line naming the key or file, the value and the remedy."""


def load_config(schema: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of `schema` from a YAML file (None: defaults only) and `key=value` overrides.

    Raises:
        ConfigError: missing or unreadable file, unknown key, wrong type, bad choice, or a value the dataclass refuses.
    """
    source = _Source(path, overrides)
    layers = [_read_yaml(Path(path))] if path is not None else []
    layers += [_read_override(override) for override in overrides]
    try:
        values = OmegaConf.to_container(OmegaConf.merge({}, *layers), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source.of('')}: {one_line(error, 200)}") from error
    return _build(schema, values, "", source)


@dataclass(frozen=True)
class _Source:
    """Where a value came from, for messages: the last override that set it, else the file."""

    path: str | Path | None
    overrides: Sequence[str]

    def of(self, key: str) -> str:
        for override in reversed(self.overrides):
            named = override.partition("=")[0].strip()
            if named and (key == named or key.startswith((f"{named}.", f"{named}[")) or named.startswith(f"{key}.")):
                return f"override {override!r}"
        return str(self.path) if self.path is not None else "configuration"


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    # OmegaConf writes what OmegaConf reads: to it, unlike to YAML 1.1, an unquoted 1e-6 is a number.
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(_escape(config_to_dict(config)))))


def _read_yaml(path: Path) -> DictConfig:
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a configuration file, such as {path}/rl.yaml")
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error, 200)}") from error
    if isinstance(loaded, ListConfig) or not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return loaded


def _read_override(override: str) -> DictConfig:
    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} must be key=value, such as learning_rate=1e-5 or model.path=DIR")
    try:
        return OmegaConf.from_dotlist([override if value else f'{key}=""'])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r} cannot be read: {one_line(error, 200)}") from error


def _build(schema: type[Config], values: Any, prefix: str, source: _Source, default: Config | None = None) -> Config:
    """One dataclass from a mapping of the same names; what it does not name is as in `default` (None: the class)."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source.of(prefix)}: {prefix or 'the file'} must be a mapping of keys, got {values!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in fields:
            raise ConfigError(f"{source.of(key)}: unknown key {key!r}{_suggestion(str(name), prefix, schema)}")
        hint = hints[str(name)]
        if dataclasses.is_dataclass(hint):
            arguments[name] = _build(hint, value, key, source, _default(fields[name]))  # type: ignore[arg-type]
        else:
            arguments[name] = _convert(value, hint, key, source)
    try:
        return schema(**arguments) if default is None else dataclasses.replace(default, **arguments)  # type: ignore[type-var]
    except (ValueError, TypeError) as error:
        # The classes' own messages begin with the name of the field.
        field = ".".join([*([prefix] if prefix else []), re.split(r"[ =:\[]", str(error), maxsplit=1)[0]])
        raise ConfigError(f"{source.of(field)}: {prefix + ': ' if prefix else ''}{error}") from error


def _convert(value: Any, hint: Any, key: str, source: _Source) -> Any:
    """A YAML value as the field's type; nothing is guessed beyond int -> float and the text that says a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in inner:
            choices = ", ".join(map(str, inner))
            raise ConfigError(f"{source.of(key)}: {key} must be one of {choices}, got {value!r}")
        return value
    if origin is list and isinstance(value, list):
        return [_convert(item, inner[0], f"{key}[{i}]", source) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {name: _convert(item, inner[1], f"{key}.{name}", source) for name, item in value.items()}
    value = _read_scalar(value, hint)
    if origin is None and type(value) is hint and value == value:  # NaN differs from itself
        return value
    raise ConfigError(f"{source.of(key)}: {key} must be {_name(hint)}, got {value!r}")


def _read_scalar(value: Any, hint: Any) -> Any:
    """An int where a float is wanted, or text that says what is wanted: environment variables are always text."""
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return value
    if hint is int and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+", value):
        return int(value)
    if hint is bool and isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower(), value)
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    """The section a schema starts from; None where it has no default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _escape(value: Any) -> Any:
    """The value with every ${ in its texts marked as no interpolation."""
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", value)
    return value


def _suggestion(name: str, prefix: str, schema: type[Any]) -> str:
    names = [field.name for field in dataclasses.fields(schema)]
    close = difflib.get_close_matches(name, names, n=1)
    nested = [key for key in _dotted_keys(schema) if key.endswith(f".{name}")]
    section = f"{prefix}." if prefix else ""
    if nested or close:
        return f"; did you mean {section + (nested or close)[0]!r}?"
    return f"; known keys: {', '.join(section + known for known in names)}"


def _dotted_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from _dotted_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "text (quote it)", bool: "true or false"}.get(
        hint, str(hint)
    )
