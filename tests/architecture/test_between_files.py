"""The house rules that files of dirl/ keep towards each other: circles, wings, leftovers, double names, dead code.

Every rule is a function `files -> complaints ("file:line: what")`; snippets at the end prove that each can fail. An
exception stands in a list with its reason, and one that no file needs any more is a complaint too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.architecture.definitions import Definition, Package
from tests.architecture.imports import circles, import_graph, imported_files, reachable
from tests.architecture.source import SourceFile, read_folder

REPOSITORY = Path(__file__).parents[2]
MIN_FILE_LINES = 45

# (who imports, what) -> why it may, though a wing of rollout/ is in it. Patterns.
DOORS = {
    ("rollout/build.py", "rollout/*/*"): "an engine's name becomes an engine there and nowhere else",
    ("rollout/server/serve.py", "rollout/build.py"): "a server builds the engine it serves, whichever that is",
    ("cli.py", "rollout/server/serve.py"): "`dirl serve` is this program",
    ("cli.py", "rollout/server/wire.py"): "and this its configuration",
}
# Files of fewer than MIN_FILE_LINES code lines -> why each is one.
LEFTOVERS = {
    "errors.py": "every room raises them, so they stand below all",
    "console/export.py": "a command: one file each",
    "data/reasoning_tasks.py": "the fence of an extra: where reasoning-gym's problems come in",
    "diffusion/noising.py": "the paper's forward process",
    "model/families/dream.py": "a family: one file each, and some are small",
    "model/families/fast_dllm_v2.py": "a family: one file each, and some are small",
    "model/kernels.py": "the fence of an extra: where liger-kernel comes in",
    "model/tiny.py": "the embedded default; nothing that loads real models needs it",
    "reward/__init__.py": "the face of `dirl.rewards`",
    "reward/choices.py": "the published rules of multiple choice, one value each",
    "reward/reasoning_tasks.py": "the fence of an extra: where reasoning-gym's scorers come in",
    "rollout/lmdeploy/version.py": "read before anything of lmdeploy may be imported",
    "sft/block_starts.py": "which rows block starts are learned from, and why: tensors in, tensors out",
    "sft/loss.py": "the paper's NELBO: tensors in, tensors out",
    "show/report/page.py": "the one door through which a run's texts enter a page, small enough to audit",
    "rollout/watch.py": "what an engine tells who looks on; engines may not know terminals",
    "show/trajectory_picture.py": "`dirl.plot_trajectory`: one picture of a completion, none of a run",
    "eval/accuracy_picture.py": "`dirl.plot_thresholds`: which numbers of an evaluation stand in its pictures",
    "training/seeds.py": "the one mixer of seeds: all rooms above share it",
}
# Names of files that stand in several folders -> why a reader is not lost between them.
SHARED_NAMES = {
    "__init__.py": "Python's name",
    "engine.py": "each wing of rollout/ has its engine, and rollout/ what an engine is",
    "train.py": "each stage has its trainer",
    "reasoning_tasks.py": "the two sides of one extra: its problems in data/, its scorers in reward/",
}
# Full names of definitions that are used in a way no syntax tree shows. Patterns.
USED_UNSEEN = {
    "dirl.*._repr_html_": "notebooks call it",
    "dirl.rl.objective.ObjectiveConfig.preset": "presets.py reads it before there is a config",
    "dirl.show.metric.Metric.meaning": "docs/metrics.md says it, by a test",
    "dirl.rollout.server.walls._Impatient.connection_made": "uvicorn calls its own method, which this one extends",
    "dirl.rollout.lmdeploy.recorder.Recording*.[!_]*": "lmdeploy calls its own method, which this one replaces",
    "dirl.rollout.lmdeploy.recorder.RecordedSequence._update_token_ids_*": "lmdeploy calls its own method, see above",
    "dirl.rollout.lmdeploy.recorder.RecordedSequence.set_stop_pos": "lmdeploy calls its own method, see above",
    "dirl.rollout.lmdeploy.recorder._Float32Head.get_logits": "lmdeploy calls its own method, see above",
    "dirl.rollout.lmdeploy.recorder.SDAR*ForCausalLM": "lmdeploy builds it from its name in MODULE_MAP",
    "dirl.model.families.*Config.*": "transformers' layers read what their configuration says",
    "dirl.model.families.llada2._SplitByHeads.*": "transformers calls it while it reads and writes tensors",
    "dirl.reward.killable_pool.serve": "the program of a child process, which is a string, calls it",
    "dirl.training.background.main": "the program of a child process, see above",
    "dirl.console.list_runs.RunLine.accuracy": "a column of the table, which is made of all fields",
    "dirl.reward.math_answer.load_judge": "a child process gets it by its name",
}

Rule = Callable[[Sequence[SourceFile]], list[str]]


def check_circles(files: Sequence[SourceFile]) -> list[str]:
    """No file imports itself through others, neither inside functions nor for its annotations."""
    complaints = []
    for circle in circles(import_graph(files)):
        first = next(file for file in files if file.path == circle[0])
        found = next(found for found, path in imported_files(first, files) if path == [*circle, circle[0]][1])
        complaints.append(first.complain(found, f"a circle of imports: {' -> '.join([*circle, circle[0]])}"))
    return complaints


def check_wings(files: Sequence[SourceFile], doors: Mapping[tuple[str, str], str] = DOORS) -> list[str]:
    """An engine is a wing of rollout/: wings share what lies beside them, and know nothing of each other.

    A wing imports itself and files of rollout/ that no wing is in; nobody else imports a wing.
    """
    graph = import_graph(files)
    opens_wing = {path for path in graph if any(wing_of(below) for below in reachable(graph, path))}
    complaints, used = [], set()
    for file in files:
        for found, path in imported_files(file, files):
            is_into_wing = bool(wing_of(path)) or (bool(wing_of(file.path)) and path in opens_wing)
            if wing_of(path) == wing_of(file.path) or not is_into_wing:
                continue
            door = next((door for door in doors if fnmatch(file.path, door[0]) and fnmatch(path, door[1])), None)
            used.add(door)
            if door is None:
                what = "lies in a wing of rollout/" if wing_of(path) else "imports a wing of rollout/"
                complaints.append(file.complain(found, f"{path} {what}; see DOORS"))
    unused = [f"DOORS lists {' -> '.join(door)}, which no import needs" for door in doors if door not in used]
    return [*dict.fromkeys(complaints), *unused]


def wing_of(path: str) -> str:
    """The folder of rollout/ that a file lies in; empty elsewhere."""
    parts = path.split("/")
    return parts[1] if parts[0] == "rollout" and len(parts) > 2 else ""


def check_leftovers(files: Sequence[SourceFile], listed: Collection[str] = LEFTOVERS) -> list[str]:
    """A file of a few lines belongs to its neighbour, unless there is a reason."""
    small = {file.path: file for file in files if len(file.code_lines) < MIN_FILE_LINES and not is_marker(file)}
    complaints = [
        file.complain(1, f"{len(file.code_lines)} code lines: join it to its neighbour, or argue for it in LEFTOVERS")
        for path, file in small.items()
        if path not in listed
    ]
    return complaints + [f"LEFTOVERS lists {path}, which has grown or gone" for path in listed if path not in small]


def is_marker(file: SourceFile) -> bool:
    """An `__init__.py` that only makes its folder a package."""
    return file.path.endswith("__init__.py") and not file.code_lines


def check_shared_names(files: Sequence[SourceFile], listed: Collection[str] = SHARED_NAMES) -> list[str]:
    """A file's name says which file it is."""
    by_name = defaultdict(list)
    for file in files:
        by_name[file.path.split("/")[-1]].append(file)
    shared = {name: group for name, group in by_name.items() if len(group) > 1}
    complaints = [
        group[0].complain(1, f"another file has its name: {', '.join(file.path for file in group[1:])}")
        for name, group in shared.items()
        if name not in listed
    ]
    return complaints + [f"SHARED_NAMES lists {name}, which no two files have" for name in listed if name not in shared]


def check_dead(
    files: Sequence[SourceFile], users: Sequence[SourceFile] = (), used_unseen: Collection[str] = USED_UNSEEN
) -> list[str]:
    """Whatever is defined is used by what runs: the package itself, a script, an example. Tests do not count."""
    package = Package(files, users)

    def dead_with(patterns: Collection[str]) -> list[Definition]:
        return package.dead(name for name in package.definitions if any(fnmatch(name, p) for p in patterns))

    dead = dead_with(used_unseen)
    needless = [p for p in used_unseen if len(dead_with([*{*used_unseen} - {p}])) == len(dead)]
    return [
        *(found.file.complain(found.node, f"nothing uses {found.full_name}") for found in dead),
        *(f"USED_UNSEEN lists {pattern}, but all it names is used anyway" for pattern in needless),
    ]


@pytest.fixture(scope="module")
def package() -> list[SourceFile]:
    return read_folder(REPOSITORY / "dirl")


@pytest.mark.parametrize("rule", [check_circles, check_wings, check_leftovers, check_shared_names])
def test_package_keeps(rule: Rule, package: list[SourceFile]) -> None:
    complaints = rule(package)
    assert not complaints, "\n" + "\n".join(complaints)


def test_nothing_is_dead(package: list[SourceFile]) -> None:
    users = [file for folder in ("scripts", "examples") for file in read_folder(REPOSITORY / folder)]
    complaints = check_dead(package, users)
    assert not complaints, "\n" + "\n".join(complaints)


def files_of(texts: Mapping[str, str]) -> list[SourceFile]:
    return [SourceFile(path, text) for path, text in texts.items()]


CIRCLES = {
    "of two": ({"data/a.py": "from dirl.data.b import x", "data/b.py": "import dirl.data.a"}, "data/a.py:1"),
    "inside a function": (
        {"data/a.py": "def f():\n    from dirl.data import b", "data/b.py": "from .a import f"},
        "data/a.py:2",
    ),
    "for annotations": (
        {"data/a.py": "if TYPE_CHECKING:\n    from dirl.data.b import B", "data/b.py": "from dirl.data.a import f"},
        "data/a.py:2",
    ),
    "by a string": (
        {"data/a.py": "importlib.import_module('dirl.data.b')", "data/b.py": "from dirl.data.a import f"},
        "data/a.py:1",
    ),
    "of three": (
        {"a.py": "from dirl import b", "b.py": "from dirl.c import f", "c.py": "\nfrom dirl import a"},
        "a.py:1",
    ),
    "through a package's face": (
        {"data/__init__.py": "from dirl.data.a import f", "data/a.py": "from dirl.data import g"},
        "data/__init__.py:1",
    ),
}


@pytest.mark.parametrize(("texts", "place"), CIRCLES.values(), ids=CIRCLES.keys())
def test_circle_is_caught(texts: dict[str, str], place: str) -> None:
    (complaint,) = check_circles(files_of(texts))
    assert complaint.startswith(f"dirl/{place}: a circle of imports: ")


def test_each_circle_is_told_once_and_shortest() -> None:
    texts = {
        "a.py": "from dirl import b, c",
        "b.py": "from dirl import c",
        "c.py": "from dirl import a",
        "d.py": "from dirl import a, e",
        "e.py": "from dirl import d",
    }
    assert [complaint.split(": ")[-1] for complaint in check_circles(files_of(texts))] == [
        "a.py -> c.py -> a.py",
        "d.py -> e.py -> d.py",
    ]
    assert (
        check_circles(files_of({"a.py": "from dirl import b, c", "b.py": "from dirl import c", "c.py": "import torch"}))
        == []
    )


ROLLOUT = {
    "rollout/engine.py": "",
    "rollout/local/engine.py": "from dirl.rollout.engine import Completion\nfrom dirl.rollout.local import slots",
    "rollout/local/slots.py": "",
    "rollout/server/serve.py": "from dirl.rollout.build import build_engine",
    "rollout/build.py": "def f():\n    from dirl.rollout.local.engine import TorchEngine",
    "rollout/server/wire.py": "",
    "cli.py": "def f():\n    from dirl.rollout.server import serve, wire",
}
INTO_WINGS = {
    "a wing from another": ("rollout/lmdeploy/engine.py", "from dirl.rollout.local import slots"),
    "a wing from another, inside a function": (
        "rollout/lmdeploy/engine.py",
        "def f(): import dirl.rollout.local.slots",
    ),
    "a wing from a file beside it": ("rollout/watch.py", "from dirl.rollout.local.slots import Slots"),
    "a wing from another room": ("console/talk.py", "from dirl.rollout.local.engine import TorchEngine"),
    "what holds a wing from a wing": ("rollout/local/step.py", "from dirl.rollout.build import EngineConfig"),
    "the server's program from a room": ("rl/train.py", "from dirl.rollout.server.serve import serve"),
}


@pytest.mark.parametrize(("path", "text"), INTO_WINGS.values(), ids=INTO_WINGS.keys())
def test_fence_between_wings_catches(path: str, text: str) -> None:
    assert check_wings(files_of(ROLLOUT)) == []
    (complaint,) = check_wings(files_of({**ROLLOUT, path: text}))
    assert complaint.startswith(f"dirl/{path}:1: ")


def test_wing_behind_a_file_beside_it_is_caught() -> None:
    texts = {
        "rollout/watch.py": "from dirl.rollout import build",
        "rollout/local/slots.py": "from dirl.rollout.watch import Frame",
    }
    (complaint,) = check_wings(files_of({**ROLLOUT, **texts}))
    assert complaint.startswith("dirl/rollout/local/slots.py:1: ")


def test_unused_door_is_caught() -> None:
    complaints = check_wings(files_of({**ROLLOUT, "cli.py": "from dirl.rollout.server import serve"}))
    assert complaints == ["DOORS lists cli.py -> rollout/server/wire.py, which no import needs"]


def test_leftover_is_caught() -> None:
    just_small, just_enough = "x = 1\n" * (MIN_FILE_LINES - 1), "x = 1\n" * MIN_FILE_LINES
    files = files_of({"a.py": just_small, "b.py": just_enough, "c/__init__.py": '"""Only words."""', "d.py": ""})
    assert [complaint.split(": ")[0] for complaint in check_leftovers(files, [])] == ["dirl/a.py:1", "dirl/d.py:1"]
    assert check_leftovers(files, ["a.py", "d.py"]) == []
    assert len(check_leftovers(files, ["a.py", "d.py", "b.py", "gone.py"])) == 2


def test_shared_name_is_caught() -> None:
    files = files_of(
        dict.fromkeys(("eval/plots.py", "rollout/plots.py", "rollout/local/engine.py", "rollout/engine.py"), "")
    )
    (complaint,) = check_shared_names(files, ["engine.py"])
    assert complaint.startswith("dirl/eval/plots.py:1: ") and "rollout/plots.py" in complaint
    assert check_shared_names(files, ["engine.py", "plots.py"]) == []
    assert len(check_shared_names(files, ["engine.py", "plots.py", "train.py"])) == 1


# A file data/a.py beside which data/b.py runs `f`, and the names in data/a.py that are dead.
DEAD = {
    "function": ("def f(): ...\ndef g(): ...", ["g"]),
    "constant": ("SIZE = 1\nLENGTH: int = 2\ndef f(): return SIZE", ["LENGTH"]),
    "class": ("def f(): ...\nclass C:\n    def g(self): ...", ["C"]),
    "method": ("def f(): return C().used()\nclass C:\n    def used(self): ...\n    def g(self): ...", ["C.g"]),
    "field": ("def f(): return C(1, 2).used\nclass C:\n    used: int\n    other: int", ["C.other"]),
    "field set and never read": ("def f(): C()\nclass C:\n    def __init__(self): self.x = 1", ["C.x"]),
    "calls itself": ("def f(): ...\ndef g(): g()", ["g"]),
    "call each other": ("def f(): ...\ndef g(): h()\ndef h(): g()", ["g", "h"]),
    "used by the dead": ("def f(): ...\ndef g(): h()\ndef h(): ...", ["g", "h"]),
    "argument of its name": ("def f(g): return g\ndef g(): ...", ["g"]),
    "variable of its name": ("def f():\n    g = 1\n    return g\ndef g(): ...", ["g"]),
    "only in a list of names": ("__all__ = ['g']\ndef f(): ...\ndef g(): ...", ["g"]),
    "only in a string": ("def f(): return 'g'\ndef g(): ...", ["g"]),
    "under an if": ("def f(): ...\nif f:\n    def g(): ...", ["g"]),
    "of another's name": ("def f(): x.g()\ndef g(): ...", ["g"]),
}
ALIVE = {
    "called": "def f(): g()\ndef g(): ...",
    "in an annotation": "def f(x: C) -> None: ...\nclass C: ...",
    "a default": "SIZE = 1\ndef f(x=SIZE): ...",
    "a decorator": "@g\ndef f(): ...\ndef g(x): ...",
    "a base": "def f(): C()\nclass B: ...\nclass C(B): ...",
    "through self": "def f(): C().g()\nclass C:\n    def g(self): self.h()\n    def h(self): ...",
    "called by Python": "def f(): C()\nclass C:\n    def __enter__(self): g()\ndef g(): ...",
    "on import": "def f(): ...\ndef g(): ...\nREADY = g()\nprint(READY)",
    "a method for another class's": "def f(x): x.g()\nf(C)\nclass C:\n    def g(self): ...",
    "a field by a computed name": "def f(c): return [getattr(c, n) for n in ('x',)]\nf(C)\nclass C:\n    x: int",
}


@pytest.mark.parametrize(("text", "names"), DEAD.values(), ids=DEAD.keys())
def test_dead_is_caught(text: str, names: list[str]) -> None:
    complaints = check_dead(
        files_of({"data/a.py": text, "data/b.py": "from dirl.data.a import f\nf()"}), used_unseen=[]
    )
    assert [complaint.split(" dirl.data.a.")[-1] for complaint in complaints] == names


@pytest.mark.parametrize("text", ALIVE.values(), ids=ALIVE.keys())
def test_alive_is_left_alone(text: str) -> None:
    assert (
        check_dead(files_of({"data/a.py": text, "data/b.py": "from dirl.data import a\na.f()"}), used_unseen=[]) == []
    )


USERS = {
    "by name": "from dirl.data.a import g\ng()",
    "renamed": "from dirl.data.a import g as h\nh()",
    "through its module": "from dirl.data import a\na.g()",
    "in full": "import dirl.data.a\ndirl.data.a.g()",
    "through the face of its room": "from dirl.data import g\ng()",
    "through the face of the package": "import dirl\ndirl.material.g()",
}


@pytest.mark.parametrize("user", USERS.values(), ids=USERS.keys())
def test_script_keeps_alive_what_it_calls(user: str) -> None:
    files = files_of(
        {
            "__init__.py": "if TYPE_CHECKING:\n    from dirl import data as material",
            "data/__init__.py": "from dirl.data.a import g",
            "data/a.py": "def g(): ...",
        }
    )
    assert check_dead(files, [SourceFile("bench.py", user, "scripts")], []) == []
    only_imports = user.rpartition("\n")[0]
    assert len(check_dead(files, [SourceFile("bench.py", only_imports, "scripts")], [])) == 1


def test_face_of_the_package_keeps_alive() -> None:
    face = "__all__ = ['g']\nif TYPE_CHECKING:\n    from dirl.data.a import g"
    assert check_dead(files_of({"__init__.py": face, "data/a.py": "def g(): ..."}), used_unseen=[]) == []


def test_list_of_unseen_uses_holds_only_what_needs_it() -> None:
    files = files_of({"a.py": "def f(): g()\ndef g(): ...\ndef h(): ...\nh()"})
    assert check_dead(files, used_unseen=["dirl.a.f"]) == []
    assert check_dead(files, used_unseen=["dirl.a.f", "dirl.a.h"]) == [
        "USED_UNSEEN lists dirl.a.h, but all it names is used anyway"
    ]
