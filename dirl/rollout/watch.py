"""Looking on while an engine decodes: an observer it tells what happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dirl.rollout.engine import Completion
from dirl.show.terminal import Terminal
from dirl.training.metrics import Timings


@dataclass(frozen=True)
class Frame:
    """One completion after one denoising step."""

    index: int  # place of its prompt in the caller's list
    token_ids: list[int]  # finished blocks and the current one: revealed tokens, and the drafts of masked positions
    is_committed: list[bool]  # False: a draft, sampled in this step and not revealed


class Observer:
    """What an engine calls; these do nothing."""

    def started(self, num_prompts: int) -> None:
        """A call of `generate` begins."""

    def stepped(self, frames: Callable[[], list[Frame]]) -> None:
        """A denoising step of all sequences in flight is done; who wants to see them calls `frames`."""

    def finished(self, completion: Completion) -> None:
        """A completion is done; they come in any order."""

    def ended(self) -> None:
        """The call of `generate` is over, or was interrupted."""


class RolloutProgress(Observer):
    """Completions done and tokens per second, in the terminal of a run."""

    def __init__(self, terminal: Terminal, timings: Timings) -> None:
        self.terminal, self.timings = terminal, timings

    def started(self, num_prompts: int) -> None:
        self.terminal.begin("evaluation" if self.timings.is_in("eval") else "rollout", num_prompts)

    def finished(self, completion: Completion) -> None:
        self.terminal.advance(completion.completion_length)

    def ended(self) -> None:
        self.terminal.end()


class EvaluationProgress(Observer):
    """A bar over the completions of each chunk of an evaluation."""

    def __init__(self) -> None:
        self.terminal = Terminal(is_main=True)

    def started(self, num_prompts: int) -> None:
        self.terminal.open()
        self.terminal.begin("evaluation", num_prompts)

    def finished(self, completion: Completion) -> None:
        self.terminal.advance(completion.completion_length)

    def ended(self) -> None:
        self.terminal.stop()
