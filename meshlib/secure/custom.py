"""Who is asked where a rule of the file can't say it all, and for how long?

A CUSTOM rule names an authorizer: a function of the application, asynchronous or plain, that looks at an `Inquiry` and answers True or
False. Only True lets a call in. Everything else denies: False, None, 1, an exception, no answer in time, a name that nobody
registered, and a pool that is full; each is counted by its outcome, and told in the log, once in a while.

An asynchronous function runs on the loop that serves the call, and is cut when its time is over. A plain one may block, so that it
gets one of at most `WORKERS` threads, which are started when the first call needs them and never where no authorizer is asked; at most
`WAITING` calls wait for one, and the next is denied at once. A thread can't be cut: when the time is over the call is denied and
the thread goes on; eight that hang deny everything. On the blocking side (WSGI, grpc.server) an asynchronous function runs on the
thread's own loop, which stays, so that connections of it are used again.

A function that keeps its loop busy (`time.sleep`) can't be timed out by anybody: make it a plain one.
The threads are daemons, hold no lock of ours while they run, and stay with the parent at a fork.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from ..call import Peer

log = logging.getLogger("meshlib.secure")

NOBODY: Final = Peer("")
WORKERS: Final = 8
WAITING: Final = 64
LONGEST: Final = 60.0
# Seconds between two lines in the log about the same failure of the same authorizer: whoever can call can cause them.
QUIET: Final = 10.0

ALLOWED: Final = "allowed"
DENIED: Final = "denied"
TIMEOUT: Final = "timeout"
ERROR: Final = "error"
FULL: Final = "full"
UNKNOWN: Final = "unknown"


@dataclass(frozen=True, slots=True)
class Inquiry:
    """The call about which an authorizer is asked: what was checked of it, and nothing that could still change.

    `path` is the canonical one, `peer` who the connection proved to come from, `claims` those of a verified token (None without
    one), `client` the address it comes from as far as trusted proxies tell. `headers` are pairs of bytes, names in lower case.
    Neither headers nor claims are in its repr: they may be secret.
    """

    method: str
    path: str
    host: str = ""
    peer: Peer = NOBODY
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)
    claims: Mapping[str, Any] | None = field(default=None, repr=False, hash=False)
    client: str = ""

    def header(self, name: str) -> str | None:
        """The value of a header that is there exactly once; None otherwise, since of two nobody knows which one counts."""
        wanted = name.lower().encode("latin-1")
        values = [value for known, value in self.headers if known == wanted]
        return values[0].decode("latin-1") if len(values) == 1 else None


Function = Callable[[Inquiry], Any]
F = TypeVar("F", bound=Function)


@dataclass(frozen=True, slots=True)
class _Authorizer:
    function: Function
    timeout: float
    is_async: bool


class Authorizers:
    """All authorizers of one process, by name. Any thread and any loop may ask."""

    def __init__(self, *, workers: int = WORKERS, waiting: int = WAITING, clock: Callable[[], float] = time.monotonic) -> None:
        self._known: dict[str, _Authorizer] = {}
        self._workers, self._waiting, self._clock = workers, waiting, clock
        self._fresh()
        _all.add(self)

    def _fresh(self) -> None:
        self._lock = threading.Lock()
        self._pool: _Pool | None = None
        self._counts: dict[tuple[str, str], int] = {}
        self._told: dict[tuple[str, str], float] = {}
        # A task that was cut may take its time to end; nobody else holds it.
        self._cut: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------ who is asked

    def register(self, name: str, timeout: float = 0.5) -> Callable[[F], F]:
        """Make a function the authorizer of this name: ``@mesh.authorizer("opa", timeout=0.2)``.

        Raises ValueError for a name that is taken, a time out of range or what can't be called.
        """

        def take(function: F) -> F:
            self.add(name, function, timeout)
            return function

        return take

    def add(self, name: str, function: Function, timeout: float = 0.5) -> None:
        """The same as a call."""
        if not name or not isinstance(name, str):
            raise ValueError(f"name={name!r}: the name that `authorizer:` of a rule has in mesh.yaml is expected")
        if not callable(function):
            raise ValueError(f"the authorizer {name!r} is {function!r}: a function of one Inquiry is expected")  # noqa: TRY004
        if not 0 < timeout <= LONGEST:
            raise ValueError(
                f"timeout={timeout!r} of the authorizer {name!r}: seconds above 0, at most {LONGEST:g}, are expected"
            )
        if name in self._known:
            raise ValueError(
                f"the authorizer {name!r} is registered already: of two functions nobody would know which one decides"
            )
        self._known[name] = _Authorizer(function, timeout, _is_async(function))

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of these names that nobody registered: their rules deny."""
        return sorted(set(names) - self._known.keys())

    def stats(self) -> list[dict[str, Any]]:
        """How often each was asked, by what came of it: name, outcome, count."""
        with self._lock:
            counts = dict(self._counts)
        return [{"name": name, "outcome": outcome, "count": count} for (name, outcome), count in sorted(counts.items())]

    # ------------------------------------------------------------------ asking

    async def ask(self, name: str, inquiry: Inquiry) -> bool:
        """May this call come in? For event loops. True only if the authorizer said True in time; raises nothing but cancellation."""
        known = self._known.get(name)
        if known is None:
            return self._settle(name, UNKNOWN, inquiry)
        if known.is_async:
            return await self._ask_here(name, known, inquiry)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[str, BaseException | None]] = loop.create_future()

        def deliver(outcome: str, error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(_put, answer, (outcome, error))
            except RuntimeError:
                pass  # the loop has been closed: nobody waits any more

        job = _Job(known, inquiry, deliver)
        if not self._submit(job):
            return self._settle(name, FULL, inquiry)
        try:
            done, _ = await asyncio.wait((answer,), timeout=known.timeout)
        finally:
            job.is_given_up = True
        if not done:
            return self._settle(name, TIMEOUT, inquiry)
        outcome, error = answer.result()
        return self._settle(name, outcome, inquiry, error)

    def ask_blocking(self, name: str, inquiry: Inquiry) -> bool:
        """The same for a thread that may wait."""
        known = self._known.get(name)
        if known is None:
            return self._settle(name, UNKNOWN, inquiry)
        answer: list[tuple[str, BaseException | None]] = []
        is_here = threading.Event()

        def deliver(outcome: str, error: BaseException | None) -> None:
            answer.append((outcome, error))
            is_here.set()

        job = _Job(known, inquiry, deliver)
        if not self._submit(job):
            return self._settle(name, FULL, inquiry)
        is_here.wait(known.timeout)
        job.is_given_up = True
        if not answer:
            return self._settle(name, TIMEOUT, inquiry)
        outcome, error = answer[0]
        return self._settle(name, outcome, inquiry, error)

    async def _ask_here(self, name: str, known: _Authorizer, inquiry: Inquiry) -> bool:
        # Not `asyncio.timeout` around it: a function that swallows its cancellation would be waited for.
        task: asyncio.Task[Any] = asyncio.ensure_future(_awaited(known.function, inquiry))
        try:
            done, _ = await asyncio.wait((task,), timeout=known.timeout)
        except BaseException:
            self._abandon(task)
            raise
        if not done:
            self._abandon(task)
            return self._settle(name, TIMEOUT, inquiry)
        if task.cancelled():
            return self._settle(name, ERROR, inquiry, asyncio.CancelledError("it was cancelled"))
        error = task.exception()
        return self._settle(name, ERROR if error else _outcome(task.result()), inquiry, error or _fault(task.result()))

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        self._cut.add(task)
        task.add_done_callback(self._forget)
        task.cancel()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._cut.discard(task)
        if not task.cancelled():
            task.exception()  # asked for, so that the loop doesn't complain of it

    def _submit(self, job: _Job) -> bool:
        with self._lock:
            pool = self._pool
            if pool is None:
                pool = self._pool = _Pool(self._workers, self._waiting)
        return pool.submit(job)

    # ------------------------------------------------------------------ what came of it

    def _settle(self, name: str, outcome: str, inquiry: Inquiry, error: BaseException | None = None) -> bool:
        # The names come from the plan, so that their number is bounded.
        with self._lock:
            key = (name, outcome)
            self._counts[key] = self._counts.get(key, 0) + 1
            now = self._clock()
            is_news = outcome not in (ALLOWED, DENIED) and now - self._told.get(key, -QUIET) >= QUIET
            if is_news:
                self._told[key] = now
        if is_news:
            self._tell(name, outcome, inquiry, error)
        return outcome == ALLOWED

    def _tell(self, name: str, outcome: str, inquiry: Inquiry, error: BaseException | None) -> None:
        what = f"{inquiry.method} {inquiry.path!a}"
        if outcome == UNKNOWN:
            known = ", ".join(map(repr, sorted(self._known))) or "none at all"
            log.error(
                "a rule asks the authorizer %r, which is not registered (%s), so %s was denied: register it with "
                "@mesh.authorizer(%r) before the first call",
                name,
                known,
                what,
                name,
            )
        elif outcome == TIMEOUT:
            seconds = self._known[name].timeout
            log.error("the authorizer %r gave no answer within %g s, so %s was denied", name, seconds, what)
        elif outcome == FULL:
            log.error(
                "the authorizer %r was not asked, since %d calls run and %d wait, so %s was denied: it is too slow, or hangs",
                name,
                self._workers,
                self._waiting,
                what,
            )
        else:
            log.error("the authorizer %r failed, so %s was denied: %s", name, what, error, exc_info=error)


def _put(answer: asyncio.Future[tuple[str, BaseException | None]], value: tuple[str, BaseException | None]) -> None:
    if not answer.done():
        answer.set_result(value)


def _outcome(value: object) -> str:
    return ALLOWED if value is True else DENIED if value is False else ERROR


def _fault(value: object) -> BaseException | None:
    if value is True or value is False:
        return None
    return TypeError(f"it answered a {type(value).__name__}; only True allows, and only False denies without this line")


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


async def _awaited(function: Function, inquiry: Inquiry) -> Any:
    return await function(inquiry)


# ---------------------------------------------------------------------- threads


class _Job:
    """One question on its way to a thread."""

    __slots__ = ("authorizer", "context", "deliver", "inquiry", "is_given_up")

    def __init__(self, authorizer: _Authorizer, inquiry: Inquiry, deliver: Callable[[str, BaseException | None], None]) -> None:
        self.authorizer = authorizer
        self.inquiry = inquiry
        self.deliver = deliver
        self.context = contextvars.copy_context()
        self.is_given_up = False

    def run(self, runner: asyncio.Runner | None) -> None:
        if self.is_given_up:
            return
        try:
            value = self.context.run(self._call) if runner is None else runner.run(self._await(), context=self.context)
            if inspect.isawaitable(value):
                _close(value)
                raise TypeError("it returned an awaitable: declare it with `async def`")
            self.deliver(_outcome(value), _fault(value))
        except BaseException as error:
            is_late = runner is not None and isinstance(error, TimeoutError)
            self.deliver(TIMEOUT if is_late else ERROR, error)

    def _call(self) -> Any:
        return self.authorizer.function(self.inquiry)

    async def _await(self) -> Any:
        # Cut here too, or the thread would stay with a question that nobody asks any more.
        async with asyncio.timeout(self.authorizer.timeout):
            return await self.authorizer.function(self.inquiry)


def _close(value: Awaitable[Any]) -> None:
    close = getattr(value, "close", None) or getattr(value, "cancel", None)
    if close is not None:
        close()


class _Pool:
    """At most `workers` daemon threads, and at most `waiting` jobs before them.

    Not the executor of the standard library: at exit the interpreter would wait for a function that hangs, and its queue has no bound.
    """

    def __init__(self, workers: int, waiting: int) -> None:
        self._workers, self._waiting = workers, waiting
        self._jobs: deque[_Job] = deque()
        self._is_work = threading.Condition()
        self._threads = self._idle = 0

    def submit(self, job: _Job) -> bool:
        """False if there is no room: nothing will come of it then."""
        with self._is_work:
            if self._idle <= len(self._jobs) and self._threads < self._workers:
                self._start()
            if len(self._jobs) - self._idle >= self._waiting:
                # Those that nobody waits for any more take no place.
                self._jobs = deque(kept for kept in self._jobs if not kept.is_given_up)
            if not self._threads or len(self._jobs) - self._idle >= self._waiting:
                return False
            self._jobs.append(job)
            self._is_work.notify()
            return True

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"meshlib-authorize-{self._threads}", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # no more threads, or the interpreter ends: those that are there go on
        self._threads += 1
        # From now on; it is as good as waiting for the job that comes next.
        self._idle += 1

    def _work(self) -> None:
        runner: asyncio.Runner | None = None
        while True:
            with self._is_work:
                while not self._jobs:
                    self._is_work.wait()
                job = self._jobs.popleft()
                self._idle -= 1
            if job.authorizer.is_async and runner is None:
                runner = asyncio.Runner()
            job.run(runner if job.authorizer.is_async else None)
            # Not kept until the next one comes: it holds the headers of a call.
            del job
            with self._is_work:
                self._idle += 1


_all: weakref.WeakSet[Authorizers] = weakref.WeakSet()


def _after_fork() -> None:
    for authorizers in tuple(_all):
        authorizers._fresh()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
