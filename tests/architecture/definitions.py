"""Syntax trees -> what a package defines, what refers to it, and what nothing that runs ever reaches.

Alive is what is reached from code that runs when a file is imported or started, and from the names of the package's
face (`__all__` of its `__init__.py`). Only living code keeps other code alive: two functions that call nothing but each
other are dead. A function, class or constant is referred to by its name where the imports say that it is this one, a
method or field by any attribute that is read under its name. An import alone refers to nothing, nor does a string,
except to fields and methods where the file reads attributes by a computed name (`getattr(piece, name)`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tests.architecture.source import Function, SourceFile

Names = Mapping[str, set[str]]  # a name in a file -> the dotted names it may stand for


@dataclass(frozen=True, eq=False)
class Definition:
    """A top-level function, class or constant of a file, or a method or field of such a class."""

    file: SourceFile
    node: ast.AST
    name: str
    owner: str = ""  # the class of a method or field

    @property
    def full_name(self) -> str:
        return f"{self.class_name}.{self.name}" if self.owner else f"{self.file.module}.{self.name}"

    @property
    def class_name(self) -> str:
        return f"{self.file.module}.{self.owner}"


@dataclass(frozen=True)
class References:
    """What a piece of code refers to."""

    names: frozenset[str]  # dotted, as the imports of the file make them: dirl.files.expand
    attributes: frozenset[str]  # read from any object


def definitions(file: SourceFile) -> list[Definition]:
    """What a file defines; a class's double-underscore methods are part of the class."""
    found = []
    for statement in _top_level(file.tree.body):
        if isinstance(statement, Function | ast.ClassDef):
            found.append(Definition(file, statement, statement.name))
        else:
            found += [Definition(file, statement, name) for name in _assigned(statement)]
        if isinstance(statement, ast.ClassDef):
            members = dict(_members(statement))
            found += [Definition(file, node, name, owner=statement.name) for name, node in members.items()]
    return [definition for definition in found if not _is_dunder(definition.name)]


def _members(definition: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """Methods, declared fields, and what methods set on `self`."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr, node
    for node in definition.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target), node


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that define names of the module: also those under an `if` or `try`."""
    for statement in body:
        yield statement
        for inner in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(statement, Function | ast.ClassDef):
                yield from _top_level(getattr(statement, inner, []))


def _assigned(statement: ast.stmt) -> list[str]:
    """Constants that a statement defines."""
    if not isinstance(statement, ast.Assign | ast.AnnAssign):
        return []
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if _is_stored_name(node)]


def _is_stored_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def names_of(file: SourceFile) -> dict[str, set[str]]:
    """What each name of a file stands for: its own definitions, and what it imports anywhere."""
    names = {d.name: {d.full_name} for d in definitions(file) if not d.owner}
    for name, full_name in (imported.binding for imported in file.imports):
        names.setdefault(name, set()).add(full_name)
    return names


def references(nodes: Iterable[ast.AST], file: SourceFile, names: Names) -> References:
    """What code of a file refers to, given the names of that file; a name that a function binds itself is its own."""
    finder = _Finder(names, are_strings_attributes=any(_reads_computed_name(node) for node in ast.walk(file.tree)))
    for node in nodes:
        finder.visit(node)
    return References(frozenset(finder.found_names), frozenset(finder.found_attributes))


def _reads_computed_name(node: ast.AST) -> bool:
    is_getattr = isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"
    return is_getattr and not isinstance(node.args[1], ast.Constant)


class _Finder(ast.NodeVisitor):
    def __init__(self, names: Names, *, are_strings_attributes: bool) -> None:
        self.names, self.are_strings_attributes = names, are_strings_attributes
        self.found_names: set[str] = set()
        self.found_attributes: set[str] = set()
        self._bound: list[set[str]] = []  # names of the functions around a node

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            self._refer(node.id, "")
        elif isinstance(node, ast.Attribute):
            self._read_attribute(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and self.are_strings_attributes:
            self.found_attributes.add(node.value)
        if isinstance(node, Function | ast.Lambda):
            self._visit_function(node)
        else:
            self.generic_visit(node)

    def _read_attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found_attributes.add(node.attr)
        first, _, rest = ast.unparse(node).partition(".")
        self._refer(first, f".{rest}")

    def _refer(self, name: str, rest: str) -> None:
        if not any(name in bound for bound in self._bound):
            self.found_names |= {full + rest for full in self.names.get(name, ())}

    def _visit_function(self, node: Function | ast.Lambda) -> None:
        if isinstance(node, Function):  # decorators, defaults and annotations are read outside
            for outside in (*node.decorator_list, node.args, *filter(None, [node.returns])):
                self.visit(outside)
        else:
            self.visit(node.args)
        self._bound.append(_bound_names(node))
        for inside in node.body if isinstance(node, Function) else [node.body]:
            self.visit(inside)
        self._bound.pop()


def _bound_names(function: Function | ast.Lambda) -> set[str]:
    inner = [node for node in ast.walk(function) if node is not function]
    shared = {name for node in inner if isinstance(node, ast.Global | ast.Nonlocal) for name in node.names}
    arguments = {node.arg for node in inner if isinstance(node, ast.arg)}
    stored = {node.id for node in inner if _is_stored_name(node)}
    defined = {node.name for node in inner if isinstance(node, Function | ast.ClassDef)}
    return (arguments | stored | defined) - shared


def own_code(definition: Definition) -> list[ast.AST]:
    """The code that a definition brings to life: of a class all but its methods, of a field none."""
    node = definition.node
    if isinstance(node, ast.ClassDef):
        return [part for part in ast.iter_child_nodes(node) if not isinstance(part, Function) or _is_dunder(part.name)]
    return [node] if isinstance(node, Function) or not definition.owner else []


def loose_code(file: SourceFile) -> list[ast.AST]:
    """The code of a module that stands outside definitions or, like `__getattr__`, is called by Python itself."""
    loose: list[ast.AST] = []
    for statement in _top_level(file.tree.body):
        if isinstance(statement, Function | ast.ClassDef):
            loose += [statement] if _is_dunder(statement.name) else []
        elif hasattr(statement, "body"):
            loose += [part for part in ast.iter_child_nodes(statement) if isinstance(part, ast.expr | ast.withitem)]
        elif not _assigned(statement):
            loose.append(statement)
    return loose


class Package:
    """The definitions of a package and what refers to them.

    Args:
        files: the package.
        users: files beside it that may use it: scripts and examples, not tests.
    """

    def __init__(self, files: Sequence[SourceFile], users: Sequence[SourceFile] = ()) -> None:
        self._names = {file.module: names_of(file) for file in [*files, *users]}
        self.definitions = {found.full_name: found for file in files for found in definitions(file)}
        self._loose = [self._references(loose_code(file), file) for file in files]
        self._loose += [self._references([file.tree], file) for file in users]
        faces = [file for file in files if file.path == "__init__.py"]
        self._public = {f"{file.module}.{name}" for file in faces for name in _listed_names(file)}

    def dead(self, also_alive: Iterable[str] = ()) -> list[Definition]:
        """Definitions that nothing alive refers to; of a dead class only the class.

        Args:
            also_alive: full names of definitions that are used in a way no syntax tree shows.
        """
        alive = self._alive(set(also_alive))
        dead = [found for found in self.definitions.values() if found.full_name not in alive]
        return [found for found in dead if not found.owner or found.class_name in alive]

    def _alive(self, also_alive: set[str]) -> set[str]:
        alive: set[str] = set()
        attributes: set[str] = set()
        names = self._public | also_alive
        waiting = self._loose
        while waiting or names:
            names = names.union(*(found.names for found in waiting))
            attributes = attributes.union(*(found.attributes for found in waiting))
            reached = {self._resolve(name) for name in names} | {
                name
                for name, found in self.definitions.items()
                if found.owner and found.class_name in alive and (found.name in attributes or name in also_alive)
            }
            new = {name for name in reached if name} - alive
            alive |= new
            names, waiting = set(), [self._own_references[name] for name in new]
        return alive

    @cached_property
    def _own_references(self) -> dict[str, References]:
        return {name: self._references(own_code(found), found.file) for name, found in self.definitions.items()}

    def _references(self, nodes: Iterable[ast.AST], file: SourceFile) -> References:
        return references(nodes, file, self._names[file.module])

    def _resolve(self, dotted: str, passed: frozenset[str] = frozenset()) -> str | None:
        """The definition that a dotted name leads to, through the modules that have it from another one."""
        parts = dotted.split(".")
        length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in self._names), 0)
        if length in (0, len(parts)) or dotted in passed:
            return None  # of another package, or a module
        module, name, rest = ".".join(parts[:length]), parts[length], parts[length + 1 :]
        if f"{module}.{name}" in self.definitions:
            return f"{module}.{name}"
        found = (self._resolve(".".join([t, *rest]), passed | {dotted}) for t in self._names[module].get(name, ()))
        return next(filter(None, found), None)


def _listed_names(file: SourceFile) -> list[str]:
    """The names in a file's `__all__`."""
    lists = [
        node for node in file.tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return [name for node in lists for name in ast.literal_eval(node.value)]
