"""What do the tests of the agent's data path share? A proxy, its data socket with callers, and an application behind a listener."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
import uvicorn

from meshlib._native import core
from tests.wire.peers import Authority, Issued

CALLER = "spiffe://td/caller"
ORDERS = "spiffe://td/orders"
SECRET = "ab" * 32
# Names of sockets; several threads may make one.
NUMBERS = itertools.count()


class World:
    """One proxy with identities for a caller and a service, whose application is behind a listener. Everything ends with `close`."""

    def __init__(self, folder: Path, workers: int = 1) -> None:
        self.folder = folder
        self.root = Authority()
        self.proxy = core.Proxy(workers)
        self.open = contextlib.ExitStack()
        self.issued: dict[str, Issued] = {}
        for spiffe_id in (CALLER, ORDERS):
            self.identify(spiffe_id)

    def identify(self, spiffe_id: str, **more: Any) -> Issued:
        issued = self.root.issue(spiffe_id, **more)
        self.issued[spiffe_id] = issued
        self.proxy.identify(spiffe_id, issued.chain, issued.key, {"td": self.root.pem}, {}, SECRET)
        return issued

    def listen(self, to: str | Path, mode: str = "enforce", name: str = "orders", spiffe_id: str = ORDERS) -> int:
        """A listener of the proxy, and its port."""
        with socket.create_server(("127.0.0.1", 0)) as plug:
            self.proxy.listen(name, plug.fileno(), spiffe_id, str(to), mode)
            port: int = plug.getsockname()[1]
            return port

    def caller(self, spiffe_id: str = CALLER) -> socket.socket:
        """Our end of an adopted connection to the data socket."""
        ours, theirs = socket.socketpair()
        self.proxy.adopt(theirs.detach(), spiffe_id)
        self.open.callback(ours.close)
        ours.settimeout(10)
        return ours

    def data_socket(self, spiffe_id: str = CALLER) -> str:
        """A UNIX socket on which every connection is adopted."""
        path = self.folder / f"data-{next(NUMBERS)}.sock"
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen(64)

        def accept() -> None:
            with contextlib.suppress(OSError, RuntimeError):
                while True:
                    plug, _ = server.accept()
                    self.proxy.adopt(plug.detach(), spiffe_id)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()

        def end() -> None:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
            thread.join(5)

        self.open.callback(end)
        return str(path)

    def client(self, *, http2: bool = False, spiffe_id: str = CALLER) -> httpx.Client:
        """A caller of the data socket that speaks HTTP/1.1 or HTTP/2."""
        transport = httpx.HTTPTransport(uds=self.data_socket(spiffe_id), http1=not http2, http2=http2)
        return self.open.enter_context(httpx.Client(transport=transport, base_url="http://orders", timeout=10))

    def application(self, app: Any) -> Path:
        """An ASGI application behind a UNIX socket."""
        return self.open.enter_context(served(app, self.folder / f"app-{next(NUMBERS)}.sock"))

    def close(self) -> None:
        self.open.close()
        self.proxy.stop(0.5)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Imported by the modules that use it: the folder's other tests have worlds of their own."""
    made = World(tmp_path)
    yield made
    made.close()


def asking(port: int, *, expect: str = ORDERS, protocol: str = "http1", connect: int = 2000) -> dict[str, str]:
    """The fields by which a request names its endpoint."""
    return {
        "x-mesh-endpoint": f"127.0.0.1:{port}",
        "x-mesh-expect": expect,
        "x-mesh-protocol": protocol,
        "x-mesh-connect": str(connect),
    }


@contextlib.contextmanager
def served(app: Any, path: Path) -> Iterator[Path]:
    """A uvicorn in a thread, on a UNIX socket."""
    config = uvicorn.Config(app, uds=str(path), log_level="warning", lifespan="off", interface="asgi3", ws="websockets-sansio")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield path
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(10)


async def echo(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Answers with what came: path, fields and body."""
    assert scope["type"] == "http"
    body = b""
    while True:
        event = await receive()
        body += event.get("body", b"")
        if not event.get("more_body"):
            break
    fields = [(b"x-came-" + name, value) for name, value in scope["headers"] if name != b"content-length"]
    target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
    headers = [
        (b"x-target", target),
        (b"x-method", scope["method"].encode()),
        (b"content-length", str(len(body)).encode()),
        *fields,
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def until(is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for something that another thread brings about."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.01)


def facts(text: str) -> dict[str, str]:
    """What an application was told by `x-mesh-handed`."""
    return dict(part.split("=", 1) for part in text.split(";"))


def read_all(plug: socket.socket, seconds: float = 15.0) -> bytes:
    """What comes until the other side closes."""
    plug.settimeout(seconds)
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := plug.recv(65536):
            data += piece
    return data


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket], object]) -> Iterator[int]:
    """A plain endpoint that does with each connection what the script says; its port."""
    server = socket.create_server(("127.0.0.1", 0))

    def one(plug: socket.socket) -> None:
        with plug, contextlib.suppress(OSError):
            plug.settimeout(10)
            script(plug)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                plug, _ = server.accept()
                threading.Thread(target=one, args=(plug,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join(5)


def heard(plug: socket.socket) -> Iterator[tuple[h2.connection.H2Connection, h2.events.Event]]:
    """What a scripted endpoint of HTTP/2 hears, one after the other. What it says meanwhile goes out before the next is awaited."""
    peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf8"))
    peer.initiate_connection()
    while True:
        plug.sendall(peer.data_to_send())
        data = plug.recv(65536)
        if not data:
            return
        for event in peer.receive_data(data):
            yield peer, event


def head_of(plug: socket.socket) -> bytes:
    """A request's head, as it comes."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = plug.recv(65536)
        if not piece:
            break
        data += piece
    return data


class Caller2:
    """An HTTP/2 caller by hand, which can do what a library wouldn't."""

    def __init__(self, plug: Any) -> None:
        self.plug = plug
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.peer = h2.connection.H2Connection(config)
        self.peer.initiate_connection()
        self.events: list[h2.events.Event] = []
        self.flush()

    def flush(self) -> None:
        self.plug.sendall(self.peer.data_to_send())

    def ask(self, fields: dict[str, str], *, method: str = "GET", target: str = "/", is_end: bool = True) -> int:
        stream: int = self.peer.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":authority", "orders"), (":path", target)]
        self.peer.send_headers(stream, [*pseudo, *fields.items()], end_stream=is_end)
        self.flush()
        return stream

    def wait(self, kind: type[h2.events.Event], seconds: float = 10.0) -> Any:
        """The next event of a kind; None where the connection ended first."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            self.plug.settimeout(max(0.01, end - time.monotonic()))
            try:
                data = self.plug.recv(65536)
            except OSError:
                return None
            if not data:
                return None
            self.events += self.peer.receive_data(data)
            with contextlib.suppress(OSError):
                self.flush()
        return None
