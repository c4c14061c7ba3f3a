"""YAML and dotted overrides -> frozen, typed dataclasses, or one line that says what is wrong.

Precedence: dataclass default < YAML (with `${oc.env:NAME,default}`) < `key=value` on the command line, where text is
taken as it is written. Configuration stands beside what it configures, in subclasses of `Config`; this file only
checks, reads and writes it. omegaconf is imported where files are read and written: Python needs none of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import math
import operator
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from dirl.errors import ConfigError, one_line
from dirl.files import expand, write_whole
from dirl.presets import ABSENT, Presets, preset_in_full, put, take, with_presets

logger = logging.getLogger(__name__)

T = TypeVar("T")
Schema = TypeVar("Schema", bound="Config")
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "most": ("at most", operator.le),
    "below": ("below", operator.lt),
}
_WANTED = {
    int: "a whole number",
    float: "a finite number",
    str: "text (quote it)",
    bool: "true or false",
    list: "a list",
    dict: "a mapping of keys",
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # of the checkout
PATH = {"path": True}  # metadata of a field that holds a path, or a list of them, and may hold something else


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every configuration is: frozen, given by keyword, and checked however it came to be.

    Fields are of type int, float, str, bool, Literal, list, dict (of object: of whatever YAML holds) or Config. Types,
    choices and bounds (`bounded`) are checked here; what they cannot say a class says in a method `check(self)`, which
    raises a ValueError whose message begins with the field's name. Each class's own `check` is called once, base
    classes first: nobody calls super.
    Fields marked with PATH hold their `~` written out.
    """

    # {"old.key": "new.key"} of a schema that is loaded: keys that moved and keep working in YAML and overrides.
    ALIASES: ClassVar[Mapping[str, str]] = {}
    # {"section": presets} of a schema that is loaded: a section may name a preset (NAME.yaml in a folder, or a path) as
    # `section=NAME` or `section.preset=NAME`. Its values lie under what the same file or command line says.
    PRESETS: ClassVar[Mapping[str, Presets]] = {}

    def __post_init__(self) -> None:
        hints, marks = typing.get_type_hints(type(self)), marks_of(type(self))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _demand(field.name, value, hints[field.name], marks[field.name])
            if "path" in marks[field.name]:
                object.__setattr__(self, field.name, _in_texts(value, _without_tilde))
        for owner in reversed(type(self).__mro__):
            if "check" in vars(owner):
                vars(owner)["check"](self)


def bounded(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> T:
    """A field whose value, or whose list's values, stay within bounds; `above` and `below` are themselves excluded."""
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def marks_of(schema: type[Any]) -> dict[str, dict[str, Any]]:
    """The metadata of each field; a subclass that gives a field another default changes nothing else about it."""
    marks: dict[str, dict[str, Any]] = {}
    for owner in reversed(schema.__mro__):
        for field in vars(owner).get("__dataclass_fields__", {}).values():
            marks.setdefault(field.name, {}).update(field.metadata)
    return marks


def bounds_in_words(marks: Mapping[str, Any]) -> str:
    """Such as "at least 0 and below 1"; empty without bounds."""
    return " and ".join(f"{words} {marks[key]}" for key, (words, _) in _BOUNDS.items() if key in marks)


def _without_tilde(path: str) -> str:
    return str(expand(path)) if path.startswith("~") else path  # a leading ./ says that it is no hub id: it stays


def load_config(schema: type[Schema], path: str | Path | None, overrides: Sequence[str] = ()) -> Schema:
    """The configuration of `schema` from a YAML file (None: defaults only) and `key=value` overrides.

    Raises:
        ConfigError: missing or unreadable file, unknown key, wrong type, bad choice, or a value the dataclass refuses.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    source, presets = _Source(path, overrides, _aliases(schema)), getattr(schema, "PRESETS", {})
    in_file = _read_yaml(Path(path)) if path is not None else {}
    in_overrides = [_read_override(preset_in_full(override, presets), schema) for override in overrides]
    try:
        # The command line is one layer: what it says under an old name still beats the file's new one.
        layers = [
            _renamed(OmegaConf.merge({}, in_file), source.aliases, str(path)),
            _renamed(OmegaConf.merge({}, *in_overrides), source.aliases, "command line"),
        ]
        layers = with_presets(layers, presets, _read_yaml)
        values = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source.of('')}: {one_line(error, 200)}") from error
    return _build(schema, values, "", source)


@dataclass(frozen=True)
class _Source:
    """Where a value came from, for messages: the last override that set it, else the file."""

    path: str | Path | None
    overrides: Sequence[str]
    aliases: Mapping[str, str]

    def of(self, key: str) -> str:
        for override in reversed(self.overrides):
            named = self.today(override.partition("=")[0].strip())
            if named and (key == named or key.startswith((f"{named}.", f"{named}[")) or named.startswith(f"{key}.")):
                return f"override {override!r}"
        return str(self.path) if self.path is not None else "configuration"

    def today(self, named: str) -> str:
        for old, new in self.aliases.items():
            if named == old or named.startswith(f"{old}."):
                return new + named.removeprefix(old)
        return named


def with_changes(config: Schema, changes: Mapping[str, Any], where: str) -> Schema:
    """A configuration with other values of some dotted keys, read and checked as those of a file named `where` are.

    Raises:
        ConfigError: as `load_config`.
    """
    values: dict[str, Any] = {}
    for key, value in changes.items():
        put(values, key.split("."), value)
    return _build(type(config), values, "", _Source(where, (), _aliases(type(config))), config)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dictionaries and lists."""
    return dataclasses.asdict(config)


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    from omegaconf import OmegaConf

    # OmegaConf writes what OmegaConf reads: to it, unlike to YAML 1.1, an unquoted 1e-6 is a number.
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(_escape(config_to_dict(config)))))


def _read_yaml(path: Path) -> Any:
    import yaml
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if path.is_dir():
        raise ConfigError(f"{path} is a directory; name a configuration file, such as {path}/rl.yaml")
    if not path.is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {one_line(error, 200)}") from error
    if isinstance(loaded, ListConfig) or not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return loaded


def type_of_key(schema: type[Any], key: str) -> Any:
    """The type of a dotted key, which may go by an old name; None: there is no such key."""
    hint: Any = schema
    for name in _Source(None, (), _aliases(schema)).today(key).split("."):
        hint = typing.get_type_hints(hint).get(name) if _is_section(hint) else None
    return hint


def _read_override(override: str, schema: type[Any]) -> Any:
    """One `key=value`: text as it is written where the key is text, else the value that YAML reads in it."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, separator, value = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} must be key=value, such as learning_rate=1e-5 or model.path=DIR")
    hint = type_of_key(schema, key.strip())
    if hint is str or all(isinstance(choice, str) for choice in typing.get_args(hint) or [0]) or not value:
        layer: dict[str, Any] = {}
        put(layer, key.strip().split("."), _escape(value))
        return layer
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r} cannot be read: {one_line(error, 200)}") from error


def _aliases(schema: type[Any]) -> dict[str, str]:
    """The keys that moved, of a class and all it inherits from."""
    tables = (vars(owner).get("ALIASES", {}) for owner in reversed(schema.__mro__))
    return {old: new for table in tables for old, new in table.items()}


def _renamed(layer: Any, aliases: Mapping[str, str], where: str) -> Any:
    """A layer in which what stands under an old key, or refers to one, has the new name.

    Raises:
        ConfigError: both names are given, and differ.
    """
    from omegaconf import OmegaConf

    values: Any = OmegaConf.to_container(layer)
    for old, new in aliases.items():
        value = take(values, old.split("."))
        if value is not ABSENT:
            _say_moved(old, new)
            if not put(values, new.split("."), value):
                raise ConfigError(f"{where}: {old} is now {new}, and both are given with different values; keep {new}")
        reference = re.compile(r"(?<!\\)\$\{\s*" + re.escape(old) + r"\s*\}")
        values = _in_texts(values, functools.partial(reference.sub, f"${{{new}}}"))
    return values


@functools.cache  # once a key and process
def _say_moved(old: str, new: str) -> None:
    logger.warning("%s is now %s; the old name still works", old, new)


def _build(schema: type[Schema], values: Any, prefix: str, source: _Source, default: Schema | None = None) -> Schema:
    """One dataclass from a mapping of the same names; what it does not name is as in `default` (None: the class)."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{source.of(prefix)}: {prefix or 'the file'} must be a mapping of keys, got {values!r}")
    hints = typing.get_type_hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}.{name}" if prefix else str(name)
        if name not in fields:
            raise ConfigError(f"{source.of(key)}: unknown key {key!r}{_suggestion(key, schema, source.aliases)}")
        hint = hints[str(name)]
        if _is_section(hint):
            start = _default(fields[name]) if default is None else getattr(default, name)
            arguments[name] = _build(hint, value, key, source, start)
        else:
            arguments[name] = _read(value, hint)
    try:
        return schema(**arguments) if default is None else dataclasses.replace(default, **arguments)
    except (ValueError, TypeError) as error:
        # The classes' own messages begin with the name of the field.
        named = re.match(r"[\w.]*", str(error))[0]  # type: ignore[index]
        key = named if named.partition(".")[0] in fields else ""
        at = "" if not prefix else f"{prefix}." if key else f"{prefix}: "
        raise ConfigError(f"{source.of('.'.join(filter(None, (prefix, key))))}: {at}{error}") from error


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Config)


def _read(value: Any, hint: Any) -> Any:
    """A YAML value as the field's type; nothing is guessed beyond int -> float and the text that says a number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        return [_read(item, inner[0]) for item in value]
    if origin is dict and isinstance(value, Mapping):
        return {name: _read(item, inner[1]) for name, item in value.items()}
    return _read_scalar(value, hint)


def _demand(name: str, value: Any, hint: Any, bounds: Mapping[str, Any] | None = None) -> None:
    """Raises ConfigError, beginning with the name, for a value of another type, choice or size."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is list and isinstance(value, list):
        for index, item in enumerate(value):
            _demand(f"{name}[{index}]", item, inner[0], bounds)
    elif origin is dict and isinstance(value, Mapping):
        for key, item in value.items():
            _demand(f"{name}.{key}", item, inner[1], bounds)
    elif origin is Literal:
        if (type(value), value) not in [(type(choice), choice) for choice in inner]:  # True is no 1
            raise ConfigError(f"{name} must be one of {', '.join(map(str, inner))}, got {value!r}")
    elif not _is_a(value, hint):
        raise ConfigError(f"{name} must be {_WANTED.get(origin or hint, hint)}, got {value!r}")
    else:
        _demand_bounds(name, value, bounds or {})


def _is_a(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return (
        isinstance(hint, type) and isinstance(value, hint) and (hint in (bool, object) or not isinstance(value, bool))
    )


def _demand_bounds(name: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if not all(holds(value, bounds[key]) for key, (_, holds) in _BOUNDS.items() if key in bounds):
        raise ConfigError(f"{name} must be {bounds_in_words(bounds)}, got {value!r}")


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
    return _in_texts(value, lambda text: re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text))


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value with a change made to each of its texts, however deep; keys stay."""
    if isinstance(value, dict):
        return {key: _in_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _suggestion(key: str, schema: type[Any], aliases: Mapping[str, str]) -> str:
    """What was probably meant by an unknown key of a section, whose class is `schema`."""
    section, dot, name = key.rpartition(".")
    known = {field.name: section + dot + field.name for field in dataclasses.fields(schema)}
    nested = [section + dot + inner for inner in _dotted_keys(schema) if inner.endswith(f".{name}")]
    moved = {old.rpartition(".")[2]: new for old, new in aliases.items() if old.rpartition(".")[0] == section}
    close = difflib.get_close_matches(name, [*known, *moved], n=1)
    meant = nested or [(moved | known)[match] for match in close]
    return f"; did you mean {meant[0]!r}?" if meant else f"; known keys: {', '.join(known.values())}"


def _dotted_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        if _is_section(hints[field.name]):
            yield from _dotted_keys(hints[field.name], f"{prefix}{field.name}.")
