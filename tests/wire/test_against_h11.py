"""Where does our HTTP/1.1 differ from h11's, and is it always the stricter one?

h11 is the oracle: the same answer, as made or mutilated, in whatever pieces, goes to both. What both accept must mean the same (status,
headers, body, trailers, and whether the connection may be used again). What only h11 accepts must be of a class that stands in `STRICTER`
with its reason, and what we use further than h11 does, in `WIDER`. Nothing that h11 refuses may be accepted. Requests go the other
way: what we write, h11's server reads back as the same one request. The examples are the same in every run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import h11
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshlib import errors
from meshlib._native import core

Headers = list[tuple[bytes, bytes]]
HOST = (b"host", b"orders")

# What we refuse and h11 accepts: a phrase of our error, and why we are stricter.
STRICTER = {
    "ends in LF without CR": "a LF alone ends a line for some readers only; between two of them another message begins",
    "more than one content-length": "equal ones are harmless today, and a sign that somebody between adds headers",
    "not a plain decimal number": "lists, signs and numbers beyond 64 bits are read differently by others",
    "both content-length and transfer-encoding": "h11 prefers the chunks, others the length: request smuggling's oldest form",
    "HTTP/1.0 answer has a transfer-encoding": "an HTTP/1.0 hop passes the chunks on without understanding them",
    "head of the answer is malformed": "folded lines, other versions and control characters in values or the status line",
    "trailers are malformed": "the same within trailers",
    "size is not a hexadecimal number": "h11 allows spaces behind a chunk's size, where others see an extension",
    "size has more than 16 digits": "beyond 64 bits others wrap around",
    "extension holds a control character": "a bare CR there is a line's end for others",
    "does not end in CR LF": "a CR within what h11 takes for an extension",
    "too many interim": "h11 reads them without end",
    "more than 100 header fields": "h11 counts bytes only",
    "more than 100 trailer fields": "the same within trailers",
    "chunk extensions of one body exceed": "h11 skips them without end",
    "exceeds 60 KiB": "the oracle's own cap is put out of the way",
    "exceed 60 KiB": "the same within trailers",
}
# Where we keep a connection that h11 gives up, or read on where it can't.
WIDER = {
    "HTTP/1.0 with keep-alive": "RFC 9112, 9.3 lets a client keep it; h11 closes after every HTTP/1.0 message",
    "framing among the trailers": "h11 judges a length there; for us trailers stay apart from the headers and frame nothing",
}


@dataclass
class Seen:
    """What one implementation made of an answer."""

    error: str = ""
    status: int = 0
    minor: int = 1
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    trailers: Headers = field(default_factory=list)
    is_whole: bool = False
    is_reusable: bool = False

    @property
    def message(self) -> tuple[int, Headers, bytes, Headers]:
        return self.status, self.headers, self.body, self.trailers


def ours(method: str, pieces: Sequence[bytes], *, has_end: bool) -> Seen:
    wire = core.HttpConnection(None, "", "orders:80")
    wire.open()
    wire.send(method, "/", [HOST], None, False)
    seen = Seen()
    try:
        events: list[tuple[Any, ...]] = []
        for piece in pieces:
            out, more = wire.receive(piece, len(piece))
            assert out == b""
            events += more
        seen.is_reusable = wire.is_idle
        if has_end and not any(event[0] in (core.EVENT_RESPONSE, core.EVENT_END) for event in events):
            events += wire.receive_eof()
    except errors.MeshError as error:
        seen.error = error.message
        assert (wire.is_open, wire.is_idle) == (False, False), "an error ends the connection"
        return seen
    for event in events:
        if event[0] in (core.EVENT_RESPONSE, core.EVENT_HEAD):
            _, seen.status, seen.minor, _, seen.headers = event[:5]
        if event[0] == core.EVENT_RESPONSE:
            seen.body = event[5]
        elif event[0] == core.EVENT_BODY:
            assert event[1] and not seen.is_whole
            seen.body += event[1]
        elif event[0] == core.EVENT_END:
            seen.trailers = event[2]
        seen.is_whole |= event[0] in (core.EVENT_RESPONSE, core.EVENT_END)
    return seen


def theirs(method: str, pieces: Sequence[bytes], *, has_end: bool) -> Seen:
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 24)
    client.send(h11.Request(method=method, target="/", headers=[HOST]))
    client.send(h11.EndOfMessage())
    seen = Seen()
    try:
        for piece in [*pieces, *([b""] if has_end else [])]:
            if seen.is_whole:
                break
            client.receive_data(piece)
            while True:
                event = client.next_event()
                if isinstance(event, h11.Response):
                    seen.status, seen.minor = event.status_code, int(event.http_version[2:])
                    seen.headers = [(bytes(name), bytes(value)) for name, value in event.headers]
                elif isinstance(event, h11.Data):
                    seen.body += bytes(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    seen.trailers = [(bytes(name), bytes(value)) for name, value in event.headers]
                    seen.is_whole = True
                    break
                elif not isinstance(event, h11.InformationalResponse):
                    break
    except h11.RemoteProtocolError as error:
        seen.error = str(error) or "refused"
        return seen
    if seen.is_whole:
        states = (client.our_state, client.their_state)
        seen.is_reusable = client.trailing_data == (b"", False) and states == (h11.DONE, h11.DONE)
    return seen


def normal(headers: Headers) -> Headers:
    """h11 puts the value of a transfer-encoding into lower case, and so it is compared."""
    return [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in headers]


def check(method: str, data: bytes, cuts: Iterable[int] = (), *, has_end: bool = True) -> str:
    """Compare; returns the class in which we are stricter (or wider), "" where both agree, and fails on any other difference."""
    marks = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise(marks)]
    mine, other = ours(method, pieces, has_end=has_end), theirs(method, [data] if data else [], has_end=has_end)
    where = f"{method} {data!r} {marks}\nours   {mine}\ntheirs {other}"
    if mine.error:
        if other.error or not other.is_whole:
            return ""
        found = [phrase for phrase in STRICTER if phrase in mine.error]
        assert len(found) == 1, f"stricter without a reason: {where}"
        return found[0]
    if other.error and mine.is_whole:
        assert any(name in (b"content-length", b"transfer-encoding") for name, _ in mine.trailers), (
            f"accepted what h11 refuses: {where}"
        )
        return "framing among the trailers"
    if other.error:
        # Not refused yet: the piece with the mistake has come, but a head is judged when it is whole.
        assert not has_end, where
        return ""
    assert mine.is_whole == other.is_whole, where
    if not mine.is_whole:
        return ""
    assert (mine.status, normal(mine.headers), mine.body, mine.trailers) == (
        other.status, normal(other.headers), other.body, other.trailers
    ), where  # fmt: skip
    if mine.is_reusable and not other.is_reusable:
        assert mine.minor == 0, where
        assert any(name == b"connection" and b"keep-alive" in value.lower() for name, value in mine.headers), where
        return "HTTP/1.0 with keep-alive"
    assert mine.is_reusable == other.is_reusable, where
    return ""


# ------------------------------------------------------------------ answers that are made up

METHODS = st.sampled_from(["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
NAMES = st.sampled_from([b"X-A", b"server", b"Set-Cookie", b"date", b"x-long-name_with.odd~tokens", b"Keep-Alive", b"Via"])
VALUES = st.sampled_from([b"", b"a", b"a b", b"\t a\t", b"\xe9t\xe9", b'"quoted; value"', b"a,b , c", b"x" * 300])
BODIES = st.binary(max_size=60)
CUTS = st.lists(st.integers(0, 400), max_size=8)


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    out = b""
    for piece in draw(st.lists(st.binary(min_size=1, max_size=40), max_size=4)):
        size = draw(st.sampled_from([b"%x", b"%X", b"000%x"])) % len(piece)
        extension = draw(st.sampled_from([b"", b";a", b";a=b", b';a="b;c"', b"; a = b "]))
        out += size + extension + b"\r\n" + piece + b"\r\n"
    trailers = draw(st.lists(st.tuples(NAMES, VALUES), max_size=2))
    return out + b"0\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in trailers) + b"\r\n"


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """A correct answer, mostly: also with what a server may do, but rarely does."""
    out = b""
    for status in draw(st.lists(st.sampled_from([100, 102, 103]), max_size=2)):
        out += b"HTTP/1.1 %d\r\n" % status + draw(st.sampled_from([b"", b"link: </a>\r\n"])) + b"\r\n"
    version = draw(st.sampled_from([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"]))
    status = draw(st.sampled_from([200, 201, 204, 205, 206, 301, 304, 400, 404, 500, 503, 599, 999]))
    reason = draw(st.sampled_from([b" OK", b"", b" ", b" Not Found", b" a\tb"]))
    lines = [version + b" %d" % status + reason]
    lines += [name + b":" + space + value for name, value, space in draw(
        st.lists(st.tuples(NAMES, VALUES, st.sampled_from([b"", b" ", b"  ", b"\t"])), max_size=4)
    )]  # fmt: skip
    lines += draw(st.sampled_from([[], [], [b"Connection: close"], [b"connection: Keep-Alive"], [b"connection: x, close"]]))
    framing = draw(st.sampled_from(["length", "chunked", "close", "none"]))
    body = draw(BODIES)
    if framing == "length":
        lines.insert(draw(st.integers(1, len(lines))), b"Content-Length: %d" % len(body))
    elif framing == "chunked":
        lines.insert(
            draw(st.integers(1, len(lines))), draw(st.sampled_from([b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED"]))
        )
        body = draw(chunked())
    elif framing == "none":
        body = b""
    return out + b"\r\n".join(lines) + b"\r\n\r\n" + body


WEIRD = [
    b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b"\x00", b"\x0b", b"\x7f", b"\x80", b":", b";", b",", b"0", b"-", b"+", b"_", b"x",
    b"\r\n ", b"\r\ncontent-length: 3", b"\r\ncontent-length: 0", b"\r\nContent-Length: 2, 2", b"\r\ntransfer-encoding: chunked",
    b"\r\ntransfer-encoding: identity", b"\r\nTransfer-Encoding: chunked, chunked", b"\r\nTransfer-Encoding : chunked",
    b"HTTP/1.1 200 OK\r\n\r\n", b"0\r\n\r\n", b"1_0", b"0x1", b"ffffffffffffffff", b"10000000000000000", b"HTTP/0.9", b"HTTP/2.0",
]  # fmt: skip
EDITS = st.lists(
    st.tuples(st.sampled_from(["insert", "replace", "delete", "repeat"]), st.integers(0, 400), st.sampled_from(WEIRD)), max_size=3
)


def edited(data: bytes, edits: list[tuple[str, int, bytes]]) -> bytes:
    for kind, where, what in edits:
        at = where % (len(data) + 1)
        if kind == "insert":
            data = data[:at] + what + data[at:]
        elif kind == "replace":
            data = data[:at] + what + data[at + len(what) :]
        elif kind == "delete":
            data = data[:at] + data[at + 1 + where % 3 :]
        else:
            data = data[:at] + data[max(0, at - 8) : at] + data[at:]
    return data


SAME = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@settings(SAME, max_examples=600)
@given(METHODS, answers(), CUTS)
def test_correct_answers_mean_the_same_wherever_they_are_cut(method: str, data: bytes, cuts: list[int]) -> None:
    """Framing by length, chunks, the end of the connection or the method; interim answers, trailers, odd but legal spacing."""
    check(method, data, cuts)


@settings(SAME, max_examples=1500)
@given(METHODS, answers(), EDITS, CUTS)
def test_mutilated_answers_are_never_read_more_freely(method: str, data: bytes, edits: Any, cuts: list[int]) -> None:
    """Whatever is accepted means what h11 says; whatever only we refuse has its class and reason."""
    check(method, edited(data, edits), cuts)


@settings(SAME, max_examples=400)
@given(
    METHODS,
    st.lists(st.sampled_from([b"HTTP/1.1 200 OK", b"HTTP/1.0 200", b"a: b", b"content-length: 2", *WEIRD]), max_size=12),
    CUTS,
)
def test_messages_of_scraps_are_never_read_more_freely(method: str, scraps: list[bytes], cuts: list[int]) -> None:
    """Further from anything correct than an edit comes."""
    check(method, b"\r\n".join(scraps) + b"\r\n\r\nok", cuts)
    check(method, b"".join(scraps), cuts)


@settings(SAME, max_examples=250)
@given(METHODS, answers(), EDITS, CUTS)
def test_the_pieces_make_no_difference(method: str, data: bytes, edits: Any, cuts: list[int]) -> None:
    """One byte at a time, in pieces, or at once: the same answer, the same refusal. Only bytes too many are seen later in pieces."""
    data = edited(data, edits)
    marks = sorted({0, *(min(cut, len(data)) for cut in cuts), len(data)})
    whole = ours(method, [data], has_end=True)
    for pieces in ([data[n : n + 1] for n in range(len(data))], [data[a:b] for a, b in itertools.pairwise(marks)]):
        cut = ours(method, pieces, has_end=True)
        assert (cut.message, cut.is_whole, bool(cut.error)) == (whole.message, whole.is_whole, bool(whole.error)), data
        assert cut.is_reusable == whole.is_reusable, data


# ------------------------------------------------------------------ the classes

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"transfer-encoding: chunked\r\n\r\n"
EXAMPLES = [
    ("ends in LF without CR", OK + b"a: b\ncontent-length: 0\r\n\r\n"),
    ("more than one content-length", OK + b"content-length: 2\r\ncontent-length: 2\r\n\r\nok"),
    ("not a plain decimal number", OK + b"content-length: 2, 2\r\n\r\nok"),
    ("both content-length and transfer-encoding", OK + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("HTTP/1.0 answer has a transfer-encoding", b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("head of the answer is malformed", OK + b"a: b\r\n c\r\ncontent-length: 0\r\n\r\n"),
    ("head of the answer is malformed", OK + b"a: b\x01c\r\ncontent-length: 0\r\n\r\n"),
    ("trailers are malformed", CHUNKS + b"0\r\na: b\r\n c\r\n\r\n"),
    ("size is not a hexadecimal number", CHUNKS + b"2 \r\nok\r\n0\r\n\r\n"),
    ("size has more than 16 digits", CHUNKS + b"00000000000000002\r\nok\r\n0\r\n\r\n"),
    ("extension holds a control character", CHUNKS + b"2;\x01\r\nok\r\n0\r\n\r\n"),
    ("does not end in CR LF", CHUNKS + b"2;a\rb\r\nok\r\n0\r\n\r\n"),
    ("too many interim", b"HTTP/1.1 103\r\n\r\n" * 17 + OK + b"content-length: 0\r\n\r\n"),
    ("more than 100 header fields", OK + b"a: b\r\n" * 100 + b"content-length: 0\r\n\r\n"),
    ("more than 100 trailer fields", CHUNKS + b"0\r\n" + b"a: b\r\n" * 101 + b"\r\n"),
    ("chunk extensions of one body exceed", CHUNKS + (b"2;" + b"a" * 9000 + b"\r\nok\r\n") * 2 + b"0\r\n\r\n"),
    ("exceeds 60 KiB", OK + b"a: " + b"b" * 61_440 + b"\r\ncontent-length: 0\r\n\r\n"),
    ("exceed 60 KiB", CHUNKS + b"0\r\na: " + b"b" * 61_440 + b"\r\n\r\n"),
    ("framing among the trailers", CHUNKS + b"2\r\nok\r\n0\r\ncontent-length: +1\r\n\r\n"),
    ("HTTP/1.0 with keep-alive", b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok"),
]


@pytest.mark.parametrize(("phrase", "data"), EXAMPLES, ids=[f"{n} {phrase}" for n, (phrase, _) in enumerate(EXAMPLES)])
def test_each_class_of_difference_is_real(phrase: str, data: bytes) -> None:
    """A line in the tables without an example would excuse what nobody has seen."""
    assert check("GET", data) == phrase
    assert check("GET", data, range(len(data))) == phrase


def test_no_class_is_without_an_example() -> None:
    """The tables and the examples are of the same classes."""
    assert {phrase for phrase, _ in EXAMPLES} == {*STRICTER, *WIDER}


@pytest.mark.parametrize(
    "data",
    [
        OK + b"content-length: 3\r\n\r\nok",
        CHUNKS + b"2\r\nok\r\n",
        CHUNKS + b"2\r\nok\r\n0\r\n",
        OK + b"content-le",
        b"",
    ],
)
def test_what_is_cut_off_is_whole_for_nobody(data: bytes) -> None:
    """The end of the connection ends only the body whose length nobody said."""
    mine, other = ours("GET", [data] if data else [], has_end=True), theirs("GET", [data] if data else [], has_end=True)
    assert (bool(mine.error), mine.is_whole, other.is_whole) == (True, False, False)


# ------------------------------------------------------------------ requests

TEXT = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=12)
BYTES = st.one_of(VALUES, st.binary(max_size=12))


@settings(SAME, max_examples=1200)
@given(
    st.one_of(METHODS, st.sampled_from(["PATCH", "PUT", "M-SEARCH", "get"]), TEXT),
    st.one_of(st.sampled_from(["/", "/a?b=c", "*", "/%20", "http://h/"]), TEXT),
    st.lists(st.tuples(st.one_of(NAMES, st.binary(max_size=8)), BYTES), max_size=4),
    st.one_of(st.none(), st.binary(max_size=40), st.lists(st.binary(max_size=20), max_size=4)),
)
def test_what_is_written_is_exactly_one_request(method: str, target: str, headers: Headers, body: Any) -> None:
    """Or nothing is: whatever comes from a user can't end a header, begin another one, or another request."""
    wire = core.HttpConnection(None, "", "orders:80")
    wire.open()
    fields = [HOST, *headers]
    try:
        if isinstance(body, list):
            data = wire.send(method, target, fields, None, True)
            data += b"".join(wire.send_body(piece, False) for piece in body) + wire.send_body(b"", True)
        else:
            data = wire.send(method, target, fields, body, False)
    except (ValueError, UnicodeEncodeError):
        assert (wire.pending(), wire.is_idle, wire.has_written) == (b"", True, False)
        return
    server = h11.Connection(h11.SERVER)
    server.receive_data(data)
    request = server.next_event()
    assert isinstance(request, h11.Request), data
    sent = b""
    while isinstance(event := server.next_event(), h11.Data):
        sent += event.data
    assert isinstance(event, h11.EndOfMessage), data
    assert (bytes(request.method), bytes(request.target)) == (method.encode(), target.encode())
    assert sent == (b"".join(body) if isinstance(body, list) else body or b"")
    own = [(bytes(n), bytes(v)) for n, v in request.headers if bytes(n) not in (b"content-length", b"transfer-encoding")]
    assert own == [
        (name.lower(), value.strip(b" \t"))
        for name, value in fields
        if name.lower() not in (b"content-length", b"transfer-encoding")
    ]
    assert len([n for n, _ in request.headers if bytes(n) in (b"content-length", b"transfer-encoding")]) <= 1
    assert server.trailing_data == (b"", False), data
