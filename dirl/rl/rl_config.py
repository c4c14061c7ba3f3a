"""Everything that an RL run is told, and what a memory estimate needs to know of it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from dirl.config import CONFIGS, PATH, bounded
from dirl.data.data_config import DataConfig, RowsConfig
from dirl.data.problems import check_band
from dirl.diffusion.distribution import TokenDistribution
from dirl.errors import UserError
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.registry import published_order
from dirl.model.lora import LoraConfig
from dirl.model.memory import Workload
from dirl.presets import Presets
from dirl.reward.rubric import JUDGES, RewardConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.update import UpdateConfig
from dirl.rollout.build import chosen_engine, engine_load
from dirl.rollout.engine import SamplingConfig
from dirl.training.background import BackgroundConfig
from dirl.training.loop import TrainingConfig
from dirl.training.optimizer import OPTIMIZER_BYTES
from dirl.training.stages import stages_of

_OBJECTIVE_KEYS = (
    *("likelihood", "epsilon", "epsilon_high", "beta", "kl_estimator", "loss_type", "scale_rewards"),
    *("importance_sampling_correction", "importance_sampling_clip_max"),
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RLDataConfig(DataConfig):
    """The problems that are practised on."""

    max_prompt_length: int = bounded(1024, least=1)  # tokens; longer prompts are left out and counted
    suffix: str = ""  # appended to each question
    # [low, high]: only problems whose column pass_rate, of `dirl difficulty`, lies within; empty: all
    pass_rate: list[float] = field(default_factory=list, metadata={"least": 0, "most": 1})

    def check(self) -> None:
        super().check()
        check_band("pass_rate", self.pass_rate)


@dataclass(frozen=True, kw_only=True)
class RLEvalConfig(RowsConfig, BackgroundConfig):
    """The evaluation during training: the sampling of the rollouts on held-out problems."""

    path: str = field(default="", metadata=PATH)  # as data.path; empty: what data.heldout keeps apart, if anything
    split: str = "test"  # of a hub data set
    limit: int = bounded(64, least=0)  # problems; 0: all
    num_samples: int = bounded(4, least=1)  # completions a problem
    greedy: bool = True  # also one greedy completion a problem

    def check(self) -> None:
        RowsConfig.check(self)
        BackgroundConfig.check(self)


@dataclass(frozen=True, kw_only=True)
class RLConfig(TrainingConfig, UpdateConfig):
    """Everything of an RL run."""

    ALIASES: ClassVar[Mapping[str, str]] = {key: f"objective.{key}" for key in _OBJECTIVE_KEYS}
    PRESETS: ClassVar[Mapping[str, Presets]] = {
        "objective": CONFIGS / "objectives",
        "rollout": published_order,
    }
    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        "model.block_length",
        *("rollout.max_completion_length", "rollout.temperature", "rollout.top_k", "rollout.top_p"),
        *("rollout.confidence_threshold", "rollout.denoising_steps", "rollout.entropy_bound"),
        *("rollout.prompts_per_step", "rollout.num_generations", "rollout.max_sampling_rounds", "rollout.oversampling"),
    )

    FIXED: ClassVar[tuple[str, ...]] = (
        *("seed", "model.dtype", "model.block_length", "lora", "objective", "critic.backbone"),
        *("data.limit", "data.heldout", "data.max_prompt_length"),
        *("data.system_prompt", "data.suffix", "data.pass_rate"),
        *(f"rollout.{f.name}" for f in fields(SamplingConfig)),
        *("reward.functions", "reward.weights", "reward.parameters", "reward.combine", "reward.answer_extraction"),
    )

    output_dir: str = "outputs/rl"
    learning_rate: float = bounded(1e-6, least=0)
    completions_steps: int = bounded(10, least=0)  # optimizer steps between files of completions; 0: none
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: RLDataConfig = field(default_factory=RLDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: RLEvalConfig = field(default_factory=RLEvalConfig)

    def check(self) -> None:
        if self.max_steps > 0 and self.max_steps % self.steps_per_rollout:
            raise UserError(
                f"max_steps={self.max_steps} must be a multiple of num_iterations * steps_per_generation = "
                f"{self.steps_per_rollout}"
            )
        if self.rollout.temperature == 0:
            raise UserError("rollout.temperature must be above 0: greedy rollouts of a group are all alike")
        names = [reference.rpartition(":")[2] for reference in self.reward.functions]
        if unknown := [name for name, least in self.rollout.min_spread.items() if least > 0 and name not in names]:
            raise UserError(f"rollout.min_spread names {unknown[0]!r}, which is none of reward.functions: {names}")
        counting = [name for name in ("needs_right", "keep_pass_rate") if getattr(self.rollout, name)]
        if counting and self.reward.combine == "normalize_then_sum" and not {*JUDGES} & {*names}:
            raise UserError(
                f"rollout.{counting[0]} needs {' or '.join(JUDGES)} among reward.functions: "
                "reward.combine=normalize_then_sum leaves no total that says what is right"
            )
        if self.has_critic and self.critic.backbone == "shared" and self.lora.r == 0:
            raise UserError("critic.backbone=shared needs frozen weights to share: set lora.r, or use copy")
        self._check_behavior()
        self._check_background()
        self._check_stages()

    def _check_behavior(self) -> None:
        """Where the policy that sampled is not the one that is trained, what it gave each action must be recorded."""
        objective, cache = self.objective, self.rollout.approximate_cache
        is_recorded = objective.views == "replay" and objective.shrink == 1 and objective.score == "revealed"
        set_to, off = f"max_staleness={self.rollout.max_staleness}", "max_staleness=0"
        if self.rollout.partial:
            set_to, off = "partial=true", "partial=false"
        if set_to != off and not is_recorded:
            raise UserError(
                f"rollout.{set_to} needs what the engine recorded of each action: objective.views=replay, shrink=1, "
                f"score=revealed; set these, or {off}"
            )
        # Under masks no ratio could be taken: the gauge alone tells.
        if cache != "none" and objective.views == "replay" and objective.importance_sampling_correction == "none":
            raise UserError(
                f"rollout.approximate_cache={cache} samples from another policy than the one that is trained: set "
                "objective.importance_sampling_correction=token_truncate, which weighs by their ratio, or use none"
            )

    def _check_background(self) -> None:
        """A process of its own decodes with the snapshot alone."""
        if not self.eval.background:
            return
        if not self.eval.path and not self.data.heldout:
            raise UserError("eval.background=true has nothing to evaluate on: set eval.path or data.heldout")
        if self.rollout.mode == "server":
            raise UserError("eval.background=true needs an engine of its own, not a server: set rollout.mode=colocate")
        if self.rollout.threshold_policy:
            raise UserError("eval.background=true knows no rollout.threshold_policy: no snapshot holds it; use false")
        if self.rollout.engine == "lmdeploy" and self.eval.device == "cpu":
            raise UserError("eval.background=true with rollout.engine=lmdeploy needs a GPU: set eval.device")

    def _check_stages(self) -> None:
        changed = {key for stage in stages_of(self) for key in stage.changes}
        if "model.block_length" not in changed:
            return
        engine = self.rollout.mode if self.rollout.mode == "server" else self.rollout.engine
        if (engine if engine != "auto" else chosen_engine(self.rollout)) != "torch":
            raise UserError(
                f"stages: model.block_length cannot change with rollout.engine={self.rollout.engine}, "
                f"rollout.mode={self.rollout.mode}: that engine is built for one; set rollout.engine=torch, "
                "rollout.mode=colocate"
            )

    @property
    def records_holds(self) -> bool:
        """Whether the engine records holds: it was told to, or what it gave them counts in training."""
        rollout = self.rollout
        is_old = rollout.partial or rollout.max_staleness > 0 or rollout.oversampling > 1
        is_off_policy = is_old or self.steps_per_rollout > 1
        is_weighed = self.objective.importance_sampling_correction != "none"
        is_read = self.objective.likelihood == "trajectory" and (is_off_policy or is_weighed)
        return rollout.record_holds or is_read

    @property
    def has_critic(self) -> bool:
        """Whether values of a critic make the advantages."""
        return self.objective.advantage == "gae"


def check_lengths(config: RLConfig, longest_prompt: int, block_length: int) -> None:
    """A completion that is decoded token by token may not fit a micro-batch, and is then split.

    Args:
        block_length: of the model; 0: full attention.
    Raises:
        UserError: the KV cache has no room for the longest.
    """
    tokens = longest_prompt + config.rollout.max_completion_length * (1 + block_length)
    longest = longest_prompt + config.rollout.max_completion_length
    if 0 < config.rollout.max_cached_tokens < longest:
        raise UserError(
            f"rollout.max_cached_tokens={config.rollout.max_cached_tokens} has no room for the longest prompt with "
            f"a completion, {longest} tokens; raise it, or lower data.max_prompt_length or "
            "rollout.max_completion_length"
        )
    if tokens > config.max_tokens_per_micro_batch:
        logger.warning(
            "max_tokens_per_micro_batch=%d: the longest prompt with a completion of one token a step takes %d, and "
            "is split over micro-batches that repeat its clean tokens",
            *(config.max_tokens_per_micro_batch, tokens),
        )


def rl_workload(config: RLConfig) -> Workload:
    """What a memory estimate needs to know of an RL run."""
    rollout, longest_prompt = config.rollout, config.data.max_prompt_length
    load = engine_load(rollout, rollout, longest_prompt)
    return Workload(
        tokens_per_micro_batch=config.max_tokens_per_micro_batch,
        bf16=config.bf16,
        longest=longest_prompt + rollout.max_completion_length,
        distribution=TokenDistribution(rollout.temperature, rollout.top_k, rollout.top_p),
        has_holds=config.objective.likelihood == "trajectory",
        wants_entropy=True,
        lora=config.lora,
        optimizer_bytes=OPTIMIZER_BYTES[config.optim],
        offload_optimizer=config.offload_optimizer,
        num_copies=int(config.objective.reference_is_read and config.lora.r == 0),
        critic=config.critic.backbone if config.has_critic else "none",
        engine=load and replace(load, has_own_weights=rollout.max_staleness > 0),
    )
