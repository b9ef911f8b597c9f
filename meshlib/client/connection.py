"""What does one connection of an event loop do with an exchange?

A thin Protocol around the Rust state machine, which gives back what to write and what has come: connect, exchange, exchange, … One
exchange at a time (HTTP/1.1); `http2.py` takes over where the handshake says so. No Rust borrow is held while the transport is
called, since it may call back at once. All endings go through `_end`. It decides nothing: no retry, no choice of endpoint.

Its time is the attribute `end`, which the carrier's sweep looks at; only a near end has a timer. Until the head it is the
attempt's, afterwards the same or (for streams and explicit timeouts) moved on by every sign of life.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from .. import errors
from .._native import core
from .faults import IDLE_TIMEOUT, STALE, WRITE_TIMEOUT, given_up, late, lost
from .pool import Key, keep_seconds
from .terms import ORDINARY
from .upload import LARGE, demand_end, feed, idle_of, is_on_demand, race

if TYPE_CHECKING:
    from .http2 import Http2Connection
    from .loop import LoopCarrier
    from .way import Attempt, Headers, Reply

# Bytes that one read takes at most, and that a body may wait unread before the socket is paused.
BUFFER = 256 * 1024
# Ends further away than this are found by the sweep, nearer ones by a timer of their own: a timer per call costs more.
NEAR = 1.0
NEVER = float("inf")
HTTP1 = "http/1.1"


class Connection(asyncio.BufferedProtocol):
    """One HTTP/1.1 connection of one loop."""

    __slots__ = (
        "_attempt",
        "_buffer",
        "_carrier",
        "_demand",
        "_drained",
        "_error",
        "_is_lost",
        "_is_reusable",
        "_phase",
        "_pieces",
        "_reader",
        "_reply",
        "_socket",
        "_transport",
        "_unread",
        "_used",
        "born",
        "end",
        "idle",
        "idle_since",
        "keep",
        "key",
        "limit",
        "not_after",
        "opened",
        "timer",
        "tls",
        "until",
        "wire",
    )

    def __init__(self, carrier: LoopCarrier, attempt: Attempt, key: Key) -> None:
        self.key = key
        self.tls = attempt.tls
        self.wire = core.HttpConnection(attempt.tls, attempt.identity, attempt.address, key[2])
        self._carrier = carrier
        self._buffer = carrier.buffer
        self._transport: asyncio.Transport | None = None
        self._attempt: Attempt | None = None
        self._socket = -1
        self._reply: asyncio.Future[Any] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None
        # The peer's word that it takes the body.
        self._demand: asyncio.Future[None] | None = None
        self._pieces: deque[bytes] | None = None
        self._unread = 0
        self._error: errors.AttemptFailed | None = None
        self._is_lost = False
        self._used = False
        self._is_reusable = False
        # The reason of a timeout now: None while the head is awaited.
        self._phase: str | None = None
        self.opened: asyncio.Future[Http2Connection | None] = carrier.loop.create_future()
        self.born = self.idle_since = carrier.loop.time()
        self.keep = 0.0
        # When time is up, until when it can be moved on, and by how many seconds a sign of life does so (0: not at all).
        self.end = self.limit = NEVER
        self.idle = 0.0
        self.timer: asyncio.TimerHandle | None = None
        # The ends of the peer's certificate (Unix seconds) and of its use (the pool's judgement).
        self.not_after = NEVER
        self.until = 0.0

    # --- the exchange, in its order

    async def exchange(self, attempt: Attempt) -> Reply:
        transport = self._transport
        assert transport is not None
        body = attempt.body
        self._attempt = attempt
        reply = self._reply = self._carrier.loop.create_future()
        try:
            if attempt.terms is ORDINARY and (body is None or (type(body) is bytes and len(body) < LARGE)):
                if attempt.head_end - attempt.now < NEAR:
                    self._carrier.watch(self, attempt.head_end)
                else:
                    # The sweep will see it.
                    self.end = attempt.head_end
                    self._carrier.wind()
                out = self.wire.send(attempt.method, attempt.target, attempt.headers, body, False)
                if out:
                    transport.write(out)
            else:
                await self._deliver(attempt, body, reply)
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

    async def _deliver(self, attempt: Attempt, body: Any, reply: asyncio.Future[Any]) -> None:
        """Send a request that has terms of its own, or a body that is more than one write."""
        terms, now = attempt.terms, self._carrier.loop.time()
        # What the route gives for the head counts from the end of the upload.
        patience = attempt.head_end - now if terms.read is None else terms.read
        self.limit = attempt.end if terms.is_explicit else attempt.hard_end
        if body is None or (isinstance(body, bytes) and len(body) < LARGE):
            self._carrier.watch(self, min(attempt.head_end, now + patience))
            self._put(self.wire.send(attempt.method, attempt.target, attempt.headers, body, False))
            return
        if is_on_demand(attempt):
            self._carrier.watch(self, demand_end(attempt))
        else:
            self._begin_upload(attempt)
        await race(self._upload(attempt), reply)
        if self._reply is reply and not reply.done():
            self._phase = None
            self.idle = 0.0
            self._carrier.watch(self, min(self.limit, self._carrier.loop.time() + patience))

    def _begin_upload(self, attempt: Attempt) -> None:
        self._phase = WRITE_TIMEOUT
        self.idle = idle_of(attempt)
        self._carrier.watch(self, min(self.limit, self._carrier.loop.time() + self.idle) if self.idle else self.limit)

    async def _upload(self, attempt: Attempt) -> None:
        if not self._put(self.wire.send(attempt.method, attempt.target, attempt.headers, None, True)):
            return
        if is_on_demand(attempt):
            self._demand = self._carrier.loop.create_future()
            try:
                await self._demand
            finally:
                self._demand = None
            self._begin_upload(attempt)
        await feed(attempt, self._push)

    async def _push(self, piece: bytes | memoryview, is_last: bool) -> bool:
        """Write a piece when the peer takes it; False once it has answered or gone, since the rest is for nobody."""
        if self._reply is None or self._reply.done() or self._is_lost:
            return False
        if piece or is_last:
            try:
                out = self.wire.send_body(piece, is_last)
            except errors.ConnectionLost:
                return False  # whoever ended the connection says why, through the reply
            if not self._put(out):
                return False
        if self._drained is not None:
            # Shared by all who write: one that is cancelled takes nobody along.
            await asyncio.shield(self._drained)
        self._alive()
        return True

    def _put(self, data: bytes) -> bool:
        if self.is_gone():
            return False
        if data and self._transport is not None:
            self._transport.write(data)
        return True

    def _alive(self) -> None:
        """A sign of life moves the end on, where the times between two pieces are what is limited."""
        if self.idle:
            self.end = min(self.limit, self._carrier.loop.time() + self.idle)

    # --- a body on its way (way.Incoming)

    async def read(self) -> bytes:
        pieces = self._pieces
        if pieces is None:
            return b""
        while not pieces:
            if self._error is not None:
                raise self._error
            self._reader = self._carrier.loop.create_future()
            # Nobody is late while nobody waits for it.
            self._alive()
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
            self._rest()
            if self._is_reusable and not self._is_lost:
                self._carrier.give(self)
            else:
                self.close()
        elif self._unread < BUFFER and self._transport is not None and not self._is_lost:
            self._transport.resume_reading()
        return piece

    async def write(self, data: bytes) -> None:
        """After a change of protocols: send, when the other side takes it."""
        if not self._put(self.wire.send_body(data, False)):
            raise self._error or lost(self.wire, True, True, self.key[0], None)
        if self._drained is not None:
            # Shared by all who write: one that is cancelled takes nobody along.
            await asyncio.shield(self._drained)

    async def drop(self) -> None:
        self._pieces = None
        self._end()

    def info(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)

    # --- what the pool asks

    def is_usable(self) -> bool:
        """Whole, everything said, and nothing heard since: an answer that nobody asked for would be taken for the next one."""
        transport = self._transport
        return (
            not self._is_lost
            and transport is not None
            and not transport.is_closing()
            # An early answer can leave bytes of its request behind, and the next request would wait behind them.
            and not transport.get_write_buffer_size()
            # It may be in the socket, while the loop was busy with others.
            and (self.wire.is_quiet(self._socket) if self._socket >= 0 else self.wire.is_idle)
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
        if self.idle and self._carrier.loop.time() < self.limit and self._is_ours():
            self._alive()
            return
        self._end(late(self.key[0], self._phase, self.wire.has_written))

    def _is_ours(self) -> bool:
        """The silence is the application's, which has not taken what came, or (where it set the times itself) doesn't ask."""
        if self._pieces:
            return True
        if self._attempt is None or not self._attempt.terms.is_explicit:
            return False
        return (self._drained if self._phase == WRITE_TIMEOUT else self._reader) is None

    def abort(self, error: errors.AttemptFailed | None = None) -> None:
        """At once; whoever waits for it, or reads on, is told the error."""
        self._end(error)

    def cut(self, may_end: Callable[[Attempt], bool], error: errors.AttemptFailed) -> None:
        """End the exchange, if `may_end` says so of it."""
        attempt = self._attempt
        if attempt is not None and may_end(attempt):
            self.abort(error)

    def bury(self) -> None:
        """Its loop is closed, so that nobody can be told and nothing be said: only the socket is left."""
        self._is_lost = True
        self._reply = self._reader = self._drained = self._pieces = self._attempt = None
        transport, self._transport = self._transport, None
        # asyncio's own last step, which its loop will never take; uvloop closes its sockets with the loop.
        release = getattr(transport, "_call_connection_lost", None)
        if release is not None:
            release(None)

    def _rest(self) -> None:
        """The exchange is over, and no time runs."""
        self._attempt = None
        self._phase = None
        self.end = self.limit = NEVER
        self.idle = 0.0
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _end(self, error: errors.AttemptFailed | None = None, *, is_gentle: bool = False) -> None:
        """The one ending: afterwards nothing watches this connection, waits for it, or holds its socket."""
        self._rest()
        self._is_lost = True
        self._carrier.forget(self)
        if self._carrier.loop.is_closed():
            self.bury()
            return
        if error is not None and error.reason == STALE:
            self._carrier.saw(self)
        waiting: tuple[asyncio.Future[Any] | None, ...] = (self.opened, self._reply)
        for future in waiting:
            if future is not None and not future.done():
                error = error or given_up(self.key[0], self.wire.has_written)
                future.set_exception(error)
                # Seen: who waited may have been cancelled meanwhile, and that is no reason for a line in the log.
                future.exception()
        if self._reader is not None and not self._reader.done():
            error = error or given_up(self.key[0], self.wire.has_written)
            self._reader.set_result(None)
        if self._error is None:
            self._error = error
        transport = self._transport
        if transport is None:
            return
        if is_gentle and not transport.is_closing() and not transport.get_write_buffer_size():
            farewell = self.wire.close()
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
        plug = transport.get_extra_info("socket")
        self._socket = -1 if plug is None else plug.fileno()
        hello = self.wire.open()
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
            out, events = self.wire.receive(self._buffer, nbytes)
        except errors.AttemptFailed as error:
            alert = self.wire.pending()
            if alert:
                transport.write(alert)
            if isinstance(error, errors.ConnectionLost):
                # TLS can say farewell before the socket ends, and means the same.
                error = lost(self.wire, self.opened.done(), self._used, self.key[0], None)
            self._end(error, is_gentle=True)
            return
        if out:
            transport.write(out)
        for event in events:
            self._take(event)
        if self._demand is not None and not events and self.wire.has_received and not self._demand.done():
            # Not the answer, and so a word before it. It could be half an answer, too: then some of the body goes out in vain.
            self._demand.set_result(None)

    def _take(self, event: tuple[Any, ...]) -> None:
        kind = event[0]
        reply = self._reply
        if kind == core.EVENT_RESPONSE:
            if not self._used:
                self._first(event[4])
            if reply is not None and not reply.done():
                self._reply = self._attempt = self._phase = None
                self.end = NEVER
                if self.timer is not None or self.idle:
                    self._rest()
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
                self._stream(event[1], event[4])
                reply.set_result((*event[1:5], _Body(self)))
        elif kind == core.EVENT_BODY:
            if self._pieces is not None:
                self._pieces.append(event[1])
                self._unread += len(event[1])
                if self._unread > BUFFER and self._transport is not None:
                    self._transport.pause_reading()
                self._alive()
                self._wake()
        elif kind == core.EVENT_END:
            self._is_reusable = event[1]
            if self._pieces is not None:
                self._pieces.append(b"")
                self._wake()
        elif kind == core.EVENT_OPEN:
            self.not_after = self.wire.peer_not_after or NEVER
            if not self.opened.done():
                self.opened.set_result(self._succeeded() if self.wire.protocol == "h2" else None)

    def _stream(self, status: int, headers: Headers) -> None:
        """The head is here and the body is not: what limits the rest?"""
        attempt = self._attempt
        if attempt is None:
            return
        self.limit, self.idle = limits_of(attempt, status, headers)
        self._phase = IDLE_TIMEOUT if self.idle else None
        self._carrier.watch(self, min(self.limit, self._carrier.loop.time() + self.idle) if self.idle else self.limit)

    def _succeeded(self) -> Http2Connection:
        """The handshake agreed on HTTP/2: another Protocol takes over what this one opened."""
        from .http2 import Http2Connection

        heir = Http2Connection(self._carrier, self.key, self.tls, self.wire)
        transport, self._transport = self._transport, None
        self._carrier.adopt(self, heir)
        assert transport is not None
        heir.adopt(transport)
        return heir

    def _first(self, headers: Headers) -> None:
        self._used = True
        self.keep = keep_seconds(headers)

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def eof_received(self) -> bool:
        if not self.wire.has_received:
            # No answer has begun, so that none is cut short: `connection_lost` says how far the exchange had come.
            return False
        try:
            events = self.wire.receive_eof()
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
            self._carrier.forget(self)
            self._carrier.pool.forget(self, self._carrier.loop.time())
        else:
            self._end(self._error or lost(self.wire, self.opened.done(), self._used, self.key[0], exc))

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._carrier.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None


def limits_of(attempt: Attempt, status: int, headers: Headers) -> tuple[float, float]:
    """After the head, with a body still on its way: the absolute end, and the seconds that may pass without progress (0: any)."""
    terms = attempt.terms
    if terms.is_explicit:
        return attempt.end, terms.read or 0.0
    if terms.is_stream or status == 101 or is_drawn_out(attempt) or is_event_stream(headers):
        return attempt.hard_end, attempt.stream_idle
    return attempt.end, 0.0


def is_drawn_out(attempt: Attempt) -> bool:
    """A body that takes many writes makes the whole call a stream."""
    body = attempt.body
    return body is not None and not (isinstance(body, bytes) and len(body) < LARGE)


def is_event_stream(headers: Headers) -> bool:
    return any(name == b"content-type" and value[:17].lower() == b"text/event-stream" for name, value in headers)


class _Body:
    """The body of a connection's exchange, as `way.Incoming`."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def read(self) -> bytes:
        return await self._connection.read()

    async def write(self, data: bytes) -> None:
        await self._connection.write(data)

    async def close(self) -> None:
        await self._connection.drop()

    def info(self, name: str) -> Any:
        return self._connection.info(name)


def key_of(attempt: Attempt, protocols: str) -> Key:
    """By what connections are pooled. HTTP/2 has no Upgrade, so such a request goes over HTTP/1.1."""
    if attempt.is_http2:
        protocols = "h2"
    if protocols != HTTP1 and any(name.lower() == b"upgrade" for name, _ in attempt.headers):
        protocols = HTTP1
    return (attempt.address, attempt.identity, protocols)


def split_address(address: str) -> tuple[str, int | None]:
    """("host", port) of "host:port" or "[v6]:port"; (path, None) of "unix:/path"."""
    if address.startswith("unix:"):
        return address.removeprefix("unix:"), None
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
