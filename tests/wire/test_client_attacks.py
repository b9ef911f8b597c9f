"""What can a server do to us with its answers?

Smuggling: an answer that two readers understand differently makes the next call get somebody else's answer. Exhaustion: a head, a body or a
handful of small messages without end. So each attack is given to the state machine in several cuts, and the worst go through the whole
client against a raw server: the answer is refused or its connection is not used again, what it costs is bounded, and the next call
gets its own answer. A file of attack cases from elsewhere is run too if it lies beside, or MESHLIB_ATTACK_CASES names one. HTTP/2 has tests of its own.
"""

from __future__ import annotations

import asyncio
import gc
import gzip
import json
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from meshlib import errors
from meshlib._native import core
from tests.chaos.elsewhere import at, in_flight, listening, sockets
from tests.support import mesh_of

HOST = (b"host", b"orders")
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKS = OK + b"transfer-encoding: chunked\r\n\r\n"
MIB = 1024 * 1024

# Each can't be read, or can be read in two ways; none may be read at all.
REFUSED = {
    "length and chunks": OK + b"content-length: 6\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nG",
    "chunks and length": OK + b"transfer-encoding: chunked\r\ncontent-length: 6\r\n\r\n0\r\n\r\nG",
    "two lengths": OK + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "two equal lengths": OK + b"content-length: 1\r\nContent-Length: 1\r\n\r\na",
    "a list of lengths": OK + b"content-length: 1, 1\r\n\r\na",
    "a signed length": OK + b"content-length: +1\r\n\r\na",
    "a negative length": OK + b"content-length: -1\r\n\r\na",
    "a hexadecimal length": OK + b"content-length: 0x1\r\n\r\na",
    "a length with an underscore": OK + b"content-length: 1_0\r\n\r\n0123456789",
    "a length with a fraction": OK + b"content-length: 1.0\r\n\r\na",
    "an empty length": OK + b"content-length: \r\n\r\na",
    "a length beyond 64 bits": OK + b"content-length: 18446744073709551617\r\n\r\na",
    "a length in other digits": OK + "content-length: \u0661".encode() + b"\r\n\r\na",
    "a coding with a vertical tab": OK + b"transfer-encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked twice in a list": OK + b"transfer-encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": OK + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity": OK + b"transfer-encoding: identity\r\n\r\na",
    "another coding under chunked": OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": OK + b"transfer-encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": OK + b"content-length : 1\r\n\r\na",
    "a tab before the colon": OK + b"content-length\t: 1\r\n\r\na",
    "a folded value": OK + b"x-role: user\r\n admin\r\ncontent-length: 0\r\n\r\n",
    "a folded length": OK + b"content-length:\r\n 1\r\n\r\na",
    "a space before the first name": OK + b" x: y\r\ncontent-length: 0\r\n\r\n",
    "NUL in a value": OK + b"x-role: ad\x00min\r\ncontent-length: 0\r\n\r\n",
    "NUL in a name": OK + b"x-r\x00ole: admin\r\ncontent-length: 0\r\n\r\n",
    "DEL in a value": OK + b"x-role: a\x7f\r\ncontent-length: 0\r\n\r\n",
    "a bare CR in a value": OK + b"x-role: user\rx-admin: 1\r\ncontent-length: 0\r\n\r\n",
    "a bare LF in a value": OK + b"x-role: user\nx-admin: 1\r\ncontent-length: 0\r\n\r\n",
    "a bare LF ends the head": OK + b"content-length: 0\r\n\n",
    "bare LF everywhere": b"HTTP/1.1 200 OK\ncontent-length: 0\n\n",
    "no colon": OK + b"content-length 1\r\n\r\na",
    "an empty name": OK + b": 1\r\n\r\na",
    "a name in other letters": OK + "c\u00f6ntent: 1".encode() + b"\r\n\r\na",
    "an empty line first": b"\r\n" + OK + b"content-length: 0\r\n\r\n",
    "a space first": b" " + OK + b"content-length: 0\r\n\r\n",
    "a body before the answer": b"ok" + OK + b"content-length: 0\r\n\r\n",
    "HTTP/0.9": b"<html>hello</html>",
    "another version": b"HTTP/2.0 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a version without digits": b"HTTP/x.y 200 OK\r\ncontent-length: 0\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n",
    "a status below 100": b"HTTP/1.1 099 OK\r\ncontent-length: 0\r\n\r\n",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 0\r\n\r\n",
    "a signed status": b"HTTP/1.1 +20 OK\r\ncontent-length: 0\r\n\r\n",
    "a CR in the reason": b"HTTP/1.1 200 O\rK\r\ncontent-length: 0\r\n\r\n",
    "TLS where none is": b"\x16\x03\x03\x00\x7a" + b"\x02" * 122,
    "an upgrade that nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "a chunk without its end": CHUNKS + b"1\r\nAXX0\r\n\r\n",
    "a chunk that ends in LF": CHUNKS + b"1\r\nA\n0\r\n\r\n",
    "a chunk's size that ends in LF": CHUNKS + b"1\nA\r\n0\r\n\r\n",
    "a size with 0x": CHUNKS + b"0x1\r\nA\r\n0\r\n\r\n",
    "a signed size": CHUNKS + b"+1\r\nA\r\n0\r\n\r\n",
    "a negative size": CHUNKS + b"-1\r\nA\r\n0\r\n\r\n",
    "a size with an underscore": CHUNKS + b"1_0\r\nA\r\n0\r\n\r\n",
    "a space before the size": CHUNKS + b" 1\r\nA\r\n0\r\n\r\n",
    "a space behind the size": CHUNKS + b"1 \r\nA\r\n0\r\n\r\n",
    "an empty size": CHUNKS + b"\r\nA\r\n0\r\n\r\n",
    "a size beyond 64 bits": CHUNKS + b"10000000000000001\r\nA\r\n0\r\n\r\n",
    "a CR in an extension": CHUNKS + b"1;a\rb\r\nA\r\n0\r\n\r\n",
    "a LF in an extension": CHUNKS + b"1;a\nb\r\nA\r\n0\r\n\r\n",
    "NUL in an extension": CHUNKS + b"1;\x00\r\nA\r\n0\r\n\r\n",
    "a folded trailer": CHUNKS + b"0\r\nx: a\r\n b\r\n\r\n",
    "NUL in a trailer": CHUNKS + b"0\r\nx: \x00\r\n\r\n",
    "a LF in a trailer": CHUNKS + b"0\r\nx: a\n\r\n\r\n",
    "101 fields": OK + b"a: b\r\n" * 101 + b"\r\n",
    "101 trailers": CHUNKS + b"0\r\n" + b"a: b\r\n" * 101 + b"\r\n",
    "17 interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 17 + OK + b"content-length: 0\r\n\r\n",
    "an interim answer of two kinds": b"HTTP/1.1 100 C\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
}
# These are read, and the connection is not used again: more came than was asked for.
NOT_REUSED = {
    "an answer too many": OK + b"content-length: 2\r\n\r\nok" + OK + b"content-length: 6\r\n\r\npoison",
    "an answer too many behind chunks": CHUNKS + b"2\r\nok\r\n0\r\n\r\n" + OK + b"content-length: 6\r\n\r\npoison",
    "an answer too many behind none": b"HTTP/1.1 204 No Content\r\n\r\n" + OK + b"content-length: 6\r\n\r\npoison",
    "a body behind 204": b"HTTP/1.1 204 No Content\r\ncontent-length: 6\r\n\r\npoison",
    "a body behind 304": b"HTTP/1.1 304 Not Modified\r\ncontent-length: 6\r\n\r\npoison",
    "one byte too many": OK + b"content-length: 2\r\n\r\nok\n",
}


def asked(method: str = "GET") -> core.HttpConnection:
    wire = core.HttpConnection(None, "", "orders:80")
    wire.open()
    wire.send(method, "/", [HOST], None, False)
    return wire


def cuts(data: bytes) -> Iterator[list[bytes]]:
    """At once, a byte at a time, and in two at each of some places."""
    yield [data]
    yield [data[n : n + 1] for n in range(len(data))]
    for where in range(1, min(len(data), 120), 7):
        yield [data[:where], data[where:]]


def given(wire: core.HttpConnection, pieces: list[bytes]) -> list[tuple[Any, ...]]:
    return [event for piece in pieces for event in wire.receive(piece, len(piece))[1]]


@pytest.mark.parametrize("attack", REFUSED)
def test_an_answer_that_could_be_read_in_two_ways_is_refused(attack: str) -> None:
    """However it is cut: nothing whole is made of it, and the connection is over."""
    for pieces in cuts(REFUSED[attack]):
        wire = asked()
        whole = []
        with pytest.raises(errors.ProtocolError) as caught:
            for piece in pieces:
                whole += [e for e in wire.receive(piece, len(piece))[1] if e[0] in (core.EVENT_RESPONSE, core.EVENT_END)]
        assert (whole, wire.is_open, wire.is_idle) == ([], False, False)
        assert str(caught.value).startswith("orders:80: ")
        with pytest.raises(errors.ConnectionLost):
            wire.send("GET", "/", [HOST], None, False)


@pytest.mark.parametrize("attack", NOT_REUSED)
def test_bytes_that_nobody_asked_for_end_the_connection(attack: str) -> None:
    """However they are cut: the answer counts, what follows it never does."""
    for pieces in cuts(NOT_REUSED[attack]):
        wire = asked()
        events = given(wire, pieces)
        assert (wire.is_idle, wire.is_open) == (False, False), pieces
        assert b"poison" not in b"".join(
            e[5] if e[0] == core.EVENT_RESPONSE else e[1] for e in events if e[0] in (core.EVENT_RESPONSE, core.EVENT_BODY)
        )
        assert sum(e[0] in (core.EVENT_RESPONSE, core.EVENT_HEAD) for e in events) == 1


def test_a_body_behind_the_answer_to_head_ends_the_connection() -> None:
    """The length is that of the answer to GET; a body that comes all the same belongs to nobody."""
    wire = asked("HEAD")
    (event,) = given(wire, [OK + b"content-length: 6\r\n\r\npoison"])
    assert (event[0], event[5], event[6], wire.is_idle) == (core.EVENT_RESPONSE, b"", False, False)


@pytest.mark.parametrize("status", [413, 417, 200])
def test_an_answer_that_comes_before_the_body_was_sent_ends_the_connection(status: int) -> None:
    """`Expect: 100-continue` that was answered otherwise: what we still send would be read as the next request."""
    wire = core.HttpConnection(None, "", "orders:80")
    wire.open()
    wire.send("POST", "/", [HOST, (b"expect", b"100-continue"), (b"content-length", b"100")], None, True)
    (event,) = given(wire, [b"HTTP/1.1 %d X\r\ncontent-length: 0\r\n\r\n" % status])
    assert (event[0], event[1], event[6], wire.is_idle) == (core.EVENT_RESPONSE, status, False, False)
    assert wire.send_body(b"GET /admin HTTP/1.1\r\n\r\n", False) == b""


# ------------------------------------------------------------------ what it may cost


def taken(wire: core.HttpConnection, first: bytes, again: bytes, most: int) -> int:
    """How many bytes an endless answer brings in before it is refused."""
    total = len(first)
    wire.receive(first, len(first))
    while total < most:
        wire.receive(again, len(again))
        total += len(again)
    return total


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (OK, b"x-a: b\r\n"),
        (OK + b"x-a: ", b"b" * 1000),
        (b"HTTP/1.1 200 ", b"O" * 1000),
        (b"HTTP/1.1 103 Early Hints\r\n", b"link: </a>\r\n"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKS + b"1;", b"a" * 1000),
        (CHUNKS + b"1;aaaa\r\nA\r\n", b"1;aaaa\r\nA\r\n"),
        (CHUNKS, b"0" * 1000),
        (CHUNKS + b"0\r\n", b"x-a: b\r\n"),
        (CHUNKS + b"0\r\nx-a: ", b"b" * 1000),
    ],
    ids=lambda part: repr(part[:30]),
)
def test_nothing_but_a_body_is_read_without_end(first: bytes, again: bytes) -> None:
    """Heads, interim answers, chunk extensions and trailers are refused within 64 KiB (extensions are 16 KiB, and ride on chunks)."""
    wire = asked()
    with pytest.raises(errors.ProtocolError):
        taken(wire, first, again, 128 * 1024)
        raise AssertionError("never refused")
    assert not wire.is_open


def test_a_head_that_comes_byte_by_byte_costs_no_more_than_its_bytes() -> None:
    """60 KiB in single bytes: each is looked at once. Quadratic work would take minutes and run into the test's timeout."""
    for _ in range(5):
        wire = asked()
        given(wire, [OK])
        with pytest.raises(errors.ProtocolError):
            for _ in range(70_000):
                wire.receive(b"a", 1)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (CHUNKS + b"ffffffffffffffff\r\n", b"x" * 65536),
        (OK + b"content-length: 9223372036854775807\r\n\r\n", b"x" * 65536),
        (CHUNKS, b"1\r\na\r\n" * 8192),
        (OK + b"\r\n", b"x" * 65536),
    ],
    ids=["huge chunk", "huge length", "tiny chunks", "no end"],
)
def test_a_body_is_passed_on_and_never_kept(head: bytes, piece: bytes) -> None:
    """An announced size is not allocated, and a gigabyte of pieces leaves nothing behind."""
    wire = asked()
    given(wire, [head])
    for _ in range(50):
        wire.receive(piece, len(piece))
    gc.collect()
    before = resident()
    for _ in range(2000):
        wire.receive(piece, len(piece))
    gc.collect()
    assert resident() - before < 2 * MIB


# ------------------------------------------------------------------ through the client

# Of each kind one, and those that were real attacks; the rest is the state machine's business.
THROUGH = [
    "length and chunks", "two lengths", "a folded value", "NUL in a value", "a bare CR in a value", "bare LF everywhere", "HTTP/0.9",
    "TLS where none is", "an upgrade that nobody asked for", "a chunk without its end", "a size beyond 64 bits", "101 fields",
    "17 interim answers",
]  # fmt: skip


class Raw:
    """A server that answers each connection's first request with the attack, and any other with its number."""

    def __init__(self, attack: bytes, most: int = 1) -> None:
        self.attack = attack
        self.attacks = most
        self.connections = 0
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            if self.attacks > 0:
                self.attacks -= 1
                writer.write(self.attack)
            else:
                writer.write(OK + b"content-length: 4\r\n\r\nfine")
            await writer.drain()


def calls(mesh: Any, kind: str, work: Callable[[Callable[[], httpx.Response]], None]) -> None:
    """Let `work` call, blocking or on a loop: both ways in one test's words."""
    if kind == "sync":
        with mesh.sync_client() as http:
            work(lambda: http.post("http://orders/"))
        return
    with asyncio.Runner() as runner:
        client = mesh.client() if kind == "async" else httpx.AsyncClient(transport=mesh.transport())
        try:
            work(lambda: runner.run(client.post("http://orders/")))
        finally:
            runner.run(client.aclose())


KINDS = ["async", "sync", "transport"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", THROUGH)
def test_an_attack_costs_its_call_and_its_connection(tmp_path: Path, attack: str, kind: str) -> None:
    """The call fails as httpx's RemoteProtocolError and is not repeated; the next one is answered on another connection."""
    raw = Raw(REFUSED[attack])
    with listening(raw.serve) as address, mesh_of(tmp_path, at(address)) as mesh:

        def work(call: Callable[[], httpx.Response]) -> None:
            with pytest.raises(httpx.RemoteProtocolError) as caught:
                call()
            assert isinstance(caught.value, errors.ProtocolError)
            assert in_flight(mesh) == 0
            assert call().content == b"fine"

        calls(mesh, kind, work)
        assert (raw.connections, raw.requests, in_flight(mesh)) == (2, 2, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", NOT_REUSED)
def test_the_next_call_never_gets_the_answer_too_many(tmp_path: Path, attack: str, kind: str) -> None:
    """Response splitting poisons nobody, whether the bytes come with the answer or while the connection waits."""
    raw = Raw(NOT_REUSED[attack])
    with listening(raw.serve) as address, mesh_of(tmp_path, at(address)) as mesh:

        def work(call: Callable[[], httpx.Response]) -> None:
            assert call().content in (b"ok", b"")
            assert [call().content for _ in range(3)] == [b"fine"] * 3

        calls(mesh, kind, work)
        assert (raw.connections, in_flight(mesh)) == (2, 0)


class Late:
    """A server whose first connection says something more when nobody has asked; `has_said` is set when it is on its way."""

    def __init__(self) -> None:
        self.connections = 0
        self.has_said = threading.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        is_first = self.connections == 1
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK + b"content-length: 4\r\n\r\nfine")
            if is_first:
                await asyncio.sleep(0.02)
                writer.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 6\r\n\r\npoison")
                await writer.drain()
                self.has_said.set()


@pytest.mark.parametrize("kind", ["client", "transport"])
async def test_a_late_answer_too_many_poisons_nobody(tmp_path: Path, kind: str) -> None:
    """It comes while the connection waits in the pool, as the 408 of a server that has waited long enough does."""
    late = Late()
    with listening(late.serve) as address, mesh_of(tmp_path, at(address)) as mesh:
        async with mesh.client() if kind == "client" else httpx.AsyncClient(transport=mesh.transport()) as http:
            assert (await http.post("http://orders/")).content == b"fine"
            await asyncio.to_thread(late.has_said.wait, 10)
            await asyncio.sleep(0.01)
            assert [(await http.post("http://orders/")).content for _ in range(3)] == [b"fine"] * 3
    assert late.connections == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_answer_too_many_poisons_nobody_who_was_busy(tmp_path: Path, kind: str) -> None:
    """It came while the caller computed, so that the loop has not heard of it yet when the next call takes the connection."""
    late = Late()
    with listening(late.serve) as address, mesh_of(tmp_path, at(address)) as mesh:

        def work(call: Callable[[], httpx.Response]) -> None:
            assert call().content == b"fine"
            assert late.has_said.wait(10)
            time.sleep(0.01)
            assert [call().content for _ in range(3)] == [b"fine"] * 3

        calls(mesh, kind, work)
    assert late.connections == 2


async def test_an_endless_body_that_nobody_reads_stays_with_its_sender(tmp_path: Path) -> None:
    """Backpressure: what isn't read is not taken in, so that neither side's memory grows."""
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"\r\n")
        while True:
            writer.write(b"x" * 65536)
            sent += 65536
            await writer.drain()

    with listening(serve) as address, mesh_of(tmp_path, at(address)) as mesh:
        async with mesh.client() as http:
            async with http.stream("GET", "http://orders/"):
                seen, same = -1, 0
                while same < 20:
                    await asyncio.sleep(0.01)
                    seen, same = sent, same + 1 if sent == seen else 0
                assert sent < 32 * MIB  # the kernel's buffers on both sides and ours
            assert in_flight(mesh) == 0
        while sockets():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_thousand_layers_of_compression_are_not_unpacked(tmp_path: Path, kind: str) -> None:
    """Each layer is an inflater of its own; nobody needs more than a few."""
    body = gzip.compress(b"x")
    attack = OK + b"content-encoding: " + b", ".join([b"gzip"] * 1000) + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    raw = Raw(attack)
    with listening(raw.serve) as address, mesh_of(tmp_path, at(address)) as mesh:

        def work(call: Callable[[], httpx.Response]) -> None:
            before = resident()
            with pytest.raises(httpx.HTTPError):
                call()
            assert resident() - before < 4 * MIB
            assert call().content == b"fine"

        calls(mesh, kind, work)
        assert in_flight(mesh) == 0


# ------------------------------------------------------------------ cases from elsewhere

BESIDE = Path(__file__).parents[2] / ".." / "shared" / "cases" / "attack_cases.jsonl"
CASES = Path(os.environ.get("MESHLIB_ATTACK_CASES", BESIDE))
# What of them concerns a client that reads HTTP/1.1 answers, and how an answer is made of it.
HEADERS = {"smuggling-003", "smuggling-005", "smuggling-007", "smuggling-009", "smuggling-015", "smuggling-017"}
BODIES = {"smuggling-011", "smuggling-013"}
TESTED_ABOVE = {
    "smuggling-001": "length and chunks",
    "smuggling-023": "an answer that comes before the body was sent",
    "smuggling-025": "the tests of cancellation",
    "dos-011": "101 fields",
    "dos-017": "a thousand layers",
    "dos-021": "tiny chunks",
}
NOT_OURS = {
    "smuggling-019": "a server's", "smuggling-021": "HTTP/2", "dos-001": "HTTP/2", "dos-003": "HTTP/2", "dos-005": "HTTP/2", "dos-007": "HTTP/2",
    "dos-009": "a server's", "dos-013": "a server's", "dos-015": "a reader of JSON", "dos-019": "a server's metrics", "dos-023": "gRPC",
}  # fmt: skip


def test_attack_cases_from_elsewhere_are_refused() -> None:
    """Those of smuggling and exhaustion that a client can meet; the rest are tested above, or not the client's."""
    if not CASES.is_file():
        pytest.skip("MESHLIB_ATTACK_CASES names no file of attack cases")
    found = [json.loads(line) for line in CASES.read_text().splitlines()]
    cases = {case["id"]: case["input"] for case in found if case["area"] in ("smuggling", "dos")}
    assert not {*HEADERS, *BODIES} & {*TESTED_ABOVE, *NOT_OURS}
    for name in (HEADERS | BODIES) & cases.keys():
        text = cases[name].encode().decode("unicode_escape").encode("latin-1")
        for pieces in cuts(CHUNKS + text if name in BODIES else OK + text + b"\r\n\r\nA"):
            wire = asked()
            with pytest.raises(errors.ProtocolError):
                given(wire, pieces)
            assert not wire.is_open
