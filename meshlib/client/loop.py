"""How does the caller's event loop move the bytes?

A carrier for each loop: its pool, its open connections, one read buffer shared by all of them (it is consumed inside
`buffer_updated`; a fresh buffer per read doubles the cost on plain asyncio), and one sweep that finds what is late or idle. A pool
belongs to the loop that made it, so that one module-level client serves a loop per test. It decides nothing: no retry, no choice of
endpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from functools import partial
from typing import TYPE_CHECKING, Any

from .connection import BUFFER, HTTP1, NEAR, NEVER, Connection, key_of, split_address
from .faults import given_up, lost, too_slow, unreachable
from .http2_pool import Http2Pool
from .pool import Key, Ledger, Pool

if TYPE_CHECKING:
    from .http2 import Http2Connection
    from .way import Attempt, Reply

# Seconds between two looks at what is late or idle.
SWEEP = 0.05


class LoopCarrier:
    """What moves bytes on one event loop. Not shared between loops."""

    can_overlap = True

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: Pool, protocols: str) -> None:
        self.loop = loop
        self.protocols = protocols
        self.pool = pool
        self.buffer = memoryview(bytearray(BUFFER))
        self._open: set[Any] = set()
        self.http2 = Http2Pool(loop)
        # The next look, and whether it is a late one, for which nothing that begins now can wait.
        self._sweep: asyncio.TimerHandle | None = None
        self._is_slow = False
        # What carries the attempts of delegated services in the place of this one, once there were any (delegated.py).
        self.delegate: Any = None

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def exchange(self, attempt: Attempt) -> Awaitable[Reply]:
        key: Key = (attempt.address, attempt.identity, HTTP1)
        if attempt.is_http2 or self.protocols != HTTP1:
            key = key_of(attempt, self.protocols)
        if not attempt.is_fresh:
            connection = self.pool.take(key, attempt.tls, attempt.now, time.time())
            if connection is not None:
                return connection.exchange(attempt)  # type: ignore[no-any-return]
        return self._exchange_anew(attempt, key)

    async def _exchange_anew(self, attempt: Attempt, key: Key) -> Reply:
        connect = partial(self._connect, attempt, key)
        if key[2] == HTTP1:
            connection = await connect()
        else:
            connection = await self.http2.lease(key, attempt.tls, attempt.connect_end, connect)
        return await connection.exchange(attempt)  # type: ignore[no-any-return]

    async def _connect(self, attempt: Attempt, key: Key) -> Connection | Http2Connection:
        """A new connection, of the version of HTTP that its handshake agreed on."""
        connection = Connection(self, attempt, key)
        self._open.add(connection)
        self.pool.opened += 1
        try:
            async with asyncio.timeout_at(attempt.connect_end):
                await self._dial(attempt.address, connection)
                agreed = await connection.opened or connection
            if attempt.tls is not None:
                attempt.resumed = connection.wire.tls_resumed
            if agreed.is_gone():
                raise lost(connection.wire, True, False, attempt.address, None)
        except TimeoutError as error:
            connection.abort()
            raise too_slow(attempt.address) from error
        except OSError as error:
            connection.abort()
            raise unreachable(attempt.address, error) from error
        except BaseException:
            connection.abort()
            raise
        return agreed

    async def _dial(self, address: str, connection: Connection) -> None:
        host, port = split_address(address)
        if port is None:
            await self.loop.create_unix_connection(lambda: connection, host)
        else:
            await self.loop.create_connection(lambda: connection, host, port)

    def adopt(self, connection: Connection, heir: Http2Connection) -> None:
        """A connection's handshake agreed on HTTP/2, and another Protocol takes its place."""
        self._open.discard(connection)
        self._open.add(heir)

    # --- what its connections ask

    def watch(self, connection: Any, end: float) -> None:
        """Its time is up at `end`."""
        connection.end = end
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None
        if end - self.loop.time() < NEAR:
            connection.timer = self.loop.call_at(end, self._due, connection)
        else:
            self.wind()

    def _due(self, connection: Any) -> None:
        connection.timer = None
        if connection.end > self.loop.time():
            if connection.end < NEVER:
                self.watch(connection, connection.end)
        else:
            self._expire(connection)

    def _expire(self, connection: Any) -> None:
        connection.expire()
        if connection.end < NEVER:
            self.watch(connection, connection.end)

    def give(self, connection: Any) -> None:
        """Its exchange is over, and it can carry another. Whether it still can is looked at when it is taken."""
        self.pool.give(connection, self.loop.time(), True)
        self.wind()

    def saw(self, connection: Any) -> None:
        """A kept-alive connection was closed under us: how long does this peer keep one?"""
        now = self.loop.time()
        self.pool.learn(connection.key, now - connection.idle_since, now)

    def retire(self, connection: Http2Connection) -> None:
        """It takes no new exchanges; those that it has go on."""
        self.http2.retire(connection)

    def forget(self, connection: Any) -> None:
        """It has ended."""
        self._open.discard(connection)
        if connection.wire.protocol == "h2":
            self.http2.retire(connection)

    def wind(self) -> None:
        """Something waits: look at it in a moment."""
        if self._sweep is not None:
            if not self._is_slow:
                return
            self._sweep.cancel()
            self._is_slow = False
        self._sweep = self.loop.call_later(SWEEP, self._turn)

    def _turn(self) -> None:
        self._sweep = None
        self._is_slow = False
        now = self.loop.time()
        is_busy = False
        for connection in tuple(self._open):
            if connection.end <= now and connection.timer is None:
                self._expire(connection)
            is_busy |= connection.end < NEVER
        due = self.pool.sweep(now)
        if is_busy:
            self.wind()
        elif due is not None:
            # Nothing is under way: there is time until the first idle connection has had its.
            self._sweep = self.loop.call_at(max(due, now + SWEEP), self._turn)
            self._is_slow = True

    # --- the end

    def close(self) -> None:
        """Close what waits, and end what is under way."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self.pool.clear()
        for connection in tuple(self._open):
            connection.abort(given_up(connection.key[0], True))
        if self.delegate is not None:
            self.delegate.close()

    def bury(self) -> None:
        """The loop is closed, and what it left open goes."""
        if self.delegate is not None:
            self.delegate.bury()
        self.pool.drain()
        for connection in tuple(self._open):
            connection.bury()
        self._open.clear()


class LoopCarriers:
    """The carriers of one client: one for each event loop that uses it, so that a module-level client survives its first loop."""

    def __init__(self, ledger: Ledger | None = None, protocols: str = "http/1.1") -> None:
        self.protocols = protocols
        self._ledger = ledger or Ledger()
        # Strong, since a carrier holds its loop anyway; what belongs to closed loops is buried when another loop comes.
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopCarrier] = {}

    def current(self) -> LoopCarrier:
        """The carrier of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            self._bury()
            found = self._by_loop[loop] = LoopCarrier(loop, self._ledger.open(), self.protocols)
        return found

    def close(self) -> None:
        """Close what waits on the running loop."""
        self._bury()
        found = self._by_loop.pop(asyncio.get_running_loop(), None)
        if found is not None:
            found.close()
            self._ledger.retire(found.pool)

    def forget(self) -> None:
        """In a forked child the parent's connections are the parent's: they are dropped without a word on the wire."""
        self._by_loop = {}

    def _bury(self) -> None:
        for loop in list(self._by_loop):
            if loop.is_closed():
                carrier = self._by_loop.pop(loop, None)
                if carrier is not None:
                    carrier.bury()
                    self._ledger.retire(carrier.pool)
