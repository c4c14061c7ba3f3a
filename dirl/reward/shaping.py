"""Completions -> shaped rewards: form, length, repetition and decoding speed, each a pure function.

All have the signature of a reward function, `f(prompts, completions, *, completion_ids, step_maps, **columns)`, and
return one float per completion. Numbers among the keyword arguments are its parameters, set by
`RewardConfig.parameters[name]`. A function that names `is_right` gets the grader's judgement of each completion. The
columns used here: `completion_length` (tokens up to and including EOS), `num_denoising_steps`, `finish_reason`
(`stop` or `length`), `max_completion_length`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from dirl.boxed import extract_boxed

Rewards = list[float]
RewardFunction = Callable[..., Sequence[float | None]]


def accuracy(prompts: list[str], completions: list[str], *, is_right: list[bool], **columns: Any) -> Rewards:
    """1 for a right answer, 0 for any other. Range {0, 1}. Source: DiRL."""
    return [float(right) for right in is_right]


def binary(prompts: list[str], completions: list[str], *, is_right: list[bool], **columns: Any) -> Rewards:
    """1 for a right answer, -1 for any other. Range {-1, 1}. Source: DAPO (arXiv 2503.14476), Eq. 7."""
    return [1.0 if right else -1.0 for right in is_right]


def boxed(prompts: list[str], completions: list[str], **columns: Any) -> Rewards:
    """1 if there is a closed, non-empty box, else 0. Range {0, 1}."""
    return [float(bool((extract_boxed(text) or "").strip())) for text in completions]


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


def format(prompts: list[str], completions: list[str], **columns: Any) -> Rewards:
    r"""1 if the completion reasons, then answers, then stops; else 0. Range {0, 1}.

    That is: words stand before the one and only \boxed{...}; it is closed and not empty; no words follow on later lines
    (a unit or `\]` may); and the completion ended by itself (`finish_reason` is `stop`).
    """
    finish_reasons = columns["finish_reason"]
    return [
        float(reason == "stop" and _is_reasoned_answer(text))
        for text, reason in zip(completions, finish_reasons, strict=True)
    ]


def _is_reasoned_answer(text: str) -> bool:
    boxes = list(_BOX.finditer(text))
    answer = (extract_boxed(text) or "").strip()
    if len(boxes) != 1 or not answer:
        return False
    _, _, rest = text[boxes[0].end() :].partition(answer)
    _, _, later_lines = rest.partition("\n")
    return _has_words(text[: boxes[0].start()]) and not _has_words(later_lines)


def _has_words(text: str) -> bool:
    return re.search(r"\w", text) is not None


_THINK = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.DOTALL)


def think_format(prompts: list[str], completions: list[str], **columns: Any) -> Rewards:
    """1 for `<think>some thought</think>` followed by an answer, each tag once; else 0. Range {0, 1}.

    A prompt that ends in `<think>` has opened it already. Source: TRL `think_format_reward`, Open-R1 `format_reward`.
    """
    return [float(_is_thought_and_answer(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def _is_thought_and_answer(prompt: str, text: str) -> bool:
    if prompt.rstrip().endswith("<think>"):
        text = "<think>" + text
    match = _THINK.match(text)
    if match is None or text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    return bool(match["thought"].strip()) and bool(match["answer"].strip())


def cosine(
    prompts: list[str],
    completions: list[str],
    *,
    is_right: list[bool],
    shortest_right: float = 1.0,
    longest_right: float = 0.5,
    shortest_wrong: float = -0.5,
    longest_wrong: float = 0.0,
    **columns: Any,
) -> Rewards:
    """Right answers earn less, wrong ones lose less, the longer they are: half a cosine from shortest to longest.

    longest + (shortest - longest) * (1 + cos(pi * L / L_max)) / 2, with L at most L_max. Range: between the parameters.
    Source: Demystifying Long Chain-of-Thought (arXiv 2502.03373), Eq. 1; defaults of ms-swift, which DiRL uses.
    """
    rewards = []
    for right, length, limit in zip(
        is_right, columns["completion_length"], columns["max_completion_length"], strict=True
    ):
        longest, shortest = (longest_right, shortest_right) if right else (longest_wrong, shortest_wrong)
        share = (1 + math.cos(math.pi * min(1.0, length / limit))) / 2
        rewards.append(longest + (shortest - longest) * share)
    return rewards


def length(prompts: list[str], completions: list[str], *, is_right: list[bool], **columns: Any) -> Rewards:
    """Shorter than its siblings is better: x = 0.5 - (L - L_min) / (L_max - L_min) if right, min(0, x) if wrong.

    L_min and L_max are taken over the completions of the same prompt; 0 where all are equally long. Range [-0.5, 0.5].
    Source: Kimi k1.5 (arXiv 2501.12599), section 2.3.3.
    """
    lengths_of: dict[str, list[int]] = {}
    for prompt, num_tokens in zip(prompts, columns["completion_length"], strict=True):
        lengths_of.setdefault(prompt, []).append(num_tokens)
    rewards = []
    for prompt, num_tokens, right in zip(prompts, columns["completion_length"], is_right, strict=True):
        shortest, longest = min(lengths_of[prompt]), max(lengths_of[prompt])
        score = 0.5 - (num_tokens - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(score if right else min(0.0, score))
    return rewards


def repetition(
    prompts: list[str],
    completions: list[str],
    *,
    ngram_size: float = 3,
    max_penalty: float = -1.0,
    **columns: Any,
) -> Rewards:
    """max_penalty * (1 - distinct n-grams / n-grams), over lower-case words. Range [max_penalty, 0]; 0 below n words.

    Source: Demystifying Long Chain-of-Thought (arXiv 2502.03373), section 4.3; ms-swift and Open-R1.
    """
    size = int(ngram_size)
    if size < 1:
        raise ValueError(f"ngram_size must be at least 1, got {ngram_size}")
    rewards = []
    for text in completions:
        words = text.lower().split()
        ngrams = list(zip(*(words[start:] for start in range(size)), strict=False))
        rewards.append(max_penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0)
    return rewards


def soft_overlong(prompts: list[str], completions: list[str], *, buffer_share: float = 0.5, **columns: Any) -> Rewards:
    """0 up to L_max - buffer, then linearly down to -1 at L_max, with buffer = buffer_share * L_max. Range [-1, 0].

    Source: DAPO (arXiv 2503.14476), Eq. 13, which has a buffer of 0.2 L_max; DiRL's is half.
    """
    lengths_and_limits = zip(columns["completion_length"], columns["max_completion_length"], strict=True)
    return [
        -min(1.0, max(0.0, num_tokens / limit - (1 - buffer_share)) / buffer_share)
        for num_tokens, limit in lengths_and_limits
    ]


def speed(
    prompts: list[str],
    completions: list[str],
    *,
    is_right: list[bool],
    max_tokens_per_step: float = 4.0,
    **columns: Any,
) -> Rewards:
    """Right answers earn their decoding speed, wrong ones nothing. Range [0, 1].

    (tokens per step - 1) / (max_tokens_per_step - 1), at most 1; the maximum is the block length. The paper has no
    formula; DiRL's released `speed` likewise needs a right answer and is scaled by the block length.
    """
    shares = _speed_shares(columns, max_tokens_per_step)
    return [share if right else 0.0 for share, right in zip(shares, is_right, strict=True)]


def tokens_per_step(prompts: list[str], completions: list[str], **columns: Any) -> Rewards:
    """Tokens up to and including EOS per denoising step, right or wrong. Range [0, block length].

    To be scaled in its group: `reward.combine=normalize_then_sum`. Source: LightningRL (tokens per forward).
    """
    lengths_and_steps = zip(columns["completion_length"], columns["num_denoising_steps"], strict=True)
    return [num_tokens / num_steps for num_tokens, num_steps in lengths_and_steps]


def speed_penalty(
    prompts: list[str],
    completions: list[str],
    *,
    is_right: list[bool],
    max_tokens_per_step: float = 4.0,
    **columns: Any,
) -> Rewards:
    """Wrong answers pay for haste, right ones pay nothing: minus the share that `speed` pays. Range [-1, 0]."""
    shares = _speed_shares(columns, max_tokens_per_step)
    return [0.0 if right else -share for share, right in zip(shares, is_right, strict=True)]


def _speed_shares(columns: dict[str, Any], max_tokens_per_step: float) -> list[float]:
    """Tokens per step of each completion, from 0 (one) to 1 (max_tokens_per_step or more)."""
    tokens_of_a_step = tokens_per_step([], [], **columns)
    return [min(1.0, max(0.0, (tokens - 1) / (max_tokens_per_step - 1))) for tokens in tokens_of_a_step]


REWARD_FUNCTIONS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (
        accuracy,
        binary,
        boxed,
        format,
        think_format,
        cosine,
        length,
        repetition,
        soft_overlong,
        speed,
        speed_penalty,
        tokens_per_step,
    )
}
