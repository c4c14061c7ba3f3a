"""Rows of public benchmarks, in the form they are published in, -> rows of the form that dirl reads.

Which form a row has is told by its columns; a row of no known form is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Row = dict[str, object]

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


def _texts(row: Mapping[str, object], key: str) -> list[str]:
    value = row.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"has {key}={value!r:.60}; expected a list of strings")
    return values


_FORMS: list[tuple[set[str], Callable[[Mapping[str, object]], Row]]] = [
    ({"prompt", "entry_point", "test"}, _humaneval),
    ({"test_list", "text"}, _mbpp),
    ({"test_list", "prompt", "code"}, _mbpp),
    ({"question", "final_answer"}, _several_answers),
    ({"question", "answer"}, lambda row: _math_row(row, "question", row["answer"])),
    ({"problem", "answer"}, lambda row: _math_row(row, "problem", row["answer"])),
    ({"Problem", "Answer"}, lambda row: _math_row(row, "Problem", row["Answer"])),
]
