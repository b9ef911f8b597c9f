"""Does an application read the same request as the agent did, whatever version of HTTP it came in?"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import h2.events
import pytest

from tests.agent.proxy_support import CALLER, NUMBERS, Caller2, World, asking, head_of, scripted, world

__all__ = ["world"]

Pseudo = list[tuple[str, str]]
WITH_AUTHORITY: Pseudo = [(":method", "GET"), (":scheme", "http"), (":authority", "orders"), (":path", "/x")]
WITHOUT: Pseudo = [pair for pair in WITH_AUTHORITY if pair[0] != ":authority"]


class Bytes:
    """An application that answers each piece that comes, and keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.came: list[bytes] = []
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(16)
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.server.accept()[0],), daemon=True).start()

    def _serve(self, plug: socket.socket) -> None:
        plug.settimeout(5)
        with plug, contextlib.suppress(OSError):
            for number in itertools.count():
                data = plug.recv(65536)
                if not data:
                    return
                self.came.append(data)
                while not is_whole(data) and (piece := plug.recv(65536)):
                    data += piece
                    self.came[-1] = data
                plug.sendall(b"HTTP/1.1 200 OK\r\nx-number: %d\r\ncontent-length: 0\r\n\r\n" % number)


def is_whole(data: bytes) -> bool:
    head, _, body = data.lower().partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head:
        return body.endswith(b"0\r\n\r\n")
    return b"content-length: 5" not in head or len(body) == 5


@pytest.fixture
def application(world: World) -> Iterator[Bytes]:
    made = Bytes(world.folder / f"bytes-{next(NUMBERS)}.sock")
    yield made
    made.server.shutdown(socket.SHUT_RDWR)
    made.server.close()
    made.thread.join(5)


def by_http1(port: int, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as plug:
        plug.sendall(request)
        return plug.recv(65536)


def by_http2(port: int, pseudo: Pseudo, fields: Pseudo, body: bytes | None = None) -> str:
    """The answer's status."""
    with socket.create_connection(("127.0.0.1", port), 5) as plug:
        caller = Caller2(plug)
        stream = caller.peer.get_next_available_stream_id()
        caller.peer.send_headers(stream, [*pseudo, *fields], end_stream=body is None)
        if body is not None:
            caller.peer.send_data(stream, body, end_stream=True)
        caller.flush()
        answer = caller.wait(h2.events.ResponseReceived)
        return dict(answer.headers)[b":status"].decode() if answer else ""


def test_a_body_of_unknown_length_arrives_with_every_method(world: World, application: Bytes) -> None:
    """A search that is a GET with a body, in chunks or by HTTP/2."""
    port = world.listen(application.path, mode="observe")
    for method in ("GET", "HEAD", "DELETE", "POST"):
        head = f"{method} /x HTTP/1.1\r\nhost: orders\r\ntransfer-encoding: chunked\r\n\r\n"
        assert b" 200 " in by_http1(port, head.encode() + b"5\r\nhello\r\n0\r\n\r\n")
        assert b"hello" in application.came[-1], method
        assert by_http2(port, [(":method", method), *WITH_AUTHORITY[1:]], [], b"hello") == "200"
        assert b"hello" in application.came[-1], method
    assert by_http2(port, WITH_AUTHORITY, [("content-length", "5")], b"hello") == "200"
    assert b"content-length: 5\r\n" in application.came[-1]
    assert b"chunked" not in application.came[-1]
    assert by_http2(port, WITH_AUTHORITY, []) == "200"
    assert b"chunked" not in application.came[-1]


@pytest.mark.parametrize(
    ("pseudo", "fields", "body"),
    [
        (WITH_AUTHORITY, [("content-length", "5"), ("content-length", "5")], b"hello"),
        (WITH_AUTHORITY, [("content-length", "0"), ("content-length", "")], None),
        (WITH_AUTHORITY, [("content-length", "")], None),
        (WITHOUT, [("host", "a"), ("host", "b")], None),
        (WITHOUT, [("host", "a b")], None),
    ],
    ids=["two lengths", "a length and an empty one", "an empty length", "two hosts", "an impossible host"],
)
def test_http2_brings_no_framing_that_http1_would_be_refused_for(
    world: World, application: Bytes, pseudo: Pseudo, fields: Pseudo, body: bytes | None
) -> None:
    """The application would have to choose one of two, and the next request on its connection is somebody else's."""
    port = world.listen(application.path, mode="observe")
    assert by_http2(port, pseudo, fields, body) == "400"
    assert application.came == []
    assert world.proxy.stats()["inbound"]["orders"]["malformed"] == 1


def test_a_request_names_one_host_to_the_application(world: World, application: Bytes) -> None:
    """In the absolute form it is the target's, and not what stands in Host beside it."""
    port = world.listen(application.path, mode="observe")
    assert b" 200 " in by_http1(port, b"GET http://orders/x?q=1 HTTP/1.1\r\nhost: other\r\n\r\n")
    assert application.came[-1].startswith(b"GET /x?q=1 HTTP/1.1\r\n")
    assert b"host: orders\r\n" in application.came[-1]
    assert b"other" not in application.came[-1]


def asked(world: World, port: int, fields: dict[str, str], *, is_http2: bool) -> dict[str, str]:
    """The answer's fields, by their names in small letters, and `:status`."""
    fields = {**fields, **asking(port, expect="-"), "x-mesh-as": CALLER}
    if is_http2:
        caller = Caller2(world.caller())
        caller.ask(fields)
        event = caller.wait(h2.events.ResponseReceived)
        return {name.decode(): value.decode() for name, value in event.headers}
    plug = world.caller()
    text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    plug.sendall(f"GET / HTTP/1.1\r\nhost: orders\r\n{text}\r\n".encode())
    line, *lines = head_of(plug).decode().strip().split("\r\n")
    return {":status": line.split()[1]} | {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}


@pytest.mark.parametrize("is_http2", [False, True])
def test_the_fields_for_the_agent_are_nobody_elses(world: World, is_http2: bool) -> None:
    """A request with as many fields as anybody may send goes through, whatever the library says beside them."""
    came: list[bytes] = []

    def script(plug: socket.socket) -> None:
        came.append(head_of(plug))
        plug.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        plug.recv(1)

    with scripted(script) as port:
        answer = asked(world, port, {f"x-field-{number}": "1" for number in range(99)}, is_http2=is_http2)
        assert answer[":status"] == "200"
        assert came[0].count(b"\r\nx-field-") == 99


@pytest.mark.parametrize("is_http2", [False, True])
@pytest.mark.parametrize(
    "fields",
    [{f"x-field-{number}": "1" for number in range(120)}, {"cookie": "c" * 70_000}, {"cookie": "c" * 150_000}],
    ids=["120 fields", "70 KB", "150 KB"],
)
def test_what_the_agent_does_not_carry_is_told_as_its_own_refusal(world: World, fields: dict[str, str], is_http2: bool) -> None:
    """No endpoint said 431: the library sends such a request itself."""
    with scripted(head_of) as port:
        answer = asked(world, port, fields, is_http2=is_http2)
        assert answer["x-mesh-failed"] == "agent; written=0"
        assert world.proxy.stats()["upstream"]["opened"] == 0
