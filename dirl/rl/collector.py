"""Prompts in an endless stream -> the groups of each step that carry a signal.

All that a collector has is one list, `waiting`: groups that were rolled out and not trained on yet. Collecting adds to
it until enough of them teach something; those too many begin the next step; a stop in between, a checkpoint and a
resume are that list and the stream's place.

Groups that teach nothing are dropped, counted, and replaced by groups of further prompts, a limited number of times.

With `max_staleness` rounds are rolled out ahead, while the trainer trains, each of as many prompts as would have filled
the last step: collecting takes the earliest of them, and groups whose weights are too old are dropped and counted.

With `partial` a second list, `in_flight`, has the prompts whose groups are not complete: each round goes on with them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dirl.data.mixture import prompt_stream
from dirl.data.prompt_stream import fingerprint
from dirl.data.rows import shorten
from dirl.errors import UserError
from dirl.rl.ahead import RolloutsAhead
from dirl.rl.partial_rollout import InFlight, PartialRollout
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rl.rollouts import DropReason, RolloutConfig, Rollouts, TakenPrompt
from dirl.training.balance import balanced_owners
from dirl.training.distributed import Distributed
from dirl.training.interruption import StopAsked
from dirl.training.loop import NothingToLearn
from dirl.training.seeds import stable_seed

_PROBE_TOKENS = 64


class NoSignal(NothingToLearn):
    """No group of a step taught anything."""


@dataclass(frozen=True)
class Collected:
    """What one step's rollouts gave on this rank."""

    groups: list[RolloutGroup]  # to train on
    dropped: list[RolloutGroup]  # not trained on
    drop_reasons: list[DropReason]  # of each of these
    counters: dict[str, int]  # of the graders: timeouts, crashes, ...
    # of rounds that were rolled out ahead: seconds, and groups that were too old; of partial ones: what was in flight
    metrics: dict[str, float]
    num_carried: int  # informative groups that were too many, over all ranks: the next step begins with them

    @property
    def everyone(self) -> list[RolloutGroup]:
        """All groups, those that are trained on first."""
        return [*self.groups, *self.dropped]


class Collector:
    """Takes prompts from the stream, has them rolled out and keeps the groups worth training on.

    Args:
        should_stop: asked before each round; the same on every rank.
        ahead: rolls rounds out while the trainer trains; None: nobody does.
        remember: groups that must wait for the next step -> the same, with what the weights that sampled them give
            their actions; called while these weights are still there, on every rank.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rollouts: Rollouts,
        distributed: Distributed,
        seed: int,
        *,
        ahead: RolloutsAhead | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        remember: Callable[[Sequence[RolloutGroup]], list[RolloutGroup]] = list,
    ) -> None:
        self.prompts, self.rollouts, self.distributed, self.seed = prompts, rollouts, distributed, seed
        self.config = rollouts.config
        data = fingerprint((p.token_ids, p.problem.answer, p.problem.columns) for p in prompts)
        self.stream = prompt_stream([(p.problem.origin.source, p.problem.origin.weight) for p in prompts], seed, data)
        self.waiting: list[RolloutGroup] = []  # rolled out on this rank and not trained on yet
        self.in_flight: list[InFlight] = []  # of this rank, the earliest first
        self.ahead = ahead
        self._unasked: deque[Sequence[TakenPrompt]] = deque()  # rounds that a stop or a stage has interrupted
        self._sums: Counter[str] = Counter()  # metrics of the step that is being collected
        self._num_taken = 0
        self._num_rounds = 0  # of the step that is being collected
        self._useful_share = 1.0  # of the groups of the last step, over all ranks: those that taught something
        self._counters: Counter[str] = Counter()
        self._should_stop, self._remember = should_stop, remember

    def begin_stage(self, rollouts: Rollouts, from_step: int) -> None:
        """Roll out like this from now on; groups that wait and were sampled in an earlier stage are given up.

        With `partial` their prompts, and those in flight, begin anew.

        Args:
            from_step: finished optimizer steps at which the stage begins.
        """
        self.rollouts, self.config = rollouts, rollouts.config
        old = [group for group in self.waiting if group.sampled_at < from_step]
        self.waiting = [group for group in self.waiting if group.sampled_at >= from_step]
        if self.config.partial:
            taken = [TakenPrompt(group.prompt, group.number, group.seed) for group in old]
            taken += [one.taken for one in self.in_flight if one.sampled_at < from_step]
            going_on = [one for one in self.in_flight if one.sampled_at >= from_step]
            self.in_flight = sorted([*going_on, *map(InFlight, taken)], key=lambda one: one.taken.number)

    def interrupt(self) -> None:
        """Nothing is rolled out ahead any more; the prompts of these rounds come first in the next ones."""
        if self.ahead is not None:
            self._unasked.extend(self.ahead.withdraw())

    def probe(self, step: int) -> RolloutGroup:
        """A short group of the weights that were just pushed, on which engine and trainer can be compared at once."""
        length = min(self.config.max_completion_length, max(_PROBE_TOKENS, 2 * self.rollouts.scheme.block_length))
        prompt, count = self.prompts[step % len(self.prompts)], 2
        seeds = [stable_seed(self.seed, -1, step, n) for n in range(count)]
        sampling = replace(self.config, max_completion_length=length)
        completions = self.rollouts.engine.generate([prompt.token_ids] * count, sampling, seeds)
        return RolloutGroup(
            prompt=prompt, completions=completions, rewards=[0.0] * count, reward_parts={}, sampled_at=step
        )

    def look_ahead(self) -> None:
        """Have the rounds of the next steps rolled out, as many as `max_staleness` says."""
        # The trainer would wait for what a small round lacks; what a large one has too many grows old.
        most = self.config.prompts_per_step * self.config.max_sampling_rounds
        num_prompts = min(math.ceil(self.config.prompts_per_step / self._useful_share), most)
        while self.ahead is not None and len(self.ahead) < self.config.max_staleness:
            self.ahead.submit(self.rollouts, self._take_round(0, num_prompts))

    @property
    def is_amid(self) -> bool:
        """Whether a step is half collected."""
        return self._num_rounds > 0

    def collect(self, step: int, oldest: int = 0) -> Collected:
        """This rank's groups of one step's batch; they leave the list. Those too many stay in it.

        Args:
            oldest: groups of weights that had taken fewer optimizer steps are dropped, with rounds ahead; groups in
                flight of weights that had taken as few are waited for.
        Raises:
            StopAsked: it was; the next call goes on from there.
            NoSignal: no group on any rank taught anything after the last round.
        """
        while True:
            self._drop_older(oldest)
            counts = self.distributed.sum(sum(map(self._is_useful, self.waiting)), len(self.waiting))
            num_useful, num_groups = map(int, counts)
            if self._should_stop():
                raise StopAsked
            missing = self.config.prompts_per_step - num_useful
            if missing <= 0 or self._num_rounds >= self.config.max_sampling_rounds:
                break
            self._roll_out_round(step, missing, oldest)
        useful = [group for group in self.waiting if self._is_useful(group)]
        dropped = [group for group in self.waiting if not self._is_useful(group)]
        if num_useful == 0:
            self._step_ends([])
            raise NoSignal(
                f"step {step}: the rewards of every group were equal{_further_reasons(self.config)} in "
                f"{self.config.max_sampling_rounds} rounds of {self.config.prompts_per_step} prompts; the problems are "
                f"all too easy or too hard, or the reward is broken{_example(dropped)}"
            )
        groups, waiting, num_carried = self._shared_out(useful)
        reasons = [reason for group in dropped if (reason := self.config.reason_to_drop(group))]
        collected = Collected(groups, dropped, reasons, dict(self._counters), self._metrics(), num_carried)
        self._useful_share = num_useful / num_groups
        self._step_ends(self._remember(waiting) if num_carried else waiting)
        return collected

    def state_dict(self) -> dict[str, Any]:
        """The list of every rank, and the place in the stream; collective."""
        index = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        in_flight = [one.to_row(index[id(one.taken.prompt)]) for one in self.in_flight]
        sums = {"counters": dict(self._counters), "sums": dict(self._sums)}
        thresholds = self.rollouts.thresholds
        waiting = [group.to_row(index[id(group.prompt)]) for group in self.waiting]
        rounds = [*(self.ahead.taken if self.ahead is not None else ()), *self._unasked]
        unasked = [[(index[id(one.prompt)], one.number, one.seed) for one in taken] for taken in rounds]
        return {
            "stream": self.stream.state_dict(),
            "num_taken": self._num_taken,
            "num_rounds": self._num_rounds,
            "useful_share": self._useful_share,
            "threshold_policy": thresholds.state_dict() if thresholds else None,
            "ranks": self.distributed.gather(
                [{"waiting": waiting, "in_flight": in_flight, "unasked": unasked, **sums}]
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; with another number of processes than saved it, the groups are shared out anew."""
        self.stream.load_state_dict(state["stream"])
        self._num_taken, self._num_rounds = state["num_taken"], state["num_rounds"]
        self._useful_share = state.get("useful_share", 1.0)
        if len(state["ranks"]) == self.distributed.world_size:
            mine = state["ranks"][self.distributed.rank]
            rows, in_flight, unasked = mine["waiting"], mine.get("in_flight", []), mine.get("unasked", [])
            sums = [mine]
        else:
            rows = self.distributed.share([row for rank in state["ranks"] for row in rank["waiting"]])
            sums = state["ranks"] if self.distributed.is_main else []
            everyones = zip(*(rank.get("unasked", []) for rank in state["ranks"]), strict=True)
            unasked = [self.distributed.share([one for mine in rounds for one in mine]) for rounds in everyones]
            in_flight = [row for rank in state["ranks"] for row in rank.get("in_flight", [])]
            in_flight = self.distributed.share(sorted(in_flight, key=lambda row: row["number"]))
        self._counters = sum((Counter(rank["counters"]) for rank in sums), Counter())
        self._sums = sum((Counter(rank.get("sums", {})) for rank in sums), Counter())
        self.waiting = [RolloutGroup.from_row(row, self.prompts) for row in rows]
        self._unasked = deque([TakenPrompt(self.prompts[i], *rest) for i, *rest in taken] for taken in unasked)
        self.in_flight = [InFlight.from_row(row, self.prompts) for row in in_flight]
        self._keep_to_mode()
        self._load_thresholds(state.get("threshold_policy"))

    def _keep_to_mode(self) -> None:
        """A checkpoint of a run that rolled out in another way: its prompts in flight begin anew."""
        if self.config.partial:
            self.in_flight += [InFlight(one) for taken in self._unasked for one in taken]
            self._unasked.clear()
        elif self.distributed.sum(len(self.in_flight))[0]:
            self._unasked.append([one.taken for one in self.in_flight])
            self.in_flight = []

    def _load_thresholds(self, state: dict[str, Any] | None) -> None:
        policy = self.rollouts.thresholds
        theirs, ours = state["thresholds"] if state else [], policy.thresholds if policy else []
        if theirs != ours:  # what groups that wait have chosen is numbers of these
            raise UserError(
                f"rollout.threshold_policy={ours}: the checkpoint was written with {theirs}; resume with that, or set "
                "resume_from_checkpoint=none to start afresh"
            )
        if policy and state:
            policy.load_state_dict(state)

    def _step_ends(self, waiting: list[RolloutGroup]) -> None:
        """Last of all: what fails before leaves a step that is half collected."""
        self.waiting, self._counters, self._num_rounds, self._sums = waiting, Counter(), 0, Counter()

    def _is_useful(self, group: RolloutGroup) -> bool:
        return self.config.reason_to_drop(group) is None

    def _roll_out_round(self, step: int, missing: int, oldest: int) -> None:
        num_prompts = math.ceil(missing * self.config.oversampling)
        if self.config.partial:
            groups, counters = self._go_on(step, missing, num_prompts, oldest)
        elif self.ahead is None:
            groups, counters = self.rollouts.roll_out(self._take_round(step, num_prompts), step)
        else:
            if not len(self.ahead):
                self.ahead.submit(self.rollouts, self._take_round(step, num_prompts))
            with self.rollouts.timings.phase("wait_for_rollouts"):
                done = self.ahead.next()
            groups, counters = done.groups, done.counters
            self._sums.update(done.seconds)
        self.waiting = [*self.waiting, *groups]
        self._counters.update(counters)
        self._num_rounds += 1

    def _go_on(
        self, step: int, missing: int, num_prompts: int, oldest: int
    ) -> tuple[list[RolloutGroup], dict[str, int]]:
        """Have so many prompts in flight over all ranks, until each rank has its share of the groups that are missing.

        What a round leaves unfinished stays with its rank; new prompts go where the fewest are.
        """
        counts = self.distributed.gather([len(self.in_flight)])
        for taken in self._take(step, max(num_prompts - sum(counts), 0)):
            owner = counts.index(min(counts))
            counts[owner] += 1
            if owner == self.distributed.rank:  # kept at once: should decoding fail, none is lost
                self.in_flight.append(InFlight(taken))
        rank, total = self.distributed.rank, sum(counts)
        num_wanted = missing * sum(counts[: rank + 1]) // total - missing * sum(counts[:rank]) // total
        rollout = PartialRollout(self.rollouts, self.in_flight, step, num_wanted, oldest)
        self.in_flight = rollout.run()
        self._sums["partial/continued"] += rollout.num_continued
        self._sums["partial/waited_for"] += rollout.num_waited_for
        return rollout.groups, rollout.counters

    def _take_round(self, step: int, num_prompts: int) -> Sequence[TakenPrompt]:
        """This rank's share of a round: of one that was interrupted, else of the stream."""
        return self._unasked.popleft() if self._unasked else self.distributed.share(self._take(step, num_prompts))

    def _take(self, step: int, num_prompts: int) -> list[TakenPrompt]:
        """The next prompts of the stream, the same on every rank."""
        first, self._num_taken = self._num_taken, self._num_taken + num_prompts
        # Ahead and in flight, nobody knows the step that a group will belong to; its number is its own.
        is_of_step = self.ahead is None and not self.config.partial
        source = (step, self._num_rounds) if is_of_step else (first,)
        return [
            TakenPrompt(self.prompts[index], first + n, stable_seed(self.seed, *source, n))
            for n, index in enumerate(self.stream.take(num_prompts))
        ]

    def _drop_older(self, oldest: int) -> None:
        if self.ahead is not None:
            kept = [group for group in self.waiting if group.sampled_at >= oldest]
            self._sums["groups/too_old"] += len(self.waiting) - len(kept)
            self.waiting = kept

    def _metrics(self) -> dict[str, float]:
        """This rank's; seconds are those of its engine, while the trainer may have trained."""
        if not self.config.partial:
            return dict(self._sums)
        kept = sum(one.num_tokens for one in self.in_flight)
        return {"partial/continued": 0, "partial/waited_for": 0, **self._sums, "partial/tokens_kept": kept}

    def _shared_out(self, groups: list[RolloutGroup]) -> tuple[list[RolloutGroup], list[RolloutGroup], int]:
        """This rank's fair share of the earliest groups, those too many on it, and how many are too many on all.

        Only the groups that move travel, and everyone computes the same plan.
        """
        rank, world_size = self.distributed.rank, self.distributed.world_size
        plan = sorted(self.distributed.gather([(group.number, self.rollouts.cost(group), rank) for group in groups]))
        plan, surplus = plan[: self.config.prompts_per_step], plan[self.config.prompts_per_step :]
        owners = balanced_owners([cost for _, cost, _ in plan], [owner for _, _, owner in plan], world_size)
        new_owner = {number: owner for (number, _, _), owner in zip(plan, owners, strict=True)}
        waiting = [group for group in groups if group.number not in new_owner]
        mine = [group for group in groups if new_owner.get(group.number) == rank]
        leaving = [g for g in groups if g.number in new_owner and new_owner[g.number] != rank]
        if world_size > 1:
            mine += [group for group in self.distributed.gather(leaving) if new_owner[group.number] == rank]
        return sorted(mine, key=lambda group: group.number), waiting, len(surplus)


def _further_reasons(config: RolloutConfig) -> str:
    """What else may have dropped groups, for a message."""
    names = [f"rollout.{name}" for name in ("needs_right", "keep_pass_rate", "min_spread") if getattr(config, name)]
    return f", or {' or '.join(names)} dropped it," if names else ""


def _example(groups: Sequence[RolloutGroup]) -> str:
    """One completion, for a message."""
    if not groups:
        return ""
    problem, completion = groups[0].prompt.problem, groups[0].completions[0]
    return (
        f"; for example {shorten(problem.question)} -> {shorten(completion.text)}, gold {shorten(problem.answer)}, "
        f"reward {groups[0].rewards[0]:g}"
    )
