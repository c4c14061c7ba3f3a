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
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal

from dirl.reward.killable_pool import KillablePool, Question

logger = logging.getLogger(__name__)

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


# `\\` before `boxed` is a doubled escape, not a line break: data sets hold `\\boxed{7}` that went through JSON twice.
_BRACE = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\\\(?!boxed|fbox)|\\[{}]|(?P<open>\{)|(?P<close>\})")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last closed \boxed{...} or \fbox{...} (the outermost, when nested); None without one."""
    opened: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    content = None
    for token in _BRACE.finditer(text):
        if token.lastgroup == "close":
            if opened:
                is_box, start = opened.pop()
                content = text[start : token.start()] if is_box else content
        elif token.lastgroup:
            opened.append((token.lastgroup == "box", token.end()))
    return content


# NFKC would make `x2` of a superscript, so these become LaTeX first; the others are signs that NFKC leaves alone.
_SIGNS = {"\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u2044": "/"}
_SIGNS |= {"\u221e": r"\infty ", "\u222a": r"\cup ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne "}
_SIGNS |= {"\u03c0": r"\pi ", "\u00f7": r"\div ", "\u00b0": r"^\circ ", "\u2248": r"\approx ", "\u2261": r"\equiv "}
_SCRIPTS = {"<super>": "^{{{}}}", "<sub>": "_{{{}}}"}

_MATH_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]|\\(?:boxed|fbox)(?=\s*\{)|\\!|^\s*(?:\\approx|=)(?![a-zA-Z])")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)\s*(?=[0-9]{3}(?![0-9]))")
_FRACTION_OF_PI = re.compile(r"(\\[dtc]?frac)\s*\\pi(?![a-zA-Z])")  # math-verify reads `\frac\pi2` as \frac{\}{p}i2


def _fold_character(character: str) -> str:
    """One character -> what it means in ASCII LaTeX, as far as Unicode says."""
    if character in _SIGNS:
        return _SIGNS[character]
    kind, _, _ = unicodedata.decomposition(character).partition(" ")
    folded = unicodedata.normalize("NFKC", character)
    if kind in _SCRIPTS:
        return _SCRIPTS[kind].format(folded)
    if kind == "<fraction>" and not folded.endswith("\u2044"):
        return r"\frac{{{}}}{{{}}}".format(*folded.split("\u2044"))
    category = unicodedata.category(character)
    if category == "Cf":  # zero-width and direction marks
        return ""
    if category == "Cc":  # NUL, tab, line feed
        return " "
    return str(unicodedata.decimal(character)) if category == "Nd" else folded


def normalize_answer(answer: str) -> str:
    """An answer without what does not change its meaning: Unicode variants, delimiters, spacing, a final full stop."""
    folded = "".join(character if " " <= character <= "~" else _fold_character(character) for character in answer)
    bare = _MATH_DELIMITERS.sub("", _THOUSANDS.sub("", folded))
    braced = _FRACTION_OF_PI.sub(r"\1{\\pi}", bare)
    return " ".join(braced.split()).lstrip(" ,;").rstrip(" .,;\\")


_RATIONAL = re.compile(
    r"(?P<whole>[-+]?[0-9]{1,300}|-?[1-9][0-9]{0,2}(?:,[0-9]{3}){1,99})"
    r"|(?P<minus>-?)(?:\\[dtc]?frac\{(?P<top>-?[0-9]{1,300})\}\{(?P<bottom>-?[0-9]{1,300})\}"
    r"|(?P<over>[0-9]{1,300})/(?P<under>[0-9]{1,300}))"
)


def _read_rational(answer: str) -> Fraction | None:
    """The value of a whole number or of a plain fraction; None for anything else."""
    match = _RATIONAL.fullmatch(answer)
    if match is None:
        return None
    if match["whole"]:
        return Fraction(match["whole"].replace(",", ""))
    bottom = int(match["bottom"] or match["under"])
    value = Fraction(int(match["top"] or match["over"]), bottom) if bottom else None
    return -value if value and match["minus"] else value


def decide_quickly(gold: str, answer: str) -> Verdict | None:
    """The verdict on normalised texts where no algebra is needed, else None. Agrees with `judge` wherever it speaks."""
    if gold == answer:
        return Verdict.RIGHT
    gold_value, answer_value = _read_rational(gold), _read_rational(answer)
    if gold_value is None or answer_value is None:
        return None
    return Verdict.RIGHT if gold_value == answer_value else Verdict.WRONG


_SMALL_PRINT = re.compile(r"_(?:\{[^{}]*\}|[a-zA-Z0-9])|(?<=[a-zA-Z])\s*\([^()=]*\)")  # subscripts, arguments
_NAME = re.compile(r"\s*\\?[a-zA-Z]+(?:_\{[^{}]*\}|_[a-zA-Z0-9])?(?:\s*\([^()=]*\))?\s*")
_TOKEN = re.compile(
    r"(?P<equals>(?<![<>!]):?==?|\\(?:equiv|approx|simeq|cong|sim|doteq)(?![a-zA-Z]))"
    r"|(?P<item>[,;](?![0-9]{3}(?![0-9]))|\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z]))"
    r"|(?P<open>[(\[{])|(?P<close>[)\]}])"
)
_LONE_LETTER = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]$")  # `6m`, `a+b+c`: a variable, which math-verify takes for a unit
_WORDS_INSIDE = re.compile(r"\\(?:text|mbox)\s*\{[^{}]*\}\s*[0-9\\]")  # math-verify drops all after them as a unit


@functools.lru_cache(maxsize=512)  # a group of completions shares its gold; sides of chains recur
def _parse_answer(answer: str, *, has_units: bool = True) -> list[Any]:
    """SymPy objects (and the text itself, last) of one answer; only the text if it is no mathematics.

    Nothing but the answer as a whole is tried: by default math-verify would go on to look for any number inside it.
    """
    from math_verify import LatexExtractionConfig, parse

    whole = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    normalization = dataclasses.replace(
        whole.normalization_config, units=has_units and not _WORDS_INSIDE.search(answer)
    )
    whole = dataclasses.replace(whole, normalization_config=normalization)
    parsed = parse(rf"\boxed{{{answer}}}", [whole], extraction_mode="first_match", parsing_timeout=None)
    name, equals, value = answer.rpartition("=")
    if _is_mathematics(parsed) or not equals or not _NAME.fullmatch(name):
        return parsed
    return _parse_answer(value, has_units=has_units)  # `m_{\max}=n^2`: the name is what cannot be parsed


def _parse_text(text: str) -> list[Any]:
    """SymPy objects of what math-verify takes for the answer in running text, and that text itself, last."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)


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


def judge(gold: str, answer: str, extraction: Extraction) -> Verdict:
    """The verdict on two normalised answers, or on two raw texts for `text`. May never return."""
    if extraction == "boxed":
        has_units = not _LONE_LETTER.search(gold)
        parsed_gold, parsed_answer = (_parse_answer(text, has_units=has_units) for text in (gold, answer))
    else:
        parsed_gold, parsed_answer = _parse_text(gold), _parse_text(answer)
    if not _is_equal(parsed_gold, parsed_answer):
        return Verdict.WRONG if _is_mathematics(parsed_gold) else Verdict.UNPARSABLE_GOLD
    if gold == answer:
        return Verdict.RIGHT
    if extraction == "text":
        gold, answer = str(parsed_gold[-1]), str(parsed_answer[-1])
    return Verdict.WRONG if _has_false_chain(gold, answer) else Verdict.RIGHT


def load_judge() -> Callable[[str, str, Extraction], str]:
    """What a worker process calls once: import SymPy and math-verify before its limits are set."""
    import math_verify  # noqa: F401

    return lambda gold, answer, extraction: judge(gold, answer, extraction).value


class MathGrader:
    """Grades batches of completions against golds; use it as a context manager, or `close` it.

    Args:
        num_workers: processes; 0 takes one per usable core, at most 4. None starts before an answer needs algebra.
        timeout_seconds: wall clock per answer; real ones take 0.01 s, the slowest of 10,000 took 0.2 s.
        memory_limit_mb: address space per process; an idle one has 60.
        max_answer_chars: a longer boxed answer is wrong unread; in `text` mode, the last so many are read.
        extraction: `boxed` takes the last box and nothing else; `text` lets math-verify look for an answer anywhere.
    """

    def __init__(
        self,
        *,
        num_workers: int = 0,
        timeout_seconds: float = 3.0,
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
        if self.extraction == "text":
            return gold, completion[-self.max_answer_chars :], "text"
        boxed_gold = extract_boxed(gold)
        gold = normalize_answer(gold if boxed_gold is None else boxed_gold)
        boxed = extract_boxed(completion)
        if boxed is not None and len(boxed) > self.max_answer_chars:
            return Verdict.TOO_LONG
        answer = normalize_answer(boxed or "")
        if not answer:
            return Verdict.NO_ANSWER
        verdict = decide_quickly(gold, answer)
        return (gold, answer, "boxed") if verdict is None else verdict

    def _report_golds(self, golds: Sequence[str], verdicts: Sequence[Verdict]) -> None:
        for row, (gold, verdict) in enumerate(zip(golds, verdicts, strict=True)):
            if verdict is Verdict.UNPARSABLE_GOLD and gold not in self._reported_golds:
                self._reported_golds.add(gold)
                logger.warning("row %d: gold answer %r cannot be parsed; only the same text is right", row, gold[:200])
