"""Python files read as syntax trees: what they import, how many lines of code they have, how complex a function is."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One imported name: `from accelerate import Accelerator` is module accelerate, name Accelerator."""

    module: str
    name: str
    line: int
    is_annotation_only: bool  # under `if TYPE_CHECKING:`
    alias: str | None = None  # as NAME

    def is_of(self, package: str) -> bool:
        return any(full == package or full.startswith(package + ".") for full in (self.module, self.full_name))

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}" if self.name else self.module

    @property
    def binding(self) -> tuple[str, str]:
        """The name that the file has for it, and the dotted name of what that is."""
        if self.alias or self.name:
            return self.alias or self.name, self.full_name
        package = self.module.split(".")[0]
        return package, package


@dataclass(frozen=True)
class SourceFile:
    """A file of the package: its path below the folder dirl/ (or below another one beside it) and its text."""

    path: str
    text: str
    folder: str = "dirl"

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        return ".".join([self.folder, *self.path.removesuffix(".py").removesuffix("__init__").split("/")]).rstrip(".")

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
        return f"{self.folder}/{self.path}:{line}: {what}"

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
                    yield Import(alias.name, "", node.lineno, is_annotation_only, alias.asname)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    yield Import(self._absolute(node), alias.name, node.lineno, is_annotation_only, alias.asname)
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
        package = [self.folder, *self.path.split("/")[:-1]]
        return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def docstring_lines(node: ast.AST) -> range:
    """The lines of the docstring of a module, class or function; empty for anything else."""
    if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
        return range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    return range(0)


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


def read_folder(folder: Path) -> list[SourceFile]:
    """The Python files below a folder, which gives them their module names."""
    paths = sorted(folder.rglob("*.py"))
    return [SourceFile(p.relative_to(folder).as_posix(), p.read_text(encoding="utf-8"), folder.name) for p in paths]
