"""metrics.jsonl -> the panels of the report, thinned to what a screen can show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

MAX_POINTS = 400  # of a curve; more are means of neighbours, so that a report of any length stays small

Kind = Literal["lines", "plain", "stacked", "levels"]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart: which metrics it shows and how."""

    title: str
    unit: str
    patterns: tuple[str, ...]  # regular expressions a metric's whole name must match; shown in this order
    kind: Kind = "lines"  # plain: not smoothed; stacked: layers; levels: against the noise level, a line per evaluation
    errors: tuple[tuple[str, str], ...] = ()  # (metric, metric that is its standard error)


PANELS = (
    Panel(title="Loss", unit="nats per token", patterns=("loss", "eval/loss")),
    Panel(
        title="Held-out loss by noise level",
        unit="nats per token, against the masked share of a block",
        patterns=(r"eval/loss_noise_decile_\d+",),
        kind="levels",
    ),
    Panel(title="Reward", unit="mean over completions", patterns=("reward", "reward_std", r"rewards/.+/mean")),
    Panel(
        title="Held-out accuracy",
        unit="share of right answers, ± standard error",
        patterns=("eval/accuracy", "eval/greedy/accuracy"),
        errors=(
            ("eval/accuracy", "eval/standard_error"),
            ("eval/greedy/accuracy", "eval/greedy/standard_error"),
        ),
    ),
    Panel(
        title="Completion length",
        unit="tokens up to and including EOS",
        patterns=("completions/mean_length", "completions/max_length", "completions/min_length"),
    ),
    Panel(
        title="Tokens per step",
        unit="tokens per denoising step",
        patterns=("completions/tokens_per_step", "eval/tokens_per_step", "eval/greedy/tokens_per_step"),
    ),
    Panel(
        title="Groups by pass rate",
        unit="share of groups in which so many completions are right",
        patterns=(r"groups/pass_rate/.+",),
        kind="stacked",
    ),
    Panel(
        title="Groups",
        unit="groups of a step",
        patterns=("groups/kept", "groups/dropped_all_correct", "groups/dropped_all_wrong"),
        kind="stacked",
    ),
    Panel(title="Entropy", unit="nats per token", patterns=("entropy",)),
    Panel(title="KL", unit="nats per action, to the reference policy", patterns=("kl",)),
    Panel(title="Clip ratio", unit="share of actions", patterns=(r"clip_ratio/.+",)),
    Panel(
        title="Trainer against engine",
        unit="nats, difference of log-probabilities",
        patterns=(r"sampling/logp_difference/.+",),
    ),
    Panel(title="Truncated completions", unit="share", patterns=("completions/clipped_ratio",)),
    Panel(title="Gradient norm", unit="L2 norm before clipping", patterns=("grad_norm",)),
    Panel(title="Learning rate", unit="", patterns=("learning_rate",), kind="plain"),
    Panel(
        title="Time per phase",
        unit="seconds of a step",
        patterns=(r"timing_s/.+",),
        kind="stacked",
    ),
    Panel(title="Throughput", unit="tokens per second", patterns=(r"perf/.+_tokens_per_s",)),
)


def draw_panels(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every panel the rows have numbers for, as the page's script wants it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [drawn for panel in PANELS if (drawn := _draw(panel, rows, names)) is not None]


def _draw(panel: Panel, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    matching = [name for pattern in panel.patterns for name in names if re.fullmatch(pattern, name)]
    if "timing_s/train" in matching:
        matching.remove("timing_s/step")  # the sum of phases that are shown; an SFT step is one phase
    if not matching:
        return None
    if panel.kind == "stacked":
        series = _layers(matching, rows)
    elif panel.kind == "levels":
        series = _levels(matching, rows)
    else:
        errors = dict(panel.errors)
        series = [_line(name, errors.get(name), rows) for name in matching]
    series = [one for one in series if one["x"]]
    if not series:
        return None
    if panel.title == "Groups by pass rate":
        _to_shares(series)
    labels = _short_names([one["name"] for one in series]) if panel.kind == "stacked" else None
    for one, label in zip(series, labels or [one["name"] for one in series], strict=True):
        one["name"] = label
    x_label = "level" if panel.kind == "levels" else "step"
    kind = "lines" if panel.kind == "levels" else panel.kind
    return {"title": panel.title, "unit": panel.unit, "kind": kind, "x_label": x_label, "series": series}


def _line(name: str, error: str | None, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One metric over steps; numbers that were not finite (null) are left out."""
    known = [row for row in rows if row.get(name) is not None]
    drawn = {
        "name": name,
        "x": thin([row["step"] for row in known], whole=True),
        "y": thin([row[name] for row in known]),
    }
    if error is not None and known and all(row.get(error) is not None for row in known):
        drawn["e"] = thin([row[error] for row in known])
    return drawn


def _layers(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers over the same steps; what a step did not log took nothing there."""
    names = list(names)
    known = [row for row in rows if any(row.get(name) is not None for name in names)]
    steps = thin([row["step"] for row in known], whole=True)
    return [{"name": name, "x": steps, "y": thin([row.get(name) or 0.0 for row in known])} for name in names]


def _levels(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first, a middle and the last evaluation, each as a curve over noise levels."""
    deciles = sorted((int(name.rpartition("_")[2]), name) for name in names)
    known = [row for row in rows if any(row.get(name) is not None for _, name in deciles)]
    chosen = dict.fromkeys(round(i * (len(known) - 1) / 3) for i in range(4)) if known else {}
    drawn = []
    for row in (known[i] for i in chosen):
        points = [((decile + 0.5) / 10, row[name]) for decile, name in deciles if row.get(name) is not None]
        drawn.append(
            {"name": f"step {row['step']}", "x": [x for x, _ in points], "y": [_short(float(y)) for _, y in points]}
        )
    return drawn


def _to_shares(series: Sequence[dict[str, Any]]) -> None:
    totals = [sum(column) or 1.0 for column in zip(*(one["y"] for one in series), strict=True)]
    for one in series:
        one["y"] = [_short(value / total) for value, total in zip(one["y"], totals, strict=True)]


def _short_names(names: Sequence[str]) -> list[str]:
    """The names without the folders that all of them share."""
    folder = names[0].rpartition("/")[0] + "/"
    return [name.removeprefix(folder) for name in names]


def thin(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """At most MAX_POINTS values, each the mean of its neighbours; the last value of a run of steps where `whole`."""
    count = len(values)
    if count <= MAX_POINTS:
        return [value if whole else _short(float(value)) for value in values]
    bounds = [count * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    parts = [values[start:end] for start, end in pairwise(bounds)]
    return [part[-1] if whole else _short(sum(part) / len(part)) for part in parts]


def _short(value: float) -> float:
    """Five digits: more are not seen, and weigh."""
    return float(f"{value:.5g}")
