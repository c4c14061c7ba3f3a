"""`dirl generate` and `dirl chat`: the answer, the stream of drafts, conversations."""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from dirl.cli import main
from dirl.console import talk
from dirl.data.chat import render_messages
from dirl.model.tiny import save_tiny_model, tiny
from dirl.rollout.watch import Frame

SAMPLING = talk.TalkConfig(max_completion_length=12)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny model"
    save_tiny_model(path)
    return str(path)


def test_generate_prints_the_answer(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", model_path, "1+1=", "max_completion_length=12", "temperature=0"]
    assert main(arguments) == 0
    loud = capsys.readouterr()
    assert "denoising steps" in loud.err
    assert main([*arguments, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out == loud.out and quiet.err == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("temprature=0", "did you mean 'temperature'"),
        ("max_completion_length=1", "leaves no room for a block"),
        ("approximate_cache=dual", "attention of a sdar model is block-causal"),
    ],
)
def test_generate_names_what_is_wrong(
    model_path: str, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", model_path, "1+1=", override]) == 2
    assert words in capsys.readouterr().err


def test_no_model_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(tmp_path), "hello"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_terminal_sees_drafts(model_path: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    completion = talk.Talker(model_path, SAMPLING, seed=0, console=console).answer([{"role": "user", "content": "1"}])
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.count("\x1b[2K") >= completion.num_denoising_steps - 1  # shown again with every step
    assert "\x1b[2m" in shown  # drafts are dim


def test_drafts_end_at_a_committed_end() -> None:
    _, tokenizer = tiny()
    end, letters = tokenizer.eos_token_id, tokenizer.encode("abc")
    drafts = talk.Drafts(tokenizer, Console(file=io.StringIO()))
    committed = drafts.text(Frame(0, [letters[0], end, letters[1]], [True, True, True]))
    assert committed.plain == "a"
    drafted = drafts.text(Frame(0, [letters[0], end, letters[1]], [True, False, True]))
    assert drafted.plain == "a░b"


def talk_to(model_path: str, said: list[str]) -> list[list[str]]:
    """A chat with these lines; the conversation each answer was given for."""
    lines = iter(said)

    def ask(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    seen: list[list[str]] = []
    answer = talk.Talker.answer

    def record(self: talk.Talker, messages: list[talk.Message]) -> object:
        seen.append([str(message["role"]) for message in messages])
        assert render_messages(self.tokenizer, messages, add_generation_prompt=True)
        return answer(self, messages)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talk.Talker, "answer", record)
        talk.chat(model_path, SAMPLING, seed=0, ask=ask)
    return seen


def test_a_chat_remembers_and_forgets(model_path: str) -> None:
    assert talk_to(model_path, ["1+1=", "", "and?", "/reset", "2+2=", "/quit", "never read"]) == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]
    assert talk_to(model_path, ["1+1="]) == [["user"]]  # ended by Ctrl-D


def test_ctrl_c_stops_an_answer_only(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talker = talk.Talker(model_path, SAMPLING, seed=0, console=Console(file=io.StringIO(), force_terminal=True))
    messages: list[talk.Message] = [{"role": "user", "content": "1"}]
    with monkeypatch.context() as patch:
        patch.setattr(talk.Drafts, "stepped", Mock(side_effect=KeyboardInterrupt))
        assert talk._turn(talker, messages) == []
    assert [message["role"] for message in talk._turn(talker, messages)] == ["user", "assistant"]
