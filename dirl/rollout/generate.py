"""Questions -> completions, in one call: the engine for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt
from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.completions import Completions, with_texts
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine


def generate(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    seed: int = 0,
    **sampling: Any,  # the fields of SamplingConfig, which checks them
) -> Completions:
    """One completion per prompt.

    Args:
        prompts: questions, put through the tokenizer's chat template; or token ids, taken as they are.
        seed: the i-th prompt is decoded with seed + i.
        sampling: `temperature`, `top_k`, `top_p`, `max_completion_length`, `unmasking_strategy`,
            `confidence_threshold`, ... (see `dirl.SamplingConfig`).
    """
    asked = [prompts] if isinstance(prompts, str) else prompts
    ids = [render_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in asked]
    engine = TorchEngine(model, tokenizer)
    completions = engine.generate(ids, SamplingConfig(**sampling), [seed + i for i in range(len(ids))])
    return with_texts(completions, tokenizer, model.config.block_size)
