"""A Python program of unknown intent -> what it printed or returned, in a process that leaves nothing behind.

Always: a fresh interpreter without site-packages, an empty environment, a temporary directory, limits of CPU time,
wall clock, memory, output, files and processes, a guard inside the interpreter, and SIGKILL for the whole process group
at the end. Where they work: `bwrap` (own file system of bounded size, no network), else `unshare` (no network, own
process ids); and for root, the user nobody, since the kernel counts no processes of root. Only with bwrap is this a
security boundary.

Tests of functions have a judge: a second such process, with a directory of its own, which alone holds the tests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import select
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from dirl.reward import sandbox_child
from dirl.reward.sandbox_child import MAX_REPORT_CHARS, PROGRAM, READY

Isolation = Literal["bwrap", "unshare", "none"]
Kind = Literal["finished", "timeout", "output"]

START_SECONDS = 60.0  # an interpreter starts in 0.02 s, and in seconds on a loaded network file system
_LATE = (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)
MAX_FILES_MB = 32  # of a sandbox's own file system
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")


Role = Literal["script", "program", "judge"]


@dataclass(frozen=True)
class Limits:
    """Of one run."""

    seconds: float = 1.0  # CPU time; the kernel counts whole seconds, so up to one more
    memory_mb: int = 512  # address space
    output_bytes: int = 2**20  # a program that prints more is stopped

    @property
    def wall_seconds(self) -> float:
        """Other work on the machine must not fail a program, nor may one that sleeps hold up the rest."""
        return 3 * self.seconds + 2


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    kind: Kind  # output: more than the limit
    exit_code: int  # negative: the signal that ended it
    stdout: str

    @property
    def is_late(self) -> bool:
        return self.kind == "timeout" or -self.exit_code in _LATE


@dataclass(frozen=True)
class Judgement:
    """What a judge found."""

    result: str | None  # canonical text of what the test bound to RESULT; None: it did not reach its end
    refused: str  # why it cannot judge; "": it can
    is_late: bool


@dataclass(frozen=True)
class Sandbox:
    """A way of isolation that works on this machine."""

    isolation: Isolation
    user: int | None  # the user id that root's runs get; None: ours

    def run(self, source: str, limits: Limits, *, stdin: str = "") -> Outcome:
        """Run a script to the end or to a limit.

        Raises:
            RuntimeError: the interpreter did not start; no fault of the program.
        """
        with _Process(self, "script", source, limits, stdin=stdin) as process:
            kind, stdout = process.listen(limits)
        return Outcome(kind, _exit_code(process.popen.returncode), stdout.decode(errors="replace"))

    def judge(self, source: str, test: str, limits: Limits) -> Judgement:
        """Run a program, and beside it a test that knows its functions only by what they return.

        Raises:
            RuntimeError: an interpreter did not start.
        """
        with ExitStack() as stack:
            (calls, to_program), (answers, to_judge) = os.pipe(), os.pipe()
            with ExitStack() as ends:
                for end in (calls, to_program, answers, to_judge):
                    ends.callback(os.close, end)
                program = stack.enter_context(_Process(self, "program", source, limits, pipes=(calls, to_judge)))
                judge = stack.enter_context(_Process(self, "judge", test, limits, pipes=(to_program, answers)))
            program.wait_for_start()
            kind, _ = judge.listen(limits)
            is_late = kind == "timeout" or (program.has_ended(1.0) and -_exit_code(program.popen.returncode) in _LATE)
        found = judge.read_report()
        return Judgement(found.get("result"), str(found.get("refused", "")), is_late)


class _Process:
    """One process of a sandbox, with a directory of its own; ended, with all that it started, when it is left."""

    def __init__(
        self, sandbox: Sandbox, role: Role, source: str, limits: Limits, *, stdin: str = "", pipes: Sequence[int] = ()
    ) -> None:
        self.sandbox, self.heard = sandbox, b""
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="dirl-", ignore_cleanup_errors=True))
            self.errors = stack.enter_context(tempfile.TemporaryFile())
            input_file = stack.enter_context(tempfile.TemporaryFile())
            input_file.write(stdin.encode(errors="replace"))
            input_file.seek(0)
            Path(directory, PROGRAM).write_bytes(source.encode(errors="replace"))  # a lone surrogate is in no file
            if sandbox.user is not None:
                for path in (directory, os.path.join(directory, PROGRAM)):
                    os.chown(path, sandbox.user, -1)
            self.report, report_of_child = os.pipe()
            stack.callback(os.close, self.report)
            limited = {name: getattr(limits, name) for name in ("seconds", "wall_seconds", "memory_mb")}
            request = {"role": role, "report": report_of_child, "user": sandbox.user, "pipes": pipes, "limits": limited}
            try:
                self.popen = subprocess.Popen(
                    [*_wrapper(sandbox, directory), *_interpreter(), "-c", _child_source(), json.dumps(request)],
                    cwd=directory,
                    env={},
                    stdin=input_file,
                    stdout=subprocess.DEVNULL if role == "program" else subprocess.PIPE,
                    stderr=self.errors,
                    pass_fds=(report_of_child, *pipes),
                    start_new_session=True,
                )
            finally:
                os.close(report_of_child)
            stack.callback(_end, self.popen)
            self.stack = stack.pop_all()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def wait_for_start(self) -> None:
        """Raises: RuntimeError if the interpreter does not say that it runs."""
        ready, _, _ = select.select([self.report], [], [], START_SECONDS)
        self.heard += os.read(self.report, len(READY)) if ready else b""
        self.check_start("finished" if ready else "timeout")

    def check_start(self, kind: str) -> None:
        if not self.heard.startswith(READY):
            self.errors.seek(0)
            reason = self.errors.read(2000).decode(errors="replace").strip() or f"no sign of life ({kind})"
            raise RuntimeError(f"a sandbox process ({self.sandbox.isolation}) did not start: {reason}")

    def listen(self, limits: Limits) -> tuple[Kind, bytes]:
        """How it ended, by itself or by a limit, and what it printed."""
        kind, stdout, self.heard = _listen(self.popen, self.report, limits)
        self.check_start(kind)
        return kind, stdout

    def has_ended(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        try:
            self.popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def read_report(self) -> dict[str, Any]:
        """What a judge says after READY; nothing if it did not come so far."""
        content = self.heard[len(READY) :]
        return dict(json.loads(content)) if content else {}


@functools.cache
def find_sandbox() -> Sandbox:
    """The strongest isolation that works here.

    Raises:
        RuntimeError: not even a plain process starts.
    """
    users = [_nobody(), None] if os.geteuid() == 0 else [None]
    isolations: tuple[Isolation, ...] = ("bwrap", "unshare", "none")
    reason = ""
    for isolation, user in product(isolations, users):
        if isolation != "none" and shutil.which(isolation) is None:
            continue
        sandbox = Sandbox(isolation, user)
        try:
            if sandbox.run("import decimal, random\nprint('works')", Limits()).stdout == "works\n":
                return sandbox
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            reason = str(error)
    raise RuntimeError(f"no sandbox for generated code starts on this machine: {reason}")


def _nobody() -> int:
    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return 65534


def _interpreter() -> list[str]:
    """The base interpreter: no environment variables, no site-packages, no bytecode files, UTF-8."""
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8"]


@functools.cache
def _child_source() -> str:
    return Path(sandbox_child.__file__).read_text(encoding="utf-8")


def _wrapper(sandbox: Sandbox, directory: str) -> list[str]:
    if sandbox.isolation == "none":
        return []
    program = shutil.which(sandbox.isolation) or sandbox.isolation
    is_root = sandbox.user is not None  # who needs no user namespace, and in one could not become nobody
    if sandbox.isolation == "unshare":
        spaces = ["--net", "--ipc", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child=SIGKILL"]
        spaces += [] if is_root else ["--user", "--map-current-user"]
        # The shell is process 1, which the kernel shields from SIGXCPU, and says how its child ended.
        return [program, *spaces, "--", "/bin/sh", "-c", '"$@"; exit $?', "sh"]
    spaces = ["--unshare-all"]
    if is_root:
        spaces = [f"--unshare-{space}" for space in ("ipc", "pid", "net", "uts", "cgroup-try")]
        spaces += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    parents = dict.fromkeys(
        str(path) for of in (sys.base_prefix, directory) for path in reversed(Path(of).parents[:-1])
    )
    open_to_all = [argument for path in parents for argument in ("--perms", "0755", "--dir", path)]  # also for nobody
    seen = [argument for path in (*_SYSTEM, sys.base_prefix) for argument in ("--ro-bind-try", path, path)]
    source = os.path.join(directory, PROGRAM)
    own = ["--perms", "0777", "--size", str(MAX_FILES_MB * 2**20), "--tmpfs", directory, "--ro-bind", source, source]
    fixed = ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", directory]
    return [
        program,
        *spaces,
        "--die-with-parent",
        *open_to_all,
        *seen,
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        *own,
        *fixed,
        "--",
    ]


def _listen(process: subprocess.Popen[bytes], report: int, limits: Limits) -> tuple[Kind, bytes, bytes]:
    """Read both pipes until they end or a limit is reached, then end all there is; (how, stdout, report)."""
    assert process.stdout is not None
    output = process.stdout.fileno()
    most = {output: limits.output_bytes, report: 2 * MAX_REPORT_CHARS}
    heard = {output: bytearray(), report: bytearray()}
    deadline = time.monotonic() + START_SECONDS
    has_started = False
    kind: Kind = "finished"
    try:
        with selectors.DefaultSelector() as selector:
            for pipe in heard:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map() and kind == "finished":
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    chunk = os.read(key.fd, 65536)
                    heard[key.fd] += chunk
                    if not chunk:
                        selector.unregister(key.fd)
                if not has_started and heard[report]:
                    has_started, deadline = True, time.monotonic() + limits.wall_seconds
                if time.monotonic() >= deadline:
                    kind = "timeout"
                if any(len(heard[pipe]) > most[pipe] for pipe in heard):
                    kind = "output"
        if kind == "finished":
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # its pipes may be closed while it goes on
        kind = "timeout"
    finally:
        _end(process)
    return kind, bytes(heard[output]), bytes(heard[report])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, which may outlive its leader, and close the pipe."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _exit_code(returncode: int) -> int:
    """Wrappers report a signal as 128 + its number."""
    return 128 - returncode if returncode > 128 else returncode
