"""The optimizer steps of one batch of rollouts -> its metrics, and the guard against an engine with other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dirl.errors import UserError
from dirl.training.optimizer import StepOutcome


class EngineMismatch(UserError):
    """Engine and trainer disagree by more than rounding."""


def update_metrics(
    steps: Sequence[StepOutcome], *, gauged: StepOutcome | None, has_reference: bool, max_logp_difference: float
) -> dict[str, float]:
    """Means over the steps, and over all their actions; the same on every rank.

    Args:
        gauged: engine against trainer, where the steps themselves could not compare them.
    Raises:
        EngineMismatch: trainer and engine differ by more than `max_logp_difference` nats an action (0: never).
    """
    moved = [step for step in steps if step.sums]  # with fewer groups than steps some have none
    total = {name: sum(step.sums[name] for step in moved) for name in (moved[0].sums if moved else ())}
    metrics = {name: sum(step.metrics[name] for step in steps) / len(steps) for name in steps[0].metrics}
    metrics["learning_rate"] = steps[-1].metrics["learning_rate"]
    actions = max(total.get("actions", 0.0), 1.0)
    clipped_low, clipped_high = (total.get(name, 0.0) / actions for name in ("clipped_low", "clipped_high"))
    metrics |= {
        "entropy": total.get("entropy", 0.0) / max(total.get("reveals", 0.0), 1.0),
        "clip_ratio/low_mean": clipped_low,
        "clip_ratio/high_mean": clipped_high,
        "clip_ratio/region_mean": clipped_low + clipped_high,
        "num_tokens": total.get("tokens", 0.0),
    }
    if has_reference:
        metrics["kl"] = total.get("kl", 0.0) / actions
    if moved:
        metrics["nll"] = total["nll"] / len(moved)
    if gauged is not None:
        return metrics | _mismatch_metrics([gauged], gauged.sums, max_logp_difference)
    return metrics | _mismatch_metrics(moved, total, max_logp_difference)


def _mismatch_metrics(
    steps: Sequence[StepOutcome], total: Mapping[str, float], max_logp_difference: float
) -> dict[str, float]:
    """Trainer against engine, over all ranks; ratios as they are before a correction cuts them."""
    compared = total.get("compared", 0.0)
    if not compared:
        return {}
    mean = total["difference"] / compared
    if max_logp_difference and not mean <= max_logp_difference:  # NaN is too large as well
        raise EngineMismatch(
            f"max_logp_difference={max_logp_difference}: trainer and engine differ by {mean:.3g} nats a token on "
            "average, so the engine does not hold the trainer's weights, or decodes by other rules; check rollout.* "
            "(approximate_cache is such a rule: none is exact) and the engine"
        )
    largest = {name: max(step.largest[name] for step in steps) for name in steps[0].largest}
    return {
        "sampling/logp_difference/mean": mean,
        "sampling/logp_difference/max": largest["difference"],
        "sampling/importance_sampling_ratio/min": -largest["minus_ratio"],
        "sampling/importance_sampling_ratio/mean": total["ratio"] / compared,
        "sampling/importance_sampling_ratio/max": largest["ratio"],
        "sampling/importance_sampling_ratio/cut_fraction": total["cut"] / compared,
    }
