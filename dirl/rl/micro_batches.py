"""Groups of completions -> micro-batches: views laid out under a token budget, with what was known at sampling.

A completion whose views do not fit one micro-batch lies in several: each repeats its clean tokens as far as its blocks
go, and every view stands once, so that gradients add up to those of the whole. Views of one block stay
together.

Shapes: T actions, N completions of an optimizer step on this rank, V views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Generator, Tensor

from dirl.diffusion.packing import Actions, DiffusionScheme, ViewedDocument, Views, pack
from dirl.errors import UserError
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.rollout.engine import Completion
from dirl.rollout.replay import trajectory_of
from dirl.training.balance import consecutive, split_by_budget
from dirl.training.seeds import stable_seed


@dataclass(frozen=True)
class _Part:
    """Views of a completion, all or those of some blocks, and its place in the batch of rollouts."""

    group: RolloutGroup
    index: int  # of the completion in its group
    number: int  # among all of this rank's
    views: Views
    num_covered: int  # tokens of the completion that any of its views scores
    num_parts: int = 1
    first_row: int = 0  # actions of the completion that lie in earlier parts
    first_step: int = 0  # views of it that do

    @property
    def completion(self) -> Completion:
        return self.group.completions[self.index]


@dataclass(frozen=True)
class Layout:
    """What packs of a model must look like."""

    scheme: DiffusionScheme
    budget: int  # packed tokens of a micro-batch

    @property
    def block_length(self) -> int:
        """0: full attention."""
        return self.scheme.block_length

    def trunk(self, part: _Part) -> int:
        """Tokens of the full blocks of its prompt."""
        prompt_length = len(part.completion.prompt_ids)
        return prompt_length - self.scheme.tail(prompt_length) if self.block_length else 0

    def packed_length(self, part: _Part) -> int:
        """Tokens it adds to the trunk of its document."""
        return part.views.packed_length(self.scheme.tail(len(part.completion.prompt_ids)), self.block_length)


def pack_groups(
    groups: Sequence[RolloutGroup],
    objective: ObjectiveConfig,
    layout: Layout,
    *,
    iteration: int = 0,
    tokens_per_update: int = 0,
) -> list[PolicyBatch]:
    """Micro-batches of at most `layout.budget` packed tokens, on the host; a group may be cut, repeating its prompt.

    Args:
        iteration: which pass over these rollouts; masks may be others in each.
        tokens_per_update: packed tokens that a random part of the completions may take together; 0: all of them.
    """
    wholes: list[_Part] = []
    for group in groups:
        wholes += _completions(group, len(wholes), objective, layout, iteration)
    if tokens_per_update:
        wholes = _random_part(wholes, layout, tokens_per_update)
    documents: list[tuple[ViewedDocument, list[_Part]]] = []
    for _, of_group in groupby(wholes, key=lambda part: id(part.group)):
        documents += _documents(list(of_group), layout, has_holds=objective.likelihood == "trajectory")
    bins = split_by_budget([document.packed_length(layout.block_length) for document, _ in documents], layout.budget)
    return [_policy_batch([documents[i] for i in chosen], layout.scheme, objective) for chosen in bins]


def _completions(
    group: RolloutGroup, first: int, objective: ObjectiveConfig, layout: Layout, iteration: int
) -> Iterator[_Part]:
    """Each completion of a group, whole."""
    # Those that waited were scored under the masks of the first pass.
    is_redrawn = objective.refresh_masks and iteration > 0 and not group.behavior_logprobs
    for index, completion in enumerate(group.completions):
        trajectory = trajectory_of(completion, layout.scheme)
        seed = stable_seed(group.seed, index, *([iteration] if is_redrawn else []))
        views = objective.views_of(trajectory, layout.scheme.mask_token_id, seed)
        position_V1 = views.block_V[:, None] * layout.block_length
        covered = (position_V1 + torch.arange(views.token_ids_VB.shape[1]))[views.revealed_VB].unique()
        yield _Part(group, index, first + index, views, len(covered))


def _random_part(wholes: list[_Part], layout: Layout, budget: int) -> list[_Part]:
    """As many completions as fit a budget on average, each as likely as any other, counting for those left out.

    How many is known before any is drawn: a rule that stops at the budget would keep short completions more often.
    Source: the token budget of C3PO.
    """
    lengths = [layout.packed_length(part) + layout.trunk(part) / len(part.group.completions) for part in wholes]
    if not wholes or sum(lengths) <= budget:
        return wholes
    num_kept = max(1, int(budget * len(wholes) / sum(lengths)))
    generator = Generator().manual_seed(stable_seed(*[part.group.seed for part in wholes]))
    kept = torch.randperm(len(wholes), generator=generator)[:num_kept].sort().values.tolist()
    factor = len(wholes) / num_kept
    return [
        replace(part, views=replace(part.views, importance_V=part.views.importance_V * factor))
        for part in (wholes[i] for i in kept)
    ]


def _documents(
    wholes: Sequence[_Part], layout: Layout, *, has_holds: bool
) -> Iterator[tuple[ViewedDocument, list[_Part]]]:
    """A group as one document, or as several that each fit the budget."""
    prompt_ids = torch.tensor(wholes[0].completion.prompt_ids, dtype=torch.int64)
    room = layout.budget - layout.trunk(wholes[0])
    parts = [part for whole in wholes for part in _parts(whole, layout, room, has_holds=has_holds)]
    for chosen in consecutive(parts, layout.packed_length, room):
        yield ViewedDocument(prompt_ids, [part.views for part in chosen]), chosen


def _parts(whole: _Part, layout: Layout, room: int, *, has_holds: bool) -> list[_Part]:
    """A completion in one part, or where it does not fit in several, cut between blocks; between views of one alone."""
    if layout.packed_length(whole) <= room:
        return [whole]
    views, block_length, prompt_length = whole.views, layout.block_length, len(whole.completion.prompt_ids)
    before = views.lead + prompt_length  # from where blocks are counted to the completion
    first_block = before // block_length if block_length else 0
    ends = [*(views.block_V.diff().nonzero().squeeze(1) + 1).tolist(), len(views)]
    if block_length == 0:
        ends = list(range(1, len(views) + 1))
    view_length = views.token_ids_VB.shape[1]
    cut, start, previous = [], 0, 0
    for end in ends:
        num_clean = (int(views.block_V[end - 1]) + 1 - first_block) * block_length
        if start < previous and num_clean + view_length * (end - start) > room:
            cut.append(slice(start, previous))
            start = previous
        previous = end
    parts, first_row = [], 0
    for rows in [*cut, slice(start, previous)]:
        chosen = views.rows(rows)
        if block_length:
            num_read = (int(chosen.block_V[-1]) + 1) * block_length - before  # to the end of its last block
            chosen = replace(chosen, completion_ids=chosen.completion_ids[:num_read])
        placed = replace(whole, num_parts=len(cut) + 1, first_row=first_row, first_step=rows.start)
        parts.append(replace(placed, views=chosen))
        scored_VB = chosen.revealed_VB | chosen.held_VB if has_holds else chosen.revealed_VB
        first_row += int(scored_VB.sum())
    return parts


def _policy_batch(
    documents: Sequence[tuple[ViewedDocument, list[_Part]]], scheme: DiffusionScheme, objective: ObjectiveConfig
) -> PolicyBatch:
    packed = pack([document for document, _ in documents], scheme.block_length, scheme.shift)
    if objective.likelihood == "reveal":
        packed = packed.reveals_only()
    parts = [part for _, of_document in documents for part in of_document]
    branch_T = packed.actions.branch_T
    count_N = torch.bincount(branch_T, minlength=len(parts))

    def at_actions(values: Sequence[int]) -> Tensor:
        return torch.tensor(values)[branch_T]

    first_T = (count_N.cumsum(0) - count_N)[branch_T]
    row_T = torch.arange(len(branch_T)) - first_T + at_actions([part.first_row for part in parts])
    view_T = packed.actions.view_T
    step_T = view_T - view_T[first_T] + at_actions([part.first_step for part in parts])
    remembered_T = _remembered(branch_T, row_T, parts, objective)
    batch = replace(
        PolicyBatch.blank(packed),
        completion_T=at_actions([part.number for part in parts]),
        row_T=row_T,
        step_T=step_T,
        sampled_at_T=_at_tokens(packed.actions, [part.group.sampled_at_of(part.completion) for part in parts]),
        length_T=at_actions([len(part.completion.token_ids) for part in parts]).float(),
        num_covered_T=at_actions([part.num_covered for part in parts]).float(),
        num_parts_T=at_actions([part.num_parts for part in parts]).float(),
        is_split=any(part.num_parts > 1 for part in parts),
        behavior_logprob_T=remembered_T,
        is_remembered_T=~remembered_T.isnan(),
    )
    _refuse_cut_corrections(batch, objective)
    return batch


def _at_tokens(actions: Actions, values: Sequence[Sequence[float]]) -> Tensor:
    """Of the (R,) values of each completion's tokens, those of the actions' tokens."""
    lengths = torch.tensor([len(of_one) for of_one in values])
    first_N = lengths.cumsum(0) - lengths
    value = torch.cat([torch.tensor(of_one) for of_one in values])
    return value[first_N[actions.branch_T] + actions.completion_index_T]


def _remembered(branch_T: Tensor, row_T: Tensor, parts: Sequence[_Part], objective: ObjectiveConfig) -> Tensor:
    """What groups that had to wait were given by the weights that sampled them; NaN for all others.

    Raises:
        UserError: a checkpoint brought groups whose actions were others.
    """
    remembered_T = torch.full(branch_T.shape, torch.nan)
    for branch, part in enumerate(parts):
        if part.group.behavior_logprobs:
            if part.group.scored_as != objective.scored_as:
                raise UserError(
                    f"objective: groups that wait since step {part.group.sampled_at} were scored with "
                    f"{part.group.scored_as}, this run has {objective.scored_as}; resume with what the run was "
                    "started with, or set resume_from_checkpoint=none"
                )
            is_here_T = branch_T == branch
            remembered_T[is_here_T] = torch.tensor(part.group.behavior_logprobs[part.index])[row_T[is_here_T]]
    return remembered_T


def _refuse_cut_corrections(batch: PolicyBatch, objective: ObjectiveConfig) -> None:
    if batch.is_split and objective.importance_sampling_correction.startswith("sequence"):
        raise UserError(
            f"importance_sampling_correction={objective.importance_sampling_correction} weighs whole completions, and "
            "one is too long for a micro-batch; raise max_tokens_per_micro_batch, or use token_*"
        )
