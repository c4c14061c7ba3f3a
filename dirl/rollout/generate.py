"""Questions -> completions that can be shown, in one call: the engine for notebooks.

Engines return token ids, which are the truth; `with_texts` makes of them what people can look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt, token_texts
from dirl.diffusion.packing import DiffusionScheme
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.build import build_engine
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, SamplingConfig
from dirl.show.completions import completion_html, completions_table, list_html, play, tokens_table


@dataclass(frozen=True, kw_only=True)
class ShownCompletion(Completion):
    """A completion that a notebook shows, and that can be played and tabulated."""

    block_length: int  # tokens per block
    tail: int  # tokens of the prompt in the first of these blocks
    token_texts: list[str]  # (R,) what each token reads

    def _repr_html_(self) -> str:
        """What a notebook shows: the tokens, coloured by the step they were revealed at."""
        return completion_html(self)

    def show(self) -> None:
        """Play the denoising: with a slider in a notebook, step by step in a terminal."""
        play([self])

    def to_pandas(self) -> Any:
        """One row per token; needs pandas."""
        return tokens_table(self)


class Completions(list[ShownCompletion]):
    """A list of completions that a notebook shows, plays (`show`) and turns into a table (`to_pandas`)."""

    def _repr_html_(self) -> str:
        return list_html(self)

    def show(self) -> None:
        """Play the denoising, with a choice of completion."""
        play(self)

    def to_pandas(self) -> Any:
        """One row per completion; needs pandas."""
        return completions_table(self)


def with_texts(
    completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, scheme: DiffusionScheme
) -> Completions:
    """The completions with texts of tokens and their blocks (under full attention one): all it takes to show them."""
    texts = token_texts(tokenizer, [completion.token_ids for completion in completions])
    return Completions(
        ShownCompletion(
            **{
                **vars(completion),
                "token_texts": text,
                "block_length": scheme.block_length or len(completion.prompt_ids) + len(completion.token_ids),
                "tail": len(completion.prompt_ids) if scheme.is_full else scheme.tail(len(completion.prompt_ids)),
            }
        )
        for completion, text in zip(completions, texts, strict=True)
    )


def generate(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    seed: int = 0,
    approximate_cache: ApproximateCache = "none",
    **sampling: Any,  # the fields of SamplingConfig, which checks them
) -> Completions:
    """One completion per prompt.

    Args:
        prompts: questions, put through the tokenizer's chat template; or token ids, taken as they are.
        seed: the i-th prompt is decoded with seed + i.
        approximate_cache: under full attention `prefix` or `dual`: faster, and no longer the model's own completions.
        sampling: `temperature`, `top_k`, `top_p`, `max_completion_length`, `unmasking_strategy`,
            `confidence_threshold`, ... (see `dirl.SamplingConfig`).
    """
    asked = [prompts] if isinstance(prompts, str) else prompts
    ids = [render_prompt(tokenizer, prompt) if isinstance(prompt, str) else list(prompt) for prompt in asked]
    config = EngineConfig(engine="torch", compile="never", approximate_cache=approximate_cache)
    engine = build_engine(model, tokenizer, config)
    completions = engine.generate(ids, SamplingConfig(**sampling), [seed + i for i in range(len(ids))])
    return with_texts(completions, tokenizer, model.scheme)
