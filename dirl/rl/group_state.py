"""Rollouts that have not been trained on <-> plain rows in a checkpoint, with the rank that holds each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dirl.rl.rollout_group import Collector, Harvest, Prompt, RolloutGroup
from dirl.rollout.engine import Completion
from dirl.training.distributed import Distributed


class CollectorState:
    """What a run saves of a collector: its place in the stream, and the groups that are carried over or half collected.

    With another number of processes than saved them, the groups are shared out anew.
    """

    def __init__(self, collector: Collector, distributed: Distributed) -> None:
        self.collector, self.distributed = collector, distributed

    @property
    def is_amid(self) -> bool:
        return self.collector.is_amid

    def state_dict(self) -> dict[str, Any]:
        """Collective: the groups of all ranks."""
        collector, harvest = self.collector, self.collector.harvest
        index = {id(prompt): number for number, prompt in enumerate(collector.prompts)}
        mine = {
            "carried": [] if harvest else [_to_row(group, index) for group in collector.carried],
            "groups": [_to_row(group, index) for group in harvest.groups] if harvest else [],
            "dropped": [_to_row(group, index) for group in harvest.dropped] if harvest else [],
            "counters": harvest.counters if harvest else {},
        }
        return {
            "stream": collector.stream.state_dict(),
            "num_drawn": collector.num_drawn,
            "num_rounds": harvest.num_rounds if harvest else None,  # None: between two steps
            "ranks": self.distributed.gather([mine]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        collector = self.collector
        collector.stream.load_state_dict(state["stream"])
        collector.num_drawn = state["num_drawn"]
        collector.carried = self._groups_of(state["ranks"], "carried")
        if state["num_rounds"] is None:
            return
        counters = state["ranks"][0]["counters"] if self.distributed.is_main else {}
        if len(state["ranks"]) == self.distributed.world_size:
            counters = state["ranks"][self.distributed.rank]["counters"]
        collector.harvest = Harvest(
            self._groups_of(state["ranks"], "groups"),
            self._groups_of(state["ranks"], "dropped"),
            dict(counters),
            state["num_rounds"],
        )

    def _groups_of(self, ranks: Sequence[dict[str, Any]], name: str) -> list[RolloutGroup]:
        if len(ranks) == self.distributed.world_size:
            rows = ranks[self.distributed.rank][name]
        else:
            rows = self.distributed.share([row for rank in ranks for row in rank[name]])
        return [_from_row(row, self.collector.prompts) for row in rows]


def _to_row(group: RolloutGroup, index: dict[int, int]) -> dict[str, Any]:
    names = ("rewards", "reward_parts", "draw", "sampled_at")
    return {
        "prompt": index[id(group.prompt)],
        "completions": [asdict(completion) for completion in group.completions],
        **{name: getattr(group, name) for name in names},
    }


def _from_row(row: dict[str, Any], prompts: Sequence[Prompt]) -> RolloutGroup:
    completions = [Completion(**completion) for completion in row["completions"]]
    return RolloutGroup(**{**row, "prompt": prompts[row["prompt"]], "completions": completions})
