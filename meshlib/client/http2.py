"""What does one HTTP/2 connection of an event loop do with many exchanges at once?

It takes over from `connection.Connection` when the handshake has agreed on HTTP/2 (`adopt`): same transport, same wire, another
Protocol. Every exchange (`http2_exchange.py`) is a stream with an end of its own: what befalls one ends that stream and no other.
What the wire says of a stream that failed (was it processed?) is passed on as it is.

To its carrier it is one thing with one `end`: the nearest of all its exchanges, or the moment until which it may be idle. It
decides nothing: no retry, and not which connection carries what.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from .. import errors
from .._native import core
from .connection import NEVER
from .faults import given_up, lost
from .http2_exchange import Exchange

if TYPE_CHECKING:
    from .way import Attempt, Reply

# Seconds that a connection without exchanges is kept: hypercorn closes after 5, and a race is safe to lose only for what may be
# sent twice. Peers that close later say so by GOAWAY first.
KEEP = 4.5


class Carrier(Protocol):
    """What a connection asks of whoever owns it (`loop.LoopCarrier`)."""

    loop: asyncio.AbstractEventLoop
    buffer: memoryview

    def watch(self, connection: Any, end: float) -> None:
        """Call `expire` at `end`; afterwards `connection.end` says when next."""

    def retire(self, connection: Any) -> None:
        """It takes no new exchanges; those that it has go on."""

    def forget(self, connection: Any) -> None:
        """It has ended."""


class Http2Connection(asyncio.BufferedProtocol):
    """One HTTP/2 connection of one loop, shared by all exchanges with its endpoint."""

    __slots__ = (
        "_carrier",
        "_drained",
        "_exchanges",
        "_is_leaving",
        "_is_lost",
        "_transport",
        "born",
        "end",
        "idle_since",
        "keep",
        "key",
        "not_after",
        "timer",
        "tls",
        "wire",
    )

    def __init__(self, carrier: Carrier, key: tuple[str, ...], tls: core.TlsClient | None, wire: core.HttpConnection) -> None:
        self._carrier = carrier
        self.key = key
        self.tls = tls
        self.wire = wire
        self._exchanges: dict[int, Exchange] = {}
        self._transport: asyncio.Transport | None = None
        self._drained: asyncio.Future[None] | None = None
        self._is_lost = False
        self._is_leaving = False
        self.born = self.idle_since = carrier.loop.time()
        self.keep = KEEP
        self.not_after = wire.peer_not_after or NEVER
        self.end = NEVER
        self.timer: asyncio.TimerHandle | None = None

    def adopt(self, transport: asyncio.Transport) -> None:
        """Take over a transport whose handshake is done. The protocol before it is not called any more."""
        self._transport = transport
        transport.set_protocol(self)
        self._rest()

    async def exchange(self, attempt: Attempt) -> Reply:
        """Only while it `is_usable`: else the call fails as one that was never sent."""
        return await Exchange(self, attempt).run()

    @property
    def exchanges(self) -> int:
        return len(self._exchanges)

    # --- what the carrier asks

    def is_usable(self) -> bool:
        """Can carry one exchange more, beside those that it carries."""
        return not self._is_leaving and not self.is_gone() and self.wire.streams_left > 0

    def is_gone(self) -> bool:
        """Its end may come before `connection_lost` tells of it."""
        return self._is_lost or self._transport is None or self._transport.is_closing()

    def retire(self) -> None:
        """No new exchanges; it ends with the last of those that it has."""
        if not self._is_leaving:
            self._is_leaving = True
            self._carrier.retire(self)
        if not self._exchanges:
            self.close()

    def expire(self) -> None:
        """Its `end` has come: for which of its exchanges?"""
        now = self._carrier.loop.time()
        for exchange in tuple(self._exchanges.values()):
            if exchange.end <= now:
                exchange.expire()
        if self._exchanges:
            self.end = min(exchange.end for exchange in self._exchanges.values())
        elif self.is_gone() or now < self.idle_since + self.keep:
            self.end = NEVER if self.is_gone() else self.idle_since + self.keep
        else:
            self.close()

    def close(self) -> None:
        """Nobody needs it any more."""
        if not self._is_lost:
            self._end(is_gentle=True)

    def abort(self, error: errors.AttemptFailed | None = None) -> None:
        """At once; whoever waits for it, or reads on, is told the error."""
        self._end(error)

    def cut(self, may_end: Callable[[Attempt], bool], error: errors.AttemptFailed) -> None:
        """End the exchanges of which `may_end` says so."""
        for stream, exchange in tuple(self._exchanges.items()):
            if may_end(exchange.attempt):
                self.give_up(stream)
                exchange.fail(copy.copy(error))

    def bury(self) -> None:
        """Its loop is closed, so that nobody can be told and nothing be said: only the socket is left."""
        self._is_lost = True
        self._exchanges.clear()
        transport, self._transport = self._transport, None
        # asyncio's own last step, which its loop will never take; uvloop closes its sockets with the loop.
        release = getattr(transport, "_call_connection_lost", None)
        if release is not None:
            release(None)

    # --- what its exchanges ask

    def begin(self, exchange: Exchange, body: bytes | None, is_streaming: bool) -> int:
        if not self.is_usable():
            raise errors.ConnectionLost(
                f"the connection to {self.key[0]} takes no more requests.",
                hint="It is safe to send again over another one.",
                reason="send.unwritten",
            )
        attempt = exchange.attempt
        stream, out = self.wire.open_stream(attempt.method, attempt.target, attempt.headers, body, is_streaming)
        self._exchanges[stream] = exchange
        self.put(out)
        return stream

    def put(self, data: bytes) -> None:
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def watch(self, end: float) -> None:
        """One of its exchanges ends at `end` at the latest."""
        if end < self.end:
            self._carrier.watch(self, end)

    def over(self, stream: int) -> None:
        """An exchange has ended, well or badly."""
        if self._exchanges.pop(stream, None) is not None and not self._exchanges:
            if self._is_leaving:
                self.close()
            else:
                self._rest()

    def give_up(self, stream: int) -> None:
        """Nobody wants the rest of an exchange, and the peer is told."""
        if stream in self._exchanges:
            if not self._is_lost:
                self.put(self.wire.reset_stream(stream))
            self.over(stream)

    async def drained(self) -> bool:
        """When the socket takes more; False if it is gone."""
        if self._drained is not None:
            # Shared by all who write: one that is cancelled takes nobody along.
            await asyncio.shield(self._drained)
        return not self.is_gone()

    def time(self) -> float:
        return self._carrier.loop.time()

    def create_future(self) -> asyncio.Future[Any]:
        return self._carrier.loop.create_future()

    def info(self, name: str) -> Any:
        return None if self._transport is None else self._transport.get_extra_info(name)

    # --- the endings

    def _rest(self) -> None:
        """Nothing is under way: it may stay idle for a while."""
        self.idle_since = self._carrier.loop.time()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._carrier.watch(self, self.idle_since + self.keep)

    def _end(self, error: errors.AttemptFailed | None = None, *, is_gentle: bool = False) -> None:
        """The one ending: afterwards no exchange waits for it, and nothing watches it or holds its socket."""
        self._is_lost = self._is_leaving = True
        self.end = NEVER
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self._carrier.forget(self)
        exchanges = tuple(self._exchanges.values())
        self._exchanges.clear()
        for exchange in exchanges:
            # Each its own: who catches one adds to it.
            exchange.fail(copy.copy(error) if error is not None else given_up(self.key[0], True))
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
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

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._carrier.buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            out, events = self.wire.receive_streams(self._carrier.buffer, nbytes)
        except errors.AttemptFailed as error:
            self.put(self.wire.pending())
            self._end(error, is_gentle=True)
            return
        self.put(out)
        self._take(events)
        if not self._is_lost and not self.wire.is_open:
            self._end(lost(self.wire, True, True, self.key[0], None), is_gentle=True)

    def _take(self, events: list[tuple[int, tuple[Any, ...]]]) -> None:
        for stream, event in events:
            if stream:
                exchange = self._exchanges.get(stream)
                # An exchange that ended meanwhile, through another one's callback, is told nothing.
                if exchange is not None:
                    exchange.take(event)
            elif event[0] == core.EVENT_CLOSED:
                self.retire()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_lost:
            self._is_leaving = True
            self._take(self.wire.receive_streams_eof())
        self._end(lost(self.wire, True, True, self.key[0], exc))

    def pause_writing(self) -> None:
        if self._drained is None:
            self._drained = self._carrier.loop.create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None
