"""Rows of public benchmarks, in the form they are published in, -> rows of the form that dirl reads.

Which form a row has is told by its columns; a row of no known form is left to the caller.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

Row = dict[str, object]

LETTERS = "ABCDEFGHIJ"

CODE_INSTRUCTION = "Write a Python program. Put it into one ```python block.\n\n"


def from_published(row: Mapping[str, object]) -> Row | None:
    """The row as `question` and `ground_truth_answer`, or, for code, with tests; None for an unknown form.

    Raises:
        ValueError: a known form with a value that does not fit it.
    """
    for columns, convert in _FORMS:
        if columns <= row.keys():
            return convert(row)
    return None


def _humaneval(row: Mapping[str, object]) -> Row:
    """`prompt` (imports, signature, docstring), `entry_point`, and `test`, which defines check(candidate)."""
    prompt, test, name = (_text(row, key) for key in ("prompt", "test", "entry_point"))
    question = f"{CODE_INSTRUCTION}Complete this function:\n```python\n{prompt.rstrip()}\n```"
    return _code_row(row, question, prefix=prompt, tests=[f"{test}\n\ncheck({name})"])


def _mbpp(row: Mapping[str, object]) -> Row:
    """`text` (`prompt` in the sanitized form), `test_list` of asserts, and what they import."""
    key = "text" if "text" in row else "prompt"
    tests = list(_texts(row, "test_list"))
    setup = "\n".join([*_texts(row, "test_imports"), *_texts(row, "test_setup_code")]).strip()
    question = f"{CODE_INSTRUCTION}{_text(row, key).strip()} It must pass these tests:\n" + "\n".join(tests)
    return _code_row(row, question, prefix=setup, tests=tests)


# What LiveCodeBench's own runner puts before each program, in its order: later names hide earlier ones.
_CONTEST_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json"),
)
_CONTEST_PREFIX = "\n".join(
    [f"from {name} import *" for name in (*_CONTEST_MODULES, "builtins", "typing")]
    + [f"import {name}" for name in _CONTEST_MODULES]
    + ["sys.setrecursionlimit(50000)"]
)


def _livecodebench(row: Mapping[str, object]) -> Row:
    """`question_content`, `starter_code`, and tests, which stay as they are published: decoded, they fill gigabytes."""
    name = _object(row, "metadata").get("func_name")
    task, starter = _text(row, "question_content").strip(), row.get("starter_code") or ""
    asked = "It reads standard input and prints the answer; it is run as it stands."
    if name:
        asked = f"Complete this code, whose function is called with the input:\n```python\n{starter}\n```"
    tests = {key: _text(row, key) for key in ("public_test_cases", "private_test_cases")}
    columns = {"prefix": _CONTEST_PREFIX, "test_method": "contest", **tests, "func_name": name, "test_time_limit": 6}
    others = {"contest_date": str(row["contest_date"])[:10], "category": row.get("difficulty")}
    question = f"{CODE_INSTRUCTION}{task}\n\n{asked}"
    return {"question": question, **columns, **others, "question_id": row.get("question_id")}


def _gpqa(row: Mapping[str, object]) -> Row:
    """`Question`, `Correct Answer` and three `Incorrect Answer`s, in an order that depends on their texts alone."""
    question, right, *wrong = (_text(row, key).strip() for key in _GPQA)

    def place(choice: str) -> bytes:
        return hashlib.blake2b(f"{question}\0{choice}".encode()).digest()

    choices = sorted([right, *wrong], key=place)
    asked = "Answer this multiple-choice question. Think step by step, and let the last line of your response be "
    asked += f"'Answer: LETTER', where LETTER is one of ABCD.\n\n{question}\n\n"
    asked += "\n".join(f"{letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    category = {"category": row.get("High-level domain"), "record_id": row.get("Record ID")}
    return _choice_row(asked, LETTERS[choices.index(right)], "simple-evals", category)


def _mmlu_pro(row: Mapping[str, object]) -> Row:
    """`question`, up to ten `options`, `answer` (its letter), `answer_index`, `category`."""
    options = [option.strip() for option in _texts(row, "options") if option != "N/A"]
    answer, index = row["answer"], row["answer_index"]
    if not isinstance(index, int) or not 0 <= index < len(options) <= len(LETTERS) or LETTERS[index] != answer:
        raise ValueError(f"has answer={answer!r:.20} and answer_index={index!r:.20} for {len(options)} options")
    asked = f"Answer this multiple-choice question about {row.get('category') or 'the subject'}. Think step by step, "
    asked += (
        f'then finish with "the answer is (X)", where X is the right letter.\n\n{_text(row, "question").strip()}\n\n'
    )
    asked += "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    columns = {"category": row.get("category"), "question_id": row.get("question_id")}
    return _choice_row(asked, LETTERS[index], "mmlu-pro", columns)


def _choice_row(question: str, letter: str, rule: str, columns: Row) -> Row:
    return {"question": question, "ground_truth_answer": letter, "choice_rule": rule, **columns}


def _ifeval(row: Mapping[str, object]) -> Row:
    """`prompt`, `instruction_id_list`, and `kwargs`, the parameters of each instruction."""
    names, parameters = _texts(row, "instruction_id_list"), row["kwargs"]
    if not names or not isinstance(parameters, list) or len(parameters) != len(names):
        raise ValueError(f"has {len(names)} instructions in instruction_id_list, and kwargs={parameters!r:.60}")
    return {"question": _text(row, "prompt"), "instruction_id_list": names, "kwargs": parameters, "key": row.get("key")}


def _code_row(row: Mapping[str, object], question: str, *, prefix: str, tests: list[str]) -> Row:
    columns = {"prefix": prefix, "test_method": "function", "test_list": tests, "test_time_limit": 3}
    return {"question": question, **columns, "task_id": row.get("task_id")}


def _several_answers(row: Mapping[str, object]) -> Row:
    """OlympiadBench: a list of one text, which may itself hold several answers."""
    answers = _texts(row, "final_answer")
    if len(answers) != 1:
        raise ValueError(f"has {len(answers)} entries in final_answer; expected one")
    return _math_row(row, "question", answers[0])


def _math_row(row: Mapping[str, object], question: str, answer: object) -> Row:
    """Worked solutions are left behind: no reward reads them."""
    dropped = {question, "answer", "Answer", "solution", "Solution", "final_answer"}
    others = {key: value for key, value in row.items() if key not in dropped}
    return {"question": row[question], "ground_truth_answer": answer, **others}


def _text(row: Mapping[str, object], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"has {key}={value!r:.60}; expected a non-empty string")
    return value


def _object(row: Mapping[str, object], key: str) -> dict[str, object]:
    """An object that is written as JSON."""
    try:
        value = json.loads(_text(row, key))
    except ValueError as error:
        raise ValueError(f"has {key}={row[key]!r:.60}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"has {key}={row[key]!r:.60}; expected a JSON object")
    return value


def _texts(row: Mapping[str, object], key: str) -> list[str]:
    value = row.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"has {key}={value!r:.60}; expected a list of strings")
    return values


_GPQA = ("Question", "Correct Answer", *(f"Incorrect Answer {number}" for number in (1, 2, 3)))
_FORMS: list[tuple[set[str], Callable[[Mapping[str, object]], Row]]] = [
    ({*_GPQA}, _gpqa),
    ({"question", "options", "answer", "answer_index"}, _mmlu_pro),
    ({"prompt", "instruction_id_list", "kwargs"}, _ifeval),
    (
        {"question_content", "public_test_cases", "private_test_cases", "metadata", "contest_date"},
        _livecodebench,
    ),
    ({"prompt", "entry_point", "test"}, _humaneval),
    ({"test_list", "text"}, _mbpp),
    ({"test_list", "prompt", "code"}, _mbpp),
    ({"question", "final_answer"}, _several_answers),
    ({"question", "answer"}, lambda row: _math_row(row, "question", row["answer"])),
    ({"problem", "answer"}, lambda row: _math_row(row, "problem", row["answer"])),
    ({"Problem", "Answer"}, lambda row: _math_row(row, "Problem", row["Answer"])),
]
