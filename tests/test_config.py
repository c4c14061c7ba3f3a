"""Configuration: precedence, round trips, and errors that are one line, exit with 2 and write nothing."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from omegaconf import OmegaConf

from dirl import config as config_module
from dirl.cli import main
from dirl.config import Config, ConfigError, bounded, load_config, save_config
from dirl.errors import UserError
from dirl.eval.eval_config import EvalConfig
from dirl.rl.rl_config import RLConfig
from dirl.sft.train import SFTConfig

CONFIGS = Path(__file__).parents[1] / "configs"
SCHEMAS: dict[str, type[Any]] = {"sft": SFTConfig, "rl": RLConfig, "eval": EvalConfig}


@pytest.mark.parametrize("size", ["tiny", "sdar_8b"])
@pytest.mark.parametrize("stage", SCHEMAS)
def test_shipped_configs_load_and_survive_a_round_trip(size: str, stage: str, tmp_path: Path) -> None:
    config = load_config(SCHEMAS[stage], CONFIGS / size / f"{stage}.yaml")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(SCHEMAS[stage], tmp_path / "config.yaml") == config


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-4\nmodel:\n  path: ${oc.env:DIRL_TEST_MODEL,fallback}\nmax_steps: 7\n")
    config = load_config(SFTConfig, file, ["max_steps=9", "data.path=x.jsonl"])
    assert (config.learning_rate, config.max_steps, config.data.path) == (1e-4, 9, "x.jsonl")
    assert config.model.path == "fallback" and config.warmup_steps == SFTConfig.warmup_steps
    monkeypatch.setenv("DIRL_TEST_MODEL", "from the environment")
    assert load_config(SFTConfig, file).model.path == "from the environment"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rte=1", ["'learning_rte'", "did you mean 'learning_rate'"]),
        ("num_generations=4", ["did you mean 'rollout.num_generations'"]),
        ("rollout.num_generation=4", ["'rollout.num_generation'", "num_generations"]),
        ("max_steps=many", ["max_steps", "whole number", "'many'"]),
        ("max_steps=1.5", ["max_steps", "whole number"]),
        ("bf16=1", ["bf16", "true or false"]),
        ("rollout.unmasking_strategy=best", ["rollout.unmasking_strategy", "low_confidence_dynamic", "'best'"]),
        ("rollout.num_generations=1", ["rollout", "num_generations must be at least 2", "got 1"]),
        ("epsilon=1.5", ["objective.epsilon must be at least 0 and below 1, got 1.5"]),
        ("objective.loss_type=gspo", ["objective.loss_type must be one of dapo, grpo", "'gspo'"]),
        ("eval.num_samples=0", ["eval.num_samples must be at least 1, got 0"]),
        ("reward.functions=[nothing_like_it]", ["nothing_like_it"]),
        ("no_equals_sign", ["key=value"]),
        ("model=x", ["model", "mapping"]),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    override: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_directory: Path
) -> None:
    output_dir = tmp_path / "run"
    arguments = [
        "rl",
        str(CONFIGS / "tiny/rl.yaml"),
        f"output_dir={output_dir}",
        f"model.path={tiny_directory}",
        override,
    ]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("dirl: error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not output_dir.exists()


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "just text"])
def test_unusable_files(content: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.yaml") as caught:
        load_config(SFTConfig, file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(SFTConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize("key", ["model.path", "data.path"])
def test_missing_inputs(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_directory: Path) -> None:
    arguments = ["sft", str(CONFIGS / "tiny/sft.yaml"), f"output_dir={tmp_path / 'run'}"]
    arguments += [f"model.path={tiny_directory}", f"{key}={tmp_path}/absent.json"]
    assert main(arguments) == 2
    assert f"{tmp_path}/absent.json" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    assert main(["tiny-model", str(directory)]) == 0
    return directory


@dataclass(frozen=True, kw_only=True)
class Section(Config):
    text: str = "x"
    temperature: float = 1.0
    count: int = 0
    is_on: bool = False


@dataclass(frozen=True, kw_only=True)
class Schema(Config):
    section: Section = field(default_factory=Section)
    greedy: Section = field(default_factory=lambda: Section(temperature=0.0))
    required: str


def test_environment_variables_become_what_the_field_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"A": "7", "B": "true", "C": "1e-3"}.items():
        monkeypatch.setenv(f"DIRL_TEST_{name}", value)
    file = tmp_path / "c.yaml"
    file.write_text(
        "required: r\nsection:\n  count: ${oc.env:DIRL_TEST_A,3}\n  is_on: ${oc.env:DIRL_TEST_B,false}\n"
        "  temperature: ${oc.env:DIRL_TEST_C,1.0}\n"
    )
    section = load_config(Schema, file).section
    assert (section.count, section.is_on, section.temperature) == (7, True, 0.001)
    monkeypatch.setenv("DIRL_TEST_A", "seven")
    with pytest.raises(ConfigError, match=r"section\.count must be a whole number, got 'seven'"):
        load_config(Schema, file)
    monkeypatch.delenv("DIRL_TEST_A")
    assert load_config(Schema, file).section.count == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [("4", "not valid YAML"), ("model: [a]", "model must be a mapping"), ("rollout: 7", "rollout must")],
)
def test_files_of_another_form_are_one_line(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_config(RLConfig, file, ["objective=dipo"])


@pytest.mark.parametrize(
    "text",
    ["1e-6", "5", "yes", "null", "", " ", "a: b", "#", "\\boxed{}", "${x}", "\\${x}", "a\\\\${", "ü\n\t'\"", "~", "$"],
)
def test_any_text_survives_a_round_trip(text: str, tmp_path: Path) -> None:
    config = Schema(required=text, section=Section(text=text))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(Schema, tmp_path / "c.yaml") == config


def test_a_section_keeps_the_defaults_its_parent_gives_it() -> None:
    assert load_config(Schema, None, ["required=r", "greedy.count=3"]).greedy == Section(temperature=0.0, count=3)


def test_text_on_the_command_line() -> None:
    config = load_config(Schema, None, ["required=", "section.text=a=b c"])
    assert (config.required, config.section.text) == ("", "a=b c")


@pytest.mark.parametrize(
    "text",
    [
        *(" Let's think", "End with #### and the number", "two  blanks\n\nand lines\n", "5", "1e-6", "null"),
        *("yes", "~", "[a", "{", "key: value", "'quoted'", '""', "${x}", "\\${x}", "\\boxed{}", "- a", "*"),
        "\u00fc\t",
    ],
)
def test_text_on_the_command_line_is_taken_as_it_is_written(text: str) -> None:
    assert load_config(Schema, None, ["required=r", f"section.text={text}"]).section.text == text
    assert load_config(Schema, None, [f"required={text}"]).required == text


def test_a_choice_on_the_command_line_is_text() -> None:
    assert load_config(SFTConfig, None, ["output_dir=o", "optim=adamw_torch"]).optim == "adamw_torch"
    with pytest.raises(ConfigError, match=r"optim must be one of .* got 'no'"):
        load_config(SFTConfig, None, ["output_dir=o", "optim=no"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("section.txt=a", "unknown key 'section.txt'; did you mean 'section.text'"),
        ("section.zzz=a", "known keys: section.text, section.temperature"),
        ("section.temperature=nan", "section.temperature must be a finite number, got nan"),
        ("section.is_on=maybe", "section.is_on must be true or false, got 'maybe'"),
        ("section.count=[1", r"override 'section.count=\[1' cannot be read"),
        ("section.count=${nothing}", "nothing"),
    ],
)
def test_errors_name_the_whole_key(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(Schema, None, ["required=r", override])
    assert "\n" not in str(caught.value)


def test_a_required_key_is_named() -> None:
    with pytest.raises(ConfigError, match="'required'"):
        load_config(Schema, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", "override 'lerning_rate=1': unknown key 'lerning_rate'"),
        ("modle.path=x", "override 'modle.path=x': unknown key 'modle'"),
        ("max_steps=many", "override 'max_steps=many': max_steps must be"),
        ("max_steps=0", "override 'max_steps=0': max_steps must be at least 1"),
        ("data.limit=-1", "override 'data.limit=-1': data.limit must be at least 0"),
    ],
)
def test_a_bad_override_is_named_and_not_the_file(override: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("output_dir: out\nmax_steps: 5\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(SFTConfig, file, ["seed=3", override])


def test_a_bad_value_of_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("output_dir: out\nmax_steps: 0\n")
    with pytest.raises(ConfigError, match=r"sft\.yaml: max_steps must be at least 1"):
        load_config(SFTConfig, file, ["seed=3"])


@dataclass(frozen=True, kw_only=True)
class Objective(Config):
    likelihood: Literal["reveal", "trajectory"] = "reveal"
    views: list[Literal["replay", "random"]] = field(default_factory=list)
    epsilon: float = bounded(0.2, least=0, below=1)
    beta: float = bounded(0.0, above=-1.0, most=2.5)
    sizes: list[int] = field(default_factory=list, metadata={"least": 1})


@dataclass(frozen=True, kw_only=True)
class Runs(Config):
    steps: int = bounded(6, least=1)

    def check(self) -> None:
        if self.steps == 13:
            raise ValueError("steps must not be 13")


@dataclass(frozen=True, kw_only=True)
class Sized(Config):
    size: int = 1

    def check(self) -> None:
        CHECKED.append(self.size)


@dataclass(frozen=True, kw_only=True)
class Whole(Runs, Sized):
    ALIASES: ClassVar = {
        "likelihood": "objective.likelihood",
        "epsilon": "objective.epsilon",
        "loss.beta": "objective.beta",
        "goal": "objective",
    }
    learning_rate: float = 1e-3
    objective: Objective = field(default_factory=Objective)

    def check(self) -> None:
        if self.steps % self.size:  # the bases' own checks came first
            raise ValueError(f"steps={self.steps} must be a multiple of size")


CHECKED: list[int] = []
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"likelihood": "replay"}, "likelihood must be one of reveal, trajectory, got 'replay'"),
    ({"views": ["replay", "x"]}, "views[1] must be one of replay, random, got 'x'"),
    ({"epsilon": 1.0}, "epsilon must be at least 0 and below 1, got 1.0"),
    ({"epsilon": -0.5}, "epsilon must be at least 0 and below 1, got -0.5"),
    ({"epsilon": float("inf")}, "epsilon must be a finite number, got inf"),
    ({"epsilon": float("nan")}, "epsilon must be a finite number, got nan"),
    ({"epsilon": "much"}, "epsilon must be a finite number, got 'much'"),
    ({"epsilon": True}, "epsilon must be a finite number, got True"),
    ({"beta": -1.0}, "beta must be above -1.0 and at most 2.5, got -1.0"),
    ({"beta": 2.75}, "beta must be above -1.0 and at most 2.5, got 2.75"),
    ({"sizes": [3, 0]}, "sizes[1] must be at least 1, got 0"),
    ({"sizes": 3}, "sizes must be a list, got 3"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_python_and_yaml_refuse_alike(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Objective(**values)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=re.escape(f"{file}: {message}")):
        load_config(Objective, file)
    file.write_text(yaml.safe_dump({"objective": values}))
    with pytest.raises(ConfigError, match=re.escape(f"{file}: objective.{message}")):
        load_config(Whole, file)


def test_edges_of_bounds_and_whole_numbers_for_floats_pass() -> None:
    config = Objective(epsilon=0, beta=2.5, sizes=[1], views=["random"])
    assert config == load_config(Objective, None, ["epsilon=0", "beta=2.5", "sizes=[1]", "views=[random]"])


def test_each_class_of_several_is_checked_once_and_bases_first() -> None:
    CHECKED.clear()
    Whole(steps=6, size=3)
    assert CHECKED == [3]
    with pytest.raises(ValueError, match="steps must not be 13"):
        Whole(steps=13, size=2)
    with pytest.raises(ValueError, match="steps=6 must be a multiple"):
        Whole(size=4)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Whole(steps=0)


def test_old_names_work_by_layer_and_say_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config_module._say_moved.cache_clear()
    file = tmp_path / "c.yaml"
    file.write_text("likelihood: trajectory\nepsilon: 0.5\nobjective: {beta: '${epsilon}'}\n")
    with caplog.at_level(logging.WARNING):
        assert load_config(Whole, file).objective == Objective(likelihood="trajectory", epsilon=0.5, beta=0.5)
        loaded = load_config(Whole, file, ["epsilon=0.25", "loss.beta=1", "goal.sizes=[2]"])
    assert loaded.objective == Objective(likelihood="trajectory", epsilon=0.25, beta=1.0, sizes=[2])
    assert caplog.messages == [
        "likelihood is now objective.likelihood; the old name still works",
        "epsilon is now objective.epsilon; the old name still works",
        "loss.beta is now objective.beta; the old name still works",
        "goal is now objective; the old name still works",
    ]
    save_config(loaded, file)
    assert "\nepsilon" not in file.read_text() and load_config(Whole, file) == loaded


@pytest.mark.parametrize(("written", "named"), [("epsilon", "objective.epsilon"), ("objective.epsilon", "epsilon")])
def test_the_command_line_beats_the_file_whichever_names_they_use(written: str, named: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    save = OmegaConf.from_dotlist([f"{written}=0.5"])
    file.write_text(OmegaConf.to_yaml(save))
    assert load_config(Whole, file, [f"{named}=0.75"]).objective.epsilon == 0.75


def test_both_names_with_different_values_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epsilon: 0.5\nobjective: {epsilon: 0.5}\n")
    assert load_config(Whole, file).objective.epsilon == 0.5
    message = "epsilon is now objective.epsilon, and both are given with different values"
    with pytest.raises(ConfigError, match=f"command line: {message}"):
        load_config(Whole, file, ["objective.epsilon=0.1", "epsilon=0.2"])
    for text in ("epsilon: 0.5\nobjective: {epsilon: 0.25}\n", "epsilon: 0.5\nobjective: {}\ngoal: {epsilon: 1}\n"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=rf"c\.yaml: .*{message}|c\.yaml: goal is now objective"):
            load_config(Whole, file)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("epsilon=5", "override 'epsilon=5': objective.epsilon must be at least 0 and below 1, got 5"),
        ("likelyhood=reveal", "unknown key 'likelyhood'; did you mean 'objective.likelihood'"),
        ("loss.betta=1", "unknown key 'loss'; known keys: size, steps"),
        ("views=[]", "unknown key 'views'; did you mean 'objective.views'"),
        ("likelihood=best", "override 'likelihood=best': objective.likelihood must be one of reveal, trajectory"),
    ],
)
def test_errors_know_old_names(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(Whole, None, [override])
