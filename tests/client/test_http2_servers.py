"""Does our HTTP/2 work with servers that others wrote? hypercorn, nginx and Envoy, by ALPN over mutual TLS and by prior knowledge."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from meshlib import errors
from meshlib._native import core
from tests.client.http2_peer import attempt, connect, run, whole
from tests.support import PYTHON, free_port, identities, process, wait_until_listening
from tests.wire.envoy import envoy, listener, stat, tls

ID = "spiffe://shop.internal/ns/default/sa/"
APP = """
import asyncio

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    path = scope["path"]
    size = 0
    if path == "/never":
        await asyncio.Event().wait()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    headers = [(b"x-http", scope["http_version"].encode()), (b"x-size", b"%d" % size)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    pieces = 64 if path == "/large" else 1
    for n in range(pieces):
        body = bytes([n]) * 65536 if path == "/large" else b"ok"
        await send({"type": "http.response.body", "body": body, "more_body": n + 1 < pieces})
"""


@dataclass(frozen=True)
class Server:
    """Where it listens, with TLS (h2 and http/1.1 by ALPN) and without, and who we are there."""

    tls_port: int
    plain_port: int
    tls: core.TlsClient
    # Where a connection ends after three requests, without TLS.
    short_port: int = 0


def client_of(folder: Path) -> core.TlsClient:
    own = folder / "identities" / "me"
    bundles = {"shop.internal": (own / "bundle.pem").read_bytes()}
    return core.TlsClient((own / "svid.pem").read_bytes(), (own / "key.pem").read_bytes(), bundles, 1)


@pytest.fixture(scope="module")
def hypercorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("hypercorn")
    identities(folder, "me", "orders")
    own = folder / "identities" / "orders"
    (folder / "service.py").write_text(APP)
    secure, plain = free_port(), free_port()
    command = [PYTHON, "-m", "hypercorn", "service:app", "--bind", f"127.0.0.1:{secure}", "--insecure-bind", f"127.0.0.1:{plain}"]
    command += ["--certfile", str(own / "svid.pem"), "--keyfile", str(own / "key.pem")]
    command += ["--ca-certs", str(own / "bundle.pem"), "--verify-mode", "CERT_REQUIRED"]
    with process(*command, cwd=folder) as child:
        wait_until_listening(secure, child)
        wait_until_listening(plain, child)
        yield Server(secure, plain, client_of(folder))


NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr error; worker_processes 1;
events {{ worker_connections 128; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; client_max_body_size 0;
    fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
    keepalive_requests 1000;
    server {{
        listen 127.0.0.1:{secure} ssl http2; listen 127.0.0.1:{plain} http2;
        ssl_certificate {own}/svid.pem; ssl_certificate_key {own}/key.pem;
        ssl_client_certificate {own}/bundle.pem; ssl_verify_client optional; http2_max_concurrent_streams 16;
        location / {{ add_header x-http $server_protocol; add_header x-size $content_length; return 200 ok; }}
        location /large {{ root {folder}; }}
    }}
    server {{
        listen 127.0.0.1:{short} http2; keepalive_requests 3;
        location / {{ return 200 $connection_requests; }}
    }}
}}
"""


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    program = shutil.which("nginx") or pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("nginx")
    identities(folder, "me", "orders")
    (folder / "large").write_bytes(b"".join(bytes([n]) * 65536 for n in range(64)))
    secure, plain, short = free_port(), free_port(), free_port()
    file = folder / "nginx.conf"
    own = folder / "identities" / "orders"
    file.write_text(NGINX.format(folder=folder, secure=secure, plain=plain, short=short, own=own))
    with process(program, "-p", str(folder), "-c", str(file), "-e", "stderr") as child:
        wait_until_listening(plain, child)
        yield Server(secure, plain, client_of(folder), short)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("envoy")
    identities(folder, "me", "orders")
    secure, plain = free_port(), free_port()
    answer = {
        "direct_response": {"status": 200, "body": {"inline_string": "ok"}},
        "response_headers_to_add": [{"header": {"key": "x-http", "value": "%PROTOCOL%"}}],
    }
    transport = tls(folder / "identities", "orders", ID + "me", is_server=True)
    transport["typed_config"]["common_tls_context"]["alpn_protocols"] = ["h2", "http/1.1"]
    with envoy(folder, [listener(secure, answer, transport), listener(plain, answer)], []) as admin:
        yield Server(secure, plain, client_of(folder))
        assert stat(admin, "downstream_cx_protocol_error") == 0


@pytest.fixture(params=["hypercorn", "nginx", "proxy"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["asyncio", "uvloop"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextlib.asynccontextmanager
async def connected(server: Server, *, is_plain: bool = False, protocols: str = "h2,http/1.1") -> AsyncIterator[Any]:
    if is_plain:
        connection = await connect(server.plain_port, protocols="h2")
    else:
        connection = await connect(server.tls_port, server.tls, ID + "orders", protocols)
    try:
        yield connection
    finally:
        connection.abort()


@pytest.mark.parametrize("is_plain", [False, True], ids=["mtls", "plain"])
def test_many_calls_share_a_connection(server: Server, kind: str, is_plain: bool) -> None:
    """As many at once as the server wants, in one connection, and all come back."""

    async def story() -> None:
        async with connected(server, is_plain=is_plain) as connection:
            assert (connection.wire.protocol, connection.wire.peer) == ("h2", None if is_plain else ID + "orders")
            seen = 0

            async def caller() -> None:
                nonlocal seen
                for _ in range(20):
                    while not connection.is_usable():
                        await asyncio.sleep(0.001)
                    reply = await connection.exchange(attempt(headers=[(b"x-a", b"1"), (b"cookie", b"a=b")]))
                    assert (reply[0], reply[1], await whole(reply)) == (200, 20, b"ok")
                    assert dict(reply[3])[b"x-http"] in (b"2", b"HTTP/2.0", b"HTTP/2")
                    seen += 1

            await asyncio.gather(*(caller() for _ in range(24)))
            assert (seen, connection.exchanges, connection.is_usable()) == (480, 0, True)

    run(story, kind)


@pytest.mark.parametrize("is_plain", [False, True], ids=["mtls", "plain"])
def test_large_answer_comes_whole(hypercorn: Server, nginx: Server, kind: str, is_plain: bool) -> None:
    """Sixteen windows of it, each given back as it is read."""
    expected = b"".join(bytes([n]) * 65536 for n in range(64))

    async def story() -> None:
        for server in (hypercorn, nginx):
            async with connected(server, is_plain=is_plain) as connection:
                for _ in range(2):
                    reply = await connection.exchange(attempt(target="/large"))
                    assert await whole(reply) == expected

    run(story, kind)


@pytest.mark.parametrize("is_plain", [False, True], ids=["mtls", "plain"])
def test_large_upload_is_counted_whole(hypercorn: Server, kind: str, is_plain: bool) -> None:
    """Streamed or in one piece, through whatever window the server gives."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield bytes(50_000)

    async def story() -> None:
        async with connected(hypercorn, is_plain=is_plain) as connection:
            for body in (pieces(), bytes(2_000_000), bytes(900_000)):
                reply = await connection.exchange(attempt("POST", body=body))
                size = 900_000 if isinstance(body, bytes) and len(body) < 1_000_000 else 2_000_000
                assert dict(reply[3])[b"x-size"] == b"%d" % size
                assert await whole(reply) == b"ok"

    run(story, kind)


def test_call_given_up_leaves_the_connection_to_others(hypercorn: Server, kind: str) -> None:
    """A late call and an unread body end with their streams."""

    async def story() -> None:
        async with connected(hypercorn) as connection:
            with pytest.raises(errors.AttemptTimeout):
                await connection.exchange(attempt(target="/never", seconds=0.1))
            unread = await connection.exchange(attempt(target="/large"))
            await unread[4].read()
            await unread[4].close()
            reply = await connection.exchange(attempt())
            assert (await whole(reply), connection.exchanges) == (b"ok", 0)

    run(story, kind)


def test_head_and_methods_of_their_own(server: Server, kind: str) -> None:
    """An answer to HEAD has a length and no body."""

    async def story() -> None:
        async with connected(server) as connection:
            for method in ("HEAD", "OPTIONS", "PATCH", "DELETE"):
                reply = await connection.exchange(attempt(method))
                expected = b"" if method == "HEAD" else b"ok"
                assert (reply[0], await whole(reply)) == (200, expected)

    run(story, kind)


def test_server_that_ends_its_connections_loses_no_call(nginx: Server, kind: str) -> None:
    """GOAWAY after some requests: what was asked is answered, and the connection says that it takes no more."""

    async def story() -> None:
        connection = await connect(nginx.short_port)
        async with asyncio.timeout(10):
            answered = 0
            while connection.is_usable():
                try:
                    reply = await connection.exchange(attempt())
                except errors.ConnectionLost as error:
                    # The farewell came behind the last answer, and crossed this request.
                    assert error.reason == "send.unwritten"
                    break
                answered += 1
                assert (reply[0], await whole(reply)) == (200, b"%d" % answered)
            while not connection.is_gone():
                await asyncio.sleep(0.001)
            assert (answered, connection.is_gone()) == (3, True)

    run(story, kind)


@pytest.mark.parametrize("protocols", ["http/1.1", "h2,http/1.1", "h2"])
def test_blocking_side_speaks_what_was_agreed(server: Server, protocols: str) -> None:
    """One exchange at a time with the methods that HTTP/1.1 has, three on one connection."""
    wire = core.HttpConnection(server.tls, ID + "orders", f"127.0.0.1:{server.tls_port}", protocols)
    with socket.create_connection(("127.0.0.1", server.tls_port), timeout=10) as plug:
        plug.sendall(wire.open())

        def read() -> list[Any]:
            data = plug.recv(65536)
            assert data
            out, events = wire.receive(data, len(data))
            plug.sendall(out)
            return events

        while not wire.is_open:
            read()
        assert wire.protocol == ("http/1.1" if protocols == "http/1.1" else "h2")
        for size in (0, 10, 300_000):
            plug.sendall(wire.send("POST", "/", [(b"host", b"orders")], bytes(size), False))
            events: list[Any] = []
            while not events or events[-1][0] not in (core.EVENT_RESPONSE, core.EVENT_END):
                events += [event for event in read() if event[0] not in (core.EVENT_OPEN, core.EVENT_WRITABLE)]
            assert events[0][1] == 200
            if wire.protocol == "h2":
                assert (events[0][2], wire.is_idle) == (20, True)
            elif not wire.is_idle:
                break  # an early answer ends a connection of HTTP/1.1
        plug.sendall(wire.close())


@pytest.mark.parametrize("is_plain", [False, True], ids=["mtls", "plain"])
def test_blocking_thread_uploads_through_the_window(hypercorn: Server, is_plain: bool) -> None:
    """A crossing per piece, and one more where the window is used up; afterwards the connection is taken again."""
    port = hypercorn.plain_port if is_plain else hypercorn.tls_port
    wire = core.HttpConnection(None if is_plain else hypercorn.tls, "" if is_plain else ID + "orders", f"127.0.0.1:{port}", "h2")
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plug:
        plug.setblocking(False)
        events: list[Any] = []

        def cross(data: bytes, is_reading: bool) -> None:
            code, came = wire.converse(plug.fileno(), data, 10.0, is_reading)
            assert code == core.CONVERSE_DONE
            events.extend(event for event in came if event[0] not in (core.EVENT_WRITABLE, core.EVENT_OPEN))

        out = wire.open()
        while not wire.is_open:
            cross(out, True)
            out = b""
        for _ in range(3):
            events.clear()
            waits = 0
            cross(wire.send("POST", "/", [(b"host", b"orders")], None, True), False)
            for _ in range(40):
                cross(wire.send_body(bytes(50_000), False), False)
                while wire.is_blocked and not events:
                    waits += 1
                    cross(b"", True)
            cross(wire.send_body(b"", True), True)
            while not events or events[-1][0] not in (core.EVENT_RESPONSE, core.EVENT_END):
                cross(b"", True)
            assert (dict(events[0][4])[b"x-size"], waits > 0) == (b"2000000", True)
            assert wire.is_quiet(plug.fileno())
        plug.setblocking(True)
        plug.sendall(wire.close())
        while plug.recv(65536):
            pass
        assert not wire.is_quiet(plug.fileno())
