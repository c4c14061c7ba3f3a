"""A pack of views -> the log-probability and entropy of each of its actions, in one forward pass.

Only the positions of actions go through lm_head, in chunks whose logits are recomputed in backward, so that T x V never
exists at once. Everything from the logits on is float32.

`PackedScorer` is the module a trainer wraps (DDP, ZeRO, FSDP): its forward holds all that touches parameters.

Shapes: L packed tokens, T actions, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dirl.diffusion.distribution import suppressed_tokens
from dirl.diffusion.likelihood import ScoringRule, action_logprobs
from dirl.diffusion.packing import Actions, PackedViews, TokenTable
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import AttentionName, padded_for_flex, training_plan, uses_flex

LOGITS_PER_CHUNK = 1 << 26  # float32 logits alive at once: 256 MB, and twice that where a decoder sums them in float64


class ActionScores(NamedTuple):
    """A named tuple, so that DDP finds the tensors in it."""

    logprob_T: Tensor  # float32, nats, with gradient
    entropy_T: Tensor  # float32, nats; zeros unless the rule asks for it, without gradient unless it asks for that


class PackedScorer(nn.Module):
    """A block-diffusion model that scores packs of views.

    Args:
        budget: the most packed tokens there will be; padding does not go beyond it. 0: not known.
    """

    def __init__(self, model: BlockDiffusionModel, attention: AttentionName = "auto", budget: int = 0) -> None:
        super().__init__()
        self.model, self.attention, self.budget = model, attention, budget

    def forward(self, packed: PackedViews, rule: ScoringRule) -> ActionScores:
        """Scores of the pack's actions under the model, as the decoder would have assigned them."""
        hidden_TD = hidden_at_actions(self.model.model, packed, self.attention, self.budget)
        return score_actions(hidden_TD, self.model.lm_head, packed.actions, rule)

    def hidden_states(self, tokens: TokenTable) -> Tensor:
        """Last hidden states of a pack's tokens, and of what fills it up; (L, D)."""
        return hidden_states(self.model.model, tokens, self.attention, self.budget)


def hidden_at_actions(backbone: nn.Module, packed: PackedViews, attention: AttentionName, budget: int) -> Tensor:
    """Last hidden states (T, D) of a model without its head, at the positions of the pack's actions."""
    return hidden_states(backbone, packed.tokens, attention, budget)[packed.actions.index_T]


def hidden_states(backbone: nn.Module, tokens: TokenTable, attention: AttentionName, budget: int) -> Tensor:
    """Last hidden states of a pack's tokens, and of what fills it up; (L, D)."""
    if uses_flex(tokens, attention):
        tokens = padded_for_flex(tokens, budget)
    return backbone(
        input_ids=tokens.token_ids_L[None],
        position_ids=tokens.position_L[None],
        attention_plan=training_plan(tokens, attention),
        use_cache=False,
    ).last_hidden_state[0]


def score_actions(hidden_TD: Tensor, lm_head: nn.Module, actions: Actions, rule: ScoringRule) -> ActionScores:
    """lm_head and `action_logprobs` in chunks that never split a view."""
    if len(actions) == 0:
        # A sum over nothing that still belongs to the graph, lm_head included: every rank must take part in backward.
        nothing_T = lm_head(hidden_TD).sum(dim=1)
        return ActionScores(nothing_T, nothing_T.detach())

    def score(hidden: Tensor, chunk: Actions) -> tuple[Tensor, Tensor]:
        return action_logprobs(lm_head(hidden), chunk, rule)

    chunks = _chunks_of_views(actions.view_ends, max_rows=max(1, LOGITS_PER_CHUNK // len(rule.suppressed_V)))
    if len(chunks) == 1:
        return ActionScores(*score(hidden_TD, actions))
    scored = [checkpoint(score, hidden_TD[rows], actions.rows(rows), use_reentrant=False) for rows in chunks]
    logprobs, entropies = zip(*scored, strict=True)
    return ActionScores(torch.cat(logprobs), torch.cat(entropies))


def _chunks_of_views(view_ends: Sequence[int], max_rows: int) -> list[slice]:
    """Slices of at most `max_rows` actions (a view longer than that stays whole), cut between views."""
    slices, start, previous = [], 0, 0
    for end in view_ends:
        if end - start > max_rows and previous > start:
            slices.append(slice(start, previous))
            start = previous
        previous = end
    return [*slices, slice(start, previous)]


def suppressed_by(model: BlockDiffusionModel) -> Tensor:
    """Ids the model's tokenizer cannot stand for, and the mask token; (V,) bool on the model's device."""
    config = model.config
    length = config.tokenizer_length or config.vocab_size
    return suppressed_tokens(config.vocab_size, length, config.mask_token_id, next(model.parameters()).device)
