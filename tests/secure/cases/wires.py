"""What do bytes on the wire do to us? Area smuggling: requests and answers that two readers would read in two ways.

A fragment is put where it belongs: a header into a request and into an answer, a chunk into a body. Requests go over sockets to real servers
with the middleware on (uvicorn with each of its parsers), answers to our own reader. Each side gives its own answer: one server
that lets a request in makes it an accepted one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass, field
from typing import Any

import meshlib
from meshlib._native import core
from meshlib.errors import MeshError
from tests.secure.cases import ground, servers
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE

OURS = ("uvicorn-httptools", "uvicorn-h11")
METHOD = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE|PRI|[A-Z]+(?= \S+ HTTP/)) ")
FIELD = re.compile(r"[^\s:]+[ \t]*:")


@dataclass
class Outcome:
    """What a server made of some bytes: the answers' statuses, what reached the application, and whether it hung up."""

    statuses: list[int] = field(default_factory=list)
    reached: list[tuple[str, str, bytes, list[tuple[str, str]]]] = field(default_factory=list)
    is_closed: bool = False


def smuggling(case: Case) -> Answer:
    """The kind of fragment decides where it goes."""
    text = case.input if isinstance(case.input, str) else " ".join(f"{name}: {value}" for name, value in case.given.items())
    words = case.prose
    raw = unescaped(text)
    if words.startswith("h2") or "http/2" in words:
        from tests.secure.cases import floods

        return floods.smuggled(case, words)
    if "100-continue" in words or "expect:" in words:
        return asyncio.run(_unwanted_body())
    if any(part in words for part in ("keep-alive", "unread", "cancelled body", "pooled", "reused")) and not METHOD.match(raw):
        return asyncio.run(_cancelled())
    if any(part in words for part in ("upgrade: h2c", "connect ")) or raw.startswith("CONNECT"):
        return asyncio.run(_upgrade(raw))
    if "..." in raw and METHOD.match(raw):
        return asyncio.run(_pipelined(raw))
    if raw[:1] in "\r\n" and METHOD.match(raw.lstrip("\r\n")):
        return asyncio.run(_requested([raw.encode("latin-1")]))
    if raw.startswith("HTTP/1"):
        return _answered(raw.encode("latin-1"))
    if METHOD.match(raw):
        return asyncio.run(_requested([raw.encode("latin-1")]))
    if _is_chunk(raw):
        return asyncio.run(_chunked(raw.encode("latin-1")))
    if FIELD.match(raw) or raw.startswith((" ", "\t")) or (":" in raw and "\n" in raw):
        fields = raw.strip("\r\n").encode("latin-1")
        return [*asyncio.run(_requested(_with_fields(fields))), *_answered(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n\r\nA")]
    raise not_understood(case)


async def _chunked(body: bytes) -> list[set[str]]:
    """A body of chunks: with a proper end behind it, and as it is, where a server that waits for more says nothing."""
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, {"allow": [ANYONE]}))
    head = b"POST /x HTTP/1.1\r\nHost: svc.local\r\nTransfer-Encoding: chunked\r\n\r\n"
    sides = []
    for kind in OURS:
        whole = head + body + b"\r\n0\r\n\r\n"
        sides.append(_words(await sent(kind, mesh, whole), whole) | {kind})
        bare = _words(await sent(kind, mesh, head + body), head + body)
        if "waits" not in bare:
            sides.append(bare | {kind})
    return [*sides, *_answered(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"\r\n0\r\n\r\n")]


def unescaped(text: str) -> str:
    """`\\r\\n` and `\\x0b` as the characters that they stand for."""
    simple = {"r": "\r", "n": "\n", "t": "\t", "0": "\0"}
    return re.sub(
        r"\\(?:x([0-9a-fA-F]{2})|([rnt0]))", lambda found: chr(int(found[1], 16)) if found[1] else simple[found[2]], text
    )


def _is_chunk(raw: str) -> bool:
    first = raw.split("\n")[0].rstrip("\r")
    return bool(re.match(r"\s*[-+]?(0x)?[0-9a-fA-F_]+\s*(;.*)?$", first)) and "\n" in raw


def _with_fields(fields: bytes) -> list[bytes]:
    """A request with these header lines, and a body of the length that they speak of."""
    lower = fields.lower()
    version = b"HTTP/1.0" if b"http/1.0" in lower else b"HTTP/1.1"
    fields = re.sub(rb"(?i)\s*\(?http/1\.0\)?", b"", fields)
    host = b"" if re.search(rb"(?im)^host\s*:", fields) else b"Host: svc.local\r\n"
    if b"transfer-encoding" in lower:
        bodies = [b"0\r\n\r\n", b""]
    elif b"content-length" in lower:
        bodies = [b"A"]
    else:
        bodies = [b""]
    return [b"POST /x " + version + b"\r\n" + host + fields + b"\r\n\r\n" + body for body in bodies]


# ------------------------------------------------------------------------------------------------ requests, to servers


async def _requested(attacks: list[bytes]) -> list[set[str]]:
    """What every server says to every one of these."""
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, {"allow": [ANYONE]}))
    return [_words(await sent(kind, mesh, attack), attack) | {kind} for kind in OURS for attack in attacks]


def _trailers_of(attack: bytes) -> list[bytes]:
    """The names of what stands behind the last chunk."""
    lines = attack.rpartition(b"\r\n0\r\n")[2].split(b"\r\n")
    return [line.partition(b":")[0].strip().lower() for line in lines if b":" in line]


def _words(outcome: Outcome, attack: bytes = b"") -> set[str]:
    if not outcome.reached:
        refused = outcome.statuses[:1] or [400 if outcome.is_closed else 0]
        words = {"reject"} if outcome.statuses or outcome.is_closed else {"waits"}
        words |= {str(status) for status in refused if status}
        if outcome.is_closed and not outcome.statuses:
            words |= {"400", "close"}
    else:
        words = {"accept"}
        seen = {name for name, _ in outcome.reached[0][3]}
        if b"\r\n0\r\n" in attack and not any(name.decode("latin-1") in seen for name in _trailers_of(attack)):
            words |= {"trailer_ignored", "not_visible_to_app", "strip"} if _trailers_of(attack) else set()
        if len(outcome.reached) == 1:
            words.add("accept_single")
            lengths = [value for name, value in outcome.reached[0][3] if name == "content-length"]
            if len(lengths) > 1:
                words.discard("accept_single")
    if outcome.is_closed:
        words |= {"close", "close_connection"}
    return words


async def sent(kind: str, mesh: meshlib.Mesh, attack: bytes) -> Outcome:
    """Bytes to a server, and what came of them. A wait without an answer is one, too: the server wants more."""
    outcome = Outcome()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                break
        if message["type"] == "http.disconnect":
            return
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        outcome.reached.append((scope["method"], scope["path"], body, headers))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async with servers.running(kind, mesh, application) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(attack)
        answer = await _heard(reader, outcome)
        writer.close()
    outcome.statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]
    return outcome


async def _heard(reader: asyncio.StreamReader, outcome: Outcome) -> bytes:
    """What a server says, until it hangs up or has no more to say: a moment after its last word, and much later where it says none."""
    answer = b""
    with contextlib.suppress(asyncio.TimeoutError, OSError):
        while True:
            async with asyncio.timeout(0.15 if answer else 1.0):
                data = await reader.read(65536)
            if not data:
                outcome.is_closed = True
                break
            answer += data
    return answer


async def _pipelined(raw: str) -> set[str]:
    """Two requests at once, the first with a body that a careless reader doesn't count; the second is for what is denied."""
    own = {"allow": [ANYONE], "deny": [{"from": ["*"], "paths": ["/admin", "/admin/*"]}]}
    mesh = ground.mesh_of(ground.document({"mode": "enforce"}, own))
    attack = re.sub(r" \.\.\. ?", " HTTP/1.1\r\nHost: svc.local\r\n", raw).replace("GET /admin\r\n", "GET /admin HTTP/1.1\r\n")
    attack = re.sub(
        r"(GET /admin[^\r\n]*?)( HTTP/1\.1)?(\r\nHost: svc\.local\r\n)?$", r"\1 HTTP/1.1\r\nHost: svc.local\r\n\r\n", attack
    )
    if not attack.endswith("\r\n\r\n"):
        attack += "\r\n"
    found = True
    for kind in OURS:
        outcome = await _sent_privately(kind, mesh, attack.encode("latin-1"))
        has_admin = any(path.startswith("/admin") for _, path, _, _ in outcome.reached)
        is_judged = outcome.statuses[1:2] == [403] or (len(outcome.statuses) < 2 and outcome.is_closed)
        found = found and not has_admin and is_judged
    return {"second request authorised on its own", "deny"} if found else {"accept"}


async def _sent_privately(kind: str, mesh: meshlib.Mesh, attack: bytes) -> Outcome:
    """The same over mutual TLS."""
    outcome = Outcome()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        outcome.reached.append((scope["method"], scope["path"], body, []))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    from tests.secure.cases.grpc_ground import context

    async with servers.running(kind, mesh, application) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context(alpn="http/1.1"), server_hostname="svc")
        writer.write(attack)
        answer = await _heard(reader, outcome)
        writer.close()
    outcome.statuses = [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]
    return outcome


async def _unwanted_body() -> set[str]:
    """The answer is there before the body, and the body comes all the same: what is sent as body is never taken for a request.

    On the way in a server that refuses without having read the body; on the way out a server that does so to us: the connection is
    not used again.
    """
    own = {"allow": [{"from": ["*"], "paths": ["/x"]}]}
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, own))
    smuggled = b"GET /x?smuggled HTTP/1.1\r\nHost: svc.local\r\n\r\n"
    head = b"POST /x HTTP/1.1\r\nHost: svc.local\r\nHost: other\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(
        smuggled
    )
    for kind in OURS:
        outcome = await sent(kind, mesh, head + smuggled)
        if any(path.endswith("smuggled") for _, path, _, _ in outcome.reached) or len(outcome.statuses) > 1:
            return {"smuggled"}
    return {"close_connection"} if await _is_left_after_refusal() else {"reused"}


async def _is_left_after_refusal() -> bool:
    """Our client sends a body, and is refused before it is through."""
    connections: list[list[bytes]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard: list[bytes] = []
        connections.append(heard)
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            while True:
                heard.append(await reader.readuntil(b"\r\n\r\n"))
                status = b"417 No" if heard[-1].startswith(b"POST") else b"200 OK"
                writer.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\n\r\n" % status)
                if heard[-1].startswith(b"POST"):
                    await asyncio.sleep(0.2)

    async with _mesh_to(serve) as (mesh, _), mesh.client() as http:

        async def body() -> Any:
            for _ in range(64):
                yield b"x" * 65536
                await asyncio.sleep(0)

        with contextlib.suppress(Exception):
            await http.post("http://other/", content=body(), headers={"expect": "100-continue"})
        await http.get("http://other/")
    return len(connections) >= 2 and all(len(heard) == 1 for heard in connections if heard and heard[0].startswith(b"POST"))


async def _cancelled() -> set[str]:
    """A call is cancelled in the middle of its answer; the next one gets another connection."""
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(0)
        mine = len(connections) - 1
        with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                connections[mine] += 1
                if b"/half" in head:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9000000\r\n\r\nhalf")
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nmine")

    async with _mesh_to(serve) as (mesh, _), mesh.client() as http:
        async with http.stream("GET", "http://other/half") as reply:
            async for _ in reply.aiter_bytes():
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await http.get("http://other/half")
        answers = [(await http.get("http://other/")).text for _ in range(3)]
    is_left = all(count == 1 for count in connections[:2]) and answers == ["mine"] * 3
    return {"close_connection", "close", "not_reused"} if is_left else {"reused"}


@contextlib.asynccontextmanager
async def _mesh_to(serve: Any, **service: Any) -> Any:
    """A mesh that knows a raw server as the service `other`."""
    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    other = {"discover": {"static": [f"127.0.0.1:{port}"]}, **service}
    try:
        yield ground.mesh_of(ground.document({"mode": "observe"}, services={"other": other})), port
    finally:
        listener.close()


async def _upgrade(raw: str) -> list[set[str]] | set[str]:
    """A tunnel, or another protocol on the same connection, with a request for what is denied behind it."""
    own = {"allow": [{"from": ["*"], "paths": ["/x"]}]}
    mesh = ground.mesh_of(ground.document({"mode": "permissive"}, own))
    if raw.startswith("CONNECT"):
        attack = (
            raw
            if raw.endswith("\r\n\r\n")
            else f"CONNECT svc.local:80 HTTP/1.1\r\nHost: svc.local\r\n\r\n{'GET /admin HTTP/1.1'}\r\n\r\n"
        )
    else:
        fields = "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
        attack = f"GET /x HTTP/1.1\r\nHost: svc.local\r\n{fields}\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    sides = []
    for kind in OURS:
        outcome = await sent(kind, mesh, attack.encode("latin-1"))
        if 101 in outcome.statuses or any(path != "/x" for _, path, _, _ in outcome.reached):
            return {"upgraded", "accept"}
        found = {"ignored", "ignore", "refuse", "strip", "no_upgrade"}
        sides.append(found | ({str(outcome.statuses[0])} if outcome.statuses else set()))
    return sides


# ------------------------------------------------------------------------------------------------ answers, to our reader


def _answered(answer: bytes) -> list[set[str]]:
    """Our reader of HTTP/1.1, given these bytes at once and byte by byte."""
    sides = []
    for pieces in ([answer], [answer[place : place + 1] for place in range(len(answer))]):
        wire = core.HttpConnection(None, "", "svc:80")
        wire.open()
        wire.send("GET", "/", [(b"host", b"svc")], None, False)
        words = {"accept", "accept_single"}
        try:
            for piece in pieces:
                wire.receive(piece, len(piece))
            wire.receive_eof()
        except MeshError:
            words = {"400", "reject", "abort", "error"}
        sides.append(words | ({"close", "close_connection"} if not wire.is_open else set()))
    return sides
