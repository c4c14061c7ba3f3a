"""Completions for people: colours in a notebook, a player, tables; of anything with the fields of `ReadableRow`."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from dirl.show.report.page import player_page
from dirl.show.report.samples import play_data
from dirl.show.terminal import draft_text, live_text

_SHOWN = 20  # completions in the representation of a list; all of them can be played


@runtime_checkable
class ReadableRow(Protocol):
    """A completion as it is shown; R completion tokens, those after the end included."""

    @property
    def prompt_ids(self) -> Sequence[int]: ...
    @property
    def token_ids(self) -> Sequence[int]: ...  # (R,)
    @property
    def token_texts(self) -> Sequence[str]: ...  # (R,) what each token reads
    @property
    def step_map(self) -> Sequence[int]: ...  # (R,) 1-based denoising step within its block
    @property
    def logprobs(self) -> Sequence[float] | None: ...  # (R,) nats, of each token at its step
    @property
    def block_length(self) -> int: ...  # tokens per block
    @property
    def tail(self) -> int: ...  # tokens of the prompt in the first of these blocks
    @property
    def completion_length(self) -> int: ...  # tokens up to and including the end
    @property
    def num_denoising_steps(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...


def list_html(completions: Sequence[ReadableRow]) -> str:
    """The first completions of a list, and how many more there are."""
    rest = f"<p>... and {len(completions) - _SHOWN} more</p>" if len(completions) > _SHOWN else ""
    return "".join(map(completion_html, completions[:_SHOWN])) + rest


def completion_html(completion: ReadableRow) -> str:
    """Tokens coloured from blue (first step of their block) to orange (last); a title says step and confidence.

    Only inline styles, translucent: it stands in light and dark notebooks, trusted or not.
    """
    facts = (
        f"{completion.completion_length} tokens in {completion.num_denoising_steps} steps "
        f"({tokens_per_step(completion):.2f} per step), finish: {completion.finish_reason}"
    )
    style = "font-family:monospace;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9"
    body = "".join(_block_html(completion, members) for members in blocks(completion))
    return f'<div><div style="{style}">{body}</div><div style="opacity:.65;font-size:85%">{facts}</div></div>'


def blocks(completion: ReadableRow) -> Iterator[range]:
    """The completion's token indices, block by block; the first block may begin in the prompt."""
    for start in range(-completion.tail, len(completion.token_ids), completion.block_length):
        yield range(max(start, 0), min(start + completion.block_length, len(completion.token_ids)))


def _block_html(completion: ReadableRow, members: range) -> str:
    last = max(completion.step_map[index] for index in members)
    spans = []
    for index in members:
        step = completion.step_map[index]
        hue = 210 - 180 * (step - 1) / max(last - 1, 1)
        faded = "" if index < completion.completion_length else ";opacity:.5"
        spans.append(
            f'<span title="{html.escape(_title(completion, index))}" style="background:hsla({hue:.0f},80%,50%,.28)'
            f'{faded}">{html.escape(completion.token_texts[index]) or "·"}</span>'
        )
    return f'<span style="border:1px solid rgba(128,128,128,.45);border-radius:3px">{"".join(spans)}</span>'


def _title(completion: ReadableRow, index: int) -> str:
    said = f"step {completion.step_map[index]} of its block"
    if completion.logprobs is not None:
        said += f", confidence {math.exp(completion.logprobs[index]):.3f}"
    return said


def play(completions: Sequence[ReadableRow]) -> None:
    """A frame with a slider in a notebook; step by step in a terminal."""
    if not _is_notebook():
        _play_in_terminal(completions)
        return
    from IPython.display import HTML, display  # type: ignore[import-not-found]

    page = html.escape(player_page(list(_samples(completions))), quote=True)
    style = "width:100%;height:340px;border:0;resize:vertical"
    display(HTML(f'<div><iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe></div>'))


def _samples(completions: Sequence[ReadableRow]) -> Iterator[dict[str, Any]]:
    for number, completion in enumerate(completions, start=1):
        sample = play_data(vars(completion), label=f"completion {number}", decode=None, block_length=0)
        if sample is not None:
            yield sample


def _play_in_terminal(completions: Sequence[ReadableRow], seconds: float = 0.15) -> None:
    for completion in completions:
        with live_text() as show:
            for texts, is_committed in frames(completion):
                show(draft_text(texts, is_committed))
                time.sleep(seconds)


def frames(completion: ReadableRow) -> Iterator[tuple[list[str], list[bool]]]:
    """What stands after each denoising step: texts of the tokens so far, and whether each is committed."""
    texts = completion.token_texts
    for members in blocks(completion):
        steps = [completion.step_map[index] for index in members]
        for step in range(1, max(steps) + 1):
            is_committed = [True] * members.start + [revealed <= step for revealed in steps]
            shown = [text if done else "░" for text, done in zip(texts[: members.stop], is_committed, strict=True)]
            yield shown, is_committed


def tokens_table(completion: ReadableRow) -> Any:
    """A pandas table with one row per token."""
    indices = range(len(completion.token_ids))
    columns: dict[str, Any] = {
        "token_id": completion.token_ids,
        "text": completion.token_texts,
        "block": [(completion.tail + index) // completion.block_length for index in indices],
        "step": completion.step_map,
        "logprob": completion.logprobs or [None] * len(indices),
        "is_after_end": [index >= completion.completion_length for index in indices],
    }
    if completion.logprobs is not None:
        columns["confidence"] = [math.exp(value) for value in completion.logprobs]
    return _pandas().DataFrame(columns)


def completions_table(completions: Sequence[ReadableRow]) -> Any:
    """A pandas table with one row per completion, without the texts of its tokens."""
    table = _pandas().DataFrame(
        [{**vars(completion), "tokens_per_step": tokens_per_step(completion)} for completion in completions]
    )
    return table.drop(columns="token_texts", errors="ignore")


def tokens_per_step(completion: ReadableRow) -> float:
    """Tokens up to and including the end per denoising step."""
    return completion.completion_length / completion.num_denoising_steps


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
