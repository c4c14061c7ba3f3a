"""A discrete-event model of RL steps: completion lengths and rates -> seconds a step, and who waits for whom.

An engine passes all its completions in flight at once: a pass takes the same time up to `knee` of them, and time in
proportion beyond; a completion takes its length / tokens_per_step passes, and its place is then the next one's. A round
ends with its last completion, or, where rollouts are partial, when enough groups are whole; what is unfinished goes on
in the next round. Rounds, weights and pushes go as in dirl/rl/collector.py and dirl/rl/ahead.py: up to `max_staleness`
rounds of prompts are decoded while the trainer trains, and weights are pushed between two of them.

Not modelled: reading prompts, re-reading what a partial rollout has, evaluations, failures.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from dirl.training.balance import balanced_owners


@dataclass(frozen=True)
class Rates:
    """What one GPU (or process) does."""

    pass_seconds: float  # of a forward pass of at most `knee` sequences
    train_tokens_per_s: float  # packed tokens
    knee: float = math.inf  # sequences in flight, beyond which a pass takes time in proportion
    slots: int = 256  # sequences in flight at most
    train_seconds: float = 0.0  # of a step, however few its tokens
    push_seconds: float = 0.0  # of the weights, to all engines

    def seconds_of_pass(self, in_flight: int) -> float:
        return self.pass_seconds * max(1.0, in_flight / self.knee)

    def slowed(self, factor: float) -> Rates:
        """All of it, so many times slower."""
        return replace(
            self,
            pass_seconds=self.pass_seconds * factor,
            train_tokens_per_s=self.train_tokens_per_s / factor,
            train_seconds=self.train_seconds * factor,
            push_seconds=self.push_seconds * factor,
        )


@dataclass(frozen=True)
class StepWork:
    """What differs from step to step as a policy learns."""

    useful_share: float = 1.0  # of groups that are trained on: their rewards differ
    tokens_per_step: float = 1.0  # completion tokens a denoising step
    packing: float = 1.0  # packed tokens trained on a completion token


@dataclass(frozen=True)
class Workload:
    """A run's prompts and completions."""

    draw_lengths: Callable[[np.random.Generator], Sequence[int]]  # of a new group, in tokens
    prompts_per_step: int
    steps: Sequence[StepWork]  # the last one goes on
    max_sampling_rounds: int = 1

    def of_step(self, number: int) -> StepWork:
        return self.steps[min(number, len(self.steps) - 1)]


@dataclass(frozen=True)
class Arm:
    """A way to share GPUs between the phases."""

    name: str
    rollout_gpus: int
    train_gpus: int
    is_colocated: bool = False  # the same GPUs, in turn
    max_staleness: int = 0  # rounds that are decoded while the trainer trains
    oversampling: float = 1.0  # groups in flight a group that is wanted
    is_partial: bool = False  # a round ends when it has the groups that are wanted
    splits_groups: bool = False  # ranks share completions one by one; dirl's ranks share whole groups


@dataclass
class Group:
    """The completions of one prompt."""

    lengths: Sequence[int]  # tokens
    passes: list[int]  # that each still takes
    begun_at: int  # step


@dataclass(frozen=True)
class Round:
    """What engines made of some groups."""

    submitted_at: float
    groups: list[Group]  # that are whole
    seconds: float
    busy_seconds: float  # in which an engine had something in flight, a mean over engines


@dataclass(frozen=True)
class Step:
    """One optimizer step, in seconds of the trainer's clock."""

    seconds: float
    train_seconds: float  # with the push
    engine_seconds: float  # of the rounds that it took
    busy_seconds: float  # of these, as in Round
    tokens: int  # of the completions trained on
    age: int  # steps since the oldest of its groups was begun


def decode(passes: Sequence[int], rates: Rates, until: float = math.inf) -> tuple[list[float], list[int]]:
    """One engine's completions, the first ones first: when each is finished, and passes it lacks at the end.

    Args:
        until: seconds; the pass that would end later is not made.
    """
    finished_at, left = [math.inf if count else 0.0 for count in passes], list(passes)
    todo = deque(index for index, count in enumerate(passes) if count)
    in_flight: list[tuple[int, int]] = []  # (number of its last pass, completion), a heap
    clock, number = 0.0, 0
    while todo or in_flight:
        while todo and len(in_flight) < rates.slots:
            heapq.heappush(in_flight, (number + passes[todo[0]], todo.popleft()))
        seconds, last = rates.seconds_of_pass(len(in_flight)), in_flight[0][0]
        if clock + (last - number) * seconds > until * (1 + 1e-9):
            number += int((until - clock) / seconds)
            break
        clock, number = clock + (last - number) * seconds, last
        while in_flight and in_flight[0][0] == number:
            index = heapq.heappop(in_flight)[1]
            finished_at[index], left[index] = clock, 0
    for last, index in in_flight:
        left[index] = last - number
    return finished_at, left


def roll_out(
    groups: Sequence[Group], wanted: int, rates: Rates, num_engines: int, *, splits: bool
) -> tuple[float, float]:
    """Decode until so many groups are whole; they then lack no passes. Seconds, and busy seconds of the mean engine.

    Args:
        splits: engines share completions one by one rather than whole groups.
    """
    places = [(group, n) for group in groups for n in range(len(group.passes))]
    if splits:
        shares = [places[engine::num_engines] for engine in range(num_engines)]
    else:
        owner = {id(group): number * num_engines // len(groups) for number, group in enumerate(groups)}
        shares = [[] for _ in range(num_engines)]
        for place in places:
            shares[owner[id(place[0])]].append(place)
    work = [[group.passes[n] for group, n in share] for share in shares]
    whole_at = dict.fromkeys(map(id, groups), 0.0)
    busy_until = []
    for share, passes in zip(shares, work, strict=True):
        finished_at, _ = decode(passes, rates)
        busy_until.append(max(finished_at, default=0.0))
        for (group, _), seconds in zip(share, finished_at, strict=True):
            whole_at[id(group)] = max(whole_at[id(group)], seconds)
    end = sorted(whole_at.values())[min(wanted, len(groups)) - 1]
    for share, passes in zip(shares, work, strict=True):
        left = decode(passes, rates, until=end)[1] if wanted < len(groups) else [0] * len(passes)
        for (group, n), count in zip(share, left, strict=True):
            group.passes[n] = count
    return end, fmean(min(seconds, end) for seconds in busy_until)


class Simulation:
    """The trainer's loop, step after step."""

    def __init__(self, workload: Workload, rates: Rates, arm: Arm, seed: int = 0) -> None:
        self.workload, self.rates, self.arm = workload, rates, arm
        self.random = np.random.default_rng(seed)
        self.clock = self.engine_free_at = 0.0
        self.ahead: deque[Round] = deque()  # not started
        self.ended: deque[tuple[float, Round]] = deque()  # started, with their ends
        self.waiting: list[Group] = []  # useful, for the next step
        self.unfinished: list[Group] = []

    def step(self, number: int) -> Step:
        begin = self.clock
        groups, rounds = self._collect(number)
        while len(self.ahead) + len(self.ended) < self.arm.max_staleness:
            self._submit(number, self.workload.prompts_per_step)
        train = self._train_seconds(groups, self.workload.of_step(number).packing)
        self.clock += train
        while self.ahead and self._start_of_next < self.clock:
            self._start()
        self.clock = self.engine_free_at = max(self.clock, self.engine_free_at) + self.rates.push_seconds
        return Step(
            seconds=self.clock - begin,
            train_seconds=train + self.rates.push_seconds,
            engine_seconds=sum(one.seconds for one in rounds),
            busy_seconds=sum(one.busy_seconds for one in rounds),
            tokens=sum(sum(group.lengths) for group in groups),
            age=max((number - group.begun_at for group in groups), default=0),
        )

    def _collect(self, number: int) -> tuple[list[Group], list[Round]]:
        """The groups of a step and the rounds that they took."""
        wanted = self.workload.prompts_per_step
        rounds: list[Round] = []
        share = self.workload.of_step(number).useful_share
        while len(self.waiting) < wanted and len(rounds) < self.workload.max_sampling_rounds:
            if not self.ahead and not self.ended:
                self._submit(number, wanted - len(self.waiting))
            if not self.ended:
                self._start()
            end, done = self.ended.popleft()
            self.clock = max(self.clock, end)
            self.waiting += [group for group in done.groups if self.random.random() < share]
            rounds.append(done)
        groups, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        return groups, rounds

    def _submit(self, number: int, wanted: int) -> None:
        """A round for so many groups; it starts when the engines are free."""
        arm, speed = self.arm, self.workload.of_step(number).tokens_per_step
        groups = self.unfinished
        for _ in range(math.ceil(wanted * arm.oversampling) - len(groups)):
            lengths = self.workload.draw_lengths(self.random)
            groups.append(Group(lengths, [math.ceil(length / speed) for length in lengths], number))
        splits = arm.splits_groups or not arm.is_colocated  # a client shares completions over its servers
        seconds, busy = roll_out(
            groups, wanted if arm.is_partial else len(groups), self.rates, arm.rollout_gpus, splits=splits
        )
        whole = [group for group in groups if not any(group.passes)]
        self.unfinished = [group for group in groups if any(group.passes)]
        self.ahead.append(Round(self.clock, whole, seconds, busy))

    @property
    def _start_of_next(self) -> float:
        return max(self.engine_free_at, self.ahead[0].submitted_at)

    def _start(self) -> None:
        begin, started = self._start_of_next, self.ahead.popleft()
        self.engine_free_at = begin + started.seconds
        self.ended.append((self.engine_free_at, started))

    def _train_seconds(self, groups: Sequence[Group], packing: float) -> float:
        """Of the rank that has most to do."""
        costs, num_ranks = [float(sum(group.lengths)) for group in groups], self.arm.train_gpus
        if self.arm.splits_groups:
            heaviest = sum(costs) / num_ranks
        else:
            owners = balanced_owners(costs, [n % num_ranks for n in range(len(costs))], num_ranks)
            loads = [0.0] * num_ranks
            for cost, owner in zip(costs, owners, strict=True):
                loads[owner] += cost
            heaviest = max(loads)
        return self.rates.train_seconds + packing * heaviest / self.rates.train_tokens_per_s


def simulate(workload: Workload, rates: Rates, arm: Arm, num_steps: int, seed: int = 0) -> list[Step]:
    simulation = Simulation(workload, rates, arm, seed)
    return [simulation.step(number) for number in range(num_steps)]


@dataclass(frozen=True)
class Summary:
    """Means over steps."""

    seconds: float
    trainer_waits: float  # share of the step
    engine_waits: float  # share of the engines' time in which nothing was in flight
    tokens_per_s: float  # completion tokens trained on
    age: int  # the largest


def summary_of(steps: Sequence[Step]) -> Summary:
    total = sum(step.seconds for step in steps)
    return Summary(
        seconds=fmean(step.seconds for step in steps),
        trainer_waits=max(1 - sum(step.train_seconds for step in steps) / total, 0.0),
        engine_waits=max(1 - sum(step.busy_seconds for step in steps) / total, 0.0),
        tokens_per_s=sum(step.tokens for step in steps) / total,
        age=max(step.age for step in steps),
    )
