"""What is scored and how, as values: the objective of RL.

A method of the literature is a set of values of these keys (`configs/objectives/`); `update.py` knows none by name.

    D_g = Z_g sum over i in g of w_i (l_i - l_i of the behaviour policy),  rho_g = exp D_g
    J   = sum over g of c_g s(rho_g, A_g)  -  beta sum c KL  +  entropy_coef sum c H  +  nll_coef mean l of right ones

over the actions i of the table, with g as `importance_sampling_level` says, s as `surrogate`, c as `loss_type`.

Shapes: V views of one completion, B block length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from dirl.config import PATH, Config, bounded
from dirl.diffusion.likelihood import Likelihood
from dirl.diffusion.masks import MaskLevels, MaskPlan, MaskWeights, mask_views
from dirl.diffusion.packing import Views
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import Scored, StepSampling, replay_views, sampled_steps
from dirl.errors import UserError

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo", "luspo"]
KLEstimator = Literal["k1", "k2", "k3"]
ScaleRewards = Literal["none", "group", "batch"]
ImportanceSampling = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
# Over which actions one ratio is taken: one action; those of one completion token; of one view (a denoising step); of
# the views of one block; of one completion. On-policy they have one gradient.
Level = Literal["action", "token", "step", "block", "sequence"]
Surrogate = Literal["clip", "cispo", "reinforce", "sandwich"]
AdvantageName = Literal["group", "leave_one_out", "softmax", "gae", "given"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """The objective, under TRL's names where TRL has one."""

    # the file of configs/objectives (or a path) whose values lie under these; `objective=NAME` for short
    preset: str = field(default="", metadata=PATH)
    # Which states are scored.
    views: str = "replay"  # replay: those the decoder visited; masks: random masks of the finished completion
    shrink: int = bounded(1, least=1)  # replay: neighbouring steps scored in one state; above 1: approximate (TraceRL)
    # replay: so many steps of a completion are drawn and weighted by how often they would be; unbiased. 0: all
    steps_per_completion: int = bounded(0, least=0)
    step_sampling: StepSampling = "uniform"  # or by the surprisal of what a step revealed
    score: Scored = "revealed"  # masked: also the tokens that a step left masked (RLDF); approximate
    likelihood: Likelihood = "reveal"  # trajectory: with the probability of which positions were revealed
    num_masks: int = bounded(1, least=1)  # masks: draws a block
    complementary: bool = False  # masks: each draw is a pair, the second masks what the first shows
    # masks: how many of a block's m tokens: k from 1..m alike; each with a probability drawn between mask_level_min and
    # _max; at the nodes of a Gauss-Legendre quadrature of num_masks points; or every k once
    mask_levels: MaskLevels = "uniform"
    mask_level_min: float = bounded(0.2, above=0, most=1)
    mask_level_max: float = bounded(0.8, above=0, most=1)
    mask_weights: MaskWeights = "elbo"  # of a token: elbo (m/k), none (1), mean (1/k)
    full_mask_share: float = bounded(0.0, least=0, most=1)  # masks: weight of a view that masks all; 1: nothing else
    refresh_masks: bool = False  # masks: others in each pass over the rollouts
    # masks, and where no group is fresh: replayed a step and rank, to compare engine and trainer
    gauge_completions: int = bounded(4, least=0)
    # The ratio and what is made of it.
    importance_sampling_level: Level = "action"  # over which actions a ratio is taken and clipped
    ratio_normalizer: Literal["none", "length"] = "none"  # length: the log-ratio over the completion's tokens
    surrogate: Surrogate = "clip"
    epsilon: float = bounded(0.2, least=0, below=1)  # a ratio below 1 - epsilon is clipped
    epsilon_high: float = bounded(0.2, least=0)  # a ratio above 1 + epsilon_high is clipped (DAPO's clip-higher: 0.28)
    delta: float = bounded(0.0, least=0)  # a ratio above this is cut for bad completions too (dual clip); 0: never
    sandwich_beta: float = bounded(1.5, least=1)  # the order of the upper bound (SPG)
    sandwich_weight: float = bounded(0.5, least=0, most=1)  # its share for completions of negative advantage
    # How good a completion was, and how much it counts.
    # of the group's mean, of the others' mean, softmax weights (wd1), a critic's values by denoising step, or as reward
    # functions gave it for each step
    advantage: AdvantageName = "group"
    scale_rewards: ScaleRewards = "none"  # none: the paper; group: GRPO's z-score; batch
    gae_gamma: float = bounded(1.0, least=0, most=1)  # gae: discount from a denoising step to the one before it
    gae_lambda: float = bounded(1.0, least=0, most=1)  # gae: 1 trusts the outcome, 0 the critic's value a step later
    loss_type: LossType = "dapo"
    mask_truncated_completions: bool = False  # they count in their group's mean, and are not trained on
    max_tokens_per_update: int = bounded(0, least=0)  # packed tokens: a random part of the completions (C3PO); 0: all
    # What is added.
    beta: float = bounded(0.0, least=0)  # weight of the KL; 0: the reference is never loaded
    kl_estimator: KLEstimator = "k3"
    kl_level: Literal["token", "sequence"] = "token"
    kl_to: Literal["reference", "behavior"] = "reference"
    entropy_coef: float = bounded(0.0, least=0)
    nll_coef: float = bounded(0.0, least=0)
    nll_on: Literal["right", "all"] = "right"
    importance_sampling_correction: ImportanceSampling = "none"  # for the mismatch of engine and trainer
    importance_sampling_clip_max: float = bounded(3.0, above=0)  # truncate: larger ratios become this; mask: 0

    def check(self) -> None:
        if self.views not in VIEWS:
            raise UserError(f"views must be one of {', '.join(VIEWS)}, got {self.views!r}")
        for refusal in _REFUSED:
            if all(_holds(getattr(self, key), wanted) for key, wanted in refusal.when.items()):
                given = " with ".join(f"{key}={getattr(self, key)}" for key in refusal.when)
                raise UserError(f"{given}: {refusal.because}")
        if 0 < self.delta <= 1 + self.epsilon_high:
            raise UserError(
                f"delta={self.delta} is not above 1 + epsilon_high = {1 + self.epsilon_high:g}, where good completions "
                "are cut; raise it, or use 0"
            )
        if self.mask_level_min > self.mask_level_max:
            raise UserError(f"mask_level_min={self.mask_level_min} is above mask_level_max={self.mask_level_max}")

    @property
    def scored_as(self) -> str:
        """What decides which actions a completion has, and in which order; keys that say nothing are left out."""
        plain = type(self).__dataclass_fields__
        told = [key for key in _STATE_KEYS if key in _ALWAYS_TOLD or getattr(self, key) != plain[key].default]
        return " ".join(f"{key}={getattr(self, key)}" for key in told)

    @property
    def reference_is_read(self) -> bool:
        return self.beta > 0 and self.kl_to == "reference"

    def views_of(self, trajectory: Trajectory, mask_token_id: int, seed: int) -> Views:
        """The states of a completion that are scored.

        Args:
            seed: of this completion, the same whenever it is scored; for builders that draw.
        """
        return VIEWS[self.views](trajectory, mask_token_id, self, seed)


ViewBuilder = Callable[[Trajectory, int, ObjectiveConfig, int], Views]


def _replay(trajectory: Trajectory, mask_token_id: int, objective: ObjectiveConfig, seed: int) -> Views:
    views = replay_views(trajectory, mask_token_id, shrink=objective.shrink, score=objective.score)
    if objective.steps_per_completion:
        views = sampled_steps(views, trajectory, objective.steps_per_completion, objective.step_sampling, seed)
    return views


def _masks(trajectory: Trajectory, mask_token_id: int, objective: ObjectiveConfig, seed: int) -> Views:
    plan = MaskPlan(
        num_masks=objective.num_masks,
        complementary=objective.complementary,
        levels=objective.mask_levels,
        interval=(objective.mask_level_min, objective.mask_level_max),
        weights=objective.mask_weights,
        full_mask_share=objective.full_mask_share,
    )
    return mask_views(trajectory, mask_token_id, plan, seed)


# A further kind of states is one function and one line here.
VIEWS: dict[str, ViewBuilder] = {"replay": _replay, "masks": _masks}

_ALWAYS_TOLD = ("views", "shrink", "likelihood")
_STATE_KEYS = (
    *_ALWAYS_TOLD,
    *("steps_per_completion", "step_sampling", "score", "num_masks", "complementary"),
    *("mask_levels", "mask_level_min", "mask_level_max", "mask_weights", "full_mask_share"),
)


@dataclass(frozen=True)
class _Refusal:
    """Values that make no sense together, and why."""

    when: dict[str, object]
    because: str


_SEVERAL = object()  # an int above 1
_ON = object()  # a number above 0, where 0 means off
_ANY_CORRECTION = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_BY_STEP = ("gae", "given")


def _holds(value: object, wanted: object) -> bool:
    if wanted is _SEVERAL or wanted is _ON:
        return isinstance(value, int | float) and value > (1 if wanted is _SEVERAL else 0)
    return value in wanted if isinstance(wanted, tuple) else value == wanted


_REFUSED: tuple[_Refusal, ...] = (
    _Refusal({"shrink": _SEVERAL, "likelihood": "trajectory"}, "merged steps have no hold probabilities; use reveal"),
    _Refusal({"score": "masked", "likelihood": "trajectory"}, "a position is not held and scored at once; use reveal"),
    _Refusal({"views": "masks", "likelihood": "trajectory"}, "nothing was held in a random mask; use reveal"),
    _Refusal({"views": "masks", "shrink": _SEVERAL}, "there are no steps to merge; use views=replay"),
    _Refusal({"views": "masks", "score": "masked"}, "a mask scores all it hides anyway; leave score=revealed"),
    _Refusal({"views": "masks", "steps_per_completion": _ON}, "there are no steps to draw; use views=replay"),
    _Refusal({"views": "masks", "advantage": _BY_STEP}, "there are no steps to judge; use views=replay"),
    _Refusal(
        {"views": "masks", "importance_sampling_level": "step"}, "a mask is no step; use token, block or sequence"
    ),
    _Refusal(
        {"views": "masks", "importance_sampling_correction": _ANY_CORRECTION},
        "the engine has no log-probabilities of random masks; use none",
    ),
    _Refusal(
        {"steps_per_completion": _ON, "importance_sampling_level": ("token", "block", "sequence")},
        "a part of the steps has no ratio of the whole; use action or step",
    ),
    _Refusal({"steps_per_completion": _ON, "kl_level": "sequence"}, "a part of the steps has no KL of the whole"),
    _Refusal({"steps_per_completion": _ON, "advantage": _BY_STEP}, "advantages of steps need all steps; use 0"),
    _Refusal({"shrink": _SEVERAL, "advantage": "given"}, "each denoising step has its own advantage; use shrink=1"),
    _Refusal({"score": "masked", "advantage": _BY_STEP}, "a token scored in many steps has no step; use revealed"),
    _Refusal({"surrogate": "sandwich", "views": "replay"}, "the bounds are over random masks; use views=masks"),
    _Refusal(
        {"surrogate": "sandwich", "num_masks": 1, "mask_levels": ("uniform", "interval", "gauss")},
        "an upper bound needs several draws; use num_masks=2 or more",
    ),
    _Refusal({"surrogate": "sandwich", "mask_weights": ("none", "mean")}, "the bounds are weighted m/k; use elbo"),
    _Refusal({"complementary": True, "mask_levels": ("gauss", "every")}, "a pair draws its own levels; use uniform"),
    _Refusal(
        {
            "importance_sampling_level": ("step", "block", "sequence"),
            "importance_sampling_correction": ("token_truncate", "token_mask"),
        },
        "one ratio is for many actions, and token_* weighs single ones; use sequence_*",
    ),
)
