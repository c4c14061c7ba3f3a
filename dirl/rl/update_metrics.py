"""The optimizer steps of one batch of rollouts -> its metrics, and the guard against an engine with other weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dirl.errors import UserError
from dirl.rl.gauge import quantiles
from dirl.training.distributed import Distributed
from dirl.training.optimizer import StepOutcome


class EngineMismatch(UserError):
    """Engine and trainer disagree by more than rounding."""


def update_metrics(
    steps: Sequence[StepOutcome],
    *,
    gauged: StepOutcome | None,
    has_reference: bool,
    max_logp_difference: float,
    distributed: Distributed,
) -> dict[str, float]:
    """Means over the steps, and over all their actions; the same on every rank, and collective.

    Args:
        gauged: engine against trainer, where the steps themselves could not compare them.
    Raises:
        EngineMismatch: trainer and engine differ by more than `max_logp_difference` nats a token, or a hold, on average
            (0: never).
    """
    moved = [step for step in steps if step.sums]  # with fewer groups than steps some have none
    total = _totals(moved)
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
    return metrics | _mismatch_metrics(moved if gauged is None else [gauged], max_logp_difference, distributed)


def _mismatch_metrics(
    steps: Sequence[StepOutcome], max_logp_difference: float, distributed: Distributed
) -> dict[str, float]:
    """Trainer against engine, over all ranks; ratios as they are before a correction cuts them. Collective."""
    total = _totals(steps)
    metrics: dict[str, float] = {}
    for prefix, count, what in (("", "compared", "token"), ("hold_", "compared_holds", "hold")):
        if not total.get(count):
            continue
        mean = total[f"{prefix}difference"] / total[count]
        if max_logp_difference and not mean <= max_logp_difference:  # NaN is too large as well
            raise EngineMismatch(
                f"max_logp_difference={max_logp_difference}: trainer and engine differ by {mean:.3g} nats a {what} on "
                "average, so the engine does not hold the trainer's weights, or decodes by other rules; check the "
                "engine and rollout.* (approximate_cache is such a rule: none is exact)"
            )
        metrics[f"sampling/{prefix}logp_difference/mean"] = mean
        metrics[f"sampling/{prefix}logp_difference/max"] = max(step.largest[f"{prefix}difference"] for step in steps)
    if not metrics:
        return {}
    compared, ratio_T = total["compared"] + total["compared_holds"], torch.cat([s.samples["ratio"] for s in steps])
    ratios = {
        "min": -max(step.largest["minus_ratio"] for step in steps),
        "mean": total["ratio"] / compared,
        "max": max(step.largest["ratio"] for step in steps),
        "cut_fraction": total["cut"] / compared,
        **dict(zip(("p01", "p50", "p99"), quantiles(ratio_T, (0.01, 0.5, 0.99), distributed), strict=True)),
    }
    return metrics | {f"sampling/importance_sampling_ratio/{name}": value for name, value in ratios.items()}


def _totals(steps: Sequence[StepOutcome]) -> dict[str, float]:
    return {name: sum(step.sums[name] for step in steps) for name in (steps[0].sums if steps else ())}
