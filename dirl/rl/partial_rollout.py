"""Prompts in flight -> the groups that are complete, and the others as far as they are: a step waits for no last one.

Once a step's batch is full, every other completion ends with the block that is being decoded, and goes on behind it in
a later step under the weights of then: nothing that was sampled is thrown away. Each token knows which weights sampled
it, and what the engine recorded of it is what these gave it. Groups that began too long ago are waited for instead.

Source: partial rollouts of Kimi k1.5 (arXiv 2501.12599); APRIL (arXiv 2509.18521).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dirl.rl.rollout_group import Prompt, RolloutGroup, completion_from_row, completion_row
from dirl.rl.rollouts import Rollouts, TakenPrompt
from dirl.rollout.decoded import touched_tokens
from dirl.rollout.engine import Completion, OpenEngine, Request
from dirl.training.seeds import stable_seed


@dataclass(frozen=True)
class InFlight:
    """A prompt whose group is not complete."""

    taken: TakenPrompt
    completions: Mapping[int, Completion] = field(default_factory=dict)  # whole blocks of those begun, by place in it

    @property
    def sampled_at(self) -> float:
        """Optimizer steps that the oldest of its weights had taken; infinite where nothing is sampled yet."""
        return min((completion.sampled_at[0] for completion in self.completions.values()), default=math.inf)

    @property
    def num_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions.values())

    def to_row(self, prompt_index: int) -> dict[str, Any]:
        """Plain values for a checkpoint, the prompt as its number."""
        completions = [[place, completion_row(completion)] for place, completion in self.completions.items()]
        numbers = {"prompt": prompt_index, "number": self.taken.number, "seed": self.taken.seed}
        return {**numbers, "completions": completions}

    @classmethod
    def from_row(cls, row: dict[str, Any], prompts: Sequence[Prompt]) -> InFlight:
        taken = TakenPrompt(prompts[row["prompt"]], row["number"], row["seed"])
        return cls(taken, {place: completion_from_row(completion) for place, completion in row["completions"]})


class PartialRollout:
    """Some rounds' worth of decoding, until enough groups teach something or all are complete.

    Args:
        in_flight: the prompts to go on with.
        step: optimizer steps that the engine's weights have taken.
        num_wanted: groups that teach something; those that end beside the last of them are had too.
        waits_for: groups whose oldest weights had taken so many optimizer steps, or fewer, end in any case.
    """

    def __init__(
        self, rollouts: Rollouts, in_flight: Sequence[InFlight], step: int, num_wanted: int, waits_for: int
    ) -> None:
        self.rollouts, self.step, self._num_missing = rollouts, step, num_wanted
        self.groups: list[RolloutGroup] = []  # complete ones, in the order in which they were
        self.counters: Counter[str] = Counter()  # of the graders
        self.num_continued = 0  # completions that went on behind what was decoded of them before
        self._taken = [one.taken for one in in_flight]
        self._completions = [dict(one.completions) for one in in_flight]
        must_end = [one.sampled_at <= waits_for for one in in_flight]
        self.num_waited_for = sum(must_end)
        self._queue = deque(request for index, ends in enumerate(must_end) for request in self._requests(index, ends))
        self._unfinished = {request.index: request.end for request in self._queue}

    def run(self) -> list[InFlight]:
        """Decode and score; the prompts whose groups are not complete then."""
        engine, timings = self.rollouts.engine, self.rollouts.timings
        assert isinstance(engine, OpenEngine)
        self._admit_none_if_full()
        ended = engine.decode(self._queue, self.rollouts.config)
        while True:
            with timings.phase("rollout"):
                found = next(ended, None)
            if found is None:
                break
            self._take(*found)
            self._admit_none_if_full()
        size = self.rollouts.config.num_generations
        unfinished = sorted({request // size for request in self._unfinished})
        return [InFlight(self._taken[index], self._completions[index]) for index in unfinished]

    def _is_full(self) -> bool:
        return self._num_missing <= 0

    def _admit_none_if_full(self) -> None:
        if self._is_full():
            must_end = [request for request in self._queue if request.is_enough is None]
            self._queue.clear()
            self._queue.extend(must_end)

    def _take(self, number: int, completion: Completion) -> None:
        """A completion that is whole, or ends here for now; its group, where that is the last of it."""
        size = self.rollouts.config.num_generations
        index, place = divmod(number, size)
        before = self._completions[index].get(place)
        old = before.sampled_at if before else []
        self.num_continued += before is not None
        sampled_at = [*old, *[self.step] * (len(completion.token_ids) - len(old))]
        self._completions[index][place] = replace(completion, sampled_at=sampled_at)
        if _is_whole(completion, self._unfinished[number]):
            del self._unfinished[number]
        if any(index * size + other in self._unfinished for other in range(size)):
            return
        completions = [self._completions[index][other] for other in range(size)]
        oldest = min(completion.sampled_at[0] for completion in completions)
        groups, counters = self.rollouts.scored([self._taken[index]], completions, oldest, [None])
        self.groups += groups
        self.counters.update(counters)
        self._num_missing -= sum(self.rollouts.config.reason_to_drop(group) is None for group in groups)

    def _requests(self, index: int, must_end: bool) -> list[Request]:
        """What is to be decoded of a prompt."""
        taken, size = self._taken[index], self.rollouts.config.num_generations
        prompt_ids, seeds = taken.prompt.token_ids, [stable_seed(taken.seed, place) for place in range(size)]
        end = len(prompt_ids) + touched_tokens([prompt_ids], seeds[:1], self.rollouts.config, self.rollouts.scheme)[0]
        requests = []
        for place, seed in enumerate(seeds):
            before = self._completions[index].get(place)
            if before is None or not _is_whole(before, end):
                is_enough = None if must_end else self._is_full
                number = index * size + place
                requests.append(Request(number, prompt_ids, seed, end, is_enough=is_enough, prefix=before))
        return requests


def _is_whole(completion: Completion, end: int) -> bool:
    """Whether nothing may follow: it has stopped, or reached the last position that it may touch."""
    has_room = len(completion.prompt_ids) + len(completion.token_ids) < end
    return completion.finish_reason == "stop" or not has_room
