"""What the forward passes of a step compute: entropies (sums over T x V) only where a metric shows them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.diffusion import likelihood
from dirl.model import logprobs
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many packs were scored (each in one chunk), and how many entropies that took."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def count(*arguments: Any) -> Any:
            counts[name] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(logprobs, "action_logprobs", counted("packs", logprobs.action_logprobs))
    monkeypatch.setattr(likelihood, "entropy", counted("entropies", likelihood.entropy))
    return counts


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def test_sft_computes_no_entropy(calls: Counter[str]) -> None:
    model, tokenizer = tiny()
    documents = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 17)]
    config = SFTConfig(output_dir="unused", global_batch_size=4, data=SFTDataConfig(num_heldout=2))
    trainer = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)
    trainer.step()
    trainer.evaluate()
    assert calls == {"packs": 2}


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_rl_computes_an_entropy_where_it_trains_and_not_for_behaviour_or_reference(
    beta: float, calls: Counter[str], tmp_path: Path
) -> None:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(tmp_path),
        num_iterations=2,
        # With a correction the behaviour is the trainer's own, scored once more than the engine did.
        objective=ObjectiveConfig(likelihood="trajectory", beta=beta, importance_sampling_correction="token_truncate"),
        rollout=RolloutConfig(prompts_per_step=2, num_generations=4, max_completion_length=12, dynamic_sampling=False),
        reward=RewardConfig(functions=[f"{__file__}:even_length"]),
    )
    problems = [Problem("?" * length, "0", {}) for length in range(1, 5)]
    trainer = RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)
    metrics = trainer.step()
    num_frozen = 1 + (beta > 0)  # what the behaviour policy and the reference gave; then two optimizer steps
    assert calls == {"packs": num_frozen + 2, "entropies": 2}
    assert metrics["entropy"] > 0
