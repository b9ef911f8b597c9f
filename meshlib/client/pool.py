"""Which connection can be used again?

Connections wait here between exchanges, by key: endpoint, expected identity, protocol. The youngest is used first, so that
the surplus of a peak grows old and goes. When a connection comes back, the moment from which it isn't taken any more is
settled: the peer would close it (as it announced, or as it was seen to do), its age limit, or the end of the first
certificate of the two, ours or the peer's. Taking and giving cost the same however many wait; those whose time is over are
closed by a sweep, in a pass over all, but not oftener than every half second.

It moves no bytes and knows neither loops nor threads; `loop.py` and `thread.py` do. It isn't locked: its owner says who may
touch it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from math import inf
from typing import Any, Protocol

from .._native import core

# Seconds that an idle connection is kept when its peer announces nothing. gunicorn closes after 2, uvicorn after 5: we go first.
# Sensible from 0.5 to 60.
IDLE = 1.8
# Kept away from what the peer announced or was seen to do: its clock starts before ours.
IDLE_MARGIN = 0.3
# No connection lives longer, so that a fleet that grew is used and a DNS change is seen. Sensible from 60 to 86,400.
MAX_AGE = 600.0
# The share of the age limit that is different for each connection: what was opened together isn't renewed together.
JITTER = 0.2
GOLDEN = 0.618_033_988_749_895
# Idle connections per key; a burst above it opens and closes its own. Sensible from 1 to 1024.
MAX_IDLE = 128
# Idle connections of one pool: each holds a file descriptor, of which a process often has 1024. Sensible from 16 to 10,000.
MAX_ALL = 512
# A connection isn't taken any more when less than this is left of the first certificate to end, or less than this share of
# what was left when it was opened: the exchange that takes it should end before, and short-lived certificates count too.
CERTIFICATE_MARGIN = 60.0
CERTIFICATE_SHARE = 0.05
# At least this much time lies between two passes of the sweep. Nothing is taken because a pass is late.
PAUSE = 0.5

# What peers were seen to do. Below the least, a connection would hardly be of use; what isn't confirmed is forgotten slowly: the
# time doubles. Two closings count as one habit if they came after the same time, and as one event if they came together: a peer
# that stops closes all at once, and says nothing about its habits.
LEAST = 0.25
DOUBLES_AFTER = 300.0
SAME_HABIT = 0.25
SAME_EVENT = 0.25
MAX_SEEN = 1024

# Why connections that waited were closed, or those that came back weren't kept.
REASONS = ("idle", "age", "certificate", "generation", "full", "peer", "unfit", "shutdown")

Key = tuple[str, ...]


class Pooled(Protocol):
    """A connection as the pool sees it. Times are those of `now`, except `not_after`: Unix seconds.

    One that has an attribute `until`, 0.0 at first, is told there until when its age and the certificates let it be used: for the
    others that is found out each time that they come back.
    """

    @property
    def key(self) -> Key: ...

    tls: core.TlsClient | None
    born: float
    idle_since: float
    keep: float
    not_after: float

    def is_usable(self) -> bool: ...
    def close(self) -> None: ...


class Pool:
    """Idle connections of one event loop, or of all threads. `clock` and `wall` are asked only where no time is given."""

    __slots__ = (
        "__weakref__", "_clock", "_count", "_idle", "_seen", "_swept", "_wall", "closings", "due", "opened", "reused",
    )  # fmt: skip

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        # By key, in the order in which they came, with the moment from which they aren't taken. No key is empty.
        self._idle: dict[Key, dict[Any, float]] = {}
        self._count = 0
        self._seen: dict[Key, _Habit] = {}
        self._clock = clock
        self._wall = wall
        self._swept = -inf
        # When the next pass of the sweep is worth while; inf while nothing waits.
        self.due = inf
        self.opened = 0
        self.reused = 0
        self.closings = dict.fromkeys(REASONS, 0)

    @property
    def closed(self) -> int:
        return sum(self.closings.values())

    def __len__(self) -> int:
        return self._count

    def __bool__(self) -> bool:
        return True

    # --- the way of a connection

    def take(self, key: Key, tls: core.TlsClient | None, now: float, wall: float) -> Any | None:
        """The youngest connection that is whole and of this generation of identity, or None."""
        idle = self._idle.get(key)
        if idle is None:
            return None
        while idle:
            connection, expires = idle.popitem()
            self._count -= 1
            if not idle:
                del self._idle[key]
            if connection.tls is not tls:
                reason = "generation"
            elif now >= expires or wall >= connection.not_after:
                reason = self._why(connection, now)
            elif not connection.is_usable():
                reason = "peer"
                self._saw(connection, now)
            else:
                self.reused += 1
                return connection
            self.drop(connection, reason)
        return None

    def give(self, connection: Pooled, now: float, is_fit: bool = False) -> None:
        """Keep a connection after its exchange, if it's worth keeping. `is_fit`: its owner knows that it could carry another now."""
        if not is_fit and not connection.is_usable():
            self.drop(connection)
            return
        connection.idle_since = now
        key = connection.key
        expires = now + (min(connection.keep, self._habit(key, now)) if self._seen else connection.keep)
        until = getattr(connection, "until", 0.0) or self._settle(connection, now)
        if until < expires:  # noqa: PLR1730  a call costs more, and this is on every exchange
            expires = until
        if expires <= now:
            self.drop(connection, self._why(connection, now))
            return
        idle = self._idle.get(key)
        if idle is None:
            idle = self._idle[key] = {}
        idle[connection] = expires
        self._count += 1
        if expires < self.due:
            self.due = max(expires, self._swept + PAUSE)
        if len(idle) > MAX_IDLE:
            self._evict(key)
        elif self._count > MAX_ALL:
            # The key that has had surplus for the longest time gives one up, and goes to the end of the row.
            key = next(iter(self._idle))
            self._idle[key] = self._idle.pop(key)
            self._evict(key)

    def forget(self, connection: Pooled, now: float | None = None) -> None:
        """The peer closed a connection while it waited."""
        idle = self._idle.get(connection.key)
        if idle is None or idle.pop(connection, None) is None:
            return
        self._count -= 1
        if not idle:
            del self._idle[connection.key]
        self.closings["peer"] += 1
        self._saw(connection, self._clock() if now is None else now)

    def drop(self, connection: Pooled, reason: str = "unfit") -> None:
        """Close one that isn't waiting (any more)."""
        self.closings[reason] += 1
        connection.close()

    # --- time

    def sweep(self, now: float) -> float | None:
        """Close what has waited too long; when to come again, or None while nothing waits. Mostly a single comparison."""
        if not self._idle:
            self.due = inf
            return None
        if now < self.due:
            return self.due
        earliest = inf
        over: list[Any] = []
        for idle in self._idle.values():
            for connection, expires in idle.items():
                if expires <= now:
                    over.append(connection)
                elif expires < earliest:
                    earliest = expires
        # First the table, then the closing, during which anything may be called.
        for connection in over:
            self._remove(connection)
        self._swept = now
        self.due = max(earliest, now + PAUSE)
        for connection in over:
            self.drop(connection, self._why(connection, now))
        return self.due if self._idle else None

    # --- the end

    def clear(self) -> None:
        for connection in self.drain():
            connection.close()

    def drain(self) -> list[Any]:
        """All that waits, which the caller has to end."""
        found = [connection for idle in self._idle.values() for connection in idle]
        self._idle.clear()
        self._count = 0
        self.due = inf
        self.closings["shutdown"] += len(found)
        return found

    def stats(self) -> dict[str, Any]:
        """All numbers as plain data: idle, opened, reused, and closed by reason."""
        return {"idle": self._count, "opened": self.opened, "reused": self.reused, "closed": dict(self.closings)}

    def learn(self, key: Key, idle: float, now: float) -> None:
        """The peer was seen to close a connection that had waited for `idle` seconds, or for less."""
        habit = self._seen.pop(key, None)
        if habit is None:
            habit = _Habit()
            if len(self._seen) >= MAX_SEEN:
                del self._seen[next(iter(self._seen))]
        self._seen[key] = habit
        habit.see(idle, now)

    # --- what is judged

    def _ends(self, connection: Pooled, now: float) -> tuple[float, float]:
        """When its age ends it, and when a certificate does."""
        born = connection.born
        # Where in the jitter it falls comes of the moment and the place of its birth (a loop's clock may stand still while many
        # are opened), spread by the golden ratio: nothing has to be drawn and remembered.
        age = born + MAX_AGE * (1.0 - JITTER * ((born * 1e5 + (id(connection) >> 4 & 0xFFFF)) * GOLDEN % 1.0))
        tls = connection.tls
        if tls is None:
            return age, inf
        left = min(connection.not_after, tls.not_after) - self._wall()
        return age, now + left - min(CERTIFICATE_MARGIN, CERTIFICATE_SHARE * (left + now - born))

    def _settle(self, connection: Any, now: float) -> float:
        until = min(self._ends(connection, now))
        if hasattr(connection, "until"):
            connection.until = until
        return until

    def _why(self, connection: Pooled, now: float) -> str:
        age, certificate = self._ends(connection, now)
        if now >= certificate:
            return "certificate"
        return "age" if now >= age else "idle"

    def _saw(self, connection: Pooled, now: float) -> None:
        self.learn(connection.key, now - connection.idle_since, now)

    def _habit(self, key: Key, now: float) -> float:
        habit = self._seen.get(key)
        if habit is None:
            return inf
        keep = habit.keep(now)
        if keep > MAX_AGE:
            # Long ago, or seen only once and not again.
            if now - habit.seen_at > DOUBLES_AFTER:
                del self._seen[key]
            return inf
        return keep

    # --- the table

    def _evict(self, key: Key) -> None:
        oldest = next(iter(self._idle[key]))
        self._remove(oldest)
        self.drop(oldest, "full")

    def _remove(self, connection: Pooled) -> None:
        idle = self._idle[connection.key]
        del idle[connection]
        self._count -= 1
        if not idle:
            del self._idle[connection.key]

    def __repr__(self) -> str:
        return f"<Pool idle={self._count} opened={self.opened} reused={self.reused} closed={self.closed}>"


class Ledger:
    """What the pools of one mesh have counted. It outlives them, as a counter must never go back."""

    def __init__(self) -> None:
        self._pools: weakref.WeakSet[Pool] = weakref.WeakSet()
        self._past = Pool()

    def open(self) -> Pool:
        """A new pool, whose numbers stay when it is gone."""
        pool = Pool()
        self._pools.add(pool)
        return pool

    def retire(self, pool: Pool) -> None:
        """It is of no use any more."""
        if pool in self._pools:
            self._pools.discard(pool)
            self._past.opened += pool.opened
            self._past.reused += pool.reused
            for reason, count in pool.closings.items():
                self._past.closings[reason] += count

    def stats(self) -> list[dict[str, Any]]:
        return [self._past.stats(), *(pool.stats() for pool in tuple(self._pools))]

    def forget(self) -> None:
        """In a forked child, which has opened nothing yet."""
        self.__init__()  # type: ignore[misc]  # the carriers hold this very ledger


class _Habit:
    """After which time one key's peer closes idle connections, as far as it was seen."""

    __slots__ = ("_idle", "_keep", "_learned_at", "seen_at")

    def __init__(self) -> None:
        self._keep = inf
        self._learned_at = 0.0
        # The last closing that may become a habit.
        self._idle = -inf
        self.seen_at = -inf

    def see(self, idle: float, now: float) -> None:
        if now - self.seen_at < SAME_EVENT:
            return
        if abs(idle - self._idle) <= SAME_HABIT * max(idle, self._idle):
            self._keep = min(self.keep(now), max(LEAST, min(idle, self._idle) - IDLE_MARGIN))
            self._learned_at = now
        self._idle = idle
        self.seen_at = now

    def keep(self, now: float) -> float:
        return inf if self._keep == inf else self._keep * 2.0 ** ((now - self._learned_at) / DOUBLES_AFTER)


def keep_seconds(headers: list[tuple[bytes, bytes]]) -> float:
    """How long a peer keeps an idle connection: what its Keep-Alive header says, less a margin."""
    for name, value in headers:
        if name == b"keep-alive":
            for part in value.split(b","):
                word, _, seconds = part.strip().partition(b"=")
                if word.lower() == b"timeout" and seconds.isdigit() and len(seconds) < 6:
                    return max(0.0, float(seconds) - IDLE_MARGIN)
    return IDLE
