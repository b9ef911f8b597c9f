"""How does a process end, so that nobody notices?

    phase    | ready | listeners          | answers                    | goes on when
    ---------|-------|--------------------|----------------------------|--------------------------------------------------
    SERVING  | yes   | accept             | as usual                   | it is told to end: SIGTERM, SIGINT, `mesh.drain()`
    LEAVING  | no    | accept             | as usual                   | `wait` is over, and who was to be told was, or had 5 s
    CLOSING  | no    | closed, their      | the last on its connection | nothing is under way any more, or `grace` is over
             |       | queues are emptied | (`Connection: close`)      |
    ENDED    | no    | closed             | none                       |

LEAVING is for those who don't hear of it at once: a load balancer that asks for readiness every few seconds goes on sending until it has
asked, and whoever it sends is served. Nobody is waited for where a person has said it (SIGINT), or where nobody could see readiness: no
probe listener, no metrics listener, no health service of gRPC, nobody to be told. A client that has a kept-alive connection may be
sending its next request while we close it; so, when CLOSING begins, an idle connection lives on for `LINGER` seconds, its next answer
says that it is the last, and only then, and with nothing left to be read, it is closed.

Of `grace` the last second is for the end itself: what is still under way is cut, the application's shutdown runs, and the process is gone
when `wait` + `grace` are over.

A `Drain` reads a clock and starts nothing: the server of a process ticks it by `look`. `begin` is made for signal handlers: it takes no
lock and writes no log. It does not decide what a second signal means: that depends on whose process it is (`serve.py`, `gunicorn.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import signal
import time
import weakref
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from .door import Inside

log = logging.getLogger("meshlib.server")

# Seconds that an idle connection has when CLOSING begins, for a request that its client may already be sending. gunicorn takes as long.
LINGER: Final = 2.0

# Seconds that those who are to be told (`on_leave`) have for it.
TELL: Final = 5.0

# The last of the grace: for what is cut, and for the application's own shutdown.
LAST: Final = 1.0

# Of a mesh that is gone; every other has its own, with defaults in `config/`.
GONE: Final = (0.0, 20.0)


class Phase(IntEnum):
    SERVING = 0
    LEAVING = 1
    CLOSING = 2
    ENDED = 3


class Closes(Protocol):
    """What is told that CLOSING has begun."""

    is_closing: bool


class Informed(Protocol):
    """What is told of each phase. That may happen in a signal handler: it leaves word and does nothing else."""

    def phase_changed(self) -> object: ...


class Drain:
    """The end of one process. State of the Service that we are; one per mesh and process: `drain_of`.

    `wait` and `grace` are read when it begins. `run` starts a coroutine where control work is done, and doesn't wait for it.
    """

    __slots__ = (
        *(
            "__weakref__",
            "_callbacks",
            "_clock",
            "_closers",
            "_end",
            "_informed",
            "_is_person",
            "_is_seen",
            "_left",
            "_run",
            "_terms",
            "_told",
        ),
        *("_told_by", "_untold", "is_closing", "is_watched", "phase", "pid"),
    )

    def __init__(
        self,
        terms: Callable[[], tuple[float, float]] = lambda: GONE,
        *,
        is_seen: Callable[[], bool] = lambda: True,
        run: Callable[[Any], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terms = terms
        self._is_seen = is_seen
        self._run = run
        self._clock = clock
        self._callbacks: list[Callable[[], object]] = []
        self._closers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._informed: weakref.WeakSet[Any] = weakref.WeakSet()
        # Somebody is told of readiness by other means than a listener.
        self.is_watched = False
        self.renew()

    def __repr__(self) -> str:
        return f"<Drain {self.phase.name.lower()}>"

    def renew(self) -> None:
        """From the beginning: in a new process, or for an application that is started again."""
        self.phase = Phase.SERVING
        self.is_closing = False
        self.pid = os.getpid()
        self._is_person = False
        # When LEAVING is over, until when that may wait for those who are told, and when everything is over.
        self._left = self._told_by = self._end = 0.0
        # Taken by the one who tells; and whether all have been told.
        self._untold: list[None] = [None]
        self._told = False
        for closer in tuple(self._closers):
            closer.is_closing = False
        self._inform()

    # --- who hears of it

    def on_leave(self, callback: Callable[[], object]) -> None:
        """Call back (a function or a coroutine function) where control work is done, when LEAVING begins; it has `TELL` seconds."""
        self._callbacks.append(callback)

    def follow(self, closer: Closes) -> None:
        """Set its `is_closing` when CLOSING begins. It is not kept alive for that."""
        closer.is_closing = self.is_closing
        self._closers.add(closer)

    def inform(self, listener: Informed) -> None:
        """Call its `phase_changed` when a phase begins. It is not kept alive for that."""
        self._informed.add(listener)

    # --- what happens

    def begin(self, *, is_person: bool = False, may_wait: bool = True, longest: float | None = None) -> Phase:
        """The process is told to end. Again, it changes nothing, but that a person shortens the wait.

        `may_wait`: nobody else takes the place of the process, so that readiness matters. `longest`: seconds after which somebody else
        kills it.
        """
        now = self._clock()
        if self.phase is Phase.SERVING:
            wait, grace = self._terms()
            if longest is not None and wait + grace > longest:
                grace = max(longest - wait, longest / 2)
                wait = longest - grace
            waits = may_wait and not is_person and (bool(self._callbacks) or self.is_watched or self._is_seen())
            self._left = now + (wait if waits else 0.0)
            self._told_by = now + TELL
            self._end = self._left + max(grace - LAST, grace / 2)
            self._is_person = is_person
            # The last: whoever looks meanwhile, looks at a whole.
            self.phase = Phase.LEAVING
            self._inform()
            if not waits and not self._callbacks:
                self._close()
        elif is_person and self.phase is Phase.LEAVING:
            self._is_person = True
            self._left = min(self._left, now)
        return self.phase

    def look(self, now: float | None = None) -> Phase:
        """What is due by now? To be called again and again by whoever serves; also by several threads."""
        phase = self.phase
        if phase is Phase.SERVING or phase is Phase.ENDED:
            return phase
        if now is None:
            now = self._clock()
        if phase is Phase.LEAVING:
            self._tell()
            if now >= self._left and (self._told or now >= self._told_by):
                self._close()
        if self._is_over(now):
            self.end()
        return self.phase

    def end(self) -> None:
        """Nothing is under way any more, or nobody waits for it any more."""
        self._close()
        self.phase = Phase.ENDED

    async def depart(self) -> None:
        """For a server that is not ours, when it ends: nobody is waited for but those who are to be told."""
        if self.phase is not Phase.SERVING:
            return
        self.begin(may_wait=False)
        self._tell()
        until = self._clock() + TELL
        while not self._told and self._clock() < until:  # noqa: ASYNC110  # it is another thread's loop that tells
            await asyncio.sleep(0.02)
        self.end()

    # --- how it stands

    @property
    def is_serving(self) -> bool:
        """Is new work welcome?"""
        return self.phase is Phase.SERVING

    @property
    def left(self) -> float:
        """Seconds until the phase changes by itself, 0 where it doesn't."""
        end = self._left if self.phase is Phase.LEAVING else self._end if self.phase is Phase.CLOSING else 0.0
        return max(0.0, end - self._clock())

    @property
    def linger(self) -> float:
        """Seconds that an idle connection has, once CLOSING has begun. A person doesn't wait for those."""
        return 0.0 if self._is_person else LINGER

    def _is_over(self, now: float) -> bool:
        return now >= self._end

    def _close(self) -> None:
        if self.is_closing:
            return
        self.is_closing = True
        self.phase = max(self.phase, Phase.CLOSING)
        for closer in tuple(self._closers):
            closer.is_closing = True
        self._inform()

    def _inform(self) -> None:
        for listener in tuple(self._informed):
            listener.phase_changed()

    def _tell(self) -> None:
        try:
            self._untold.pop()
        except IndexError:
            return
        if not self._callbacks or self._run is None:
            self._told = True
            return
        telling = self._tell_all()
        try:
            self._run(telling)
        except RuntimeError as error:
            telling.close()
            log.warning("nobody could be told that this process ends: %s", error)
            self._told = True

    async def _tell_all(self) -> None:
        """All at once, each for itself: one that hangs keeps no other from being told."""
        try:
            tasks = [asyncio.ensure_future(_outcome(callback)) for callback in tuple(self._callbacks)]
            _, late = await asyncio.wait(tasks, timeout=TELL)
            for task in late:
                task.cancel()
            if late:
                log.warning("%d of those that are told when this process ends took longer than %g s", len(late), TELL)
        finally:
            self._told = True


async def _outcome(callback: Callable[[], object]) -> None:
    try:
        result = callback()
        if inspect.isawaitable(result):
            await result
    except Exception:
        log.exception("%r was told that this process ends, and failed", callback)


_drains: weakref.WeakKeyDictionary[Inside, Drain] = weakref.WeakKeyDictionary()


def drain_of(mesh: Inside) -> Drain:
    """The one drain of a mesh in this process: what a parent began is not the end of its child."""
    drain = _drains.get(mesh)
    if drain is None:
        me = weakref.ref(mesh)
        drain = _drains[mesh] = Drain(lambda: _terms_of(me()), is_seen=lambda: _is_seen(me()), run=lambda work: _run(me(), work))
    elif drain.pid != os.getpid():
        drain.renew()
    return drain


def _terms_of(mesh: Inside | None) -> tuple[float, float]:
    if mesh is None:
        return GONE
    inbound = mesh.config.own.inbound
    return inbound.drain_wait, inbound.drain_grace


def _is_seen(mesh: Inside | None) -> bool:
    """Does anybody have a way to see that this process isn't ready, or is it written down that there is somebody?"""
    if mesh is None:
        return False
    from .door import door_of

    own = mesh.config.own
    is_probed = own.inbound.probe is not None and door_of(mesh).is_served
    return bool(is_probed or own.inbound.is_wait_written or os.environ.get("MESHLIB_METRICS") or own.observe.metrics)


def _run(mesh: Inside | None, work: Any) -> None:
    if mesh is None:
        raise RuntimeError("the mesh is gone")
    mesh.keeper.run(work)


def last_resort(seconds: float = LAST) -> None:
    """End the process when it has not ended by then, whatever threads of it still run: they can't be stopped. In the main thread only."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGALRM, _exit)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def disarm() -> None:
    """It has ended by itself."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGALRM) is _exit:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _exit(sig: int, frame: FrameType | None) -> None:
    log.error("the process did not end by itself: a handler still runs in a thread, or a shutdown hangs")
    for handler in logging.getLogger().handlers:
        with contextlib.suppress(Exception):
            handler.flush()
    os._exit(1)
