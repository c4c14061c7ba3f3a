"""The house rules that each file of dirl/ keeps by itself: floors, fences, names, budgets, calls that are never safe.

Every rule is a function `SourceFile -> complaints ("file:line: what")`; snippets at the end prove that each can fail.
What files are to each other (circles, wings, leftovers, what nothing uses) is checked in architecture/.
"""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture.source import SourceFile, complexity, count_arguments, read_folder

PACKAGE = Path(__file__).parents[1] / "dirl"

# Imports run down only: to a smaller number. `dirl/__init__.py` is a face, like the CLI.
FLOORS = {
    "errors": -1,
    **dict.fromkeys(("boxed", "files"), 0),
    "presets": 1,
    **dict.fromkeys(("config", "show"), 2),
    **dict.fromkeys(("data", "diffusion", "reward", "training"), 3),
    "model": 4,
    **dict.fromkeys(("sft", "rollout"), 5),
    "eval": 6,
    **dict.fromkeys(("rl", "console"), 7),
    **dict.fromkeys(("cli", "__init__"), 8),
}
FACES = {"cli", "__init__"}
# A library -> the files, or folders with a stroke at the end, that may import it.
FENCES = {
    "lmdeploy": {"rollout/lmdeploy/"},
    "math_verify": {"reward/math_answer.py"},
    "reasoning_gym": {"data/reasoning_tasks.py", "reward/reasoning_tasks.py"},
    **{library: {"reward/instructions.py"} for library in ("lm_eval", "nltk", "langdetect")},
    "wandb": {"training/metrics.py"},
    "torch.distributed": {"training/distributed.py", "training/broadcast.py"},
    "accelerate": {"training/distributed.py"},
    "deepspeed": {"training/distributed.py", "training/full_parameters.py"},
    "tokenizers": {"data/chat.py", "data/tasks.py"},
    "peft": {"model/lora.py"},
    "liger_kernel": {"model/kernels.py"},
    **{library: {"rollout/server/"} for library in ("starlette", "uvicorn", "anyio", "httpx")},
    "flash_attn": {"rollout/local/block_cache.py"},
    "omegaconf": {"config.py"},
    "matplotlib": {"show/"},
}
# A room -> the libraries it does without: show/ reads files and rows, reward/ text, diffusion/ tensors alone.
ROOMS_WITHOUT = {
    **{room: {"torch", "transformers", "accelerate"} for room in ("errors", "files", "config", "show", "reward")},
    "diffusion": {"transformers", "accelerate"},
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
    """Each foreign library comes in through one door, and some rooms do without."""
    complaints = []
    for found in file.imports:
        for library, doors in FENCES.items():
            is_annotation = library == "accelerate" and found.is_annotation_only and found.name == "Accelerator"
            if found.is_of(library) and not is_inside(file, doors) and not is_annotation:
                complaints.append(file.complain(found, f"{library} only in {', '.join(sorted(doors))}"))
        for library in ROOMS_WITHOUT.get(file.room, ()):
            if found.is_of(library):
                complaints.append(file.complain(found, f"{file.room} does without {library}"))
    for node in ast.walk(file.tree):
        is_written_out = isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        if is_written_out and file.path not in FENCES["torch.distributed"]:
            complaints.append(
                file.complain(node, f"torch.distributed only in {', '.join(sorted(FENCES['torch.distributed']))}")
            )
    return complaints


def check_tokenizers(file: SourceFile) -> list[str]:
    """Tokenizers are made and loaded in the rooms that know chat templates and special tokens."""
    if file.path in TOKENIZER_ROOMS:
        return []
    only_there = f"tokenizers only in {', '.join(sorted(TOKENIZER_ROOMS))}"
    made = [
        node
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Attribute)
        and re.fullmatch(rf"transformers\.\w*Tokenizer\w*|{TOKENIZER_TYPE}\.\w+", ast.unparse(node))
    ]
    imported = [
        found
        for found in file.imports
        if found.is_of("transformers") and "Tokenizer" in found.name and found.name != TOKENIZER_TYPE
    ]
    return [file.complain(node, only_there) for node in [*made, *imported]]


def is_inside(file: SourceFile, doors: set[str]) -> bool:
    return any(file.path.startswith(door) if door.endswith("/") else file.path == door for door in doors)


def check_names(file: SourceFile) -> list[str]:
    """A name that says nothing is no name."""
    parts = set(file.path.removesuffix(".py").split("/"))
    return [file.complain(1, f"file or folder named {part!r}") for part in sorted(parts & FORBIDDEN_NAMES)]


def check_budgets(file: SourceFile) -> list[str]:
    """Lines of the file; lines, complexity and arguments of each function."""
    complaints = []
    written = [line for line in map(str.strip, file.text.splitlines()) if line and not line.startswith("#")]
    if len(written) > MAX_FILE_LINES:  # docstrings count: a reader scrolls past them
        complaints.append(file.complain(1, f"{len(written)} lines besides comments, at most {MAX_FILE_LINES}"))
    for function in file.functions:
        for measured, what, most in (
            (file.function_lines(function), "code lines", MAX_FUNCTION_LINES),
            (complexity(function), "cyclomatic complexity", MAX_COMPLEXITY),
            (count_arguments(function), "arguments", MAX_ARGUMENTS),
        ):
            if measured > most:
                complaints.append(file.complain(function, f"{function.name}: {what} {measured}, at most {most}"))
    return complaints


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


RULES: list[Callable[[SourceFile], list[str]]] = [
    check_floors,
    check_fences,
    check_tokenizers,
    check_names,
    check_budgets,
    check_safety,
]


@pytest.fixture(scope="module")
def package() -> list[SourceFile]:
    files = read_folder(PACKAGE)
    assert files, f"no Python files below {PACKAGE}"
    return files


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps(rule: Callable[[SourceFile], list[str]], package: list[SourceFile]) -> None:
    complaints = [complaint for file in package for complaint in rule(file)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_rules_name_only_what_is_there(package: list[SourceFile]) -> None:
    rooms = {file.room for file in package}
    assert FLOORS.keys() | ROOMS_WITHOUT.keys() == rooms
    doors = [door for doors in [*FENCES.values(), TOKENIZER_ROOMS] for door in doors]
    assert [door for door in doors if not any(is_inside(file, {door}) for file in package)] == []


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
        (check_floors, "data/a.py", "if TYPE_CHECKING:\n    from dirl.model.families.sdar import C", 2),
        (check_floors, "data/a.py", "importlib.import_module('dirl.cli')", 1),
        (check_floors, "show/terminal.py", "from dirl.training.metrics import Timings", 1),
        (check_floors, "show/terminal.py", "from dirl.config import load_config", 1),
        (check_floors, "attic/a.py", "", 1),
        (check_fences, "rl/train.py", "import lmdeploy.messages", 1),
        (check_fences, "rl/train.py", "def f():\n    import wandb", 2),
        (check_fences, "rl/train.py", "from torch import distributed", 1),
        (check_fences, "rl/train.py", "import torch\ntorch.distributed.barrier()", 2),
        (check_fences, "rl/train.py", "from accelerate import Accelerator", 1),
        (check_tokenizers, "rl/train.py", "from transformers import AutoTokenizer", 1),
        (check_tokenizers, "rl/train.py", "import transformers\ntransformers.AutoTokenizer.from_pretrained(x)", 2),
        (
            check_tokenizers,
            "rl/train.py",
            f"from transformers import {TOKENIZER_TYPE}\n{TOKENIZER_TYPE}.from_pretrained(x)",
            2,
        ),
        (check_fences, "eval/evaluate.py", "from math_verify import verify", 1),
        (check_fences, "rollout/build.py", "import lmdeploy", 1),
        (check_fences, "rollout/lmdeploy_engine.py", "import lmdeploy", 1),
        (check_fences, "rollout/plots.py", "from matplotlib.figure import Figure", 1),
        (check_fences, "show/terminal.py", "def f():\n    from torch import Tensor", 2),
        (check_fences, "reward/rubric.py", "import torch", 1),
        (check_fences, "diffusion/views.py", "import transformers.utils", 1),
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
        ("rollout/lmdeploy/engine.py", "from lmdeploy.messages import GenerationConfig"),
        ("show/pictures.py", "from dirl.errors import UserError\nfrom dirl.files import expand\nimport matplotlib"),
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
