"""Extraction, fast path, hedges, hostile input: the grader against answers whose verdict a person can see."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest

from dirl.reward import MathGrader, Verdict, extract_boxed
from dirl.reward.answer_text import decide_quickly, normalize_answer
from dirl.reward.math_answer import count_verdicts, judge_by_algebra

RIGHT, WRONG = Verdict.RIGHT, Verdict.WRONG


def box(answer: str) -> str:
    return rf"Some reasoning about \frac{{1}}{{2}}. So \boxed{{{answer}}}."


def grade_one(grader: MathGrader, gold: str, answer: str) -> Verdict:
    return grader.grade([gold], [box(answer)])[0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"first \boxed{3}, then \boxed{7}, done", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{3} \fbox{7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"a stray } and { before \boxed{7}", "7"),
        (r"\boxed{8 \text{ or } \boxed{7}}", r"8 \text{ or } \boxed{7}"),
        (r"cut off: \boxed{3} so \boxed{7", "3"),
        (r"cut off outside: \boxed{x = \boxed{7}", "7"),
        (r"twice through JSON: \\boxed{7}", "7"),
        (r"a line break \\\boxed{7}", "7"),
        (r"\begin{cases}\\{a}\end{cases} \boxed{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7", None),
        (r"\boxed 7", None),
        (r"boxed{7}", None),
        (r"\boxedx{7}", None),
        ("no answer", None),
        ("", None),
    ],
)
def test_extract_boxed(text: str, answer: str | None) -> None:
    assert extract_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("\uff17\uff0e\uff15", "7.5"),  # full width
        ("\u200b7\ufeff\u2060", "7"),  # zero width
        ("7\0", "7"),
        ("\u22127", "-7"),
        ("5\u00b2", "5^{2}"),
        ("x\u2081", "x_{1}"),
        ("1\u00bd", r"1\frac{1}{2}"),
        ("\U0001d7d5", "7"),  # mathematical bold
        ("\u0667", "7"),  # Arabic-Indic
        (" $ 7 $ . ", "7"),
        (r"\( x \)", "x"),
        (r"\$10,\!000", "10000"),
        ("14{,}916", "14916"),
        ("(1,\\,200)", "(1,\\,200)"),
        (r"\boxed{7}", "{7}"),
        (r"\approx 8.24", "8.24"),
        (".5", "0.5"),
        (r"\begin{matrix}1\\[2pt] 2\end{matrix}", r"\begin{matrix}1\\[2pt] 2\end{matrix}"),
    ],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("0.5", r"\frac{1}{2}", RIGHT),
        ("1/2", r"\dfrac{1}{2}", RIGHT),
        (r"\frac\pi2", r"\frac{\pi}{2}", RIGHT),
        (r"m_{\max }=n^{2}-n-1", "n^2-n-1", RIGHT),
        (r"\text{Evelyn}", "Evelyn", RIGHT),
        ("B", r"\text{(B)}", RIGHT),
        ("B", r"\text{(C)}", WRONG),
        ("(1, 2)", "(2, 1)", WRONG),
        (r"\{1, 2\}", r"\{2, 1\}", RIGHT),
        ("1, -1", r"x = 1 \text{ or } x = -1", RIGHT),
        (r"\pm 3", r"3 \text{ or } -3", RIGHT),
        (r"\pm 3", "3", WRONG),
        ("10", r"10 \text{ cm}", RIGHT),
        ("6m", "6", WRONG),  # the gold's m is a variable
        ("a+b-2c", "a+b-2", WRONG),
        ("x+1", "1 + x", RIGHT),
        ("-1", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}.", WRONG),
        ("5", "x = 5", RIGHT),
        ("7", "\uff17", RIGHT),
        ("25", "5\u00b2", RIGHT),
        ("2", "I am sure that it is 2 or so", WRONG),
        ("x \\in [0, 1]", "[0,1]", RIGHT),
    ],
)
def test_verdicts(grader: MathGrader, gold: str, answer: str, verdict: Verdict) -> None:
    assert grade_one(grader, gold, answer) is verdict


# Each names 7 and 8, or says 7 by an equation that 7 does not solve; math-verify alone takes one of the two for many.
HEDGES = r"""
8=7 | 7=8 | x=8=7 | 8=7=x | 8 = 7, | (8=7) | \frac{8=7}{1} | 8&=7 | 8:=7 | 8==7 | 8 \equiv 7 | 8 \approx 7
x = 8 \cong 7 | 8 \not= 7 | 8 \ne 7 | 8<7 | 2x=7 | 8 \text{cm} = 7 | x=7,x=8 | 7 or 8 | either 7 or 8
7 \text{ or } 8 | 7 (or 8) | \text{7 or 8} | 7 \lor 8 | 7 \vee 8 | 8 \land 7 | 7 \mid 8 | 7 \to 8 | 8 \implies 7
8 \Rightarrow 7 | 8 \iff 7 | 8 \mapsto 7 | 7, 8 | 7;8 | 7 \quad 8 | 7\ 8 | 7\\8 | 7?8 | 7/8 | 7 \pm 1 | [7, 8]
\{7, 8\} | 7 \text{ and } 8 | 7 \text{ not } 8 | 7 \parallel 8 | 7 \ldots 8 | 7 \oplus 8
\boxed{8} \text{ or } \boxed{7}
"""


def test_an_answer_that_names_two_candidates_is_wrong_for_both(grader: MathGrader) -> None:
    hedges = [*re.split(r" \| |\n", HEDGES.strip()), "8 \u2192 7", "\uff18\uff1d\uff17"]
    cases = list(product(("7", "8"), hedges))
    verdicts = grader.grade([gold for gold, _ in cases], [box(hedge) for _, hedge in cases])
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if verdict is not WRONG] == []


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{2}{3}", r"\frac{1}{2} = \frac{2}{3}"),
        (r"\frac{2}{3}", r"\frac{1}{2} \to x = \frac{2}{3}"),
        ("[0,2]", "[0,1] = [0,2]"),
        ("x-1", "x+1 = x-1"),
        (r"\sqrt{3}", r"x = \sqrt{2} = \sqrt{3}"),
        (r"\frac{1}{2}", r"\frac{1}{2} \text{but} \frac{2}{3}"),
        ("3", r"3 \text{ feet } 2 \text{ inches}"),
    ],
)
def test_so_is_one_that_names_other_things_than_numbers(grader: MathGrader, gold: str, answer: str) -> None:
    assert grade_one(grader, gold, answer) is WRONG


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1000", "10^3 = 1000"),
        ("11", r"x \approx 11"),
        ("10", r"\binom{5}{2} = 10"),
        (r"\frac{1}{4}", r"P(A \text{ and } B) = \frac14"),
        ("3", r"f(2, 1) = 3"),
        ("x^2+y^2=1", "1-x^2-y^2=0"),
        ("1", r"\lim_{x \to 0} \frac{\sin x}{x} = 1"),
        ("5", r"\sum_{i=1}^{5} 1 = 5"),
        ("(3,2)", "(p,q)=(3,2)"),
        (r"\frac12", r"\sin 30^\circ = \frac12"),
        ("x^2-1", "f(x) = (x-1)(x+1) = x^2-1"),
        ("7", "S_{ABC} = 7"),
        ("y=2x+1", "2x - y + 1 = 0"),
        ("x=1, y=2", "x=1, y=2"),
    ],
)
def test_honest_equations_are_right(grader: MathGrader, gold: str, answer: str) -> None:
    assert grade_one(grader, gold, answer) is RIGHT


NUMBERS = [
    *("0", "-0", "+7", "7", "007", "-7", "8", "1000", "1,000", "-1,000", "10,100", "10100", "1,234,567", "1234567"),
    *("1/2", "2/4", "-1/2", r"\frac{1}{2}", r"\dfrac{2}{4}", r"-\frac{1}{2}", r"\frac{-1}{2}", r"\frac{1}{-2}"),
    *(r"-\frac{-1}{2}", "14/2", r"\frac{7}{1}", r"\frac{0}{3}", "12345678901234567890", "0012", "1/3"),
]


def value_of(number: str) -> Fraction:
    """By Python's own reading, after LaTeX has been rewritten as a/b."""
    top, _, bottom = (
        number.replace(",", "").replace(r"\d", "\\").replace(r"\frac{", "").replace("}{", "/").partition("/")
    )
    return Fraction(top.replace("--", "")) / Fraction(bottom.rstrip("}") or "1")


def test_the_fast_path_says_what_the_value_and_the_slow_path_say() -> None:
    pairs = [(gold, answer) for gold, answer in product(NUMBERS, NUMBERS) if gold != answer]
    for gold, answer in pairs:
        fast = decide_quickly(gold, answer)
        assert fast is (value_of(gold) == value_of(answer)), (gold, answer)
        assert bool(judge_by_algebra(gold, answer)) is fast, (gold, answer)


@pytest.mark.parametrize(
    "answer", ["1.0", "1/0", r"\frac{1}{0}", "0,001", "12,34", "1,0000", "1 000", "x", "1e3", "\u0661"]
)
def test_the_fast_path_is_silent_on_everything_else(answer: str) -> None:
    assert decide_quickly("1", answer) is None


def test_no_process_is_started_for_plain_numbers() -> None:
    with MathGrader() as grader:
        assert grader.grade(["7", "7"], [box("7"), box("8")]) == [RIGHT, WRONG]
        assert grader._pool._children == []


def test_verdicts_are_true_only_when_right_and_are_counted() -> None:
    assert [verdict for verdict in Verdict if verdict] == [RIGHT]
    counts = count_verdicts([WRONG, RIGHT, WRONG])
    assert counts.pop("wrong") == 2 and counts.pop("right") == 1
    assert counts == {"no_answer": 0, "too_long": 0, "unparsable_gold": 0, "timeout": 0, "crash": 0}


def test_a_gold_that_cannot_be_parsed_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    with MathGrader(num_workers=1) as grader, caplog.at_level(logging.WARNING):
        golds = ["1/2", "$t(0,4]$", "$t(0,4]$"]
        assert grader.grade(golds, [box("0.5"), box("(0,4]"), box("t(0,4]")]) == [RIGHT, Verdict.UNPARSABLE_GOLD, RIGHT]
        grader.grade(golds, [box("0.5"), box("(0,5]"), box("4")])
    assert [record.getMessage() for record in caplog.records if "gold" in record.getMessage()] == [
        "row 1: gold answer '$t(0,4]$' cannot be parsed; only the same text is right"
    ]


def test_unequal_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 golds for 1 completions"):
        MathGrader().grade(["1", "2"], [box("1")])


def test_text_extraction_needs_no_box() -> None:
    with MathGrader(num_workers=1, extraction="text") as grader:
        texts = ["The answer is $0.5$", "The answer is 3.", "nothing", r"\boxed{\frac{1}{2}}"]
        assert grader.grade(["1/2"] * 4, texts) == [
            RIGHT,
            WRONG,
            Verdict.NO_ANSWER,
            RIGHT,
        ]


TOWERS = [r"9^{9^{9^9}}", r"(10^9)!", r"\binom{10^{12}}{10^{11}}", r"\prod_{k=1}^{99999999} k"]


def test_four_hanging_answers_do_not_hold_up_sixty_others() -> None:
    golds = [f"{number}.5" for number in range(64)]
    answers = [rf"\frac{{{4 * number + 2}}}{{4}}" for number in range(64)]
    for row, tower in zip((0, 1, 33, 63), TOWERS, strict=True):
        answers[row] = tower
    with MathGrader(num_workers=2) as grader:
        start = time.monotonic()
        verdicts = grader.grade(golds, [box(answer) for answer in answers])
        assert time.monotonic() - start < 40
    assert [row for row, verdict in enumerate(verdicts) if verdict is Verdict.TIMEOUT] == [0, 1, 33, 63]
    assert verdicts.count(RIGHT) == 60


@pytest.mark.slow
@pytest.mark.skipif(os.getloadavg()[0] > 1, reason="a speed measured on a busy machine says nothing")
def test_sixty_four_hanging_answers_take_a_minute_on_two_workers() -> None:
    completions = [box(f"{number}^{{9^{{9^9}}}}") for number in range(2, 66)]
    with MathGrader(num_workers=2) as grader:
        start = time.monotonic()
        assert set(grader.grade(["7.5"] * 64, completions)) == {Verdict.TIMEOUT}
        assert time.monotonic() - start <= 60


MARKER = Path(__file__).with_name("executed")
INJECTIONS = [
    f"__import__('os').system('touch {MARKER}')",
    f"exec(\"open('{MARKER}', 'w')\")",
    rf"\text{{__import__('os').system('touch {MARKER}')}}",
    rf"\write18{{touch {MARKER}}}",
    f"1; open('{MARKER}', 'w')",
    f"(lambda: open('{MARKER}', 'w'))()",
]


@pytest.mark.parametrize("extraction", ["boxed", "text"])
def test_nothing_is_executed(extraction: str) -> None:
    with MathGrader(num_workers=2, extraction=extraction, timeout_seconds=2) as grader:  # type: ignore[arg-type]
        completions = [box(text) if extraction == "boxed" else f"The answer is {text}" for text in INJECTIONS]
        assert not any(grader.grade(["7.5"] * len(INJECTIONS), completions))
    assert not MARKER.exists()


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        (box("{" * 100_000 + "7" + "}" * 100_000), Verdict.TOO_LONG),
        (r"\boxed{" * 100_000, Verdict.NO_ANSWER),
        (r"\boxed " * 100_000, Verdict.NO_ANSWER),
        ("{" * 1_000_000 + box("7"), RIGHT),
        ("}" * 1_000_000 + box("7"), RIGHT),
        ("x" * 1_000_000 + box("7"), RIGHT),
        ("\\" * 1_000_000 + box("7"), RIGHT),
        ("\\boxed" + " " * 1_000_000 + "{7}", RIGHT),
        (box("7\0\0\0"), RIGHT),
        (box("\0"), Verdict.NO_ANSWER),
        (box("9" * 1999), WRONG),
        (box("9" * 2001), Verdict.TOO_LONG),
        (box("\ud800"), WRONG),
        (box("\U0001f600" * 100), WRONG),
        (box("\u202e7"), RIGHT),  # right-to-left override
        (box(" "), Verdict.NO_ANSWER),
    ],
)
def test_hostile_text_is_judged_at_once(grader: MathGrader, completion: str, verdict: Verdict) -> None:
    start = time.monotonic()
    assert grader.grade(["7"], [completion]) == [verdict]
    assert time.monotonic() - start < 15  # with the start of a worker, on a busy machine


HOSTILE_ANSWERS = [
    "{" * 900 + "}" * 900,
    "(" * 900 + ")" * 900,
    r"\sqrt{" * 250 + "2" + "}" * 250,
    r"\frac{1}{" * 200 + "2" + "}" * 200,
    "^".join("9" * 300),
    "!" * 1900,
    "1" + "0" * 1500 + "!",
    "a" * 1990,
    "," * 1990,
    "=" * 1990,
    "1=" * 900,
    r"\begin{pmatrix}" * 100,
    "x^{99999999} - (1+x)^{9999999}",
    r"\int_0^1 x^{x^{x^x}} dx",
    "$" * 1990,
    r"\text{" * 300 + "}" * 300,
]


@pytest.mark.parametrize("extraction", ["boxed", "text"])
def test_hostile_answers_cost_at_most_their_time(extraction: str) -> None:
    completions = [
        rf"\boxed{{{text}}}" if extraction == "boxed" else f"The answer is ${text}" for text in HOSTILE_ANSWERS
    ]
    with MathGrader(num_workers=2, extraction=extraction, timeout_seconds=0.5) as grader:  # type: ignore[arg-type]
        start = time.monotonic()
        verdicts = grader.grade(["7.5"] * len(completions), completions)
        assert time.monotonic() - start < 30
        assert not any(verdicts)
        assert grader.grade(["7.5"], [box("15/2")]) == [RIGHT]


def test_workers_and_the_package_load_neither_torch_nor_the_other() -> None:
    code = (
        "import sys, dirl.reward; assert not {'torch', 'sympy'} & set(sys.modules); "
        "from dirl.reward.math_answer import load_judge; print(load_judge()('1/2', '0.5', 'boxed')); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stdout) == (0, "right\n"), run.stderr
