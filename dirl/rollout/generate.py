"""Questions -> completions that can be shown, in one call: the engine for notebooks.

Engines return token ids, which are the truth; `with_texts` makes of them what people can look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt, token_texts
from dirl.data.messages import Message, Tool, read_prompt, read_tools
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
    prompts: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Sequence[Sequence[int]],
    *,
    tools: Sequence[Tool] | None = None,
    seed: int = 0,
    approximate_cache: ApproximateCache = "none",
    **sampling: Any,  # the fields of SamplingConfig, which checks them
) -> Completions:
    """One completion per prompt.

    Args:
        prompts: questions or conversations (lists of messages, the last one of the user), put through the tokenizer's
            chat template; or token ids, taken as they are. A single question or conversation need be in no list.
        tools: JSON schemas that the chat template shows, to all prompts but token ids.
        seed: the i-th prompt is decoded with seed + i.
        approximate_cache: under full attention `prefix` or `dual`: faster, and no longer the model's own completions.
        sampling: `temperature`, `top_k`, `top_p`, `max_completion_length`, `unmasking_strategy`,
            `confidence_threshold`, ... (see `dirl.SamplingConfig`).
    """
    is_single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
    given = read_tools(list(tools or []))
    ids = [_prompt_ids(tokenizer, prompt, given) for prompt in ([prompts] if is_single else prompts)]
    config = EngineConfig(engine="torch", compile="never", approximate_cache=approximate_cache)
    engine = build_engine(model, tokenizer, config)
    completions = engine.generate(ids, SamplingConfig(**sampling), [seed + i for i in range(len(ids))])
    return with_texts(completions, tokenizer, model.scheme)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, tools: Sequence[Tool] | None) -> list[int]:
    if isinstance(prompt, str):
        return render_prompt(tokenizer, prompt, tools=tools)
    if prompt and isinstance(prompt[0], Mapping):
        return render_prompt(tokenizer, read_prompt("prompt", list(prompt)), tools=tools)
    return list(prompt)
