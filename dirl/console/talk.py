"""`dirl generate` and `dirl chat`: a model's answers, with the denoising shown as it goes.

In a terminal drafts are dim and committed tokens plain; elsewhere only the finished text is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dirl.data.chat import render_messages, stop_token_ids, token_texts
from dirl.model.checkpoint import ModelConfig, default_device, load_model
from dirl.model.model_path import tokenizer_of
from dirl.rollout.build import build_engine
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, SamplingConfig
from dirl.rollout.watch import Frame, Observer
from dirl.show.terminal import draft_text, live_text

Message = dict[str, object]
_HELP = "/reset forgets the conversation, /quit ends; so does Ctrl-D. Ctrl-C stops an answer."


@dataclass(frozen=True, kw_only=True)
class TalkConfig(SamplingConfig):
    """How an answer is decoded."""

    approximate_cache: ApproximateCache = "none"  # as of EngineConfig


class Drafts(Observer):
    """Shows every denoising step of one completion at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        self._tokenizer, self._console = tokenizer, console
        self._stops = set(stop_token_ids(tokenizer))
        self._shown = ExitStack()

    def started(self, num_prompts: int) -> None:
        self._show = self._shown.enter_context(live_text(self._console))

    def stepped(self, frames: Callable[[], list[Frame]]) -> None:
        self._show(self.text(frames()[0]))

    def ended(self) -> None:
        self._shown.close()

    def text(self, frame: Frame) -> Text:
        """Everything before the first committed end."""
        ids, is_committed = frame.token_ids, frame.is_committed
        ends = [i for i, token in enumerate(ids) if token in self._stops and is_committed[i]]
        end = ends[0] if ends else len(ids)
        texts = token_texts(self._tokenizer, [ids[:end]])[0]
        shown = ["" if token in self._stops else text for token, text in zip(ids[:end], texts, strict=True)]
        return draft_text(shown, is_committed[:end])


class Talker:
    """A loaded model that answers conversations."""

    def __init__(self, model_path: str, sampling: TalkConfig, *, seed: int, console: Console) -> None:
        disable_progress_bar()  # of loading: people wait for an answer
        self.tokenizer = tokenizer_of(model_path)
        model = load_model(ModelConfig(path=model_path), self.tokenizer).eval()
        model.to(default_device())  # type: ignore[arg-type]
        drafts = Drafts(self.tokenizer, console) if console.is_terminal else None
        self.engine = build_engine(
            model,
            self.tokenizer,
            EngineConfig(engine="torch", compile="never", approximate_cache=sampling.approximate_cache),
            observer=drafts,
        )
        self.sampling, self.seed, self.console = sampling, seed, console

    def answer(self, messages: Sequence[Message]) -> Completion:
        """The next message, shown while it comes."""
        ids = render_messages(self.tokenizer, messages, add_generation_prompt=True)
        (completion,) = self.engine.generate([ids], self.sampling, [self.seed])
        self.seed += 1
        if not self.console.is_terminal:
            self.console.print(completion.text, markup=False, highlight=False, soft_wrap=True)
        return completion


def facts(completion: Completion) -> str:
    """One line about a completion."""
    return (
        f"{completion.completion_length} tokens in {completion.num_denoising_steps} denoising steps "
        f"({completion.tokens_per_step:.2f} per step), finish: {completion.finish_reason}"
    )


def generate(model_path: str, prompt: str, sampling: TalkConfig, *, seed: int, quiet: bool) -> None:
    """Answer one question on standard output; facts go to standard error."""
    completion = Talker(model_path, sampling, seed=seed, console=Console()).answer([_says("user", prompt)])
    if not quiet:
        Console(stderr=True).print(facts(completion), style="dim", highlight=False)


def chat(
    model_path: str, sampling: TalkConfig, *, seed: int, system_prompt: str = "", ask: Callable[[str], str] = input
) -> None:
    """A conversation, until /quit or the end of the input."""
    console = Console()
    talker = Talker(model_path, sampling, seed=seed, console=console)
    opening = [_says("system", system_prompt)] if system_prompt else []
    messages = list(opening)
    console.print(_HELP, style="dim", highlight=False)
    while True:
        try:
            said = ask("> ").strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(opening)
        elif said:
            messages = _turn(talker, [*messages, _says("user", said)])


def _turn(talker: Talker, messages: list[Message]) -> list[Message]:
    """The conversation with its answer; without the question where the answer was stopped."""
    try:
        completion = talker.answer(messages)
    except KeyboardInterrupt:
        talker.console.print("stopped", style="dim")
        return messages[:-1]
    talker.console.print(facts(completion), style="dim", highlight=False)
    return [*messages, _says("assistant", completion.text)]


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}
