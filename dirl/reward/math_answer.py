"""Completion text -> verdict: does its last boxed answer equal the gold answer?

Equal strings and whole numbers are decided here; everything else goes to math-verify in processes that can be killed:
SymPy on a model's output can run for ever or eat all memory (`9^{9^{9^9}}`), and math-verify's own time limit does not
hold, because SIGALRM reaches neither big-integer C code nor a thread.

An answer that names several candidates (`8=7`, `7 or 8`, `8 \\to 7`) is wrong for each of them, where math-verify by
default takes one: here the box is read as a whole or not at all, and the sides of a chain must agree.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

from dirl.boxed import extract_boxed, read_gold
from dirl.reward.answer_text import (
    decide_quickly,
    drop_fonts,
    drop_letter_unit,
    is_rounded,
    normalize_answer,
    split_choice,
    split_items,
)
from dirl.reward.killable_pool import KillablePool, Question

logger = logging.getLogger(__name__)
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that time limits are ours, as they are

Extraction = Literal["boxed", "text"]


class Verdict(str, enum.Enum):
    """What grading found. Only RIGHT is true; the others say why not."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"  # nothing, or nothing closed, in a box
    TOO_LONG = "too_long"
    UNPARSABLE_GOLD = "unparsable_gold"  # and the answer is not the identical text
    TIMEOUT = "timeout"
    CRASH = "crash"  # memory limit, or the interpreter itself died

    def __bool__(self) -> bool:
        return self is Verdict.RIGHT


def count_verdicts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How often each verdict was given, zeros included."""
    counts = Counter(verdicts)
    return {verdict.value: counts[verdict] for verdict in Verdict}


_SMALL_PRINT = re.compile(r"_(?:\{[^{}]*\}|[a-zA-Z0-9])|(?<=[a-zA-Z])\s*\([^()=]*\)")  # subscripts, arguments
_NAME = re.compile(r"\s*\\?[a-zA-Z]+(?:_\{[^{}]*\}|_[a-zA-Z0-9])?(?:\s*\([^()=]*\))?\s*")
_TOKEN = re.compile(
    r"(?P<equals>(?<![<>!]):?==?|\\(?:equiv|approx|simeq|cong|sim|doteq)(?![a-zA-Z]))"
    r"|(?P<item>[,;](?![0-9]{3}(?![0-9]))|\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))"
    r"|(?P<open>[(\[{])|(?P<close>[)\]}])"
)


@functools.lru_cache(maxsize=512)  # a group of completions shares its gold; sides of chains recur
def _parse_answer(answer: str) -> list[Any]:
    """SymPy objects (and the text itself, last) of one answer; only the text if it is no mathematics.

    Nothing but the answer as a whole is tried: by default math-verify would go on to look for any number inside it.
    """
    from math_verify import LatexExtractionConfig, parse

    whole = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    without_units = dataclasses.replace(whole.normalization_config, units=False)  # `drop_units` is stricter
    whole = dataclasses.replace(whole, normalization_config=without_units)
    parsed = parse(rf"\boxed{{{answer}}}", [whole], extraction_mode="first_match", parsing_timeout=None)
    name, equals, value = answer.rpartition("=")
    if _is_mathematics(parsed) or not equals or not _NAME.fullmatch(name):
        return parsed
    return _parse_answer(value)  # `m_{\max}=n^2`: the name is what cannot be parsed


_BROKEN_FORMULA = re.compile(r"(?<![$\\])\$\s*\n[^$]*\$(?!\$)")  # no formula where single dollars must be on one line


def _find_answer(text: str) -> str:
    """What math-verify takes for the answer in running text; "" without one."""
    from math_verify import parse
    from sympy import Number

    found = parse(drop_fonts(_BROKEN_FORMULA.sub(" ", text)), parsing_timeout=None)
    if not found:
        return ""
    return str(found[0] if isinstance(found[0], Number) else found[-1])  # the last one is a text, of the first find


def _is_mathematics(parsed: list[Any]) -> bool:
    return any(not isinstance(item, str) for item in parsed)


def _is_equal(gold: list[Any], answer: list[Any]) -> bool:
    from math_verify import verify

    return bool(verify(gold, answer, timeout_seconds=None))  # asymmetric: gold first


def _has_false_chain(gold: str, answer: str) -> bool:
    """Whether sides of an `=` chain in the answer contradict each other: `8=7`, `x=8=7`; not `x=7`, `10^3=1000`.

    A gold that is itself a chain is compared as a whole by math-verify.
    """
    num_gold_equals = sum(token.lastgroup == "equals" for token in _find_tokens(gold))
    if num_gold_equals > 1:
        return False
    chains = _split_chains(answer)
    if chains is None:
        return num_gold_equals == 0
    is_gold_equation = num_gold_equals == 1
    return any(_contradicts(side, last, is_gold_equation=is_gold_equation) for *sides, last in chains for side in sides)


def _find_tokens(answer: str) -> Iterator[re.Match[str]]:
    """Relations, separators and brackets, except in subscripts and in the arguments of functions."""
    return _TOKEN.finditer(_SMALL_PRINT.sub(lambda match: "_" * len(match[0]), answer))


def _split_chains(answer: str) -> list[list[str]] | None:
    """The sides of each relation: `x=1, y=z=2` -> [[x, 1], [y, z, 2]]; None where one stands inside brackets."""
    chains: list[list[str]] = [[]]
    depth = start = 0
    for token in _find_tokens(answer):
        depth += (token.lastgroup == "open") - (token.lastgroup == "close")
        if token.lastgroup == "equals" and depth > 0:
            return None
        if token.lastgroup in ("equals", "item") and depth <= 0:
            chains[-1].append(answer[start : token.start()])
            start = token.end()
            chains += [[]] if token.lastgroup == "item" else []
    chains[-1].append(answer[start:])
    return chains


def _contradicts(side: str, last: str, *, is_gold_equation: bool) -> bool:
    """Whether a side of a chain is meant to equal the last one, rather than to name what is found, and does not.

    A side such as `2x` is so meant unless the gold is an equation: `2x=7` is no way to say 7. Degrees are left alone:
    math-verify reads them as plain numbers.
    """
    if not side.strip() or _NAME.fullmatch(side) or r"\circ" in side:
        return False
    parsed, value = _parse_answer(side), _parse_answer(last)
    if not is_gold_equation and re.match(r"[-+ ]*\.?[0-9]", side):
        is_value = True
    elif _is_mathematics(parsed) and _is_mathematics(value):
        symbols, allowed = (getattr(item[0], "free_symbols", None) for item in (parsed, value))
        is_value = symbols is not None and allowed is not None and symbols <= allowed
    else:
        is_value = re.search("[0-9]", side) is not None
    return is_value and not _is_equal(value, parsed)


def _is_close(gold: Any, answer: Any) -> bool:
    """Whether what math-verify calls equal has equal numbers, relative to their size: it rounds to six decimals.

    Expressions are compared at one point, containers item by item; what has no value is left to math-verify.
    """
    from sympy import Expr, Float, MatrixBase, N, Rational, Set, Tuple

    if isinstance(gold, Expr) and isinstance(answer, Expr):
        point = {symbol: Rational(17 + len(str(symbol)), 13) for symbol in gold.free_symbols | answer.free_symbols}
        first, second = (N(expression.subs(point), 30) for expression in (gold, answer))
        if not (first.is_number and second.is_number and first.is_finite and second.is_finite):
            return True
        tolerance = 1e-6 if gold.has(Float) or answer.has(Float) else 1e-15
        return bool(abs(first - second) <= tolerance * max(abs(first), abs(second)))
    if type(gold) is not type(answer) or not isinstance(gold, MatrixBase | Set | Tuple):
        return True
    golds, answers = (list(item) if isinstance(item, MatrixBase) else list(item.args) for item in (gold, answer))
    return len(golds) != len(answers) or all(_is_close(*pair) for pair in zip(golds, answers, strict=True))


def _is_rounded(gold: str, answer: str) -> bool:
    """Whether one is a decimal number and the other, which no decimal number equals, rounds to it."""
    from sympy import Expr, Float, N

    for decimal, other in ((answer, gold), (gold, answer)):
        value = _parse_answer(other)[0]
        if not isinstance(value, Expr) or value.free_symbols or value.has(Float):
            continue
        number = N(value, 30)
        if number.is_Float and not _is_finite_decimal(value) and is_rounded(decimal, Fraction(str(number))):
            return True
    return False


def _is_finite_decimal(value: Any) -> bool:
    return bool(value.is_Rational) and 10**400 % int(value.q) == 0


def judge(gold: str, answer: str) -> Verdict:
    """The verdict on two normalised answers. May never return."""
    quick = decide_quickly(gold, answer)
    if quick is not None:
        return Verdict.RIGHT if quick else Verdict.WRONG
    (gold_letter, gold_text), (letter, text) = split_choice(gold), split_choice(answer)
    if gold_letter and letter and not (gold_text and text and gold_letter == letter):
        return Verdict.RIGHT if gold_letter == letter else Verdict.WRONG
    if gold_text and text and (gold_letter or letter):
        return judge(gold_text, text)
    return judge_by_algebra(gold, drop_letter_unit(gold, answer))


def judge_by_algebra(gold: str, answer: str) -> Verdict:
    parsed_gold, parsed_answer = _parse_answer(gold), _parse_answer(answer)
    is_mathematics = _is_mathematics(parsed_gold)
    if _is_equal(parsed_gold, parsed_answer):
        if is_mathematics and _is_mathematics(parsed_answer) and not _is_close(parsed_gold[0], parsed_answer[0]):
            return Verdict.WRONG
        return Verdict.WRONG if _has_false_chain(gold, answer) else Verdict.RIGHT
    if is_mathematics and _is_mathematics(parsed_answer) and _is_rounded(gold, answer):
        return Verdict.RIGHT
    golds, answers = split_items(gold), split_items(answer)
    if golds and answers and golds[0] == answers[0] and len(golds[1]) == len(answers[1]):
        pairs = zip(golds[1], answers[1], strict=True)
        return Verdict.RIGHT if all(judge(*pair) for pair in pairs) else Verdict.WRONG
    return Verdict.WRONG if is_mathematics else Verdict.UNPARSABLE_GOLD


# A parser of many states learns them as it goes: these forms cover most.
WARM_UP = (
    r"f_{a}(\nu)=A \frac{R_{a}^{2}}{\sqrt{c}} \frac{2 \pi}{c^{2}} \nu^{2} \left(x\right) e^{\frac{-h \nu}{ k_{B} T}}",
    *(r"\{1, 2\} \cup (0, \infty)", "x = 5"),
)


def load_judge() -> Callable[[str, str, Extraction], str]:
    """What a worker process calls once: import SymPy and math-verify, and make their parser and caches warm."""
    for answer in WARM_UP:
        judge_by_algebra(answer, answer + " + 0")

    def judge_text(gold: str, answer: str, extraction: Extraction) -> str:
        if extraction == "text":
            answer = normalize_answer(_find_answer(answer))
        return judge(gold, answer).value if answer else Verdict.NO_ANSWER.value

    return judge_text


class MathGrader:
    """Grades batches of completions against golds; use it as a context manager, or `close` it.

    Args:
        num_workers: processes; 0 takes one per usable core, at most 4. None starts before an answer needs algebra.
        timeout_seconds: CPU time per answer; real ones take 0.01 s, the slowest of 10,000 took 0.2 s.
        memory_limit_mb: address space per process; an idle one has 60.
        max_answer_chars: a longer boxed answer is wrong unread; in `text` mode, the last so many are read.
        extraction: `boxed` takes the last box and nothing else; `text` lets math-verify look for an answer anywhere.
    """

    def __init__(
        self,
        *,
        num_workers: int = 0,
        timeout_seconds: float = 1.5,
        memory_limit_mb: int = 1024,
        max_answer_chars: int = 2000,
        extraction: Extraction = "boxed",
    ) -> None:
        self.max_answer_chars = max_answer_chars
        self.extraction = extraction
        self._reported_golds: set[str] = set()
        self._pool = KillablePool(
            entry=f"{__name__}:load_judge",
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            memory_limit_mb=memory_limit_mb,
        )

    def grade(self, golds: Sequence[str], completions: Sequence[str]) -> list[Verdict]:
        """One verdict per completion, in order.

        Raises:
            ValueError: the lengths differ.
            RuntimeError: no worker process could be started.
        """
        if len(golds) != len(completions):
            raise ValueError(
                f"every completion needs a gold, got {len(golds)} golds for {len(completions)} completions"
            )
        triaged = [self._triage(gold, completion) for gold, completion in zip(golds, completions, strict=True)]
        answers = self._pool.ask([item for item in triaged if not isinstance(item, Verdict)])
        verdicts = [item if isinstance(item, Verdict) else Verdict(answers[item]) for item in triaged]
        self._report_golds(golds, verdicts)
        return verdicts

    def close(self) -> None:
        """End the workers. A later `grade` starts new ones."""
        self._pool.close()

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _triage(self, gold: str, completion: str) -> Verdict | Question:
        """A verdict where no algebra is needed, else the question for a worker."""
        gold = normalize_answer(read_gold(gold))
        if self.extraction == "text":
            return gold, completion[-self.max_answer_chars :], "text"
        boxed = extract_boxed(completion)
        if boxed is not None and len(boxed) > self.max_answer_chars:
            return Verdict.TOO_LONG
        answer = normalize_answer(boxed or "")
        if not answer:
            return Verdict.NO_ANSWER
        is_right = decide_quickly(gold, answer)
        if is_right is None:
            return gold, answer, "boxed"
        return Verdict.RIGHT if is_right else Verdict.WRONG

    def _report_golds(self, golds: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        for row, (gold, verdict) in enumerate(zip(golds, verdicts, strict=True)):
            if verdict is Verdict.UNPARSABLE_GOLD and gold not in self._reported_golds:
                self._reported_golds.add(gold)
                logger.warning("row %d: gold answer %r cannot be parsed; only the same text is right", row, gold[:200])
