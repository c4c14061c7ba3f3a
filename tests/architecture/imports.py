"""Files of a package -> who imports whom, circles, and how many floors they stand on."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from tests.architecture.source import Import, SourceFile

Graph = Mapping[str, Collection[str]]  # path of a file -> paths of the files it imports


def imported_files(file: SourceFile, files: Sequence[SourceFile]) -> list[tuple[Import, str]]:
    """Each import of one of `files`, wherever in the file it stands, with that file's path."""
    paths = {other.module: other.path for other in files}
    found = [(imported, paths.get(imported.full_name) or paths.get(imported.module)) for imported in file.imports]
    return [(imported, path) for imported, path in found if path and path != file.path]


def import_graph(files: Sequence[SourceFile]) -> dict[str, set[str]]:
    return {file.path: {path for _, path in imported_files(file, files)} for file in files}


def reachable(graph: Graph, start: str) -> set[str]:
    """What a file imports, directly or through others; itself only if it stands in a circle."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting.extend(graph[path])
    return seen


def circles(graph: Graph) -> list[list[str]]:
    """One shortest circle for each set of files that all import each other, as paths in the order of the imports."""
    below = {path: reachable(graph, path) for path in graph}
    found, done = [], set[str]()
    for path in sorted(graph):
        if path in below[path] and path not in done:
            knot = {other for other in below[path] if path in below[other]}
            done |= knot
            found.append(min((_way_round(graph, start) for start in sorted(knot)), key=len))
    return found


def _way_round(graph: Graph, start: str) -> list[str]:
    """A shortest way from a file of a circle back to itself."""
    waiting = deque([[start]])
    seen: set[str] = set()
    while waiting:
        way = waiting.popleft()
        for path in sorted(graph[way[-1]]):
            if path == start:
                return way
            if path not in seen:
                seen.add(path)
                waiting.append([*way, path])
    raise ValueError(f"{start} stands in no circle")


def count_floors(graph: Graph) -> int:
    """Files on the longest chain of imports; those of a circle stand on one floor, as none is above another."""
    below = {path: reachable(graph, path) for path in graph}
    strictly = {path: {other for other in below[path] if path not in below[other]} for path in graph}
    floors: dict[str, int] = {}
    for path in sorted(graph, key=lambda path: len(strictly[path])):
        floors[path] = 1 + max((floors[other] for other in strictly[path]), default=0)
    return max(floors.values(), default=0)


def within(graph: Graph, room: str) -> dict[str, set[str]]:
    """The part of the graph whose files lie in a room (a folder or file right below the package)."""
    inside = {path for path in graph if path.split("/")[0].removesuffix(".py") == room}
    return {path: set(graph[path]) & inside for path in inside}
