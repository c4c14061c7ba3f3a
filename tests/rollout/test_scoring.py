"""What reward functions are handed: the prompt as the model read it, and the same columns in every batch."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import pytest

from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem
from dirl.data.tasks import tiny_tokenizer
from dirl.reward import RewardConfig, Rubric
from dirl.rl.rollout_group import Prompt, render_prompts
from dirl.rollout.engine import Completion
from dirl.rollout.scoring import _reward_columns, _say_renamed, score


def completion(text: str) -> Completion:
    counts = {"completion_length": 1, "num_denoising_steps": 1}
    lists = {"prompt_ids": [1], "token_ids": [1], "step_map": [1], "logprobs": None}
    return Completion(**lists, **counts, finish_reason="stop", text=text)  # type: ignore[arg-type]


def score_prompts(prompts: list[Prompt], texts: list[str], functions: list[str]) -> dict[str, list[float | None]]:
    problems = [prompt.problem for prompt in prompts]
    with Rubric(RewardConfig(functions=functions)) as rubric:
        completions = [completion(text) for text in texts]
        texts = [prompt.text for prompt in prompts]
        return score(rubric, problems, completions, prompts=texts, max_completion_length=9).parts


def test_a_template_that_opens_the_thought_counts_for_the_format(tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ '\\n<think>\\n' if add_generation_prompt }}"
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"question": "1+1=", "ground_truth_answer": "2"}] * 2))
    prompts, _ = render_prompts(load_problems(str(file)), tokenizer, system_prompt="", suffix="?", max_length=99)
    assert prompts[0].text == "1+1=?\n<think>\n"
    parts = score_prompts(prompts, ["so</think> 2", "<think>so</think> 2"], ["think_format"])
    assert parts == {"think_format": [1.0, 0.0]}


def test_columns_are_those_of_the_whole_data_set(tmp_path: Path) -> None:
    """Where only every third row has a level, a batch of the others has one too."""
    rows = [{"question": f"{n}", "ground_truth_answer": "2", **({} if n % 3 else {"level": n})} for n in range(6)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rewards_by_level.py").write_text(
        "def by_level(prompts, completions, *, level, question, **columns):\n"
        "    return [float(question[row]) if value is None else -1.0 for row, value in enumerate(level)]\n"
    )
    problems = load_problems(str(tmp_path / "rows.json"))
    assert [problem.columns for problem in problems] == [{"level": None if n % 3 else n} for n in range(6)]
    prompts = [Prompt(problem, [1]) for problem in problems]
    functions = [f"{tmp_path}/rewards_by_level.py:by_level"]
    assert score_prompts(prompts[1:3], ["", ""], functions) == {"by_level": [1.0, 2.0]}
    assert score_prompts(prompts[2:4], ["", ""], functions) == {"by_level": [2.0, -1.0]}


def test_columns_named_like_other_arguments_get_other_names(caplog: pytest.LogCaptureFixture) -> None:
    """The gold of the data set stays the gold, and nothing is lost."""
    columns = {"answer": "theirs", "prompts": "p", "finish_reason": "f", "question": "q", "data_question": "d"}
    problem = Problem("1+1=", "2", columns)
    handed = _reward_columns([problem], [completion("2")], 9)
    assert handed["answer"] == ["2"] and handed["question"] == ["1+1="] and handed["finish_reason"] == ["stop"]
    others = {name: values for name, values in handed.items() if name.startswith("data_")}
    names = ("data_answer", "data_prompts", "data_finish_reason", "data_question", "data_data_question")
    assert others == dict(zip(names, [["theirs"], ["p"], ["f"], ["d"], ["q"]], strict=True))
    with caplog.at_level(logging.WARNING):
        _say_renamed("prompts", "data_prompts_of_this_test")
    assert "the data's column 'prompts' bears the name of something else" in caplog.text
    with Rubric(RewardConfig(functions=["accuracy"])) as rubric:
        told = score(rubric, [problem], [completion("\\boxed{2}")], prompts=[""], max_completion_length=9)
    assert told.total == [1.0]
