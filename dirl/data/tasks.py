"""A seed -> sums with their working, the procedural task of the embedded default, and a byte-level tokenizer for it.

The teacher is imperfect on purpose: in a demonstration each written intermediate result is wrong with some probability,
and the chain goes on from the wrong value. Imitation (SFT) learns the form and the teacher's error rate; only a reward
on the true answer (RL) can remove the errors.

    question       9+7+8=
    demonstration  9+7=16;16+8=24;\\boxed{24}
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dirl.data.chat import MASK_TOKEN, wrap_tokenizer
from dirl.data.problems import Problem
from dirl.data.rows import DataError
from dirl.data.word_sums import word_sums_demonstrations, word_sums_problems
from dirl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "heldout"]
NUM_TERMS = (3, 4)  # each the length of half of the questions
HELDOUT_PERCENT = 25  # of the 1000 + 10000 possible questions
MAX_ERROR = 1  # a wrong result is off by at most this, up or down, and never negative

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", MASK_TOKEN)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content -}}"
    "{%- if message.role == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def noisy_sums_demonstrations(num: int, seed: int, error_rate: float = 0.15) -> list[dict[str, str]]:
    """`num` rows {"prompt", "completion"} of the imperfect teacher, on training questions.

    Args:
        error_rate: probability that a written intermediate result is wrong.
    """
    if not 0.0 <= error_rate <= 1.0:
        raise UserError(f"error_rate must be a probability in [0, 1], got {error_rate}")
    rng = random.Random(f"noisy_sums demonstrations {seed}")
    return [
        {"prompt": _question(terms), "completion": _working(terms, rng, error_rate)}
        for terms in _draw_terms(num, rng, "train")
    ]


def noisy_sums_problems(num: int, seed: int, split: Split = "train") -> list[Problem]:
    """`num` questions with their true answers; held-out ones never repeat and never occur in training.

    Raises:
        DataError: an unknown split, or more held-out questions asked for than exist.
    """
    rng = random.Random(f"noisy_sums {split} {seed}")
    return [
        Problem(question=_question(terms), answer=str(sum(terms)), columns={"num_terms": len(terms)})
        for terms in _draw_terms(num, rng, split)
    ]


@dataclass(frozen=True)
class Task:
    """A procedural data set, named `task:NAME` where a data path is asked for."""

    problems: Callable[[int, int, Split], list[Problem]]  # (num, seed, split)
    demonstrations: Callable[[int, int], list[dict[str, str]]]  # (num, seed)
    num_train: int  # rows where the configuration sets no limit
    num_heldout: int


TASKS = {
    "noisy_sums": Task(
        problems=noisy_sums_problems, demonstrations=noisy_sums_demonstrations, num_train=4096, num_heldout=256
    ),
    "word_sums": Task(
        problems=word_sums_problems, demonstrations=word_sums_demonstrations, num_train=4096, num_heldout=256
    ),
}


def find_task(path: str) -> Task:
    """The task a data path `task:NAME` means."""
    name = path.removeprefix("task:")
    if name not in TASKS:
        raise DataError(f"unknown task {name!r} in the data path {path}; known tasks: {', '.join(TASKS)}")
    return TASKS[name]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 264 tokens that encodes any text; the mask token has the last id.

    `\\boxed{` is one ordinary token, so that a whole answer fits a few small blocks.
    """
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("\\boxed{", normalized=False)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return wrap_tokenizer(
        backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token=MASK_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _draw_terms(num: int, rng: random.Random, split: str) -> list[tuple[int, ...]]:
    """Terms of `num` questions in random order, half of each length; only training questions may repeat."""
    drawn: list[tuple[int, ...]] = []
    for index, num_terms in enumerate(NUM_TERMS):
        share = (num + index) // len(NUM_TERMS)
        pool = _pool(split, num_terms)
        if split == "train":
            drawn += rng.choices(pool, k=share)
            continue
        if share > len(pool):
            raise DataError(f"noisy_sums has {len(pool)} held-out sums of {num_terms} terms, {share} were asked for")
        drawn += rng.sample(pool, k=share)
    rng.shuffle(drawn)
    return drawn


@lru_cache
def _pool(split: str, num_terms: int) -> list[tuple[int, ...]]:
    """All questions of one split and length."""
    if split not in ("train", "heldout"):
        raise DataError(f"the task noisy_sums has the splits train and heldout, got {split!r}")
    return [
        terms for terms in product(range(10), repeat=num_terms) if _is_heldout(_question(terms)) == (split == "heldout")
    ]


def _is_heldout(question: str) -> bool:
    """Decided by the question alone, so that no seed, count or Python version can move one across."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELDOUT_PERCENT


def _question(terms: tuple[int, ...]) -> str:
    return "+".join(map(str, terms)) + "="


def _working(terms: tuple[int, ...], rng: random.Random, error_rate: float) -> str:
    """The teacher's chain: each step adds one term to the last written result, right or wrong."""
    written, steps = terms[0], []
    for term in terms[1:]:
        result = written + term
        if rng.random() < error_rate:
            result += rng.choice([error for error in range(-MAX_ERROR, MAX_ERROR + 1) if error and result + error >= 0])
        steps.append(f"{written}+{term}={result};")
        written = result
    return "".join(steps) + f"\\boxed{{{written}}}"
