"""Syntax trees -> the arguments that are handed on, under one name, through many definitions.

An estimate. A parameter goes on from a definition to one that it calls with `name=name`, with `name` in the place of
a parameter `name`, or with `self.name` for either. A class takes what its `__init__` or its fields take, and its
methods hand it on. Calls are matched by the name that is called: `x.generate(...)` may be any `generate` there is, and
`partial(f, ...)` calls f.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.architecture.imports import count_floors
from tests.architecture.source import Function, SourceFile


@dataclass(frozen=True)
class Signature:
    """A function, method or class, as those see it who call it."""

    place: str  # file:line
    name: str
    parameters: list[str]  # without self
    calls: list[ast.Call]  # inside it; of a class, in its methods
    is_class: bool


def travels(files: Sequence[SourceFile]) -> dict[str, int]:
    """Each parameter's name -> how many definitions it passes on its longest way; of those in a circle one."""
    signatures = [signature for file in files for signature in _signatures(file)]
    by_name = defaultdict(list)
    for signature in signatures:
        by_name[signature.name].append(signature)
    graphs: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for signature in signatures:
        for parameter in signature.parameters:
            graphs[parameter][signature.place] |= set(_takers(signature, parameter, by_name))
    return {parameter: count_floors(graph) for parameter, graph in sorted(graphs.items())}


def _takers(giver: Signature, parameter: str, by_name: Mapping[str, Sequence[Signature]]) -> Iterator[str]:
    """The places of the definitions to which a definition hands a parameter on under its name."""
    written = {f"self.{parameter}"} if giver.is_class else {parameter}
    for call in giver.calls:
        called, arguments = call.func, call.args
        if ast.unparse(called) in ("partial", "functools.partial") and arguments:
            called, *arguments = arguments
        name = called.attr if isinstance(called, ast.Attribute) else ast.unparse(called)
        by_keyword = any(word.arg == parameter and ast.unparse(word.value) in written for word in call.keywords)
        for taker in by_name.get(name, ()):
            pairs = zip(taker.parameters, arguments, strict=False)
            by_place = any(taken == parameter and ast.unparse(given) in written for taken, given in pairs)
            if taker is not giver and (by_place or (by_keyword and parameter in taker.parameters)):
                yield taker.place


def _signatures(file: SourceFile) -> Iterator[Signature]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.ClassDef | Function):
            is_class = isinstance(node, ast.ClassDef)
            parameters = _class_parameters(node) if isinstance(node, ast.ClassDef) else _parameters(node)
            calls = [inner for inner in ast.walk(node) if isinstance(inner, ast.Call)]
            yield Signature(f"{file.path}:{node.lineno}", node.name, parameters, calls, is_class)


def _class_parameters(node: ast.ClassDef) -> list[str]:
    makers = [method for method in node.body if isinstance(method, Function) and method.name == "__init__"]
    fields = [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
    return _parameters(makers[0]) if makers else fields


def _parameters(function: Function) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names
