"""Does the control thread keep its appointments, survive its jobs, a fork and the end of the interpreter?

What is due when is tested by hand with a virtual clock; threads, forks and exits in interpreters of their own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading

import pytest

from meshlib.keeper import Keeper


class Clock:
    """Time that moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[Keeper, Clock]:
    clock = Clock()
    return Keeper(clock=clock, source=random.Random(7)), clock


def in_an_interpreter(source: str, *, timeout: float = 30.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(source)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ---------------------------------------------------------------------- what is due when


def test_job_runs_once_per_interval_and_not_before() -> None:
    """A job is due one interval after it was given, and one interval after each run."""
    keeper, clock = make()
    runs: list[float] = []
    keeper.every(10.0, lambda: runs.append(clock.now), name="look", jitter=0.0)
    for now in (100.0, 109.9, 110.0, 110.1, 119.9, 120.0):
        clock.now = now
        keeper.tick(now)
    assert runs == [110.0, 120.0]


def test_first_run_may_be_set_apart_from_the_interval() -> None:
    """`first` is the delay of the first run only."""
    keeper, _ = make()
    runs: list[int] = []
    keeper.every(10.0, lambda: runs.append(1), name="look", jitter=0.0, first=0.0)
    assert [keeper.tick(100.0), keeper.tick(109.0), keeper.tick(110.0)] == [1, 0, 1]


def test_intervals_are_jittered_within_their_share() -> None:
    """With jitter 0.1 every interval lies within 10 % of the one asked for, and they differ."""
    keeper, clock = make()
    job = keeper.every(10.0, lambda: None, name="look", jitter=0.1, first=0.0)
    gaps: list[float] = []
    for _ in range(50):
        clock.now = job.due
        keeper.tick(clock.now)
        gaps.append(job.due - clock.now)
    assert min(gaps) >= 9.0
    assert max(gaps) <= 11.0
    assert len(set(gaps)) > 40


def test_coroutine_functions_are_jobs_too() -> None:
    """A job that returns an awaitable is awaited."""
    keeper, _ = make()
    runs: list[str] = []

    async def look() -> None:
        await asyncio.sleep(0)
        runs.append("looked")

    keeper.every(1.0, look, name="look", first=0.0)
    keeper.tick(100.0)
    assert runs == ["looked"]


def test_failing_job_goes_on_and_is_counted() -> None:
    """What a job raises is counted, kept as text, and the job is due again."""
    keeper, _ = make()

    def look() -> None:
        raise OSError("registry is down")

    job = keeper.every(1.0, look, name="look", jitter=0.0, first=0.0)
    for now in (100.0, 101.0, 102.0):
        keeper.tick(now)
    assert (job.runs, job.failures, job.error) == (3, 3, "OSError: registry is down")


def test_failure_is_logged_once_per_change(caplog: pytest.LogCaptureFixture) -> None:
    """The same failure again is silence; another one, and the recovery, are a line each."""
    keeper, _ = make()
    errors: list[Exception | None] = [OSError("a"), OSError("a"), OSError("b"), None, None]

    def look() -> None:
        error = errors.pop(0)
        if error is not None:
            raise error

    keeper.every(1.0, look, name="look", jitter=0.0, first=0.0)
    with caplog.at_level(logging.INFO, logger="meshlib.keeper"):
        for now in range(100, 105):
            keeper.tick(float(now))
    assert [(record.levelname, record.getMessage().rsplit(": ", 1)[-1]) for record in caplog.records] == [
        ("WARNING", "a"),
        ("WARNING", "b"),
        ("INFO", "look is well again"),
    ]


def test_what_is_no_exception_does_not_end_the_keeper_either() -> None:
    """A panic of the core and a SystemExit are BaseExceptions: counted like any other failure."""
    keeper, _ = make()

    def look() -> None:
        raise SystemExit(3)

    job = keeper.every(1.0, look, name="look", first=0.0)
    keeper.tick(100.0)
    assert job.failures == 1


def test_cancelled_job_does_not_run_again() -> None:
    """`cancel` takes a job out; cancelling twice is harmless."""
    keeper, _ = make()
    job = keeper.every(1.0, lambda: None, name="look", first=0.0)
    job.cancel()
    job.cancel()
    assert (keeper.tick(200.0), keeper.jobs) == (0, ())


def test_soon_makes_a_job_due_now() -> None:
    """A job can be asked for ahead of its time."""
    keeper, _ = make()
    job = keeper.every(60.0, lambda: None, name="look")
    assert keeper.tick(100.0) == 0
    keeper.soon(job)
    assert keeper.tick(100.0) == 1


# ---------------------------------------------------------------------- the thread


def test_thread_runs_jobs_and_coroutines_and_ends() -> None:
    """Started, the keeper runs what is due and what it is given on a thread of its own; stopped, the thread is gone."""
    keeper = Keeper()
    names: list[str] = []
    ran = threading.Event()

    def look() -> None:
        names.append(threading.current_thread().name)
        ran.set()

    async def add(a: int, b: int) -> int:
        return a + b

    before = threading.enumerate()
    keeper.every(3600.0, look, name="look", first=0.0)
    keeper.start()
    keeper.start()  # the second start changes nothing
    try:
        assert ran.wait(10)
        assert keeper.run(add(2, 3)).result(10) == 5
        # Other tests of this process may have left the shared keeper running.
        mine = [thread for thread in threading.enumerate() if thread.name == "meshlib-keeper" and thread not in before]
        assert len(mine) == 1
    finally:
        keeper.stop()
    assert names == ["meshlib-keeper"]
    assert not mine[0].is_alive()


def test_job_given_to_a_running_keeper_is_not_forgotten() -> None:
    """A keeper that sleeps for an hour wakes for a new job that is due sooner."""
    keeper = Keeper()
    keeper.every(3600.0, lambda: None, name="rare")
    keeper.start()
    try:
        ran = threading.Event()
        keeper.every(3600.0, ran.set, name="now", first=0.0)
        assert ran.wait(10)
    finally:
        keeper.stop()


def test_slow_job_does_not_run_twice_at_once_and_holds_nobody_up() -> None:
    """A coroutine that waits for the network runs once at a time, and other jobs run meanwhile."""
    keeper = Keeper()
    begun = 0
    others = threading.Event()
    count = 0

    async def slow() -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(3600)

    def quick() -> None:
        nonlocal count
        count += 1
        if count == 20:
            others.set()

    keeper.every(0.001, slow, name="slow", first=0.0)
    keeper.every(0.001, quick, name="quick", first=0.0)
    keeper.start()
    try:
        assert others.wait(10)
    finally:
        keeper.stop()
    assert begun == 1


def test_stopped_keeper_cancels_what_runs_and_may_start_again() -> None:
    """Coroutines see their cancellation before the loop closes; the jobs are still known."""
    keeper = Keeper()
    began, cancelled, again = threading.Event(), threading.Event(), threading.Event()

    async def wait() -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    keeper.run(wait())
    assert began.wait(10)
    keeper.stop()
    assert cancelled.is_set()
    keeper.every(3600.0, again.set, name="again", first=0.0)
    keeper.start()
    assert again.wait(10)
    keeper.stop()


def test_import_starts_no_thread() -> None:
    """Nothing runs before the first start."""
    done = in_an_interpreter("import threading, meshlib.keeper; print(threading.active_count())")
    assert (done.stdout, done.stderr) == ("1\n", "")


# ---------------------------------------------------------------------- exit and fork


EXIT = """
    import asyncio, time
    from meshlib.keeper import Keeper
    keeper = Keeper()
    async def wait():
        await asyncio.sleep(3600)
    keeper.every(0.001, lambda: sum(range(500)), name="busy", first=0.0)
    keeper.every(0.001, wait, name="waits", first=0.0)
    keeper.start()
    keeper.run(wait())
    time.sleep(0.02)
"""


def test_interpreter_ends_cleanly_with_the_keeper_running() -> None:
    """20 of 20 interpreters end with status 0 and without a word, though nobody stopped the keeper."""
    ends = []
    for _ in range(20):
        done = in_an_interpreter(EXIT)
        ends.append((done.returncode, done.stdout, done.stderr))
    assert ends == [(0, "", "")] * 20


FORK = """
    import os, sys, threading, time
    from meshlib.keeper import Keeper

    keeper = Keeper()
    pids, forked = [], []
    ran = threading.Event()
    def look():
        pids.append(os.getpid())
        ran.set()
    keeper.on_fork(lambda: forked.append(os.getpid()))
    keeper.every(0.002, look, name="look", first=0.0)
    keeper.start()
    assert ran.wait(10)

    def child():
        assert forked == [os.getpid()], forked
        assert not keeper.is_running
        assert threading.active_count() == 1, threading.enumerate()
        before = len(pids)
        time.sleep(0.02)
        assert len(pids) == before          # it does not start by itself
        ran.clear()
        keeper.start()                      # as the ways do at the next call
        assert ran.wait(10)
        assert pids[-1] == os.getpid()
        keeper.stop()

    for _ in range({times}):
        pid = os.fork()
        if pid == 0:
            try:
                child()
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        ran.clear()
        assert ran.wait(10)                 # the parent's keeper goes on, its loop unharmed
        assert pids[-1] == os.getpid()
    assert forked == []                     # never in the parent
    async def answer():
        return 42
    assert keeper.run(answer()).result(10) == 42
    print("well")
"""


def test_forked_child_has_a_keeper_of_its_own() -> None:
    """After a fork the parent's keeper goes on; the child's starts when used, with the same jobs, again and again."""
    done = in_an_interpreter(FORK.replace("{times}", "20"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


FORK_WHILE_BUSY = """
    import os, threading, time
    from meshlib.keeper import Keeper

    lock = threading.Lock()                 # stands for a lock of the core, taken by a job for a moment
    keeper = Keeper()
    def publish():
        with lock:
            time.sleep(0.0005)          # without the GIL, as native code runs
    keeper.every(0.0001, publish, name="publish", first=0.0)
    keeper.start()
    for _ in range(100):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if lock.acquire(timeout=2) else 9)
        assert os.waitpid(pid, 0)[1] == 0
    print("well")
"""


def test_no_fork_happens_in_the_middle_of_a_job() -> None:
    """The keeper rests while memory is copied: a lock that a job takes is free in every child."""
    done = in_an_interpreter(FORK_WHILE_BUSY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


FORK_WHILE_ASLEEP = """
    import asyncio, os, threading
    from meshlib.keeper import Keeper

    keeper = Keeper()
    runs = []
    ran = threading.Event()
    async def wait():
        runs.append(os.getpid())
        ran.set()
        await asyncio.sleep(3600)
    keeper.every(0.001, wait, name="waits", first=0.0)
    keeper.start()
    assert ran.wait(10)
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            ran.clear()
            keeper.start()
            os._exit(0 if ran.wait(10) and runs[-1] == os.getpid() else 9)
        assert os.waitpid(pid, 0)[1] == 0
    async def answer():
        return 42
    assert keeper.run(answer()).result(10) == 42
    assert len(runs) == 1
    print("well")
"""


def test_fork_leaves_a_sleeping_parent_reachable_and_a_waiting_job_due_in_the_child() -> None:
    """What wakes the parent's loop is not taken from it by the child, and what ran in the parent runs anew in the
    child.
    """
    done = in_an_interpreter(FORK_WHILE_ASLEEP)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


FORK_FROM_THREADS = """
    import os, threading
    import meshlib.keeper
    from meshlib.keeper import Keeper
    meshlib.keeper.PATIENCE = 3600
    keeper = Keeper()
    keeper.every(0.0001, lambda: None, name="look", first=0.0)
    keeper.start()
    def fork():
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
    threads = [threading.Thread(target=fork) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    async def answer():
        return 42
    assert keeper.run(answer()).result(10) == 42
    async def fork_here():
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        return os.waitpid(pid, 0)[1]
    assert keeper.run(fork_here()).result(10) == 0
    print("well")
"""


def test_forks_from_several_threads_and_from_the_keeper_itself_do_not_lock_up() -> None:
    """Whoever forks, the keeper goes on afterwards."""
    done = in_an_interpreter(FORK_FROM_THREADS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "well\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_child_of_multiprocessing_fork_ends_cleanly() -> None:
    """A forked worker that uses the keeper and returns exits with status 0."""
    done = in_an_interpreter(
        """
        import multiprocessing
        from meshlib.keeper import shared
        shared().start()
        def work():
            async def answer():
                return 42
            assert shared().run(answer()).result(10) == 42
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        process.join(20)
        print(process.exitcode)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
