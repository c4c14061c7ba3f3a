"""Prompts and a reward -> a better policy: the DiPO trainer.

    roll out a group per prompt -> reward -> advantage -> replay the states of decoding -> update -> push the weights

Source: DiRL (arXiv 2512.22234), section 3.2 and Figure 3.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dirl.config import config_to_dict, save_config
from dirl.data.chat import load_tokenizer
from dirl.data.problems import Problem, load_problems
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.views import PackedViews
from dirl.errors import UserError
from dirl.eval.evaluate import Evaluator, Mode
from dirl.model.checkpoint import ModelConfig, load_model, write_final
from dirl.model.logprobs import ActionScores, PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, adapters_off, add_adapters
from dirl.model.memory import EngineLoad, Workload, trained_fraction
from dirl.model.sdar import BlockDiffusionModel
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.advantage import ScaleRewards, group_advantages
from dirl.rl.group_state import CollectorState
from dirl.rl.rollout_group import Collected, Collector, NoSignal, RolloutConfig, RolloutGroup, StopAsked, render_prompts
from dirl.rl.rollout_metrics import completion_rows, headline, metrics_of_all_ranks, sample_line, throughput
from dirl.rl.update import PolicyUpdater, Reference, UpdateConfig
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import RolloutEngine
from dirl.rollout.watch import RolloutProgress, watch
from dirl.show.model_card import finish_model
from dirl.show.pictures import plot_run
from dirl.training.distributed import Distributed
from dirl.training.loop import Run, record_skipped
from dirl.training.metrics import Timings
from dirl.training.optimizer import OPTIMIZER_BYTES, Learner, OptimizerConfig
from dirl.training.run_state import RunConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RLDataConfig:
    """The problems that are practised on."""

    path: str = "task:noisy_sums"  # .json/.jsonl/.parquet, hub id, or task:NAME
    limit: int = 0  # rows read; 0: all
    max_prompt_length: int = 1024  # tokens; longer prompts are left out and counted
    system_prompt: str = ""
    suffix: str = ""  # appended to each question
    skip_bad_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class RLEvalConfig:
    """The evaluation during training: the sampling of the rollouts on held-out problems."""

    path: str = ""  # as data.path; empty: no evaluation
    limit: int = 64  # problems
    num_samples: int = 4  # completions a problem
    greedy: bool = True  # also one greedy completion a problem


@dataclass(frozen=True, kw_only=True)
class RLConfig(RunConfig, OptimizerConfig, UpdateConfig):
    """Everything of an RL run."""

    output_dir: str = "outputs/rl"
    learning_rate: float = 1e-6
    scale_rewards: ScaleRewards = "none"  # none: the paper; group: GRPO's z-score; batch
    eval_steps: int = 0  # optimizer steps between evaluations; 0: only at the end
    completions_steps: int = 10  # optimizer steps between files of completions; 0: none
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: RLDataConfig = field(default_factory=RLDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: RLEvalConfig = field(default_factory=RLEvalConfig)

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        OptimizerConfig.__post_init__(self)
        UpdateConfig.__post_init__(self)
        if self.max_steps % self.steps_per_rollout:
            raise UserError(
                f"max_steps={self.max_steps} must be a multiple of num_iterations * steps_per_generation = "
                f"{self.steps_per_rollout}"
            )
        if self.rollout.temperature == 0:
            raise UserError("rollout.temperature must be above 0: greedy rollouts of a group are all alike")


class RLTrainer:
    """DiPO. `train()` runs to the end; `step()` is one batch of rollouts and its optimizer steps, for notebooks."""

    def __init__(
        self,
        config: RLConfig,
        *,
        model: BlockDiffusionModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        problems: Sequence[Problem] | None = None,
        rubric: Rubric | None = None,
    ) -> None:
        self.config = config
        self.distributed = Distributed(bf16=config.bf16, timeout_seconds=2 * config.phase_timeout)
        self.timings = Timings()
        self.rubric = rubric or Rubric(config.reward)  # first: a wrong name costs no loading
        self.tokenizer = tokenizer or load_tokenizer(config.model.path)
        self.model = model or load_model(config.model, self.tokenizer)
        reference: Reference | None = None
        if config.beta > 0 and config.lora.r == 0:
            reference = self.distributed.placed(self._scorer(copy.deepcopy(self.model)).requires_grad_(False).eval())
        # A sharded model cannot decode: its forward passes are collective. The engine then has a copy of its own.
        decoded = self.model
        if self.distributed.is_sharded:
            decoded = copy.deepcopy(decoded).requires_grad_(False)
            nn.Module.to(decoded, self.distributed.device)
        add_adapters(self.model, config.lora, config.seed)
        self.learner = Learner(self._scorer(self.model), config, self.distributed)
        self.engine: RolloutEngine = build_engine(decoded, self.tokenizer, config.rollout)
        self.collector = self._collector(problems)
        self._warn_of_long_completions()
        if config.beta > 0 and config.lora.r > 0:
            reference = self._without_adapters
        rule = ScoringRule(config.rollout.distribution, config.rollout.unmasking, suppressed_by(self.model))
        self.updater = PolicyUpdater(
            self.learner,
            rule,
            config,
            max_completion_length=config.rollout.max_completion_length,
            reference=reference,
        )
        self.learner.on_skip = self._record_skipped
        split = "heldout" if config.eval.path.startswith("task:") else "test"  # of a hub data set; files have none
        self.heldout = self._load(config.eval.path, split, config.eval.limit) if config.eval.path else []
        self.steps_done = 0
        self.last: Collected | None = None  # the rollouts of the last step, to look at

    def train(self) -> Path:
        """Train to max_steps (or from the newest checkpoint on) and write `final/`; returns its path."""
        config, output_dir = self.config, Path(self.config.output_dir)
        source = CollectorState(self.collector, self.distributed)
        with Run(config, config_to_dict(config), self.learner, source, config.max_steps) as run:
            if self.distributed.is_main:
                save_config(config, output_dir / "config.yaml")
            self.timings, self.steps_done = run.timings, run.step
            watch(self.engine, RolloutProgress(run.terminal, run.timings))
            self.collector.should_stop = run.should_stop
            self.engine.update_weights(self.model)
            while not run.is_finished:
                run.stop_if_asked()
                try:
                    with run.timings.phase("step"):
                        metrics = self.step()
                except StopAsked:
                    continue
                except NoSignal as reason:
                    if self.steps_done == 0:
                        raise
                    run.say(f"training ends early: {reason}")
                    run.save()
                    break
                run.step = self.steps_done
                self._log_completions(run)
                if self.heldout and (run.is_due(config.eval_steps) or run.is_finished):
                    with run.timings.phase("eval"):
                        metrics |= self.evaluate()
                run.save_if_due(metrics)
                metrics |= run.timings.drain()
                metrics |= throughput(metrics)
                run.log(metrics, headline(metrics))
        final = write_final(
            self.model,
            self.tokenizer,
            output_dir,
            base=config.model.path,
            lora=config.lora,
            is_main=self.distributed.is_main,
        )
        if self.distributed.is_main:
            finish_model(final, output_dir, "rl", config.push_to_hub)
            plot_run(output_dir)
        self.distributed.barrier()
        return final

    def step(self) -> dict[str, float]:
        """Roll out, reward, update, push: one batch of rollouts; its metrics.

        Raises:
            StopAsked: a signal came before the update; what was rolled out is kept for the next call.
        """
        collected = self.collector.collect(self.steps_done, self.distributed, self.timings)
        self.last = collected
        advantages = self.advantages(collected.groups)
        with self.timings.phase("update_weights"):
            self.engine.sleep()  # its memory is the trainer's while the trainer works
        with self.timings.phase("train"):
            is_on_policy = self.distributed.min(float(collected.is_on_policy(self.steps_done))) > 0
            metrics = self.updater.update(collected.groups, advantages, is_on_policy=is_on_policy)
        self.collector.finish()
        with self.timings.phase("update_weights"):
            self.engine.update_weights(self.model)
            self.engine.wake()
        self.steps_done += self.config.steps_per_rollout
        return metrics | metrics_of_all_ranks(collected, self.distributed)

    def advantages(self, groups: Sequence[RolloutGroup]) -> list[Tensor]:
        """Advantages of each group's completions; collective when rewards are scaled over the batch."""
        batch_std = 1.0
        if self.config.scale_rewards == "batch":
            rewards = self.distributed.gather([reward for group in groups for reward in group.rewards])
            batch_std = statistics.stdev(rewards)
        return [
            group_advantages(group.reward_G[None], self.config.scale_rewards, batch_std).squeeze(0) for group in groups
        ]

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

    def _warn_of_long_completions(self) -> None:
        """One that is decoded token by token may not fit a micro-batch, which would end the run."""
        config = self.config
        longest_prompt = max(len(prompt.token_ids) for prompt in self.collector.prompts)
        tokens = longest_prompt + config.rollout.max_completion_length * (1 + self.model.config.block_size)
        if tokens > config.max_tokens_per_micro_batch:
            logger.warning(
                "max_tokens_per_micro_batch=%d: the longest prompt with a completion of one token a step takes %d and "
                "would end the run; raise it, or lower rollout.max_completion_length",
                *(config.max_tokens_per_micro_batch, tokens),
            )

    def _scorer(self, model: BlockDiffusionModel) -> PackedScorer:
        return PackedScorer(model, self.config.model.attention, self.config.max_tokens_per_micro_batch)

    def _without_adapters(self, packed: PackedViews, rule: ScoringRule) -> ActionScores:
        with adapters_off(self.model):
            return self.learner.module(packed, rule)

    def _load(self, path: str, split: str, limit: int) -> list[Problem]:
        data = self.config.data
        return load_problems(path, split=split, limit=limit, skip_bad_rows=data.skip_bad_rows, seed=self.config.seed)

    def _collector(self, problems: Sequence[Problem] | None) -> Collector:
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
        collector = Collector(prompts, self.engine, self.rubric, self.config.rollout, self.config.seed)
        size = self.model.config
        collector.cost = lambda group: group.replay_cost(size.block_size, size.hidden_size)
        return collector

    def _record_skipped(self) -> None:
        groups = self.last.groups if self.last else []
        questions = [{"question": g.prompt.problem.question, "answer": g.prompt.problem.answer} for g in groups]
        record_skipped(self.config.output_dir, self.steps_done + 1, questions, self.distributed)

    def _log_completions(self, run: Run) -> None:
        """Show one completion, and now and then write all of the main rank's to completions/."""
        if self.last is None or not self.distributed.is_main:
            return
        groups = [*self.last.groups, *self.last.dropped]
        if not groups:  # fewer prompts than ranks
            return
        run.say(sample_line(groups[0]))
        if run.is_due(self.config.completions_steps):
            path = Path(self.config.output_dir, "completions", f"step_{run.step:06d}.jsonl")
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = completion_rows(groups, self.tokenizer, self.model.config.block_size)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


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
        num_copies=int(config.beta > 0 and config.lora.r == 0),
        engine=engine,
    )
