"""Completion text -> the letter of the choice it names, by the rule that its benchmark is published with.

The column `choice_rule` says which. A question may be answered once: the first place counts where a pattern fits, and
later patterns count only where the ones before fit nowhere.
"""

from __future__ import annotations

import re
from typing import Any

CHOICE_RULES = {
    # Source: openai/simple-evals, gpqa_eval.py (commit 0ac027d). A lower-case letter is found, and is never right.
    "simple-evals": (re.compile(r"(?i)answer[ \t]*:[ \t]*\$?([A-D])"),),
    # Source: TIGER-AI-Lab/MMLU-Pro, compute_accuracy.py (commit 453c1d9), its second level; it then guesses, we do not.
    "mmlu-pro": (
        re.compile(r"answer is \(?([A-J])"),
        re.compile(r"(?m:^).*[aA]nswer:\s*([A-J])"),  # the last in the first such line
        re.compile(r"(?s:\A.*)\b([A-J])\b"),  # the last that stands alone
    ),
}


def find_choice(rule: str, text: str) -> str | None:
    """The letter; None where the text names none.

    Raises:
        ValueError: an unknown rule.
    """
    if rule not in CHOICE_RULES:
        raise ValueError(f"choice_rule={rule!r}; expected one of {', '.join(CHOICE_RULES)}")
    found = next((match for pattern in CHOICE_RULES[rule] if (match := pattern.search(text))), None)
    return found[1] if found else None


def choice(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """1 for the right letter, else 0; None for a row without `choice_rule`. Range {0, 1}."""
    rules = columns.get("choice_rule", [None] * len(completions))
    rows = zip(completions, columns["answer"], rules, strict=True)
    return [float(find_choice(rule, text) == answer) if rule else None for text, answer, rule in rows]
