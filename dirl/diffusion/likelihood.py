"""Logits at the actions of a trajectory -> the log-probability of each action.

The tokens a step reveals have probability prod q_i(x_i): the `reveal` likelihood, which is all that DiRL, TraceRL and
CJ-GRPO use. Which positions a step reveals depends on the policy too. Given what was revealed, a held position j could
have drawn any token whose confidence stays below the bar c of that step, so the `trajectory` likelihood multiplies

    hold_j = sum over v with p_j(v) < c of q_j(v)

with c = the threshold (the completion's own, where it has one) in a threshold step, the revealed token's confidence in
a fallback step, and the lowest revealed confidence under low_confidence_static. p_j(v) = c counts too right of the
revealed positions at c, and anywhere at a threshold that must be exceeded. p is the distribution that confidence is
read from, q the one tokens are drawn from. The other strategies choose positions without looking at the drawn tokens:
their holds have probability 1. Bars are constants for autograd: they are so almost everywhere.

Shapes: T actions (sorted by view), V vocabulary, N rows for views, as many as actions (there cannot be more views).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution, entropy
from dirl.diffusion.packing import Actions
from dirl.diffusion.unmasking import UnmaskingRule

Likelihood = Literal["reveal", "trajectory"]

# A hold that the current policy gives no mass has log-probability -inf; ratios and gradients want a finite floor.
_HOLD_FLOOR = -30.0


@dataclass(frozen=True)
class ScoringRule:
    """Everything that turned logits into actions, as the decoder had it, and what is asked of them."""

    distribution: TokenDistribution
    unmasking: UnmaskingRule
    suppressed_V: Tensor  # bool, tokens that may never be sampled
    wants_entropy: bool = False  # a sum over T x V that most passes have no use for
    entropy_has_gradient: bool = False


def action_logprobs(logits_TV: Tensor, actions: Actions, rule: ScoringRule) -> tuple[Tensor, Tensor]:
    """Log-probability (nats, with gradient) and entropy (nats) of each action; float32, (T,) each.

    A hold's log-probability is zero where the strategy does not look at tokens. A token in a state the decoder did not
    visit is scored before top-k and top-p, under which it need not have been possible there. The entropy is that of the
    distribution a position is sampled from, whatever was done there; zeros unless the rule asks for it, and without a
    gradient unless it asks for that as well. Nothing here makes the host wait for the device.
    """
    tempered_TV = rule.distribution.tempered_logprobs(logits_TV, rule.suppressed_V)
    sampling_TV = rule.distribution.sampling_logprobs(tempered_TV, drawn=(actions.target_T, actions.is_reveal_T))
    reveal_T = sampling_TV.gather(1, actions.target_T[:, None]).squeeze(1)
    if sampling_TV is not tempered_TV:  # something is cut
        reveal_T = torch.where(actions.is_visited_T, reveal_T, tempered_TV.gather(1, actions.target_T[:, None])[:, 0])
    with torch.set_grad_enabled(rule.entropy_has_gradient and torch.is_grad_enabled()):
        entropy_T = entropy(sampling_TV) if rule.wants_entropy else torch.zeros_like(reveal_T)
    if not actions.has_holds:
        return reveal_T, entropy_T
    # Probabilities, as the decoder compared: in float32 two logarithms may stand for one of them.
    confidence_TV = rule.distribution.confidence_logprobs(logits_TV, rule.suppressed_V, tempered_TV, sampling_TV).exp()
    confidence_T = confidence_TV.gather(1, actions.target_T[:, None]).squeeze(1)
    decided = Decisions(confidence_T, actions.is_reveal_T, actions.view_T, actions.threshold_T)
    hold_T = hold_logprobs(sampling_TV, confidence_TV, *hold_bars(decided, rule.unmasking))
    return torch.where(actions.is_reveal_T, reveal_T, hold_T), entropy_T


def hold_logprobs(sampling_TV: Tensor, confidence_TV: Tensor, bar_T: Tensor, may_tie_T: Tensor) -> Tensor:
    """Log-probability (nats, float32) of drawing a token that stays masked, at each position; (T,).

    Args:
        sampling_TV, confidence_TV: log-probabilities of the tokens that may be drawn, and their confidences.
        bar_T, may_tie_T: what `hold_bars` found.
    """
    below_TV = (confidence_TV < bar_T[:, None]) | (may_tie_T[:, None] & (confidence_TV == bar_T[:, None]))
    below_TV &= sampling_TV.detach().isfinite()
    is_empty_T = ~below_TV.any(dim=1)
    # logsumexp of nothing has NaN gradients: such rows sum over everything and then take the floor.
    hold_T = sampling_TV.masked_fill(~(below_TV | is_empty_T[:, None]), -torch.inf).logsumexp(dim=1)
    return torch.where(is_empty_T, _HOLD_FLOOR, hold_T.clamp(min=_HOLD_FLOOR))


class Decisions(NamedTuple):
    """What a decoder decided about positions, in their order."""

    confidence_T: Tensor  # of each position's token, a probability; read at reveals only
    is_reveal_T: Tensor  # bool, False: hold, or nothing
    view_T: Tensor  # int64, sorted; those of one view were decided together
    threshold_T: Tensor  # float32, the completion's own confidence threshold; NaN: the rule's


def hold_bars(decided: Decisions, rule: UnmaskingRule) -> tuple[Tensor, Tensor]:
    """The confidence that a held token must stay below, +inf where nothing is demanded, and whether it may equal it.

    (T,) each, float32 and bool.
    """
    confidence_T, is_reveal_T = decided.confidence_T, decided.is_reveal_T
    if not rule.reads_confidence:
        return torch.full_like(confidence_T, torch.inf), torch.zeros_like(is_reveal_T)
    row_T, threshold_T = _rows_of_views(decided.view_T), decided.threshold_T.nan_to_num(nan=rule.confidence_threshold)
    revealed_T = confidence_T.masked_fill(~is_reveal_T, torch.inf)
    bar_T = torch.full_like(confidence_T, torch.inf).scatter_reduce(0, row_T, revealed_T, "amin")[row_T]
    if rule.strategy == "low_confidence_dynamic":
        # A threshold step bars at the threshold itself; a fallback step, below it, at its one revealed token.
        bar_T = torch.minimum(bar_T, threshold_T)
    # Of equally confident positions the leftmost are revealed, so a held one that had the bar's own confidence stands
    # right of every revealed one at the bar. Ties are no rarity: a model that is certain gives 1 to the last bit.
    place_T = torch.arange(len(bar_T), device=bar_T.device)
    at_bar_T = is_reveal_T & (confidence_T == bar_T)
    nowhere_N = torch.full_like(place_T, len(bar_T))
    last_N = nowhere_N.scatter_reduce(0, row_T, place_T.masked_fill(~at_bar_T, -1), "amax", include_self=False)
    has_one_at_bar_T, ties_T = last_N[row_T] >= 0, place_T > last_N[row_T]
    if rule.strategy == "low_confidence_dynamic" and rule.holds_at_threshold:
        return bar_T, ~has_one_at_bar_T | ties_T  # nobody stands at a bar that was exceeded
    if rule.strategy == "low_confidence_dynamic":  # a token at the threshold itself is revealed wherever it stands
        ties_T &= bar_T < threshold_T
    return bar_T, has_one_at_bar_T & ties_T


def _rows_of_views(view_T: Tensor) -> Tensor:
    """0, 0, 1, 1, 1, 2, ...: the number of each action's view, counting the views that occur; (T,) int64.

    There are no more views than actions, so sums over views have T rows and need not ask the device for a number.
    """
    return torch.cat([torch.zeros_like(view_T[:1]), (view_T[1:] != view_T[:-1]).cumsum(0)])
