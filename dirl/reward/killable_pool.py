"""Questions -> answers from child processes that may be killed: for functions that can hang or eat all memory.

Each answer has limits of CPU time and memory, kept by the kernel, and of wall-clock time, kept here by SIGKILL. A child
is a plain `python -c` with two pipes: no thread, no pickle and no re-import of the caller's main module (all three of
which multiprocessing needs). So a child does not load torch because the caller did; the pool may be used from threads,
event loops, forked ranks and unguarded scripts; and a child ends by itself when its parent is gone.

What answers is a fork of the child. Where a question ends it, the child says so and forks the next one, warm as it is
itself: a question that hangs costs its own time and no start of an interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence

TIMEOUT, CRASH = "timeout", "crash"  # what a question gets instead of an answer

Question = tuple[str, ...]

WALL_PER_CPU = 6  # seconds a question may take for each of CPU time: other work must not fail it, nor may it sleep on
START_SECONDS = 120  # imports take half a second, and a minute on a loaded network file system

_BOOT = (
    "import json, sys; options = json.loads(sys.argv[1]); sys.path[:] = options.pop('path'); "
    "from dirl.reward.killable_pool import serve; serve(**options)"
)


def serve(*, entry: str, timeout_seconds: float, memory_limit_mb: int) -> None:
    """Body of a child: a question per line on stdin (a JSON list), an answer per line on stdout, until end of file."""
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not look like an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    module, _, loader = entry.partition(":")
    answer = getattr(importlib.import_module(module), loader)()
    logging.disable()
    os.write(answers, b"ready\n")
    while (pid := os.fork()) != 0:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:  # end of file
            return
        os.write(answers, (TIMEOUT if -code in (signal.SIGPROF, signal.SIGXCPU) else CRASH).encode() + b"\n")
    _set_limit(resource.RLIMIT_CORE, 0)
    _set_limit(resource.RLIMIT_AS, memory_limit_mb * 2**20)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, timeout_seconds)  # of CPU time; without a handler SIGPROF ends even C code
        os.write(answers, answer(*json.loads(line)).encode() + b"\n")


def _set_limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    with contextlib.suppress(ValueError, OSError):  # macOS has no RLIMIT_AS
        resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


class _Child:
    """One process and the question it is busy with; `question` is None while it starts and while it is idle."""

    def __init__(self, *, entry: str, timeout_seconds: float, memory_limit_mb: int) -> None:
        options = {"entry": entry, "timeout_seconds": timeout_seconds, "memory_limit_mb": memory_limit_mb}
        command = [sys.executable, "-c", _BOOT, json.dumps({**options, "path": sys.path})]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.entry = entry
        self.timeout_seconds = timeout_seconds
        self.question: Question | None = None
        self.is_ready = False
        self.deadline = time.monotonic() + START_SECONDS

    @property
    def is_idle(self) -> bool:
        return self.is_ready and self.question is None

    def ask(self, question: Question) -> None:
        self.question = question
        self.deadline = time.monotonic() + WALL_PER_CPU * self.timeout_seconds
        with contextlib.suppress(BrokenPipeError):  # it died idle: its answer is then an end of file
            self.stdin.write(json.dumps(question).encode() + b"\n")

    def collect(self, *, is_late: bool) -> tuple[Question, str] | None:
        """The question and its answer, or None from a child that has just become ready. A late or dead one is ended."""
        answer = "" if is_late else os.read(self.stdout.fileno(), 4096).decode().strip()
        question, self.question = self.question, None
        if not answer:
            self.kill()
        if question is None and answer != "ready":
            raise RuntimeError(
                f"a child process for {self.entry} did not start (exit code {self.process.returncode}); "
                f"its own message stands above; does `import {self.entry.partition(':')[0]}` work?"
            )
        self.is_ready = True
        if question is None:
            return None
        return question, answer or (TIMEOUT if is_late else CRASH)

    def kill(self) -> None:
        """And its fork."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.release()

    def release(self) -> None:
        """Close the pipes; a child that is idle then ends."""
        self.stdin.close()
        self.stdout.close()


class KillablePool:
    """Child processes that answer questions; started when first needed, replaced when killed.

    Args:
        entry: `module:loader`; the loader is called once in the child and returns the function that turns the strings
            of a question into one line of text.
        num_workers: processes at most; 0 takes one per usable core, at most 4.
        timeout_seconds: CPU time per question; of wall clock it may take WALL_PER_CPU times as much.
        memory_limit_mb: address space per process.
    """

    def __init__(self, *, entry: str, num_workers: int, timeout_seconds: float, memory_limit_mb: int) -> None:
        self.entry = entry
        self.num_workers = num_workers or min(4, count_usable_cores())
        self.timeout_seconds = timeout_seconds
        self.memory_limit_mb = memory_limit_mb
        self._children: list[_Child] = []
        self._lock = threading.Lock()  # one batch at a time; each uses all children
        weakref.finalize(self, _kill_all, self._children)  # also runs at exit
        _POOLS.add(self)

    def ask(self, questions: Sequence[Question]) -> dict[Question, str]:
        """The answer to each question, TIMEOUT or CRASH. Equal questions are asked once.

        Raises:
            RuntimeError: a child did not start.
        """
        waiting = deque(dict.fromkeys(questions))
        num_questions = len(waiting)
        answers: dict[Question, str] = {}
        with self._lock:
            try:
                while len(answers) < num_questions:
                    self._hire(num_questions - len(answers))
                    for child in self._children:
                        if child.is_idle and waiting:
                            child.ask(waiting.popleft())
                    answers.update(self._wait())
            finally:  # an interrupt must not leave a stale answer in a pipe
                self._dismiss([child for child in self._children if child.question or child.process.returncode])
        return answers

    def close(self) -> None:
        """End the children. A later `ask` starts new ones."""
        with self._lock:
            _kill_all(self._children)

    def _hire(self, num_questions: int) -> None:
        self._dismiss([child for child in self._children if child.is_idle and child.process.poll() is not None])
        while len(self._children) < min(self.num_workers, num_questions):
            child = _Child(entry=self.entry, timeout_seconds=self.timeout_seconds, memory_limit_mb=self.memory_limit_mb)
            self._children.append(child)

    def _dismiss(self, children: list[_Child]) -> None:
        self._children[:] = [child for child in self._children if child not in children]
        _kill_all(children)

    def _wait(self) -> list[tuple[Question, str]]:
        """Sleep until a child has answered, died, or run out of time; what has been settled by that."""
        pending = [child for child in self._children if not child.is_idle]
        with selectors.DefaultSelector() as selector:
            for child in pending:
                selector.register(child.stdout, selectors.EVENT_READ, child)
            seconds = min(child.deadline for child in pending) - time.monotonic()
            heard = [key.data for key, _ in selector.select(max(0.0, seconds))]
        late = [child for child in pending if child not in heard and child.deadline <= time.monotonic()]
        settled = [child.collect(is_late=child in late) for child in heard + late]
        return [item for item in settled if item]

    def _forget(self) -> None:
        """In a forked process: the children, and a lock that another thread may have held, are the parent's."""
        while self._children:
            self._children.pop().release()
        self._lock = threading.Lock()


def count_usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _kill_all(children: list[_Child]) -> None:
    while children:
        children.pop().kill()


_POOLS: weakref.WeakSet[KillablePool] = weakref.WeakSet()


def _forget_children_of_parent() -> None:
    for pool in list(_POOLS):
        pool._forget()


os.register_at_fork(after_in_child=_forget_children_of_parent)
