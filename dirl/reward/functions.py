"""A reference to a reward function -> the function, called on copies, and what it returned -> checked numbers.

A reward file is a module like any other: it may define dataclasses, start pools of workers and import its neighbours.
What a function does to its arguments, the working folder, the standard streams or torch's settings reaches neither
training nor the next function, and a failure of any kind, `sys.exit` included, is one line that names it.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dirl.errors import UserError, one_line
from dirl.files import expand
from dirl.reward.choices import choice
from dirl.reward.code_execution import code
from dirl.reward.instructions import instructions
from dirl.reward.reasoning_tasks import reasoning_gym
from dirl.reward.shaping import REWARD_FUNCTIONS, RewardFunction

REWARD_FUNCTIONS["code"] = code  # it runs generated programs: never unless it is named
REWARD_FUNCTIONS |= {"choice": choice, "instructions": instructions, "reasoning_gym": reasoning_gym}

MAX_REWARD = 1e9  # in absolute value; what is far larger overflows where float32 squares it
_ARRAYS = {"numpy", "torch", "jax", "jaxlib"}  # modules whose arrays, tensors and scalars are numbers


class RewardError(UserError):
    """A reward that cannot be resolved, or that returned what is no reward."""


@dataclass(frozen=True)
class Rewards:
    """What one function gave, one entry per completion."""

    totals: list[float | None]
    steps: list[list[float]]  # of each denoising step; empty where it judges whole completions


def reward_function(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that makes a reward function known under `name`."""

    def register(function: RewardFunction) -> RewardFunction:
        known = REWARD_FUNCTIONS.get(name, function)
        if (known.__module__, known.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):  # not a cell run again
            raise RewardError(f"reward function name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        REWARD_FUNCTIONS[name] = function
        return function

    return register


def resolve_all(references: Sequence[str]) -> dict[str, RewardFunction]:
    """The functions behind registered names, `pkg.mod:f` or `path/to/file.py:f`, by their own names."""
    functions: dict[str, RewardFunction] = {}
    for reference in references:
        name = reference.rpartition(":")[2]
        if name in functions:
            raise RewardError(f"reward.functions names {name!r} twice: {list(references)}")
        functions[name] = _resolve(reference)
    return functions


def _resolve(reference: str) -> RewardFunction:
    source, colon, name = reference.rpartition(":")
    if not colon:
        if name not in REWARD_FUNCTIONS:
            close = difflib.get_close_matches(name, REWARD_FUNCTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(REWARD_FUNCTIONS)}"
            raise RewardError(f"unknown reward function {name!r}{hint} Your own: pkg.mod:f or path/to/file.py:f")
        return REWARD_FUNCTIONS[name]
    try:
        module = _load_file(expand(source)) if source.endswith(".py") else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # whatever a user's file raises becomes one line that names it
        raise RewardError(f"reward function {reference!r}: cannot load {source}: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward function {reference!r}: {source} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    """The file as the module of its name, its folder on the path for its neighbours and for child processes.

    Where that is another module's, it gets a name of its own, by which a process that is not forked cannot import it.
    """
    path = path.resolve(strict=True)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    found = importlib.util.find_spec(path.stem) if path.stem.isidentifier() else None
    if found and found.origin and Path(found.origin).resolve() == path:
        return importlib.import_module(path.stem)
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # always there for a name that ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def check_parameters(parameters: Mapping[str, Mapping[str, float]], functions: Mapping[str, RewardFunction]) -> None:
    """Raises: RewardError for a parameter that its function does not have."""
    for name, values in parameters.items():
        if name not in functions:
            raise RewardError(f"reward.parameters.{name}: no such reward function; there are {list(functions)}")
        signature = inspect.signature(functions[name]).parameters.values()
        known = [parameter.name for parameter in signature if parameter.default is not parameter.empty]
        for key in values:
            if key not in known:
                raise RewardError(f"reward.parameters.{name}.{key}: no such parameter; {name} has {known or 'none'}")


def wants_grades(function: RewardFunction) -> bool:
    return "is_right" in inspect.signature(function).parameters


def call(
    name: str, function: RewardFunction, arguments: Mapping[str, Sequence[Any]], parameters: Mapping[str, float]
) -> Rewards:
    """What the function says about copies of the arguments.

    Raises:
        RewardError: it raised, or returned what are not as many rewards as there are completions.
    """
    copies = {key: _copy(values) for key, values in arguments.items()}
    try:
        with _undone():
            returned = function(**copies, **parameters)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a user's function raises becomes one line that names it
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}, line {where.lineno}"
        raise RewardError(f"reward function {name!r} raised {_shown(error)} ({place})") from error
    try:
        return _read(name, returned, len(arguments["completions"]))
    except RewardError:
        raise
    except Exception as error:  # objects of a user's own may raise wherever they are looked at
        raise RewardError(f"reward function {name!r} returned what cannot be read: {_shown(error)}") from error


@contextmanager
def _undone() -> Iterator[None]:
    """Afterwards the process's folder, its standard streams and torch's settings are as they were."""
    folder, torch = os.open(".", os.O_RDONLY), sys.modules.get("torch")
    before = (torch.get_default_dtype(), torch.is_grad_enabled()) if torch else None
    try:
        with redirect_stdout(_Lent(sys.stdout)), redirect_stderr(_Lent(sys.stderr)):  # type: ignore[type-var]
            yield
    finally:
        os.fchdir(folder)
        os.close(folder)
        if torch and before:
            torch.set_default_dtype(before[0])
            torch.set_grad_enabled(before[1])


class _Lent:
    """A stream that whom it is lent to cannot close."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def close(self) -> None:
        self._stream.flush()


def _shown(value: object) -> str:
    """A foreign object in a line; one that does not even show itself by its class."""
    try:
        return one_line(value, 300) if isinstance(value, BaseException) else " ".join(repr(value).split())[:100]
    except Exception:  # a stranger's __repr__ may raise anything, and this line is about another error of his
        return f"a {type(value).__name__}"


def _read(name: str, returned: Any, num_completions: int) -> Rewards:
    """The rewards in what a function returned. Raises: RewardError, as `call`."""
    values = _numbers(returned)
    if not isinstance(values, list) or getattr(returned, "ndim", 1) != 1:
        raise RewardError(
            f"reward function {name!r} must return a list, or an array or tensor of one dimension; "
            f"got {_shown(returned)}"
        )
    if len(values) != num_completions:
        raise RewardError(f"reward function {name!r} returned {len(values)} rewards for {num_completions} completions")
    values = [_numbers(value) for value in values]
    if not any(isinstance(value, list) for value in values):
        return Rewards([_check(name, row, value) for row, value in enumerate(values)], [])
    steps = [_check_steps(name, row, value) for row, value in enumerate(values)]
    return Rewards([_check(name, row, math.fsum(of_completion)) for row, of_completion in enumerate(steps)], steps)


def _copy(values: Sequence[Any]) -> list[Any]:
    """The function's own: token ids are many and plain, so their lists are copied without a look at each."""
    if values and type(values[0]) is list and values[0] and type(values[0][0]) is int:
        return [list(value) for value in values]
    return copy.deepcopy(list(values))


def _numbers(value: object) -> object:
    """Lists and tuples as lists, arrays, tensors and their scalars as lists and numbers; all else as it is."""
    if type(value).__module__.partition(".")[0] in _ARRAYS and hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else value


def _check_steps(name: str, row: int, values: object) -> list[float]:
    """Rewards of a completion's denoising steps."""
    if not isinstance(values, list):
        raise RewardError(f"reward function {name!r}, row {row}: other rows have a list of steps, got {_shown(values)}")
    checked = [_check(name, row, _numbers(value)) for value in values]
    if None in checked:
        raise RewardError(f"reward function {name!r}, row {row}: the reward of a step is a number, got None")
    return [value for value in checked if value is not None]


def _check(name: str, row: int, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not abs(value) <= MAX_REWARD:
        limits = f"-{MAX_REWARD:g} to {MAX_REWARD:g}"
        limits = f"-{MAX_REWARD:g} to {MAX_REWARD:g}"
        raise RewardError(
            f"reward function {name!r}, row {row}: a reward is None or a number from {limits}, got {_shown(value)}"
        )
    return float(value)
