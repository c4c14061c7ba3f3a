"""The critic: what a value may depend on, GAE against a plain loop, the clipped loss, and a run that resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dirl.data.problems import Problem
from dirl.diffusion.packing import DiffusionScheme, PackedViews, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import placeholder_pack, replay_views
from dirl.errors import UserError
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import RunMemory, Workload
from dirl.model.tiny import save_tiny_model, tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.actions import PolicyBatch
from dirl.rl.advantage import advantages_of
from dirl.rl.critic import CriticConfig, critic_metrics, gae_over_steps, value_loss, value_model_of, with_gae
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, rl_workload
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.training.distributed import Distributed
from dirl.training.optimizer import Loss, StepOutcome
from tests.launching import launch_script
from tests.rl.tables import table

GAE = ObjectiveConfig(advantage="gae", likelihood="trajectory", gae_gamma=0.99, gae_lambda=0.9)
CONFIG = RLConfig(
    output_dir="unused",
    max_steps=4,
    learning_rate=1e-3,
    warmup_steps=1,
    save_steps=2,
    objective=GAE,
    critic=CriticConfig(learning_rate=1e-2, lr_scheduler_type="linear"),
    rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12),
    reward=RewardConfig(functions=["tests.rl.test_update:even_length"]),
)


def trainer(config: RLConfig) -> RLTrainer:
    model, tokenizer = tiny()
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


# The model.


def replayed(completion_ids: Tensor, mask_token_id: int) -> PackedViews:
    """A prompt of three tokens and a completion that was revealed in a scattered order."""
    steps_R = torch.tensor([2, 1, 2, 3, 1, 1, 4, 2, 3])
    trajectory = Trajectory(torch.tensor([5, 6, 7]), completion_ids, steps_R, 4)
    return pack([ViewedDocument(trajectory.prompt_ids, [replay_views(trajectory, mask_token_id)])], 4)


def test_values_are_zero_before_training() -> None:
    model, _ = tiny()
    values = value_model_of(model, CriticConfig(), Distributed())
    value_T = values(replayed(torch.arange(40, 49), model.config.mask_token_id))
    assert value_T.dtype == torch.float32 and value_T.shape[0] > 9 and bool((value_T == 0).all())


def test_a_value_depends_on_what_was_visible_and_never_on_the_token_of_its_action() -> None:
    model, _ = tiny()
    values = value_model_of(model, CriticConfig(), Distributed())
    torch.nn.init.normal_(values.head.weight)
    ids_R = torch.arange(40, 49)
    before = replayed(ids_R, model.config.mask_token_id)
    value_T = values(before)
    block_of_token_R, later = (torch.arange(9) + 3) // 4, 0
    for token in range(9):
        changed_R = ids_R.clone()
        changed_R[token] += 100
        other_T = values(replayed(changed_R, model.config.mask_token_id))
        is_own_T = before.actions.completion_index_T == token
        assert is_own_T.any()
        torch.testing.assert_close(other_T[is_own_T], value_T[is_own_T], rtol=0, atol=0)
        is_after_T = before.actions.block_T > block_of_token_R[token]
        if is_after_T.any():
            assert bool((other_T[is_after_T] != value_T[is_after_T]).all())
            later += 1
    assert later > 3


def test_a_shared_backbone_has_the_same_frozen_weights_and_its_own_adapters() -> None:
    pytest.importorskip("peft")
    trained = trainer(replace(CONFIG, lora=LoraConfig(r=4), critic=replace(CONFIG.critic, backbone="shared")))
    assert trained.critic is not None
    values = trained.distributed.unwrap(trained.critic.learner.module)
    ours, theirs = dict(values.backbone.named_parameters()), dict(trained.model.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] is theirs[name]) == (".lora_" not in name), name
    before = {name: p.detach().clone() for name, p in theirs.items()}
    for _ in range(3):  # in the first the rate is zero, in the second the head, which then gives no gradient
        trained.step()
    frozen = [name for name in theirs if ".lora_" not in name]
    assert all(torch.equal(theirs[name], before[name]) for name in frozen)
    moved = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert moved and all(".lora_" in name for name in moved)


def test_sharing_weights_or_copying_them_is_the_same_training() -> None:
    pytest.importorskip("peft")
    rows = []
    for backbone in ("copy", "shared"):
        critic = replace(CONFIG.critic, backbone=backbone)
        trained = trainer(replace(CONFIG, lora=LoraConfig(r=4), critic=critic))
        rows.append([measured(trained.step()) for _ in range(2)])
    assert rows[0] == rows[1]


# GAE.


def slow_gae(
    steps: Sequence[Sequence[tuple[bool, float]]], outcome: float, gamma: float, lam: float
) -> list[tuple[float, float, float]]:
    """(value, return, advantage) of each action of one completion, step by step as the formulas are printed."""
    result: list[tuple[float, float, float]] = []
    next_return = next_value = next_advantage = 0.0
    for number, step in reversed(list(enumerate(steps))):
        reward = outcome if number == len(steps) - 1 else 0.0
        reveals = [value for is_reveal, value in step if is_reveal]
        mean = sum(reveals) / len(reveals)
        values = [value if is_reveal else mean for is_reveal, value in step]
        result = [
            (
                value,
                reward + gamma * next_return,
                (reward - value) + gamma * next_value + gamma * lam * next_advantage,
            )
            for value in values
        ] + result
        next_advantage = reward - mean + gamma * next_value + gamma * lam * next_advantage
        next_value, next_return = mean, reward + gamma * next_return
    return result


COMPLETIONS: tuple[tuple[float, list[list[tuple[bool, float]]]], ...] = (
    (0.7, [[(True, 0.3)], [(True, -0.2), (False, 9.0), (True, 0.5)], [(False, 1.0), (True, 0.1)]]),
    (-1.3, [[(True, 0.4), (True, 0.8)]]),
    (0.2, [[(True, 0.1 * n), (False, -n)] for n in range(7)]),
)


def rows_of(completions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    keys, is_reveal, value, outcome = [], [], [], []
    for number, (reward, steps) in enumerate(completions):
        for time, step in enumerate(steps):
            for reveals, estimate in step:
                keys.append([number, time // 2, time])  # two steps a block
                is_reveal.append(reveals)
                value.append(estimate)
                outcome.append(reward)
    return torch.tensor(keys), torch.tensor(is_reveal), torch.tensor(value), torch.tensor(outcome)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.7), (0.0, 0.5)])
def test_gae_is_that_of_a_plain_loop_in_any_order_of_rows(gamma: float, lam: float) -> None:
    expected = torch.tensor([row for reward, steps in COMPLETIONS for row in slow_gae(steps, reward, gamma, lam)])
    columns = rows_of(COMPLETIONS)
    order = torch.randperm(len(expected), generator=torch.Generator().manual_seed(0))
    estimate = gae_over_steps(*(column[order] for column in columns), gamma=gamma, lam=lam)
    torch.testing.assert_close(torch.stack(estimate, dim=1).float(), expected[order], rtol=0, atol=1e-6)


def test_two_known_identities() -> None:
    keys, is_reveal_T, value_T, outcome_T = rows_of(COMPLETIONS)
    value_T, return_T, advantage_T = gae_over_steps(keys, is_reveal_T, value_T, outcome_T, gamma=1.0, lam=1.0)
    torch.testing.assert_close(return_T, outcome_T.double())
    torch.testing.assert_close(advantage_T, outcome_T.double() - value_T)
    _, _, advantage_T = gae_over_steps(keys, is_reveal_T, value_T.float(), outcome_T, gamma=1.0, lam=0.0)
    means = {tuple(key): 0.0 for key in keys.tolist()}
    for key in means:
        is_here_T = (keys == torch.tensor(key)).all(dim=1) & is_reveal_T
        means[key] = float(value_T[is_here_T].mean())
    for row, (number, _, time) in enumerate(keys.tolist()):
        last = len(COMPLETIONS[number][1]) - 1
        ahead = float(outcome_T[row]) if time == last else means[number, (time + 1) // 2, time + 1]
        assert float(advantage_T[row]) == pytest.approx(ahead - float(value_T[row]), abs=1e-6)


@pytest.mark.parametrize("budget", [4096, 120])
def test_rollouts_get_what_their_steps_say(budget: int) -> None:
    """Against the completions themselves, however they are packed."""
    trained = trainer(replace(CONFIG, max_tokens_per_micro_batch=4096))
    groups = trained.collector.collect(0).groups
    tables = pack_groups(groups, GAE, Layout(trained.model.scheme, budget))
    assert (len(tables) > 2) == (budget == 120)
    completions = [completion for group in groups for completion in group.completions]
    outcomes = torch.linspace(-1, 1, len(completions))
    # A value that tells which step it is of: the block, and how much of it is still masked.
    tables = [replace(batch, advantage_T=outcomes[batch.completion_T]) for batch in tables]
    values = [batch.packed.actions.completion_index_T * 0.01 + batch.completion_T for batch in tables]
    found = 0
    for batch, value_T in zip(with_gae(tables, values, gamma=0.9, lam=0.8), values, strict=True):
        actions = batch.packed.actions
        for number in batch.completion_T.unique().tolist():
            rows_T = (batch.completion_T == number).nonzero().squeeze(1)
            steps: dict[int, list[tuple[bool, float]]] = {}
            for row in rows_T.tolist():
                view = int(actions.view_T[row])
                steps.setdefault(view, []).append((bool(actions.is_reveal_T[row]), float(value_T[row])))
            assert len(steps) == completions[number].num_denoising_steps
            expected = slow_gae(list(steps.values()), float(outcomes[number]), 0.9, 0.8)
            got = torch.stack([batch.value_T, batch.return_T, batch.advantage_T], dim=1)[rows_T]
            torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)
            found += 1
    assert found == len(completions)


def test_a_completion_cut_between_blocks_is_one() -> None:
    model, _ = tiny()
    packed = replayed(torch.arange(40, 49), model.config.mask_token_id)
    num_actions = len(packed.actions)
    value_T = torch.linspace(-1, 1, num_actions)
    whole = replace(PolicyBatch.blank(packed), advantage_T=torch.ones(num_actions))
    (expected,) = with_gae([whole], [value_T], gamma=0.9, lam=0.7)
    cut = int((packed.actions.block_T <= 1).sum())
    parts = []
    for rows in (slice(0, cut), slice(cut, num_actions)):
        actions = packed.actions.rows(rows)
        actions = replace(actions, view_T=actions.view_T - actions.view_T[0] + 1)  # each pack numbers its own views
        part = PolicyBatch.blank(PackedViews(packed.tokens, actions))
        parts.append(replace(part, advantage_T=torch.ones(len(actions))))
    values = [value_T[:cut], value_T[cut:]]
    first, second = with_gae(parts[::-1], values[::-1], gamma=0.9, lam=0.7)[::-1]
    for name in ("value_T", "return_T", "advantage_T"):
        joined_T = torch.cat([getattr(first, name), getattr(second, name)])
        torch.testing.assert_close(joined_T, getattr(expected, name), rtol=0, atol=0)


def test_nothing_is_judged_where_there_is_nothing() -> None:
    assert with_gae([], [], gamma=1.0, lam=1.0) == []
    packed = placeholder_pack(DiffusionScheme(block_length=4, mask_token_id=0))
    empty = PackedViews(packed.tokens, packed.actions.rows(slice(0, 0)))
    (batch,) = with_gae([PolicyBatch.blank(empty)], [torch.zeros(0)], gamma=1.0, lam=1.0)
    assert len(batch.value_T) == 0


# The loss and its metrics.


def judged(value: Sequence[float], returns: Sequence[float], coefficient: float = 1.0) -> PolicyBatch:
    zeros_T = torch.zeros(len(value))
    return table(
        len(value),
        value_T=torch.tensor(value),
        return_T=torch.tensor(returns),
        coefficient_T=zeros_T + coefficient,
    )


def outcome_of(*losses: Loss) -> StepOutcome:
    sums = {name: sum(float(loss.sums[name]) for loss in losses) for name in losses[0].sums}
    metrics = {"loss": sum(float(loss.value) for loss in losses), "grad_norm": 2.0, "learning_rate": 0.5}
    return StepOutcome(metrics, sums, {})


def test_the_loss_is_the_larger_of_two_and_pulls_only_where_it_may() -> None:
    old, returns = [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]
    value_T = torch.tensor([0.1, 0.5, 0.5, 2.0], requires_grad=True)
    loss = value_loss(value_T, judged(old, returns, coefficient=0.25), clip_range=0.2)
    errors = [
        0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)
        for v, o, r in zip(value_T.tolist(), old, returns, strict=True)
    ]
    assert loss.value.item() == pytest.approx(0.25 * sum(errors))
    loss.value.backward()
    assert value_T.grad is not None
    assert value_T.grad.tolist() == pytest.approx([0.25 * -0.9, 0.0, 0.25 * 1.5, 0.25 * 1.0])
    assert float(loss.sums["clipped"]) == 1


def test_without_a_clip_range_the_loss_is_the_squared_error() -> None:
    loss = value_loss(torch.tensor([3.0]), judged([0.0], [1.0]), clip_range=0.0)
    assert loss.value.item() == pytest.approx(2.0) and float(loss.sums["clipped"]) == 0


def test_holds_teach_no_value() -> None:
    batch = judged([0.0, 0.0], [1.0, 5.0])
    actions = replace(batch.packed.actions, is_reveal_T=torch.tensor([True, False]))
    batch = replace(batch, packed=PackedViews(batch.packed.tokens, actions))
    value_T = torch.tensor([0.1, 0.1], requires_grad=True)
    loss = value_loss(value_T, batch, clip_range=0.2)
    loss.value.backward()
    assert value_T.grad is not None and value_T.grad[1] == 0 and value_T.grad[0] != 0
    assert float(loss.sums["reveals"]) == 1 and float(loss.sums["return"]) == 1


def test_explained_variance_is_over_all_micro_batches_and_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    value_T, noise_T = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
    returns_T = value_T * 0.8 + noise_T * 0.3 + 2.0
    losses = [
        value_loss(value_T[rows], judged(value_T[rows].tolist(), returns_T[rows].tolist()), 0.2)
        for rows in (slice(0, 15), slice(15, 40))
    ]
    metrics = critic_metrics([outcome_of(losses[0]), StepOutcome({"loss": 0.0, "grad_norm": 0.0}, {}, {})][:1])
    assert metrics["critic/value_mean"] == pytest.approx(float(value_T[:15].mean()), abs=1e-6)
    metrics = critic_metrics([outcome_of(*losses)])
    expected = 1 - (returns_T - value_T).var(correction=0) / returns_T.var(correction=0)
    assert metrics["critic/explained_variance"] == pytest.approx(float(expected), abs=1e-5)
    assert metrics["critic/value_mean"] == pytest.approx(float(value_T.mean()), abs=1e-6)
    assert (metrics["critic/grad_norm"], metrics["critic/learning_rate"]) == (2.0, 0.5)
    same = critic_metrics([outcome_of(value_loss(torch.ones(3), judged([1.0] * 3, [1.0] * 3), 0.2))])
    assert same["critic/explained_variance"] == 0.0


# Training.


def measured(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("timing_s/", "perf/", "time"))}


def test_the_critic_is_judged_before_it_learns_and_learns_what_it_is_told() -> None:
    """One batch of rollouts again and again: the values come to foretell the returns."""
    critic = CriticConfig(learning_rate=3e-3, lr_scheduler_type="constant", clip_range=0.0)
    config = replace(CONFIG, learning_rate=0.0, max_steps=30, critic=critic, objective=ObjectiveConfig(advantage="gae"))
    trained = trainer(config)
    groups = trained.collector.collect(0).groups
    advantages = advantages_of(groups, ObjectiveConfig(), trained.distributed)
    rows = [trained.updater.update(groups, advantages, now) for now in range(30)]
    assert rows[0]["critic/value_mean"] == 0 and rows[0]["critic/explained_variance"] == 0
    assert rows[-1]["critic/loss"] < 0.3 * rows[0]["critic/loss"]
    assert rows[-1]["critic/explained_variance"] > 0.5


def test_with_values_of_zero_the_first_step_is_that_of_the_group() -> None:
    objective = ObjectiveConfig(advantage="gae")
    steps = [trainer(replace(CONFIG, objective=o)).step() for o in (objective, ObjectiveConfig())]
    for name in ("loss", "grad_norm"):
        assert steps[0][name] == pytest.approx(steps[1][name], rel=1e-6)
    assert "critic/loss" in steps[0] and "critic/loss" not in steps[1]


def test_in_the_first_steps_only_the_critic_learns() -> None:
    config = replace(
        CONFIG, num_iterations=2, critic=replace(CONFIG.critic, critic_only_steps=3), learning_rate=1e-2, warmup_steps=0
    )
    trained = trainer(config)
    assert trained.critic is not None
    start, values = (
        {name: p.detach().clone() for name, p in module.named_parameters()}
        for module in (trained.model, trained.critic.learner.module)
    )
    metrics = trained.step()
    assert all(torch.equal(p, start[name]) for name, p in trained.model.named_parameters())
    assert metrics["grad_norm"] == 0 and metrics["critic/grad_norm"] > 0
    assert not all(torch.equal(p, values[name]) for name, p in trained.critic.learner.module.named_parameters())
    assert trained.learner.scheduler.last_epoch == 2, "the policy's schedule goes on"
    metrics = trained.step()
    assert metrics["grad_norm"] > 0, "of the fourth step"
    assert not all(torch.equal(p, start[name]) for name, p in trained.model.named_parameters())


def numbers(output_dir: Path) -> list[dict[str, float]]:
    return [measured(json.loads(line)) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("backbone", ["copy", "shared"])
def test_resumed_equals_uninterrupted(backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(r=4 if backbone == "shared" else 0)
    if lora.r:
        pytest.importorskip("peft")
    critic = CriticConfig(backbone=backbone, learning_rate=1e-2, warmup_steps=1, critic_only_steps=1)  # type: ignore[arg-type]
    config = replace(CONFIG, critic=critic, lora=lora)
    whole = trainer(replace(config, output_dir=str(tmp_path / "whole")))
    final = whole.train()
    assert not [name for name in json.loads((final / "config.json").read_text()) if "critic" in name]
    assert sorted(path.name for path in final.glob("*.safetensors")) == ["model.safetensors"]

    parts = replace(config, output_dir=str(tmp_path / "parts"))
    killed = trainer(parts)
    step = killed.step

    def step_until_killed() -> dict[str, float]:
        if killed.steps_done == 3:  # one step beyond the checkpoint: it is done again
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(killed, "step", step_until_killed)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    resumed = trainer(parts)
    resumed.train()
    assert [row["step"] for row in numbers(tmp_path / "parts")] == [1, 2, 3, 4]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    for ours, theirs in zip(resumed.learners().values(), whole.learners().values(), strict=True):
        expected = dict(theirs.module.named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in ours.module.named_parameters())


def test_a_run_goes_on_with_a_critic_or_without_as_it_began(tmp_path: Path) -> None:
    with_critic = replace(CONFIG, output_dir=str(tmp_path / "with"), max_steps=1)
    without = replace(with_critic, output_dir=str(tmp_path / "without"), objective=ObjectiveConfig())
    trainer(with_critic).train()
    trainer(without).train()
    longer = replace(without, output_dir=with_critic.output_dir, max_steps=2)
    with pytest.raises(UserError, match=r"was written with objective\.likelihood=trajectory, this run has reveal"):
        trainer(longer).train()
    longer = replace(with_critic, output_dir=without.output_dir, max_steps=2)
    with pytest.raises(UserError, match=r"was written with objective\.likelihood=reveal, this run has trajectory"):
        trainer(longer).train()


@pytest.mark.matrix
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_logprobs_and_values_are_float32_although_the_passes_are_bfloat16(backend: str) -> None:
    done = launch_script(__file__, backend=backend, num_processes=2, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("computed in bfloat16: float32 float32") == 2


def print_precisions() -> None:
    """The script of the processes: what a policy and a critic return under bf16=true."""
    trained = trainer(replace(CONFIG, bf16=True))
    assert trained.critic is not None
    seen: set[torch.dtype] = set()
    layer = next(module for name, module in trained.model.named_modules() if name.endswith("q_proj"))
    layer.register_forward_hook(lambda module, given, result: seen.add(result.dtype))
    filler = trained.updater._filler()
    precisions = [trained.updater._policy(filler).dtype, trained.critic.learner.module(filler).dtype]
    words = [str(precision).removeprefix("torch.") for precision in (*seen, *precisions)]
    print(f"computed in {words[0]}: {' '.join(words[1:])}", flush=True)
    trained.distributed.close()


# What is refused, and what it costs.


def test_what_cannot_be_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="views=masks with advantage=gae: there are no steps"):
        ObjectiveConfig(advantage="gae", views="masks")
    with pytest.raises(UserError, match=r"critic.backbone=shared needs frozen weights to share: set lora.r"):
        replace(CONFIG, critic=CriticConfig(backbone="shared"))
    with pytest.raises(UserError, match="lr_scheduler_type must be one of"):
        CriticConfig(lr_scheduler_type="none_such")
    distributed = Distributed()
    monkeypatch.setattr(Distributed, "backend", "fsdp2")
    with pytest.raises(UserError, match=r"cannot share weights that fsdp2 shards; use critic.backbone=copy"):
        value_model_of(tiny()[0], CriticConfig(backbone="shared"), distributed)


def test_memory_of_a_critic(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    model, _ = tiny()
    config = replace(CONFIG, model=replace(CONFIG.model, path=str(tmp_path / "tiny")))
    size = 4.0 * sum(p.numel() for p in model.model.parameters())
    assert rl_workload(config).critic == "copy"
    assert rl_workload(replace(config, objective=ObjectiveConfig())).critic == "none"
    run = RunMemory(config.model, rl_workload(config))
    uses = {backend: run.under(backend, 4).uses for backend in ("ddp", "zero1", "zero3")}
    assert uses["ddp"]["critic"] == pytest.approx(4 * size)
    assert uses["zero1"]["critic"] == pytest.approx((1 + 1 + 3 / 4) * size)
    assert uses["zero3"]["critic"] == pytest.approx(size)
    pytest.importorskip("peft")
    lora = LoraConfig(r=4)
    shared = Workload(tokens_per_micro_batch=64, bf16=False, lora=lora, critic="shared")
    add_adapters(model, lora, seed=0)
    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert RunMemory(config.model, shared).under("ddp", 1).uses["critic"] == 4 * adapters


if __name__ == "__main__":
    print_precisions()
