"""A scripted engine through the whole evaluation; then the tiny model through the command line."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl import cli
from dirl.config import load_config
from dirl.data.problems import Problem
from dirl.data.tasks import noisy_sums_problems, tiny_tokenizer
from dirl.errors import UserError
from dirl.eval import evaluate
from dirl.eval.eval_config import EvalConfig, EvalDataConfig, Mode, decoding_modes
from dirl.eval.evaluate import Evaluator
from dirl.files import read_json_lines
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.sdar import SDARConfig
from dirl.model.tiny import save_tiny_model
from dirl.reward import code_execution
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rollout.engine import EngineConfig, SamplingConfig
from dirl.rollout.watch import Observer
from dirl.training.full_parameters import digest_of_weights
from tests.eval.scripted_engine import Script, ScriptedEngine

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER: PreTrainedTokenizerBase = tiny_tokenizer()
CONTRACT = {
    *("dataset", "mode", "confidence_threshold", "temperature", "avg_at_k", "pass_at_k", "maj_at_k", "num_samples"),
    *("num_problems", "standard_error", "tokens_per_step", "output_length_mean", "output_length_p50"),
    *("output_length_p95", "truncated", "no_answer", "tokens_per_s", "seconds"),
}


def true_sum(question: str) -> int:
    return sum(map(int, question.split("=")[0].split("+")))


def often_right(question: str, seed: int, sampling: SamplingConfig) -> str:
    """Right more often when few tokens are revealed at once; silent now and then. Depends on the seed."""
    chance = random.Random(seed).random()
    if chance > 0.9:
        return "?"
    limit = 0.7 if sampling.unmasking_strategy == "low_confidence_static" else 0.5
    return f"\\boxed{{{true_sum(question) + (chance > limit)}}}"


class World:
    """Stands in for model and engine of `run_evaluation`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script: Script = often_right
        self.dies_after: int | None = None
        self.model = nn.Linear(2, 2)
        self.model.config = SDARConfig()  # type: ignore[assignment]
        self.engines: list[ScriptedEngine] = []
        monkeypatch.setattr(evaluate, "tokenizer_of", lambda path: TOKENIZER)
        monkeypatch.setattr(evaluate, "load_model", lambda config, tokenizer: self.model)
        monkeypatch.setattr(evaluate, "build_engine", self._build)

    def _build(self, *_: object, observer: Observer | None) -> ScriptedEngine:
        self.engines.append(ScriptedEngine(TOKENIZER, self.script, dies_after=self.dies_after))
        return self.engines[-1]

    @property
    def num_generated(self) -> int:
        return self.engines[-1].num_generated


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def config(directory: Path, **changes: Any) -> EvalConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "num_samples": 4,
        "chunk_size": 5,
        "modes": ["dynamic", "static", "greedy"],
        "data": EvalDataConfig(datasets=["task:noisy_sums"], limit=6),
        "sampling": SamplingConfig(max_completion_length=48),
    }
    return EvalConfig(**{**defaults, **changes})


def results_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "results.json").read_text()))


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl in order of what they are, without the time they took."""
    lines = read_json_lines(directory / "samples.jsonl", "a sample")
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in lines]
    return sorted(rows, key=lambda row: (row["dataset"], row["mode"], row["problem"], row["sample"]))


def evaluate_script(script: Script, problems: list[Problem], mode: Mode, **options: Any) -> Any:
    with Rubric(RewardConfig()) as rubric:
        return Evaluator(ScriptedEngine(TOKENIZER, script), TOKENIZER, rubric, **options).evaluate(problems, mode)[0]


def test_numbers_of_a_known_script() -> None:
    """1+1= is answered right twice in four, 2+2= never, in lengths that can be counted by hand."""
    answers = {
        "1+1=": iter(["\\boxed{2}", "\\boxed{2}", "\\boxed{3}", "x"]),
        "2+2=": iter(["ab", "ab", "ab", "a" * 30]),
    }
    problems = [Problem("1+1=", "2", {}), Problem("2+2=", "4", {})]
    sampling = SamplingConfig(max_completion_length=20)
    result = evaluate_script(lambda question, *_: next(answers[question]), problems, Mode("m", sampling, 4))
    lengths = [4, 4, 4, 2, 3, 3, 3, 20]  # with EOS; \boxed{ is one token, and the last has no EOS
    steps = [2, 2, 2, 1, 2, 2, 2, 10]
    assert (result.num_problems, result.num_samples) == (2, 4)
    assert result.avg_at_k == 0.25
    assert result.pass_at_k == pytest.approx({"1": 0.25, "2": 5 / 12, "4": 0.5})
    assert result.maj_at_k == 0.5
    assert result.standard_error == pytest.approx(0.25)
    assert result.standard_error_sampling == pytest.approx((0.25 / 3) ** 0.5 / 2)
    assert result.tokens_per_step == pytest.approx(sum(lengths) / sum(steps))
    assert result.tokens_per_step_mean == pytest.approx(sum(n / s for n, s in zip(lengths, steps, strict=True)) / 8)
    assert result.output_length_mean == sum(lengths) / 8
    assert (result.output_length_p50, result.output_length_p95) == (3, 20)
    assert (result.truncated, result.no_answer) == (1 / 8, 5 / 8)
    assert result.seconds > 0
    assert result.tokens_per_s == pytest.approx(sum(lengths) / result.seconds)


def test_seeds_belong_to_problem_and_sample() -> None:
    seen: list[tuple[str, int]] = []

    def note(question: str, seed: int, sampling: SamplingConfig) -> str:
        seen.append((question, seed))
        return "1"

    problems, mode = noisy_sums_problems(3, 0), Mode("m", SamplingConfig(), 2)
    with Rubric(RewardConfig()) as rubric:
        evaluator = Evaluator(ScriptedEngine(TOKENIZER, note), TOKENIZER, rubric, seed=1)
        evaluator.evaluate(problems, mode)
        together = list(seen)
        seen.clear()
        for which in [(2, 1), (0, 0), (2, 0), (1, 1), (0, 1), (1, 0)]:
            (pair,) = evaluator.judge(problems, mode, [which])
            assert (pair[0].problem, pair[0].sample) == which
    assert len({seed for _, seed in together}) == 6
    assert sorted(together) == sorted(seen)
    seen.clear()
    evaluate_script(note, problems, mode, seed=2)
    assert not {seed for _, seed in together} & {seed for _, seed in seen}


def test_the_prompt_is_rendered_as_asked() -> None:
    problem = Problem("1+1=", "2", {})
    result = evaluate_script(
        lambda question, *_: "\\boxed{2}" if question == "sys1+1= now" else "no",
        [problem],
        Mode("m", SamplingConfig(), 1),
        system_prompt="sys",
        suffix=" now",
    )
    assert result.avg_at_k == 1.0


def test_a_rubric_without_accuracy_counts_rewards_above_zero() -> None:
    with Rubric(RewardConfig(functions=["boxed"])) as rubric:
        engine = ScriptedEngine(TOKENIZER, lambda question, *_: "\\boxed{0}" if question == "1+1=" else "0")
        problems = [Problem("1+1=", "2", {}), Problem("2+2=", "4", {})]
        result = Evaluator(engine, TOKENIZER, rubric).evaluate(problems, Mode("m", SamplingConfig(), 1))[0]
    assert result.avg_at_k == 0.5


def test_accuracy_alone_decides_beside_other_rewards() -> None:
    with Rubric(RewardConfig(functions=["boxed", "accuracy"])) as rubric:
        engine = ScriptedEngine(TOKENIZER, lambda question, *_: "\\boxed{2}")  # a box earns a reward, right or wrong
        problems = [Problem("1+1=", "2", {}), Problem("2+2=", "4", {})]
        result = Evaluator(engine, TOKENIZER, rubric).evaluate(problems, Mode("m", SamplingConfig(), 1))[0]
    assert result.avg_at_k == 0.5


def test_modes() -> None:
    sampling = SamplingConfig(temperature=0.7, confidence_threshold=0.8, unmasking_strategy="sequential", top_k=3)
    modes = decoding_modes(["dynamic", "static", "greedy", "custom"], [0.5, 0.8, 1.0], sampling, 4)
    found = {mode.name: (mode.sampling, mode.num_samples) for mode in modes}
    dynamic = replace(sampling, unmasking_strategy="low_confidence_dynamic")
    assert found == {
        "dynamic": (dynamic, 4),
        "static": (replace(sampling, unmasking_strategy="low_confidence_static"), 4),
        "greedy": (replace(dynamic, temperature=0.0), 1),
        "custom": (sampling, 4),
        "dynamic@0.5": (replace(dynamic, confidence_threshold=0.5), 4),
        "dynamic@1": (replace(dynamic, confidence_threshold=1.0), 4),
    }


def test_static_is_one_token_per_step_whatever_the_configuration() -> None:
    (mode,) = decoding_modes(["static"], [], SamplingConfig(denoising_steps=2), 1)
    assert mode.sampling.denoising_steps == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"modes": []}, "modes is empty"),
        ({"confidence_thresholds": [1.5]}, r"confidence_thresholds\[0\] must be at least 0 and at most 1, got 1.5"),
        ({"reward": RewardConfig(functions=["boxed"])}, "reward.functions must hold accuracy or code or reasoning_gym"),
        ({"sampling": SamplingConfig(unmasking_strategy="random")}, "sampling.unmasking_strategy=random is read by"),
        ({"sampling": SamplingConfig(denoising_steps=2)}, "sampling.denoising_steps=2 is read by the mode custom"),
    ],
)
def test_bad_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_artefacts(world: World, tmp_path: Path) -> None:
    report = evaluate.run_evaluation(config(tmp_path, confidence_thresholds=[0.5]))
    assert report == tmp_path / "report.md"
    assert world.engines[-1].is_closed
    results = results_of(tmp_path)
    assert {"model", "config", "versions", "results"} <= results.keys()
    assert results["config"]["sampling"]["max_completion_length"] == 48
    assert "torch" in results["versions"]
    by_mode = {row["mode"]: row for row in results["results"]}
    assert list(by_mode) == ["dynamic", "static", "greedy", "dynamic@0.5"]
    for row in by_mode.values():
        assert row.keys() >= CONTRACT
        assert row["num_problems"] == 6
    assert [by_mode[mode]["confidence_threshold"] for mode in by_mode] == [0.9, None, 0.9, 0.5]
    assert [by_mode[mode]["temperature"] for mode in by_mode] == [1.0, 1.0, 0.0, 1.0]
    assert [by_mode[mode]["num_samples"] for mode in by_mode] == [4, 4, 1, 4]
    assert by_mode["static"]["tokens_per_step"] == 1.0
    assert by_mode["dynamic"]["tokens_per_step"] > 1.2
    for name in ("thresholds", "throughput"):
        assert (tmp_path / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(plots/{name}.png)" in (tmp_path / "report.md").read_text()
    assert load_config(EvalConfig, tmp_path / "config.yaml") == config(tmp_path, confidence_thresholds=[0.5])


def test_every_sample_is_on_disk_and_adds_up_to_the_results(world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path))
    problems = noisy_sums_problems(6, 0, "heldout")
    rows = rows_of(tmp_path)
    for result in results_of(tmp_path)["results"]:
        mine = [row for row in rows if row["mode"] == result["mode"]]
        k = result["num_samples"]
        assert [(row["problem"], row["sample"]) for row in mine] == [(p, s) for p in range(6) for s in range(k)]
        for row in mine:
            is_right = row["text"] == f"\\boxed{{{true_sum(problems[row['problem']].question)}}}"
            assert row["correct"] is is_right
            assert len(row["token_ids"]) == len(row["step_map"]) == row["completion_length"]
            assert row["num_denoising_steps"] == row["step_map"][-1]
        assert result["avg_at_k"] == pytest.approx(sum(row["correct"] for row in mine) / len(mine))


@pytest.mark.parametrize("dies_after", [0, 3, 5, 23, 26, 48])
def test_a_killed_evaluation_continues(dies_after: int, world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path / "uninterrupted"))
    total = world.num_generated
    assert total == 6 * (4 + 4 + 1)
    world.dies_after = dies_after
    with pytest.raises(KeyboardInterrupt):
        evaluate.run_evaluation(config(tmp_path / "killed"))
    assert world.engines[-1].is_closed
    num_kept = len(rows_of(tmp_path / "killed")) if (tmp_path / "killed/samples.jsonl").exists() else 0
    assert dies_after - 5 < num_kept <= dies_after  # at most the chunk under way is lost
    world.dies_after = None
    evaluate.run_evaluation(config(tmp_path / "killed"))
    assert world.num_generated == total - num_kept
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "uninterrupted")
    timed = ("seconds", "tokens_per_s")
    killed, whole = (
        [
            {key: value for key, value in row.items() if key not in timed}
            for row in results_of(tmp_path / name)["results"]
        ]
        for name in ("killed", "uninterrupted")
    )
    assert killed == whole


def test_a_finished_evaluation_decodes_nothing_again(world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path))
    before = results_of(tmp_path)["results"]
    evaluate.run_evaluation(config(tmp_path))
    assert world.num_generated == 0
    assert results_of(tmp_path)["results"] == before


def test_more_samples_and_modes_are_added_to_what_is_there(world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path / "grown", num_samples=2, modes=["dynamic"]))
    evaluate.run_evaluation(config(tmp_path / "grown", modes=["dynamic", "static"]))
    assert world.num_generated == 6 * (2 + 4)
    evaluate.run_evaluation(config(tmp_path / "at once", modes=["dynamic", "static"], chunk_size=100))
    assert rows_of(tmp_path / "grown") == rows_of(tmp_path / "at once")
    evaluate.run_evaluation(config(tmp_path / "grown", num_samples=1, modes=["dynamic"]))
    (result,) = results_of(tmp_path / "grown")["results"]
    assert (result["num_samples"], world.num_generated) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"sampling": SamplingConfig(max_completion_length=48, temperature=0.9)}, "sampling.temperature"),
        ({"data": EvalDataConfig(limit=7)}, "problems.task:noisy_sums"),
        ({"data": EvalDataConfig(limit=6, suffix="?")}, "data.suffix"),
        ({"model": ModelConfig(dtype="bfloat16")}, "model.dtype"),
        ({"reward": RewardConfig(answer_extraction="text")}, "reward.answer_extraction"),
        ({"engine": EngineConfig(approximate_cache="dual")}, "engine.approximate_cache"),
    ],
)
def test_a_changed_configuration_is_not_mixed_in(
    changes: dict[str, Any], key: str, world: World, tmp_path: Path
) -> None:
    evaluate.run_evaluation(config(tmp_path, modes=["greedy"]))
    with pytest.raises(ValueError, match=rf"holds samples of another configuration \({key}: .*overwrite=true"):
        evaluate.run_evaluation(config(tmp_path, modes=["greedy"], **changes))
    assert len(world.engines) == 1  # refused before anything is built
    evaluate.run_evaluation(config(tmp_path, modes=["greedy"], overwrite=True, **changes))
    assert world.num_generated == len(rows_of(tmp_path)) == changes.get("data", EvalDataConfig(limit=6)).limit


def test_a_changed_directory_under_the_same_name_is_not_mixed_in(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate.run_evaluation(config(tmp_path, modes=["greedy"]))
    with monkeypatch.context() as changed:
        changed.setattr(TOKENIZER, "chat_template", f"{TOKENIZER.chat_template} ")
        with pytest.raises(UserError, match=r"another configuration \(tokenizer.chat_template"):
            evaluate.run_evaluation(config(tmp_path, modes=["greedy"]))
    world.model.config = SDARConfig(block_size=8)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"another configuration \(config.json block_size: .*4.*8"):
        evaluate.run_evaluation(config(tmp_path, modes=["greedy"]))


@pytest.mark.parametrize(
    "changes",
    [{"chunk_size": 2}, {"reward": RewardConfig(grader_timeout_seconds=9.0)}, {"model": ModelConfig(path="elsewhere")}],
)
def test_what_changes_no_sample_may_change(changes: dict[str, Any], world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path))
    evaluate.run_evaluation(config(tmp_path, **changes))
    assert world.num_generated == 0


def test_a_model_trained_again_is_another_model(world: World, tmp_path: Path) -> None:
    evaluate.run_evaluation(config(tmp_path))
    with torch.no_grad():
        world.model.weight[1, 1] += 1e-6
    with pytest.raises(ValueError, match=r"model\.weights: "):
        evaluate.run_evaluation(config(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digest_of_weights_sees_values_and_names(dtype: torch.dtype) -> None:
    def digest(values: list[float], name: str = "a") -> str:
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(torch.tensor(values, dtype=dtype)))
        module.register_buffer("scalar", torch.tensor(1.0))
        return digest_of_weights(module)

    assert digest([1.0, 2.0]) == digest([1.0, 2.0])
    assert len({digest([1.0, 2.0]), digest([2.0, 1.0]), digest([1.0, 2.0], "b")}) == 3


def code_row(**changes: Any) -> dict[str, Any]:
    row = {"question": "9+7+8=", "test_method": "stdio", "test_input": ["", ""], "test_output": ["24", "24"]}
    return {**row, **changes}


def test_code_is_judged_by_its_tests(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DIRL_DATA", str(tmp_path))
    rows = [code_row(), code_row(test_output=["24", "25"]), code_row(question="1+1=")]
    (tmp_path / "HumanEval.json").write_text(json.dumps(rows))
    # The tiny vocabulary cannot spell a program, so that a stand-in reads one off the digits.
    monkeypatch.setattr(code_execution, "extract_code", lambda text: f"print({text})" if text != "2" else None)
    world.script = lambda question, *_: str(true_sum(question))
    data = EvalDataConfig(datasets=["humaneval", "task:noisy_sums"], limit=3, suffix="1=")
    evaluate.run_evaluation(config(tmp_path / "out", modes=["greedy"], data=data))
    by_dataset = {row["dataset"]: row for row in results_of(tmp_path / "out")["results"]}
    assert by_dataset["HumanEval"]["avg_at_k"] == pytest.approx(1 / 3)  # partial credit is not right
    assert by_dataset["task:noisy_sums"]["avg_at_k"] == 0.0  # no box
    assert by_dataset["HumanEval"]["output_length_mean"] < 4  # no suffix was appended to its questions


@pytest.mark.parametrize("name", ["tiny", "sdar_8b"])
def test_shipped_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL", raising=False)
    shipped = load_config(EvalConfig, CONFIGS / name / "eval.yaml")
    assert {mode.name for mode in shipped.decoding_modes} >= {"static", "dynamic"}
    assert (shipped.sampling.temperature, shipped.sampling.confidence_threshold) == (1.0, 0.9)


def test_the_tiny_model_through_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    save_tiny_model(tmp_path / "model")
    arguments = [
        "eval",
        str(CONFIGS / "tiny/eval.yaml"),
        f"model.path={tmp_path / 'model'}",
        f"output_dir={tmp_path / 'out'}",
        *("data.limit=3", "num_samples=2", "sampling.max_completion_length=12", "overwrite=false"),
    ]
    assert cli.main(arguments) == 0
    # The last line: accelerate imports DeepSpeed where it is installed, which prints a line of its own.
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {tmp_path / 'out' / 'report.md'}"
    by_mode = {row["mode"]: row for row in results_of(tmp_path / "out")["results"]}
    assert by_mode["static"]["tokens_per_step"] <= 1.0 <= by_mode["dynamic"]["tokens_per_step"] + 0.5
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 3 * (2 + 2 + 1)
    assert all(len(row["token_ids"]) == len(row["step_map"]) for row in rows)
    save_tiny_model(tmp_path / "model", seed=1)
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("dirl: error: ")
    assert "model.weights: " in line
    assert cli.main([*arguments, "data.datasets=[MATH501]"]) == 2
    assert "unknown data set 'MATH501'" in capsys.readouterr().err
