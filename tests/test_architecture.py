"""The house rules of dirl/, checked on its syntax trees: floors, fences, names, budgets, and calls that are never safe.

Every rule is a function `SourceFile -> complaints ("file:line: what")`; snippets at the end prove that each can fail.
"""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dirl"

# Imports run down only: to a smaller number. `dirl/__init__.py` is a face, like the CLI.
FLOORS = {
    "errors": -1,
    "files": 0,
    **dict.fromkeys(("config", "show"), 1),
    **dict.fromkeys(("data", "diffusion", "reward", "training"), 2),
    "model": 3,
    **dict.fromkeys(("sft", "rollout"), 4),
    "eval": 5,
    **dict.fromkeys(("rl", "console"), 6),
    **dict.fromkeys(("cli", "__init__", "__main__"), 7),
}
FACES = {"cli", "__init__", "__main__"}
FENCES = {
    "lmdeploy": {"rollout/lmdeploy/engine.py", "rollout/lmdeploy/recorder.py"},
    "math_verify": {"reward/math_answer.py"},
    "reasoning_gym": {"data/reasoning_tasks.py", "reward/reasoning_tasks.py"},
    "wandb": {"training/metrics.py"},
    "torch.distributed": {"training/distributed.py"},
    "accelerate": {"training/distributed.py"},
    "tokenizers": {"data/chat.py", "data/tasks.py"},
}
# Tokenizers are made and loaded there; elsewhere a signature may name the type of the one it is handed.
TOKENIZER_ROOMS = {"data/chat.py", "data/tasks.py"}
TOKENIZER_TYPE = "PreTrainedTokenizerBase"
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 59
MAX_MEDIAN_LINES = 12
MAX_COMPLEXITY = 10
MAX_ARGUMENTS = 7

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name: `from accelerate import Accelerator` is module accelerate, name Accelerator."""

    module: str
    name: str
    line: int
    is_annotation_only: bool  # under `if TYPE_CHECKING:`

    def is_of(self, package: str) -> bool:
        return any(full == package or full.startswith(package + ".") for full in (self.module, self.full_name))

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module


@dataclass(frozen=True)
class SourceFile:
    """A file of the package: its path below dirl/ and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @cached_property
    def code_lines(self) -> set[int]:
        """Numbers of the lines that hold code: neither blank nor comment nor docstring."""
        silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
        tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
        spoken = {line for t in tokens if t.type not in silent for line in range(t.start[0], t.end[0] + 1)}
        return spoken - {line for node in ast.walk(self.tree) for line in docstring_lines(node)}

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._find_imports())

    def function_lines(self, function: Function) -> int:
        return sum(function.lineno <= line <= (function.end_lineno or 0) for line in self.code_lines)

    def complain(self, node: ast.AST | Import | int, what: str) -> str:
        line = node if isinstance(node, int) else node.line if isinstance(node, Import) else getattr(node, "lineno", 1)
        return f"dirl/{self.path}:{line}: {what}"

    def _find_imports(self) -> Iterator[Import]:
        annotating = {
            id(child)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            for statement in node.body
            for child in ast.walk(statement)
        }
        for node in ast.walk(self.tree):
            is_annotation_only = id(node) in annotating
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, "", node.lineno, is_annotation_only)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield Import(self._absolute(node), alias.name, node.lineno, is_annotation_only)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "importlib.import_module",
                "import_module",
                "__import__",
            ):
                first = node.args[0] if node.args else None
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    yield Import(first.value, "", node.lineno, is_annotation_only)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = ["dirl", *self.path.split("/")[:-1]]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def docstring_lines(node: ast.AST) -> range:
    """The lines of the docstring of a module, class or function; empty for anything else."""
    if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
        return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    return range(0)


def check_floors(file: SourceFile) -> list[str]:
    """Imports run down only, and rooms on one floor do not know each other."""
    if file.room not in FLOORS:
        return [file.complain(1, f"room {file.room!r} stands on no floor: add it to FLOORS and to DESIGN")]
    complaints = []
    for found in file.imports:
        parts = found.full_name.split(".")
        if parts[0] != "dirl":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        # `from dirl import name` of something that is no room goes through the face.
        target = target if target in FLOORS else "__init__"
        is_allowed = target == file.room or file.room in FACES or FLOORS[target] < FLOORS[file.room]
        if not is_allowed:
            complaints.append(
                file.complain(found, f"{file.room} must not import {found.full_name}: imports run down only")
            )
    return complaints


def check_fences(file: SourceFile) -> list[str]:
    """Each foreign library comes in through one door."""
    complaints = []
    for found in file.imports:
        for library, doors in FENCES.items():
            is_annotation = library == "accelerate" and found.is_annotation_only and found.name == "Accelerator"
            if found.is_of(library) and file.path not in doors and not is_annotation:
                complaints.append(file.complain(found, f"{library} only in {', '.join(sorted(doors))}"))
        is_tokenizer = "Tokenizer" in found.name and found.name != TOKENIZER_TYPE
        if found.is_of("transformers") and is_tokenizer and file.path not in TOKENIZER_ROOMS:
            complaints.append(file.complain(found, f"tokenizers only in {', '.join(sorted(TOKENIZER_ROOMS))}"))
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Attribute):
            continue
        written = ast.unparse(node)
        tokenizer_call = re.fullmatch(rf"transformers\.\w*Tokenizer\w*|{TOKENIZER_TYPE}\.\w+", written)
        if tokenizer_call and file.path not in TOKENIZER_ROOMS:
            complaints.append(file.complain(node, f"tokenizers only in {', '.join(sorted(TOKENIZER_ROOMS))}"))
        if written == "torch.distributed" and file.path not in FENCES["torch.distributed"]:
            complaints.append(file.complain(node, "torch.distributed only in training/distributed.py"))
    return complaints


def check_names(file: SourceFile) -> list[str]:
    """A name that says nothing is no name."""
    parts = set(file.path.removesuffix(".py").split("/"))
    return [file.complain(1, f"file or folder named {part!r}") for part in sorted(parts & FORBIDDEN_NAMES)]


def check_budgets(file: SourceFile) -> list[str]:
    """Lines of the file; lines, complexity and arguments of each function."""
    complaints = []
    if len(file.code_lines) > MAX_FILE_LINES:
        complaints.append(file.complain(1, f"{len(file.code_lines)} code lines, at most {MAX_FILE_LINES}"))
    for function in file.functions:
        for measured, what, most in (
            (file.function_lines(function), "code lines", MAX_FUNCTION_LINES),
            (complexity(function), "cyclomatic complexity", MAX_COMPLEXITY),
            (count_arguments(function), "arguments", MAX_ARGUMENTS),
        ):
            if measured > most:
                complaints.append(file.complain(function, f"{function.name}: {what} {measured}, at most {most}"))
    return complaints


def complexity(function: Function) -> int:
    """McCabe: one, and one more per branch, loop, handler and case; nested functions count too."""
    decisions = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler)
    nodes = list(ast.walk(function))
    orelse = sum(bool(node.orelse) for node in nodes if isinstance(node, ast.For | ast.AsyncFor | ast.While | ast.Try))
    cases = sum(not is_catch_all(node) for node in nodes if isinstance(node, ast.match_case))
    nested = sum(isinstance(node, Function) for node in nodes)  # the function itself is the "one"
    return nested + sum(isinstance(node, decisions) for node in nodes) + orelse + cases


def is_catch_all(case: ast.match_case) -> bool:
    return isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None and case.guard is None


def count_arguments(function: Function) -> int:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def check_safety(file: SourceFile) -> list[str]:
    """Calls that run data as code."""
    complaints = []
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            complaints.append(file.complain(node, f"{called}() is not allowed"))
        if called == "torch.load" and keywords.get("weights_only") != "True":
            complaints.append(file.complain(node, "torch.load needs weights_only=True"))
        for name in ("shell", "trust_remote_code"):
            if keywords.get(name) == "True":
                complaints.append(file.complain(node, f"{name}=True is not allowed"))
    return complaints


RULES: list[Callable[[SourceFile], list[str]]] = [check_floors, check_fences, check_names, check_budgets, check_safety]


@pytest.fixture(scope="module")
def package() -> list[SourceFile]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files, f"no Python files below {PACKAGE}"
    return [SourceFile(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in files]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Callable[[SourceFile], list[str]], package: list[SourceFile]) -> None:
    complaints = [complaint for file in package for complaint in rule(file)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_median_function_is_short(package: list[SourceFile]) -> None:
    lengths = [file.function_lines(function) for file in package for function in file.functions]
    if not lengths:
        pytest.skip("the package has no functions yet")
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import dirl; seconds = time.perf_counter() - start\n"
        "print(seconds, *sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the fastest of three: a busy machine is not a heavy import
        command = [sys.executable, "-c", code]
        time_taken, *heavy = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=PACKAGE.parent
        ).stdout.split()
        assert not heavy, f"import dirl also imports {heavy}"
        seconds.append(float(time_taken))
    assert min(seconds) < 0.3


LONG = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
BRANCHES = "def f(x):\n" + "    if x: pass\n" * MAX_COMPLEXITY


@pytest.mark.parametrize(
    ("rule", "path", "text", "line"),
    [
        (check_floors, "data/chat.py", "from dirl.model import sdar", 1),
        (check_floors, "data/chat.py", "import dirl.reward.rubric", 1),
        (check_floors, "sft/train.py", "from ..rollout import engine", 1),
        (check_floors, "sft/train.py", "from dirl import rollout", 1),
        (check_floors, "model/sdar.py", "from dirl import anything", 1),
        (check_floors, "eval/report.py", "def f():\n    from dirl.rl.train import g", 2),
        (check_floors, "data/a.py", "if TYPE_CHECKING:\n    from dirl.model.sdar import C", 2),
        (check_floors, "data/a.py", "importlib.import_module('dirl.cli')", 1),
        (check_floors, "attic/a.py", "", 1),
        (check_fences, "rl/train.py", "import lmdeploy.messages", 1),
        (check_fences, "rl/train.py", "def f():\n    import wandb", 2),
        (check_fences, "rl/train.py", "from torch import distributed", 1),
        (check_fences, "rl/train.py", "import torch\ntorch.distributed.barrier()", 2),
        (check_fences, "rl/train.py", "from accelerate import Accelerator", 1),
        (check_fences, "rl/train.py", "from transformers import AutoTokenizer", 1),
        (check_fences, "rl/train.py", "import transformers\ntransformers.AutoTokenizer.from_pretrained(x)", 2),
        (
            check_fences,
            "rl/train.py",
            f"from transformers import {TOKENIZER_TYPE}\n{TOKENIZER_TYPE}.from_pretrained(x)",
            2,
        ),
        (check_fences, "eval/evaluate.py", "from math_verify import verify", 1),
        (check_names, "data/utils.py", "", 1),
        (check_names, "tools/a.py", "", 1),
        (check_budgets, "data/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), 1),
        (check_budgets, "data/a.py", LONG, 1),
        (check_budgets, "data/a.py", BRANCHES, 1),
        (check_budgets, "data/a.py", "class C:\n    def f(self, a, b, c, d, *, e, f, g, h): ...", 2),
    ],
)
def test_rule_catches(rule: Callable[[SourceFile], list[str]], path: str, text: str, line: int) -> None:
    complaints = rule(SourceFile(path, text))
    assert [complaint.split(": ")[0] for complaint in complaints] == [f"dirl/{path}:{line}"]


@pytest.mark.parametrize(
    ("function", "options"),
    [
        ("eval", {}),
        ("subprocess.run", {"shell": True}),
        ("yaml.load", {}),
        ("torch.load", {}),
        ("torch.load", {"weights_only": False}),
    ],
)
def test_unsafe_calls_are_caught(function: str, options: dict[str, bool]) -> None:
    text = f"{function}({', '.join(['x', *(f'{name}={value}' for name, value in options.items())])})"
    test_rule_catches(check_safety, "data/a.py", text, 1)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "rl/train.py",
            "from dirl.eval.evaluate import evaluate\nfrom .update import step\nfrom dirl.data import chat",
        ),
        ("cli.py", "from dirl.rl.train import train"),
        ("__init__.py", "import importlib\nimportlib.import_module('dirl.rl.train')"),
        ("rl/train.py", "if TYPE_CHECKING:\n    from accelerate import Accelerator"),
        ("rl/train.py", f"from transformers import {TOKENIZER_TYPE}\ndef f(tokenizer: {TOKENIZER_TYPE}): ..."),
        ("data/a.py", "model.eval()\nyaml.safe_load(x)\ntorch.load(x, weights_only=True)"),
        ("data/a.py", '"""' + "\n" * MAX_FILE_LINES + '"""\n' + "# why\n\n" * MAX_FILE_LINES),
        ("data/a.py", LONG.replace("x = 1\n", '"""One\n    two."""\n    # why\n', 2).removesuffix("    x = 1\n")),
    ],
)
def test_rules_accept(path: str, text: str) -> None:
    assert [complaint for rule in RULES for complaint in rule(SourceFile(path, text))] == []


def test_complexity_agrees_with_known_values() -> None:
    source = """
def f(x):
    for i in x:
        if i:
            pass
        elif x:
            pass
        else:
            pass
    try:
        pass
    except ValueError:
        pass
    match x:
        case 1:
            pass
        case _:
            pass
"""
    (function,) = SourceFile("data/a.py", source).functions
    assert complexity(function) == 6  # one, for, if, elif, except, case 1
