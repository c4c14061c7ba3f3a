"""`task:reasoning_gym/NAME` -> problems of the library reasoning-gym (an extra), drawn by seed."""

from __future__ import annotations

import importlib

from dirl.data.problems import Problem
from dirl.data.rows import DataError

PREFIX = "task:reasoning_gym/"
NUM_TRAIN, NUM_HELDOUT = 10_000, 500  # where no limit is given
_HELDOUT_SEED = 2**31 - 1  # minus the run's seed: far from any training seed


def reasoning_problems(path: str, *, split: str, limit: int, seed: int) -> list[Problem]:
    """Problems of one task; training leaves out the questions that are held out under the same seed.

    Raises:
        DataError: the library is not installed, or has no such task.
    """
    heldout = _draw(path, limit if split == "heldout" and limit else NUM_HELDOUT, _HELDOUT_SEED - seed)
    if split == "heldout":
        return heldout
    known = {problem.question for problem in heldout}
    problems = [problem for problem in _draw(path, limit or NUM_TRAIN, seed) if problem.question not in known]
    if not problems:
        raise DataError(f"{path} has too few different questions to train on any that is not held out")
    return problems


def _draw(path: str, size: int, seed: int) -> list[Problem]:
    name = path.removeprefix(PREFIX)
    try:
        library = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"{path}: reasoning_gym is not installed ({error}); pip install 'dirl[reasoning-gym]'"
        ) from error
    try:
        entries = library.create_dataset(name, size=size, seed=seed)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    problems = [Problem(entry["question"], str(entry["answer"]), {"metadata": entry["metadata"]}) for entry in entries]
    return list({problem.question: problem for problem in problems}.values())
