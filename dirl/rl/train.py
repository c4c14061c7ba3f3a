"""Prompts and a reward -> a better policy: the DiPO trainer.

    roll out a group per prompt -> reward -> advantage -> replay the states of decoding -> update -> push the weights

Source: DiRL (arXiv 2512.22234), section 3.2 and Figure 3.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.config import CONFIGS, PATH, Config, bounded
from dirl.data.chat import load_tokenizer
from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews
from dirl.errors import UserError
from dirl.eval.evaluate import Evaluator, Mode
from dirl.files import append_json_lines
from dirl.model.checkpoint import ModelConfig, load_model, write_final
from dirl.model.logprobs import ActionScores, PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, adapters_off, add_adapters
from dirl.model.memory import EngineLoad, Workload, trained_fraction
from dirl.model.sdar import BlockDiffusionModel
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.advantage import advantages_of
from dirl.rl.collector import Collected, Collector, RolloutConfig, Rollouts
from dirl.rl.critic import Critic, ValueModel, value_model_of
from dirl.rl.rollout_group import Prompt, render_prompts
from dirl.rl.rollout_metrics import completion_rows, headline, metrics_of_all_ranks, sample_line, throughput
from dirl.rl.update import PolicyUpdater, Reference, UpdateConfig
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import RolloutEngine
from dirl.rollout.watch import RolloutProgress
from dirl.training.loop import Trainer, TrainingConfig
from dirl.training.optimizer import OPTIMIZER_BYTES, Learner
from dirl.training.run import Run

logger = logging.getLogger(__name__)

_OBJECTIVE_KEYS = (
    *("likelihood", "epsilon", "epsilon_high", "beta", "kl_estimator", "loss_type", "scale_rewards"),
    *("importance_sampling_correction", "importance_sampling_clip_max"),
)


@dataclass(frozen=True, kw_only=True)
class RLDataConfig(Config):
    """The problems that are practised on."""

    path: str = field(default="task:noisy_sums", metadata=PATH)  # .json/.jsonl/.parquet, hub id, or task:NAME
    limit: int = bounded(0, least=0)  # rows read; 0: all
    max_prompt_length: int = bounded(1024, least=1)  # tokens; longer prompts are left out and counted
    system_prompt: str = ""
    suffix: str = ""  # appended to each question
    skip_bad_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class RLEvalConfig(Config):
    """The evaluation during training: the sampling of the rollouts on held-out problems."""

    path: str = field(default="", metadata=PATH)  # as data.path; empty: no evaluation
    limit: int = bounded(64, least=0)  # problems; 0: all
    num_samples: int = bounded(4, least=1)  # completions a problem
    greedy: bool = True  # also one greedy completion a problem


@dataclass(frozen=True, kw_only=True)
class RLConfig(TrainingConfig, UpdateConfig):
    """Everything of an RL run."""

    ALIASES: ClassVar[Mapping[str, str]] = {key: f"objective.{key}" for key in _OBJECTIVE_KEYS}
    PRESETS: ClassVar[Mapping[str, Path]] = {"objective": CONFIGS / "objectives"}

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
        if self.max_steps % self.steps_per_rollout:
            raise UserError(
                f"max_steps={self.max_steps} must be a multiple of num_iterations * steps_per_generation = "
                f"{self.steps_per_rollout}"
            )
        if self.rollout.temperature == 0:
            raise UserError("rollout.temperature must be above 0: greedy rollouts of a group are all alike")
        names = [reference.rpartition(":")[2] for reference in self.reward.functions]
        if unknown := [name for name, least in self.rollout.min_spread.items() if least > 0 and name not in names]:
            raise UserError(f"rollout.min_spread names {unknown[0]!r}, which is none of reward.functions: {names}")
        if self.rollout.needs_right and self.reward.combine == "normalize_then_sum" and "accuracy" not in names:
            raise UserError(
                "rollout.needs_right needs accuracy among reward.functions: reward.combine=normalize_then_sum leaves "
                "no total that says what is right"
            )
        if self.has_critic and self.critic.backbone == "shared" and self.lora.r == 0:
            raise UserError("critic.backbone=shared needs frozen weights to share: set lora.r, or use copy")

    @property
    def has_critic(self) -> bool:
        """Whether values of a critic make the advantages."""
        return self.objective.advantage == "gae"


class RLTrainer(Trainer):
    """DiPO: `step()` is one batch of rollouts and its optimizer steps."""

    config: RLConfig
    stage = "rl"

    def __init__(
        self,
        config: RLConfig,
        *,
        model: BlockDiffusionModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        problems: Sequence[Problem] | None = None,
        rubric: Rubric | None = None,
        engine: RolloutEngine | None = None,
    ) -> None:
        super().__init__(config)
        self.rubric = rubric or Rubric(config.reward)  # first: a wrong name costs no loading
        self.tokenizer = tokenizer or load_tokenizer(config.model.path)
        self.model = model or load_model(config.model, self.tokenizer)
        reference, decoded = self._frozen_copies()
        add_adapters(self.model, config.lora, config.seed)
        values = self._value_model() if config.has_critic else None  # before the weights are sharded
        self.learner = Learner(
            self._scorer(self.model),
            config,
            self.distributed,
            on_micro_batch=self.show_micro_batch,
            on_skip=self.record_skipped,
        )
        self.critic = self._critic(values) if values is not None else None
        self.engine = engine or build_engine(
            decoded,
            self.tokenizer,
            config.rollout,
            bf16=config.bf16,
            observer=RolloutProgress(self.terminal, self.timings),
        )
        self.updater = PolicyUpdater(
            self.learner,
            ScoringRule(config.rollout.distribution, config.rollout.unmasking, suppressed_by(self.model)),
            config,
            max_completion_length=config.rollout.max_completion_length,
            reference=reference,
            critic=self.critic,
        )
        self.collector = self.source = Collector(
            self._prompts(problems),
            Rollouts(self.engine, self.rubric, config.rollout, self.timings, self._size()),
            self.distributed,
            config.seed,
            should_stop=self.signals.is_stop_asked,
            remember=self.updater.remember,
        )
        self._check_lengths()
        split = "heldout" if config.eval.path.startswith("task:") else "test"  # of a hub data set; files have none
        self.heldout = self._load(config.eval.path, split, config.eval.limit) if config.eval.path else []
        self.last: Collected | None = None  # the rollouts of the last step, to look at

    def learners(self) -> dict[str, Learner]:
        return super().learners() | ({"critic": self.critic.learner} if self.critic is not None else {})

    def begin(self) -> None:
        self.engine.update_weights(self.model)

    def step(self) -> dict[str, float]:
        """Roll out, reward, update, push: one batch of rollouts; its metrics.

        An exception in the update (Ctrl-C in a notebook) gives the step's groups up; those that wait stay.
        """
        collected = self.last = self.collector.collect(self.steps_done)
        advantages = advantages_of(collected.groups, self.config.objective, self.distributed)
        with self.timings.phase("update_weights"):
            self.engine.sleep()  # its memory is the trainer's while the trainer works
        with self.timings.phase("train"):
            metrics = self.updater.update(collected.groups, advantages, self.steps_done)
        with self.timings.phase("update_weights"):
            self.engine.update_weights(self.model)
            self.engine.wake()
        self.steps_done += self.config.steps_per_rollout
        return metrics | metrics_of_all_ranks(collected, self.distributed)

    def evaluate(self) -> dict[str, float]:
        """Accuracy and tokens per step on held-out problems, sampled as in the rollouts, and greedy."""
        config = self.config
        evaluator = Evaluator(
            self.engine,
            self.tokenizer,
            self.rubric,
            seed=config.seed,
            system_prompt=config.data.system_prompt,
            suffix=config.data.suffix,
            distributed=self.distributed,
        )
        modes = {"eval": Mode("sampled", config.rollout, config.eval.num_samples)}
        if config.eval.greedy:
            modes["eval/greedy"] = Mode("greedy", replace(config.rollout, temperature=0.0), 1)
        metrics: dict[str, float] = {}
        for name, mode in modes.items():
            result = evaluator.evaluate(self.heldout, mode)
            metrics[f"{name}/accuracy"] = result.avg_at_k
            metrics[f"{name}/tokens_per_step"] = result.tokens_per_step
            metrics[f"{name}/standard_error"] = result.standard_error
        return metrics

    def headline(self, metrics: Mapping[str, float]) -> str:
        return headline(metrics)

    def throughput(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return throughput(metrics)

    def record(self, run: Run) -> None:
        """Show one completion, and now and then write all of the main rank's to completions/."""
        if self.last is None or not self.distributed.is_main:
            return
        groups = self.last.everyone
        if not groups:  # fewer prompts than ranks
            return
        run.say(sample_line(groups[0]))
        if run.is_due(self.config.completions_steps):
            path = Path(self.config.output_dir, "completions", f"step_{run.step:06d}.jsonl")
            path.unlink(missing_ok=True)  # of a run that was continued from before
            append_json_lines(path, completion_rows(groups, self.tokenizer, self.model.config.block_size))

    def last_documents(self) -> list[Any]:
        groups = self.last.groups if self.last else []
        return [{"question": g.prompt.problem.question, "answer": g.prompt.problem.answer} for g in groups]

    def write_final(self) -> Path:
        return write_final(
            self.model,
            self.tokenizer,
            Path(self.config.output_dir),
            base=self.config.model.path,
            lora=self.config.lora,
            is_main=self.distributed.is_main,
        )

    def _frozen_copies(self) -> tuple[Reference | None, BlockDiffusionModel]:
        """The reference where there is one, and the model that the engine decodes with."""
        config, reference, decoded = self.config, None, self.model
        if config.objective.reference_is_read:
            reference = self._without_adapters
            if config.lora.r == 0:
                frozen = self._scorer(copy.deepcopy(self.model)).requires_grad_(False).eval()
                reference = self.distributed.placed(frozen)
        # A sharded model cannot decode: its forward passes are collective. The engine then has a copy of its own.
        if self.distributed.is_sharded:
            decoded = copy.deepcopy(self.model).requires_grad_(False)
            nn.Module.to(decoded, self.distributed.device)
        return reference, decoded

    def _check_lengths(self) -> None:
        """A completion that is decoded token by token may not fit a micro-batch, which would end the run."""
        config = self.config
        longest_prompt = max(len(prompt.token_ids) for prompt in self.collector.prompts)
        tokens = longest_prompt + config.rollout.max_completion_length * (1 + self.model.config.block_size)
        longest = longest_prompt + config.rollout.max_completion_length
        if 0 < config.rollout.max_cached_tokens < longest:
            raise UserError(
                f"rollout.max_cached_tokens={config.rollout.max_cached_tokens} has no room for the longest prompt with "
                f"a completion, {longest} tokens; raise it, or lower data.max_prompt_length or "
                "rollout.max_completion_length"
            )
        if tokens > config.max_tokens_per_micro_batch:
            logger.warning(
                "max_tokens_per_micro_batch=%d: the longest prompt with a completion of one token a step takes %d and "
                "would end the run; raise it, or lower rollout.max_completion_length",
                *(config.max_tokens_per_micro_batch, tokens),
            )

    def _value_model(self) -> ValueModel:
        config = self.config
        return value_model_of(
            self.model,
            config.critic,
            self.distributed,
            attention=config.model.attention,
            budget=config.max_tokens_per_micro_batch,
        )

    def _critic(self, values: ValueModel) -> Critic:
        config = self.config
        learner = Learner(values, config.critic.optimizer(config), self.distributed, on_skip=self.record_skipped)
        gamma, lam = config.objective.gae_gamma, config.objective.gae_lambda
        return Critic(learner, config.critic, gamma=gamma, lam=lam)

    def _scorer(self, model: BlockDiffusionModel) -> PackedScorer:
        return PackedScorer(model, self.config.model.attention, self.config.max_tokens_per_micro_batch)

    def _without_adapters(self, packed: PackedViews, rule: ScoringRule) -> ActionScores:
        with adapters_off(self.model):
            return self.learner.module(packed, rule)

    def _size(self) -> tuple[int, int]:
        """Block length and hidden size: what the cost of replaying a group depends on."""
        return self.model.config.block_size, self.model.config.hidden_size

    def _load(self, path: str, split: str, limit: int) -> list[Problem]:
        data = self.config.data
        return load_problems(path, split=split, limit=limit, skip_bad_rows=data.skip_bad_rows, seed=self.config.seed)

    def _prompts(self, problems: Sequence[Problem] | None) -> list[Prompt]:
        data = self.config.data
        if problems is None:
            problems = self._load(data.path, "train", data.limit)
        prompts, num_too_long = render_prompts(
            problems,
            self.tokenizer,
            system_prompt=data.system_prompt,
            suffix=data.suffix,
            max_length=data.max_prompt_length,
        )
        if num_too_long:
            logger.warning("%d prompts are longer than data.max_prompt_length and left out", num_too_long)
        if not prompts:
            raise UserError(f"data.max_prompt_length={data.max_prompt_length} leaves no prompt to train on; raise it")
        return prompts


def rl_workload(config: RLConfig) -> Workload:
    """What a memory estimate needs to know of an RL run."""
    rollout, engine = config.rollout, None
    if rollout.mode == "colocate":
        engine = EngineLoad(
            name=chosen_engine(rollout) if rollout.engine == "auto" else rollout.engine,
            longest=config.data.max_prompt_length + rollout.max_completion_length,
            batch_size=rollout.max_batch_size,
            max_cached_tokens=rollout.max_cached_tokens,
            cache_share=rollout.cache_max_entry_count,
        )
    return Workload(
        tokens_per_micro_batch=config.max_tokens_per_micro_batch,
        bf16=config.bf16,
        trained_fraction=trained_fraction(config.model, config.lora),
        optimizer_bytes=OPTIMIZER_BYTES[config.optim],
        offload_optimizer=config.offload_optimizer,
        num_copies=int(config.objective.reference_is_read and config.lora.r == 0),
        critic=config.critic.backbone if config.has_critic else "none",
        engine=engine,
    )
