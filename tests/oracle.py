"""The slow obvious way, written once: one plain forward pass per denoising step on clean context + current block.

Nothing here uses packs, plans, tiles or caches; only `model(input_ids)` with the block mask, torch's own softmax and
Python loops.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dirl.diffusion.packing import BlockOrigin, DiffusionScheme
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.attention import DensePlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARMoeConfig, SDARMoeForCausalLM
from dirl.model.tiny import tiny
from dirl.rollout.engine import Completion, SamplingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sharp_tiny_model(
    seed: int = 0, *, sharpness: float = 5.0, block_length: int = 4, shift: int = 0, block_origin: BlockOrigin = "start"
) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """A tiny model that is far from uniform and to which every token it reads matters.

    Block length 0: full attention. Scales are set here, whatever `tiny` starts from: larger ones would amplify
    float32 rounding beyond 1e-5 nats.
    """
    model, tokenizer = tiny(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_((0.04 if "proj" in name else 0.02) / parameter.std())
        model.model.norm.weight.fill_(sharpness)
    model.config.block_size, model.config.shift, model.config.full_attention = block_length, shift, block_length == 0
    model.config.block_origin = block_origin
    return model.eval(), tokenizer


def tiny_moe() -> tuple[SDARMoeForCausalLM, PreTrainedTokenizerBase]:
    """A mixture of three experts with the tiny model's tokenizer, sharp enough to reveal several tokens a step."""
    dense, tokenizer = tiny()
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "initializer_range": 0.15}
    config = SDARMoeConfig(
        **{**dense.config.to_dict(), **experts, "tie_word_embeddings": False, "model_type": "sdar_moe"}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SDARMoeForCausalLM(config).eval(), tokenizer


def make_extreme(model: BlockDiffusionModel, token_ids: Sequence[int], factor: float) -> None:
    """Scale the (tied) embeddings of some tokens: their logits become large, of either sign, from state to state."""
    with torch.no_grad():
        model.lm_head.weight[list(token_ids)] *= factor


def state_logits(
    model: BlockDiffusionModel, clean_ids: list[int], block: int, noisy_block: list[int], lead: int = 0
) -> Tensor:
    """What predicts each place of one block in one state, the blocks before it clean; (B, V) float32.

    Where predictions are shifted, the row before each place, and before a block the last row of the clean blocks alone.

    Args:
        lead: tokens that the first block lacks.
    """
    context = clean_ids[: block * len(noisy_block) - lead]
    logits_BV = _plain_logits(model, context + noisy_block, lead)[-len(noisy_block) :]
    if model.scheme.shift:
        before_1V = _plain_logits(model, context, lead)[-1:] if context else logits_BV[:1]
        logits_BV = torch.cat([before_1V, logits_BV[:-1]])
    return logits_BV


def _plain_logits(model: BlockDiffusionModel, token_ids: list[int], lead: int) -> Tensor:
    """One pass over a sequence whose first block lacks `lead` tokens; (L, V) float32."""
    if model.scheme.block_origin == "start":
        return model(torch.tensor([token_ids])).logits[0].float()
    blocks = [(lead + position) // model.scheme.block_length for position in range(len(token_ids))]
    may_read = torch.tensor([[key <= query for key in blocks] for query in blocks])
    return model(torch.tensor([token_ids]), attention_plan=DensePlan(may_read[None])).logits[0].float()


def confidence_probs(logits_BV: Tensor, model: BlockDiffusionModel, sampling: SamplingConfig) -> Tensor:
    """What confidence is read from, by the kind that the model's family or `sampling` names; (B, V)."""
    kind = model.confidence if sampling.confidence == "auto" else sampling.confidence
    if kind == "processed":
        return sampling_probs(logits_BV, model, sampling)
    return _possible_probs(logits_BV, model, 1.0 if kind == "untempered" else sampling.temperature)


def sampling_probs(logits_BV: Tensor, model: BlockDiffusionModel, sampling: SamplingConfig) -> Tensor:
    """Probabilities after temperature, then top-k, then top-p, each by sorting and zeroing; (B, V)."""
    rows = _possible_probs(logits_BV, model, sampling.temperature)
    return torch.stack([sorted_and_cut(row_V, sampling.top_k, sampling.top_p) for row_V in rows])


def _possible_probs(logits_BV: Tensor, model: BlockDiffusionModel, temperature: float) -> Tensor:
    """Probabilities after suppression and temperature; (B, V)."""
    logits_BV = logits_BV.clone()
    logits_BV[:, model.config.mask_token_id] = -torch.inf
    logits_BV[:, model.config.tokenizer_length :] = -torch.inf
    return (logits_BV / (temperature or 1.0)).softmax(-1)


def sorted_and_cut(probs_V: Tensor, top_k: int, top_p: float) -> Tensor:
    """One row of probabilities after top-k, then top-p, renormalised after each; (V,)."""
    if top_k:
        kept = probs_V.sort(descending=True).indices[:top_k]
        probs_V = torch.zeros_like(probs_V).index_put((kept,), probs_V[kept])
        probs_V = probs_V / probs_V.sum()
    if top_p < 1:
        values, order = probs_V.sort(descending=True)
        count = 1
        while values[:count].sum().item() < top_p:
            count += 1
        kept = order[:count]
        probs_V = torch.zeros_like(probs_V).index_put((kept,), probs_V[kept])
        probs_V = probs_V / probs_V.sum()
    return probs_V


def reference_reveal(
    rule: UnmaskingRule,
    masked: Sequence[bool],
    confidence: Sequence[float],
    entropy: Sequence[float],
    uniform: Sequence[float],
    steps_taken: int = 0,
) -> list[bool]:
    """Which positions of one block a step reveals, by the words of the strategies."""
    lanes = [lane for lane, is_masked in enumerate(masked) if is_masked]
    num_steps = min(rule.denoising_steps or len(masked), len(masked))
    dealt = [0] * num_steps  # positions dealt to the steps one by one, as cards
    for card in range(len(masked)):
        dealt[card % num_steps] += 1
    count = dealt[min(steps_taken, num_steps - 1)]
    if rule.strategy == "low_confidence_dynamic":
        threshold, holds = rule.confidence_threshold, rule.holds_at_threshold
        chosen = [x for x in lanes if confidence[x] > threshold or (confidence[x] == threshold and not holds)]
        if lanes and not chosen:
            chosen = [max(lanes, key=lambda lane: (confidence[lane], -lane))]
    elif rule.strategy == "low_confidence_static":
        chosen = sorted(lanes, key=lambda lane: (-confidence[lane], lane))[:count]
    elif rule.strategy == "sequential":
        chosen = lanes[:count]
    elif rule.strategy == "random":
        chosen = sorted(lanes, key=lambda lane: (-uniform[lane], lane))[:count]
    else:
        chosen = []
        for lane in sorted(lanes, key=lambda lane: (entropy[lane], lane)):
            together = [entropy[other] for other in [*chosen, lane]]
            if sum(together) - max(together) > rule.entropy_bound:
                break
            chosen.append(lane)
    return [lane in chosen for lane in range(len(masked))]


@dataclass(frozen=True)
class DecodedState:
    """One denoising step of a completion, as the decoder had it."""

    block: int
    start: int  # position of its first token
    noisy: list[int]  # (B,) ids the model read
    revealed: list[int]  # lanes of the block revealed in this step
    held: list[int]  # lanes that stayed masked


def _lead(state: DecodedState) -> int:
    return state.block * len(state.noisy) - state.start


def states_of(model: BlockDiffusionModel, completion: Completion) -> Iterator[DecodedState]:
    """Every denoising step of a completion, in order."""
    if model.scheme.block_length:
        return decoded_states(completion, model.scheme)
    return canvas_states(completion, model.scheme.mask_token_id)


def canvas_states(completion: Completion, mask_token_id: int) -> Iterator[DecodedState]:
    """The same under full attention: one block of the prompt, the tokens and the masks that stayed."""
    start, window, steps = len(completion.prompt_ids), completion.generation_window, completion.step_map
    for step in range(1, max(steps) + 1):
        noisy = [mask_token_id if s >= step else t for t, s in zip(completion.token_ids, steps, strict=True)]
        revealed = [i for i, s in enumerate(steps) if s == step]
        current = revealed[0] // window
        yield DecodedState(
            block=0,
            start=0,
            noisy=completion.prompt_ids + noisy + [mask_token_id] * completion.num_unwritten,
            revealed=[start + i for i in revealed],
            held=[start + i for i, s in enumerate(steps) if s > step and i // window == current],
        )


def decoded_states(completion: Completion, scheme: DiffusionScheme) -> Iterator[DecodedState]:
    """Every denoising step of a completion that was decoded in blocks, in order."""
    block_length, mask_token_id = scheme.block_length, scheme.mask_token_id
    clean, prompt_length = completion.prompt_ids + completion.token_ids, len(completion.prompt_ids)
    lead = -prompt_length % block_length if scheme.block_origin == "prompt_end" else 0
    steps = [0] * len(completion.prompt_ids) + completion.step_map
    part = completion.generation_window or block_length  # lanes that a step decides about, from the left
    for block in range((lead + prompt_length) // block_length, (lead + len(clean)) // block_length):
        here = slice(block * block_length - lead, (block + 1) * block_length - lead)
        for step in range(1, max(steps[here]) + 1):
            revealed = [lane for lane, s in enumerate(steps[here]) if s == step]
            yield DecodedState(
                block=block,
                start=here.start,
                noisy=[mask_token_id if s >= step else t for t, s in zip(clean[here], steps[here], strict=True)],
                revealed=revealed,
                held=[lane for lane, s in enumerate(steps[here]) if s > step and lane // part == revealed[0] // part],
            )


def brute_force_logprobs(model: BlockDiffusionModel, completion: Completion, sampling: SamplingConfig) -> Tensor:
    """Log-probability of each completion token at the step it was revealed, with gradients; (R,)."""
    clean = completion.prompt_ids + completion.token_ids
    found: dict[int, Tensor] = {}
    for state in states_of(model, completion):
        logits_BV = state_logits(model, clean, state.block, state.noisy, _lead(state))
        probs_BV = sampling_probs(logits_BV, model, sampling)
        for lane in state.revealed:
            position = state.start + lane
            found[position] = probs_BV[lane, clean[position]].log()
    return torch.stack([found[p] for p in range(len(completion.prompt_ids), len(clean))])


def brute_force_actions(model: BlockDiffusionModel, completion: Completion, sampling: SamplingConfig) -> Tensor:
    """Log-probability of every action, reveals and holds, in the order of steps and positions; (T,)."""
    clean = completion.prompt_ids + completion.token_ids
    actions = []
    for state in states_of(model, completion):
        logits_BV = state_logits(model, clean, state.block, state.noisy, _lead(state))
        confidence_BV = confidence_probs(logits_BV.detach(), model, sampling)
        sampled_BV = sampling_probs(logits_BV, model, sampling)
        tokens = clean[state.start :][: len(state.noisy)]
        bar = _bar([float(confidence_BV[lane, tokens[lane]]) for lane in state.revealed], sampling)
        for lane in sorted(state.revealed + state.held):
            if lane in state.revealed:
                actions.append(sampled_BV[lane, tokens[lane]].log())
            else:
                actions.append(sampled_BV[lane][confidence_BV[lane] < bar].sum().log())
    return torch.stack(actions)


def _bar(revealed_confidences: list[float], sampling: SamplingConfig) -> float:
    """The confidence that held tokens must stay below."""
    if sampling.unmasking_strategy == "low_confidence_dynamic":
        is_fallback = revealed_confidences[0] < sampling.confidence_threshold
        return revealed_confidences[0] if is_fallback else sampling.confidence_threshold
    if sampling.unmasking_strategy == "low_confidence_static":
        return min(revealed_confidences)
    return math.inf
