"""Prompts and a reward -> a better policy: the DiPO trainer.

    roll out a group per prompt -> reward -> advantage -> replay the states of decoding -> update -> push the weights

Source: DiRL (arXiv 2512.22234), section 3.2 and Figure 3.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.data.problems import Problem, of_pass_rate
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews
from dirl.errors import UserError
from dirl.files import append_json_lines, write_json
from dirl.model.checkpoint import load_model, write_final, write_snapshot
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import ActionScores, PackedScorer, suppressed_by
from dirl.model.lora import adapters_off, add_adapters
from dirl.model.model_path import tokenizer_of
from dirl.reward.rubric import Rubric
from dirl.rl.advantage import advantages_of
from dirl.rl.ahead import RolloutsAhead
from dirl.rl.collector import Collected, Collector
from dirl.rl.critic import Critic, ValueModel, value_model_of
from dirl.rl.heldout import heldout_evaluator, heldout_metrics, snapshot_metrics, split_of
from dirl.rl.rl_config import RLConfig, check_lengths
from dirl.rl.rollout_group import Prompt, RolloutGroup, render_prompts
from dirl.rl.rollout_metrics import completion_rows, headline, metrics_of_all_ranks, sample_line, throughput
from dirl.rl.rollouts import Rollouts
from dirl.rl.threshold_policy import build_threshold_policy
from dirl.rl.update import PolicyUpdater, Reference
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import RolloutEngine
from dirl.rollout.watch import RolloutProgress
from dirl.training.loop import Trainer
from dirl.training.optimizer import Learner
from dirl.training.run import Run
from dirl.training.stages import RunStage, stages_of

logger = logging.getLogger(__name__)


class RLTrainer(Trainer):
    """DiPO: `step()` is one batch of rollouts and its optimizer steps."""

    CONFIG = RLConfig
    config: RLConfig
    stage = "rl"
    _sleeps = False  # the engine: an update that was interrupted leaves it so

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
        self.refuse_beside(rubric=rubric, engine=engine)
        self.rubric = rubric or Rubric(config.reward)  # first: a wrong name costs no loading
        self.tokenizer = tokenizer or tokenizer_of(config.model.path)
        self.model = model or load_model(config.model, self.tokenizer)
        self.tags, self._first_block_length = self.model.tags, self.model.config.block_size
        prompts = self._prompts(problems)
        config = self.config  # epochs are counted
        self._reference, self._decoded = self._frozen_copies()
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
            self._decoded,
            self.tokenizer,
            config.rollout,
            bf16=config.bf16,
            observer=None if config.rollout.max_staleness else RolloutProgress(self.terminal, self.timings),
        )
        self.ahead = RolloutsAhead() if config.rollout.max_staleness else None
        self.updater = self._updater()
        self.thresholds = build_threshold_policy(
            config.rollout,
            self.distributed.unwrap(self.learner.module),
            config.objective,
            self.distributed,
            budget=config.max_tokens_per_micro_batch,
            bf16=config.bf16,
        )
        # Ahead and in parts, the weights that sampled have moved on already; the engine has told what they gave.
        is_told = self.ahead is not None or config.rollout.partial
        self.collector = self.source = Collector(
            prompts,
            self._rollouts(),
            self.distributed,
            config.seed,
            ahead=self.ahead,
            should_stop=self.signals.is_stop_asked,
            remember=list if is_told else lambda groups: self.updater.remember(groups),
        )
        self._check_lengths()
        self._probe: RolloutGroup | None = None  # a group of the newest weights, where none that is trained on is
        self.last: Collected | None = None  # the rollouts of the last step, to look at

    def learners(self) -> dict[str, Learner]:
        return super().learners() | ({"critic": self.critic.learner} if self.critic is not None else {})

    def begin(self) -> None:
        if self.distributed.is_main and (line := self._overlaps.write(self.config.output_dir)):
            self.terminal.say(line)
        self._push_weights(self.steps_done)

    def step(self) -> dict[str, float]:
        """Roll out, reward, update, push: one batch of rollouts; its metrics.

        With `max_staleness` the rollouts of the next steps go on meanwhile, until the push. An exception in the update
        (Ctrl-C in a notebook) gives the step's groups up; those that wait stay.
        """
        self.enter_stage()
        if self._sleeps:
            self._push_weights(self.steps_done)
        after, oldest = self.steps_done + self.config.steps_per_rollout, self.steps_done - self._max_age
        collected = self.last = self.collector.collect(self.steps_done, oldest)
        if after < self.config.max_steps:
            self.collector.look_ahead()
        advantages = advantages_of(collected.groups, self.config.objective, self.distributed)
        probe = self._probe
        if self.ahead is None and not self.updater.is_compared(collected.groups, self.steps_done):
            probe = self.collector.probe(self.steps_done)
        if self.ahead is None:
            with self.timings.phase("update_weights"):
                self._sleeps = True
                self.engine.sleep()  # its memory is the trainer's while the trainer works
        with self.timings.phase("train"):
            metrics = self.updater.update(collected.groups, advantages, self.steps_done, probe)
            if self.thresholds:
                metrics |= self.thresholds.update(collected.groups, advantages, self.config.num_iterations)
        with self.timings.phase("update_weights"):
            self._push_weights(after)
        now, self.steps_done = self.steps_done, after
        return metrics | metrics_of_all_ranks(collected, now, self.distributed)

    @property
    def _max_age(self) -> int:
        """Optimizer steps that the weights which sampled a group may be behind; partly: before it is waited for."""
        rollout = self.config.rollout
        return (rollout.max_partial_age if rollout.partial else rollout.max_staleness) * self.config.steps_per_rollout

    def _push_weights(self, step: int) -> None:
        """Into the engine; they have taken so many optimizer steps."""
        if self.ahead is None:
            self.engine.update_weights(self.model)
            self.engine.wake()
            self._sleeps = False
            return
        with self.ahead.paused():
            self.engine.update_weights(self.model)
            self.ahead.weights_step = step
            self._probe = self.collector.probe(step)

    def train(self) -> Path:
        try:
            return super().train()
        finally:
            self.collector.interrupt()  # or a run that ends early would still roll out what it will not train on

    def begin_stage(self, stage: RunStage[Any]) -> None:
        self.collector.interrupt()  # before the model changes under a round
        for model in (self.model, self._decoded):
            model.config.block_size = self.config.model.block_length or self._first_block_length
        self.updater = self._updater()
        self.collector.begin_stage(self._rollouts(), stage.from_step)
        if self.ahead is not None:
            self._probe = self.collector.probe(self.steps_done)

    def evaluate(self) -> dict[str, float]:
        """Accuracy and tokens per step on held-out problems, sampled as in the rollouts, and greedy.

        Where a policy chooses thresholds, with the most probable one for each problem.
        """
        evaluator = heldout_evaluator(self.config, self.engine, self.tokenizer, self.rubric, self.distributed)
        return heldout_metrics(
            self.config,
            evaluator,
            self.heldout,
            step=self.steps_done if self.distributed.is_main else None,
            thresholds_of=self.thresholds.best if self.thresholds else None,
            paused=self.ahead.paused if self.ahead is not None else nullcontext,
        )

    def write_snapshot(self, directory: Path) -> None:
        write_snapshot(self.model, self.tokenizer, directory, is_main=self.distributed.is_main)

    @classmethod
    def evaluate_snapshot(cls, config: RLConfig, snapshot: Path) -> dict[str, float]:
        return snapshot_metrics(config, snapshot)

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
            append_json_lines(path, completion_rows(groups, self.tokenizer, self.model.scheme))

    def last_documents(self) -> list[Any]:
        groups = self.last.groups if self.last else []
        return [{"question": g.prompt.problem.question, "answer": g.prompt.problem.answer} for g in groups]

    def write_final(self) -> Path:
        final = write_final(
            self.model,
            self.tokenizer,
            Path(self.config.output_dir),
            base=self.config.model.path,
            lora=self.config.lora,
            is_main=self.distributed.is_main,
        )
        if self.thresholds and self.distributed.is_main:
            write_json(final / "threshold_policy.json", self.thresholds.as_row())
        return final

    def _frozen_copies(self) -> tuple[Reference | None, BlockDiffusionModel]:
        """The reference where there is one, and the model that the engine decodes with."""
        config, reference, decoded = self.config, None, self.model
        if config.objective.reference_is_read:
            reference = self._without_adapters
            if config.lora.r == 0:
                frozen = self._scorer(copy.deepcopy(self.model)).requires_grad_(False).eval()
                reference = self.distributed.placed(frozen)
        # A sharded model cannot decode, its forward passes are collective; nor can one that is trained meanwhile. The
        # engine then has a copy of its own.
        is_ahead = config.rollout.max_staleness > 0 and config.rollout.mode == "colocate"
        if self.distributed.is_sharded or (is_ahead and chosen_engine(config.rollout, self.model) == "torch"):
            decoded = copy.deepcopy(self.model).requires_grad_(False)
            nn.Module.to(decoded, self.distributed.device)
        return reference, decoded

    def _check_lengths(self) -> None:
        longest_prompt = max(len(prompt.token_ids) for prompt in self.collector.prompts)
        for now in (stage.config for stage in stages_of(self.config)):
            block_length = 0 if self.model.scheme.is_full else now.model.block_length or self._first_block_length
            check_lengths(now, longest_prompt, block_length)

    def _updater(self) -> PolicyUpdater:
        config = self.config
        return PolicyUpdater(
            self.learner,
            ScoringRule(*config.rollout.rules(self.model.scheme), suppressed_by(self.model)),
            config,
            max_completion_length=config.rollout.max_completion_length,
            reference=self._reference,
            critic=self.critic,
        )

    def _rollouts(self) -> Rollouts:
        shape = self.model.scheme, self.model.config.hidden_size
        config = replace(self.config.rollout, record_holds=self.config.records_holds)
        return Rollouts(self.engine, self.rubric, config, self.timings, shape, self.thresholds)

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

    def _prompts(self, problems: Sequence[Problem] | None) -> list[Prompt]:
        """What is practised on; what is kept apart of it is evaluated on where nothing else is named."""
        data, split = self.config.data, split_of(self.config, problems)
        self._overlaps, self.heldout = split.overlaps, split.heldout
        prompts, num_too_long = render_prompts(
            of_pass_rate(split.trained, data.pass_rate),
            self.tokenizer,
            system_prompt=data.system_prompt,
            suffix=data.suffix,
            max_length=data.max_prompt_length,
        )
        if num_too_long:
            logger.warning("%d prompts are longer than data.max_prompt_length and left out", num_too_long)
        if lost := {p.origin.path for p in split.trained} - {prompt.problem.origin.path for prompt in prompts}:
            raise UserError(
                f"data.max_prompt_length={data.max_prompt_length} leaves no prompt of {min(lost)} to train on; raise it"
            )
        self.count_steps(len(prompts), "rollout.prompts_per_step", self.config.steps_per_rollout)
        return prompts
