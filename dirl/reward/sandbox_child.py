"""What runs inside a sandbox process: limits, then the guard, then `program.py` of the working directory.

The parent passes this file's text to `python -I -S -c`, so it imports nothing but the standard library. A program under
test and its judge are two such processes, each in a sandbox of its own; between them go names, calls, and values as
plain data. What is no data stays with the program, and the judge holds its number: no method of it runs where it is
compared.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import json
import math
import os
import resource
import runpy
import signal
import site
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

PROGRAM, RESULT = "program.py", "_dirl_result"
READY = b"ready\n"
MAX_REPORT_CHARS = 65536
MAX_ANSWER_CHARS = 2**24  # of one value
MAX_ITEMS = 100_000  # of an iterator that stays with the program
MAX_FILE_BYTES = 2**24
MAX_OPEN_FILES = 64

# Audit events of a plain program; every other event of these modules is refused.
_GUARDED = ("os", "socket", "subprocess", "ctypes", "pty", "gc", "resource", "signal", "fcntl", "syslog", "_thread")
_HARMLESS = {"os.putenv", "os.unsetenv", "os.walk"}
_FORBIDDEN_IMPORTS = {"ctypes", "_ctypes"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEVICES = {"/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"}


def canonical(value: Any) -> str:
    """A text that two plain values share exactly when Python calls them equal, and objects of other types with none.

    Subclasses count as what they are built on, and none of their own methods is called: an `__eq__` that is always true
    does not help.
    """
    if isinstance(value, complex):
        number = complex.__add__(value, 0)
        return repr(number) if number.imag else canonical(number.real)
    if isinstance(value, float):
        real = float.__add__(value, 0.0)
        return repr(int(real)) if math.isfinite(real) and real == int(real) else repr(real)
    if isinstance(value, int):  # also True, which equals 1
        return repr(int.__add__(value, 0))
    if isinstance(value, str):
        return repr(str.__getitem__(value, slice(None)))
    if isinstance(value, bytes):
        return repr(bytes.__getitem__(value, slice(None)))
    return _canonical_container(value)


def _canonical_container(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(canonical, list.__iter__(value)))}]"
    if isinstance(value, tuple):
        return f"({','.join(map(canonical, tuple.__iter__(value)))})"
    if isinstance(value, set):
        return f"{{{_sorted(map(canonical, set.__iter__(value)))}}}"
    if isinstance(value, frozenset):
        return f"{{{_sorted(map(canonical, frozenset.__iter__(value)))}}}"
    if isinstance(value, dict):
        return f"dict{{{_sorted(f'{canonical(key)}:{canonical(item)}' for key, item in dict.items(value))}}}"
    return "None" if value is None else f"object {type(value).__name__}"


def _sorted(texts: Iterable[str]) -> str:
    return ",".join(sorted(texts))


def limit_resources(*, seconds: float, wall_seconds: float, memory_mb: int) -> None:
    """Limits of the kernel, for this process and what it might become."""
    cpu_seconds = math.ceil(time.process_time() + seconds)
    limits = {
        "RLIMIT_CPU": (cpu_seconds, cpu_seconds + 1),  # the signal of the soft limit can be ignored, SIGKILL cannot
        "RLIMIT_AS": (memory_mb * 2**20,) * 2,
        "RLIMIT_FSIZE": (MAX_FILE_BYTES,) * 2,
        "RLIMIT_NOFILE": (MAX_OPEN_FILES,) * 2,
        "RLIMIT_NPROC": (1, 1),  # neither processes nor threads; the kernel does not count those of root: `become`
        "RLIMIT_CORE": (0, 0),
    }
    for name, (soft, hard) in limits.items():
        kind = getattr(resource, name, None)
        with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS; a lower hard limit is there already
            if kind is not None:
                resource.setrlimit(kind, (soft, hard))
    signal.alarm(math.ceil(wall_seconds) + 5)  # ends a sleeper when nobody is left to kill it


def install_guard(directory: str) -> None:
    """Refuse files outside the directory (the standard library may be read), processes, threads, sockets and ctypes.

    It keeps plain programs to the rules on every platform; it is no security boundary.
    """
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "/usr/share/zoneinfo"}
    readable = tuple(os.path.realpath(path) + os.sep for path in paths)
    own = os.path.realpath(directory) + os.sep

    def check_path(path: Any, *, is_write: bool) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path or "."))
        is_own = (real + os.sep).startswith(own)
        if not is_own and real not in _DEVICES and (is_write or not (real + os.sep).startswith(readable)):
            raise PermissionError(f"the sandbox refuses {real}")

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            check_path(arguments[0], is_write=bool(arguments[2] & _WRITES))
        elif event in ("os.listdir", "os.scandir"):
            check_path(arguments[0], is_write=False)
        elif event == "import":
            if arguments[0] in _FORBIDDEN_IMPORTS:
                raise PermissionError(f"the sandbox refuses to import {arguments[0]}")
        elif event.partition(".")[0] in _GUARDED and event not in _HARMLESS:
            raise PermissionError(f"the sandbox refuses {event}")

    sys.addaudithook(guard)


class Refused(BaseException):
    """A test that cannot be judged by data alone; no fault of the program. No `except Exception` of a test hides it."""


Keep = Callable[[Any], int]


def encode(value: Any, keep: Keep) -> Any:
    """Plain data as JSON, by no method of the value's own; `keep` numbers everything else."""
    if value is None or value is True or value is False:
        return value
    for kind, plain in _ATOMS.items():
        if isinstance(value, kind):
            return plain(value)
    containers: tuple[Any, ...] = (list, tuple, set, frozenset)
    for container in containers:
        if isinstance(value, container):
            return {container.__name__: [encode(item, keep) for item in container.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in dict.items(value)]}
    return {"kept": keep(value)}


_ATOMS: dict[type, Callable[[Any], Any]] = {
    int: lambda value: int.__add__(value, 0),
    float: lambda value: float.__add__(value, 0.0),
    str: lambda value: str.__getitem__(value, slice(None)),
    bytes: lambda value: {"bytes": bytes.hex(value)},
    complex: lambda value: {"complex": [complex.__add__(value, 0).real, complex.__add__(value, 0).imag]},
}
_KINDS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}


def decode(data: Any, kept: Callable[[int], Any]) -> Any:
    if not isinstance(data, dict):
        return data
    ((name, content),) = data.items()
    if name == "kept":
        return kept(content)
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "complex":
        return complex(*content)
    if name == "dict":
        return {decode(key, kept): decode(item, kept) for key, item in content}
    return _KINDS[name](decode(item, kept) for item in content)


def serve_calls(namespace: dict[str, Any], calls: int, answers: int) -> None:
    """The program's side: its names, then what is asked of them, until the judge is gone."""
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def say(content: Any) -> None:
        file.write(json.dumps(content) + "\n")
        file.flush()

    with open(answers, "w", encoding="utf-8", errors="surrogatepass") as file:
        public = {name: value for name, value in namespace.items() if not name.startswith("__")}
        say({name: encode(value, keep) for name, value in public.items()})
        for line in open(calls, encoding="utf-8", errors="surrogatepass"):  # noqa: SIM115
            request = json.loads(line)
            target, arguments, named = (
                decode(request[key], objects.__getitem__) for key in ("target", "args", "named")
            )
            try:
                value = _ACTS[request["act"]](target, *arguments, **named)
                say({"value": encode(value, keep), "args": [encode(argument, keep) for argument in arguments]})
            except Exception as error:
                say({"raised": type(error).__name__, "text": str(error)[:1000]})


_ACTS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **named: target(*args, **named),
    "get": getattr,
    "items": lambda target: list(itertools.islice(target, MAX_ITEMS)),
}


class Program:
    """The judge's side of the pipes."""

    def __init__(self, calls: int, answers: int) -> None:
        self.calls, self.answers = open(calls, "w"), open(answers, encoding="utf-8", errors="surrogatepass")  # noqa: SIM115

    def names(self) -> dict[str, Any]:
        """What the program defines, but no builtins; by the name of a module of Python's, that module."""
        own = {name: decode(data, self.kept) for name, data in self.hear().items() if not hasattr(builtins, name)}
        return {name: import_module(name) if name in sys.stdlib_module_names else own[name] for name in own}

    def kept(self, number: int) -> Kept:
        return Kept(self, number)

    def hear(self) -> Any:
        line = self.answers.readline(MAX_ANSWER_CHARS)
        if not line.endswith("\n"):
            raise EOFError("the program has ended, or says too much")
        return json.loads(line)

    def ask(self, act: str, target: Kept, *args: Any, **named: Any) -> Any:
        request = {"act": act, "target": {"kept": target.number}}
        request |= {"args": encode(list(args), _number), "named": encode(named, _number)}
        self.calls.write(json.dumps(request) + "\n")
        self.calls.flush()
        answer = self.hear()
        if "raised" in answer:
            kind = getattr(builtins, answer["raised"], RuntimeError)
            is_error = isinstance(kind, type) and issubclass(kind, Exception)
            raise (kind if is_error else RuntimeError)(answer["text"])
        for argument, data in zip(args, answer["args"], strict=True):
            _refresh(argument, decode(data, self.kept))
        return decode(answer["value"], self.kept)


class Kept:
    """An object that stays with the program: it can be called, asked for attributes and items, and handed back."""

    def __init__(self, program: Program, number: int) -> None:
        self.program, self.number = program, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.program.ask("call", self, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return self.program.ask("get", self, name)

    def __iter__(self) -> Any:
        return iter(self.program.ask("items", self))


def _number(value: Any) -> int:
    if not isinstance(value, Kept):
        raise Refused(f"it hands the program {type(value).__name__} {value!r:.60}, which is no plain data")
    return value.number


def _refresh(argument: Any, new: Any) -> None:
    """What the program did to a container that it was handed."""
    if isinstance(argument, list):
        argument[:] = new
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(new)


def become(user: int | None) -> None:
    """Root's last act: another user, whose processes the kernel counts."""
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)


def main() -> None:
    """Run `program.py` as a script, as a program whose functions a judge calls, or as that judge's tests."""
    request = json.loads(sys.argv[1])
    report, role = request["report"], request["role"]
    sys.argv[:] = [PROGRAM]
    site.setquit()  # exit() and quit(), which the interpreter lacks without site-packages
    limit_resources(**request["limits"])
    become(request["user"])
    install_guard(os.getcwd())
    os.write(report, READY)
    if role == "script":
        runpy.run_path(PROGRAM, run_name="__main__")
    elif role == "program":
        serve_calls(runpy.run_path(PROGRAM, run_name="program"), *request["pipes"])
    else:
        try:
            namespace = runpy.run_path(PROGRAM, init_globals=Program(*request["pipes"]).names(), run_name="judge")
            text = json.dumps({"result": canonical(namespace.get(RESULT))[:MAX_REPORT_CHARS]})
        except Refused as error:
            text = json.dumps({"refused": str(error)})
        os.write(report, text.encode())


if __name__ == "__main__":
    main()
