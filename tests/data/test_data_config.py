"""What a run is told about its data: one path or several sources, and one line for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dirl.config import load_config, save_config
from dirl.data.data_config import DataConfig, DataSource
from dirl.errors import ConfigError, UserError
from dirl.rl.rl_config import RLEvalConfig
from dirl.sft.train import SFTConfig

SOURCES = "[{path: a.jsonl, weight: 2}, {path: '~/b.json', weight: 1.5, limit: 3, columns: {question: problem}}]"


def test_a_path_is_the_short_form_of_one_source() -> None:
    data = DataConfig(path="a.jsonl", limit=3, columns={"prompt": "q"})
    assert data.all_sources() == [DataSource(path="a.jsonl", limit=3, columns={"prompt": "q"})]


def test_sources_from_the_command_line_are_written_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(SFTConfig, None, [f"data.sources={SOURCES}"])
    first, second = config.data.all_sources()
    assert first == DataSource(path="a.jsonl", weight=2.0)
    assert second == DataSource(path="/home/somebody/b.json", weight=1.5, limit=3, columns={"question": "problem"})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(SFTConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources=[{weight: 1}]"], r"data\.sources\[0\]\.path is missing"),
        (["data.sources=[{path: a, weigth: 1}]"], r"sources\[0\]: unknown key 'weigth'; did you mean 'weight'"),
        (["data.sources=[{path: a, weight: -1}]"], r"sources\[0\]: weight must be at least 0"),
        (["data.sources=[{path: a, weight: 1}, {path: b}]"], r"weights \[1\.0, 0\.0\]; give each one above 0, or none"),
        (
            [f"data.sources={SOURCES}", "data.path=c"],
            r"data\.path=c and sources are both given; set data\.path=, or say it of each",
        ),
        (["data.sources=[{path: a}]", "data.limit=3"], r"data\.limit=3 and sources are both given"),
        (["data.path="], r"data\.path is empty; name a file"),
        (["data.columns.prompt=q"], r"data\.columns=.*task:noisy_sums makes its columns itself"),
        (["data.split=test"], r"data\.split=test is of hub data sets, and task:noisy_sums is none"),
        (["data.sources=[{path: 'task:word_sums', split: test}]"], r"sources\[0\]: split=test is of hub data sets"),
        (["data.heldout=2.5"], r"data\.heldout=2\.5 must be a share below 1 or a whole number"),
        (["data.decontaminate=yes"], r"data\.decontaminate must be one of report, drop, off"),
        (["max_steps=7", "num_train_epochs=2"], r"max_steps=7 and num_train_epochs=2 are both given; keep one"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(SFTConfig, None, overrides)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_has_any_split() -> None:
    for split in ("test", "train[:10%]"):
        assert DataConfig(path="owner/name:config@v1", split=split).all_sources()[0].split == split


def test_an_evaluation_has_columns_and_a_split_too() -> None:
    told = RLEvalConfig(path="a.jsonl", columns={"question": "problem"})
    assert (told.split, told.limit) == ("test", 64)
    assert RLEvalConfig(path="owner/name", split="validation").split == "validation"
    with pytest.raises(UserError, match=r"split=dev is of hub data sets, and task:noisy_sums is none"):
        RLEvalConfig(path="task:noisy_sums", split="dev")


@pytest.mark.parametrize(
    ("told", "steps"), [({}, 100), ({"num_train_epochs": 2}, -1), ({"max_steps": -1}, 100), ({"max_steps": 7}, 7)]
)
def test_steps_or_epochs(told: dict[str, Any], steps: int) -> None:
    assert SFTConfig(**told).max_steps == steps
