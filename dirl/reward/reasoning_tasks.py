"""Completion text -> whether its boxed answer solves a procedural task of the library reasoning-gym (an extra).

A scorer of that library is called only if it stands in SCORERS: each was read, and neither evaluates, parses as code,
nor unpickles what the model wrote, nor gives its full score to several answers at once. Left out, among others:
`countdown` and the integrations (SymPy's parse_expr), `spiral_matrix` and `n_queens` (eval), `coin_flip` (fractions of
any exponent), `game_of_life_halting` (any text is true), `gsm_symbolic` (takes the first of several numbers).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from dirl.boxed import extract_boxed

# The library's default: equality with the one right answer.
_EQUALITY = (
    *("acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf", "binary_alternation", "caesar_cipher"),
    *("count_bits", "count_primes", "course_schedule", "gcd", "isomorphic_strings", "largest_island", "lcm"),
    *("leg_counting", "letter_counting", "list_functions", "mahjong_puzzle", "maze", "modulo_grid", "number_filtering"),
    *("number_sequence", "ransom_note", "rotate_matrix", "rotten_oranges", "simple_equations", "simple_geometry"),
    *("string_manipulation", "string_splitting", "string_synthesis", "syllogism", "word_sequence_reversal"),
)
# Their own comparison, of texts, numbers or paths.
_OWN = (
    *("chain_sum", "dice", "family_relationships", "knights_knaves", "mini_sudoku", "number_format", "products"),
    *("self_reference", "shortest_path", "spell_backward", "sudoku", "word_sorting", "zebra_puzzles"),
)
SCORERS = frozenset((*_EQUALITY, *_OWN))
MAX_ANSWER_CHARS = 2000  # a longer boxed answer is wrong unread


def reasoning_gym(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1 for a boxed answer with the full score of its task's scorer, else 0; None for other rows. Range {0, 1}.

    Reads the columns of the library's entries: `question`, `answer`, and `metadata` with `source_dataset`.
    """
    rewards: list[float | None] = []
    tasks = columns.get("metadata", [None] * len(prompts))
    rows = zip(columns.get("question", prompts), completions, columns["answer"], tasks, strict=True)
    for question, completion, answer, metadata in rows:
        name = metadata.get("source_dataset") if isinstance(metadata, dict) else None
        if name is None:
            rewards.append(None)
            continue
        boxed = (extract_boxed(completion) or "").strip()
        is_readable = 0 < len(boxed) <= MAX_ANSWER_CHARS
        entry = {"question": question, "answer": answer, "metadata": metadata}
        score = find_scorer(name)
        rewards.append(float(is_readable and score(boxed, entry) >= 1.0))
    return rewards


@functools.cache
def find_scorer(name: str) -> Callable[[str, dict[str, Any]], float]:
    """The library's scorer of one task.

    Raises:
        ValueError: it is not on the list, or the library is not installed.
    """
    if name not in SCORERS:
        raise ValueError(f"reasoning_gym task {name!r} has no scorer that is safe to call; there are {sorted(SCORERS)}")
    try:
        library = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ValueError(f"reasoning_gym is not installed ({error}); pip install 'dirl[reasoning-gym]'") from error
    return library.get_score_answer_fn(name)  # type: ignore[no-any-return]
