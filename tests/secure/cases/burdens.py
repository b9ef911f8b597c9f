"""What does a peer cost us that sends too much, too little or for too long? Area dos; the floods of HTTP/2 are in `floods.py`.

Requests go to real servers over sockets, answers to our own client, messages to a real gRPC server. What grows is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import re
import resource
import struct
from typing import Any
from unittest import mock

import httpx

import meshlib
from meshlib._native import core
from meshlib.errors import MeshError
from tests.secure.cases import floods, ground, grpc_ground, servers, wires
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE, Request

OPEN = {"allow": [ANYONE]}
MIB = 1024 * 1024


def dos(case: Case) -> Answer:
    """The scenario that the keys and words of the input name."""
    given = case.given
    for name, adapter in _BY_KEY.items():
        if name in given:
            return adapter(case, str(given[name]).lower())
    for hints, adapter in _BY_WORD:
        if case.says(*hints):
            return adapter(case, case.prose)
    raise not_understood(case)


def _timeout(case: Case, words: str) -> Answer:
    """A time limit that can't be right: what a handler is left with."""
    value = str(case.given.get("grpc-timeout", case.given.get("timeout", words)))
    mesh = ground.mesh_of(ground.document(own=OPEN))
    left: list[float | None] = []

    async def handler() -> None:
        left.append(meshlib.remaining())

    seen = asyncio.run(ground.ask_async(mesh, Request(headers=[("grpc-timeout", value)]), handler))
    if not seen.reached:
        return {"reject", str(seen.status), *({"DEADLINE_EXCEEDED", "timeout"} if seen.status == 504 else set())}
    if left[0] is None:
        return {"ignore", "ignored", "reject"}
    return {"clamp", f"clamp:{left[0]:.0f}"} if 0 < left[0] <= 3600 else {"unbounded"}


def _number(words: str) -> int:
    found = re.search(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(k|m|g)?i?b?", words)
    return int(float(found[1]) * {"k": 1024, "m": MIB, "g": 1024 * MIB, None: 1}[found[2]]) if found else 0


def _headers(case: Case, words: str) -> Answer:
    """A head with too much in it, to real servers."""
    if "slow" in words or "byte/s" in words or "byte /" in words:
        return _slow(case, words)
    count = _number(words)
    if any(part in words for part in ("field", "header")) and "b" not in words.replace("bytes", "b").split("field")[0][-4:]:
        fields = b"".join(b"x-%d: 1\r\n" % number for number in range(max(count, 1) - 1))
    else:
        fields = b"x-big: " + b"a" * max(count, 70_000) + b"\r\n"
    return asyncio.run(_refused_by_all(b"GET /x HTTP/1.1\r\nHost: svc.local\r\n" + fields + b"\r\n"))


def _header_bytes(case: Case, words: str) -> Answer:
    size = max(_number(words), 1)
    fields = b"".join(b"x-%d: %b\r\n" % (number, b"a" * 1000) for number in range(min(size // 1000 + 1, 90)))
    rest = size - len(fields)
    fields += b"x-rest: " + b"a" * rest + b"\r\n" if rest > 0 else b""
    return asyncio.run(_refused_by_all(b"GET /x HTTP/1.1\r\nHost: svc.local\r\n" + fields + b"\r\n"))


def _target(case: Case, words: str) -> Answer:
    size = _number(words)
    return asyncio.run(_refused_by_all(b"GET /" + b"a" * (size - 1) + b" HTTP/1.1\r\nHost: svc.local\r\n\r\n"))


async def _refused_by_all(request: bytes) -> list[set[str]]:
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, OPEN))
    sides = []
    for kind in wires.OURS:
        outcome = await wires.sent(kind, mesh, request)
        found = {"accept", "allow"} if outcome.reached else {"reject", *map(str, outcome.statuses[:1])}
        if not outcome.reached and not outcome.statuses:
            # Hung up, without a word.
            found |= {"close", "431", "414", "400"} if outcome.is_closed else {"waits"}
        sides.append(found)
    return sides


def _json(case: Case, words: str) -> Answer:
    """JSON that is deep or large, wherever we read any that isn't ours: at the CA's service, in a token, in keys and in bundles."""
    from meshlib.secure import bundle
    from tests.secure.cases import authority_ground, tokens

    deep = (
        b"[" * 100_000 + b"]" * 100_000
        if "nest" in words or "depth" in words or "deep" in words
        else b'{"a":1,' + b'"b":1,' * 500_000 + b'"c":1}'
    )
    with contextlib.suppress(MeshError):
        bundle.parse(b'{"keys":' + deep + b"}")
        return {"accept"}
    token = tokens.sealed(
        b'{"alg":"RS256","kid":"k1"}', tokens.written(tokens.CLAIMS)[:-1] + b',"x":' + deep[: 50 * 2] + b"}", "rsa:k1"
    )
    mesh = ground.mesh_of(tokens.with_provider(tokens.provider_of(tokens.PLAIN)))
    if ground.ask(mesh, Request(headers=[("authorization", f"Bearer {token}")])).reached:
        return {"accept"}
    status = authority_ground.answered(deep)
    return {str(status), *({"reject"} if status >= 400 else set())}


def _coded(case: Case, words: str) -> Answer:
    """An answer in too many codings, or one that grows without end."""
    layers = re.search(r"[x×*]\s*(\d+)", words)
    body = gzip.compress(b"x")
    coding = b"gzip"
    if layers:
        coding = b", ".join([b"gzip"] * int(layers[1]))
    elif any(part in words for part in ("bomb", "ratio", "1000:1", "gib", "expands", "zeros")):
        body = gzip.compress(bytes(200 * MIB), 9)
    elif "unknown" in words:
        coding = b"zip-bomb"
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n%b" % (coding, len(body), body)
    return asyncio.run(_fetched(answer))


async def _fetched(answer: bytes) -> set[str]:
    """What our client makes of an answer, and what it costs."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()

    async with wires._mesh_to(serve) as (mesh, _), mesh.client() as http:
        before = _resident()
        try:
            reply = await http.get("http://other/")
        except (MeshError, httpx.HTTPError):
            return {"abort", "reject", "error"} if _resident() - before < 100 * MIB else {"too_much"}
        return {"accept", f"{len(reply.content)} bytes"}


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _metrics(case: Case, words: str) -> Answer:
    """A flood of whatever a caller chooses: the number of series stays bounded."""
    mesh = meshlib.Mesh.load(ground.written(ground.document({"mode": "permissive"}, OPEN)), service=ground.SERVICE)
    try:
        for number in range(5000):
            peer = (
                f"spiffe://td/p{number}"
                if any(part in words for part in ("peer", "identity", "spiffe", "caller"))
                else "spiffe://td/caller"
            )
            method = f"M{number}" if "method" in words else "GET"
            target = b"/p%d" % number if any(part in words for part in ("path", "url", "route")) else b"/x"
            headers = [(b"host", b"h%d.example" % number), (b"user-agent", b"a%d" % number)]
            mesh.gate.begin(method, target, headers, peer, True, float(number)).finish(200, float(number))
        lines = len(mesh.metrics().splitlines())
        return {"bounded_series", "bounded"} if len(mesh.gate.stats()) <= 1001 and lines < 60_000 else {"unbounded"}
    finally:
        mesh.close()


def _chunks(case: Case, words: str) -> Answer:
    """A body in the smallest pieces, in an answer and in a request that nobody reads; or a piece whose extension has no end."""
    if "extension" in words:
        head = b"POST /x HTTP/1.1\r\nHost: svc.local\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        return asyncio.run(_refused_by_all(head + b"a" * max(_number(words), MIB) + b"\r\nA\r\n0\r\n\r\n"))
    wire = core.HttpConnection(None, "", "svc:80")
    wire.open()
    wire.send("GET", "/", [(b"host", b"svc")], None, False)
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    wire.receive(head, len(head))
    gc.collect()
    before = _resident()
    piece = b"1\r\nA\r\n" * 10_000
    try:
        for _ in range(100):
            wire.receive(piece, len(piece))
    except MeshError:
        return {"reject", "bounded_memory", "400"}
    grown = _resident() - before
    taken = asyncio.run(_unread())
    return {"bounded_memory", "bounded"} if grown < 64 * MIB and taken < 32 * MIB else {"unbounded"}


async def _unread() -> int:
    """How much of a request's body a server takes for an application that doesn't ask for it."""
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, OPEN))
    is_over = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await is_over.wait()

    sent = 0
    async with servers.running("uvicorn-httptools", mesh, application) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /x HTTP/1.1\r\nhost: svc.local\r\ntransfer-encoding: chunked\r\n\r\n")
        piece = b"1\r\nA\r\n" * 10_000
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(0.5):
                while sent < 40 * MIB:
                    writer.write(piece)
                    await writer.drain()
                    sent += len(piece)
        is_over.set()
        writer.transport.abort()
    return sent


def _grpc(case: Case, words: str) -> Answer:
    """A message that is announced as too large, or is; to a real gRPC server."""
    port = grpc_ground.port_of(ground.document(own=OPEN, service={"protocol": "grpc", "discover": {"static": ["127.0.0.1:1"]}}))
    size = max(_number(words), 5 * MIB)
    raw = grpc_ground.Raw(port)
    try:
        if any(part in words for part in ("compress", "gzip", "bomb")):
            body = gzip.compress(bytes(64 * MIB))
            message = b"\1" + struct.pack(">I", len(body)) + body
            answer = _in_windows(raw, message, ("grpc-encoding", "gzip"))
        elif any(part in words for part in ("metadata", "header")):
            answer = raw.call("/a.B/C", ("x-big", "a" * 60_000))
        else:
            answer = raw.call("/a.B/C", body=b"\0" + struct.pack(">I", min(size, 2**32 - 1)) + b"x" * 100)
    finally:
        raw.close()
    if answer.status == "OK":
        return {"accept"}
    return {answer.status, f"grpc_status:{answer.status}", *answer.ended, *({"GOAWAY"} if answer.goaway else set()), "reject"} - {
        ""
    }


def _in_windows(raw: grpc_ground.Raw, message: bytes, *metadata: tuple[str, str]) -> grpc_ground.Answer:
    stream = raw.h2.get_next_available_stream_id()
    raw.h2.send_headers(stream, [*floods.REQUEST, *metadata])
    for place in range(0, len(message), 16_000):
        if raw.h2.local_flow_control_window(stream) < 16_000:
            raw.flush()
            raw.h2.receive_data(raw.sock.recv(65536))
        raw.h2.send_data(stream, message[place : place + 16_000])
    raw.h2.end_stream(stream)
    raw.flush()
    return raw.listen(stream)


def _slow(case: Case, words: str) -> Answer:
    """A head, byte by byte and without end. The patience of the server is cut to a moment, so that the test has some."""
    return asyncio.run(_dripped(is_body="body" in words))


async def _dripped(*, is_body: bool) -> list[set[str]]:
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, OPEN))

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    sides = []
    with mock.patch("meshlib.server.head.PATIENCE", 0.2), mock.patch("meshlib.server.door.PATIENCE", 0.2):
        for kind in wires.OURS:
            async with servers.running(kind, mesh, application) as port:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /x HTTP/1.1\r\nhost: svc.local\r\n" + (b"content-length: 1000\r\n\r\n" if is_body else b""))
                is_over = False
                for _ in range(20):
                    with contextlib.suppress(OSError):
                        writer.write(b"x")
                    try:
                        async with asyncio.timeout(0.05):
                            await reader.read(100)
                    except TimeoutError:
                        continue
                    except OSError:
                        pass
                    is_over = True
                    break
                writer.transport.abort()
            sides.append({"waits"} if not is_over else {"close", "abort", "timeout", "disconnect", "408"})
    return sides


_BY_KEY: dict[str, Any] = {
    "h2": floods.http2,
    "http2": floods.http2,
    "grpc-timeout": _timeout,
    "headers": _headers,
    "header_bytes": _header_bytes,
    "header_block": _header_bytes,
    "header_list_bytes": _header_bytes,
    "target_bytes": _target,
    "target": _target,
    "uri_bytes": _target,
    "json": _json,
    "response_header": _coded,
    "content_encoding": _coded,
    "response_body": _coded,
    "response": _coded,
    "decompression": _coded,
    "metrics": _metrics,
    "labels": _metrics,
    "chunks": _chunks,
    "grpc": _grpc,
    "slow": _slow,
    "slowloris": _slow,
    "slow_loris": _slow,
}
_BY_WORD: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("slow", "loris", "byte/s", "drip", "per second", "1 byte", "per 10 s"), _slow),
    (("gzip", "bomb", "decompress", "deflate", "zstd", "brotli"), _coded),
    (("distinct", "cardinality", "label"), _metrics),
    (("chunk",), _chunks),
    (("nest", "depth", "json"), _json),
    (("rst", "reset", "continuation", "ping", "settings", "hpack", "window_update"), floods.http2),
    (("fields",), _headers),
)
