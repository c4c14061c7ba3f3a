"""What an observer of the engine sees, and that looking on changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dirl.data.chat import render_prompt
from dirl.model.tiny import tiny
from dirl.rollout.completions import with_texts
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.watch import Frame, Observer, watch
from dirl.show.completions import frames

SAMPLING = SamplingConfig(max_completion_length=24)


class Recorder(Observer):
    """Everything an engine tells."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def started(self, num_prompts: int) -> None:
        self.told.append(("started", num_prompts))

    def stepped(self, frames: Callable[[], list[Frame]]) -> None:
        self.told.append(frames())

    def finished(self, completion: Completion) -> None:
        self.told.append(completion)

    def ended(self) -> None:
        self.told.append("ended")


def test_an_observer_sees_every_step() -> None:
    """The committed tokens of the frames are the step map's, step by step, and looking changes nothing."""
    model, tokenizer = tiny()
    engine, recorder = TorchEngine(model, tokenizer, max_batch_size=2), Recorder()
    prompts = [render_prompt(tokenizer, "1" * length) for length in (2, 3, 5)]
    unwatched = engine.generate(prompts, SAMPLING, [0, 1, 2])
    watch(engine, recorder)
    watched = engine.generate(prompts, SAMPLING, [0, 1, 2])
    assert watched == unwatched
    assert recorder.told[0] == ("started", 3) and recorder.told[-1] == "ended"
    assert sorted(c.prompt_ids for c in recorder.told if isinstance(c, Completion)) == sorted(prompts)
    seen = [frame for told in recorder.told if isinstance(told, list) for frame in told]
    for index, completion in enumerate(with_texts(watched, tokenizer, 4)):
        mine = [frame for frame in seen if frame.index == index]
        expected = [committed for _, committed in frames(completion)]
        assert [frame.is_committed for frame in mine] == expected
        for frame in mine:
            for token, done, final in zip(frame.token_ids, frame.is_committed, completion.token_ids, strict=False):
                assert token == final or not done
        assert mine[-1].token_ids == completion.token_ids
    assert any(not all(frame.is_committed) for frame in seen)


def test_ctrl_c_leaves_the_engine_usable() -> None:
    model, tokenizer = tiny()
    engine = TorchEngine(model, tokenizer)
    prompt = [render_prompt(tokenizer, "1+1=")]
    expected = engine.generate(prompt, SAMPLING, [0])

    class Interrupting(Observer):
        def stepped(self, frames: Callable[[], list[Frame]]) -> None:
            raise KeyboardInterrupt

    model.train()
    watch(engine, Interrupting())
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, SAMPLING, [0])
    assert model.training  # as it was
    watch(engine, Observer())
    assert engine.generate(prompt, SAMPLING, [0]) == expected


def test_an_engine_that_cannot_be_watched_is_left_alone() -> None:
    class Deaf:
        pass

    deaf: Any = Deaf()
    watch(deaf, Recorder())
    assert not hasattr(deaf, "observer")
