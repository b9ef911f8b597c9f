"""Does the client's HTTP/2 agree with another implementation, and does it say honestly what happened to each request?

The other side is the Python package `h2`, in memory and step by step: what is sent, in which order and in which window is the
test's choice. Where a peer must break the rules, its frames are written by hand. Real servers are in `test_http2_servers.py`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from h2.errors import ErrorCodes

from meshlib import errors
from meshlib._native import core
from tests.support import identities

HOST = (b"host", b"orders:80")
OK = [(":status", "200")]
Event = tuple[Any, ...]
WINDOW = 256 * 1024


class Pair:
    """A client's wire and a scripted peer, with the bytes carried between them until nobody has any more to say."""

    def __init__(self, settings: dict[Any, int] | None = None, *, is_single: bool = False) -> None:
        config = h2.config.H2Configuration(
            client_side=False, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.peer = h2.connection.H2Connection(config)
        self.peer.local_settings = h2.settings.Settings(client=False, initial_values=settings or {})
        self.wire = core.HttpConnection(None, "", "orders:80", "h2")
        self.is_single = is_single
        self.events: list[Any] = []
        self.seen: list[h2.events.Event] = []
        hello = self.wire.open()
        assert not self.wire.is_open
        self.peer.initiate_connection()
        self.seen += self.peer.receive_data(hello)
        greeting = self.peer.data_to_send()
        out, events = self.wire.receive(greeting, len(greeting))
        assert events == [(core.EVENT_OPEN,)]
        assert (self.wire.is_open, self.wire.is_idle, self.wire.protocol) == (True, True, "h2")
        self.carry(out)

    def carry(self, out: bytes = b"") -> list[Any]:
        """Both ways until it is quiet; returns the client's events."""
        before = len(self.events)
        while True:
            if out:
                self.seen += self.peer.receive_data(out)
            data = self.peer.data_to_send()
            if not data:
                return self.events[before:]
            out = self.receive(data)

    def receive(self, data: bytes) -> bytes:
        if self.is_single:
            out, events = self.wire.receive(data, len(data))
            self.events += events
        else:
            out, pairs = self.wire.receive_streams(data, len(data))
            self.events += pairs
        return out

    def ask(self, method: str = "GET", target: str = "/", *headers: tuple[bytes, bytes], body: bytes | None = None) -> int:
        stream, out = self.wire.open_stream(method, target, [HOST, *headers], body, False)
        self.carry(out)
        return stream

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.seen if isinstance(event, kind)]

    def answer(self, stream: int, body: bytes = b"ok", *headers: tuple[str, str]) -> list[Any]:
        self.peer.send_headers(stream, [*OK, *headers])
        self.peer.send_data(stream, body, end_stream=True)
        return self.carry()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def kinds_of(frames: bytes) -> list[int]:
    kinds, at = [], 0
    while at < len(frames):
        kinds.append(frames[at + 3])
        at += 9 + int.from_bytes(frames[at : at + 3], "big")
    return kinds


def fate(event: tuple[int, Event]) -> tuple[int, type[BaseException], str, bool]:
    stream, (kind, error) = event
    assert kind == core.EVENT_RESET
    return stream, type(error), error.reason, error.is_written


# ------------------------------------------------------------------ requests


def test_request_is_said_as_http2_says_it() -> None:
    """Host becomes :authority, names are lowered, what belongs to a connection stays behind."""
    pair = Pair()
    fields = [
        (b"X-Odd", b" a "),
        (b"Connection", b"keep-alive, x-hop"),
        (b"x-hop", b"1"),
        (b"keep-alive", b"1"),
        (b"TE", b"gzip"),
    ]
    pair.ask("POST", "/a?b=%2F", *fields, (b"te", b"trailers"), body=b"hello")
    [request] = pair.of(h2.events.RequestReceived)
    expected: list[Any] = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"orders:80"), (b":path", b"/a?b=%2F")]
    assert expected == request.headers[:4]
    assert {(b"x-odd", b"a"), (b"te", b"trailers"), (b"content-length", b"5")} == set(request.headers[4:])
    [data] = pair.of(h2.events.DataReceived)
    assert (data.data, data.stream_ended is not None) == (b"hello", True)


@pytest.mark.parametrize(
    ("method", "target", "headers"),
    [
        ("GET", "/\r\nx: y", [HOST]),
        ("GET", "", [HOST]),
        ("GET", "/a b", [HOST]),
        ("GET", "/a#b", [HOST]),
        ("GET", "http://orders/", [HOST]),
        ("G ET", "/", [HOST]),
        ("CONNECT", "/", [HOST]),
        ("GET", "/", [HOST, (b"x", b"y\r\nz: 1")]),
        ("GET", "/", [HOST, (b"x", b"a\x00b")]),
        ("GET", "/", [HOST, (b"x\n", b"y")]),
        ("GET", "/", [HOST, (b":path", b"/admin")]),
        ("GET", "/", [HOST, (b"", b"y")]),
        ("GET", "/", []),
        ("GET", "/", [HOST, HOST]),
        ("GET", "/", [(b"host", b"user@orders")]),
        ("GET", "/", [(b"host", b"orders/x")]),
        ("POST", "/", [HOST, (b"content-length", b"3")]),
        ("POST", "/", [HOST, (b"content-length", b"+0")]),
        ("POST", "/", [HOST, (b"content-length", b"0"), (b"content-length", b"0")]),
        ("POST", "/", [HOST, (b"content-length", b"0"), (b"transfer-encoding", b"chunked")]),
        ("POST", "/", [HOST, (b"transfer-encoding", b"gzip, chunked")]),
        ("GET", "/", [HOST, (b"connection", b"Upgrade"), (b"upgrade", b"websocket")]),
    ],
)
def test_requests_that_would_smuggle_are_value_errors_and_write_nothing(method: str, target: str, headers: list[Any]) -> None:
    """As with HTTP/1.1: nothing is repaired or cut off quietly."""
    pair = Pair()
    with pytest.raises(ValueError, match="can't be written"):
        pair.wire.open_stream(method, target, headers, None, False)
    assert (pair.wire.pending(), pair.wire.has_written) == (b"", False)
    assert pair.answer(pair.ask()) == [(1, (core.EVENT_RESPONSE, 200, 20, b"", [], b"ok", True))]


def test_request_waits_for_the_agreement_on_a_protocol() -> None:
    """What is spoken decides how a request is written, so that none is written before."""
    wire = core.HttpConnection(None, "", "orders:80", "h2")
    for ask in (wire.send, wire.open_stream):
        with pytest.raises(ValueError, match="protocol"):
            ask("GET", "/", [HOST], None, False)
    wire = core.HttpConnection(None, "", "orders:80")
    wire.open()
    with pytest.raises(ValueError, match="does not speak HTTP/2"):
        wire.open_stream("GET", "/", [HOST], None, False)
    with pytest.raises(ValueError, match="no choice of protocols"):
        core.HttpConnection(None, "", "orders:80", "http/3")


# ------------------------------------------------------------------ one exchange at a time


def test_old_methods_carry_one_exchange_with_the_same_events() -> None:
    """A driver for HTTP/1.1 works unchanged; only the minor version tells."""
    pair = Pair(is_single=True)
    for _ in range(3):
        pair.carry(pair.wire.send("GET", "/", [HOST], None, False))
        assert not pair.wire.is_idle
        stream = pair.of(h2.events.RequestReceived)[-1].stream_id
        events = pair.answer(stream, b"none", ("x-a", "1"), ("x-a", "2"))
        assert events == [(core.EVENT_RESPONSE, 200, 20, b"", [(b"x-a", b"1"), (b"x-a", b"2")], b"none", True)]
        assert (pair.wire.is_idle, pair.wire.has_written, pair.wire.has_received) == (True, True, True)


def test_answer_in_pieces_is_head_body_end_with_trailers() -> None:
    """And windows are given back by themselves, since the caller reads only when it wants more."""
    pair = Pair(is_single=True)
    pair.carry(pair.wire.send("GET", "/", [HOST], None, False))
    pair.peer.send_headers(1, [(":status", "100")])
    pair.peer.send_headers(1, [(":status", "103"), ("link", "x")])
    assert pair.carry() == []
    pair.peer.send_headers(1, OK)
    assert pair.carry() == [(core.EVENT_HEAD, 200, 20, b"", [])]
    for _ in range(8):
        for _ in range(8):
            pair.peer.send_data(1, bytes(16_000))
        assert sum(len(event[1]) for event in pair.carry()) == 128_000
    pair.peer.send_headers(1, [("x-sum", "1")], end_stream=True)
    assert pair.carry() == [(core.EVENT_END, True, [(b"x-sum", b"1")])]


@pytest.mark.parametrize(("method", "status"), [("HEAD", "200"), ("GET", "204"), ("GET", "304")])
def test_answer_without_body_ends_with_its_head(method: str, status: str) -> None:
    """Whatever length it tells."""
    pair = Pair()
    stream = pair.ask(method)
    pair.peer.send_headers(stream, [(":status", status), ("content-length", "9")], end_stream=True)
    [(_, (kind, code, *_))] = pair.carry()
    assert (kind, code) == (core.EVENT_RESPONSE, int(status))


def test_reset_stream_of_a_single_exchange_is_an_error_that_says_what_is_safe() -> None:
    """Not processed counts as not written; then it is safe to send again."""
    for code, reason, is_written in [
        (ErrorCodes.REFUSED_STREAM, "send.declined", False),
        (ErrorCodes.INTERNAL_ERROR, "send.closed", True),
    ]:
        pair = Pair(is_single=True)
        pair.carry(pair.wire.send("GET", "/", [HOST], None, False))
        pair.peer.reset_stream(1, code)
        with pytest.raises(errors.ConnectionLost) as caught:
            pair.carry()
        assert (caught.value.reason, caught.value.is_written, pair.wire.has_written) == (reason, is_written, is_written)
        assert str(caught.value).startswith("orders:80: ")
        # Only the stream has ended.
        assert (pair.wire.is_open, pair.wire.is_idle) == (True, True)


# ------------------------------------------------------------------ many exchanges


def test_streams_are_answered_in_any_order() -> None:
    """No answer waits for another one."""
    pair = Pair()
    streams = [pair.ask(target=f"/{n}") for n in range(5)]
    assert streams == [1, 3, 5, 7, 9]
    for stream in reversed(streams):
        pair.peer.send_headers(stream, OK)
        pair.peer.send_data(stream, b"%d" % stream, end_stream=True)
    expected: list[Any] = [(s, (core.EVENT_RESPONSE, 200, 20, b"", [], b"%d" % s, True)) for s in streams]
    assert expected == sorted(pair.carry())


def test_reader_that_stalls_stops_its_own_stream_only() -> None:
    """The window is given back when the application has taken a piece, not when it came."""
    pair = Pair()
    slow, quick = pair.ask(), pair.ask()
    for stream in (slow, quick):
        pair.peer.send_headers(stream, OK)
    pair.carry()

    def send_all(stream: int) -> int:
        size = 0
        while room := min(pair.peer.local_flow_control_window(stream), 16_000):
            pair.peer.send_data(stream, bytes(room))
            size += room
        return size

    assert send_all(slow) == WINDOW
    pair.carry()
    assert send_all(slow) == 0
    taken = 0
    for _ in range(20):
        assert send_all(quick) == WINDOW
        pieces = [event[1] for stream, event in pair.carry() if stream == quick]
        taken += sum(map(len, pieces))
        pair.carry(pair.wire.consume(quick, sum(map(len, pieces))))
    assert taken == 20 * WINDOW
    pair.carry(pair.wire.consume(slow, WINDOW))
    assert send_all(slow) == WINDOW


@pytest.mark.parametrize("is_single", [True, False])
def test_upload_of_a_mebibyte_goes_through_a_window_of_64_kibibytes(is_single: bool) -> None:
    """What has no room waits, the caller is told when it may go on, and nothing is lost or turned around."""
    pair = Pair(is_single=is_single)
    body = bytes(range(256)) * 4096
    if is_single:
        pair.carry(pair.wire.send("POST", "/", [HOST], None, True))
    else:
        pair.carry(pair.wire.open_stream("POST", "/", [HOST], None, True)[1])
    got, waits = b"", 0
    for at in range(0, len(body), 100_000):
        piece, is_last = body[at : at + 100_000], at + 100_000 >= len(body)
        pair.carry(pair.wire.send_body(piece, is_last) if is_single else pair.wire.send_stream(1, piece, is_last))
        while pair.wire.is_blocked if is_single else pair.wire.is_stream_blocked(1):
            waits += 1
            taken = b"".join(event.data for event in pair.of(h2.events.DataReceived))
            pair.seen.clear()
            got += taken
            pair.peer.acknowledge_received_data(len(taken), 1)
            events = pair.carry()
            is_blocked = pair.wire.is_blocked if is_single else pair.wire.is_stream_blocked(1)
            writable = (core.EVENT_WRITABLE,)
            assert ([] if is_blocked else [writable if is_single else (1, writable)]) == events
    got += b"".join(event.data for event in pair.of(h2.events.DataReceived))
    assert (got == body, waits >= 10) == (True, True)
    assert len(pair.of(h2.events.StreamEnded)) == 1


def test_length_of_an_upload_is_what_its_header_says() -> None:
    """A body that is too long or too short is the caller's mistake, and told as one."""
    for pieces in ([b"abcd"], [b"ab", b""]):
        pair = Pair()
        stream, out = pair.wire.open_stream("POST", "/", [HOST, (b"content-length", b"3")], None, True)
        pair.carry(out)
        with pytest.raises(ValueError, match="content-length"):
            for piece in pieces:
                pair.wire.send_stream(stream, piece, not piece)


def test_early_answer_ends_the_exchange_and_the_rest_is_for_nobody() -> None:
    """Also when the peer says so by RST_STREAM(NO_ERROR) behind its answer; the connection stays."""
    for is_reset in (False, True):
        pair = Pair()
        stream, out = pair.wire.open_stream("POST", "/", [HOST], None, True)
        pair.carry(out + pair.wire.send_stream(stream, b"x", False))
        pair.peer.send_headers(stream, [(":status", "413")])
        pair.peer.send_data(stream, b"no", end_stream=True)
        if is_reset:
            pair.peer.reset_stream(stream, ErrorCodes.NO_ERROR)
        assert [(stream, (core.EVENT_RESPONSE, 413, 20, b"", [], b"no", True))] == pair.carry()
        assert pair.wire.send_stream(stream, b"rest", True) == b""
        assert [event.error_code for event in pair.of(h2.events.StreamReset)] == ([] if is_reset else [ErrorCodes.CANCEL])
        assert pair.answer(pair.ask())[0][1][1] == 200


def test_given_up_stream_is_reset_and_its_late_bytes_do_no_harm() -> None:
    """The peer is told, nothing more is told to us, and the connection's window doesn't leak."""
    pair = Pair()
    for _ in range(300):
        stream = pair.ask()
        pair.peer.send_headers(stream, OK)
        pair.carry()
        out = pair.wire.reset_stream(stream)
        # On their way before the peer knows.
        for _ in range(8):
            pair.peer.send_data(stream, bytes(16_000))
        late = pair.peer.data_to_send()
        pair.carry(out)
        pair.carry(pair.receive(late))
    assert {event.error_code for event in pair.of(h2.events.StreamReset)} == {ErrorCodes.CANCEL}
    assert [event for stream, event in pair.events if event[0] != core.EVENT_HEAD] == []
    assert pair.answer(pair.ask())[0][1][1] == 200


def test_peer_says_how_many_streams_it_wants() -> None:
    """And is asked for no more; what it allows beyond our own limit isn't used."""
    pair = Pair({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 3})
    assert pair.wire.streams_left == 3
    streams = [pair.ask() for _ in range(3)]
    assert pair.wire.streams_left == 0
    with pytest.raises(ValueError, match="takes no more"):
        pair.ask()
    pair.answer(streams[1])
    assert (pair.wire.streams_left, pair.ask()) == (1, 7)
    pair.peer.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 10_000})
    pair.carry()
    assert pair.wire.streams_left == 128 - 3


# ------------------------------------------------------------------ endings


def test_goaway_tells_what_was_not_processed_and_lets_the_rest_end() -> None:
    """Streams above the last id are safe to send again; those below go on; new ones go elsewhere."""
    pair = Pair()
    streams = [pair.ask() for _ in range(3)]
    pair.peer.close_connection(last_stream_id=3)
    pair.peer.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN
    events = pair.carry()
    assert (5, errors.ConnectionLost, "send.unwritten", False) == fate(events[0])
    assert events[1:] == [(0, (core.EVENT_CLOSED,))]
    assert (pair.wire.streams_left, pair.wire.is_open) == (0, True)
    answers = [pair.receive(frame(1, 4, stream, b"\x88") + frame(0, 1, stream, b"ok")) for stream in streams[:2]]
    assert [event[1][:2] for event in pair.events[2:]] == [(core.EVENT_RESPONSE, 200)] * 2
    # With the last stream the connection has ended, and says farewell.
    assert (answers[1][3], pair.wire.is_open) == (7, False)


@pytest.mark.parametrize("has_body", [False, True])
def test_reset_by_the_peer_says_whether_the_request_was_processed(has_body: bool) -> None:
    """REFUSED_STREAM says no; any other may have happened after the work was done."""
    pair = Pair()
    refused, failed = pair.ask(), pair.ask()
    pair.peer.reset_stream(refused, ErrorCodes.REFUSED_STREAM)
    if has_body:
        pair.peer.send_headers(failed, OK)
        pair.peer.send_data(failed, b"half")
    pair.peer.reset_stream(failed, ErrorCodes.INTERNAL_ERROR)
    events = [event for event in pair.carry() if event[1][0] == core.EVENT_RESET]
    assert [fate(event) for event in events] == [
        (refused, errors.ConnectionLost, "send.declined", False),
        (failed, errors.ConnectionLost, "send.closed", True),
    ]
    assert "INTERNAL_ERROR" in str(events[1][1][1])


def test_end_of_the_connection_is_stale_only_if_nothing_at_all_came() -> None:
    """A connection that had been used, and was closed before a byte of anything: the race of a kept-alive connection."""
    pair = Pair()
    first = pair.ask()
    assert [fate(event) for event in pair.wire.receive_streams_eof()[:1]] == [(first, errors.ConnectionLost, "send.closed", True)]
    pair = Pair()
    pair.answer(pair.ask())
    stale = pair.ask()
    events = pair.wire.receive_streams_eof()
    # The answer to SETTINGS or a PING would be a byte that came.
    assert [(stale, errors.ConnectionLost, "send.stale", True)] == [fate(event) for event in events[:1]]
    assert events[1:] == [(0, (core.EVENT_CLOSED,))]
    pair = Pair()
    pair.answer(pair.ask())
    cut = pair.ask()
    pair.peer.ping(b"12345678")
    pair.carry()
    assert [fate(event) for event in pair.wire.receive_streams_eof()[:1]] == [(cut, errors.ConnectionLost, "send.closed", True)]


def test_close_says_farewell() -> None:
    """GOAWAY(NO_ERROR), so that a peer's log has nothing to wonder about."""
    pair = Pair()
    pair.carry(pair.wire.close())
    assert [event.error_code for event in pair.of(h2.events.ConnectionTerminated)] == [ErrorCodes.NO_ERROR]
    assert (pair.wire.is_open, pair.wire.streams_left, pair.wire.close()) == (False, 0, b"")


def test_ping_is_answered() -> None:
    """Else a peer takes the connection for dead."""
    pair = Pair()
    pair.peer.ping(b"12345678")
    pair.carry()
    assert [event.ping_data for event in pair.of(h2.events.PingAckReceived)] == [b"12345678"]


@pytest.mark.parametrize(
    "speech", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x03\x00\x02\x02\x28......", b"SSH-2.0-OpenSSH_9.2\r\n"]
)
def test_peer_that_speaks_something_else_is_told_apart(speech: bytes) -> None:
    """Before anything was asked of it: the service is configured wrongly."""
    wire = core.HttpConnection(None, "", "orders:80", "h2")
    wire.open()
    with pytest.raises(errors.ProtocolError, match="does not speak HTTP/2") as caught:
        wire.receive(speech, len(speech))
    assert (caught.value.is_written, wire.is_open) == (False, False)


# ------------------------------------------------------------------ peers that break the rules


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ([(":status", "200"), ("content-length", "5")], b"abc"),
        ([(":status", "200"), ("content-length", "2")], b"abc"),
        ([(":status", "200"), ("content-length", "3"), ("content-length", "3")], b"abc"),
        ([(":status", "200"), ("content-length", "+3")], b"abc"),
        ([(":status", "200"), ("connection", "close")], b""),
        ([(":status", "200"), ("transfer-encoding", "chunked")], b""),
        ([("x", "no status")], b""),
        ([(":status", "101")], b""),
        ([(":status", "204")], b"body"),
        ([(":status", "200"), *((f"x-{n}", "1") for n in range(101))], b""),
        ([(":status", "200"), ("x", "y" * 61_440)], b""),
    ],
    ids=["short", "long", "twice", "plus", "connection", "te", "status", "101", "204", "count", "size"],
)
def test_malformed_answer_ends_its_stream_and_no_other(headers: list[Any], body: bytes) -> None:
    """What two parsers could understand in two ways is an error, as with HTTP/1.1."""
    pair = Pair()
    bad, good = pair.ask(), pair.ask()
    pair.peer.send_headers(bad, headers)
    if headers[0] != (":status", "101"):
        pair.peer.send_data(bad, body, end_stream=True)
    [last] = [event for event in pair.carry() if event[1][0] == core.EVENT_RESET]
    assert (bad, errors.ProtocolError, "send.protocol", True) == fate(last)
    assert pair.answer(good)[0][1][:2] == (core.EVENT_RESPONSE, 200)


@pytest.mark.parametrize("header", [("X-Upper", "1"), ("x", "a\r\nb: c"), ("x", "a\x00b"), ("x y", "1")])
def test_header_that_is_none_ends_the_connection(header: tuple[str, str]) -> None:
    """A name or value that HTTP/1.1 could not carry is no mistake of one answer: the peer doesn't check what it forwards."""
    pair = Pair()
    streams = [pair.ask(), pair.ask()]
    pair.peer.send_headers(streams[0], [*OK, header], end_stream=True)
    events = pair.carry()
    assert [fate(event) for event in events[:-1]] == [(s, errors.ProtocolError, "send.protocol", True) for s in streams]
    assert (events[-1], pair.wire.is_open) == ((0, (core.EVENT_CLOSED,)), False)


def flood_of(kind: str) -> bytes:
    settings = frame(4, 0, 0, b"")
    head = frame(1, 0, 1, b"\x88")
    bomb = b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000  # one header of 4000 bytes into the dynamic table, then named again and again
    return {
        "ping": frame(6, 0, 0, bytes(8)) * 20_000,
        "settings": settings * 20_000,
        "continuation": head + frame(9, 0, 1, b"") * 20_000,
        "continuation-full": head + frame(9, 0, 1, b"\x00\x01a\x7f\x81\x7f" + b"b" * 16_256) * 40,
        "empty-data": frame(1, 4, 1, b"\x88") + frame(0, 0, 1, b"") * 20_000,
        "hpack-bomb": frame(1, 4, 1, b"\x88" + bomb + b"\xbe" * 10_000),
        "push": frame(5, 4, 1, struct.pack(">I", 2) + b"\x82\x86\x84"),
        "window": frame(8, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * 2,
        "garbage": frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff"),
        "data-before-head": frame(0, 1, 1, b"x"),
        "unknown-stream": frame(1, 4, 99, b"\x88"),
        "large-frame": frame(0, 0, 1, bytes(70_000)),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "ping", "settings", "continuation", "continuation-full", "empty-data", "hpack-bomb", "push", "window", "garbage",
        "data-before-head", "unknown-stream", "large-frame",
    ],
)  # fmt: skip
def test_flood_ends_the_connection(kind: str) -> None:
    """Whoever makes us work or remember for nothing is left, with little said in return."""
    pair = Pair()
    stream = pair.ask()
    flood = flood_of(kind)
    said = b""
    for at in range(0, len(flood), 65_536):
        said += pair.receive(flood[at : at + 65_536])
    [(_, error)] = [event for number, event in pair.events if number == stream and event[0] == core.EVENT_RESET]
    assert isinstance(error, errors.ProtocolError)
    assert pair.events[-1] == (0, (core.EVENT_CLOSED,))
    assert (pair.wire.is_open, len(said) < 20_000) == (False, True)
    assert kinds_of(said)[-1] == 7  # GOAWAY is the last word


def test_peer_may_measure_the_way_while_it_works() -> None:
    """PINGs for work that was asked for are no flood: gRPC servers send one with nearly each piece."""
    pair = Pair()
    for _ in range(1000):
        stream = pair.ask()
        for _ in range(5):
            pair.peer.ping(bytes(8))
        pair.answer(stream)
    assert pair.wire.streams_left > 0


def test_interim_answers_are_bounded() -> None:
    """As many as HTTP/1.1 allows, then the stream ends."""
    pair = Pair()
    stream = pair.ask()
    events: list[Any] = []
    for _ in range(17):
        pair.peer.send_headers(stream, [(":status", "103")])
        events += pair.carry()
    assert [fate(event) for event in events] == [(stream, errors.ProtocolError, "send.protocol", True)]


def test_peer_that_resets_everything_is_left() -> None:
    """A hundred exchanges in a row without an answer: another connection may be luckier."""
    pair = Pair()
    for _ in range(99):
        pair.peer.reset_stream(pair.ask(), ErrorCodes.REFUSED_STREAM)
        pair.carry()
    pair.answer(pair.ask())
    assert pair.wire.streams_left > 0
    for _ in range(100):
        assert pair.wire.streams_left > 0
        pair.peer.reset_stream(pair.ask(), ErrorCodes.REFUSED_STREAM)
        pair.carry()
    assert (pair.wire.streams_left, pair.events[-1]) == (0, (0, (core.EVENT_CLOSED,)))


# ------------------------------------------------------------------ ALPN


def handshake(client: core.TlsClient, server: core.TlsServer, protocols: str, address: str = "a:1") -> core.HttpConnection:
    """In memory, to its end. Raises what either side raises."""
    wire, peer = core.HttpConnection(client, "", address, protocols), core.TlsConnection(server)
    assert wire.protocol == ("http/1.1" if protocols == "http/1.1" else None)
    out = wire.open()
    while out:
        _, back, _ = peer.receive(out)
        out, _ = wire.receive(back, len(back))
    return wire


@pytest.fixture
def tls(tmp_path: Path) -> Any:
    identities(tmp_path, "me")
    folder = tmp_path / "identities" / "me"
    chain, key, bundle = ((folder / name).read_bytes() for name in ("svid.pem", "key.pem", "bundle.pem"))
    bundles = {"shop.internal": bundle}
    return core.TlsClient(chain, key, bundles, 1), lambda alpn: core.TlsServer(chain, key, bundles, 1, True, alpn)


@pytest.mark.parametrize(
    ("protocols", "offered", "spoken"),
    [
        ("http/1.1", [b"h2", b"http/1.1"], "http/1.1"),
        ("h2,http/1.1", [b"h2", b"http/1.1"], "h2"),
        ("h2,http/1.1", [b"http/1.1"], "http/1.1"),
        ("h2,http/1.1", [], "http/1.1"),
        ("http/1.1", [], "http/1.1"),
        ("h2", [b"h2"], "h2"),
    ],
)
def test_handshake_agrees_on_the_protocol(tls: Any, protocols: str, offered: list[bytes], spoken: str) -> None:
    """A peer that picks none speaks HTTP/1.1."""
    client, server = tls
    wire = handshake(client, server(offered), protocols)
    assert (wire.protocol, wire.is_open, wire.streams_left > 0) == (spoken, True, spoken == "h2")


@pytest.mark.parametrize("offered", [[], [b"http/1.1"]])
def test_peer_without_http2_is_refused_where_nothing_else_will_do(tls: Any, offered: list[bytes]) -> None:
    """By whoever sees it first, and before a request is sent."""
    client, server = tls
    with pytest.raises(errors.TlsError):
        handshake(client, server(offered), "h2")


def test_session_is_resumed_only_under_the_same_offer(tls: Any) -> None:
    """A ticket belongs to what was spoken when it was won."""
    client, server = tls
    peer = server([b"h2", b"http/1.1"])
    resumed = [
        handshake(client, peer, protocols).tls_resumed for protocols in ("http/1.1", "h2", "h2", "h2,http/1.1", "http/1.1")
    ]
    assert resumed == [False, False, True, False, True]
