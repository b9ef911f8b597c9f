"""Who does the control work, when nobody asked for it just now?

One thread of Python per process, the keeper, with an asyncio loop of its own: discovery's looks, the rotation of
identities, the reload of configuration, the metrics listener. It is a thread, because an application may have no event
loop, or several; it is one, because control work is rare and must never compete with calls; and it is Python's, because
native threads do not survive a fork. It starts with the first `start`, never at import, and what it learns is published
as immutable snapshots.

What is due when is decided by a `Schedule`, which knows neither threads nor clocks: `tick(now)` runs it by hand, in
tests.

Around a fork: before it, the keeper rests between two jobs, so that no lock of ours is held while memory is copied; the
parent goes on; the child has the same jobs and starts its own thread when it is next used. At exit it ends before the
interpreter does.

It does not run anything that belongs to a call, and it does not retry: a job that failed comes again when it is due.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import inspect
import logging
import os
import random
import selectors
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

logger = logging.getLogger("meshlib.keeper")

T = TypeVar("T")
Work = Callable[[], object]  # a plain function, or one that returns an awaitable

# How long a fork or an exit waits for a job in progress. A job that takes longer is waiting for the network and holds
# no lock of ours.
PATIENCE = 1.0


class Job:
    """A function that is due again and again. `failures` and `runs` are counted over its life."""

    __slots__ = ("_forget", "due", "error", "failures", "function", "is_running", "jitter", "name", "runs", "seconds")

    def __init__(self, name: str, function: Work, seconds: float, jitter: float, due: float) -> None:
        self.name = name
        self.function = function
        self.seconds = seconds
        self.jitter = jitter
        self.due = due
        self.is_running = False
        self.runs = 0
        self.failures = 0
        self.error = ""  # what went wrong the last time; "" when it went well
        self._forget: Callable[[Job], None] | None = None  # known to the schedule that has it

    def __repr__(self) -> str:
        state = f"failing: {self.error}" if self.error else "well"
        return f"<Job {self.name!r} every {self.seconds:g} s, {self.runs} runs, {self.failures} failures, {state}>"

    def cancel(self) -> None:
        """Never again. A run in progress ends by itself."""
        if self._forget is not None:
            self._forget(self)


class Schedule:
    """Which jobs are due at `now`? Plain state: no thread, no clock, and a random source that is given."""

    def __init__(self, source: random.Random) -> None:
        self.jobs: list[Job] = []
        self._random = source

    def add(self, job: Job) -> None:
        job._forget = self.forget
        self.jobs.append(job)

    def forget(self, job: Job) -> None:
        with contextlib.suppress(ValueError):
            self.jobs.remove(job)

    def due(self, now: float) -> list[Job]:
        """The jobs to run now, the longest due first. A job that still runs is not run twice."""
        return sorted((job for job in tuple(self.jobs) if job.due <= now and not job.is_running), key=lambda job: job.due)

    def pause(self, now: float) -> float | None:
        """Seconds until the next job is due; None if only running jobs, or none, are left."""
        return min((max(0.0, job.due - now) for job in tuple(self.jobs) if not job.is_running), default=None)

    def begin(self, job: Job) -> None:
        job.is_running = True

    def end(self, job: Job, error: BaseException | None, now: float) -> None:
        """The job is due again one interval later, jittered, so that the processes of a fleet spread."""
        job.is_running = False
        job.runs += 1
        job.due = now + job.seconds * (1.0 + job.jitter * self._random.uniform(-1.0, 1.0))
        text = "" if error is None else f"{type(error).__name__}: {error}"
        if error is not None:
            job.failures += 1
        if text != job.error:  # a state is logged when it changes, not each time that it is met
            if error is not None:
                logger.warning("%s failed and will be tried again every %g s: %s", job.name, job.seconds, text, exc_info=error)
            else:
                logger.info("%s is well again", job.name)
            job.error = text


class Keeper:
    """The control thread of a process and its jobs. All methods may be called from any thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, source: random.Random | None = None) -> None:
        self._clock = clock
        self._schedule = Schedule(source or random.Random())  # spreads load; nothing secret hangs on it
        self._on_fork: list[Callable[[], Callable[[], None] | None]] = []
        self._new_thread_state()

    def _new_thread_state(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._selector: selectors.BaseSelector | None = None
        self._changed: asyncio.Event | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._resting = 0
        self._is_at_rest = threading.Event()
        self._may_go_on = threading.Event()

    # ------------------------------------------------------------------ jobs

    @property
    def is_running(self) -> bool:
        return self._thread is not None

    @property
    def jobs(self) -> tuple[Job, ...]:
        return tuple(self._schedule.jobs)

    def every(self, seconds: float, function: Work, *, name: str, jitter: float = 0.1, first: float | None = None) -> Job:
        """Run `function` (plain, or a coroutine function) every `seconds`, jittered; `first` seconds from now, or one
        interval.

        A plain function must be quick: it runs on the keeper's loop. What it raises is logged when it changes, counted,
        and never ends the keeper. The keeper need not run yet.
        """
        job = Job(name, function, seconds, jitter, self._clock() + (seconds if first is None else first))
        self._schedule.add(job)
        self._wake()
        return job

    def soon(self, job: Job) -> None:
        """Make the job due now."""
        job.due = min(job.due, self._clock())
        self._wake()

    def run(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the keeper's loop; starts the keeper if it does not run. Never wait for the result on the
        keeper itself.
        """
        self.start()
        loop = self._loop
        if loop is None:
            work.close()
            raise RuntimeError("the keeper was stopped while it was given work")
        return asyncio.run_coroutine_threadsafe(work, loop)

    def on_fork(self, callback: Callable[[], None]) -> None:
        """Call `callback` in a forked child, before the child's own code: it gives up what belongs to the parent.

        A bound method does not keep its object alive.
        """
        self._on_fork = [reference for reference in self._on_fork if reference() is not None]
        is_method = inspect.ismethod(callback)
        self._on_fork.append(weakref.WeakMethod(callback) if is_method else lambda: callback)

    def tick(self, now: float) -> int:
        """Run by hand, in this thread, what is due at `now`; how many jobs it was. For tests with a virtual clock."""
        if self.is_running:
            raise RuntimeError("tick() is for a keeper that does not run by itself: don't start it")
        jobs = self._schedule.due(now)
        for job in jobs:
            self._schedule.begin(job)
            self._schedule.end(job, asyncio.run(_outcome(job)), now)
        return len(jobs)

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Start the thread, if it does not run.

        Cheap when it does: the ways call it, so that a forked child comes alive again.
        """
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is not None:
                return
            _watch_forks(self)
            self._selector = selectors.DefaultSelector()
            # Never uvloop's: we must be able to leave it behind in a child.
            loop = asyncio.SelectorEventLoop(self._selector)
            self._loop, self._changed = loop, asyncio.Event()
            thread = threading.Thread(target=self._serve, args=(loop, self._changed), name="meshlib-keeper", daemon=True)
            self._thread = thread
            thread.start()

    def stop(self, patience: float = PATIENCE) -> None:
        """End the thread: coroutines are cancelled and the loop is closed. The jobs stay known, so that `start` may
        follow.
        """
        with self._lock:
            thread, loop = self._thread, self._loop
            self._thread = self._loop = self._selector = self._changed = None
        if thread is None or loop is None:
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(patience)

    def _wake(self) -> None:
        loop, changed = self._loop, self._changed
        if loop is not None and changed is not None:
            with contextlib.suppress(RuntimeError):  # it is being stopped
                loop.call_soon_threadsafe(changed.set)

    def _serve(self, loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
        work = loop.create_task(self._work(changed), name="meshlib-keeper")
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            with contextlib.suppress(Exception):
                loop.run_until_complete(asyncio.wait_for(asyncio.gather(*left, work, return_exceptions=True), PATIENCE / 2))
                loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    async def _work(self, changed: asyncio.Event) -> None:
        while True:
            changed.clear()
            for job in self._schedule.due(self._clock()):
                self._schedule.begin(job)
                task = asyncio.get_running_loop().create_task(self._one(job, changed), name=f"meshlib-keeper: {job.name}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), self._schedule.pause(self._clock()))

    async def _one(self, job: Job, changed: asyncio.Event) -> None:
        error = await _outcome(job)
        self._schedule.end(job, error, self._clock())
        changed.set()

    # ------------------------------------------------------------------ fork

    def _rest(self) -> None:
        """Before a fork: wait until the keeper's thread stands between two steps of its loop."""
        loop = self._loop
        if loop is None or self._thread is threading.current_thread():
            return
        with self._lock:
            self._resting += 1
            is_first = self._resting == 1
            if is_first:
                self._is_at_rest.clear()
                self._may_go_on.clear()
        if not is_first:  # another thread forks at this moment and has asked already
            self._is_at_rest.wait(PATIENCE)
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._stand_still)
            self._is_at_rest.wait(PATIENCE)

    def _stand_still(self) -> None:
        self._is_at_rest.set()
        self._may_go_on.wait()

    def _go_on(self) -> None:
        with self._lock:
            self._resting = max(0, self._resting - 1)
            if not self._resting:
                self._may_go_on.set()

    def _leave_behind(self) -> None:
        """In a forked child: the thread is gone, and the loop's descriptors are the parent's. Forget them without
        touching them.
        """
        loop, selector = self._loop, self._selector
        if loop is not None and selector is not None:
            # Not loop.close(): it would take the parent's descriptors out of the epoll set, which both share.
            selector.close()
            for end in (getattr(loop, "_ssock", None), getattr(loop, "_csock", None)):
                if end is not None:
                    end.close()
        for job in self._schedule.jobs:
            job.is_running = False
        self._schedule._random.seed()
        self._new_thread_state()
        for reference in self._on_fork:
            callback = reference()
            try:
                if callback is not None:
                    callback()
            except Exception:
                logger.exception("a callback after the fork failed")


async def _outcome(job: Job) -> BaseException | None:
    """Run it and tell what it raised.

    Even a SystemExit or a panic of the core, which is no Exception, must not end the keeper.
    """
    try:
        result = job.function()
        if inspect.isawaitable(result):
            await result
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the keeper is being stopped
        return error
    except BaseException as error:
        return error
    return None


async def apart(function: Callable[[], T], name: str) -> T:
    """Run what blocks (the system's name resolution, a child process) on a thread that lives no longer than it does.

    Not asyncio's executor: at exit the interpreter would wait for a lookup that hangs. The thread is a daemon and
    touches nothing of ours but its future.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is None:
            done.set_result(cast(T, result))
        else:
            done.set_exception(error)

    def work() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = function()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, name=name, daemon=True).start()
    return await done


# ---------------------------------------------------------------------- the process

_keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()
_is_watching = False
_shared: Keeper | None = None


def shared() -> Keeper:
    """The keeper of this process. Meshes share it: one thread, however many there are."""
    global _shared
    if _shared is None:
        _shared = Keeper()
    return _shared


def _watch_forks(keeper: Keeper) -> None:
    """Handlers of a fork can't be taken back: one set per process, registered with the first start, not at import."""
    global _is_watching
    _keepers.add(keeper)
    if not _is_watching:
        _is_watching = True
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
        atexit.register(_at_exit)


def _before_fork() -> None:
    for keeper in list(_keepers):
        keeper._rest()


def _after_in_parent() -> None:
    for keeper in list(_keepers):
        keeper._go_on()


def _after_in_child() -> None:
    for keeper in list(_keepers):
        keeper._leave_behind()


def _at_exit() -> None:
    """A daemon thread that meets a finalizing interpreter inside native code is a crash: end ours while Python still
    lives.
    """
    for keeper in list(_keepers):
        keeper.stop()
