"""Does the client's HTTP/1.1 agree with other implementations, and does it say honestly what happened?

The peers are real: `http.server` over sockets, and h11 as a second opinion on every byte, over messages that hypothesis makes up.
What is refused as ambiguous is tested in Rust, case by case; here only how it reaches Python.
"""

from __future__ import annotations

import gc
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshlib import errors
from meshlib._native import core

HOST = (b"host", b"orders")
Event = tuple[Any, ...]


def opened() -> core.HttpConnection:
    wire = core.HttpConnection(None, "", "orders:80")
    assert (wire.open(), wire.is_open, wire.is_idle) == (b"", True, True)
    return wire


def asked(method: str = "GET") -> core.HttpConnection:
    wire = opened()
    wire.send(method, "/", [HOST], None, False)
    return wire


def received(wire: core.HttpConnection, data: bytes) -> list[Event]:
    out, events = wire.receive(data, len(data))
    assert out == b""
    return events


# ------------------------------------------------------------------ what Python gets


def test_whole_answer_is_one_event() -> None:
    """Nearly every call ends in one read: one tuple, names in lower case, values as they came."""
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nX-Odd-Name: A b\r\ncontent-length: 4\r\n\r\nnone"
    headers = [(b"content-type", b"text/plain"), (b"x-odd-name", b"A b"), (b"content-length", b"4")]
    wire = asked()
    assert [(core.EVENT_RESPONSE, 404, 1, b"Not Found", headers, b"none", True)] == received(wire, answer)
    assert (wire.is_idle, wire.has_written, wire.has_received) == (True, True, True)


def test_answer_in_pieces_is_head_body_end() -> None:
    """What is known is told at once, so that a body can be streamed."""
    wire = asked()
    assert received(wire, b"HTTP/1.1 200 OK\r\ncontent-le") == []
    head = (core.EVENT_HEAD, 200, 1, b"OK", [(b"content-length", b"6")])
    assert [head, (core.EVENT_BODY, b"ab")] == received(wire, b"ngth: 6\r\n\r\nab")
    assert received(wire, b"cd") == [(core.EVENT_BODY, b"cd")]
    assert received(wire, b"ef") == [(core.EVENT_BODY, b"ef"), (core.EVENT_END, True, [])]


def test_trailers_come_with_the_end() -> None:
    """They never join the headers."""
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n"
    events = received(asked(), answer)
    assert [event[0] for event in events] == [core.EVENT_HEAD, core.EVENT_BODY, core.EVENT_END]
    assert events[-1] == (core.EVENT_END, True, [(b"x-sum", b"1")])


def test_tiny_chunks_of_one_read_are_one_piece() -> None:
    """A peer that sends a million one-byte chunks makes us no million objects."""
    wire = asked()
    received(wire, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    assert received(wire, b"1\r\na\r\n" * 1000) == [(core.EVENT_BODY, b"a" * 1000)]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_serves_up_to_its_size(kind: Callable[[bytes], Any]) -> None:
    """The loop's shared buffer is longer than what was read into it."""
    answer = b"HTTP/1.1 204 No Content\r\n\r\n"
    _, events = asked().receive(kind(answer + b"stale bytes of another connection"), len(answer))
    assert events == [(core.EVENT_RESPONSE, 204, 1, b"No Content", [], b"", True)]


def test_wrong_buffers_and_headers_are_type_errors() -> None:
    """A mistake of the driver is told as one, not as a fault of the peer."""
    with pytest.raises(TypeError):
        asked().receive("text", 4)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        asked().receive(memoryview(bytes(8))[::2], 4)
    with pytest.raises(TypeError):
        opened().send("GET", "/", [("host", "orders")], None, False)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="SPIFFE ID"):
        core.HttpConnection(None, "orders", "orders:80")


def test_requests_that_would_smuggle_are_value_errors_and_write_nothing() -> None:
    """Unchecked input of a user can't write headers or requests of its own."""
    wire = opened()
    for method, target, headers in [
        ("GET", "/\r\nx: y", [HOST]),
        ("G ET", "/", [HOST]),
        ("GET", "/", [HOST, (b"x", b"y\r\nz: 1")]),
        ("GET", "/", [HOST, (b"x\n", b"y")]),
        ("GET", "/", []),
    ]:
        with pytest.raises(ValueError, match="can't be written"):
            wire.send(method, target, headers, None, False)
    assert (wire.pending(), wire.is_idle, wire.has_written) == (b"", True, False)


def test_malformed_answer_names_the_endpoint_and_says_what_to_do() -> None:
    """What happened, the likely cause, what to do; programs read attributes."""
    wire = asked()
    with pytest.raises(errors.ProtocolError) as caught:
        wire.receive(b"HTTP/1.1 200 OK\ncontent-length: 0\r\n\r\n", 38)
    assert str(caught.value).startswith("orders:80: A line of the answer ends in LF without CR.")
    assert (caught.value.reason, caught.value.is_written) == ("send.protocol", True)
    assert "Likely cause" in caught.value.hint
    assert (wire.is_open, wire.is_idle) == (False, False)
    with pytest.raises(errors.ConnectionLost):
        wire.send("GET", "/", [HOST], None, False)


def test_end_before_and_within_an_answer_are_different_errors() -> None:
    """Only the first can be a kept-alive connection that was closed under us."""
    with pytest.raises(errors.ConnectionLost):
        asked().receive_eof()
    wire = asked()
    received(wire, b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab")
    with pytest.raises(errors.ProtocolError, match="cut off"):
        wire.receive_eof()


def test_idle_connection_tells_that_it_is_of_no_use_any_more() -> None:
    """Closed by the peer, or with bytes that nobody asked for (a 408, an attack)."""
    wire = opened()
    assert wire.receive_eof() == [(core.EVENT_CLOSED,)]
    assert wire.receive_eof() == []
    wire = opened()
    assert received(wire, b"HTTP/1.1 408 Request Timeout\r\n\r\n") == [(core.EVENT_CLOSED,)]
    assert (wire.is_open, wire.is_idle, wire.close()) == (False, False, b"")


def test_answer_that_does_not_wait_for_the_request_is_delivered() -> None:
    """What is still sent of the body is dropped without an error: the answer is there, and it is the answer."""
    wire = opened()
    wire.send("POST", "/", [HOST], None, True)
    wire.send_body(b"part", False)
    events = received(wire, b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")
    assert [(event[0], event[1], event[6]) for event in events] == [(core.EVENT_RESPONSE, 413, False)]
    assert (wire.send_body(b"rest", False), wire.send_body(b"", True), wire.is_open) == (b"", b"", False)


def test_a_thousand_calls_leave_nothing_behind() -> None:
    """No object of a call outlives it."""
    wire = opened()
    answer = b"HTTP/1.1 200 OK\r\nx-unknown: 1\r\ncontent-length: 2\r\n\r\nok"

    def calls(count: int) -> int:
        for _ in range(count):
            wire.send("GET", "/", [HOST], None, False)
            wire.receive(answer, len(answer))
        gc.collect()
        return len(gc.get_objects())

    def growth() -> int:
        before = calls(10)
        return abs(calls(1000) - before)

    # Other tests of this process leave threads behind that come and go: what a call leaves behind is there each time.
    assert min(growth() for _ in range(3)) < 20


# ------------------------------------------------------------------ a second opinion: h11

NAMES = st.from_regex(rb"\Ax-[a-z0-9!#$%&'*+.^_`|~-]{0,20}\Z")
VALUES = st.from_regex(rb"\A([!-~]([ -~]{0,30}[!-~])?)?\Z")
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=8)
TARGETS = st.from_regex(r"\A/[!-~]{0,40}\Z")
PIECES = st.lists(st.binary(max_size=300), max_size=6)


def read_by_h11(data: bytes) -> tuple[h11.Request, bytes, h11.EndOfMessage]:
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    request = server.next_event()
    assert isinstance(request, h11.Request)
    body = b""
    while isinstance(event := server.next_event(), h11.Data):
        body += bytes(event.data)
    assert isinstance(event, h11.EndOfMessage)
    assert server.trailing_data == (b"", False)
    return request, body, event


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["GET", "POST", "PUT", "DELETE"]), TARGETS, HEADERS, PIECES, st.sampled_from(["whole", "chunked", "counted"])
)
def test_h11_reads_the_request_that_was_sent(
    method: str, target: str, headers: list[tuple[bytes, bytes]], pieces: list[bytes], way: str
) -> None:
    """Whatever is sent, in one piece or streamed, another parser sees that very request and not a byte more."""
    wire, body = opened(), b"".join(pieces)
    fields = [HOST, *headers]
    if way == "whole":
        data = wire.send(method, target, fields, body, False)
    else:
        if way == "counted":
            fields.append((b"content-length", b"%d" % len(body)))
        data = wire.send(method, target, fields, None, True)
        data += b"".join(wire.send_body(piece, False) for piece in pieces) + wire.send_body(b"", True)
    request, seen, _ = read_by_h11(data)
    assert (method.encode(), target.encode(), body) == (request.method, request.target, seen)
    assert fields == [pair for pair in request.headers if pair in fields]


@settings(max_examples=200, deadline=None)
@given(st.integers(200, 599), HEADERS, PIECES, st.booleans(), st.lists(st.integers(0, 2000), max_size=5))
def test_the_answer_that_h11_wrote_is_read(
    status: int, headers: list[tuple[bytes, bytes]], pieces: list[bytes], is_counted: bool, cuts: list[int]
) -> None:
    """Wherever it is cut."""
    wire = asked()
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"GET / HTTP/1.1\r\nhost: orders\r\n\r\n")
    assert [h11.Request, h11.EndOfMessage] == [type(server.next_event()), type(server.next_event())]
    has_body = status not in (204, 304)
    body = b"".join(pieces) if has_body else b""
    fields = [*headers, (b"content-length", b"%d" % len(body))] if is_counted or not has_body else headers
    data = server.send(h11.Response(status_code=status, headers=fields)) or b""
    for piece in pieces if has_body else []:
        data += server.send(h11.Data(data=piece)) or b""
    data += server.send(h11.EndOfMessage()) or b""

    marks = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    events = [event for start, end in itertools.pairwise(marks) for event in received(wire, data[start:end])]
    if events[0][0] == core.EVENT_RESPONSE:
        ((_, seen_status, _, _, seen_headers, seen_body, is_reusable),) = events
    else:
        _, seen_status, _, _, seen_headers = events[0]
        seen_body = b"".join(event[1] for event in events[1:-1])
        is_reusable = events[-1][1]
    assert (status, body, True, True) == (seen_status, seen_body, is_reusable, wire.is_idle)
    assert headers == [pair for pair in seen_headers if pair in headers]


# ------------------------------------------------------------------ a real server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in (b"5\r\nhello\r\n", b"7\r\n, world\r\n", b"0\r\n\r\n"):
                self.wfile.write(piece)
        elif self.path == "/until-close":
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"x" * 100_000)
        else:
            self.send_header("Content-Length", "2")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"ok")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(201)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield ("127.0.0.1", running.server_address[1])
        running.shutdown()
        thread.join()


def call(wire: core.HttpConnection, plug: socket.socket, out: bytes) -> tuple[int, bytes, bool]:
    """Drive one exchange over a socket: status, body, whether the connection may be used again."""
    plug.sendall(out)
    buffer = bytearray(4096)
    status, body = 0, b""
    while True:
        size = plug.recv_into(buffer)
        events = wire.receive(buffer, size)[1] if size else wire.receive_eof()
        for event in events:
            match event:
                case (core.EVENT_RESPONSE, status, _, _, _, body, is_reusable):
                    return status, body, is_reusable
                case (core.EVENT_HEAD, status, _, _, _):
                    pass
                case (core.EVENT_BODY, piece):
                    body += piece
                case (core.EVENT_END, is_reusable, _):
                    return status, body, is_reusable


def test_one_connection_carries_many_exchanges(server: tuple[str, int]) -> None:
    """Until the server says that it was the last."""
    wire = opened()
    with socket.create_connection(server) as plug:
        upload = bytes(range(256)) * 1000
        assert call(wire, plug, wire.send("GET", "/", [HOST], None, False)) == (200, b"ok", True)
        assert (201, upload, True) == call(wire, plug, wire.send("POST", "/", [HOST], upload, False))
        assert call(wire, plug, wire.send("HEAD", "/", [HOST], None, False)) == (200, b"", True)
        assert call(wire, plug, wire.send("GET", "/chunked", [HOST], None, False)) == (200, b"hello, world", True)
        assert call(wire, plug, wire.send("GET", "/until-close", [HOST], None, False)) == (200, b"x" * 100_000, False)
        assert not wire.is_open
