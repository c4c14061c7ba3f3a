"""Completions that can be shown: what an engine returned, and what each token reads.

Engines return token ids, which are the truth; `with_texts` makes of them what people can look at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import token_texts
from dirl.rollout.engine import Completion
from dirl.show.completions import completion_html, completions_table, list_html, play, tokens_table


@dataclass(frozen=True, kw_only=True)
class ShownCompletion(Completion):
    """A completion that a notebook shows, and that can be played and tabulated."""

    block_length: int  # tokens per block
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


def with_texts(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, block_length: int) -> Completions:
    """The completions with the text of each token and the length of blocks: all it takes to show them."""
    texts = token_texts(tokenizer, [completion.token_ids for completion in completions])
    return Completions(
        ShownCompletion(**{**vars(completion), "token_texts": text, "block_length": block_length})
        for completion, text in zip(completions, texts, strict=True)
    )
