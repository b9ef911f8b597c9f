"""How does gRPC reach a server whose identity gRPC can't check?

gRPC compares DNS names, and the certificates of SPIRE, of Istio and of most other trust domains have a URI SAN only. So gRPC speaks
plain HTTP/2 to a UNIX socket of this process, and a Relay moves the bytes from there into a TLS connection of our own, which proves the
SPIFFE ID, resumes sessions and reads revocations as every other connection of the mesh. It knows why a connection failed, which gRPC
doesn't tell. ALPN must agree on h2. No HTTP is read here, nothing is retried and no endpoint chosen.

The bytes are moved by an event loop: that of the asyncio channel, or the one of relay_thread.py for blocking callers. Memory is
bounded: each side is read only while the other takes what comes.

Who may use the socket, and what that leaves open: nest.py.

A forked child has relays of its own: what it inherits is replaced by /dev/null, so that the parent's connections don't change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from math import inf
from typing import Any, Final, cast

from meshlib import errors
from meshlib._native import core

from ..connection import split_address
from ..faults import too_slow, unreachable
from . import nest as nests
from .nest import stranger_at

log: Final = logging.getLogger("meshlib.secure")

# Bytes that one read takes at most.
BUFFER: Final = 64 * 1024
# How long the last bytes of an ended connection may take.
FAREWELL: Final = 1.0


# All that are open; strong, since their listening sockets hold them anyway.
_relays: set[Relay] = set()
# In a forked child: what must not be collected, since to close it would touch what it shares with the parent.
_inherited: list[Any] = []


class Relay:
    """The way of one link to its endpoint. State of the Endpoint, per process and event loop.

    `error` is why the last connection failed, None since one succeeded; `not_after` the end of the server's certificate.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, tls: core.TlsClient, identity: str, address: str, connect_timeout: float
    ) -> None:
        self.loop: asyncio.AbstractEventLoop = loop
        for other in tuple(_relays):
            if other.loop.is_closed():
                other.bury()
        self.tls = tls
        self.identity = identity
        self.address = address
        self.connect_timeout = connect_timeout
        self.error: errors.AttemptFailed | None = None
        self.not_after = inf
        self.buffer = memoryview(bytearray(BUFFER))
        self.passages: set[Passage] = set()
        self._server: asyncio.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_closed = False
        self._nest = nests.nest
        self._listener, self.path = self._nest.take()
        _relays.add(self)

    @property
    def target(self) -> str:
        """What gRPC connects to."""
        return f"unix:{self.path}"

    @property
    def is_spent(self) -> bool:
        """The server's certificate is over: as with HTTP/2, what runs goes on, and nothing new is begun."""
        return time.time() >= self.not_after

    def start(self) -> None:
        """Accept; called on the loop. What connects before waits in the socket's queue."""
        if not self._is_closed:
            self._serving = self.loop.create_task(self._serve())

    async def _serve(self) -> None:
        self._server = await self.loop.create_unix_server(lambda: Near(self), sock=self._listener)

    async def close(self) -> None:
        """No new connections; those that gRPC has left already end, and others are cut off."""
        if self._is_closed:
            return
        self._leave()
        if self._serving is not None:
            with suppress(OSError):
                await self._serving
        if self._server is not None:
            self._server.close()
        self._listener.close()
        end = self.loop.time() + FAREWELL
        while self.passages and self.loop.time() < end:
            await asyncio.wait([passage.over for passage in self.passages], timeout=end - self.loop.time())
        for passage in tuple(self.passages):
            passage.cut()
            await asyncio.wait([passage.over], timeout=FAREWELL)

    def close_soon(self) -> None:
        """The same from any thread, without waiting for it."""
        if self._is_closed:
            return  # or its process is another one
        if self.loop.is_closed():
            self.bury()
        else:
            with suppress(RuntimeError):  # closed at this very moment
                self.loop.call_soon_threadsafe(self._close)

    def _close(self) -> None:
        if not self._is_closed:
            self._closing = self.loop.create_task(self.close())

    def bury(self) -> None:
        """Its loop is closed, so that nothing can be said: only the sockets are left."""
        if not self._is_closed:
            self._leave()
        self._listener.close()
        for passage in tuple(self.passages):
            passage.bury()
        self.passages.clear()

    def disown(self) -> None:
        """In a forked child: the sockets are the parent's. They are let go here, and nothing is said to anybody."""
        self._is_closed = True
        plugs = [self._listener, *(plug for passage in self.passages for plug in passage.sockets())]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for plug in plugs:
            if plug.fileno() >= 0:
                # Not closed: the number would be given to another file, which whoever closes this one later would hit.
                os.dup2(null, plug.fileno(), inheritable=False)
        os.close(null)
        _inherited.append(self)

    def _leave(self) -> None:
        self._is_closed = True
        _relays.discard(self)
        self._nest.leave(self.path)


class Passage:
    """One connection of gRPC's and the TLS connection behind it."""

    def __init__(self, relay: Relay, near: asyncio.Transport, tunnel: core.TlsTunnel) -> None:
        self.relay = relay
        self.near: asyncio.Transport | None = near
        self.far: asyncio.Transport | None = None
        self.over: asyncio.Future[None] = relay.loop.create_future()
        self._tunnel = tunnel
        self._waiting: list[bytes] = []  # what gRPC said before the handshake was done
        self._is_open = False
        self._is_over = False
        near.pause_reading()
        relay.passages.add(self)
        self._timer: asyncio.TimerHandle | None = relay.loop.call_later(relay.connect_timeout, self._late)
        self._connecting = relay.loop.create_task(self._connect())

    async def _connect(self) -> None:
        loop, address = self.relay.loop, self.relay.address
        try:
            host, port = split_address(address)
            if port is None:
                await loop.create_unix_connection(lambda: Far(self), host)
            else:
                await loop.create_connection(lambda: Far(self), host, port)
        except OSError as error:
            self.end(unreachable(address, error))
        except ValueError as error:  # no address at all, or a name that can't be one
            self.end(unreachable(address, OSError(str(error))))

    def _late(self) -> None:
        self._timer = None
        self.end(too_slow(self.relay.address))

    # --- gRPC's side

    def said(self, data: bytes) -> None:
        """gRPC has something to send."""
        if not self._is_open:
            self._waiting.append(data)
        elif self.far is not None and not self._is_over:
            self._put(data)

    def _put(self, data: bytes) -> None:
        assert self.far is not None
        try:
            self.far.write(self._tunnel.send(data))
        except errors.AttemptFailed as error:
            self.end(error)

    def near_lost(self) -> None:
        self.near = None
        self.end(is_gentle=True)

    # --- the server's side

    def connected(self, transport: asyncio.Transport) -> None:
        self.far = transport
        if self._is_over:
            transport.abort()
            return
        try:
            transport.write(self._tunnel.open())
        except errors.AttemptFailed as error:
            self.end(error)

    def heard(self, size: int) -> None:
        """So many bytes of the server are in the buffer."""
        far, near = self.far, self.near
        if far is None or self._is_over:
            return
        try:
            plain, out, is_ended = self._tunnel.receive(self.relay.buffer[:size])
        except errors.AttemptFailed as error:
            alert = self._tunnel.pending()
            if alert:
                far.write(alert)
            self.end(error, is_gentle=True)
            return
        if out:
            far.write(out)
        if not self._is_open and not self._tunnel.is_handshaking:
            self._open()
        if plain and near is not None and not near.is_closing():
            if self._timer is not None:
                # Only now it is sure that the server took our certificate, too: with TLS 1.3 it judges last.
                self._timer.cancel()
                self._timer = None
                self.relay.error = None
            near.write(plain)
        if is_ended:
            self.far_ended()

    def _open(self) -> None:
        self._is_open = True
        self.relay.not_after = self._tunnel.peer_not_after or inf
        for data in self._waiting:
            self._put(data)
        self._waiting.clear()
        if self.near is not None and not self.near.is_closing():
            self.near.resume_reading()

    def far_ended(self) -> None:
        """The server sends no more, or is gone: gRPC gets what has come, and then the end."""
        if self._timer is None:
            self.end(is_gentle=True)
            return
        self.end(
            errors.ConnectFailed(
                f"{self.relay.address} closed the connection during the handshake.",
                hint="It may not speak mutual TLS with gRPC there, or it is stopping.",
            )
        )

    def far_lost(self) -> None:
        self.far_ended()
        self.far = None
        self._settle()

    # --- both

    def hold_near(self) -> None:
        """The server takes no more now."""
        if self.near is not None and not self.near.is_closing():
            self.near.pause_reading()

    def free_near(self) -> None:
        if self._is_open and self.near is not None and not self.near.is_closing():
            self.near.resume_reading()

    def hold_far(self) -> None:
        """gRPC takes no more now."""
        if self.far is not None and not self.far.is_closing():
            self.far.pause_reading()

    def free_far(self) -> None:
        if self.far is not None and not self.far.is_closing():
            self.far.resume_reading()

    def end(self, error: errors.AttemptFailed | None = None, *, is_gentle: bool = False) -> None:
        """The one ending. The error is known before gRPC notices that something happened."""
        if self._is_over:
            self._settle()
            return
        self._is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if error is not None:
            # Callers may keep it for long, and its frames would keep this connection.
            self.relay.error = error.with_traceback(None)
            log.debug("no connection for gRPC to %s: %s", self.relay.address, error)
        self._connecting.cancel()
        near, far = self.near, self.far
        if far is not None:
            if is_gentle and not far.is_closing() and not far.get_write_buffer_size():
                farewell = self._tunnel.close()
                if farewell:
                    far.write(farewell)
                far.close()
            else:
                far.abort()
        if near is not None:
            if is_gentle:
                near.close()
            else:
                near.abort()
        self._settle()

    def cut(self) -> None:
        """At once, whatever is still to be said."""
        self.end()
        for transport in (self.near, self.far):
            if transport is not None:
                transport.abort()

    def _settle(self) -> None:
        if self.near is None and self.far is None and self._is_over:
            self.relay.passages.discard(self)
            if not self.over.done():
                self.over.set_result(None)

    def sockets(self) -> list[Any]:
        plugs = [transport.get_extra_info("socket") for transport in (self.near, self.far) if transport is not None]
        return [plug for plug in plugs if plug is not None]

    def bury(self) -> None:
        for transport in (self.near, self.far):
            # asyncio's own last step, which its loop will never take.
            release = getattr(transport, "_call_connection_lost", None)
            if release is not None:
                release(None)


class Near(asyncio.Protocol):
    """gRPC's end."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._passage: Passage | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        near = cast("asyncio.Transport", transport)
        stranger = stranger_at(near.get_extra_info("socket"))
        if stranger:
            log.warning(
                "%s connected to the socket over which this process calls %s by gRPC, and was shut out: it is for this process alone",
                stranger,
                self._relay.address,
            )
            near.abort()
            return
        relay = self._relay
        try:
            tunnel = core.TlsTunnel(relay.tls, relay.identity, relay.address)
        except errors.AttemptFailed as error:
            relay.error = error
            near.abort()
            return
        self._passage = Passage(relay, near, tunnel)

    def data_received(self, data: bytes) -> None:
        if self._passage is not None:
            self._passage.said(data)

    def pause_writing(self) -> None:
        if self._passage is not None:
            self._passage.hold_far()

    def resume_writing(self) -> None:
        if self._passage is not None:
            self._passage.free_far()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._passage is not None:
            self._passage.near_lost()


class Far(asyncio.BufferedProtocol):
    """The server's end. Its buffer is used up before it returns, so that all of a relay share one."""

    def __init__(self, passage: Passage) -> None:
        self._passage = passage

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._passage.connected(cast("asyncio.Transport", transport))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._passage.relay.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._passage.heard(nbytes)

    def eof_received(self) -> bool:
        self._passage.far_ended()
        return False

    def pause_writing(self) -> None:
        self._passage.hold_near()

    def resume_writing(self) -> None:
        self._passage.free_near()

    def connection_lost(self, exc: Exception | None) -> None:
        self._passage.far_lost()


def _after_fork() -> None:
    inherited = tuple(_relays)
    _relays.clear()
    for relay in inherited:
        relay.disown()


os.register_at_fork(after_in_child=_after_fork)
