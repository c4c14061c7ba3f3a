"""The RL trainer: its run directory, a reward by file path, advantages over the batch, and that the reward matters."""

from __future__ import annotations

import copy
import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt
from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Scores
from dirl.rl.advantage import advantages_of
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLDataConfig, RLEvalConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rollout.engine import Completion
from dirl.rollout.local.engine import TorchEngine
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer

CONFIG = RLConfig(
    output_dir="unused",
    max_steps=2,
    learning_rate=1e-3,
    completions_steps=1,
    rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12),
)
PROBLEMS = [Problem("?" * length, "0", {"hint": "x" * length}) for length in range(1, 8)]


def trainer(config: RLConfig, problems: Sequence[Problem] = PROBLEMS) -> RLTrainer:
    model, tokenizer = tiny()
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def test_a_run_with_a_reward_from_a_file(tmp_path: Path) -> None:
    reward = tmp_path / "my_reward.py"
    reward.write_text(
        "def hinted(prompts, completions, *, completion_ids, step_maps, hint, answer, question, **_):\n"
        "    assert [len(q) for q in question] == [len(h) for h in hint] and set(answer) == {'0'}\n"
        "    assert [len(ids) for ids in completion_ids] == [len(steps) for steps in step_maps]\n"
        "    return [float(len(c) % 2 == 0) for c in completions]\n"
    )
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), reward=RewardConfig(functions=[f"{reward}:hinted"]))
    final = trainer(config).train()
    assert (final / "config.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for step, row in enumerate(rows, start=1):
        text = (tmp_path / "run" / "completions" / f"step_{step:06d}.jsonl").read_text()
        completions = [json.loads(line) for line in text.splitlines()]
        assert row["reward"] == pytest.approx(statistics.fmean(c["reward"] for c in completions))
        assert all(c["reward"] == float(len(c["text"]) % 2 == 0) for c in completions)
        assert row["rewards/hinted/mean"] == pytest.approx(row["reward"])
        assert all(len(c["token_texts"]) == len(c["token_ids"]) and c["block_length"] == 4 for c in completions)
        assert sum(value for name, value in row.items() if name.startswith("groups/pass_rate/")) == len(
            {c["group"] for c in completions}
        )
    assert "step 2, group" in (tmp_path / "run" / "report.html").read_text()
    assert "reinforcement learning" in (final / "README.md").read_text()


class SleepyEngine(TorchEngine):
    """As LMDeploy at sleep level 2: asleep it decodes nothing, and it has no weights until the next push."""

    is_asleep = has_weights = False

    def generate(self, *arguments: Any, **named: Any) -> list[Completion]:
        assert self.has_weights and not self.is_asleep
        return super().generate(*arguments, **named)

    def update_weights(self, model: nn.Module) -> None:
        super().update_weights(model)
        self.has_weights = True

    def sleep(self) -> None:
        self.is_asleep, self.has_weights = True, False

    def wake(self) -> None:
        self.is_asleep = False


def test_after_an_update_that_was_interrupted_the_engine_is_awake_for_the_next_step() -> None:
    model, tokenizer = tiny()
    config = replace(CONFIG, rollout=replace(CONFIG.rollout, dynamic_sampling=False))
    engine = SleepyEngine(model, tokenizer)
    ours = RLTrainer(config, model=model, tokenizer=tokenizer, problems=PROBLEMS, engine=engine)
    ours.begin()
    update = ours.updater.update

    def interrupted(*_: Any) -> dict[str, float]:
        raise KeyboardInterrupt

    ours.updater.update = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ours.step()
    ours.updater.update = update  # type: ignore[method-assign]
    assert ours.step()["completions/mean_length"] > 0


def test_batch_scaling_divides_by_the_deviation_of_the_whole_batch() -> None:
    config = replace(CONFIG, reward=RewardConfig(functions=["tests.rl.test_update:even_length"]))
    plain = trainer(config)
    groups = plain.collector.collect(0).groups
    std = statistics.stdev(reward for group in groups for reward in group.rewards)
    centred_and_divided = (
        advantages_of(groups, ObjectiveConfig(scale_rewards=scale), plain.distributed) for scale in ("none", "batch")
    )
    for centred, divided in zip(*centred_and_divided, strict=True):
        assert divided.tolist() == pytest.approx((centred / std).tolist(), rel=1e-3)


def test_impossible_settings_are_errors() -> None:
    with pytest.raises(ValueError, match=r"max_steps=3 must be a multiple .* 2"):
        replace(CONFIG, max_steps=3, num_iterations=2)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        replace(CONFIG, rollout=replace(CONFIG.rollout, temperature=0.0))
    with pytest.raises(ValueError, match="max_prompt_length=1 leaves no prompt"):
        trainer(replace(CONFIG, data=RLDataConfig(max_prompt_length=1)))


def test_epochs_and_rows_kept_apart(tmp_path: Path) -> None:
    """One step is num_iterations optimizer steps; what is kept apart is evaluated on where nothing else is named."""
    config = replace(
        CONFIG,
        output_dir=str(tmp_path),
        max_steps=-1,
        num_train_epochs=1.5,
        num_iterations=2,
        data=RLDataConfig(heldout=3.0),
        eval=RLEvalConfig(limit=2),
    )
    twice = [*PROBLEMS, *PROBLEMS]
    trained = trainer(config, twice)
    assert len(trained.heldout) == 2 and len(trained.collector.prompts) == 10
    assert trained.config.max_steps == trained.learner.config.max_steps == 2 * 5
    named = trainer(replace(config, eval=RLEvalConfig(path="task:noisy_sums", limit=2)), twice)
    assert len(named.heldout) == 2 and all("num_terms" in problem.columns for problem in named.heldout)
    asked = trainer(replace(config, data=RLDataConfig(decontaminate="drop"), eval=RLEvalConfig()), twice)
    assert len(asked.collector.prompts) == 14 and asked.heldout == []


def copying(num: int, error_rate: float) -> list[tuple[Problem, str]]:
    """Questions that ask for a number to be repeated, and the answer of a teacher who gets it wrong at times."""
    rng = random.Random(0)
    rows = []
    for _ in range(num):
        number = rng.randrange(10, 100)
        said = rng.randrange(10, 100) if rng.random() < error_rate else number
        rows.append((Problem(f"{number}=", str(number), {}), f"\\boxed{{{said}}}"))
    return rows


@pytest.fixture(scope="module")
def taught() -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """A model that imitates a teacher who is wrong in 40 % of the cases."""
    model, tokenizer = tiny()
    documents = [
        Document(render_prompt(tokenizer, problem.question), [*tokenizer.encode(said), tokenizer.eos_token_id])
        for problem, said in copying(4000, error_rate=0.4)
    ]
    config = SFTConfig(
        output_dir="unused",
        max_steps=300,
        global_batch_size=32,
        learning_rate=3e-3,
        warmup_steps=10,
        adam_beta2=0.98,
        data=SFTDataConfig(num_heldout=0),
    )
    trained = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)
    for _ in range(config.max_steps):
        trained.step()
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_only_the_true_reward_teaches(
    taught: tuple[BlockDiffusionModel, PreTrainedTokenizerBase], is_shuffled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: rewards permuted over the batch must not gain. Four steps see 1024 completions: sigma 0.02."""
    model, tokenizer = taught
    config = RLConfig(
        output_dir="unused",
        max_steps=16,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        objective=ObjectiveConfig(scale_rewards="group"),
        rollout=RolloutConfig(prompts_per_step=32, num_generations=8, max_completion_length=12, dynamic_sampling=False),
    )
    problems = [problem for problem, _ in copying(1000, error_rate=0.0)]
    trained = RLTrainer(config, model=copy.deepcopy(model), tokenizer=tokenizer, problems=problems)
    if is_shuffled:
        score, rng = trained.rubric.score, random.Random(0)

        def shuffled(*args: Any, **named: Any) -> Scores:
            scores = score(*args, **named)
            return replace(scores, total=rng.sample(scores.total, len(scores.total)))

        monkeypatch.setattr(trained.rubric, "score", shuffled)
    accuracies = [trained.step()["completions/accuracy"] for _ in range(config.max_steps)]
    gain = statistics.fmean(accuracies[-4:]) - statistics.fmean(accuracies[:4])
    assert (gain < 0.06) if is_shuffled else (gain > 0.12), (gain, accuracies)


def test_a_snapshot_is_evaluated_as_the_model_is(tmp_path: Path) -> None:
    """By the process of `eval.background`, which has the configuration and the snapshot alone."""
    evaluation = RLEvalConfig(path="task:noisy_sums", limit=3, num_samples=2)
    reward = RewardConfig(functions=["tests.rl.test_update:even_length"])
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), eval=evaluation, reward=reward)
    trained = trainer(config)
    before = trained.evaluate()
    trained.step()
    trained.write_snapshot(tmp_path / "step_000000")
    assert RLTrainer.evaluate_snapshot(config, tmp_path / "step_000000") == trained.evaluate()
    assert before.keys() >= {"eval/accuracy", "eval/greedy/tokens_per_step", "eval/standard_error"}
    beside = replace(evaluation, background=True)
    for changes, words in (
        ({"eval": replace(beside, path="")}, r"nothing to evaluate on: set eval\.path"),
        (
            {"rollout": replace(config.rollout, mode="server", server_urls=["http://127.0.0.1:1"])},
            r"not a server: set rollout\.mode=colocate",
        ),
        ({"rollout": replace(config.rollout, engine="lmdeploy")}, r"needs a GPU: set eval\.device"),
        ({"rollout": replace(config.rollout, threshold_policy=[0.5, 0.9])}, r"no rollout\.threshold_policy"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(config, **{"eval": beside, **changes})
    with pytest.raises(ValueError, match="by the configuration alone: pass no rubric"):
        model, tokenizer = tiny()
        RLTrainer(replace(config, eval=beside), model=model, tokenizer=tokenizer, rubric=trained.rubric)
