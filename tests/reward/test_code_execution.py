"""The code reward on honest and on hostile programs: what passes, what scores 0, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl.data.problems import problem_from_row
from dirl.reward import RewardConfig, RewardError, Rubric, code_execution, sandbox
from dirl.reward.code_execution import CodeTest, code, extract_code, read_tests
from dirl.reward.sandbox import Isolation, Limits, Sandbox, find_sandbox

SECRET = "hf_not_a_real_token"


def fenced(source: str) -> str:
    return f"Here it is:\n```python\n{source}\n```\n"


def stdio(source: str, *pairs: tuple[str, str], **row: Any) -> float | None:
    """The reward of one program with stdin, stdout pairs."""
    columns = {"test_input": [pair[0] for pair in pairs], "test_output": [pair[1] for pair in pairs], **row}
    return reward(fenced(source), test_method="stdio", **columns)


def function(source: str, *statements: str, **row: Any) -> float | None:
    return reward(fenced(source), test_method="function", test_list=list(statements), **row)


def reward(completion: str, **row: Any) -> float | None:
    (value,) = code([""], [completion], **{name: [value] for name, value in row.items()})
    return value


@pytest.fixture(params=["none", "unshare", "bwrap"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Isolation]:
    """Every isolation that works on this machine, the weakest too."""
    if request.param != "none" and shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    walls = Sandbox(request.param, None)
    try:
        walls.run("", Limits())
    except RuntimeError as error:
        pytest.skip(f"{request.param} does not work here: {error}")
    monkeypatch.setattr(code_execution, "find_sandbox", lambda: walls)
    yield request.param


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("```python\nx\n```", "x"),
        ("```\nx\n```", "x"),
        ("text\n  ```py\n  x\n  ```", "  x"),
        ("```python\na\n```\n```Python\nb\nc\n```\nend", "b\nc"),
        ("```python\na\n```\n```text\noutput\n```", "a"),
        ("```python\na\n```\n```python\nunclosed", "a"),
        ("```python\nunclosed", None),
        ("no code", None),
        ("", None),
        ("```python\n```", ""),
        ("```python\nnever closed\n```python\nb\n```", "b"),
    ],
)
def test_extract_code(completion: str, expected: str | None) -> None:
    assert extract_code(completion) == expected


def test_extract_code_is_linear() -> None:
    start = time.perf_counter()
    for text in ("`" * 10**6, "```" + "a" * 10**6, "```\n" * 250_000, " " * 10**6 + "```", "\0" * 10**6):
        extract_code(text)
    assert time.perf_counter() - start < 5


def test_stdio_and_partial_credit(isolation: Isolation) -> None:
    double = "print(2 * int(input()))"
    assert stdio(double, ("1\n", "2\n"), ("-4", "-8")) == 1.0
    assert stdio(double, ("1", "2"), ("2", "5"), ("3", "6"), ("x", "x")) == 0.5
    assert stdio("import sys\nfor line in sys.stdin: print(line[::-1].strip(), '')", ("ab\ncd", "ba\ndc")) == 1.0
    assert stdio("print('é', '\\u2713')", ("", "é ✓")) == 1.0
    assert stdio("if __name__ == '__main__':\n    print(1)\n    exit()", ("", "1")) == 1.0


def test_functions(isolation: Isolation) -> None:
    add = "import math\ndef add(a, b):\n    print('noise')\n    return a + b\n"
    assert function(add, "assert add(1, 2) == 3", "assert math.isclose(add(.1, .2), .3)", "assert add(1, 1) == 3") == (
        2 / 3
    )
    row = {"test_input": ["add(1, 2)", "add('a', 'b')", "add([1], [2])"], "test_output": ["3.0", "'ab'", "(1, 2)"]}
    assert function(add, **row) == 2 / 3
    assert function("    return a - b", "assert sub(3, 1) == 2", prefix="def sub(a, b):\n    '''a - b'''\n") == 1.0
    assert function("def sub(a, b): return a - b", "assert sub(3, 1) == 2", prefix="def sub(a, b):\n    pass\n") == 1.0
    check = "def check(f):\n    assert f(1, 2) == 3\n    assert f(0, 0) == 0\ncheck(add)"
    assert function(add, check) == 1.0
    assert function(add.replace("+", "-"), check) == 0.0
    assert function("if __name__ == '__main__': raise SystemExit\ndef f(): return 1", "assert f() == 1") == 1.0


def test_plain_values_compare_as_python_does() -> None:
    source = """
import collections, enum
class Colour(enum.IntEnum):
    RED = 1
Point = collections.namedtuple("Point", "x y")
nested = {"b": [Point(1, 2.0), {3, 4}], "a": True}
"""
    equal = {
        "Colour.RED": "1",
        "nested": "{'a': 1, 'b': [(1, 2), {4, 3}]}",
        "collections.Counter('aab')": "{'b': 1, 'a': 2}",
        "collections.OrderedDict(a=None)": "{'a': None}",
        "frozenset([1])": "{1}",
        "'a' 'b'": "'ab'",
        "b'x'": "b'x'",
        "2.50": "2.5",
        "1 + 0j": "1",
    }
    different = {
        "1": "2",
        "'1'": "1",
        "[1]": "(1,)",
        "{}": "set()",
        "b'a'": "'a'",
        "object()": "None",
        "0.1 + 0.2": "0.3",
    }
    for pairs, expected in ((equal, 1.0), (different, 0.0)):
        row = {"test_input": list(pairs), "test_output": list(pairs.values())}
        assert function(source, **row) == expected


def test_what_statement_tests_become() -> None:
    def read(*statements: str) -> list[CodeTest]:
        return read_tests({"test_method": "function", "test_list": list(statements)})

    assert read("assert f(1) == [True, 2]", "  assert f(1)==3, 'why'\n") == [
        CodeTest("f(1)", "[1,2]", is_function=True),
        CodeTest("f(1)", "3", is_function=True),
    ]
    for inside in (
        "assert f(1)",
        "assert f(1) == g(2)",
        "assert 0 < f(1) < 2",
        "x = 1\nassert f(x) == 1",
    ):
        assert read(inside) == [CodeTest(inside, None, is_function=True)]
    with pytest.raises(ValueError, match=r"test_list has 'not python\(', which is no Python: .*never closed"):
        read("not python(")


CHEATS = {
    "exit": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit at call": "import os\ndef f(*_): os._exit(0)",
    "equal to everything": "class A:\n    def __eq__(self, other): return True\ndef f(*_): return A()",
    "equal int": "class A(int):\n    def __eq__(self, other): return True\ndef f(*_): return A(5)",
    "false repr": "class A:\n    def __repr__(self): return '42'\n    __str__ = __repr__\ndef f(*_): return A()",
    "false class": "class A:\n    __class__ = int\ndef f(*_): return A()",
    "no assertions": "import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E\ndef f(*_): pass",
    "swallow the tests": "def f(*_): return 1\n'''",
    "comparisons that lie": (
        "class A(int):\n"
        "    def __lt__(self, other): return True\n"
        "    __le__ = __gt__ = __ge__ = __ne__ = __bool__ = __lt__\n"
        "    def __sub__(self, other): return self\n"
        "    __rsub__ = __abs__ = __sub__\n"
        "def f(*_): return A(5)"
    ),
    "objects that lie": (
        "class A:\n"
        "    def __lt__(self, other): return True\n"
        "    __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __lt__\n"
        "    def __sub__(self, other): return self\n"
        "    __rsub__ = __abs__ = __sub__\n"
        "def f(*_): return A()"
    ),
    "builtins and modules of its own": (
        "import operator as math\nclass math:\n    isclose = lambda *_, **__: True\n"
        "abs = lambda _: 0\nisinstance = lambda *_: True\ndef f(*_): return -1"
    ),
    "the frame": (
        "import sys\ndef f(*_):\n    frame = sys._getframe()\n"
        "    while frame:\n        for names in (frame.f_globals, frame.f_locals):\n"
        "            for text in map(str, names.values()):\n"
        "                if '4' + '1 <' in text or '=' + '= 42' in text: return 42\n"
        "        frame = frame.f_back"
    ),
    "its own file": (
        "import os\ndef f(*_):\n    for name in os.listdir():\n"
        "        text = open(name).read()\n        if '4' + '1 <' in text or '=' + '= 42' in text: return 42"
    ),
    "result bound early": "_dirl_result = 42\nraise SystemExit",
    "forged report": (
        "import os\nfor fd in range(3, 30):\n"
        '    try: os.write(fd, b\'["", "42"]\')\n    except OSError: pass\nos._exit(0)'
    ),
    "nothing": "",
    "syntax": "def f(:",
    "nul": "\0",
    "surrogate": "\ud800",
}


STATEMENTS = (
    *("assert f(1) == 42", "assert 41 < f(2) < 43", "assert abs(f(2) - 42) < 1e-6"),
    *("import math\nassert math.isclose(f(2), 42)", "def check(c):\n    assert c(1) == 42\ncheck(f)"),
    "assert isinstance(f(1), int) and not f(1) != 42",
)


def test_honest_programs_pass_what_cheats_do_not() -> None:
    assert function("def f(*_): return 42", *STATEMENTS) == 1.0


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_zero(name: str) -> None:
    assert function(CHEATS[name], *STATEMENTS) == 0.0
    assert stdio(CHEATS[name], ("1", "42")) == 0.0


def test_a_judge_gets_data_and_numbers_of_what_is_none() -> None:
    source = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
def sort(values, seen): values.sort(); seen["sorted"] = True
def fail(): raise KeyError("no such")
def count(): yield from range(3)
def kinds(): return [1, (2.5, None), {3}, {"a": b"x"}, 1j, "\\udc80", True, float("inf")]
def same(value): return value
"""
    passing = [
        "values, seen = [3, 1], {}\nsort(values, seen)\nassert values == [1, 3] and seen == {'sorted': True}",
        "try:\n    fail()\n    assert False\nexcept KeyError as error:\n    assert 'no such' in str(error)",
        "assert list(count()) == [0, 1, 2]",
        "assert Stack().push(1).push(2).items == [1, 2]",
        "assert same(Stack().push(7)).items[0] == 7",
        "assert kinds() == [1, (2.5, None), {3}, {'a': b'x'}, 1j, '\\udc80', True, float('inf')]",
        "assert helper(same(2)) == 4 and LIMIT == 9",
    ]
    prefix = "LIMIT = 9\ndef helper(x):\n    return 2 * x\ndef same(value):\n    'itself'\n"
    assert function(source, *passing, prefix=prefix) == 1.0
    forged = source + "def helper(x): return 5\nLIMIT = 8"
    assert function(forged, "assert helper(2) == 5", "assert LIMIT == 8", prefix=prefix) == 0.0
    with pytest.raises(ValueError, match=r"'assert same.* cannot be judged: it hands the program function"):
        function(source, "assert same(lambda: 1)")


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_without_the_guard_processes_and_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for root, of whom the kernel counts no processes: the walls hold where the guard inside is undone."""
    walls = find_sandbox()
    if walls.isolation != "bwrap":
        pytest.skip("bubblewrap does not work here")
    unguarded = sandbox._child_source().replace("install_guard(os.getcwd())", "pass")
    monkeypatch.setattr(sandbox, "_child_source", lambda: unguarded)
    assert os.geteuid() != 0 or walls.user is not None
    forks = (
        "import os\nfor _ in range(200):\n    try:\n        if not os.fork(): os._exit(0)\n        print('forked')\n"
    )
    assert walls.run(forks + "    except OSError: print('refused')", Limits()).stdout.split() == ["refused"] * 200
    files = (
        "import os\nsize = 0\nfor folder in ('.', '/', '/dev/shm', '/tmp', '/dev', '/proc', '..'):\n"
        "    try:\n        for n in range(20):\n            with open(f'{folder}/{n}', 'wb') as f:\n"
        "                for _ in range(16): size += f.write(bytes(2**20)); f.flush()\n"
        "    except OSError: pass\nprint(size // 2**20)"
    )
    assert 0 < int(walls.run(files, Limits(seconds=5)).stdout) <= sandbox.MAX_FILES_MB + 1


def test_root_that_cannot_change_its_user_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_execution, "find_sandbox", lambda: Sandbox("bwrap", None))
    monkeypatch.setattr(code_execution, "_has_warned", False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    code_execution.warned_sandbox()
    assert "as root, for the user cannot be changed: nothing bounds its processes" in caplog.text


def hostile_programs(outside: Path) -> dict[str, str]:
    """Each prints 42, the right answer, only if it gets its way."""
    write = f"open({str(outside / 'left')!r}, 'w').write('x')\nprint(42)"
    return {
        "environment": f"import os\nif {SECRET!r} in os.environ.values(): print(42)",
        "environment of the parent": (
            f"import os\nfor pid in [os.getppid(), 'self', 1]:\n"
            f"    if {SECRET!r}.encode() in open(f'/proc/{{pid}}/environ', 'rb').read(): print(42)"
        ),
        "write outside": write,
        "remove outside": f"import os\nos.remove({str(outside / 'kept')!r})\nprint(42)",
        "truncate outside": f"import os\nos.truncate({str(outside / 'kept')!r}, 0)\nprint(42)",
        "write by descriptor": f"import os\nos.open({str(outside / 'left')!r}, os.O_CREAT | os.O_WRONLY)\nprint(42)",
        "link outside": f"import os\nos.symlink({str(outside)!r}, 'link')\nopen('link/left', 'w')\nprint(42)",
        "read outside": f"print(open({str(outside / 'kept')!r}).read())",
        "fork": "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse: print(42)",
        "fork bomb": "import os\nwhile True: os.fork()",
        "subprocess": "import subprocess\nprint(subprocess.run(['echo', '42'], capture_output=True, text=True).stdout)",
        "shell": "import os\nos.system('echo 42')",
        "exec": "import os\nos.execv('/bin/echo', ['echo', '42'])",
        "socket": "import socket\nsocket.create_connection(('127.0.0.1', 1), 1)\nprint(42)",
        "listen": "import socket\nsocket.socket().bind(('', 0))\nprint(42)",
        "memory": "x = bytearray(10 * 2**30)\nprint(42)",
        "memory by and by": "x = [1]\nwhile True: x += x",
        "infinite output": "while True: print(42)",
        "one long line": "import sys\nwhile True: sys.stdout.write('4' * 2**20)",
        "errors without end": "import sys\nwhile True: sys.stderr.write('4' * 2**20)",
        "disk": "f = open('big', 'wb')\nwhile True: f.write(b'0' * 2**20)",
        "busy": "while True: pass",
        "busy and deaf": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except Exception: pass\nwhile True: pass",
        "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "ctypes": "import ctypes\nctypes.CDLL(None)\nprint(42)",
        "raised limits": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))\nprint(42)",
        "kill the parent": "import os\nos.kill(os.getppid(), 9)\nprint(42)",
        "audit": "import sys\nsys.addaudithook(lambda *_: None)\n" + write,
        "big integers": "print(10 ** 10 ** 10)",
        "catastrophic expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')\nprint(42)",
    }


def test_hostile_programs(isolation: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, temporary = tmp_path / "outside", tmp_path / "temporary"
    for folder in (outside, temporary):
        folder.mkdir()
    (outside / "kept").write_text("42")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    programs = hostile_programs(outside)
    start = time.perf_counter()
    rewards = code(
        [""] * len(programs),
        [fenced(source) for source in programs.values()],
        test_method=["stdio"] * len(programs),
        test_input=[[""]] * len(programs),
        test_output=[["42"]] * len(programs),
        test_time_limit=[0.4] * len(programs),
        num_workers=4,
    )
    assert dict(zip(programs, rewards, strict=True)) == dict.fromkeys(programs, 0.0)
    assert time.perf_counter() - start < 60
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"kept": "42"}
    assert list(temporary.iterdir()) == []
    wait_for_children()
    assert stdio("print(42)", ("", "42")) == 1.0  # the machine is none the worse


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("write outside", "refuses"),
        ("fork", "refuses os.fork"),
        ("socket", "refuses socket"),
        ("memory", "MemoryError"),
    ],
)
def test_hostile_programs_are_refused_rather_than_late(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hostile_programs(tmp_path)[name]
    told = f"try:\n{textwrap.indent(source, '    ')}\nexcept BaseException as error: print(type(error).__name__, error)"
    outcome = Sandbox("none", None).run(told, Limits())
    assert outcome.kind == "finished" and reason in outcome.stdout


def wait_for_children() -> None:
    """The kernel takes a moment to end what was killed."""
    deadline = time.monotonic() + 5
    while children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() == []


def children() -> list[str]:
    """Processes that run the sandbox's child."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"What runs inside a sandbox process" in entry.read_bytes():
                found.append(entry.parent.name)
        except OSError:
            pass  # it has just ended
    return found


def test_sleepers_end_and_time_is_not_shared(isolation: Isolation) -> None:
    start = time.perf_counter()
    sleepy = "import time\nwhile True: time.sleep(9)"
    values = code(
        [""] * 3,
        [fenced(sleepy), fenced("print(1)"), fenced("print(2)")],
        test_method=["stdio"] * 3,
        test_input=[[""] * 50, [""], [""]],
        test_output=[["1"] * 50, ["1"], ["1"]],
        test_time_limit=[0.2, 1, None],
        num_workers=2,
    )
    assert values == [0.0, 1.0, 0.0]
    assert time.perf_counter() - start < 20  # not 50 times 2.6 s


def test_a_program_killed_with_its_group_cannot_linger(isolation: Isolation) -> None:
    outcome = Sandbox(isolation, None).run(
        "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(99)", Limits(seconds=0.2)
    )
    assert (outcome.kind, outcome.is_late) == ("timeout", True)
    wait_for_children()


def test_outcomes() -> None:
    walls = find_sandbox()
    assert walls.run("print(1)\nraise SystemExit(3)", Limits()).exit_code == 3
    busy = walls.run("while True: pass", Limits(seconds=0.2))
    assert busy.is_late
    assert -busy.exit_code in (signal.SIGXCPU, signal.SIGKILL)
    assert walls.run("print('x' * 2000)", Limits(output_bytes=1000)).kind == "output"


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/usr/bin/python3").exists(), reason="only root changes users")
def test_root_runs_programs_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_interpreter", lambda: ["/usr/bin/python3", "-I", "-S", "-B"])
    walls = Sandbox("none", 65534)
    source = "import os\nopen('mine', 'w').write('x')\nprint(os.getuid(), os.getgroups(), os.path.exists('mine'))"
    uid, *_, exists = walls.run(source, Limits()).stdout.split()
    assert (uid, exists) == ("65534", "True")
    monkeypatch.undo()
    if find_sandbox().isolation == "bwrap":  # also where the interpreter lies in a folder that only root may enter
        assert find_sandbox().run(source, Limits()).stdout.split()[0] == "65534"


def test_a_sandbox_that_does_not_start_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_child_source", lambda: "raise SystemExit('broken installation')")
    with pytest.raises(RuntimeError, match="did not start: broken installation"):
        Sandbox("none", None).run("print(1)", Limits())


def test_rows_without_tests_do_not_apply_and_bad_ones_are_named() -> None:
    assert code(
        ["", ""], ["", "no code"], test_method=[None, "stdio"], test_input=[None, ""], test_output=[None, ""]
    ) == [
        None,
        0.0,
    ]
    for row, words in (
        ({"test_method": "telnet"}, "row 0: test_method='telnet'; expected stdio, function or contest"),
        ({"test_method": "stdio"}, "row 0: test_method=stdio without tests"),
        (
            {"test_method": "stdio", "test_input": ["a"], "test_output": []},
            "test_input has 1 entries and test_output 0",
        ),
        ({"test_method": "function", "test_input": ["f()"], "test_output": ["f"]}, "'f' of a function test is no"),
        ({"test_method": "stdio", "test_input": [1], "test_output": [2]}, "test_input must be a list of texts"),
    ):
        with pytest.raises(ValueError, match=words):
            reward("", **row)


def test_in_a_rubric(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_from_row(
        {"question": "Double it.", "test_method": "stdio", "test_input": ["1", "2"], "test_output": ["2", "4"]}
    )
    assert (problem.question, problem.answer) == ("Double it.", "")
    columns = {name: [value] * 2 for name, value in problem.columns.items()}
    config = RewardConfig(functions=["code"], parameters={"code": {"time_limit_seconds": 2, "num_workers": 1}})
    monkeypatch.setattr(code_execution, "_has_warned", False)
    with Rubric(config) as rubric:
        for _ in range(2):
            scores = rubric.score(
                ["", ""],
                [fenced("print(2 * int(input()))"), fenced("print(2)")],
                completion_ids=[[], []],
                step_maps=[[], []],
                columns=columns,
            )
    assert scores.total == [1.0, 0.5]
    warnings = [record for record in caplog.records if "no security boundary" in record.message]
    assert len(warnings) == (find_sandbox().isolation != "bwrap")
    with Rubric(config) as rubric, pytest.raises(RewardError, match="'code' raised ValueError: row 0: test_method='x'"):
        rubric.score([""], [""], completion_ids=[[]], step_maps=[[]], columns={"test_method": ["x"]})


def test_it_is_off_by_default() -> None:
    script = (
        "import sys, dirl.reward.rubric as r; r.Rubric(r.RewardConfig()); print('code' in r.RewardConfig().functions)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
