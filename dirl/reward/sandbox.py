"""A Python program of unknown intent -> what it printed or returned, in a process that leaves nothing behind.

Always: a fresh interpreter without site-packages, an empty environment, a temporary directory, limits of CPU time,
wall clock, memory, output, files and processes, a guard inside the interpreter, and SIGKILL for the whole process group
at the end. Where they work: `bwrap` (own file system, no network), else `unshare` (no network, own process ids); and
for root, the user nobody. Only with bwrap is this a security boundary.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pwd
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from dirl.reward import sandbox_child
from dirl.reward.sandbox_child import MAX_REPORT_CHARS, PROGRAM, READY, REQUEST

Isolation = Literal["bwrap", "unshare", "none"]

START_SECONDS = 60.0  # an interpreter starts in 0.02 s, and in seconds on a loaded network file system
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Program:
    """What is run: a script that reads `stdin`, or, with `is_function`, one whose last lines bind RESULT."""

    source: str
    stdin: str = ""
    is_function: bool = False


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

    kind: Literal["finished", "timeout", "output"]  # output: more than the limit
    exit_code: int  # negative: the signal that ended it
    stdout: str
    result: str | None  # canonical text of RESULT; None unless the program's last line was reached

    @property
    def is_late(self) -> bool:
        return self.kind == "timeout" or -self.exit_code in (signal.SIGXCPU, signal.SIGKILL, signal.SIGALRM)


@dataclass(frozen=True)
class Sandbox:
    """A way of isolation that works on this machine."""

    isolation: Isolation
    user: int | None  # the user id a run gets; None: ours

    def run(self, program: Program, limits: Limits) -> Outcome:
        """Run to the end or to a limit.

        Raises:
            RuntimeError: the interpreter did not start; no fault of the program.
        """
        with tempfile.TemporaryDirectory(prefix="dirl-", ignore_cleanup_errors=True) as directory:
            return self._run_in(directory, program, limits)

    def _run_in(self, directory: str, program: Program, limits: Limits) -> Outcome:
        secret = secrets.token_hex(16)
        report, report_of_child = os.pipe()
        try:
            self._write_files(directory, program, limits, report=report_of_child, secret=secret)
            with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as errors:
                stdin.write(program.stdin.encode(errors="replace"))
                stdin.seek(0)
                process = self._start(directory, stdin, errors, report_of_child)
                os.close(report_of_child)
                report_of_child = -1
                kind, stdout, reported = _listen(process, report, limits)
                if not reported.startswith(READY):
                    errors.seek(0)
                    reason = errors.read(2000).decode(errors="replace").strip() or f"no sign of life ({kind})"
                    raise RuntimeError(f"a sandbox process ({self.isolation}) did not start: {reason}")
        finally:
            os.close(report)
            if report_of_child >= 0:
                os.close(report_of_child)
        result = _read_result(reported, secret)
        return Outcome(kind, _exit_code(process.returncode), stdout.decode(errors="replace"), result)

    def _write_files(self, directory: str, program: Program, limits: Limits, *, report: int, secret: str) -> None:
        request = {
            "report": report,
            "secret": secret,
            "is_function": program.is_function,
            "limits": {
                "seconds": limits.seconds,
                "wall_seconds": limits.wall_seconds,
                "memory_mb": limits.memory_mb,
            },
        }
        source = program.source.encode(errors="replace")  # a lone surrogate is in no file
        for name, content in ((PROGRAM, source), (REQUEST, json.dumps(request).encode())):
            Path(directory, name).write_bytes(content)
        if self.user is not None:
            for path in (directory, *(os.path.join(directory, name) for name in (PROGRAM, REQUEST))):
                os.chown(path, self.user, -1)

    def _start(self, directory: str, stdin: IO[bytes], errors: IO[bytes], report: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*_wrapper(self.isolation, directory), *_interpreter(), "-c", _child_source()],
            cwd=directory,
            env={},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=(report,),
            start_new_session=True,
            user=self.user,
            extra_groups=None if self.user is None else [],
        )


@functools.cache
def find_sandbox() -> Sandbox:
    """The strongest isolation that works here.

    Raises:
        RuntimeError: not even a plain process starts.
    """
    users = [_nobody(), None] if os.geteuid() == 0 else [None]
    isolations: tuple[Isolation, ...] = ("bwrap", "unshare", "none")
    reason = ""
    for isolation in isolations:
        for user in users:
            if isolation != "none" and shutil.which(isolation) is None:
                continue
            sandbox = Sandbox(isolation, user)
            try:
                if sandbox.run(Program("print('works')"), Limits()).stdout == "works\n":
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


def _wrapper(isolation: Isolation, directory: str) -> list[str]:
    if isolation == "none":
        return []
    program = shutil.which(isolation) or isolation
    if isolation == "unshare":
        spaces = ["--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--mount", "--mount-proc"]
        # The shell is process 1, which the kernel shields from SIGXCPU, and says how its child ended.
        return [program, *spaces, "--kill-child=SIGKILL", "--", "/bin/sh", "-c", '"$@"; exit $?', "sh"]
    seen = [argument for path in (*_SYSTEM, sys.base_prefix) for argument in ("--ro-bind-try", path, path)]
    own = ["--proc", "/proc", "--dev", "/dev", "--bind", directory, directory, "--chdir", directory]
    return [program, "--unshare-all", "--die-with-parent", *seen, *own, "--"]


def _listen(
    process: subprocess.Popen[bytes], report: int, limits: Limits
) -> tuple[Literal["finished", "timeout", "output"], bytes, bytes]:
    """Read both pipes until they end or a limit is reached, then end all there is; (how, stdout, report)."""
    assert process.stdout is not None
    output = process.stdout.fileno()
    most = {output: limits.output_bytes, report: 2 * MAX_REPORT_CHARS}
    heard = {output: bytearray(), report: bytearray()}
    deadline = time.monotonic() + START_SECONDS
    has_started = False
    kind: Literal["finished", "timeout", "output"] = "finished"
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
        if kind == "finished" and not _has_ended(process, deadline):
            kind = "timeout"
    finally:
        _end(process)
    return kind, bytes(heard[output]), bytes(heard[report])


def _has_ended(process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether the process ends by the deadline; its pipes may be closed while it goes on."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, which may outlive its leader, and close the pipe."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _exit_code(returncode: int) -> int:
    """Wrappers report a signal as 128 + its number."""
    return 128 - returncode if returncode > 128 else returncode


def _read_result(reported: bytes, secret: str) -> str | None:
    """The result after READY, if it bears the secret that the program was not told."""
    try:
        content = json.loads(reported[len(READY) :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, list) or len(content) != 2 or content[0] != secret:
        return None
    return str(content[1])
