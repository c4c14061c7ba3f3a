"""Values of an objective that make no sense together, and presets: which of them wins, and what a wrong name says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dirl.config import CONFIGS, ConfigError, load_config, save_config
from dirl.errors import UserError
from dirl.rl.objective import _REFUSED, ObjectiveConfig
from dirl.rl.rl_config import RLConfig

TINY = CONFIGS / "tiny" / "rl.yaml"
PRESETS = sorted((CONFIGS / "objectives").glob("*.yaml"))

REFUSED: list[dict[str, Any]] = [
    {"shrink": 2, "likelihood": "trajectory"},
    {"score": "masked", "likelihood": "trajectory"},
    {"views": "masks", "likelihood": "trajectory"},
    {"views": "masks", "shrink": 2},
    {"views": "masks", "score": "masked"},
    {"views": "masks", "steps_per_completion": 1},
    {"views": "masks", "advantage": "gae"},
    {"views": "masks", "advantage": "given"},
    {"views": "masks", "importance_sampling_level": "step"},
    {"views": "masks", "importance_sampling_correction": "token_truncate"},
    {"views": "masks", "importance_sampling_correction": "token_mask"},
    {"views": "masks", "importance_sampling_correction": "sequence_truncate"},
    {"views": "masks", "importance_sampling_correction": "sequence_mask"},
    {"steps_per_completion": 1, "importance_sampling_level": "token"},
    {"steps_per_completion": 1, "importance_sampling_level": "block"},
    {"steps_per_completion": 1, "importance_sampling_level": "sequence"},
    {"steps_per_completion": 1, "kl_level": "sequence"},
    {"steps_per_completion": 1, "advantage": "gae"},
    {"steps_per_completion": 1, "advantage": "given"},
    {"shrink": 2, "advantage": "given"},
    {"score": "masked", "advantage": "gae"},
    {"score": "masked", "advantage": "given"},
    {"surrogate": "sandwich", "views": "replay"},
    {"surrogate": "sandwich", "num_masks": 1, "mask_levels": "uniform", "views": "masks"},
    {"surrogate": "sandwich", "num_masks": 1, "mask_levels": "interval", "views": "masks"},
    {"surrogate": "sandwich", "num_masks": 1, "mask_levels": "gauss", "views": "masks"},
    {"surrogate": "sandwich", "mask_weights": "none", "views": "masks", "num_masks": 2},
    {"surrogate": "sandwich", "mask_weights": "mean", "views": "masks", "num_masks": 2},
    {"complementary": True, "mask_levels": "gauss"},
    {"complementary": True, "mask_levels": "every"},
    *(
        {"importance_sampling_level": level, "importance_sampling_correction": correction}
        for level in ("step", "block", "sequence")
        for correction in ("token_truncate", "token_mask")
    ),
]


@pytest.mark.parametrize("values", REFUSED, ids=str)
def test_what_makes_no_sense_together_is_refused_in_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    """From Python and from a file, naming the keys with their values, and saying what to do."""
    named = [
        f"{key}={value}"
        for key, value in values.items()
        if (key, value) not in {("views", "masks"), ("num_masks", 2)} or "surrogate" not in values
    ]
    with pytest.raises(UserError) as caught:
        ObjectiveConfig(**values)
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in named), message
    assert any(refusal.because in message for refusal in _REFUSED)
    file = tmp_path / "rl.yaml"
    file.write_text(yaml.safe_dump({"objective": values}))
    with pytest.raises(ConfigError) as caught:
        load_config(RLConfig, file)
    assert str(caught.value).startswith(f"{file}: objective") and message in str(caught.value)


def test_every_refusal_is_among_these() -> None:
    said = set()
    for values in REFUSED:
        with pytest.raises(UserError) as caught:
            ObjectiveConfig(**values)
        said |= {refusal.because for refusal in _REFUSED if str(caught.value).endswith(refusal.because)}
    assert said == {refusal.because for refusal in _REFUSED}


def test_levels_out_of_order_and_unknown_views_are_refused() -> None:
    with pytest.raises(UserError, match=r"^mask_level_min=0.6 is above mask_level_max=0.5$"):
        ObjectiveConfig(mask_level_min=0.6, mask_level_max=0.5)
    with pytest.raises(UserError, match=r"^views must be one of replay, masks, got 'random'$"):
        ObjectiveConfig(views="random")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_sets_what_it_says_and_leaves_the_rest(preset: Path, tmp_path: Path) -> None:
    """On the command line its objective replaces the file's; it reloads equal from what a run writes."""
    plain, config = load_config(RLConfig, TINY), load_config(RLConfig, TINY, [f"objective={preset.stem}"])
    values = yaml.safe_load(preset.read_text())
    assert values.keys() <= {"objective", "rollout", "reward"}
    assert config.objective == ObjectiveConfig(preset=preset.stem, **values["objective"])
    for section in ("rollout", "reward", "data", "model", "eval"):
        for key, value in vars(getattr(plain, section)).items():
            assert getattr(getattr(config, section), key) == values.get(section, {}).get(key, value)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RLConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=espo", "objective.beta=0.5", "objective.num_masks=4"],
        ["objective.beta=0.5", "objective.num_masks=4", "objective=espo"],
        ["objective.preset=espo", "beta=0.5", "objective.num_masks=4"],
    ],
)
def test_keys_of_the_command_line_win_over_its_preset(overrides: list[str]) -> None:
    config = load_config(RLConfig, TINY, overrides)
    assert (config.objective.beta, config.objective.num_masks) == (0.5, 4)
    assert config.objective.complementary and config.objective.kl_level == "sequence"
    assert config.objective.scale_rewards == "none", "the file's objective is replaced"


@pytest.mark.parametrize("named", ["objective: agrpo", "objective:\n  preset: agrpo\n  epsilon: 0.4"])
def test_a_preset_in_a_file_lies_under_what_the_file_says(named: str, tmp_path: Path) -> None:
    file = tmp_path / "rl.yaml"
    file.write_text(f"{named}\nrollout:\n  unmasking_strategy: sequential\n")
    config = load_config(RLConfig, file)
    assert config.objective.steps_per_completion == 6 and config.objective.loss_type == "grpo"
    assert config.objective.epsilon == (0.4 if "0.4" in named else 0.2)
    assert config.rollout.unmasking_strategy == "sequential"
    assert load_config(RLConfig, file, ["objective.steps_per_completion=9"]).objective.loss_type == "grpo"
    other = load_config(RLConfig, file, ["objective=gspo"])
    assert other.objective.steps_per_completion == 0 and other.objective.epsilon == 3e-4
    file.write_text(f"{named}\n")
    assert load_config(RLConfig, file).rollout.unmasking_strategy == "random"


def test_a_file_of_values_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("objective:\n  epsilon: 0.123\n  beta: 0.5\nrollout:\n  num_generations: 3\n")
    config = load_config(RLConfig, TINY, [f"objective={file}", "objective.beta=0.25"])
    assert (config.objective.epsilon, config.objective.beta, config.rollout.num_generations) == (0.123, 0.25, 3)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(RLConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dippo", ["objective=dippo: no such preset", "did you mean dipo?", "a path that ends in .yaml"]),
        ("something_else", ["objective=something_else: no such preset", "tracerl", "wd1"]),
        ("absent/mine.yaml", ["absent/mine.yaml does not exist"]),
    ],
)
def test_unknown_names_say_in_one_line_what_there_is(name: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "rl.yaml"
    file.write_text(f"objective: {name}\n")
    for path, overrides in ((TINY, [f"objective={name}"]), (file, [])):
        with pytest.raises(ConfigError) as caught:
            load_config(RLConfig, path, overrides)
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_an_unknown_key_of_a_preset_names_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("objective:\n  epsilom: 0.1\n")
    with pytest.raises(ConfigError, match=r"unknown key 'objective.epsilom'; did you mean 'objective.epsilon'\?"):
        load_config(RLConfig, TINY, [f"objective={file}"])
