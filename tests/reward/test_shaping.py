"""Shaped rewards against values worked out by hand from the papers' formulas."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import pytest

from dirl.reward import shaping
from dirl.reward.code_execution import extract_code


def shape(name: str, completions: list[str] | None = None, *, prompts: list[str] | None = None, **columns: Any) -> Any:
    num = len(completions) if completions is not None else len(next(iter(columns.values())))
    completions = completions if completions is not None else [""] * num
    function = shaping.REWARD_FUNCTIONS[name]
    ids: list[list[int]] = [[] for _ in range(num)]
    return function(prompts or ["p"] * num, completions, completion_ids=ids, step_maps=ids, **columns)


def test_accuracy_and_binary() -> None:
    assert shape("accuracy", is_right=[True, False]) == [1.0, 0.0]
    assert shape("binary", is_right=[True, False]) == [1.0, -1.0]


def test_boxed() -> None:
    assert shape("boxed", [r"so \boxed{7}", r"so \boxed{ }", r"so \boxed{7", "so 7"]) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        (r"Two and five make \boxed{7}.", 1.0),
        ("Two and five make\n\\[\n\\boxed{7}\n\\]\n", 1.0),
        ("So $\\boxed{\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}}$ metres.\n", 1.0),
        (r"\boxed{7}", 0.0),
        (r"\[ \boxed{7} \]", 0.0),
        (r"Either \boxed{7} or \boxed{8}.", 0.0),
        (r"So \boxed{}.", 0.0),
        (r"So \boxed{7", 0.0),
        ("So \\boxed{7}.\nBut wait.", 0.0),
        ("So 7.", 0.0),
    ],
)
def test_format(completion: str, reward: float) -> None:
    assert shape("format", [completion], finish_reason=["stop"]) == [reward]
    assert shape("format", [completion], finish_reason=["length"]) == [0.0]


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("Q", "<think>\nhm\n</think>\n7", 1.0),
        ("Q\n<think>\n", "hm</think>7", 1.0),
        ("Q", "hm</think>7", 0.0),
        ("Q <think>", "<think>hm</think>7", 0.0),
        ("Q", "<think> </think>7", 0.0),
        ("Q", "<think>hm</think> \n", 0.0),
        ("Q", "<think>hm</think>7</think>", 0.0),
        ("Q", "well <think>hm</think>7", 0.0),
        ("Q", "7", 0.0),
    ],
)
def test_think_format(prompt: str, completion: str, reward: float) -> None:
    assert shape("think_format", [completion], prompts=[prompt]) == [reward]


def test_cosine() -> None:
    rewards = shape(
        "cosine",
        is_right=[True, True, True, False, False, False, True],
        completion_length=[0, 50, 100, 0, 25, 100, 130],
        max_completion_length=[100] * 7,
    )
    share_at_quarter = (1 + math.sqrt(0.5)) / 2
    assert rewards == pytest.approx([1.0, 0.75, 0.5, -0.5, -0.5 * share_at_quarter, 0.0, 0.5])
    columns: dict[str, Any] = {
        "is_right": [True, False],
        "completion_length": [100, 100],
        "max_completion_length": [100, 100],
    }
    assert shape("cosine", **columns, longest_right=0.1, longest_wrong=-0.2) == pytest.approx([0.1, -0.2])


def test_length_is_relative_to_the_same_prompt() -> None:
    rewards = shape(
        "length",
        prompts=["a", "b", "a", "a", "b", "a"],
        is_right=[True, True, True, True, False, False],
        completion_length=[10, 7, 20, 30, 7, 10],
    )
    assert rewards == pytest.approx([0.5, 0.0, 0.0, -0.5, 0.0, 0.0])
    assert shape("length", is_right=[False, False], completion_length=[10, 30]) == pytest.approx([0.0, -0.5])


def test_repetition() -> None:
    # "a b a b a": trigrams aba, bab, aba: 2 of 3 distinct.
    assert shape("repetition", ["A b a B a", "a b", "", "a b c d"]) == pytest.approx([-1 / 3, 0.0, 0.0, 0.0])
    assert shape("repetition", ["a a a a"], ngram_size=1, max_penalty=-0.2) == pytest.approx([-0.15])
    with pytest.raises(ValueError, match="ngram_size must be at least 1, got 0"):
        shape("repetition", ["a"], ngram_size=0)


def test_soft_overlong() -> None:
    columns: dict[str, Any] = {"completion_length": [1, 50, 75, 100], "max_completion_length": [100] * 4}
    assert shape("soft_overlong", **columns) == pytest.approx([0.0, 0.0, -0.5, -1.0])
    assert shape("soft_overlong", **columns, buffer_share=0.25) == pytest.approx([0.0, 0.0, 0.0, -1.0])


def test_speed_and_its_penalty() -> None:
    columns: dict[str, Any] = {
        "is_right": [True, True, True, False, False],
        "completion_length": [10, 25, 100, 25, 9],
        "num_denoising_steps": [10, 10, 10, 10, 10],
    }
    assert shape("speed", **columns) == pytest.approx([0.0, 0.5, 1.0, 0.0, 0.0])
    assert shape("speed_penalty", **columns) == pytest.approx([0.0, 0.0, 0.0, -0.5, 0.0])
    assert shape("tokens_per_step", **columns) == [1.0, 2.5, 10.0, 2.5, 0.9]
    assert shape("speed", **columns, max_tokens_per_step=2.5) == pytest.approx([0.0, 1.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize("name", sorted(shaping.REWARD_FUNCTIONS))
def test_every_function_keeps_the_contract_and_states_its_range(name: str) -> None:
    function = shaping.REWARD_FUNCTIONS[name]
    parameters = list(inspect.signature(function).parameters.values())
    assert [parameter.name for parameter in parameters[:2]] == ["prompts", "completions"]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in parameters[2:-1])
    assert "Range" in (function.__doc__ or "")
    columns: dict[str, Any] = {
        "answer": [],
        "is_right": [],
        "completion_length": [],
        "max_completion_length": [],
        "num_denoising_steps": [],
    }
    assert function([], [], completion_ids=[], step_maps=[], finish_reason=[], **columns) == []


HOSTILE_TEXTS = {
    "boxes": r"\boxed{" * 150_000,
    "box and blanks": "\\boxed" + " " * 1_000_000,
    "boxes and blanks": ("\\boxed" + " " * 100) * 10_000,
    "braces": "{" * 50_000 + "}" * 50_000,
    "one long line": "a" * 1_000_000,
    "words": "a " * 500_000,
    "blanks": " " * 1_000_000,
    "line feeds": "\n" * 1_000_000,
    "thoughts": "<think>" * 150_000,
    "thoughts ended": "<think>" + "</think>" * 120_000,
    "nul": "\0" * 1_000_000,
    "unicode": "\u0130\ufdfa\u200b\U0001f600\ud800" * 100_000,
    "fences": "```" + "`" * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE_TEXTS.values(), ids=HOSTILE_TEXTS)
def test_hostile_texts_take_no_time(text: str) -> None:
    start = time.process_time()
    judges_of_other_rows = {"code", "reasoning_gym", "instructions"}
    for name in sorted(shaping.REWARD_FUNCTIONS.keys() - judges_of_other_rows):
        columns = {
            "is_right": [False],
            "completion_length": [9],
            "num_denoising_steps": [3],
            "finish_reason": ["stop"],
            "max_completion_length": [10],
            "choice_rule": ["mmlu-pro"],
            "answer": ["A"],
        }
        function = shaping.REWARD_FUNCTIONS[name]
        (reward,) = function(["Q"], [text], completion_ids=[[1]], step_maps=[[1]], **columns)
        assert reward is not None and math.isfinite(reward), name
    assert extract_code(text) is None
    assert time.process_time() - start < 10
