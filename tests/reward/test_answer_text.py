"""Ways of writing an answer: those that mean the same, and those that do not, each by the grader's own judge."""

from __future__ import annotations

import pytest

from dirl.boxed import read_gold
from dirl.data.problems import problem_from_row
from dirl.reward import MathGrader
from dirl.reward.answer_text import RULES, normalize_answer
from dirl.reward.math_answer import Verdict, judge


def is_right(gold: str, answer: str) -> bool:
    return bool(judge(normalize_answer(read_gold(gold)), normalize_answer(answer)))


SAME = {
    "units and words after a number": [
        *[("8", f"8 {words}") for words in ("people", "people.", "square feet", "cm^2", "km/h", "dollars per hour")],
        *[("8", rf"8{unit}") for unit in (r"\text{ cm}^2", r"~\text{people}", r"\ \mathrm{m/s}", " m", r"\text{ any}")],
        *[("8 people", "8"), (r"\text{8 people}", "8"), ("3", "x = 3 apples"), ("90^\\circ", "90 degrees")],
        *[("20", r"20^\circ C"), ("20", r"20^{\circ}\text{C}"), (r"\frac{1}{2}", r"\frac{1}{2} \text{ cup}")],
        *[("5\\sqrt{2}", "5\\sqrt{2} units"), ("10\\pi", "10\\pi square inches"), ("10\\pi", "10pi cm^2")],
    ],
    "currencies": [("8", "$8 dollars"), ("8", "USD 8"), ("8", "\u20ac8"), ("45", r"\$45.00"), (r"\$1,\!657", "1657")],
    "thousands": [
        *[
            ("1000", f"1{mark}000")
            for mark in (r"\,", " ", "'", "~", r"\ ", "{,}", r",\!", "\u2009", "\u202f", r"{\,}")
        ],
        *[("1234567", r"1\,234\,567"), ("1,234,567", "1 234 567"), ("1000.5", r"1\,000.5")],
    ],
    "scales": [("2000000", "2 million"), ("2000000", r"2 \text{ million dollars}"), ("3500", "3.5 thousand")],
    "plain functions": [
        *[(r"\frac{\pi}{2}", "pi/2"), (r"\sqrt{2}", "sqrt(2)"), (r"2\sqrt{3}", "2*sqrt(3)"), ("x^2", "x**2")],
        *[(r"\frac{\sqrt{2}}{2}", "sqrt(2)/2"), (r"\ln 2", "ln(2)"), ("e^2", "exp(2)"), ("[0,\\infty)", "[0, inf)")],
        *[(r"\sqrt{x+(y-1)}", "sqrt(x + (y - 1))"), (r"1-\sqrt{2}", "1 - sqrt2")],
    ],
    "choice letters": [
        *[("B", answer) for answer in (r"\textbf{(B)}\ 5", "(B) 5", "B. 5", r"\text{B}", r"\mathbf{(B)}", "(B)")],
        *[("5", r"\textbf{(B)}\ 5"), (r"\textbf{(B)}\ 5", "B"), (r"\textbf{(B)}\ 5", "(B) 5"), ("(B) 5", "5")],
    ],
    "bases": [
        ("2516_8", "2516_{8}"),
        ("110111", "110111_2"),
        ("25", "25_{10}"),
        ("11_2", "11 base 2"),
        ("52_8", r"x = \left(52_8\right)"),
    ],
    "small and scientific": [
        *[("0.0000001", "1e-07"), ("0.0000001", "10^{-7}"), ("1500", "1.5e3"), ("6.02e23", r"6.02 \times 10^{23}")],
        ("1e-10", r"\frac{1}{10^{10}}"),
    ],
    "roundings": [(r"\frac{8}{3}", "2.6667"), ("(3/5,8/3]", "(0.6,2.6667]"), (r"\cos^{10}(\frac{\pi}{10})", "0.6054")],
    "lists": [("1,-2", "-2, 1"), ("3, 5, 7", "7, 5, 3"), ("x=1, y=2 or x=3, y=4", "x=1,y=2;x=3,y=4")],
    "fonts and escapes": [(r"1-\frac{1}{\mathrm{e}}", r"1-\frac{1}{e}"), (r"\\frac{1}{2}", r"\frac{1}{2}")],
    "percent": [("28\\%", "28 percent"), ("28", r"28\text{ pct}")],
}
DIFFERENT = {
    "tiny values": [
        *[(r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), ("10^{-8}", "10^{-9}"), ("1e-7", "2e-7")],
        *[(r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"), ("(10^{-8},1)", "(10^{-9},1)"), ("0.0000001", "0.0000002")],
    ],
    "bases": [("10_2", "10_3"), ("10_2", "10"), ("10_2", "2"), ("10", "1010_2")],
    "choices": [("B", r"\textbf{(C)}\ 5"), ("B", "(B) 5 or (C) 6"), ("(B) 5", "(B) 6"), ("A", r"(A) \cup B")],
    "no units": [
        *[("8", "8 or so"), ("8", "8 not 7"), ("8", "8 dozen"), ("6m", "6"), ("0.64N", "0.64"), ("10", "10x")],
        *[("3", "3 feet 2 inches"), ("2", "2 million"), (r"\text{13}", "13"), ("8", "8 xy")],
    ],
    "roundings": [
        *[("5", "5.001"), ("10000", "9999.9999"), ("1000000", "1000000.5"), ("16386.17", "16386.2")],
        *[("3.14", r"\pi"), ("1/3", "0.33"), ("123456", "1.2346e5"), ("0.1", "0.10001"), ("2.23", "2.232")],
    ],
    "lists": [("10, 4, -2", "4, 10, -2"), ("(1, 2)", "(2, 1)"), ("1, 200", "1200"), ("0.1, 4, 2", "4, .1, 2")],
    "parts": [(r"1 - \sqrt{2}", "1"), ("2k+2", "2"), (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}")],
}


@pytest.mark.parametrize("kind", SAME)
def test_ways_of_writing_the_same(kind: str) -> None:
    assert [pair for pair in SAME[kind] if not is_right(*pair)] == []


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_looks_alike_and_is_not(kind: str) -> None:
    assert [pair for pair in DIFFERENT[kind] if is_right(*pair)] == []


def test_every_rule_is_stable_and_linear() -> None:
    """What is normalised stays as it is, and no rule hangs on what a model repeats."""
    for pairs in (*SAME.values(), *DIFFERENT.values()):
        for text in {text for pair in pairs for text in pair}:
            assert normalize_answer(normalize_answer(text)) == normalize_answer(text)
    for piece in ("1 000 ", "sqrt(", "(", r"\text{", " cm", "10^", "1e", r"\\", "B) ", "and ", "million ", "/", "_2"):
        for rule in RULES:
            rule(piece * (2000 // len(piece)))


@pytest.mark.parametrize("extraction", ["boxed", "text"])
@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [(r"1 - \sqrt{2}", r"1-\sqrt{2}", "1"), ("2k+2", "2+2k", "2"), ("so it is 5 + 5.\n#### 10", "10", "5")],
)
def test_a_gold_is_read_as_a_whole(extraction: str, gold: str, right: str, wrong: str) -> None:
    with MathGrader(num_workers=1, extraction=extraction) as grader:  # type: ignore[arg-type]
        texts = [rf"It is \boxed{{{right}}}", rf"It is \boxed{{{wrong}}}"]
        assert grader.grade([gold] * 2, texts) == [Verdict.RIGHT, Verdict.WRONG]


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"prompt": "q", "answer": "2 * 5 = 10\n#### 10"}, "10"),
        ({"question": "q", "ground_truth_answer": "10 * 100\n#### 1,000"}, "1000"),
        ({"prompt": "q", "solution": r"so it is $\boxed 5$."}, "5"),
        ({"prompt": "q", "answer": r"the sum is \boxed{\frac{1}{2}}. Done."}, r"\frac{1}{2}"),
        ({"question": "q", "ground_truth_answer": 0.0000001}, "0.0000001"),
        ({"question": "q", "ground_truth_answer": 1.5e-9}, "0.0000000015"),
        ({"prompt": "q", "answer": r"\boxed{2} and \boxed{3}"}, "2, 3"),
        ({"prompt": "q", "answer": r"\boxed{2}. But then \boxed{3}"}, "3"),
    ],
)
def test_golds_of_worked_solutions(row: dict[str, object], gold: str) -> None:
    assert problem_from_row(row).answer == gold
