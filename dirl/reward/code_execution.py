"""Completion text -> the share of a problem's tests that its Python program passes.

Data format (dLLM-RL): a row says `test_method`. `stdio`: `test_input` and `test_output`, lists of texts; the program
reads one and prints the other. `function`: `test_list`, statements such as asserts, or `test_input` (expressions) and
`test_output` (the literals they must equal); `prefix`, where given, stands before the program. `test_time_limit`: CPU
seconds of each test. `contest`: LiveCodeBench's tests (`dirl.reward.contest_tests`) of `func_name`, or of the output.

What a test expects never enters the program's process: printed text is compared here, and statements and expressions
run in a judge, a process that shares neither interpreter nor files with the program and is handed values as plain data.
`exit()`, an object equal to everything, a patched `assert`, and reading files or frames gain nothing. A test that hands
the program what is no data (an object, a function) is refused.
"""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dirl.reward.contest_tests import as_call, prints_same, read_cases
from dirl.reward.killable_pool import count_usable_cores
from dirl.reward.sandbox import Limits, Sandbox, find_sandbox
from dirl.reward.sandbox_child import RESULT, canonical

logger = logging.getLogger(__name__)

MAX_TIMEOUTS = 2  # a program that ran out of time so often has failed its other tests too
FENCE = "```"
_LANGUAGES = ("python", "py", "python3", "")


@dataclass(frozen=True)
class CodeTest:
    """One test: what is fed to the program, or run by its judge, and what must come of it."""

    text: str  # stdin, an expression, or statements
    expected: str | None  # stdout, or the canonical text of the expression's value; None: statements that must pass
    is_function: bool
    is_by_line: bool = False  # what is printed is compared as LiveCodeBench does; else word by word

    def passes(self, program: str, prefix: str, sandbox: Sandbox, limits: Limits) -> tuple[bool, bool]:
        """(passed, ran out of time).

        Raises:
            ValueError: its judge cannot decide it by plain data.
        """
        source = f"{prefix.rstrip()}\n{program}" if prefix.strip() else program
        if not self.is_function:
            outcome = sandbox.run(source, limits, stdin=self.text)
            printed, wanted = outcome.stdout, self.expected or ""
            is_equal = prints_same(printed, wanted) if self.is_by_line else printed.split() == wanted.split()
            return outcome.kind == "finished" and outcome.exit_code == 0 and is_equal, outcome.is_late
        last = self.text if self.expected is None else f"{RESULT} = ({self.text})"
        found = sandbox.judge(source, f"{trusted_part(prefix)}\n\n{last}\n", limits)
        if found.refused:
            raise ValueError(f"the test {self.text!r:.80} cannot be judged: {found.refused}")
        return found.result is not None and self.expected in (None, found.result), found.is_late


def trusted_part(prefix: str) -> str:
    """What a judge takes from the data set and not from the program: imports, constants, functions with a body."""
    try:
        body = ast.parse(prefix).body
    except (SyntaxError, ValueError):
        return ""
    plain = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    kept = [
        node for node in body if isinstance(node, plain) or (isinstance(node, ast.FunctionDef) and not _is_stub(node))
    ]
    return "\n".join(map(ast.unparse, kept))


def _is_stub(function: ast.FunctionDef) -> bool:
    """Whether a docstring, `pass` or `...` is all there is."""
    return all(
        isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in function.body
    )


def extract_code(completion: str) -> str | None:
    """Content of the last closed Markdown fence that is Python or says no language; None without one."""
    found, language, lines = None, None, list[str]()
    for line in completion.split("\n"):
        mark = line.strip()
        if not mark.startswith(FENCE):
            lines.append(line)
        elif language is None or mark != FENCE:  # a fence that says a language opens a block even inside another
            language, lines = mark[len(FENCE) :].strip().lower(), []
        else:
            found = "\n".join(lines) if language in _LANGUAGES else found
            language = None
    return found


def code(
    prompts: list[str],
    completions: list[str],
    *,
    time_limit_seconds: float = 1.0,
    memory_limit_mb: float = 512,
    num_workers: float = 0,
    **columns: Any,
) -> list[float | None]:
    """Tests passed / tests; 0 without a closed code block; None for a row without tests. Range [0, 1].

    It runs what the model wrote; `dirl.reward.sandbox` says behind which walls.

    Args:
        time_limit_seconds: CPU time of a test whose row has no `test_time_limit`.
        memory_limit_mb: address space of each process.
        num_workers: programs run at once; 0: one per usable core, at most 4.
    Source: dLLM-RL (arXiv 2509.06949), partial credit as in its released rewards.
    """
    num_rows = len(completions)
    jobs: list[Callable[[], float] | None] = []
    for row, completion in enumerate(completions):
        values = {name: column[row] for name, column in columns.items() if len(column) == num_rows}
        limits = Limits(float(values.get("test_time_limit") or time_limit_seconds), int(memory_limit_mb))
        jobs.append(_job(row, completion, values, limits))
    workers = int(num_workers) or min(4, count_usable_cores())
    with ThreadPoolExecutor(max_workers=workers) as pool:
        futures = [None if job is None else pool.submit(job) for job in jobs]
        try:
            return [None if future is None else future.result() for future in futures]
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise


def _job(row: int, completion: str, values: dict[str, Any], limits: Limits) -> Callable[[], float] | None:
    """To be called in its turn; None for a row without tests."""

    def tests() -> list[CodeTest]:
        try:
            return read_tests(values)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error

    if values.get("test_method") is None:
        return None
    sandbox, prefix = warned_sandbox(), str(values.get("prefix") or "")
    known = None if values["test_method"] == "contest" else tests()  # those of a contest are too large to keep
    return lambda: score_completion(completion, prefix, known or tests(), sandbox, limits)


def score_completion(
    completion: str, prefix: str, tests: Sequence[CodeTest], sandbox: Sandbox, limits: Limits
) -> float:
    """The share of tests that the completion's program passes."""
    program = extract_code(completion)
    if program is None or not program.strip():
        return 0.0
    num_passed = num_timeouts = 0
    for test in tests:
        has_passed, is_late = test.passes(program, prefix, sandbox, limits)
        num_passed += has_passed
        num_timeouts += is_late
        if num_timeouts == MAX_TIMEOUTS:
            break
    return num_passed / len(tests)


def read_tests(row: dict[str, Any]) -> list[CodeTest]:
    """The tests of a row; none for a row of another kind.

    Raises:
        ValueError: an unknown method, no tests under it, or inputs and outputs that are no pairs.
    """
    method = row.get("test_method")
    if method is None:
        return []
    if method == "contest":
        return [_contest_test(case, row.get("func_name")) for case in read_cases(row)]
    inputs, outputs, statements = (_texts(row, name) for name in ("test_input", "test_output", "test_list"))
    if method not in ("stdio", "function"):
        raise ValueError(f"test_method={method!r}; expected stdio, function or contest")
    if len(inputs) != len(outputs):
        raise ValueError(f"test_input has {len(inputs)} entries and test_output {len(outputs)}; they are pairs")
    pairs = list(zip(inputs, outputs, strict=True))
    if method == "stdio":
        tests = [CodeTest(text, expected, is_function=False) for text, expected in pairs]
    else:
        tests = [_expression_test(text, expected) for text, expected in pairs] + list(map(_statement_test, statements))
    if not tests:
        raise ValueError(f"test_method={method} without tests")
    return tests


def _contest_test(case: tuple[str, str], name: str | None) -> CodeTest:
    if not name:
        return CodeTest(*case, is_function=False, is_by_line=True)
    call, value = as_call(name, case)
    return CodeTest(call, canonical(value), is_function=True)


def _texts(row: dict[str, Any], name: str) -> list[str]:
    value = row.get(name)
    texts = [value] if isinstance(value, str) else list(value or [])
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} must be a list of texts, got {value!r:.80}")
    return texts


def _expression_test(text: str, expected: str) -> CodeTest:
    try:
        return CodeTest(text, canonical(ast.literal_eval(expected)), is_function=True)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"test_output {expected!r:.80} of a function test is no Python literal") from error


def _statement_test(statement: str) -> CodeTest:
    """Of `assert expression == literal` the value is compared as data, every other statement runs as it is."""
    try:
        (body,) = ast.parse(statement.strip()).body
        if isinstance(body, ast.Assert) and isinstance(body.test, ast.Compare):
            (operator,), (right,) = body.test.ops, body.test.comparators
            if isinstance(operator, ast.Eq):
                return CodeTest(ast.unparse(body.test.left), canonical(ast.literal_eval(right)), is_function=True)
    except (ValueError, SyntaxError):
        pass  # several statements, several comparisons, or something to compute on the right
    try:
        ast.parse(statement)
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"test_list has {statement!r:.80}, which is no Python: {error}") from error
    return CodeTest(statement, None, is_function=True)


_has_warned = False


def warned_sandbox() -> Sandbox:
    """The sandbox of this machine; says once what it does not keep out."""
    global _has_warned
    sandbox = find_sandbox()
    is_root = os.geteuid() == 0 and sandbox.user is None
    if (sandbox.isolation != "bwrap" or is_root) and not _has_warned:
        _has_warned = True
        logger.warning(
            "generated code runs with isolation %r%s, which is no security boundary; install bubblewrap (bwrap)",
            sandbox.isolation,
            " as root, for the user cannot be changed: nothing bounds its processes" if is_root else "",
        )
    return sandbox
