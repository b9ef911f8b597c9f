"""Which connection can be used again?

Connections wait here between exchanges, by (address, expected identity). The youngest is used first, so that the surplus of a
peak grows old and goes. A connection is taken only if it is whole: same generation of identity, not older than its age limit,
idle for less time than its peer keeps it, and its peer's certificate still valid. The pool moves no bytes and knows neither loops
nor threads; `loop.py` and `thread.py` do.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from .._native import core

# Seconds that an idle connection is kept when its peer announces nothing. gunicorn closes after 2, uvicorn after 5: we go first.
IDLE = 1.8
# Kept away from what the peer announced: its clock starts before ours.
IDLE_MARGIN = 0.3
# No connection lives longer, so that a fleet that grew is used and a DNS change is seen.
MAX_AGE = 600.0
# Idle connections per endpoint; a burst above it opens and closes its own.
MAX_IDLE = 128


class Pooled(Protocol):
    key: tuple[str, str]
    tls: core.TlsClient | None
    born: float
    idle_since: float
    keep: float
    not_after: float

    def is_usable(self) -> bool: ...
    def close(self) -> None: ...


class Pool:
    """Idle connections of one event loop, or of all threads. Not locked: its owner says who may touch it."""

    __slots__ = ("_idle", "closed", "opened", "reused")

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], deque[Any]] = {}
        self.opened = 0
        self.reused = 0
        self.closed = 0

    def take(self, key: tuple[str, str], tls: core.TlsClient | None, now: float, wall: float) -> Any | None:
        """The youngest connection that is whole, or None."""
        idle = self._idle.get(key)
        while idle:
            connection = idle.pop()
            if self._is_whole(connection, tls, now, wall):
                self.reused += 1
                return connection
            self.drop(connection)
        return None

    def give(self, connection: Pooled, now: float) -> None:
        """Keep a connection after its exchange, if it's worth keeping."""
        if not connection.is_usable() or now - connection.born > MAX_AGE:
            self.drop(connection)
            return
        connection.idle_since = now
        idle = self._idle.get(connection.key)
        if idle is None:
            idle = self._idle[connection.key] = deque()
        idle.append(connection)
        if len(idle) > MAX_IDLE:
            self.drop(idle.popleft())

    def forget(self, connection: Pooled) -> None:
        """A connection died while it waited."""
        idle = self._idle.get(connection.key)
        if idle is not None:
            try:
                idle.remove(connection)
            except ValueError:
                return
            self.closed += 1

    def drop(self, connection: Pooled) -> None:
        self.closed += 1
        connection.close()

    def sweep(self, now: float) -> bool:
        """Close what has waited too long; True while anything waits."""
        for key in list(self._idle):
            idle = self._idle[key]
            while idle and now - idle[0].idle_since >= idle[0].keep:
                self.drop(idle.popleft())
            if not idle:
                del self._idle[key]
        return bool(self._idle)

    def clear(self) -> None:
        for connection in self.drain():
            connection.close()

    def drain(self) -> list[Any]:
        """All that waits, which the caller has to end."""
        found = [connection for idle in self._idle.values() for connection in idle]
        self._idle.clear()
        self.closed += len(found)
        return found

    def _is_whole(self, connection: Pooled, tls: core.TlsClient | None, now: float, wall: float) -> bool:
        return (
            connection.tls is tls
            and now - connection.idle_since < connection.keep
            and now - connection.born <= MAX_AGE
            and wall < connection.not_after
            and connection.is_usable()
        )

    def __repr__(self) -> str:
        idle = sum(len(waiting) for waiting in self._idle.values())
        return f"<Pool idle={idle} opened={self.opened} reused={self.reused} closed={self.closed}>"


def keep_seconds(headers: list[tuple[bytes, bytes]]) -> float:
    """How long a peer keeps an idle connection: what its Keep-Alive header says, less a margin."""
    for name, value in headers:
        if name == b"keep-alive":
            for part in value.split(b","):
                word, _, seconds = part.strip().partition(b"=")
                if word.lower() == b"timeout" and seconds.isdigit() and len(seconds) < 6:
                    return max(0.0, float(seconds) - IDLE_MARGIN)
    return IDLE
