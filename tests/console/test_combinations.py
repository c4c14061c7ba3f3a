"""Words of a command line -> combinations: values, names, folders, and what is refused before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from dirl.config import Config, bounded, load_config
from dirl.console.combinations import Axis, axes_of, chosen_index, combinations_of
from dirl.presets import Presets

PRESETS = Path(__file__).parents[2] / "configs/objectives"


@dataclass(frozen=True, kw_only=True)
class ToyObjective(Config):
    preset: str = ""
    views: str = ""
    scale_rewards: str = ""
    likelihood: str = ""
    loss_type: str = ""
    epsilon: float = 0.0
    epsilon_high: float = 0.0
    mask_truncated_completions: bool = False


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    PRESETS: ClassVar[dict[str, Presets]] = {"objective": PRESETS}

    output_dir: str = "outputs/toy"
    seed: int = bounded(0, least=0)
    rate: float = 1.0
    text: str = ""
    functions: list[str] = field(default_factory=list)
    objective: ToyObjective = field(default_factory=ToyObjective)


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    (tmp_path / "toy.yaml").write_text("rate: 2.0\n")
    return str(tmp_path / "toy.yaml")


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("seed=[0, 1,2]", ("0", "1", "2")),
        ("seed=[3]", ("3",)),
        ("text=['a,b',\"c\", d]", ("a,b", "c", "d")),
        ("text=[a[0,1],{b,c}]", ("a[0,1]", "{b,c}")),
        ("functions=[[x],[x,y]]", ("[x]", "[x,y]")),
        ("functions=[[],[x]]", ("[]", "[x]")),
        ("objective=[dipo,dapo]", ("dipo", "dapo")),
    ],
)
def test_values_between_brackets(word: str, values: tuple[str, ...]) -> None:
    assert axes_of(ToyConfig, [word, "rate=1"]) == [Axis(word.partition("=")[0], values)]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["seed=0"], "nothing to sweep: give keys several values"),
        (["functions=[x,y]"], "nothing to sweep"),  # one value, which is a list
        (["seed=[0,1]", "seed=3"], "seed is given twice"),
        (["seed=[0,1,0]"], "seed has '0' twice"),
        (["seed=[0,,1]"], "seed has an empty value"),
        (["seed=[]"], "seed has an empty value"),
        (["output_dir=[a,b]"], "output_dir cannot be swept"),
    ],
)
def test_what_cannot_be_swept_is_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        axes_of(ToyConfig, words)


def test_every_combination_has_its_folder_and_configuration(config_file: str) -> None:
    words = ["objective=[dapo,dipo]", "text=x", "seed=[1,2]", "output_dir=out/my sweep"]
    found = combinations_of(ToyConfig, config_file, words, axes_of(ToyConfig, words))
    assert [one.name for one in found] == [
        *("objective=dapo,seed=1", "objective=dapo,seed=2", "objective=dipo,seed=1", "objective=dipo,seed=2")
    ]
    last = found[-1]
    assert last.folder == Path("out/my sweep/objective=dipo,seed=2")
    assert last.overrides == ("text=x", "objective=dipo", "seed=2", f"output_dir={last.folder}")
    assert last.config == load_config(ToyConfig, config_file, last.overrides)
    assert (found[0].config.objective.loss_type, last.config.seed, last.config.rate) == ("dapo", 2, 2.0)  # type: ignore[attr-defined]


def test_the_folder_is_beside_that_of_the_configuration(config_file: str) -> None:
    (one,) = combinations_of(ToyConfig, config_file, ["seed=[5]"], [Axis("seed", ("5",))])
    assert one.folder == Path("outputs/toy_sweep/seed=5")


def test_names_that_clash_or_are_long_end_in_a_digest(config_file: str) -> None:
    values = ("/a/b", "_a?b", "x" * 200, "plain")
    found = combinations_of(ToyConfig, config_file, [], [Axis("text", values)])
    names = [one.name for one in found]
    assert len(set(names)) == 4 and names[3] == "text=plain" and all(len(name) < 130 for name in names)
    assert names[0].startswith("text=_a_b-") and names[1].startswith("text=_a_b-")
    (again, *_) = combinations_of(ToyConfig, config_file, [], [Axis("text", ("/a/b", "x", "_a_b"))])
    assert again.name == names[0]  # with other values beside it


def test_a_combination_that_its_stage_refuses_is_named(config_file: str) -> None:
    with pytest.raises(ValueError, match=r"^seed=-1: override 'seed=-1': seed must be at least 0"):
        combinations_of(ToyConfig, config_file, [], [Axis("seed", ("0", "-1"))])
    with pytest.raises(ValueError, match=r"^objective=dipoo: objective=dipoo: no such preset; did you mean dipo"):
        combinations_of(ToyConfig, config_file, [], [Axis("objective", ("dipo", "dipoo"))])


def test_the_task_of_an_array_is_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    assert chosen_index(None, 9) is None and chosen_index(8, 9) == 8
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert chosen_index(None, 9) == 4 and chosen_index(0, 9) == 0
    with pytest.raises(ValueError, match=r"^SLURM_ARRAY_TASK_ID 4: there are 3 combinations, 0 to 2"):
        chosen_index(None, 3)
    with pytest.raises(ValueError, match=r"^--index -1: there are 3 combinations"):
        chosen_index(-1, 3)
