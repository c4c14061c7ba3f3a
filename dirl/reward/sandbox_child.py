"""What runs inside a sandbox process: limits, then the guard, then the program; at last a report of its result.

The parent passes this file's text to `python -I -S -c`, so it imports nothing but the standard library. The working
directory holds `program.py` and `request.json`; the latter is gone before the program starts.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterable
from typing import Any

REQUEST, PROGRAM, RESULT = "request.json", "program.py", "_dirl_result"
READY = b"ready\n"
MAX_REPORT_CHARS = 65536
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
        "RLIMIT_NPROC": (1, 1),  # neither processes nor threads; the kernel does not count those of root
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


def main() -> None:
    """Run `program.py`; the report ends with its result only if the program reached its last line."""
    with open(REQUEST, encoding="utf-8") as file:
        request = json.load(file)
    os.unlink(REQUEST)
    report = request["report"]
    if request["is_function"]:  # what it prints is nobody's business
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.argv[:] = [PROGRAM]
    site.setquit()  # exit() and quit(), which the interpreter lacks without site-packages
    limit_resources(**request["limits"])
    install_guard(os.getcwd())
    os.write(report, READY)
    namespace = runpy.run_path(PROGRAM, run_name="program" if request["is_function"] else "__main__")
    if request["is_function"]:
        text = json.dumps([request["secret"], canonical(namespace.get(RESULT))[:MAX_REPORT_CHARS]])
        os.write(report, text.encode())


if __name__ == "__main__":
    main()
