"""A pool whose children hang, die and lie still answers everything else, and leaves no process behind."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dirl.reward.killable_pool import CRASH, TIMEOUT, KillablePool


def load_obedient_child() -> Callable[[str, str], str]:
    def obey(act: str, word: str) -> str:
        if act == "hang":
            time.sleep(600)
        if act == "spin":
            str(9 ** (9**9))  # one call into C: no signal handler of Python's runs before it returns
        if act == "die":
            os._exit(3)
        if act == "eat":
            return str(len(bytearray(2**31)))
        if act == "chat":
            print("right\nright")
        return ascii(word)

    return obey


def load_broken_child() -> Callable[[str, str], str]:
    raise ImportError("no such library")


@pytest.fixture(scope="module")
def pool() -> Iterator[KillablePool]:
    pool = make_pool()
    yield pool
    pool.close()


def make_pool(loader: str = "load_obedient_child") -> KillablePool:
    return KillablePool(entry=f"{__name__}:{loader}", num_workers=2, timeout_seconds=1.0, memory_limit_mb=512)


def say(word: str) -> tuple[str, str]:
    return ("say", word)


def is_running(pid: int) -> bool:
    """Whether the process exists and is more than a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for_end(pids: list[int], *, seconds: float) -> list[int]:
    """Processes that still run after the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def test_answers_each_question_once(pool: KillablePool) -> None:
    words = ["a", "b", "a", "\u00e9\0\n\udc80", "x" * 1000]
    assert pool.ask([say(word) for word in words]) == {say(word): ascii(word) for word in words}
    assert pool.ask([]) == {}


@pytest.mark.parametrize(("act", "outcome"), [("hang", TIMEOUT), ("spin", TIMEOUT), ("die", CRASH), ("eat", CRASH)])
def test_a_bad_question_spoils_no_other(pool: KillablePool, act: str, outcome: str) -> None:
    words = [f"word{number}" for number in range(20)]
    start = time.monotonic()
    answers = pool.ask([(act, "x"), *map(say, words)])
    assert answers.pop((act, "x")) == outcome
    assert answers == {say(word): ascii(word) for word in words}
    assert time.monotonic() - start < 10


def test_questions_that_hang_cost_no_new_child() -> None:
    """Only the child's fork ends, and the next one is as warm: no interpreter starts again."""
    pool = KillablePool(
        entry=f"{__name__}:load_obedient_child", num_workers=2, timeout_seconds=0.2, memory_limit_mb=512
    )
    pool.ask([say("a"), say("b")])
    pids = [child.process.pid for child in pool._children]
    questions = [("spin", str(number)) for number in range(8)]
    assert pool.ask([*questions, say("c")]) == {**dict.fromkeys(questions, TIMEOUT), say("c"): "'c'"}
    assert [child.process.pid for child in pool._children] == pids
    pool.close()
    assert wait_for_end(pids, seconds=3) == []


def test_printing_is_not_answering(pool: KillablePool) -> None:
    assert pool.ask([("chat", "x"), say("y")]) == {("chat", "x"): "'x'", say("y"): "'y'"}


def test_a_child_killed_while_idle_is_replaced(pool: KillablePool) -> None:
    pool.ask([say("a")])
    idle = [child for child in pool._children if child.is_idle]
    assert idle
    for child in idle:
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.wait()
    assert pool.ask([say("c"), say("d")]) == {say("c"): "'c'", say("d"): "'d'"}


def test_a_child_that_cannot_start_is_an_error_not_a_verdict() -> None:
    broken = make_pool("load_broken_child")
    with pytest.raises(RuntimeError, match=r"load_broken_child did not start \(exit code 1\)"):
        broken.ask([say("a")])
    assert broken._children == []


def test_works_from_threads_and_event_loops(pool: KillablePool) -> None:
    with ThreadPoolExecutor(4) as executor:
        results = list(
            executor.map(lambda word: pool.ask([say(word), ("hang", "x")] if word == "a" else [say(word)]), "abcd")
        )
    assert results == [{say("a"): "'a'", ("hang", "x"): TIMEOUT}, *({say(word): ascii(word)} for word in "bcd")]

    async def ask_twice() -> list[dict[tuple[str, ...], str]]:
        inside = pool.ask([say("inside")])
        return [inside, await asyncio.to_thread(pool.ask, [say("beside")])]

    assert asyncio.run(ask_twice()) == [{say("inside"): "'inside'"}, {say("beside"): "'beside'"}]


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_ranks_have_children_of_their_own(pool: KillablePool) -> None:
    pool.ask([say("a"), say("b")])
    before = {child.process.pid for child in pool._children}
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def rank(word: str) -> None:
        answers = pool.ask([say(word), say("shared")])
        queue.put((answers, [child.process.pid for child in pool._children]))
        pool.close()

    with pool._lock:  # as if another thread were grading at the moment of the fork
        ranks = [context.Process(target=rank, args=(word,), daemon=True) for word in "xy"]
        for process in ranks:
            process.start()
    results = [queue.get() for _ in ranks]
    for process in ranks:
        process.join(20)
        assert process.exitcode == 0
    assert sorted(answers[say("shared")] for answers, _ in results) == ["'shared'", "'shared'"]
    assert all(before.isdisjoint(pids) for _, pids in results)
    assert {child.process.pid for child in pool._children} == before
    assert pool.ask([say("still here")]) == {say("still here"): "'still here'"}


def test_close_ends_the_children_and_ask_starts_new_ones() -> None:
    pool = make_pool()
    pool.ask([say("a"), say("b")])
    pids = [child.process.pid for child in pool._children]
    pool.close()
    assert len(pids) == 2 and not any(map(is_running, pids))
    assert pool.ask([say("c")]) == {say("c"): "'c'"}
    pool.close()


SCRIPT = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from dirl.reward.killable_pool import KillablePool
open(sys.argv[1], "a").write("run\\n")
limits = dict(num_workers=2, timeout_seconds=1, memory_limit_mb=512)
pool = KillablePool(entry="test_killable_pool:load_obedient_child", **limits)
pool.ask([("say", "a"), ("say", "b")])
print(*[child.process.pid for child in pool._children], flush=True)
if sys.argv[2] == "die busy":
    threading.Thread(target=pool.ask, args=([("spin", "x")],), daemon=True).start()
    time.sleep(0.3)
if sys.argv[2].startswith("die"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("ending", ["return", "die idle", "die busy"])
def test_no_child_survives_an_unguarded_script(tmp_path: Path, ending: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    log = tmp_path / "log"
    run = subprocess.run([sys.executable, script, log, ending], capture_output=True, text=True, timeout=60, check=False)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 2, run.stderr
    assert log.read_text() == "run\n", "a child ran the main script again"
    assert run.returncode == (0 if ending == "return" else -signal.SIGKILL)
    # A busy one is ended by the kernel's limit of CPU time.
    assert wait_for_end(pids, seconds=15 if ending == "die busy" else 3) == []
