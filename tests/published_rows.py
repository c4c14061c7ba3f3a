"""Rows in the exact form four benchmarks are published in; their content is made up here."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

GPQA = {
    "Record ID": "rec1",
    "Question": "Which planet is largest?\n",
    "Correct Answer": "Jupiter\n",
    "Incorrect Answer 1": "Mars",
    "Incorrect Answer 2": "Venus",
    "Incorrect Answer 3": "Earth",
    "High-level domain": "Physics",
    "Explanation": "It is.",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "What is 3 + 4?",
    "options": ["5", "6", "7", "N/A", "N/A"],
    "answer": "C",
    "answer_index": 2,
    "cot_content": "",
    "category": "math",
    "src": "made up",
}
IFEVAL = {
    "key": 1001,
    "prompt": "Say something about rain. No commas, and at least three words.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{"num_words": None, "relation": None}, {"num_words": 3, "relation": "at least"}],
}


def packed(cases: list[dict[str, str]], protocol: int = 4) -> str:
    """Private tests as they are published."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases), protocol=protocol))).decode()


def contest_row(
    public: list[tuple[str, str]], private: list[tuple[str, str]], *, name: str = "", **changes: Any
) -> dict[str, Any]:
    """A row of LiveCodeBench; `name`: of the function that is called, else standard input is read."""
    kind = "functional" if name else "stdin"
    cases = [[{"input": i, "output": o, "testtype": kind} for i, o in pairs] for pairs in (public, private)]
    starter = f"class Solution:\n    def {name}(self, numbers: List[int]) -> int:\n        " if name else ""
    return {
        "question_title": "Made up",
        "question_content": "Double what you are given.",
        "platform": "leetcode" if name else "atcoder",
        "question_id": "made_up_a",
        "contest_id": "made_up",
        "contest_date": "2025-01-18T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(cases[0]),
        "private_test_cases": packed(cases[1]),
        "metadata": json.dumps({"func_name": name} if name else {}),
        **changes,
    }
