"""`key=[a,b,c]` words of a command line -> the combinations of a sweep: what each is told, and its folder.

A key whose value is itself a list is swept by a list of lists: `reward.functions=[[accuracy],[accuracy,format]]`.
"""

from __future__ import annotations

import hashlib
import os
import re
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dirl.config import Config, load_config, type_of_key
from dirl.errors import ConfigError, UserError

_PAIRS = {"[": "]", "{": "}", "(": ")", '"': '"', "'": "'"}
_NO_NAME = re.compile(r"[^\w.+=-]+")  # what a folder's name does without
_MAX_NAME = 120  # characters of a folder's name; file systems take 255 bytes

Choice = tuple[tuple[str, str], ...]  # a value of each key


@dataclass(frozen=True)
class Axis:
    """A key and the values it takes, as text."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Combination:
    """One run of a sweep."""

    name: str
    folder: Path
    overrides: tuple[str, ...]  # of the configuration file, output_dir among them
    config: Config


def combinations_of(schema: type[Config], path: str, words: Sequence[str], axes: Sequence[Axis]) -> list[Combination]:
    """Every combination of the axes, the last varying fastest, each loaded and checked.

    Raises:
        ConfigError: one that its stage refuses; nothing has been run then.
    """
    fixed = [word for word in words if word.partition("=")[0].strip() not in {axis.key for axis in axes}]
    root = _root(schema, path, fixed)
    choices: list[Choice] = list(product(*([(axis.key, value) for value in axis.values] for axis in axes)))
    found = []
    for choice, name in zip(choices, _names(choices), strict=True):
        told = [word for word in fixed if not word.startswith("output_dir=")]
        overrides = (*told, *(f"{key}={value}" for key, value in choice), f"output_dir={root / name}")
        try:
            config = load_config(schema, path, overrides)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
        found.append(Combination(name, root / name, overrides, config))
    return found


def axes_of(schema: type[Config], words: Sequence[str]) -> list[Axis]:
    """The keys that have several values.

    Raises:
        UserError: there is none, or one is named twice, has an empty value or the same twice.
    """
    axes = []
    for word in words:
        key, _, text = word.partition("=")
        if values := _values_of(type_of_key(schema, key.strip()), text.strip()):
            axes.append(Axis(key.strip(), tuple(values)))
    keys = Counter(word.partition("=")[0].strip() for word in words)
    for axis in axes:
        twice = [value for value, count in Counter(axis.values).items() if count > 1]
        if keys[axis.key] > 1 or twice or "" in axis.values:
            what = (
                "is given twice" if keys[axis.key] > 1 else f"has {twice[0]!r} twice" if twice else "has an empty value"
            )
            raise UserError(f"{axis.key} {what}: give the key once, with the values to run, such as seed=[0,1,2]")
        if axis.key == "output_dir":
            raise UserError("output_dir cannot be swept: it names the folder of the whole sweep")
    if not axes:
        raise UserError("nothing to sweep: give keys several values, such as objective=[dipo,espo] seed=[0,1,2]")
    return axes


def stage_of(path: str, schemas: Mapping[str, type[Config]]) -> str:
    """The stage whose configuration a file is: by its name, else the only one that can read it.

    Raises:
        UserError: none or several can.
    """
    if Path(path).stem in schemas:
        return Path(path).stem
    refusals = {}
    for stage, schema in schemas.items():
        try:
            load_config(schema, path)
        except UserError as error:
            refusals[stage] = str(error)
    fit = [stage for stage in schemas if stage not in refusals]
    if len(fit) != 1:
        why = f"could be of {' and '.join(fit)}" if fit else f"is of no stage ({'; '.join(refusals.values())})"
        raise UserError(f"{path} {why}; name the file one of {', '.join(f'{stage}.yaml' for stage in schemas)}")
    return fit[0]


def chosen_index(given: int | None, count: int) -> int | None:
    """The one combination to run: as given, else the task of a Slurm array; None: all of them.

    Raises:
        UserError: there is no such combination.
    """
    of_array = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    name, index = (
        ("--index", given) if given is not None else ("SLURM_ARRAY_TASK_ID", int(of_array) if of_array else None)
    )
    if index is not None and not 0 <= index < count:
        raise UserError(
            f"{name} {index}: there are {count} combinations, 0 to {count - 1}; as an array --array=0-{count - 1}"
        )
    return index


def _values_of(hint: Any, text: str) -> list[str]:
    """What stands between the brackets; empty where the text is one value of its key."""
    if not (text.startswith("[") and text.endswith("]")):
        return []
    items = [item.strip() for item in _split(text[1:-1])]
    if typing.get_origin(hint) is list and not all(item.startswith("[") for item in items):
        return []
    return [item[1:-1] if len(item) > 1 and item[0] == item[-1] and item[0] in "\"'" else item for item in items]


def _split(text: str) -> Iterator[str]:
    """The text at its commas outside of brackets and quotes."""
    awaited: list[str] = []
    start = 0
    for place, character in enumerate(text):
        if awaited and character == awaited[-1]:
            awaited.pop()
        elif character in _PAIRS and not (awaited and awaited[-1] in "\"'"):
            awaited.append(_PAIRS[character])
        elif character == "," and not awaited:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _root(schema: type[Config], path: str, fixed: Sequence[str]) -> Path:
    """The folder of the sweep: output_dir of the command line, else beside what the configuration names."""
    named = [word.partition("=")[2] for word in fixed if word.startswith("output_dir=")]
    if named:
        return Path(named[-1]).expanduser()
    config: Any = load_config(schema, path, fixed)
    return Path(f"{config.output_dir}_sweep")


def _names(choices: Sequence[Choice]) -> list[str]:
    """Such as objective=dipo,seed=0; one that is too long, or another's too, ends in a digest of its values."""
    plain = [",".join(f"{key}={_NO_NAME.sub('_', value)}" for key, value in choice) for choice in choices]
    count = Counter(plain)
    digests = (hashlib.blake2b(repr(choice).encode(), digest_size=3).hexdigest() for choice in choices)
    return [
        name if count[name] == 1 and len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{digest}"
        for name, digest in zip(plain, digests, strict=True)
    ]
