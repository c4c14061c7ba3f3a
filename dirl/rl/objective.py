"""What is scored and how, as values: the objective of RL.

A method of the literature is a set of values of these keys; `update.py` knows none by name.

    J = sum over g of c_g min(rho_g A_g, clip(rho_g, 1 - epsilon, 1 + epsilon_high) A_g) - beta sum c KL

with rho_g = exp of the summed log-ratio of the actions of g, and g as `importance_sampling_level` says.

Shapes: V views of one completion, B block length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dirl.config import Config, bounded
from dirl.diffusion.likelihood import Likelihood
from dirl.diffusion.packing import Views
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import replay_views
from dirl.errors import UserError

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo"]
KLEstimator = Literal["k1", "k2", "k3"]
ScaleRewards = Literal["none", "group", "batch"]
Advantage = Literal["group", "leave_one_out", "softmax", "gae", "given"]
ImportanceSampling = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
# Over which actions one ratio is taken: one action; those of one completion token; of one view (a denoising step); of
# the views of one block; of one completion. On-policy they have one gradient.
Level = Literal["action", "token", "step", "block", "sequence"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """The objective, under TRL's names where TRL has one."""

    views: str = "replay"  # which states are scored; replay: those the decoder visited
    shrink: int = bounded(1, least=1)  # replay: neighbouring steps scored in one state; above 1: approximate (TraceRL)
    likelihood: Likelihood = "reveal"  # trajectory: with the probability of which positions were revealed
    importance_sampling_level: Level = "action"  # over which actions a ratio is taken and clipped
    epsilon: float = bounded(0.2, least=0, below=1)  # a ratio below 1 - epsilon is clipped
    epsilon_high: float = bounded(0.2, least=0)  # a ratio above 1 + epsilon_high is clipped (DAPO's clip-higher: 0.28)
    beta: float = bounded(0.0, least=0)  # weight of the KL to the reference; 0: the reference is never loaded
    kl_estimator: KLEstimator = "k3"
    loss_type: LossType = "dapo"
    scale_rewards: ScaleRewards = "none"  # none: the paper; group: GRPO's z-score; batch
    advantage: Advantage = "group"  # gae: of each action, from a critic's values and the group's advantage
    gae_gamma: float = bounded(1.0, least=0, most=1)  # gae: discount from a denoising step to the one before it
    gae_lambda: float = bounded(1.0, least=0, most=1)  # gae: 1 trusts the outcome, 0 the critic's value a step later
    importance_sampling_correction: ImportanceSampling = "none"  # for the mismatch of engine and trainer
    importance_sampling_clip_max: float = bounded(3.0, above=0)  # truncate: larger ratios become this; mask: 0

    def check(self) -> None:
        if self.views not in VIEWS:
            raise UserError(f"views must be one of {', '.join(VIEWS)}, got {self.views!r}")
        if self.likelihood == "trajectory" and self.shrink > 1:
            raise UserError(f"shrink={self.shrink} needs likelihood=reveal: merged steps have no hold probabilities")
        if self.advantage == "gae" and self.views != "replay":
            raise UserError(f"advantage=gae needs the decoder's steps: set views=replay, got {self.views!r}")
        is_wide = self.importance_sampling_level in ("step", "block", "sequence")
        if is_wide and self.importance_sampling_correction.startswith("token"):
            raise UserError(
                f"importance_sampling_correction={self.importance_sampling_correction} weighs single actions, and "
                f"importance_sampling_level={self.importance_sampling_level} has one ratio for many; use sequence_*"
            )

    @property
    def scored_as(self) -> str:
        """What decides which actions a completion has, and in which order."""
        return f"views={self.views} shrink={self.shrink} likelihood={self.likelihood}"

    def views_of(self, trajectory: Trajectory, mask_token_id: int, seed: int) -> Views:
        """The states of a completion that are scored.

        Args:
            seed: of this completion, the same whenever it is scored; for builders that draw.
        """
        return VIEWS[self.views](trajectory, mask_token_id, self, seed)


ViewBuilder = Callable[[Trajectory, int, ObjectiveConfig, int], Views]


def _replay(trajectory: Trajectory, mask_token_id: int, objective: ObjectiveConfig, seed: int) -> Views:
    return replay_views(trajectory, mask_token_id, shrink=objective.shrink)


# A further kind of states is one function and one line here.
VIEWS: dict[str, ViewBuilder] = {"replay": _replay}
