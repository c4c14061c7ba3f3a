"""The groups of one step -> its numbers, under TRL's names, and lines for people to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from dirl.diffusion.packing import DiffusionScheme
from dirl.rl.collector import Collected
from dirl.rl.rollout_group import RolloutGroup
from dirl.rl.rollouts import DropReason
from dirl.rollout.generate import with_texts
from dirl.training.distributed import Distributed

# Names of the pass-rate histogram's bins, in percent, and the highest pass rate that falls into each.
PASS_RATE_BINS = {
    "0": 0.0,
    "up_to_25": 0.25,
    "up_to_50": 0.5,
    "up_to_75": 0.75,
    "below_100": 1.0 - 1e-9,
    "100": 1.0,
}


@dataclass(frozen=True)
class GroupSummary:
    """A group without its tokens: what ranks tell each other."""

    dropped_for: DropReason | None  # None: trained on
    rewards: list[float]
    reward_parts: dict[str, list[float | None]]
    completion_lengths: list[int]
    denoising_steps: list[int]
    num_truncated: int
    num_right: int

    @property
    def pass_rate(self) -> float:
        """Share of right completions."""
        return self.num_right / len(self.rewards)

    @property
    def reward_std(self) -> float:
        return statistics.stdev(self.rewards) if max(self.rewards) > min(self.rewards) else 0.0


def summarise(collected: Collected) -> list[GroupSummary]:
    """Every group of a step, the dropped ones included."""
    reasons = [*(None for _ in collected.groups), *collected.drop_reasons]
    return [
        GroupSummary(
            dropped_for=reason,
            rewards=group.rewards,
            reward_parts=group.reward_parts,
            completion_lengths=[completion.completion_length for completion in group.completions],
            denoising_steps=[completion.num_denoising_steps for completion in group.completions],
            num_truncated=sum(completion.is_truncated for completion in group.completions),
            num_right=group.num_right,
        )
        for group, reason in zip(collected.everyone, reasons, strict=True)
    ]


def metrics_of_all_ranks(collected: Collected, step: int, distributed: Distributed) -> dict[str, float]:
    """Numbers of all ranks' rollouts, those of dropped groups included; collective.

    Args:
        step: optimizer steps that the weights which were trained had taken.
    """
    metrics = rollout_metrics(distributed.gather(summarise(collected)))
    counters = sorted(set(distributed.gather(list(collected.counters))))
    counts = distributed.sum(*(collected.counters.get(name, 0) for name in counters)) if counters else []
    metrics["groups/carried_over"] = collected.num_carried
    if collected.metrics:
        metrics |= _stale_metrics(collected, step, distributed)
    return metrics | {f"rewards/{name}": count for name, count in zip(counters, counts, strict=True)}


def _stale_metrics(collected: Collected, step: int, distributed: Distributed) -> dict[str, float]:
    """Of steps with rounds ahead, or partial ones."""
    completions = [(group, completion) for group in collected.groups for completion in group.completions]
    ages = [step - then for group, completion in completions for then in group.sampled_at_of(completion)]
    names = sorted(name for name in collected.metrics if not name.startswith("timing_s/"))
    total, count, *sums = distributed.sum(sum(ages), len(ages), *(collected.metrics[name] for name in names))
    metrics = {"staleness/mean": total / max(count, 1.0), "staleness/max": distributed.max(max(ages, default=0))}
    if "groups/too_old" in names:  # the engine's seconds are beside the phases of the trainer, not among them
        for name in ("rollout", "reward"):
            metrics[f"engine_s/{name}"] = distributed.max(collected.metrics.get(f"timing_s/{name}", 0.0))
    return metrics | dict(zip(names, sums, strict=True))


def rollout_metrics(groups: Sequence[GroupSummary]) -> dict[str, float]:
    """Means over all completions of a step, those of dropped groups included."""
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [length for group in groups for length in group.completion_lengths]
    num_tokens = sum(lengths)
    equal = [group for group in groups if group.dropped_for == "equal_rewards"]
    metrics: dict[str, float] = {
        "reward": statistics.fmean(rewards),
        "reward_std": statistics.fmean(group.reward_std for group in groups),
        "frac_reward_zero_std": statistics.fmean(group.reward_std == 0 for group in groups),
        "completions/mean_length": num_tokens / len(rewards),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(group.num_truncated for group in groups) / len(rewards),
        "completions/tokens_per_step": num_tokens / sum(sum(group.denoising_steps) for group in groups),
        "groups/kept": sum(group.dropped_for is None for group in groups),
        "groups/dropped_all_correct": sum(group.pass_rate == 1 for group in equal),
        "groups/dropped_all_wrong": sum(group.pass_rate == 0 for group in equal),
        "groups/dropped_mixed": sum(0 < group.pass_rate < 1 for group in equal),  # right and wrong, rewarded alike
        "groups/dropped_none_right": sum(group.dropped_for == "none_right" for group in groups),
        "groups/dropped_pass_rate": sum(group.dropped_for == "pass_rate" for group in groups),
        "groups/dropped_small_spread": sum(group.dropped_for == "small_spread" for group in groups),
        "num_completion_tokens": num_tokens,
        **pass_rate_histogram([group.pass_rate for group in groups]),
    }
    for name in groups[0].reward_parts:
        values = [value for group in groups for value in group.reward_parts[name] if value is not None]
        if values:
            metrics[f"rewards/{name}/mean"] = statistics.fmean(values)
    if "rewards/accuracy/mean" in metrics:
        metrics["completions/accuracy"] = metrics["rewards/accuracy/mean"]
    return metrics


def pass_rate_histogram(pass_rates: Sequence[float]) -> dict[str, float]:
    """How many groups are all wrong, right in up to a quarter of their completions, ..., all right."""
    counts = dict.fromkeys(PASS_RATE_BINS, 0)
    for rate in pass_rates:
        counts[next(name for name, most in PASS_RATE_BINS.items() if rate <= most)] += 1
    return {f"groups/pass_rate/{name}": count for name, count in counts.items()}


def throughput(metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second of rollout (completion tokens up to EOS) and of training (packed tokens)."""
    rollout_seconds = metrics.get("timing_s/rollout", 0.0)  # none where the step began with enough groups
    waits = {}
    if "engine_s/rollout" in metrics:  # trainer and engine work side by side
        seconds, rollout_seconds = metrics["timing_s/step"], metrics["engine_s/rollout"]
        waits = {
            "waiting/trainer": metrics.get("timing_s/wait_for_rollouts", 0.0) / seconds,
            "waiting/engine": max(1 - (rollout_seconds + metrics["engine_s/reward"]) / seconds, 0.0),
        }
    return waits | {
        "perf/rollout_tokens_per_s": metrics["num_completion_tokens"] / rollout_seconds if rollout_seconds else 0.0,
        "perf/train_tokens_per_s": metrics["num_tokens"] / metrics["timing_s/train"],
    }


def headline(metrics: Mapping[str, float]) -> str:
    """One step in a line."""
    numbers = [
        f"reward {metrics['reward']:.3f}",
        f"{metrics['completions/tokens_per_step']:.2f} tokens/step",
        f"length {metrics['completions/mean_length']:.0f}",
        f"rollout {metrics['perf/rollout_tokens_per_s']:.0f} tok/s",
        f"train {metrics['perf/train_tokens_per_s']:.0f} tok/s",
    ]
    if "eval/accuracy" in metrics:
        numbers.insert(1, f"eval {metrics['eval/accuracy']:.3f}")
    return "  ".join(numbers)


def sample_line(group: RolloutGroup) -> str:
    """The best completion of a group, for the terminal: one line, its beginning where it is long."""
    best = max(range(len(group.rewards)), key=group.rewards.__getitem__)
    text = " ".join(f"{group.prompt.problem.question} {group.completions[best].text}".split())
    text = text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"
    return f"{text}  (gold {group.prompt.problem.answer}, {group.rewards[best]:g})"


def completion_rows(
    groups: Sequence[RolloutGroup], tokenizer: PreTrainedTokenizerBase, scheme: DiffusionScheme
) -> Iterator[dict[str, object]]:
    """One JSON row a completion: everything needed to judge, replay or show it.

    Log-probabilities that are no numbers, of an engine gone wrong, are left out: JSON has none for them.
    """
    for number, group in enumerate(groups):
        for index, completion in enumerate(with_texts(group.completions, tokenizer, scheme)):
            yield {
                "group": number,
                "question": group.prompt.problem.question,
                "answer": group.prompt.problem.answer,
                "reward": group.rewards[index],
                "rewards": {name: values[index] for name, values in group.reward_parts.items()},
                **vars(completion),
                **{name: _all_finite(getattr(completion, name)) for name in ("logprobs", "hold_logprobs")},
            }


def _all_finite(values: list[float] | None) -> list[float] | None:
    return values if all(map(math.isfinite, values or ())) else None
