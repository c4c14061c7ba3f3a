"""Completions for people: colours in a notebook, a player, tables.

Engines return token ids, which are the truth. `with_texts` adds what each token reads and how long blocks are; that is
all a completion needs to show itself.
"""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import token_texts
from dirl.rollout.engine import Completion
from dirl.show.report.page import player_page
from dirl.show.report.samples import play_data
from dirl.show.terminal import draft_text, live_text

_SHOWN = 20  # completions in the representation of a list; all of them can be played


class Completions(list[Completion]):
    """A list of completions that a notebook shows, plays (`show`) and turns into a table (`to_pandas`)."""

    def _repr_html_(self) -> str:
        rest = f"<p>... and {len(self) - _SHOWN} more</p>" if len(self) > _SHOWN else ""
        return "".join(completion_html(completion) for completion in self[:_SHOWN]) + rest

    def show(self) -> None:
        """Play the denoising, with a choice of completion."""
        play(self)

    def to_pandas(self) -> Any:
        """One row per completion; needs pandas."""
        return _pandas().DataFrame(
            [
                {**vars(completion), "tokens_per_step": completion.tokens_per_step}
                for completion in map(_without_texts, self)
            ]
        )


def with_texts(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, block_length: int) -> Completions:
    """The completions with the text of each token and the length of blocks."""
    texts = token_texts(tokenizer, [completion.token_ids for completion in completions])
    return Completions(
        replace(completion, token_texts=text, block_length=block_length)
        for completion, text in zip(completions, texts, strict=True)
    )


def completion_html(completion: Completion) -> str:
    """Tokens coloured from blue (first step of their block) to orange (last); a title says step and confidence.

    Only inline styles, translucent: it stands in light and dark notebooks, trusted or not.
    """
    facts = (
        f"{completion.completion_length} tokens in {completion.num_denoising_steps} steps "
        f"({completion.tokens_per_step:.2f} per step), finish: {completion.finish_reason}"
    )
    style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9"
    if completion.token_texts is None or not completion.block_length:
        body = html.escape(completion.text)
    else:
        body = "".join(_block_html(completion, members) for members in blocks(completion))
    return f'<div><div style="{style}">{body}</div><div style="opacity:.65;font-size:85%">{facts}</div></div>'


def blocks(completion: Completion) -> Iterator[range]:
    """The completion's token indices, block by block; the first block may begin in the prompt."""
    tail = len(completion.prompt_ids) % completion.block_length
    for start in range(-tail, len(completion.token_ids), completion.block_length):
        yield range(max(start, 0), min(start + completion.block_length, len(completion.token_ids)))


def _block_html(completion: Completion, members: range) -> str:
    texts = completion.token_texts or []
    last = max(completion.step_map[index] for index in members)
    spans = []
    for index in members:
        step = completion.step_map[index]
        hue = 210 - 180 * (step - 1) / max(last - 1, 1)
        faded = "" if index < completion.completion_length else ";opacity:.5"
        spans.append(
            f'<span title="{html.escape(_title(completion, index))}" style="background:hsla({hue:.0f},80%,50%,.28)'
            f'{faded}">{html.escape(texts[index]) or "·"}</span>'
        )
    return f'<span style="border:1px solid rgba(128,128,128,.45);border-radius:3px">{"".join(spans)}</span>'


def _title(completion: Completion, index: int) -> str:
    said = f"step {completion.step_map[index]} of its block"
    if completion.logprobs is not None:
        said += f", confidence {math.exp(completion.logprobs[index]):.3f}"
    return said


def play(completions: Sequence[Completion]) -> None:
    """A frame with a slider in a notebook; step by step in a terminal.

    Raises:
        ValueError: completions without texts.
    """
    for completion in completions:
        if completion.token_texts is None or not completion.block_length:
            raise ValueError(
                "this completion holds token ids only; "
                "dirl.with_texts(completions, tokenizer, model.config.block_size) adds what show() needs"
            )
    if not _is_notebook():
        _play_in_terminal(completions)
        return
    from IPython.display import HTML, display  # type: ignore[import-not-found]

    page = html.escape(player_page(list(_samples(completions))), quote=True)
    style = "width:100%;height:340px;border:0;resize:vertical"
    display(HTML(f'<div><iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe></div>'))


def _samples(completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
    for number, completion in enumerate(completions, start=1):
        sample = play_data(vars(completion), label=f"completion {number}", decode=None, block_length=0)
        if sample is not None:
            yield sample


def _play_in_terminal(completions: Sequence[Completion], seconds: float = 0.15) -> None:
    for completion in completions:
        with live_text() as draw:
            for texts, is_committed in frames(completion):
                draw(draft_text(texts, is_committed))
                time.sleep(seconds)


def frames(completion: Completion) -> Iterator[tuple[list[str], list[bool]]]:
    """What stands after each denoising step: texts of the tokens so far, and whether each is committed."""
    texts = completion.token_texts or []
    for members in blocks(completion):
        steps = [completion.step_map[index] for index in members]
        for step in range(1, max(steps) + 1):
            is_committed = [True] * members.start + [revealed <= step for revealed in steps]
            shown = [text if done else "░" for text, done in zip(texts[: members.stop], is_committed, strict=True)]
            yield shown, is_committed


def tokens_table(completion: Completion) -> Any:
    """A pandas table with one row per token."""
    count = len(completion.token_ids)
    tail = len(completion.prompt_ids) % completion.block_length if completion.block_length else 0
    columns: dict[str, Any] = {
        "token_id": completion.token_ids,
        "text": completion.token_texts or [None] * count,
        "block": [
            (tail + index) // completion.block_length if completion.block_length else None for index in range(count)
        ],
        "step": completion.step_map,
        "logprob": completion.logprobs or [None] * count,
        "is_after_end": [index >= completion.completion_length for index in range(count)],
    }
    table = _pandas().DataFrame(columns)
    if completion.logprobs is not None:
        table["confidence"] = [math.exp(value) for value in completion.logprobs]
    return table


def _without_texts(completion: Completion) -> Completion:
    return replace(completion, token_texts=None)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("to_pandas needs pandas: pip install pandas") from error
    return pandas


def _is_notebook() -> bool:
    """Whether a Jupyter kernel runs this; a plain IPython shell shows no frames."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
