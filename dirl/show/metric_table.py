"""Every metric of a run, one row each: what it means, and where people see it.

The terminal, the report, the pictures, the model card and docs/metrics.md take their lists from here: to add a metric
is to add a row. Rows stand in the order in which they are shown; `headline` orders the few that matter most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dirl.files import read_json_lines
from dirl.show.metric import Metric, MetricTable

_LOSS = (
    "SFT: NELBO per scored token of the global batch, and `loss_autoregressive` times its weight. RL: the negative "
    "surrogate; its value says little"
)
_DECILES = "held-out cross-entropy per masked token at noise levels from d/10 to (d+1)/10"
_BINS = "groups with no right completion (`0`), up to a quarter, half, three quarters, below all, all (`100`)"
_RATIO = "probability ratio, trainer over engine, of a token or hold under the weights that sampled it, before any cut"

TABLE = MetricTable(
    (
        Metric("step", "", "finished optimizer steps"),
        Metric("stage", "", "which of `stages` the step was in; 0: before the first", panel="Stage"),
        Metric(
            "loss",
            "nats",
            _LOSS,
            panel="Loss",
            picture="loss",
            column="loss",
            tile="loss",
            headline=1,
        ),
        Metric(
            "eval/loss",
            "nats",
            "held-out NELBO per scored token, with the same noise at every call",
            panel="Loss",
            picture="loss",
            column="held-out loss",
            tile="held-out loss",
            headline=2,
        ),
        Metric("loss_autoregressive", "nats", "per first token of a block, from the clean copy", panel="Loss"),
        Metric(
            "eval/loss_noise_decile_{d}",
            "nats",
            _DECILES,
            panel="Held-out loss by noise level",
            picture="loss_by_noise",
        ),
        Metric(
            "reward",
            "",
            "mean over completions",
            panel="Reward",
            picture="reward",
            column="reward",
            tile="reward",
            headline=3,
        ),
        Metric(
            "reward_std",
            "",
            "standard deviation within a group, averaged over groups",
            panel="Reward",
            column="± in group",
        ),
        Metric(
            "rewards/{function}/mean", "", "mean of each reward function over the completions it applies to", "Reward"
        ),
        Metric("frac_reward_zero_std", "share", "groups whose rewards are all equal"),
        Metric("completions/accuracy", "share", "mean of the reward `accuracy`, where the rubric has it", "", "reward"),
        Metric(
            "eval/accuracy",
            "share",
            "right answers to held-out problems, sampled as in the rollouts, mean over problems and samples",
            panel="Held-out accuracy",
            picture="reward",
            column="held-out acc.",
            tile="held-out accuracy",
            headline=4,
            error="eval/standard_error",
        ),
        Metric("eval/standard_error", "share", "standard error of `eval/accuracy` over problems", headline=5),
        Metric(
            "eval/greedy/accuracy",
            "share",
            "right answers to held-out problems, one greedy completion per problem",
            panel="Held-out accuracy",
            tile="the same, greedy",
            headline=6,
            error="eval/greedy/standard_error",
        ),
        Metric("eval/greedy/standard_error", "share", "standard error of `eval/greedy/accuracy` over problems"),
        Metric(
            "completions/mean_length",
            "tokens",
            "mean length up to and including the end",
            panel="Completion length",
            picture="completion_length",
            column="length",
            tile="completion length",
            headline=9,
        ),
        Metric("completions/max_length", "tokens", "the longest completion", "Completion length", "completion_length"),
        Metric("completions/min_length", "tokens", "the shortest completion", "Completion length"),
        Metric(
            "completions/tokens_per_step",
            "",
            "tokens up to and including the end over denoising steps",
            panel="Tokens per step",
            picture="tokens_per_step",
            column="tokens/step",
            tile="tokens per step",
            headline=8,
        ),
        Metric(
            "eval/tokens_per_step",
            "",
            "the same on held-out problems",
            panel="Tokens per step",
            picture="tokens_per_step",
            headline=7,
        ),
        Metric("eval/greedy/tokens_per_step", "", "the same on held-out problems, greedy", "Tokens per step"),
        Metric("groups/pass_rate/{bin}", "groups", _BINS, "Groups by pass rate"),
        Metric("groups/kept", "groups", "trained on", "Groups"),
        Metric("groups/dropped_all_correct", "groups", "equal rewards, all completions right", "Groups"),
        Metric("groups/dropped_all_wrong", "groups", "equal rewards, no completion right", "Groups"),
        Metric("groups/dropped_mixed", "groups", "equal rewards, some completions right and some not", "Groups"),
        Metric("groups/dropped_none_right", "groups", "no completion right: `rollout.needs_right`", "Groups"),
        Metric("groups/dropped_pass_rate", "groups", "share right outside `rollout.keep_pass_rate`", "Groups"),
        Metric("groups/dropped_small_spread", "groups", "a reward hardly varies: `rollout.min_spread`", "Groups"),
        Metric("groups/carried_over", "groups", "informative, more than the step needs, kept for the next one"),
        Metric("rewards/right", "completions", "equal to the gold", "Verdicts of the grader"),
        Metric("rewards/wrong", "completions", "not equal", "Verdicts of the grader"),
        Metric("rewards/no_answer", "completions", "no box, or an empty one", "Verdicts of the grader"),
        Metric(
            "rewards/too_long",
            "completions",
            "box longer than `reward.max_answer_chars`",
            "Verdicts of the grader",
        ),
        Metric(
            "rewards/timeout",
            "completions",
            "judging took longer than `reward.grader_timeout_seconds`",
            "Verdicts of the grader",
        ),
        Metric("rewards/crash", "completions", "judging died, mostly of its memory limit", "Verdicts of the grader"),
        Metric(
            "rewards/unparsable_gold",
            "completions",
            "the data set's answer could not be read",
            "Verdicts of the grader",
        ),
        Metric(
            "entropy",
            "nats",
            "of the policy at revealed tokens",
            panel="Entropy",
            picture="entropy",
            column="entropy",
            headline=10,
        ),
        Metric("nll", "nats", "a token of right completions (`objective.nll_on`) in the states scored", "Likelihood"),
        Metric(
            "kl",
            "nats",
            "per action, to the reference; only with `beta` above 0",
            panel="KL",
            picture="kl",
            column="KL",
            headline=11,
        ),
        Metric("threshold/mean", "", "mean confidence threshold drawn by `rollout.threshold_policy`"),
        Metric("threshold/entropy", "nats", "of that policy, mean over completions"),
        Metric("threshold/grad_norm", "", "L2 norm of the gradient of that policy"),
        Metric("clip_ratio/low_mean", "share", "actions held back at the lower clip", "Clip ratio"),
        Metric("clip_ratio/high_mean", "share", "actions held back at the upper clip", "Clip ratio"),
        Metric("clip_ratio/region_mean", "share", "actions held back at either clip", "Clip ratio", column="clipped"),
        Metric(
            "sampling/logp_difference/mean",
            "nats",
            "mean difference of trainer and engine on the same tokens, under the weights that sampled them",
            "Trainer against engine",
        ),
        Metric("sampling/logp_difference/max", "nats", "the largest of these differences", "Trainer against engine"),
        Metric(
            "sampling/hold_logp_difference/mean",
            "nats",
            "the same of holds, where the engine recorded them",
            "Trainer against engine",
        ),
        Metric("sampling/hold_logp_difference/max", "nats", "the largest of these", "Trainer against engine"),
        Metric("sampling/importance_sampling_ratio/min", "", f"smallest {_RATIO}", "Importance sampling ratio"),
        Metric("sampling/importance_sampling_ratio/mean", "", f"mean {_RATIO}", "Importance sampling ratio"),
        Metric("sampling/importance_sampling_ratio/max", "", f"largest {_RATIO}", "Importance sampling ratio"),
        *(
            Metric(
                f"sampling/importance_sampling_ratio/p{percent}",
                "",
                f"{percent.lstrip('0')} % of these ratios are no larger",
                "Importance sampling ratio",
            )
            for percent in ("01", "50", "99")
        ),
        Metric(
            "sampling/importance_sampling_ratio/cut_fraction",
            "share",
            "ratios that `importance_sampling_correction` cut",
            "Importance sampling ratios cut",
        ),
        Metric(
            "critic/loss", "", "clipped squared error of the critic's values, halved; with `advantage: gae`", "Critic"
        ),
        Metric(
            "critic/explained_variance",
            "share",
            "of the returns' variance, by the values before the update; 0: no better than their mean",
            "Critic",
        ),
        Metric("critic/value_mean", "", "mean value of the revealed tokens before the update", "Critic"),
        Metric("critic/clip_fraction", "share", "values held back by `critic.clip_range`", "Critic"),
        Metric("critic/grad_norm", "", "L2 norm of the critic's gradient before clipping", "Gradient norm"),
        Metric("critic/learning_rate", "", "of the critic in this step", "Learning rate"),
        Metric(
            "completions/clipped_ratio",
            "share",
            "completions that reached `max_completion_length`",
            "Truncated completions",
        ),
        Metric("num_completion_tokens", "tokens", "of the step, up to and including the ends"),
        Metric("num_tokens", "tokens", "packed tokens of the step: clean ones and views"),
        Metric("documents/too_long", "documents", "passed over in this step: longer than `data.max_length`"),
        Metric("documents/bad", "documents", "passed over in this step: bad rows that only tokenising shows"),
        Metric(
            "grad_norm",
            "",
            "L2 norm of the gradient before clipping",
            panel="Gradient norm",
            picture="grad_norm",
            column="grad norm",
        ),
        Metric("skipped_steps", "0 or 1", "1: loss or gradient was not finite, nothing was changed"),
        Metric("learning_rate", "", "of this step", panel="Learning rate", picture="learning_rate", column="lr"),
        Metric("timing_s/rollout", "s", "decoding, all rounds", "Time per phase", "phases"),
        Metric("timing_s/reward", "s", "scoring", "Time per phase", "phases"),
        Metric("timing_s/wait_for_rollouts", "s", "for rounds ahead that are not done", "Time per phase", "phases"),
        Metric("engine_s/rollout", "s", "decoding of the rounds ahead that this step took"),
        Metric("engine_s/reward", "s", "scoring of these rounds"),
        Metric("waiting/trainer", "share", "of the step that the trainer waited for rollouts", "Waiting"),
        Metric("waiting/engine", "share", "of the step that the engine did not decode or score", "Waiting"),
        Metric("staleness/mean", "steps", "optimizer steps since the weights that sampled a token", "Staleness"),
        Metric("staleness/max", "steps", "the same, of the oldest token", "Staleness"),
        Metric("groups/too_old", "groups", "dropped: their weights were more than `max_staleness` behind"),
        Metric("partial/continued", "completions", "that went on behind what earlier rounds had decoded", "In parts"),
        Metric("partial/waited_for", "groups", "decoded to their end: `max_partial_age` old", "In parts"),
        Metric("partial/tokens_kept", "tokens", "of groups that are not complete: later steps go on behind them"),
        Metric("timing_s/update_weights", "s", "push to the engine", "Time per phase", "phases"),
        Metric("timing_s/train", "s", "forward and backward passes, optimizer", "Time per phase", "phases"),
        Metric(
            "timing_s/step",
            "s",
            "SFT: the optimizer step. RL: rollout, reward, training, push",
            panel="Time per phase",
            picture="phases",
            column="seconds",
            part="timing_s/train",
        ),
        Metric("timing_s/eval", "s", "evaluation, where there was one", "Time per phase", "phases"),
        Metric("timing_s/save", "s", "checkpoint, where there was one", "Time per phase", "phases"),
        Metric(
            "perf/rollout_tokens_per_s",
            "tokens/s",
            "completion tokens up to the end over the time of decoding",
            panel="Throughput",
            column="rollout tok/s",
        ),
        Metric(
            "perf/train_tokens_per_s",
            "tokens/s",
            "packed tokens over the time of training",
            panel="Throughput",
            column="train tok/s",
        ),
        Metric(
            "perf/peak_memory_gb",
            "GB",
            "most memory in use: of the GPU since the last line, without one of the process",
            panel="Peak memory",
        ),
    )
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line without its newline was cut by a kill and is left out.

    Raises:
        UserError: a complete line is not a JSON object with a step.
    """
    return list(read_json_lines(path, "a line of metrics", lambda row: row["step"] + 0))
