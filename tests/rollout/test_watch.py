"""An observer sees what an engine does, changes nothing, and may stop it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from dirl.data.chat import render_prompt
from dirl.model.tiny import tiny
from dirl.rollout.build import build_engine
from dirl.rollout.engine import Completion, EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.watch import Frame, Observer

SAMPLING = SamplingConfig(max_completion_length=16, confidence_threshold=0.2)


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


def committed_by_step(completion: Completion) -> list[list[bool]]:
    """After each denoising step, which tokens up to the current block's end are final: from the step map."""
    rows: list[list[bool]] = []
    first = 4 - len(completion.prompt_ids) % 4
    ends = range(first, len(completion.token_ids) + 1, 4)
    for start, end in pairwise([0, *ends]):
        steps = completion.step_map[start:end]
        rows += [[True] * start + [mine <= now for mine in steps] for now in range(1, max(steps) + 1)]
    return rows


def test_an_observer_sees_every_step() -> None:
    model, tokenizer = tiny()
    recorder = Recorder()
    prompts = [render_prompt(tokenizer, "1" * length) for length in (2, 3, 5)]
    config = EngineConfig(engine="torch", max_batch_size=2)
    unwatched = build_engine(model, tokenizer, config).generate(prompts, SAMPLING, [0, 1, 2])
    watched = build_engine(model, tokenizer, config, observer=recorder).generate(prompts, SAMPLING, [0, 1, 2])
    assert watched == unwatched
    assert recorder.told[0] == ("started", 3) and recorder.told[-1] == "ended"
    assert sorted(c.prompt_ids for c in recorder.told if isinstance(c, Completion)) == sorted(prompts)
    seen = [frame for told in recorder.told if isinstance(told, list) for frame in told]
    for index, completion in enumerate(watched):
        mine = [frame for frame in seen if frame.index == index]
        assert [frame.is_committed for frame in mine] == committed_by_step(completion)
        for frame in mine:
            for token, done, final in zip(frame.token_ids, frame.is_committed, completion.token_ids, strict=False):
                assert token == final or not done
        assert mine[-1].token_ids == completion.token_ids
    assert any(not all(frame.is_committed) for frame in seen)


def test_ctrl_c_leaves_the_engine_usable() -> None:
    class Interrupting(Recorder):
        def stepped(self, frames: Callable[[], list[Frame]]) -> None:
            if self.told == [("started", 1)]:
                raise KeyboardInterrupt

    model, tokenizer = tiny()
    prompt, observer = [render_prompt(tokenizer, "1+1=")], Interrupting()
    engine = TorchEngine(model, tokenizer, observer=observer)
    model.train()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompt, SAMPLING, [0])
    assert model.training  # as it was
    assert observer.told == [("started", 1), "ended"]
    assert engine.generate(prompt, SAMPLING, [0]) == TorchEngine(model, tokenizer).generate(prompt, SAMPLING, [0])
