"""Configuration: precedence, round trips, and errors that are one line, exit with 2 and write nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dirl.cli import main
from dirl.config import ConfigError, load_config, save_config
from dirl.eval.evaluate import EvalConfig
from dirl.rl.train import RLConfig
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
        ("epsilon=1.5", ["epsilon must be in [0, 1)", "1.5"]),
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
class Section:
    text: str = "x"
    temperature: float = 1.0
    count: int = 0
    is_on: bool = False


@dataclass(frozen=True, kw_only=True)
class Schema:
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
    ("override", "words"),
    [
        ("section.txt=a", "unknown key 'section.txt'; did you mean 'section.text'"),
        ("section.zzz=a", "known keys: section.text, section.temperature"),
        ("section.temperature=nan", "section.temperature must be a number, got nan"),
        ("section.text=5", r"section.text must be text \(quote it\), got 5"),
        ("section.is_on=maybe", "section.is_on must be true or false, got 'maybe'"),
        ("section.count=[1", r"override 'section.count=\[1' cannot be read"),
        ("section.text=${nothing}", "nothing"),
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
        ("data.limit=-1", "override 'data.limit=-1': data: limit must be at least 0"),
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
