"""What an engine decoded -> `Completion`, and the checks every engine makes before it starts."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import decode, stop_token_ids
from dirl.diffusion.packing import DiffusionScheme
from dirl.errors import UserError
from dirl.rollout.block_step import DenoisingStep
from dirl.rollout.engine import Completion, Request, SamplingConfig


def touched_tokens(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: SamplingConfig, scheme: DiffusionScheme
) -> list[int]:
    """Completion tokens in the blocks that fit max_completion_length, for each prompt; all, where there are no blocks.

    Raises:
        ValueError: not one seed per prompt, or no block fits after a prompt.
    """
    if len(seeds) != len(prompts):
        raise ValueError(f"generate needs one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    limit, block_length = sampling.max_completion_length, scheme.block_length
    if block_length == 0:
        return [limit] * len(prompts)
    tails = [scheme.tail(len(prompt)) for prompt in prompts]
    touched = [(tail + limit) // block_length * block_length - tail for tail in tails]
    for prompt, num_tokens in zip(prompts, touched, strict=True):
        if num_tokens <= 0:
            raise UserError(
                f"max_completion_length {limit} leaves no room for a block of {block_length} after a prompt of "
                f"{len(prompt)} tokens; raise it"
            )
    return touched


def check_thresholds(
    thresholds: Sequence[float] | None, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
) -> None:
    """Raises ValueError: not one threshold per prompt, or nothing that reads them."""
    if thresholds is None:
        return
    if len(thresholds) != len(prompts):
        raise ValueError(f"generate needs one threshold per prompt, got {len(thresholds)} for {len(prompts)} prompts")
    if sampling.unmasking_strategy != "low_confidence_dynamic":
        raise UserError(
            f"unmasking_strategy={sampling.unmasking_strategy} reads no thresholds; use low_confidence_dynamic"
        )


def make_completion(
    prompt_ids: Sequence[int],
    token_ids: list[int],
    step_map: list[int],
    logprobs: list[float] | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    scheme: DiffusionScheme,
    confidence_threshold: float | None = None,
) -> Completion:
    """A completion from its tokens and steps; lengths, reasons and text follow from them.

    Raises:
        UserError: a log-probability is not a number, because the logits it comes from were not finite.
    """
    if logprobs is not None and not all(map(math.isfinite, logprobs)):
        first = next(i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob))
        raise UserError(
            f"the model's logits at token {first} of a completion are not finite: its weights are damaged, or training "
            "has diverged; look at loss and grad_norm, and go back to a checkpoint before"
        )
    stop_ids = stop_token_ids(tokenizer)
    stops = [i for i, token in enumerate(token_ids) if token in stop_ids]
    num_steps = max(step_map)
    if scheme.block_length:
        steps = [0] * scheme.tail(len(prompt_ids)) + step_map
        num_steps = sum(max(steps[i : i + scheme.block_length]) for i in range(0, len(steps), scheme.block_length))
    return Completion(
        prompt_ids=list(prompt_ids),
        token_ids=token_ids,
        step_map=step_map,
        logprobs=logprobs,
        completion_length=stops[0] + 1 if stops else len(token_ids),
        finish_reason="stop" if stops else "length",
        num_denoising_steps=num_steps,
        text=decode(tokenizer, token_ids[: stops[0]] if stops else token_ids),
        confidence_threshold=confidence_threshold,
    )


def in_windows(
    completion: Completion, sampling: SamplingConfig, scheme: DiffusionScheme, hold_logprobs: list[float] | None
) -> Completion:
    """A completion with what its replay must know: its windows, and under full attention the rest of its canvas.

    Args:
        hold_logprobs: what was recorded of its holds, if anything.
    """
    completion = replace(completion, hold_logprobs=hold_logprobs)
    if scheme.block_length:
        return replace(completion, generation_window=sampling.sub_block_length)
    num_unwritten = sampling.max_completion_length - len(completion.token_ids)
    return replace(completion, generation_window=sampling.generation_window, num_unwritten=num_unwritten)


class HoldRecord:
    """Log-probabilities of the holds of sequences in flight, each one's in the order in which they were decided."""

    def __init__(self) -> None:
        self._of: dict[int, array[float]] = {}  # by index of the request

    def add(self, requests: Sequence[Request | None], step: DenoisingStep) -> None:
        """One denoising step of theirs, a row each; the host waits for it."""
        assert step.holds_NB is not None
        for request, row in zip(requests, step.holds_NB.tolist(), strict=True):
            assert request is not None
            before = (request.prefix and request.prefix.hold_logprobs) or ()
            self._of.setdefault(request.index, array("f", before)).extend(hold for hold in row if not math.isnan(hold))

    def pop(self, index: int) -> list[float] | None:
        """A finished one's; None where nothing was recorded."""
        return self._of.pop(index).tolist() if index in self._of else None
