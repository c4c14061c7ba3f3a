"""The charts of a run: panels of the report, and pictures in plots/. Which metrics stand in one, their rows say.

Both are shown in the order of their lists; one whose numbers a run did not log is left out, so SFT and RL share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# plain: not smoothed; stacked: layers; shares: layers over their sum; levels: against the noise level, a line each of
# some evaluations
Kind = Literal["lines", "plain", "stacked", "shares", "levels"]


@dataclass(frozen=True)
class Panel:
    """A chart of the report; rows name it by its title."""

    title: str
    unit: str  # said under the title
    kind: Kind = "lines"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG; rows name it by its file, without folder and ending."""

    file_name: str
    title: str
    y_label: str
    x_label: str = "optimizer step"
    kind: Literal["lines", "stacked", "levels"] = "lines"


PANELS = (
    Panel("Loss", "nats per token"),
    Panel("Held-out loss by noise level", "nats per token, against the masked share of a block", "levels"),
    Panel("Reward", "mean over completions"),
    Panel("Held-out accuracy", "share of right answers, ± standard error"),
    Panel("Completion length", "tokens up to and including EOS"),
    Panel("Tokens per step", "tokens per denoising step"),
    Panel("Groups by pass rate", "share of groups in which so many completions are right", "shares"),
    Panel("Groups", "groups of a step", "stacked"),
    Panel("Verdicts of the grader", "completions", "stacked"),
    Panel("Entropy", "nats per token"),
    Panel("KL", "nats per action, to the reference policy"),
    Panel("Likelihood", "nats per token of right completions, negative log-likelihood of the states scored"),
    Panel("Clip ratio", "share of actions"),
    Panel("Trainer against engine", "nats, difference of log-probabilities"),
    Panel("Importance sampling ratio", "trainer over engine, before any cut"),
    Panel("Importance sampling ratios cut", "share"),
    Panel("Critic", "value loss, and share of the returns' variance that the values explain"),
    Panel("Truncated completions", "share"),
    Panel("Gradient norm", "L2 norm before clipping"),
    Panel("Learning rate", "", "plain"),
    Panel("Stage", "which of the configuration's stages", "plain"),
    Panel("Time per phase", "seconds of a step", "stacked"),
    Panel("Waiting", "share of a step, where rollouts go on while the trainer trains"),
    Panel("Staleness", "optimizer steps since the weights that sampled a token"),
    Panel("In parts", "completions that went on, and groups that were waited for"),
    Panel("Throughput", "tokens per second"),
    Panel("Peak memory", "GB", "plain"),
)
PICTURES = (
    Picture(file_name="loss", title="Loss", y_label="nats per token"),
    Picture(
        file_name="loss_by_noise",
        title="Held-out loss by noise level",
        y_label="nats per token",
        x_label="masked share of a block",
        kind="levels",
    ),
    Picture(file_name="reward", title="Reward and accuracy", y_label="mean"),
    Picture(file_name="tokens_per_step", title="Decoding speed", y_label="tokens per denoising step"),
    Picture(file_name="completion_length", title="Completion length", y_label="tokens"),
    Picture(file_name="entropy", title="Entropy of the policy", y_label="nats per token"),
    Picture(file_name="kl", title="Distance from the reference policy", y_label="nats per token"),
    Picture(file_name="grad_norm", title="Gradient norm", y_label="L2 norm"),
    Picture(file_name="learning_rate", title="Learning rate", y_label="learning rate"),
    Picture(file_name="phases", title="Time per step", y_label="seconds", kind="stacked"),
)


def short_names(names: Sequence[str]) -> list[str]:
    """The names of a chart's layers without the folders that all of them share."""
    folder = names[0].rpartition("/")[0] + "/"
    return [name.removeprefix(folder) for name in names]
