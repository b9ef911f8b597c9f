"""What do the tests of the HTTP/2 driver stand on? A scripted server, a carrier that does the least, and the way to a connection.

The server is the Python package `h2` over asyncio. It answers nothing by itself: a test takes what came and says what goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from meshlib._native import core
from meshlib.client.http2 import Http2Connection
from meshlib.client.way import Attempt

NEVER = float("inf")


class Carrier:
    """As `loop.LoopCarrier`, with a timer for each connection."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(64 * 1024))
        self.retired: list[Any] = []
        self.forgotten: list[Any] = []

    def watch(self, connection: Any, end: float) -> None:
        connection.end = end
        if connection.timer is not None:
            connection.timer.cancel()
        connection.timer = self.loop.call_at(end, self._due, connection)

    def _due(self, connection: Any) -> None:
        connection.timer = None
        connection.expire()
        if connection.end < NEVER:
            self.watch(connection, connection.end)

    def retire(self, connection: Any) -> None:
        self.retired.append(connection)

    def forget(self, connection: Any) -> None:
        if connection not in self.forgotten:
            self.forgotten.append(connection)


class Opener(asyncio.BufferedProtocol):
    """Does the handshake, and hands the transport over."""

    def __init__(self, carrier: Carrier, wire: core.HttpConnection, key: tuple[str, str], tls: core.TlsClient | None) -> None:
        self.carrier, self.wire, self.key, self.tls = carrier, wire, key, tls
        self.opened: asyncio.Future[Http2Connection] = carrier.loop.create_future()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(self.wire.open())

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.carrier.buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            out, events = self.wire.receive(self.carrier.buffer, nbytes)
        except Exception as error:
            self.opened.set_exception(error)
            self.transport.abort()
            return
        self.transport.write(out)
        if (core.EVENT_OPEN,) in events:
            connection = Http2Connection(self.carrier, self.key, self.tls, self.wire)
            connection.adopt(self.transport)
            self.opened.set_result(connection)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(exc or ConnectionError("closed"))


async def connect(port: int, tls: core.TlsClient | None = None, identity: str = "", protocols: str = "h2") -> Http2Connection:
    carrier = Carrier()
    address = f"127.0.0.1:{port}"
    wire = core.HttpConnection(tls, identity, address, protocols)
    opener = Opener(carrier, wire, (address, identity), tls)
    await carrier.loop.create_connection(lambda: opener, "127.0.0.1", port)
    return await opener.opened


def attempt(
    method: str = "GET",
    target: str = "/",
    body: Any = None,
    seconds: float = 20.0,
    headers: list[tuple[bytes, bytes]] | None = None,
    **more: Any,
) -> Attempt:
    end = asyncio.get_running_loop().time() + seconds
    return Attempt("peer:1", "", None, method, target, [(b"host", b"peer"), *(headers or [])], body, end, end, **more)


async def whole(reply: Any) -> bytes:
    body = reply[4]
    if isinstance(body, bytes):
        return body
    pieces = []
    while piece := await body.read():
        pieces.append(piece)
    return b"".join(pieces)


class Peer:
    """One accepted connection, and what it heard."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, settings: dict[Any, int]) -> None:
        config = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=settings)
        self.reader, self.writer = reader, writer
        self.heard: asyncio.Queue[Any] = asyncio.Queue()
        self.is_reading_on = True

    async def listen(self) -> None:
        self.h2.initiate_connection()
        self.flush()
        # After its own GOAWAY the package takes no frame any more, not even the client's last ones.
        with contextlib.suppress(ConnectionError, h2.exceptions.ProtocolError):
            while data := await self.reader.read(65536):
                for event in self.h2.receive_data(data):
                    if isinstance(event, h2.events.DataReceived) and self.is_reading_on:
                        self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    self.heard.put_nowait(event)
                self.flush()
        self.heard.put_nowait(None)

    def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())

    async def hear(self, kind: type[Any]) -> Any:
        """The next event of a kind."""
        while not isinstance(event := await self.heard.get(), kind):
            assert event is not None, f"the client went without {kind.__name__}"
        return event

    async def asked(self) -> int:
        return int((await self.hear(h2.events.RequestReceived)).stream_id)

    def head(self, stream: int, *headers: tuple[str, str], status: int = 200, is_last: bool = False) -> None:
        self.h2.send_headers(stream, [(":status", str(status)), *headers], end_stream=is_last)
        self.flush()

    def body(self, stream: int, data: bytes, *, is_last: bool = False) -> None:
        self.h2.send_data(stream, data, end_stream=is_last)
        self.flush()

    def answer(self, stream: int, data: bytes = b"ok") -> None:
        self.head(stream)
        self.body(stream, data, is_last=True)

    def reset(self, stream: int, code: int) -> None:
        self.h2.reset_stream(stream, code)
        self.flush()


@contextlib.asynccontextmanager
async def scripted(settings: dict[Any, int] | None = None) -> AsyncIterator[tuple[Http2Connection, Peer]]:
    """A connection and its peer."""
    arrived: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, settings or {})
        arrived.set_result(peer)
        await peer.listen()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        connection = await connect(server.sockets[0].getsockname()[1])
        peer = await arrived
        try:
            yield connection, peer
        finally:
            connection.abort()
            peer.writer.transport.abort()
            while await peer.heard.get() is not None:
                pass
    finally:
        server.close()


def run(test: Callable[[], Awaitable[None]], kind: str) -> None:
    """A test on one kind of loop, with nothing left on it afterwards."""

    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()
        await asyncio.sleep(0)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert left == []

    if kind == "uvloop":
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(bounded())
    else:
        asyncio.run(bounded())
