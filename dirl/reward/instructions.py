"""Completion text -> which of its prompt's instructions it follows, by IFEval's published checks.

The checks are those of the library lm_eval (an extra), which ships them as they were published. They read text and run
nothing that a model wrote. `strict` judges the text as it is; `loose` is satisfied by any of eight versions of it,
without its first line, its last line, its asterisks.

Source: Instruction-Following Evaluation for Large Language Models (arXiv 2311.07911).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from typing import Any


def instructions(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1 for a completion that follows all instructions, strictly; else 0; None for a row without. Range {0, 1}."""
    rows = [{name: column[index] for name, column in columns.items()} for index in range(len(completions))]
    return [
        float(all(followed(row, text)["strict"])) if row.get("instruction_id_list") else None
        for row, text in zip(rows, completions, strict=True)
    ]


def followed(row: Mapping[str, Any], text: str) -> dict[str, list[bool]]:
    """Whether each instruction of a row is followed, strictly and loosely."""
    checks, versions = read_checks(row), [*_versions(text)]
    return {
        "strict": [is_followed(check, versions[:1]) for check in checks],
        "loose": [is_followed(check, versions) for check in checks],
    }


def is_followed(check: Any, versions: list[str]) -> bool:
    """Whether one version of the text passes; an empty one never does."""
    try:
        return any(bool(version.strip() and check.check_following(version)) for version in versions)
    except RecursionError:  # brackets in brackets without end are no JSON
        return False


def read_checks(row: Mapping[str, Any]) -> list[Any]:
    """The library's check of each instruction.

    Raises:
        ValueError: an unknown instruction, parameters that are not its own, or no library.
    """
    checks, known = [], _library()
    for name, parameters in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        if name not in known:
            raise ValueError(f"instruction_id_list names {name!r}; lm_eval knows {', '.join(known)}")
        check = known[name](name)
        given = {key: value for key, value in parameters.items() if value}  # files give every key, most of them null
        try:
            check.build_description(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"kwargs of {name} are {given!r:.80}: {error}") from error
        if "prompt" in (check.get_instruction_args() or {}):
            check.build_description(prompt=row["question"])
        checks.append(check)
    return checks


def _versions(text: str) -> Iterator[str]:
    lines = text.split("\n")
    for version in (text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))):
        yield version
        yield version.replace("*", "")


@functools.cache
def _library() -> Mapping[str, Any]:
    """The published checks by name; asked for once the data they need are there, else importing them would fetch those.

    Raises:
        ValueError: what is missing, and how to get it.
    """
    try:
        importlib.import_module("nltk").data.find("tokenizers/punkt_tab")
        importlib.import_module("langdetect").DetectorFactory.seed = 0  # else it guesses languages at random
        registry = importlib.import_module("lm_eval.tasks.ifeval.instructions_registry")
    except ImportError as error:
        raise ValueError(f"IFEval's checks are not installed ({error}); pip install 'dirl[ifeval]'") from error
    except LookupError as error:
        raise ValueError("IFEval's checks need data of nltk: python -m nltk.downloader punkt_tab") from error
    return registry.INSTRUCTION_DICT  # type: ignore[no-any-return]
