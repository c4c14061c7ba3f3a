"""What the study of objectives runs and how its lines are read: settings, jobs, learning rates. Trains nothing.

A job is one training run: an arm (a preset, or overrides under a name) in a setting, with a seed and a learning rate.
Three kinds: `search` (half the rollouts, a seed that is not reported) chooses the learning rate, `final` is reported,
`start` only evaluates the checkpoint that all start from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Line = dict[str, Any]
Kind = Literal["start", "search", "final"]

LEARNING_RATES = (1e-4, 2e-4, 4e-4)
SEARCH_SEED = 3
SEEDS = (0, 1, 2)
START = "start"  # stands for the checkpoint before RL where an arm is named

# The recipe of configs/tiny/rl.yaml, made small. Without dynamic sampling every arm rolls out, and trains on, the same
# number of completions, and no run ends early because its groups are all right.
COMMON = (
    "rollout.prompts_per_step=8",
    "rollout.num_generations=8",
    "rollout.dynamic_sampling=false",
    "rollout.needs_right=false",
    "rollout.min_spread.tokens_per_step=0",
    "reward.functions=[accuracy]",
    "eval.limit=320",
    "eval.num_samples=1",
    "eval_steps=0",
    "save_steps=10",
    "save_total_limit=1",
    "completions_steps=0",
)
# A step packs about 4,000 tokens: a budget of C3PO's that is met.
OWN_OVERRIDES = {"c3po": ("objective.max_tokens_per_update=2048",)}


@dataclass(frozen=True)
class Setting:
    """A problem that objectives are compared on: changes to the common recipe."""

    title: str
    overrides: tuple[str, ...] = ()
    passes: int = 1  # optimizer steps a batch of rollouts
    block_length: int = 4  # of the checkpoint it starts from
    pays_speed: bool = False  # the learning rate is chosen by accuracy times tokens per step


SETTINGS = {
    "accuracy": Setting("reward: a right answer"),
    "speed": Setting(
        "reward: a right answer, and the `speed` of one", ("reward.functions=[accuracy,speed]",), pays_speed=True
    ),
    "threshold_0.6": Setting("tokens are revealed from a confidence of 0.6", ("rollout.confidence_threshold=0.6",)),
    "block_8": Setting("blocks of 8 tokens", block_length=8),
    "two_passes": Setting("two optimizer steps a batch of rollouts", ("num_iterations=2",), passes=2),
}


@dataclass(frozen=True)
class Job:
    """One run of the study."""

    kind: Kind
    setting: str
    arm: str
    overrides: tuple[str, ...]  # of the arm
    seed: int
    learning_rate: float
    rollouts: int  # batches of rollouts of a reported run
    sft: str  # directory of the checkpoint it starts from

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        batches = {"start": 0, "search": max(self.rollouts // 2, 1), "final": self.rollouts}[self.kind]
        return batches * SETTINGS[self.setting].passes

    @property
    def all_overrides(self) -> list[str]:
        """What makes it of configs/tiny/rl.yaml, but for where it writes."""
        setting = SETTINGS[self.setting]
        return [
            *COMMON,
            *setting.overrides,
            *self.overrides,
            f"model.path={self.sft}",
            f"seed={self.seed}",
            f"learning_rate={self.learning_rate}",
            f"max_steps={self.steps or setting.passes}",
        ]

    @property
    def name(self) -> str:
        """For people and directories."""
        return f"{self.setting}/{self.arm}/{self.kind}_{self.seed}_{self.learning_rate:g}"


def stages(
    setting: str, arms: Mapping[str, Sequence[str]], rollouts: int, sft: str, also: Sequence[str] = ()
) -> Iterator[list[tuple[Job, bool]]]:
    """The jobs of a setting in the order in which they are worth having; True: the rate is to be chosen first.

    Args:
        arms: name -> its overrides.
        also: overrides of every run.
    """

    def job(kind: Kind, arm: str, seed: int, rate: float) -> Job:
        return Job(kind, setting, arm, (*also, *arms.get(arm, ())), seed, rate, rollouts, sft)

    yield [(job("start", START, seed, 0.0), False) for seed in SEEDS]
    yield [(job("search", arm, SEARCH_SEED, rate), False) for arm in arms for rate in LEARNING_RATES]
    for seed in SEEDS:
        yield [(job("final", arm, seed, 0.0), True) for arm in arms]


def key_of(line: Line) -> tuple[Any, ...]:
    """What makes a run of the study: two lines with one key are one run, done twice."""
    named = ("kind", "setting", "preset", "seed", "learning_rate", "rollouts", "config", "sft")
    return tuple(line[name] for name in named)


def score(line: Line) -> float:
    """What a learning rate is chosen by."""
    speed = line["tokens_per_step"] if SETTINGS[line["setting"]].pays_speed else 1.0
    return float(line["accuracy"] * speed)


def chosen_rate(lines: Iterable[Line], setting: str, arm: str) -> float | None:
    """The learning rate of the best short run, the smaller of two that are equal; None: no short run succeeded."""
    tried = [line for line in current(lines, setting, arm) if line["kind"] == "search" and "error" not in line]
    return max(tried, key=lambda line: (score(line), -line["learning_rate"]))["learning_rate"] if tried else None


def current(lines: Iterable[Line], setting: str, arm: str) -> list[Line]:
    """The lines of an arm as it is now: of the checkpoint, values and length of its last line; no run twice."""
    mine = [line for line in lines if (line["setting"], line["preset"]) == (setting, arm)]
    same = [line for line in mine if all(line[name] == mine[-1][name] for name in ("objective", "sft", "rollouts"))]
    return list({key_of(line): line for line in same}.values())
