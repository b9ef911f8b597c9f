"""Which HTTP/2 connection carries the next exchange?

One connection serves many at once, so that the question isn't which one is idle (`pool.py`) but which one has room. The oldest
with room is used, and a second is opened only when all are full; so the surplus of a peak becomes idle and goes. Who comes
while one is being opened waits for it instead of opening another: a burst of calls makes one connection. What agreed on HTTP/1.1
instead is remembered for a while, since then nobody has to wait for anybody.

It moves no bytes. A pool belongs to one loop.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .. import errors
from .faults import CONNECT_TIMEOUT, too_slow
from .pool import MAX_AGE

if TYPE_CHECKING:
    from .._native import core
    from .http2 import Http2Connection

Key = tuple[str, ...]

# Seconds for which an endpoint that agreed on HTTP/1.1 is taken to do so again.
REMEMBERED = 60.0
MAX_REMEMBERED = 1024


class Http2Pool:
    """The HTTP/2 connections of one loop, busy or idle, by endpoint, identity and protocol."""

    __slots__ = ("_by_key", "_loop", "_opening", "_plain", "_wall")

    def __init__(self, loop: asyncio.AbstractEventLoop, wall: Callable[[], float] = time.time) -> None:
        self._loop = loop
        self._wall = wall
        self._by_key: dict[Key, list[Http2Connection]] = {}
        self._opening: dict[Key, asyncio.Future[errors.AttemptFailed | None]] = {}
        self._plain: dict[Key, float] = {}

    def take(self, key: Key, tls: core.TlsClient | None) -> Http2Connection | None:
        """One with room for an exchange more, and of this generation of identity; the rest of them is retired."""
        found = None
        for connection in tuple(self._by_key.get(key, ())):
            if connection.tls is not tls or self._loop.time() - connection.born > MAX_AGE or self._wall() >= connection.not_after:
                connection.retire()
            elif found is None and connection.is_usable():
                found = connection
        return found

    async def lease(self, key: Key, tls: core.TlsClient | None, end: float, connect: Callable[[], Awaitable[Any]]) -> Any:
        """One with room; else what `connect` gives, which may speak HTTP/1.1. `end` limits the wait for somebody else's."""
        while True:
            found = self.take(key, tls)
            if found is not None:
                return found
            if self._plain.get(key, 0.0) > self._loop.time():
                return await connect()
            opening = self._opening.get(key)
            if opening is None:
                return await self._open(key, connect)
            try:
                async with asyncio.timeout_at(end):
                    failure = await asyncio.shield(opening)
            except TimeoutError as error:
                raise too_slow(key[0]) from error
            if failure is not None:
                # Each its own: who catches one adds to it.
                raise copy.copy(failure)

    async def _open(self, key: Key, connect: Callable[[], Awaitable[Any]]) -> Any:
        opening = self._opening[key] = self._loop.create_future()
        failure = None
        try:
            connection = await connect()
            if connection.wire.protocol == "h2":
                self._by_key.setdefault(key, []).append(connection)
            else:
                self._remember(key)
            return connection
        except errors.AttemptFailed as error:
            # A short deadline is the business of whoever had it; the next one tries anew.
            failure = error if error.reason != CONNECT_TIMEOUT else None
            raise
        finally:
            del self._opening[key]
            if not opening.done():
                opening.set_result(failure)

    def _remember(self, key: Key) -> None:
        if len(self._plain) >= MAX_REMEMBERED:
            self._plain.clear()
        self._plain[key] = self._loop.time() + REMEMBERED

    def retire(self, connection: Http2Connection) -> None:
        """It has ended, or takes no new exchanges."""
        known = self._by_key.get(connection.key)
        if known is not None and connection in known:
            known.remove(connection)
            if not known:
                del self._by_key[connection.key]

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    def __repr__(self) -> str:
        busy = sum(connection.exchanges for known in self._by_key.values() for connection in known)
        return f"<Http2Pool connections={len(self)} exchanges={busy} opening={len(self._opening)}>"
