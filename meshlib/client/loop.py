"""How does the caller's event loop move the bytes of an exchange?

One thin Protocol per connection around the Rust state machine, which gives back what to write and what has come. One read buffer
is shared by all connections of a loop, since it is consumed inside `buffer_updated` (a fresh buffer per read doubles the cost
on plain asyncio). No Rust borrow is held while the transport is called, since it may call back at once. A pool belongs to
the loop that made it, so that one module-level client serves a loop per test. It decides nothing: no retry, no choice of endpoint.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any, cast

from .. import errors
from .._native import core
from .pool import Pool, keep_seconds
from .way import CONNECT_TIMEOUT, Attempt, Headers, Reply

# Bytes that one read takes at most, and that a body may wait unread before the socket is paused.
BUFFER = 256 * 1024
# Deadlines further away than this are found by the sweep, nearer ones by a timer of their own: a timer per call costs more.
SWEEP = 0.05
NEAR = 1.0
# How long the iterator of an upload that is not wanted any more may take to clean up before the call goes on.
FAREWELL = 0.1


class Connection(asyncio.BufferedProtocol):
    """One connection of one loop: connect, exchange, exchange, … One exchange at a time."""

    __slots__ = (
        "_buffer",
        "_carrier",
        "_drained",
        "_error",
        "_is_lost",
        "_is_reusable",
        "_pieces",
        "_reader",
        "_reply",
        "_transport",
        "_unread",
        "_used",
        "_wire",
        "born",
        "end",
        "idle_since",
        "keep",
        "key",
        "not_after",
        "opened",
        "tls",
    )

    def __init__(self, carrier: LoopCarrier, attempt: Attempt) -> None:
        self.key = (attempt.address, attempt.identity)
        self.tls = attempt.tls
        self._wire = core.HttpConnection(attempt.tls, attempt.identity, attempt.address)
        self._carrier = carrier
        self._buffer = carrier.buffer
        self._transport: asyncio.Transport | None = None
        self._reply: asyncio.Future[Any] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        self._pieces: deque[bytes] | None = None
        self._unread = 0
        self._error: errors.AttemptFailed | None = None
        self._is_lost = False
        self._used = False
        self._is_reusable = False
        self.opened: asyncio.Future[None] = carrier.loop.create_future()
        self.born = self.idle_since = carrier.loop.time()
        self.keep = 0.0
        self.end = 0.0
        self.not_after = float("inf")

    # --- the exchange, in its order

    async def exchange(self, attempt: Attempt) -> Reply:
        wire, transport = self._wire, self._transport
        assert transport is not None
        body = attempt.body
        self.end = attempt.end
        reply = self._reply = self._carrier.loop.create_future()
        self._carrier.watch(self, attempt.end)
        try:
            if body is None or isinstance(body, bytes):
                out = wire.send(attempt.method, attempt.target, attempt.headers, body, False)
                if out:
                    transport.write(out)
            else:
                await self._race(attempt, body, reply)
            return await reply  # type: ignore[no-any-return]
        except BaseException:
            # An exchange that ended badly leaves a connection in an unknown state. One whose answer had come whole is back in
            # the pool already, and maybe in use by another task.
            if self._reply is reply:
                self._end()
            raise
        finally:
            if self._reply is reply:
                self._reply = None

    async def _race(self, attempt: Attempt, body: Any, reply: asyncio.Future[Any]) -> None:
        """Send a streamed body until it ends or an answer (or the end of the time) comes first: its iterator may wait for ever."""
        upload = self._carrier.loop.create_task(self._upload(attempt, body))
        try:
            await asyncio.wait((upload, reply), return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                upload.result()
        finally:
            if not upload.done():
                upload.cancel()
                # The iterator has a moment to put things away, but it can't hold the answer back.
                await asyncio.wait((upload,), timeout=FAREWELL)
            upload.add_done_callback(_forgive)

    async def _upload(self, attempt: Attempt, body: Any) -> None:
        if not self._put(self._wire.send(attempt.method, attempt.target, attempt.headers, None, True)):
            return
        attempt.is_drawn = True
        if hasattr(body, "__aiter__"):
            async for piece in body:
                if not await self._push(piece):
                    return
        else:
            for piece in body:
                if not await self._push(piece):
                    return
        await self._push(b"", True)

    async def _push(self, piece: bytes, is_last: bool = False) -> bool:
        """Write a piece when the peer takes it; False once it has answered or gone, since the rest is for nobody."""
        if self._reply is None or self._reply.done() or self._is_lost:
            return False
        if piece or is_last:
            try:
                out = self._wire.send_body(piece, is_last)
            except errors.ConnectionLost:
                return False  # whoever ended the connection says why, through the reply
            if not self._put(out):
                return False
        if self._drained is not None:
            await self._drained
        return True

    def _put(self, data: bytes) -> bool:
        if self.is_gone():
            return False
        if data and self._transport is not None:
            self._transport.write(data)
        return True

    # --- a body on its way (way.Incoming)

    async def read(self) -> bytes:
        pieces = self._pieces
        if pieces is None:
            return b""
        while not pieces:
            if self._error is not None:
                raise self._error
            self._reader = self._carrier.loop.create_future()
            try:
                await self._reader
            except BaseException:
                self._end()
                raise
            finally:
                self._reader = None
        piece = pieces.popleft()
        self._unread -= len(piece)
        if not piece:
            # Only a body that was read to its end leaves a connection that can be used again.
            self._pieces = None
            self._carrier.unwatch(self)
            if self._is_reusable:
                self._carrier.give(self)
            else:
                self.close()
        elif self._unread < BUFFER and self._transport is not None and not self._is_lost:
            self._transport.resume_reading()
        return piece

    async def drop(self) -> None:
        self._pieces = None
        self._end()

    # --- what the pool asks

    def is_usable(self) -> bool:
        transport = self._transport
        return (
            not self._is_lost
            and transport is not None
            and self._wire.is_idle
            and not transport.is_closing()
            # An early answer can leave bytes of its request behind, and the next request would wait behind them.
            and not transport.get_write_buffer_size()
        )

    def is_gone(self) -> bool:
        """Its end may come before `connection_lost` tells of it."""
        return self._is_lost or self._transport is None or self._transport.is_closing()

    # --- the endings

    def close(self) -> None:
        """Nobody needs it any more."""
        if not self._is_lost:
            self._end(is_gentle=True)

    def expire(self) -> None:
        """The exchange's time is over."""
        self._end(
            errors.AttemptTimeout(
                f"{self.key[0]} did not answer in time.",
                hint="See the attempt's timeout and the deadline.",
                is_written=self._wire.has_written,
            )
        )

    def abort(self, error: errors.AttemptFailed | None = None) -> None:
        """At once; whoever waits for it, or reads on, is told the error."""
        self._end(error)

    def bury(self) -> None:
        """Its loop is closed, so that nobody can be told and nothing be said: only the socket is left."""
        self._is_lost = True
        self._reply = self._reader = self._drained = self._pieces = None
        transport, self._transport = self._transport, None
        # asyncio's own last step, which its loop will never take; uvloop closes its sockets with the loop.
        release = getattr(transport, "_call_connection_lost", None)
        if release is not None:
            release(None)

    def _end(self, error: errors.AttemptFailed | None = None, *, is_gentle: bool = False) -> None:
        """The one ending: afterwards nothing watches this connection, waits for it, or holds its socket."""
        self._carrier.unwatch(self)
        self._is_lost = True
        for future in (self.opened, self._reply, self._reader):
            if future is not None and not future.done():
                error = error or given_up(self.key[0], self._wire.has_written)
                if future is self._reader:
                    future.set_result(None)
                else:
                    future.set_exception(error)
                    # Seen: who waited may have been cancelled meanwhile, and that is no reason for a line in the log.
                    future.exception()
        if self._error is None:
            self._error = error
        transport = self._transport
        if transport is None:
            return
        if is_gentle and not transport.is_closing() and not transport.get_write_buffer_size():
            farewell = self._wire.close()
            if farewell:
                transport.write(farewell)
            transport.close()
        else:
            transport.abort()

    # --- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, only by shape.
        self._transport = cast("asyncio.Transport", transport)
        if self._is_lost:
            self._transport.abort()
            return
        hello = self._wire.open()
        if hello:
            self._transport.write(hello)
        else:
            self.opened.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        transport = self._transport
        assert transport is not None
        try:
            out, events = self._wire.receive(self._buffer, nbytes)
        except errors.AttemptFailed as error:
            alert = self._wire.pending()
            if alert:
                transport.write(alert)
            if isinstance(error, errors.ConnectionLost):
                # TLS can say farewell before the socket ends, and means the same.
                error = lost(self._wire, self.opened.done(), self._used, self.key[0], None)
            self._end(error, is_gentle=True)
            return
        if out:
            transport.write(out)
        for event in events:
            self._take(event)

    def _take(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        reply = self._reply
        if kind == core.EVENT_RESPONSE:
            if not self._used:
                self._first(event[4])
            if reply is not None and not reply.done():
                self._reply = None
                self._carrier.unwatch(self)
                reply.set_result(event[1:6])
                if event[6]:
                    self._carrier.give(self)
                    return
            self.close()
        elif kind == core.EVENT_HEAD:
            if not self._used:
                self._first(event[4])
            if reply is not None and not reply.done():
                self._pieces = deque()
                self._unread = 0
                reply.set_result((*event[1:5], _Body(self)))
        elif kind == core.EVENT_BODY:
            if self._pieces is not None:
                self._pieces.append(event[1])
                self._unread += len(event[1])
                if self._unread > BUFFER and self._transport is not None:
                    self._transport.pause_reading()
                self._wake()
        elif kind == core.EVENT_END:
            self._is_reusable = event[1]
            if self._pieces is not None:
                self._pieces.append(b"")
                self._wake()
        elif kind == core.EVENT_OPEN:
            self.not_after = self._wire.peer_not_after or float("inf")
            if not self.opened.done():
                self.opened.set_result(None)

    def _first(self, headers: Headers) -> None:
        self._used = True
        self.keep = keep_seconds(headers)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def eof_received(self) -> bool:
        if not self._wire.has_received:
            # No answer has begun, so that none is cut short: `connection_lost` says how far the exchange had come.
            return False
        try:
            events = self._wire.receive_eof()
        except errors.AttemptFailed as error:
            self._error = error
            return False
        for event in events:
            self._take(event)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        was_idle = self._reply is None and self._pieces is None
        self._is_lost = True
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if was_idle and self.opened.done():
            self._carrier.pool.forget(self)
        else:
            self._end(self._error or lost(self._wire, self.opened.done(), self._used, self.key[0], exc))

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._carrier.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None


class _Body:
    """The body of a connection's exchange, as `way.Incoming`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self) -> bytes:
        return await self._connection.read()

    async def close(self) -> None:
        await self._connection.drop()


def lost(
    wire: core.HttpConnection, was_open: bool, was_used: bool, address: str, cause: BaseException | None
) -> errors.AttemptFailed:
    """How far had it come when the connection broke? That decides whether it is safe to try again."""
    if not was_open:
        return errors.ConnectFailed(
            f"{address} closed the connection during the handshake{_because(cause)}.",
            hint="It may not speak mutual TLS there, or it is stopping.",
        )
    if not wire.has_written:
        reason, text = "send.unwritten", "before anything was written"
    elif was_used and not wire.has_received:
        reason, text = "send.stale", "that it had kept alive, without a byte of an answer"
    else:
        reason, text = "send.closed", "before its answer was complete"
    return errors.ConnectionLost(
        f"{address} closed the connection {text}{_because(cause)}.", reason=reason, is_written=wire.has_written
    )


def given_up(address: str, is_written: bool) -> errors.ConnectionLost:
    return errors.ConnectionLost(
        f"the connection to {address} was closed by this side: the client was closed, or the rest was not wanted.",
        hint="Close the client after its last answer has been read.",
        reason="send.client_closed",
        is_written=is_written,
    )


def too_slow(address: str) -> errors.ConnectFailed:
    return errors.ConnectFailed(
        f"{address} did not complete a connection in time.",
        hint="It is overloaded, or the network drops packets: see admit.connect.",
        reason=CONNECT_TIMEOUT,
    )


def unreachable(address: str, cause: OSError) -> errors.ConnectFailed:
    return errors.ConnectFailed(
        f"no connection to {address} ({cause.strerror or cause}).",
        hint="Nothing listens there, or it can't be reached: is the process up, and the address in discover right?",
    )


def _because(cause: BaseException | None) -> str:
    return f" ({cause})" if cause is not None else ""


class LoopCarrier:
    """What moves bytes on one event loop: its pool, its shared buffer and its one sweep. Not shared between loops."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.pool = Pool()
        self.buffer = memoryview(bytearray(BUFFER))
        self._watched: dict[Connection, asyncio.TimerHandle | None] = {}
        self._sweep: asyncio.TimerHandle | None = None

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def exchange(self, attempt: Attempt) -> Reply:
        if not attempt.is_fresh:
            now = self.loop.time()
            connection = self.pool.take((attempt.address, attempt.identity), attempt.tls, now, time.time())
            if connection is not None:
                return await connection.exchange(attempt)  # type: ignore[no-any-return]
        connection = await self._connect(attempt)
        return await connection.exchange(attempt)

    async def _connect(self, attempt: Attempt) -> Connection:
        connection = Connection(self, attempt)
        self.pool.opened += 1
        try:
            async with asyncio.timeout_at(attempt.connect_end):
                host, port = split_address(attempt.address)
                if port is None:
                    await self.loop.create_unix_connection(lambda: connection, host)
                else:
                    await self.loop.create_connection(lambda: connection, host, port)
                await connection.opened
            if connection.is_gone():
                raise lost(connection._wire, True, False, attempt.address, None)
        except TimeoutError as error:
            connection.abort()
            raise too_slow(attempt.address) from error
        except OSError as error:
            connection.abort()
            raise unreachable(attempt.address, error) from error
        except BaseException:
            connection.abort()
            raise
        return connection

    # --- time: near ends have their own timer, the rest is swept

    def watch(self, connection: Connection, end: float) -> None:
        near = end - self.loop.time() < NEAR
        self._watched[connection] = self.loop.call_at(end, connection.expire) if near else None
        self._wind()

    def unwatch(self, connection: Connection) -> None:
        timer = self._watched.pop(connection, None)
        if timer is not None:
            timer.cancel()

    def give(self, connection: Connection) -> None:
        self.pool.give(connection, self.loop.time())
        self._wind()

    def _wind(self) -> None:
        if self._sweep is None:
            self._sweep = self.loop.call_later(SWEEP, self._turn)

    def _turn(self) -> None:
        self._sweep = None
        now = self.loop.time()
        for connection in [c for c, timer in self._watched.items() if timer is None and c.end <= now]:
            connection.expire()
        if self.pool.sweep(now) or self._watched:
            self._wind()

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self.pool.clear()
        for connection in list(self._watched):
            connection.abort(given_up(connection.key[0], True))

    def bury(self) -> None:
        """The loop is closed, and what it left open goes."""
        for connection in (*self.pool.drain(), *self._watched):
            connection.bury()
        self._watched.clear()


def _forgive(upload: asyncio.Task[None]) -> None:
    """What an upload raises after its call has ended is nobody's any more."""
    if not upload.cancelled():
        upload.exception()


def split_address(address: str) -> tuple[str, int | None]:
    """("host", port) of "host:port" or "[v6]:port"; (path, None) of "unix:/path"."""
    if address.startswith("unix:"):
        return address.removeprefix("unix:"), None
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class LoopCarriers:
    """The carriers of one client: one for each event loop that uses it, so that a module-level client survives its first loop."""

    def __init__(self) -> None:
        # Strong, since a carrier holds its loop anyway; what belongs to closed loops is buried when another loop comes.
        self._by_loop: dict[asyncio.AbstractEventLoop, LoopCarrier] = {}

    def current(self) -> LoopCarrier:
        """The carrier of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        if found is None:
            self._bury()
            found = self._by_loop[loop] = LoopCarrier(loop)
        return found

    def close(self) -> None:
        """Close what waits on the running loop."""
        self._bury()
        found = self._by_loop.pop(asyncio.get_running_loop(), None)
        if found is not None:
            found.close()

    def forget(self) -> None:
        """In a forked child the parent's connections are the parent's: they are dropped without a word on the wire."""
        self._by_loop = {}

    def _bury(self) -> None:
        for loop in list(self._by_loop):
            if loop.is_closed():
                carrier = self._by_loop.pop(loop, None)
                if carrier is not None:
                    carrier.bury()
