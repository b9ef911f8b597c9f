"""How does a connection become an attested one, without anybody else waiting for it?

    accept     at once, so that the kernel's queue stays short; whoever has too many connections open is hung up on
    meet       at once too: the process is held by a handle before it can end and another one get its number
    attest     on a thread, of which there are a few: hashing an executable takes its time. The answer is due within seconds
    hand on    to whoever serves it, with the caller; cancelled when the process that connected has ended

Connections are bounded, in all and for each user, and so are the threads that one user can have busy: no user keeps the others out. Who
fits no entry has far fewer of them, and all such users together a part: the rest is for those who have something to get here. What is
refused is counted by its rule, and logged with nothing but that. Who is refused for want of room or time is hung up on without a word,
since that says nothing of who he is.

A connection that was handed on to somebody who keeps it (`detach`) isn't counted here any more, nor ended with its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final
from weakref import WeakValueDictionary

from ..errors import Denied
from .attest import Attestor, Caller, Peer

log = logging.getLogger("meshlib.agent")

OnCaller = Callable[[socket.socket, Caller], Awaitable[None]]
OnRefused = Callable[[socket.socket], Awaitable[None]]

# Connections in all, and of one user; root's own are within the first bound only.
MOST: Final = 1024
MOST_OF_ONE: Final = 256
# Those of strangers, who fit no entry: of one user, and of all of them.
MOST_OF_STRANGER: Final = 16
MOST_OF_STRANGERS: Final = 256
THREADS: Final = 4
THREADS_OF_ONE: Final = 2
# Seconds that attestation may take, and that the loop rests when there are no descriptors left.
SECONDS: Final = 10.0
REST: Final = 0.2
# Seconds between two lines about one rule: whoever is refused must not be able to fill the log.
QUIET: Final = 10.0

_NO_ROOM: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# Accepted by one turn of the loop; the rest waits for the next one.
_AT_ONCE: Final = 64


class Acceptor:
    """A listening socket from `start` to `close`, on the running loop.

    `on_caller(connection, caller)` has the connection until it returns, and may keep it for itself by `detach()`; it is cancelled
    when the process that connected ends, or when the acceptor is closed. `on_refused(connection)` answers who can't be attested;
    without it such a connection is closed without a word. The listening socket stays its owner's, who closes it.

    `knows(uid)` says whether a user may fit an entry, and `fits(caller)` whether a process does: else it's a stranger. Of whom
    `bars(uid)` says so, no connection is taken.
    """

    def __init__(
        self,
        sock: socket.socket,
        attestor: Attestor,
        on_caller: OnCaller,
        *,
        on_refused: OnRefused | None = None,
        name: str = "",
        knows: Callable[[int], bool] = lambda _: True,
        fits: Callable[[Caller], object] = lambda _: True,
        bars: Callable[[int], bool] = lambda _: False,
        most: int = MOST,
        most_of_one: int = MOST_OF_ONE,
        most_of_stranger: int = MOST_OF_STRANGER,
        most_of_strangers: int = MOST_OF_STRANGERS,
    ) -> None:
        self.refused: Counter[str] = Counter()  # by rule
        self.accepted = 0
        self._sock = sock
        self._attestor = attestor
        self._on_caller = on_caller
        self._on_refused = on_refused
        self._name = name
        self._knows, self._fits, self._bars = knows, fits, bars
        self._places = _Places(most, most_of_one, most_of_stranger, most_of_strangers)
        self._turns: WeakValueDictionary[int, asyncio.Semaphore] = WeakValueDictionary()  # by user
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: dict[str, float] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._resting: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """Those that are open now."""
        return len(self._tasks)

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="meshlib-attest")
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._accept)

    async def close(self, seconds: float = 0.0, *, with_queue: bool = False) -> None:
        """Accept no more, but for who has connected already (`with_queue`); what is open may end within that time, and is cut then."""
        if self._loop is None:
            return
        while with_queue and self._accept():
            pass
        loop, self._loop = self._loop, None
        if self._resting is not None:
            self._resting.cancel()
        loop.remove_reader(self._sock.fileno())
        if self._tasks and seconds > 0:
            await asyncio.wait(tuple(self._tasks), timeout=seconds)
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _accept(self) -> bool:
        """Take those who wait; True if there may be more of them."""
        for _ in range(_AT_ONCE):
            try:
                connection, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return False
            except OSError as error:
                if error.errno in _NO_ROOM:
                    self._rest()
                self._refuse("attest.no_descriptors" if error.errno in _NO_ROOM else "attest.accept")
                return False
            connection.setblocking(False)
            self.accepted += 1
            self._begin(connection)
        return True

    def _rest(self) -> None:
        """Without descriptors the queue would wake the loop again and again."""
        loop = self._loop
        if loop is None:
            return
        loop.remove_reader(self._sock.fileno())
        self._resting = loop.call_later(REST, self._go_on)

    def _go_on(self) -> None:
        self._resting = None
        if self._loop is not None:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    def _begin(self, connection: socket.socket) -> None:
        """What doesn't wait: whose is it, and is there room?"""
        # The cheapest question first: who is turned away may come again at once.
        uid = self._attestor.uid_of(connection)
        place = None if self._bars(uid) else self._places.take(uid, is_stranger=not self._knows(uid))
        if place is None:
            self._refuse("attest.flood" if self._bars(uid) else "attest.too_many")
            connection.close()
            return
        peer: Peer | None = None
        try:
            peer = self._attestor.meet(connection)
        except Denied as error:
            self._refuse(error.rule)
        task = asyncio.get_running_loop().create_task(self._serve(connection, peer, place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket, peer: Peer | None, place: _Place) -> None:
        try:
            try:
                caller = await self._attested(peer) if peer is not None else None
            except TimeoutError:
                self._refuse("attest.too_slow")
                return
            if (caller is None or not self._fits(caller)) and not self._places.become_stranger(place):
                self._refuse("attest.too_many")
            elif caller is not None and peer is not None:
                await self._while_it_lives(peer, connection, caller)
            elif self._on_refused is not None:
                await self._on_refused(connection)
        except Exception:
            # Its text may hold what is known of the caller; its frames don't show in the log without it.
            log.error("a connection to the %s socket failed unexpectedly", self._name or "agent's")
            log.debug("so it failed", exc_info=True)
        finally:
            self._places.leave(place)
            connection.close()
            if peer is not None:
                peer.close()

    async def _attested(self, peer: Peer) -> Caller | None:
        """Who it is, or None if nobody may know. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        turns = self._turns.setdefault(peer.uid, asyncio.Semaphore(THREADS_OF_ONE))
        async with asyncio.timeout(SECONDS):
            await turns.acquire()
            try:
                work = self._begun(peer)
            except BaseException:
                turns.release()
                raise

            def end(_: object) -> None:
                # The turn is that of the thread: nobody waits for one that takes too long, and it is busy all the same.
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(turns.release)

            work.add_done_callback(end)
            try:
                return await asyncio.wrap_future(work, loop=loop)
            except Denied as error:
                self._refuse(error.rule)
        return None

    def _begun(self, peer: Peer) -> Future[Caller]:
        # The thread reads by descriptors of its own: ours may be closed, and their numbers reused, while it is still at it.
        own = peer.moved()

        def attest() -> Caller:
            try:
                return self._attestor.attest(own)
            finally:
                own.close()

        assert self._pool is not None
        work = self._pool.submit(attest)
        work.add_done_callback(lambda done: own.close() if done.cancelled() else None)
        return work

    async def _while_it_lives(self, peer: Peer, connection: socket.socket, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        serving = loop.create_task(_awaited(self._on_caller(connection, caller)))
        handle = peer.fileno()
        loop.add_reader(handle, serving.cancel)
        try:
            await serving
        except asyncio.CancelledError:
            if not peer.has_ended:
                raise
        finally:
            loop.remove_reader(handle)

    def _refuse(self, rule: str) -> None:
        self.refused[rule] += 1
        now = time.monotonic()
        if now - self._told.get(rule, -QUIET) >= QUIET:
            self._told[rule] = now
            log.warning(
                "a caller of the %s socket was refused (%s, %d so far)", self._name or "agent's", rule, self.refused[rule]
            )


@dataclass(slots=True, eq=False)
class _Place:
    """One of the connections that there may be."""

    uid: int
    is_stranger: bool


class _Places:
    """How many there are, and of whom. Root is bounded by the bound for all only."""

    def __init__(self, most: int, most_of_one: int, most_of_stranger: int, most_of_strangers: int) -> None:
        self._most, self._most_of_one = most, most_of_one
        self._most_of_stranger, self._most_of_strangers = most_of_stranger, most_of_strangers
        self._taken: Counter[tuple[int, bool]] = Counter()  # by user, and whether they are strangers
        self._all, self._strangers = 0, 0

    def take(self, uid: int, *, is_stranger: bool) -> _Place | None:
        place = _Place(uid, is_stranger and uid != 0)
        if self._all >= self._most or not self._has_room(place):
            return None
        self._count(place, 1)
        return place

    def become_stranger(self, place: _Place) -> bool:
        """It turns out that it fits no entry; False if there is no room for that."""
        if place.is_stranger or place.uid == 0:
            return True
        other = _Place(place.uid, is_stranger=True)
        if not self._has_room(other):
            return False
        self._count(place, -1)
        place.is_stranger = True
        self._count(place, 1)
        return True

    def leave(self, place: _Place) -> None:
        self._count(place, -1)

    def __len__(self) -> int:
        return self._all

    def _has_room(self, place: _Place) -> bool:
        of_one = self._taken[place.uid, place.is_stranger]
        if place.is_stranger:
            return self._strangers < self._most_of_strangers and of_one < self._most_of_stranger
        return place.uid == 0 or of_one < self._most_of_one

    def _count(self, place: _Place, by: int) -> None:
        key = (place.uid, place.is_stranger)
        self._all += by
        self._strangers += by * place.is_stranger
        self._taken[key] += by
        if not self._taken[key]:
            del self._taken[key]


async def _awaited(work: Awaitable[None]) -> None:
    await work
