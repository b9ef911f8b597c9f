"""How does uvicorn get mutual TLS, and the application the peer?

`MeshHTTP` stands before uvicorn's own protocol (h11 or httptools): it looks at the first byte of a connection and then is gone. A
plain connection is handed to uvicorn as it is, and costs nothing from then on. A TLS connection gets a `TlsTransport`: towards
the event loop a protocol that feeds records to the wire crate, towards uvicorn a transport that takes plain text. Python's ssl is
not used: TLS of the wire crate is cheaper, knows SPIFFE, and takes the newest identity for every connection.

Public ways only: `MeshHTTP` is what uvicorn's `http=` takes (`uvicorn --http meshlib.server.uvicorn:MeshHTTP app:app`, without any
`--ssl-…`), and each connection's protocol gets a copy of the configuration whose `loaded_app` is the application with the connection's
`Line`: what is known of it, and of its peer, is found out once; by that way it reaches WebSocket protocols too. What is written is held
until the loop's next round, so that head and body of a response become one record and one system call.

Whether the peer's proof still holds is asked before each request, of HTTP and of the first of a WebSocket, and for each piece of a
WebSocket: what has ended is answered 401. And a `_Watch` per event loop closes the connections on which nobody asks.

It does not parse HTTP. The handshake has a time limit here, the heads of requests have theirs in `head.py`.
"""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Awaitable
from functools import partial
from typing import Any

from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import ServerState

from .._native import core
from ..errors import MeshError
from . import door as doors
from .asgi import MeshASGI
from .door import PATIENCE, PEER, SNI, Door, Proof, Standing, refusal_of
from .head import bounded, heard
from .line import LINE, Line
from .way import problem

# Bytes read at once. One buffer per loop: what was read is consumed before the next read.
READ = 256 * 1024
# Seconds between two looks at whether the identity has changed, while there are connections.
LOOK = 0.5
# Seconds that a connection has to take what was written, when it ends because its peer's proof was withdrawn.
LAST_WORDS = 2.0
# Plain text that is not held back for the loop's next round any more.
HOLD = 64 * 1024

_buffers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, memoryview] = weakref.WeakKeyDictionary()


class MeshHTTP(asyncio.Protocol):
    """The protocol that uvicorn makes for a new connection. Its door is the one of `behind`, else that of the process's latest mesh."""

    door: Door | None = None
    http: Any = AutoHTTPProtocol

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        self._door = self.door or doors.latest()
        self._config = config
        self._state = server_state
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Our own, as the socket says it, and whether it is the public listener's.
        self._port = 0
        self._is_public = False

    @classmethod
    def behind(cls, door: Door, http: Any = None) -> type[MeshHTTP]:
        """The same protocol for one door, and before an HTTP protocol of choice."""
        return type(cls.__name__, (cls,), {"door": door, "http": http or cls.http})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._port = _port_of(transport)
        self._is_public = self._door.is_public(self._port)
        if self._door.takes_only_plain(is_public=self._is_public):
            self._step_aside(b"")
            return
        # uvicorn tells these of the end of the server.
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._timer = self._loop.call_later(PATIENCE, transport.abort)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._door.admits_plain(data[0], is_public=self._is_public or self._door.is_agents(self._port)):
            self._step_aside(data)
            return
        try:
            tls = self._door.open(data[0], is_public=self._is_public)
        except MeshError as error:
            self._door.fail(error)
            transport.abort()
            return
        if tls is None:
            transport.write(refusal_of(data[0]))
            transport.close()
            return
        self._state.connections.discard(self)
        TlsTransport(self, self._door, tls, transport, self._loop, self._state, self._timer).begin(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()

    def shutdown(self) -> None:
        """The server ends, and nothing has been asked on this connection."""
        if self._transport is not None:
            self._transport.close()

    def line(self, extension: dict[str, Any] | None = None, judge: Proof | None = None) -> Line:
        """What is known of this connection; with TLS, from its extension."""
        address, is_public = _address_of(self._transport), self._is_public
        if extension is None:
            return Line(address=address, port=self._port, is_public=is_public, is_ours=True)
        return Line(
            extension[PEER], address, self._port, extension[SNI], extension, is_public=is_public, judge=judge, is_ours=True
        )

    @property
    def is_public(self) -> bool:
        return self._is_public

    def protocol(self, line: Line) -> Any:
        """uvicorn's own protocol, before an application that knows on which line it is called."""
        config = Config.__new__(Config)
        config.__dict__.update(self._config.__dict__)
        # A request that comes while another is answered is begun in the context of that one's handler, and must not see it.
        config.reset_contextvars = True
        config.ws_protocol_class = heard(config.ws_protocol_class)  # type: ignore[arg-type]
        config.line = line  # type: ignore[attr-defined]
        app = config.loaded_app
        if isinstance(app, ProxyHeadersMiddleware) and self._door.mode != "observe":
            # uvicorn's command puts it there, unless it is told not to: scheme and address are the connection's, and who is believed
            # about others stands in mesh.yaml (`secure.proxies`). In mode observe everything goes on as it did.
            app = config.loaded_app = app.app
        # As a rule the mesh is what uvicorn calls. Where something stands around it, it finds the line in the scope.
        config.loaded_app = partial(app.serve, line) if isinstance(app, MeshASGI) else _Stamped(app, line)
        made = bounded(self.http)(config=config, server_state=self._state, app_state=self._app_state, _loop=self._loop)
        made.line = line
        return made

    def _step_aside(self, data: bytes) -> None:
        """Plain text: from here on it is uvicorn's connection alone."""
        transport = self._transport
        assert transport is not None
        self._leave()
        self._door.plain += 1
        inner = self.protocol(self.line())
        inner.connection_made(transport)
        transport.set_protocol(inner)
        if data:
            inner.data_received(data)

    def _leave(self) -> None:
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class TlsTransport(asyncio.Transport, asyncio.BufferedProtocol):
    """One TLS connection: the event loop's protocol below, the HTTP protocol's transport above."""

    def __init__(
        self,
        front: MeshHTTP,
        door: Door,
        tls: core.TlsConnection,
        below: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        state: ServerState,
        timer: asyncio.TimerHandle | None,
    ) -> None:
        super().__init__()
        self._front: MeshHTTP | None = front
        self._door = door
        self._tls = tls
        self._below = below
        self._loop = loop
        self._state = state
        self._timer = timer
        self._above: Any = None
        self._proof = Proof(door, tls)
        self._held: list[bytes] = []
        self._held_size = 0
        # Records that are sealed and go out before the next.
        self._owed = b""
        self._is_closing = False
        # Something else than HTTP by now: no request of it is judged, so each piece is.
        self._is_upgraded = False
        # What is called later runs in the connection's context, not in that of the request that happened to write.
        self._context = contextvars.copy_context()
        buffer = _buffers.get(loop)
        if buffer is None:
            buffer = _buffers[loop] = memoryview(bytearray(READ))
        self._buffer = buffer

    # --- below: the event loop

    def begin(self, data: bytes) -> None:
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._below.set_protocol(self)
        self._take(data)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._take(self._buffer[:nbytes])

    def _take(self, data: bytes | memoryview) -> None:
        tls = self._tls
        try:
            plain, out, is_over = tls.receive(data)
        except MeshError as error:
            self._break(error)
            return
        if out:
            if self._above is None and not tls.is_handshaking and tls.tls_version == "TLSv1.3":
                # Tickets for later, which nobody waits for: they go out with the first answer.
                self._owed = out
            else:
                self._below.write(out)
        if self._above is None:
            if tls.is_handshaking or self._is_closing:
                if is_over:
                    self._below.close()
                return
            self._settle()
        if self._is_closing:
            return
        if plain:
            if self._is_upgraded and self._proof() is Standing.OVER:
                self.withdraw()
                return
            self._above.data_received(plain)
        if is_over:
            self.eof_received()
            self.close()

    def _settle(self) -> None:
        """The handshake is done: the application may be asked now, and it may know by whom."""
        self._state.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            _, extension = self._door.welcome(self._tls, _address_of(self._below))
            is_public = self._front is not None and self._front.is_public
        except MeshError as error:
            self._break(error)
            return
        self._proof = Proof(self._door, self._tls, is_public=is_public)
        if self._proof() is Standing.OVER:
            # Withdrawn while the handshake was under way.
            self.withdraw()
            return
        assert self._front is not None
        self._above = self._front.protocol(self._front.line(extension, self._proof))
        self._front = None
        _watch_of(self._loop).add(self)
        self._above.connection_made(self)
        left = self._door.seconds_left(self._tls)
        if left is not None:
            self._timer = self._loop.call_later(left, self._retire, context=self._context)

    def _retire(self) -> None:
        """The proof has ended: the response in flight says `Connection: close`, and an idle connection closes now."""
        if self._above is not None and not self._is_closing:
            self._above.shutdown()

    @property
    def door(self) -> Door:
        return self._door

    @property
    def tls(self) -> core.TlsConnection:
        return self._tls

    def look(self) -> None:
        """The identity has changed: a connection whose peer would not be let in any more ends, whatever it is doing."""
        if not self._is_closing and self._proof() is Standing.OVER:
            self.withdraw()

    def withdraw(self) -> None:
        """What the peer had proved was withdrawn: nothing is read any more, and no answer is finished."""
        self.close()
        self._loop.call_later(LAST_WORDS, self._below.abort)

    def shutdown(self) -> None:
        """The server ends, in the middle of the handshake."""
        self.abort()

    def _break(self, error: MeshError) -> None:
        # The alert that tells the other side why.
        alert = self._owed + self._tls.pending()
        if alert:
            self._owed = b""
            self._below.write(alert)
        if self._above is None:
            self._door.fail(error)
        self._is_closing = True
        self._below.close()

    def eof_received(self) -> None:
        if self._above is not None:
            self._above.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing = True
        self._held.clear()
        self._state.connections.discard(self)
        _watch_of(self._loop).discard(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        above, self._above, self._front = self._above, None, None
        if above is not None:
            above.connection_lost(exc)

    def pause_writing(self) -> None:
        if self._above is not None:
            self._above.pause_writing()

    def resume_writing(self) -> None:
        if self._above is not None:
            self._above.resume_writing()

    # --- above: the HTTP protocol

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closing or not data:
            return
        if type(data) is not bytes:
            data = bytes(data)
        held = self._held
        held.append(data)
        self._held_size += len(data)
        if self._held_size > HOLD:
            self._flush()
        elif len(held) == 1:
            self._loop.call_soon(self._flush, context=self._context)

    def writelines(self, list_of_data: Any) -> None:
        for data in list_of_data:
            self.write(data)

    def _flush(self) -> None:
        out = self._sealed()
        if out:
            self._below.write(out)

    def _sealed(self) -> bytes:
        """What was held, as records."""
        held = self._held
        if not held:
            return b""
        data = held[0] if len(held) == 1 else b"".join(held)
        held.clear()
        self._held_size = 0
        try:
            out: bytes = self._tls.send(data)
        except MeshError as error:
            self._break(error)
            return b""
        if self._owed:
            out, self._owed = self._owed + out, b""
        return out

    def close(self) -> None:
        if self._is_closing:
            return
        out = self._sealed()
        if self._is_closing:
            return
        self._is_closing = True
        # One piece: the last answer and the goodbye.
        self._below.write(out + self._owed + self._tls.close())
        self._owed = b""
        self._below.close()

    def abort(self) -> None:
        self._is_closing = True
        self._held.clear()
        self._below.abort()

    def is_closing(self) -> bool:
        return self._is_closing or self._below.is_closing()

    def pause_reading(self) -> None:
        self._below.pause_reading()

    def resume_reading(self) -> None:
        self._below.resume_reading()

    def is_reading(self) -> bool:
        return self._below.is_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._above = protocol
        self._is_upgraded = True

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self._above
        return protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        # Servers ask for the context to know whether this is https.
        return self._tls if name == "sslcontext" else self._below.get_extra_info(name, default)

    def can_write_eof(self) -> bool:
        return False

    def write_eof(self) -> None:
        raise NotImplementedError("TLS has no half-closed connections here")

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._below.set_write_buffer_limits(high, low)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._below.get_write_buffer_limits()

    def get_write_buffer_size(self) -> int:
        return self._below.get_write_buffer_size() + self._held_size


class _Stamped:
    """An application that is not the mesh's own, as one connection's protocol sees it: with the line and the TLS extension in every scope.

    The mesh may stand further inside, and finds the line there; or nowhere, and then the extension is what the application has.
    """

    __slots__ = ("_app", "_line")

    def __init__(self, app: Any, line: Line) -> None:
        self._app = app
        self._line = line

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        line = self._line
        scope[LINE] = line
        if line.judge is not None:
            standing = line.judge()
            if standing is Standing.OVER:
                return _refuse(scope, receive, send)
            extensions = scope.get("extensions")
            scope["extensions"] = {**extensions, "tls": line.extension} if extensions else {"tls": line.extension}
            if standing is Standing.LAST and scope["type"] == "http":
                send = _Closing(send)
        done: Awaitable[None] = self._app(scope, receive, send)
        return done


def _port_of(transport: asyncio.BaseTransport) -> int:
    """Our own; 0 where there is none, such as at a UNIX socket."""
    name = transport.get_extra_info("sockname")
    return int(name[1]) if isinstance(name, tuple) else 0


def _address_of(transport: asyncio.Transport | None) -> str:
    """Of the other end; "" where there is none, such as at a UNIX socket."""
    name = transport.get_extra_info("peername") if transport is not None else None
    return str(name[0]) if isinstance(name, tuple) else ""


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """Who asks has proved who they are, and it does not hold any more: with a new handshake they may try again."""
    body, headers = problem(401, "secure.proof_ended")
    headers = [*headers, (b"connection", b"close")]
    kind = "http.response"
    if scope["type"] == "websocket":
        await receive()
        if "websocket.http.response" not in (scope.get("extensions") or ()):
            await send({"type": "websocket.close", "code": 1008, "reason": "secure.proof_ended"})
            return
        kind = "websocket.http.response"
    await send({"type": f"{kind}.start", "status": 401, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})


class _Watch:
    """The open TLS connections of one event loop, and whether the identity is still the one that they were judged by."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._open: set[TlsTransport] = set()
        self._seen: weakref.WeakKeyDictionary[Door, tuple[object, object]] = weakref.WeakKeyDictionary()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, transport: TlsTransport) -> None:
        # Each has just been judged by what is in force; of the first, the next look finds out whether that has changed.
        if transport.door not in self._seen:
            self._seen[transport.door] = transport.door.force
        self._open.add(transport)
        self._arm()

    def discard(self, transport: TlsTransport) -> None:
        self._open.discard(transport)

    def _arm(self) -> None:
        loop = self._loop()
        if self._timer is None and loop is not None and self._open:
            # In no request's context.
            self._timer = loop.call_later(LOOK, self._look, context=contextvars.Context())

    def _look(self) -> None:
        self._timer = None
        changed = set()
        for door in {transport.door for transport in self._open}:
            force = door.force
            if force != self._seen.get(door):
                self._seen[door] = force
                changed.add(door)
        if changed:
            for transport in [each for each in self._open if each.door in changed]:
                transport.look()
        self._arm()


_watches: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = weakref.WeakKeyDictionary()


def _watch_of(loop: asyncio.AbstractEventLoop) -> _Watch:
    watch = _watches.get(loop)
    if watch is None:
        watch = _watches[loop] = _Watch(loop)
    return watch


class _Closing:
    """The last answer on a connection says so; uvicorn's protocols close after it."""

    __slots__ = ("_send",)

    def __init__(self, send: Any) -> None:
        self._send = send

    def __call__(self, message: Any) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        done: Awaitable[None] = self._send(message)
        return done
