"""What does a peer cost us that wants us to work for nothing? The floods of HTTP/2 (area dos), and what it can smuggle.

HTTP/2 in the process has two sides. Our own is the caller's: a scripted server over memory floods it, and what it says last is looked at. The
servers are grpcio's, whose answer to a flood isn't ours to choose; there a flood comes over a socket, and another caller must be served
meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import struct
import time
from typing import Any

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import httpx

import meshlib
from meshlib._native import core
from meshlib.errors import MeshError
from tests.secure.cases import ground, grpc_ground, wires
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE

OPEN = {"allow": [ANYONE]}
MIB = 1024 * 1024


# ------------------------------------------------------------------------------------------------ HTTP/2


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


_NAMES = {code.value: code.name for code in h2.errors.ErrorCodes}
_BOMB = b"\x40\x01x\x7f\xa1\x1e" + b"y" * 4000  # 4000 bytes into the table of headers, to be named again and again
_HEAD = frame(1, 0, 1, b"\x88")
# Each is a server's, after one request of ours on stream 1.
_FLOODS: tuple[tuple[tuple[str, ...], bytes], ...] = (
    (("continuation",), _HEAD + frame(9, 0, 1, b"\x00\x01a\x01b") * 10_000),
    (("empty data", "empty-data", "zero-length data", "0-length data"), frame(1, 4, 1, b"\x88") + frame(0, 0, 1, b"") * 20_000),
    (("hpack", "dynamic table", "header bomb", "amplification"), frame(1, 4, 1, b"\x88" + _BOMB + b"\xbe" * 10_000)),
    (("settings",), frame(4, 0, 0, b"") * 20_000),
    (("ping",), frame(6, 0, 0, bytes(8)) * 20_000),
    (("priority",), frame(2, 0, 1, b"\0\0\0\0\1") * 20_000),
    (("push",), frame(5, 4, 1, struct.pack(">I", 2) + b"\x82\x86\x84")),
    (("empty header", "headers without", "0-length header", "zero-length header"), frame(1, 4, 1, b"\x88" + b"\x00\x00\x00" * 200)),
    (("goaway",), frame(7, 0, 0, struct.pack(">II", 0, 0)) * 1000),
    (("unknown frame", "extension frame"), frame(0xFA, 0, 1, b"x" * 10) * 20_000),
    (("unknown stream", "idle stream"), frame(1, 4, 99, b"\x88")),
    (("large frame", "frame size", "oversize"), frame(0, 0, 1, bytes(70_000))),
    (("header list", "large header", "header block", "header field"), frame(1, 0, 1, b"\x88") + frame(9, 0, 1, b"\x00\x01a\x7f\x81\x7f" + b"b" * 16_256) * 40),
    (("window overflow", "overflow", "2^31"), frame(8, 0, 0, struct.pack(">I", 0x7FFFFFFF)) * 2),
    (("garbage", "malformed"), frame(1, 4, 1, b"\xff\xff\xff\xff\xff\xff")),
)  # fmt: skip


class Pair:
    """Our side of HTTP/2 as a caller, and a scripted server, over memory."""

    def __init__(self) -> None:
        config = h2.config.H2Configuration(
            client_side=False, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.peer = h2.connection.H2Connection(config)
        self.wire = core.HttpConnection(None, "", "svc:80", "h2")
        self.events: list[Any] = []
        self.said = b""
        hello = self.wire.open()
        self.peer.initiate_connection()
        self.peer.receive_data(hello)
        greeting = self.peer.data_to_send()
        # The agreement comes by itself; what belongs to streams begins behind it.
        out, _ = self.wire.receive(greeting, len(greeting))
        self.carry(out)

    def receive(self, data: bytes) -> bytes:
        out, pairs = self.wire.receive_streams(data, len(data))
        self.events += pairs
        self.said += out
        return out

    def carry(self, out: bytes) -> None:
        """Both ways, until nobody has any more to say."""
        while True:
            if out:
                self.peer.receive_data(out)
            data = self.peer.data_to_send()
            if not data:
                return
            out = self.receive(data)

    def ask(self) -> int:
        stream, out = self.wire.open_stream("GET", "/", [(b"host", b"svc")], None, False)
        self.carry(out)
        return stream

    def words(self) -> set[str]:
        """The last words of ours, and what it means for whoever asked."""
        found: set[str] = set()
        place = 0
        while place + 9 <= len(self.said):
            size, kind = int.from_bytes(self.said[place : place + 3], "big"), self.said[place + 3]
            payload = self.said[place + 9 : place + 9 + size]
            if kind == 7:
                name = _NAMES.get(int.from_bytes(payload[4:8], "big"), "?")
                found |= {"GOAWAY", f"GOAWAY({name})", name, "connection_error", "close", "abort"}
            elif kind == 3:
                found |= {"stream_error", "RST_STREAM", "reject", "reset"}
            place += 9 + size
        if any(event[0] == core.EVENT_RESET for _, event in self.events):
            found |= {"stream_error", "reject", "abort"}
        if (0, (core.EVENT_CLOSED,)) in self.events:
            found.add("close")
        return found


def http2(case: Case, words: str) -> Answer:
    by_us = ("madeyoureset", "made you reset", "server-caused", "self-caused", "caused reset")
    if "window" in words and not any(part in words for part in ("overflow", "2^31", *by_us)):
        return asyncio.run(_dribbled())
    if any(part in words for part in ("settings_initial", "dribble", "stall")):
        return asyncio.run(_dribbled())
    if any(part in words for part in ("max_concurrent", "concurrent streams")):
        return _too_many_streams()
    if any(part in words for part in by_us):
        found = _made_to_reset()
    elif any(part in words for part in ("rst", "reset")):
        found = _reset_by_the_peer()
    elif re.search(r"10[01]\d* (fields|headers)|\d{3,} (fields|headers)", words):
        found = _many_fields()
    else:
        flood = next((flood for hints, flood in _FLOODS if any(hint in words for hint in hints)), None)
        if flood is None:
            raise not_understood(case)
        found = _flooded(flood)
    return found if _others_are_served(words) else {"starved"}


def _flooded(flood: bytes) -> set[str]:
    pair = Pair()
    pair.ask()
    for place in range(0, len(flood), 65536):
        pair.receive(flood[place : place + 65536])
    return pair.words()


def _reset_by_the_peer() -> set[str]:
    """A server that takes each of our requests, and resets it."""
    pair = Pair()
    for _ in range(10_000):
        if not pair.wire.streams_left:
            break
        with contextlib.suppress(Exception):
            pair.peer.reset_stream(pair.ask(), h2.errors.ErrorCodes.CANCEL)
            pair.carry(b"")
    pair.said += pair.wire.pending()
    return pair.words()


def _made_to_reset() -> set[str]:
    """Answers so wrong that we reset each of their streams."""
    pair = Pair()
    for _ in range(10_000):
        if not pair.wire.streams_left:
            break
        stream = pair.ask()
        pair.receive(frame(8, 0, stream, bytes(4)))
        with contextlib.suppress(Exception):
            pair.carry(b"")
    pair.said += pair.wire.pending()
    return pair.words()


def _many_fields() -> set[str]:
    pair = Pair()
    stream = pair.ask()
    pair.peer.send_headers(stream, [(":status", "200"), *((f"x-{number}", "1") for number in range(101))], end_stream=True)
    pair.carry(b"")
    return {*pair.words(), "431"}


def _too_many_streams() -> set[str]:
    """More streams than we allow ourselves, whatever the peer offers."""
    pair = Pair()
    pair.peer.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 10_000_000})
    pair.carry(b"")
    begun = 0
    while pair.wire.streams_left and begun < 2000:
        pair.ask()
        begun += 1
    return {"bounded", "bounded_memory", "REFUSED_STREAM", "limited"} if begun <= 1000 else {"unbounded"}


async def _dribbled() -> set[str]:
    """A server that gives windows of a byte, or none: a call that uploads ends with its deadline."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        connection.local_settings = h2.settings.Settings(
            client=False, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1}
        )
        connection.initiate_connection()
        writer.write(connection.data_to_send())
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(65536):
                connection.receive_data(data)
                writer.write(connection.data_to_send())

    async with wires._mesh_to(serve, protocol="http2", deadline="300ms") as (mesh, _), mesh.client() as http:
        begun = time.monotonic()
        try:
            await http.post("http://other/", content=b"x" * 100_000)
        except meshlib.DeadlineExceeded:
            return {"timeout", "close", "abort"} if time.monotonic() - begun < 5 else {"late"}
        except (MeshError, httpx.HTTPError) as error:
            return {type(error).__name__}
    return {"accept"}


REQUEST = [
    (":method", "POST"),
    (":scheme", "https"),
    (":path", "/a.B/C"),
    (":authority", "svc.local"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


def _others_are_served(words: str) -> bool:
    """The same kind of flood to a gRPC server; another caller is answered while it lasts."""
    port = grpc_ground.port_of(ground.document(own=OPEN, service={"protocol": "grpc", "discover": {"static": ["127.0.0.1:1"]}}))
    flooder, other = grpc_ground.Raw(port), grpc_ground.Raw(port)
    try:
        flood = _flood_of_a_client(words, flooder)
        flooder.sock.settimeout(1)
        with contextlib.suppress(OSError):
            flooder.sock.sendall(flood)
        begun = time.monotonic()
        answer = other.call("/a.B/C")
        return answer.status == "OK" and time.monotonic() - begun < 3
    finally:
        flooder.close()
        other.close()


def _flood_of_a_client(words: str, raw: grpc_ground.Raw) -> bytes:
    head = raw.h2.encoder.encode(REQUEST)
    if "continuation" in words:
        return frame(1, 0, 1, head) + frame(9, 0, 1, b"\x00\x03x-a\x03abc" * 10) * 2000
    if "data" in words:
        return frame(1, 4, 1, head) + frame(0, 0, 1, b"") * 5000
    if "ping" in words:
        return frame(6, 0, 0, bytes(8)) * 5000
    if "settings" in words:
        return frame(4, 0, 0, b"") * 5000
    flood = b""
    for number in range(1000):
        flood += frame(1, 4, 1 + 2 * number, head if number == 0 else raw.h2.encoder.encode(REQUEST)) + frame(
            3, 0, 1 + 2 * number, struct.pack(">I", 8)
        )
    return flood


def smuggled(case: Case, words: str) -> Answer:
    """What HTTP/2 says of a body or a header and HTTP/1.1 can't carry: in an answer to us."""
    pair = Pair()
    bad, good = pair.ask(), pair.ask()
    headers, body = [(":status", "200")], b"abc"
    length = re.search(r"content-length:?\s*([+\-\w]+)", words)
    if length is not None:
        headers.append(("content-length", length[1]))
        size = re.search(r"data\s+(\d+)", words)
        body = b"a" * int(size[1]) if size else body
    elif "transfer-encoding" in words:
        headers.append(("transfer-encoding", "chunked"))
    elif "connection" in words or "keep-alive" in words or "hop-by-hop" in words or "upgrade" in words:
        headers.append(("connection", "close"))
    elif "upper" in words or "capital" in words:
        headers.append(("X-Upper", "1"))
    elif "colon" in words:
        headers.append(("x:y", "1"))
    elif any(part in words for part in ("crlf", "\\r\\n", "newline", "cr in", "lf in")):
        headers.append(("x", "a\r\nx-admin: 1"))
    elif "nul" in words or "\\x00" in words or "\\0" in words:
        headers.append(("x", "a\x00b"))
    elif "space" in words:
        headers.append(("x y", "1"))
    elif "pseudo" in words or ":path" in words or ":method" in words or ":authority" in words:
        headers.append((":path", "/admin"))
    elif "status" in words:
        headers = [(":status", "200"), (":status", "204")]
    elif "te:" in words or "te header" in words:
        headers.append(("te", "gzip"))
    else:
        raise not_understood(case)
    pair.peer.send_headers(bad, headers)
    with contextlib.suppress(Exception):
        pair.peer.send_data(bad, body, end_stream=True)
    with contextlib.suppress(Exception):
        pair.carry(b"")
    ended = [event for stream, event in pair.events if stream == bad]
    if not ended or ended[-1][0] != core.EVENT_RESET:
        return {"accept"}
    found = {"stream_error", "400", "reject", "RST_STREAM"} | pair.words()
    is_alive = pair.wire.is_open
    with contextlib.suppress(Exception):
        pair.peer.send_headers(good, [(":status", "204")], end_stream=True)
        pair.carry(b"")
    return found - (set() if not is_alive else {"close"})
