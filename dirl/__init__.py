"""Post-training of block-diffusion language models: SFT with random masking, then RL with DiPO.

The face for notebooks. Nothing is imported before it is used, so that `import dirl` is immediate:

    model, tokenizer = dirl.tiny()                      # or dirl.load("path/to/SDAR")
    completions = dirl.generate(model, tokenizer, ["9+7+8="], temperature=1.0)
    completions[0].show()                               # a slider over the denoising steps
    logprobs = dirl.logprobs(model, completions)        # nats, at the step each token was revealed
    dirl.RLTrainer(dirl.RLConfig(output_dir="outputs/rl"), model=model, tokenizer=tokenizer).step()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "tiny": "dirl.model.tiny",
    "load": "dirl.model.checkpoint",
    "generate": "dirl.rollout.generate",
    "logprobs": "dirl.rollout.replay",
    "Completion": "dirl.rollout.engine",
    "Completions": "dirl.rollout.generate",
    "with_texts": "dirl.rollout.generate",
    "plot_run": "dirl.show.pictures",
    "plot_trajectory": "dirl.show.trajectory_picture",
    "plot_thresholds": "dirl.eval.accuracy_picture",
    "write_report": "dirl.show.report.write",
    "SamplingConfig": "dirl.rollout.engine",
    "ObjectiveConfig": "dirl.rl.objective",
    "RolloutConfig": "dirl.rl.collector",
    "ModelConfig": "dirl.model.checkpoint",
    "SFTConfig": "dirl.sft.train",
    "SFTTrainer": "dirl.sft.train",
    "SFTDataConfig": "dirl.sft.sft_data",
    "RLDataConfig": "dirl.rl.rl_config",
    "RLConfig": "dirl.rl.rl_config",
    "RLTrainer": "dirl.rl.train",
    "RewardConfig": "dirl.reward.rubric",
}

__all__ = [
    "Completion",
    "Completions",
    "ModelConfig",
    "ObjectiveConfig",
    "RLConfig",
    "RLDataConfig",
    "RLTrainer",
    "RewardConfig",
    "RolloutConfig",
    "SFTConfig",
    "SFTDataConfig",
    "SFTTrainer",
    "SamplingConfig",
    "generate",
    "load",
    "logprobs",
    "plot_run",
    "plot_thresholds",
    "plot_trajectory",
    "rewards",
    "tiny",
    "with_texts",
    "write_report",
]

if TYPE_CHECKING:
    from dirl import reward as rewards
    from dirl.eval.accuracy_picture import plot_thresholds
    from dirl.model.checkpoint import ModelConfig, load
    from dirl.model.tiny import tiny
    from dirl.reward.rubric import RewardConfig
    from dirl.rl.objective import ObjectiveConfig
    from dirl.rl.rl_config import RLConfig, RLDataConfig
    from dirl.rl.rollouts import RolloutConfig
    from dirl.rl.train import RLTrainer
    from dirl.rollout.engine import Completion, SamplingConfig
    from dirl.rollout.generate import Completions, generate, with_texts
    from dirl.rollout.replay import logprobs
    from dirl.sft.sft_data import SFTDataConfig
    from dirl.sft.train import SFTConfig, SFTTrainer
    from dirl.show.pictures import plot_run
    from dirl.show.report.write import write_report
    from dirl.show.trajectory_picture import plot_trajectory


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return import_module("dirl.reward")
    if name not in _HOMES:
        raise AttributeError(f"module 'dirl' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
