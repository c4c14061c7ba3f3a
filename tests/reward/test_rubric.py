"""Names, weights and columns -> rewards; and every way in which a reward can be broken is an error that says so."""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dirl.reward import RewardConfig, RewardError, Rubric, Scores, combine_parts, reward_function
from dirl.reward.shaping import REWARD_FUNCTIONS


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone after it."""
    known = dict(REWARD_FUNCTIONS)
    yield
    REWARD_FUNCTIONS.clear()
    REWARD_FUNCTIONS.update(known)


def score(config: RewardConfig, completions: list[str], **columns: list[Any]) -> Scores:
    num = len(completions)
    ids = [[number] for number in range(num)]
    with Rubric(config) as rubric:
        return rubric.score(["p"] * num, completions, completion_ids=ids, step_maps=ids, columns=columns)


def score_values(values: object, *, num: int = 2) -> Scores:
    @reward_function("mine")
    def mine(prompts: list[str], completions: list[str], **columns: Any) -> Any:
        return values

    return score(RewardConfig(functions=["mine"]), ["x"] * num)


def test_accuracy_is_the_default() -> None:
    scores = score(RewardConfig(), [r"\boxed{7}", r"\boxed{8}", "7"], answer=["7", "7", "7"])
    assert scores.total == [1.0, 0.0, 0.0]
    assert scores.parts == {"accuracy": [1.0, 0.0, 0.0]}
    assert {name: count for name, count in scores.counters.items() if count} == {"right": 1, "wrong": 1, "no_answer": 1}


def test_weighted_sum_with_parameters() -> None:
    config = RewardConfig(
        functions=["accuracy", "cosine", "boxed"],
        weights=[2.0, 10.0, 0.5],
        parameters={"cosine": {"longest_right": 0.1, "longest_wrong": -0.3}},
    )
    columns = {"completion_length": [9, 9], "max_completion_length": [9, 9]}
    scores = score(config, [r"\boxed{7}", "7"], answer=["7", "7"], **columns)
    assert scores.parts["cosine"] == pytest.approx([0.1, -0.3])
    assert scores.total == pytest.approx([2.0 + 1.0 + 0.5, -3.0])


def test_nothing_is_graded_when_no_function_asks_for_it() -> None:
    scores = score(RewardConfig(functions=["boxed"]), [r"\boxed{7}"])
    assert scores == Scores([1.0], {"boxed": [1.0]}, {})


def test_a_function_gets_what_the_contract_says() -> None:
    seen: dict[str, Any] = {}

    @reward_function("mine")
    def mine(prompts, completions, *, completion_ids, step_maps, is_right, scale=1.0, **columns):  # type: ignore[no-untyped-def]
        seen.update(columns, prompts=prompts, ids=completion_ids, maps=step_maps, is_right=is_right)
        return [scale, scale]

    config = RewardConfig(functions=["mine"], parameters={"mine": {"scale": 3.0}})
    scores = score(config, [r"\boxed{1}", r"\boxed{2}"], answer=["1", "1"], level=[4, 5])
    assert scores.total == [3.0, 3.0]
    assert seen == {
        "prompts": ["p", "p"],
        "ids": [[0], [1]],
        "maps": [[0], [1]],
        "is_right": [True, False],
        "answer": ["1", "1"],
        "level": [4, 5],
    }


def test_functions_from_files_and_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def {}(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    (tmp_path / "my rewards.py").write_text(code.format("from_file"))
    (tmp_path / "rewards_of_mine.py").write_text(code.format("from_module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    functions = [f"{tmp_path}/my rewards.py:from_file", "rewards_of_mine:from_module"]
    scores = score(RewardConfig(functions=functions), ["abc"])
    assert scores.parts == {"from_file": [3.0], "from_module": [3.0]}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("acuracy", "unknown reward function 'acuracy'; did you mean 'accuracy'"),
        ("xyz", r"unknown reward function 'xyz'; there are \['accuracy', "),
        ("no_such_module:f", "cannot load no_such_module: ModuleNotFoundError: No module named"),
        ("/no/such/file.py:f", "cannot load /no/such/file.py: .*No such file"),
        ("math:no_such_name", "math has no function 'no_such_name'"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_what_cannot_be_resolved_is_an_error(reference: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Rubric(RewardConfig(functions=[reference]))


def test_a_file_with_a_syntax_error_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match=r"cannot load .*bad.py: SyntaxError: invalid syntax"):
        Rubric(RewardConfig(functions=[f"{tmp_path}/bad.py:f"]))


def test_names_are_unique() -> None:
    with pytest.raises(RewardError, match="names 'boxed' twice"):
        Rubric(RewardConfig(functions=["boxed", "dirl.reward.shaping:boxed"]))
    with pytest.raises(RewardError, match="'accuracy' is taken by dirl\\.reward\\.shaping\\.accuracy"):
        reward_function("accuracy")(lambda **columns: [])


def test_a_notebook_cell_may_be_run_again() -> None:
    for value in (1.0, 2.0):

        @reward_function("mine")
        def mine(prompts: list[str], completions: list[str], value: float = value, **columns: Any) -> list[float]:
            return [value]

    assert score(RewardConfig(functions=["mine"]), ["x"]).total == [2.0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"cosine": {"longest": 1.0}},
            "reward.parameters.cosine.longest: no such parameter; cosine has .*longest_right",
        ),
        ({"cosine": {"is_right": 1.0}}, "reward.parameters.cosine.is_right: no such parameter"),
        ({"speed": {}}, r"reward.parameters.speed: no such reward function; there are \['cosine'\]"),
    ],
)
def test_an_unknown_parameter_is_an_error(parameters: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        Rubric(RewardConfig(functions=["cosine"], parameters=parameters))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'mine' returned 1 rewards for 2 completions"),
        ([1.0, math.nan], "'mine', row 1: .* got nan"),
        ([-math.inf, 1.0], "'mine', row 0: .* got -inf"),
        ([1.0, "1.0"], "'mine', row 1: .* got '1.0'"),
        ([[1.0], 1.0], r"'mine', row 1: other rows have a list of steps, got 1.0"),
        ([[1.0], [math.nan]], r"'mine', row 1: .* got nan"),
        ([[1.0], [None]], r"'mine', row 1: the reward of a step is a number, got None"),
        ([1.0, 1j], "'mine', row 1: .* got 1j"),
        (np.array([[1.0], [2.0]]), r"'mine' must return a list, or an array or tensor of one dimension; got array\("),
        (torch.tensor(1.0), r"'mine' must return a list, .*; got tensor\(1"),
        ({"a": 1.0, "b": 2.0}, r"'mine' must return a list, .*; got \{'a'"),
        ({1.0, 2.0}, r"'mine' must return a list, .*; got \{1.0"),
        (b"ab", r"'mine' must return a list, .*; got b'ab'"),
        (range(2), r"'mine' must return a list, .*; got range\(0, 2\)"),
        (iter([1.0, 2.0]), r"'mine' must return a list, .*; got <list_iterator"),
        ([1.0, {1: 2}], r"'mine', row 1: .* got \{1: 2\}"),
        ([1.0, Decimal(1)], r"'mine', row 1: .* got Decimal\('1'\)"),
        (np.array(["1", "2"]), r"'mine', row 0: .* got '1'"),
        ([1.0, 10**400], r"'mine', row 1: .* a number from -1e\+09 to 1e\+09, got 1000"),
        ([1.0, 1e300], r"'mine', row 1: .* a number from -1e\+09 to 1e\+09, got 1e\+300"),
        ([[1e9, 1e9], [0.0]], r"'mine', row 0: .* got 2000000000.0"),
        ("ab", "'mine' must return a list, .*; got 'ab'"),
        (None, "'mine' must return a list, .*; got None"),
        (3.0, "'mine' must return a list, .*; got 3.0"),
        ([None, 1.0], r"row 0: every reward function returned None: \['mine'\]"),
    ],
)
def test_a_broken_reward_names_function_row_and_value(values: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_values(values)


def test_an_exception_names_the_function() -> None:
    """And the line of the user's file at which it came about."""
    message = r"'cosine' raised KeyError: 'completion_length' \(.*shaping\.py, line \d+\)"
    with pytest.raises(RewardError, match=message):
        score(RewardConfig(functions=["cosine"]), [r"\boxed{7}"], answer=["7"])


def test_whatever_a_function_raises_or_returns_is_one_line() -> None:
    class Hostile(BaseException):
        def __repr__(self) -> str:
            raise RuntimeError

        __str__ = __len__ = __abs__ = __repr__  # type: ignore[assignment]

    @reward_function("mine")
    def mine(**columns: Any) -> Any:
        raise columns["error"][0]

    for error, words in ((Hostile(), "a Hostile"), (GeneratorExit("a\nb"), "GeneratorExit: a b")):
        with pytest.raises(RewardError, match=rf"^reward function 'mine' raised {words} \(.*, line \d+\)$"):
            score(RewardConfig(functions=["mine"]), ["x"], error=[error])
    for value in (Hostile(), [Hostile()], np.array([[1.0], [2.0]]), torch.zeros(1, device="meta")):
        REWARD_FUNCTIONS.pop("mine")
        with pytest.raises(RewardError, match=r"^reward function 'mine'.* (got|cannot be read: ).*$"):
            score_values(value, num=1)


def test_what_a_function_does_to_the_process_is_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @reward_function("mine")
    def mine(completions: list[str], **columns: Any) -> list[float]:
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(False)
        print("said")
        sys.stdout.close()
        return [1.0]

    here = Path.cwd()
    assert score(RewardConfig(functions=["mine"]), ["x"]).total == [1.0]
    assert (Path.cwd(), torch.get_default_dtype(), torch.is_grad_enabled()) == (here, torch.float32, True)
    print("and after")
    assert capsys.readouterr().out == "said\nand after\n"


@pytest.mark.parametrize(
    "values",
    [
        *([1, 0], [True, False], np.array([1.0, 0.0], dtype=np.float32), [np.int64(1), np.bool_(False)], (1.0, 0.0)),
        *(torch.tensor([1.0, 0.0], dtype=torch.bfloat16), torch.tensor([1.0, 0.0], requires_grad=True)),
        [torch.tensor(1), torch.tensor(False)],
    ],
)
def test_numbers_of_any_kind_are_rewards(values: object) -> None:
    total = score_values(values).total
    assert total == [1.0, 0.0]
    assert {type(reward) for reward in total} == {float}


def test_rewards_get_copies() -> None:
    """What one does to its arguments reaches neither the caller's lists nor the next function."""
    seen: dict[str, Any] = {}

    @reward_function("vandal")
    def vandal(prompts, completions, *, completion_ids, step_maps, is_right, level, metadata, **columns):  # type: ignore[no-untyped-def]
        completion_ids[0][0] = step_maps[0][0] = 40
        metadata[0]["deep"].append(1)
        for values in (prompts, completions, completion_ids, is_right, level):
            values.clear()
        return [1.0, 1.0]

    @reward_function("witness")
    def witness(prompts, completions, **columns):  # type: ignore[no-untyped-def]
        seen.update(columns, completions=completions)
        return [1.0, 1.0]

    texts, ids, metadata = [r"\boxed{1}", "b"], [[1, 2], [3]], [{"deep": []}, None]
    with Rubric(RewardConfig(functions=["vandal", "witness", "accuracy"])) as rubric:
        columns = {"answer": ["1", "1"], "level": [4, 5], "metadata": metadata}
        scores = rubric.score(["p", "p"], texts, completion_ids=ids, step_maps=ids, columns=columns)
    assert scores.parts["accuracy"] == [1.0, 0.0]
    assert (texts, ids, metadata, columns["level"]) == (
        [r"\boxed{1}", "b"],
        [[1, 2], [3]],
        [{"deep": []}, None],
        [4, 5],
    )
    assert seen == {"completions": texts, "completion_ids": ids, "step_maps": ids, **columns}


def test_leaving_the_interpreter_is_an_error() -> None:
    @reward_function("leaver")
    def leaver(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        sys.exit(0)

    with pytest.raises(RewardError, match=r"'leaver' raised SystemExit: 0 \(.*test_rubric.py, line \d+\)"):
        score(RewardConfig(functions=["leaver"]), ["x"])


REWARD_FILE = """
from __future__ import annotations
import multiprocessing
from dataclasses import dataclass
from neighbour_of_rewards import SCALE

@dataclass
class Weight:
    value: float

def times(text):
    return SCALE * len(text)

def pooled(prompts, completions, **columns):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [Weight(number).value for number in pool.map(times, completions)]
"""


def test_a_reward_file_is_a_module_like_any_other(tmp_path: Path) -> None:
    """Postponed annotations of dataclasses, neighbours, and pools of workers that import it anew."""
    (tmp_path / "neighbour_of_rewards.py").write_text("SCALE = 2.0\n")
    (tmp_path / "rewards_with_a_pool.py").write_text(REWARD_FILE)
    config = RewardConfig(functions=[f"{tmp_path}/rewards_with_a_pool.py:pooled"])
    assert score(config, ["abc", ""]).total == [6.0, 0.0]


def test_reward_files_may_share_their_name_with_a_module(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        code = (
            f"def {folder}(prompts, completions, **columns):\n    return [float({ord(folder)}) for _ in completions]\n"
        )
        (tmp_path / folder / "statistics.py").write_text(code)
    config = RewardConfig(functions=[f"{tmp_path}/{folder}/statistics.py:{folder}" for folder in ("a", "b")])
    assert score(config, [""]).parts == {"a": [97.0], "b": [98.0]}
    assert statistics.mean([1]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [("import sys; sys.exit(0)", "SystemExit: 0"), ("1 / 0", "ZeroDivisionError: division by zero")],
)
def test_a_file_that_fails_is_named(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "failing_rewards.py").write_text(body)
    with pytest.raises(RewardError, match=f"cannot load .*failing_rewards.py: {message}"):
        Rubric(RewardConfig(functions=[f"{tmp_path}/failing_rewards.py:f"]))


def test_none_leaves_a_reward_out_of_the_sum() -> None:
    @reward_function("mine")
    def mine(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None, 3.0]

    scores = score(RewardConfig(functions=["boxed", "mine"], weights=[1.0, 2.0]), [r"\boxed{7}", ""])
    assert scores.parts["mine"] == [None, 3.0]
    assert scores.total == [1.0, 6.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"answer": ["7"]}, "column 'answer' has 1 entries for 2 completions"),
        ({}, r"grading needs the column 'answer' \(the golds\); there are \[\]"),
        ({"answer": ["7", 7]}, "column 'answer', row 1: a gold answer is a string, got 7"),
        ({"answer": ["7", "7"], "prompts": ["a", "b"]}, r"columns \['prompts'\] bear names"),
    ],
)
def test_bad_columns_are_errors(columns: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score(RewardConfig(), ["7", "7"], **columns)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"functions": []}, "functions is empty"),
        ({"weights": [1.0, 2.0]}, "weights needs one number per function, got 2 for 1"),
        ({"grader_workers": -1}, "grader_workers must be at least 0"),
        ({"grader_timeout_seconds": 0.0}, "grader_timeout_seconds must be above 0, got 0.0"),
    ],
)
def test_a_bad_config_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(**fields)


def test_config_works_with_omegaconf() -> None:
    schema = OmegaConf.structured(RewardConfig)
    merged = OmegaConf.merge(schema, {"functions": ["boxed"], "parameters": {"cosine": {"longest_right": 1}}})
    config = OmegaConf.to_object(merged)
    assert config == RewardConfig(functions=["boxed"], parameters={"cosine": {"longest_right": 1.0}})
    bad_fields: list[dict[str, Any]] = [{"function": []}, {"combine": "product"}, {"weights": ["heavy"]}]
    for bad in bad_fields:
        with pytest.raises(OmegaConfBaseException):
            OmegaConf.merge(schema, bad)


def test_combine_sums_first() -> None:
    parts = {"a": [1.0, 0.0, None], "b": [10.0, None, 20.0]}
    assert combine_parts(parts, [1.0, 0.1]) == pytest.approx([2.0, 0.0, 2.0])


def test_combine_normalizes_each_part_in_its_group() -> None:
    a, b = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [5.0, 7.0, 9.0, None, 2.0, 4.0]
    combined = combine_parts({"a": a, "b": b}, [1.0, 0.5], group_size=3, combine="normalize_then_sum")

    def standard(values: list[float]) -> list[float]:
        return [(value - statistics.mean(values)) / statistics.pstdev(values) for value in values]

    first = [x + 0.5 * y for x, y in zip(standard([1.0, 0.0, 0.0]), standard([5.0, 7.0, 9.0]), strict=True)]
    second = [0.0, *(0.5 * y for y in standard([2.0, 4.0]))]
    assert combined == pytest.approx(first + second)


def test_a_group_without_spread_gives_exact_zeros() -> None:
    assert combine_parts({"a": [0.3] * 8}, [1.0], group_size=8, combine="normalize_then_sum") == [0.0] * 8


def test_combine_refuses_broken_groups_and_weights() -> None:
    with pytest.raises(ValueError, match="3 completions are no whole number of groups of 2"):
        combine_parts({"a": [1.0] * 3}, [1.0], group_size=2, combine="normalize_then_sum")
    with pytest.raises(ValueError, match="got 2 weights for \\['a'\\]"):
        combine_parts({"a": [1.0]}, [1.0, 2.0])
