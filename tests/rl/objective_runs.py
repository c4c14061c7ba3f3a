"""What a trainer's updater makes of groups of completions, step by step, and what the slow oracle makes of them.

The model is as small as can be and computes in float64. The learning rate is 0; between two optimizer steps of one
batch of rollouts all weights move by random amounts, so that the second step is off policy in every direction.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dirl.config import CONFIGS, load_config
from dirl.data.problems import Problem
from dirl.data.tasks import tiny_tokenizer
from dirl.diffusion.packing import DiffusionScheme
from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARConfig, SDARForCausalLM
from dirl.rl.advantage import advantages_of
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rl.train import RLTrainer
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import trajectory_of
from dirl.training.seeds import stable_seed
from tests.rl.objective_oracle import Batch, Row, SlowModel, mask_rows, replay_rows, slow_loss

PRESETS = sorted(path.stem for path in Path(CONFIGS, "objectives").glob("*.yaml"))
WHOLE = 4096  # packed tokens of a micro-batch that holds everything
SAMPLING = ("rollout.temperature=0.8", "rollout.top_k=30", "rollout.confidence_threshold=0.12")
# Prompts that fill their last block, and not; their completions, of one block or several; and how good these were.
PROMPTS = [([11, 12, 13, 14, 15, 16], 10), ([21, 22, 23, 24], 4), ([31, 32, 33], 5)]
REWARDS = [[1.0, 0.0, 0.3], [0.0, 0.2, 1.5], [0.1, 1.0, 1.2]]
RIGHT = [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
TRUNCATED = [[False, False, True], [False, True, False], [False, False, False]]
MAX_LENGTH = 16


def small_model() -> BlockDiffusionModel:
    return copy.deepcopy(_small_model())


@cache
def _small_model() -> BlockDiffusionModel:
    tokenizer = tiny_tokenizer()
    config = SDARConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.2,
        block_size=4,
        mask_token_id=tokenizer.mask_token_id,
        tokenizer_length=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = SDARForCausalLM(config).double()
    with torch.no_grad():
        model.model.norm.weight.fill_(2.5)
    return model


@torch.no_grad()
def move(model: torch.nn.Module, seed: int, size: float = 0.03) -> None:
    """Every weight by a normal amount, in proportion to the deviation of its tensor (norms: to their mean)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = parameter.std() if parameter.ndim > 1 else parameter.mean()
        parameter += size * scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def config_of(overrides: Sequence[str]) -> RLConfig:
    """A run that takes two optimizer steps a batch of rollouts, unless the overrides say otherwise."""
    fixed = ("output_dir=unused", "learning_rate=0", "max_grad_norm=0", "lr_scheduler_type=constant", "max_steps=2")
    lengths = (f"rollout.max_completion_length={MAX_LENGTH}", "num_iterations=2", f"max_tokens_per_micro_batch={WHOLE}")
    gauge = "objective.gauge_completions=0"  # it replays whole blocks, and is no part of the loss
    return load_config(RLConfig, None, [*fixed, *lengths, *SAMPLING, gauge, *overrides])


def groups_of(config: RLConfig) -> list[RolloutGroup]:
    """Three completions of each prompt, as the model decodes them, judged as it is written above."""
    names = {field.name: getattr(config.rollout, field.name) for field in fields(SamplingConfig)}
    return _groups_of(SamplingConfig(**names))


@cache
def _groups_of(sampling: SamplingConfig) -> list[RolloutGroup]:
    engine, groups = TorchEngine(small_model(), tiny_tokenizer()), []
    for number, (prompt, length) in enumerate(PROMPTS):
        asked = replace(sampling, max_completion_length=length)
        completions = engine.generate([prompt] * 3, asked, [100 * number + i for i in range(3)])
        group = RolloutGroup(
            prompt=Prompt(Problem("?", "", {}), prompt),
            completions=[
                replace(completion, finish_reason="length" if is_truncated else "stop")
                for completion, is_truncated in zip(completions, TRUNCATED[number], strict=True)
            ],
            rewards=REWARDS[number],
            reward_parts={"accuracy": list(RIGHT[number])},
            number=number,
            seed=1000 + number,
        )
        groups.append(group)
    return groups


@dataclass
class Taken:
    """One optimizer step: its loss, its gradient, and the weights it was taken at."""

    loss: float
    gradient: Tensor  # of all parameters, one after another
    model: BlockDiffusionModel


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def smallest_budget(config: RLConfig, groups: list[RolloutGroup]) -> int:
    """Packed tokens of a micro-batch that just hold every block."""
    for budget in range(8, WHOLE, 4):
        try:
            passes = [pack_groups(groups, config.objective, layout_of(budget), iteration=i) for i in (0, 1)]
        except UserError:
            continue
        assert all(any(batch.is_split for batch in batches) for batches in passes)
        return budget
    raise AssertionError("there is none")


def layout_of(budget: int = WHOLE) -> Layout:
    return Layout(DiffusionScheme(block_length=4, mask_token_id=tiny_tokenizer().mask_token_id), budget)


def trainer_of(config: RLConfig) -> RLTrainer:
    trained = RLTrainer(config, model=small_model(), tokenizer=tiny_tokenizer(), problems=[Problem("?", "0", {})])
    if trained.updater.reference is not None:
        move(trained.updater.reference.model, seed=5)  # type: ignore[attr-defined]
    if trained.critic is not None:  # one that has learned something
        trained.critic.learner.module.head.load_state_dict(value_head().state_dict())
    return trained


def value_head() -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return torch.nn.Linear(32, 1).double()


def small_critic() -> BlockDiffusionModel:
    """As a critic begins, but for its head: the policy that samples, with one number a position."""
    model = small_model()
    model.lm_head = value_head()
    return model


def taken_steps(trained: RLTrainer, groups: list[RolloutGroup]) -> list[Taken]:
    """The optimizer steps of one batch of rollouts, as `RLTrainer.step` takes them."""
    steps: list[Taken] = []
    learner, model = trained.learner, trained.model

    def before(*_: object) -> None:
        gradient = flat([p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()])
        steps.append(Taken(0.0, gradient, copy.deepcopy(model)))

    def after(*_: object) -> None:
        move(model, seed=len(steps))

    optimizer = learner.optimizer.optimizer  # accelerate's wrapper has no hooks of its own
    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    update = learner.update

    def noted(*arguments: object):  # type: ignore[no-untyped-def]
        outcome = update(*arguments)  # type: ignore[arg-type]
        steps[-1].loss = outcome.metrics["loss"]
        return outcome

    learner.update = noted  # type: ignore[method-assign]
    advantages = advantages_of(groups, trained.config.objective, trained.distributed)
    trained.updater.update(groups, advantages, 0)
    return steps


def slow_step(
    config: RLConfig,
    groups: list[RolloutGroup],
    model: BlockDiffusionModel,
    *,
    iteration: int = 0,
    is_fresh: bool = False,
    ranks: list[list[int]] | None = None,
) -> tuple[float, Tensor]:
    """Loss and gradient of one step by the oracle, for a policy that has these weights."""
    objective, everything = config.objective, [c for group in groups for c in group.completions]
    policy = SlowModel(copy.deepcopy(model), config.rollout)
    batch = Batch(
        groups,
        objective,
        MAX_LENGTH,
        ranks=ranks or [list(range(len(everything)))],
        kept=kept_completions(config, groups),
    )
    loss = slow_loss(
        batch,
        [rows_of(config, group, index, iteration) for group in groups for index in range(len(group.completions))],
        policy=policy,
        behavior=None if is_fresh else SlowModel(small_model(), config.rollout, _BEHAVIOR_LOGITS),
        reference=SlowModel(moved_model(5), config.rollout, _REFERENCE_LOGITS),
        critic=small_critic(),
    )
    gradients = torch.autograd.grad(loss, list(policy.model.parameters()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), flat(gradients)


# Of every state met so far: these two models are the same in all runs.
_BEHAVIOR_LOGITS: dict[tuple[int, ...], Tensor] = {}
_REFERENCE_LOGITS: dict[tuple[int, ...], Tensor] = {}


def moved_model(seed: int) -> BlockDiffusionModel:
    model = small_model()
    move(model, seed)
    return model


def rows_of(config: RLConfig, group: RolloutGroup, index: int, iteration: int) -> list[Row]:
    """Only what was drawn comes from the package."""
    objective, completion = config.objective, group.completions[index]
    mask = tiny_tokenizer().mask_token_id
    redrawn = [iteration] if objective.refresh_masks and iteration else []
    seed = stable_seed(group.seed, index, *redrawn)
    trajectory = trajectory_of(completion, DiffusionScheme(block_length=4, mask_token_id=mask))
    drawn = objective.views_of(trajectory, mask, seed)
    return (replay_rows if objective.views == "replay" else mask_rows)(completion, objective, drawn, mask)


def kept_completions(config: RLConfig, groups: list[RolloutGroup]) -> list[int]:
    """Which completions a token budget leaves; how many is worked out here."""
    number, budget = sum(len(group.completions) for group in groups), config.objective.max_tokens_per_update
    if budget == 0:
        return list(range(number))
    lengths = []
    for group in groups:
        for index, completion in enumerate(group.completions):
            num_prompt, num_views = len(completion.prompt_ids), len({r.view for r in rows_of(config, group, index, 0)})
            shared = num_prompt - num_prompt % 4
            lengths.append(shared / 3 + num_prompt % 4 + len(completion.token_ids) + 4 * num_views)
    if sum(lengths) <= budget:
        return list(range(number))
    batches = pack_groups(groups, config.objective, layout_of(), tokens_per_update=budget)
    kept = sorted({int(n) for batch in batches for n in batch.completion_T})
    assert len(kept) == int(budget / (sum(lengths) / number)) < number
    return kept
