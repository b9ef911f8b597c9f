"""What can be done with a TLS connection, or with the memory of an earlier one? Area tls_session.

OpenSSL is the other side: Python's `ssl` over memory, the command `openssl` where a client must misbehave (early data, renegotiation), and
bytes written by hand where it can't (SSL 3). What a case asks for stands in words, so that the scenario is chosen by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from meshlib._native import core
from meshlib.errors import IdentityError, MeshError
from tests.secure.cases import ground, pki
from tests.secure.cases.case import Answer, Case, not_understood
from tests.secure.cases.ground import ANYONE
from tests.support import free_port

CLIENT, SERVER = "spiffe://td/client", "spiffe://td/server"
VERSIONS = {
    "ssl2": 0x0002,
    "ssl3": 0x0300,
    "tls1": 0x0301,
    "tls1.0": 0x0301,
    "tls1.1": 0x0302,
    "tls1.2": 0x0303,
    "tls1.3": 0x0304,
}
BOTH = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


def tls_session(case: Case) -> Answer:
    """The scenario that the words of the input name."""
    for name, scenario in _SCENARIOS:
        if name in case.given:
            return scenario(case, str(case.given[name]).lower())
    for hints, scenario in _BY_WORD:
        if case.says(*hints):
            return scenario(case, case.prose)
    raise not_understood(case)


# ------------------------------------------------------------------------------------------------ two sides over memory


def roots() -> dict[str, bytes]:
    return {"td": pki.authority("rootA").pem}


def issued(uri: str, **more: Any) -> pki.Leaf:
    return pki.leaf({"uri": [uri], "dns": ["svc"], **more}, pki.authority("rootA"))


def own_server(bundles: dict[str, bytes] | None = None, generation: int = 1, **more: Any) -> core.TlsServer:
    own = issued(SERVER)
    return core.TlsServer(own.pem, own.key, bundles or roots(), generation, True, **more)


def openssl_client(own: pki.Leaf | None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if own is not None:
        _load(context, own)
    return context


def _load(context: ssl.SSLContext, own: pki.Leaf) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "own.pem"
        file.write_bytes(own.pem + own.key)
        context.load_cert_chain(file)


@dataclass
class Shaken:
    """A handshake of OpenSSL with our server: refused, or who was there and with which session it could go on."""

    is_refused: bool
    is_resumed: bool = False
    peer: str | None = None
    session: Any = None
    server_name: str | None = None
    alpn: bytes | None = None
    reason: str = ""


def shaken(
    server: core.TlsServer,
    context: ssl.SSLContext,
    session: Any = None,
    *,
    name: str = "svc",
    on_wire: Callable[[bytes], list[bytes]] = lambda data: [data],
) -> Shaken:
    """One handshake and a word in each direction. `on_wire` may cut what the client sends."""
    connection = core.TlsConnection(server)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_side=False, server_hostname=name, session=session)
    is_done = has_written = False
    received = b""
    try:
        for _ in range(20):
            if not is_done:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                    is_done = True
            else:
                if not has_written:
                    client.write(b"hello")
                    has_written = True
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.read(100)
            for piece in on_wire(outgoing.read()):
                if piece:
                    plain, out, _ = connection.receive(piece)
                    received += plain
                    incoming.write(out)
            if received and not connection.is_handshaking:
                incoming.write(connection.send(b"hello"))
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.read(100)
                break
    except MeshError as error:
        return Shaken(True, reason=str(error))
    except ssl.SSLError as error:
        return Shaken(True, reason=str(error))
    if connection.is_handshaking or not received:
        return Shaken(True, reason="it did not end")
    resumed, peer = connection.tls_resumed, connection.peer
    return Shaken(False, resumed, peer, client.session, connection.server_name, connection.alpn)


# ------------------------------------------------------------------------------------------------ going on with a session


def _resume(case: Case, words: str) -> Answer:
    if "expected" in words or "host only" in words or "keyed" in words:
        return _other_identity()
    if any(word in words for word in ("rbac", "policy", "rule")) and not any(word in words for word in ("trust bundle", "root")):
        return asyncio.run(_other_policy())
    if any(word in words for word in ("server", "our")) and "expired" in words:
        return _by_us()
    if any(word in words for word in ("expire", "not_after", "notafter", "lifetime", "over")):
        return _refused_or_full(_after_expiry())
    if any(word in words for word in ("root", "bundle", "revok", "generation", "rotat", "trust", "crl")):
        return _refused_or_full([_after_change(version, "revok" in words or "crl" in words) for version in BOTH])
    if any(word in words for word in ("forged", "random", "tamper", "stolen", "another server", "other server", "key")):
        return _refused_or_full([_elsewhere(version) for version in BOTH])
    # Whatever else may have changed: a ticket is good for one generation of one server, and for no other.
    return _refused_or_full([*(_elsewhere(version) for version in BOTH), *(_after_change(version, False) for version in BOTH)])


def _refused_or_full(found: list[Shaken]) -> set[str]:
    if any(one.is_resumed for one in found):
        return {"resumed"}
    return {"reject", "full_handshake"} if all(one.is_refused for one in found) else {"full_handshake"}


def _after_expiry() -> list[Shaken]:
    """The client's certificate ends between two handshakes, of each version."""
    begun = []
    for version in BOTH:
        server = own_server()
        # Certificates count whole seconds: this one is good for one second at least.
        context = openssl_client(issued(CLIENT, not_after="+2"), version)
        first = shaken(server, context)
        assert not first.is_refused, first.reason
        second = shaken(server, context, first.session)
        assert second.is_resumed, "sessions are not resumed at all"
        begun.append((server, context, second.session))
    _until_over(2)
    return [shaken(*one) for one in begun]


def _until_over(life: int) -> None:
    """Wait until a certificate has ended that was given so many seconds just now."""
    end = int(time.time() + life) + 1
    time.sleep(end - time.time() + 0.02)


def _after_change(version: ssl.TLSVersion, by_list: bool) -> Shaken:
    """What the server trusts changes: the client's root is gone, or its certificate is on the list."""
    own, root = issued(CLIENT), pki.authority("rootA")
    context = openssl_client(own, version)
    server = own_server()
    first = shaken(server, context)
    assert not first.is_refused
    if by_list:
        serial = pki.x509.load_der_x509_certificate(own.chain[0]).serial_number
        fresh = own_server(generation=2, before=server, crls={"td": pki.revoked_by(root, serial)})
    else:
        fresh = own_server({"td": pki.authority("rootB").pem}, generation=2, before=server)
    return shaken(fresh, context, first.session)


def _elsewhere(version: ssl.TLSVersion) -> Shaken:
    """A ticket of another server, which ours can't have given."""
    context = openssl_client(issued(CLIENT), version)
    return shaken(own_server(generation=2), context, shaken(own_server(), context).session)


def _by_us() -> set[str]:
    """We are the client, and the server's certificate ends."""
    own = issued(CLIENT)
    tls = core.TlsClient(own.pem, own.key, roots(), 1)
    server = issued(SERVER, not_after="+2")
    first = _called(tls, server, SERVER)
    assert first is False
    _until_over(2)
    second = _called(tls, server, SERVER)
    return {"resumed"} if second else {"reject", "full_handshake"} if second is None else {"full_handshake"}


def _other_identity() -> set[str]:
    """The same address, and another identity is expected there now."""
    own = issued(CLIENT)
    tls = core.TlsClient(own.pem, own.key, roots(), 1)
    assert _called(tls, issued(SERVER), SERVER) is False
    assert _called(tls, issued(SERVER), SERVER) is not None
    context = _openssl_server(issued("spiffe://td/other"))
    found = _called(tls, issued("spiffe://td/other"), "spiffe://td/other", context)
    # And with the very server that gave the ticket: it is not who is expected now.
    wrong = _called(tls, issued(SERVER), "spiffe://td/other")
    return {"full_handshake"} if found is False and wrong is None else {"resumed"}


_context: dict[str, ssl.SSLContext] = {}


def _openssl_server(own: pki.Leaf) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_NONE
    _load(context, own)
    return context


def _called(tls: core.TlsClient, own: pki.Leaf, expected: str, context: ssl.SSLContext | None = None) -> bool | None:
    """A handshake of ours with an OpenSSL server: was it resumed? None: refused."""
    context = context or _context.setdefault(expected, _openssl_server(own))
    wire = core.HttpConnection(tls, expected, "127.0.0.1:443")
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(wire.open())
    incoming.write(wire.send("GET", "/", [(b"host", b"svc")], None, False))
    is_done = False
    try:
        for _ in range(10):
            with contextlib.suppress(ssl.SSLWantReadError):
                if not is_done:
                    server.do_handshake()
                    is_done = True
                    server.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                server.read(1000)
            if data := outgoing.read():
                out, _ = wire.receive(data, len(data))
                incoming.write(out)
    except (MeshError, ssl.SSLError):
        return None
    return wire.tls_resumed if wire.is_open else None


async def _other_policy() -> set[str]:
    """A request is allowed; then the rules change, and the session is resumed. Over a real server."""
    from tests.secure.cases import servers

    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE], "deny": [{"from": ["*"], "paths": ["/gone"]}]}))
    strict = ground.mesh_of(ground.document(own={"allow": [{"from": ["*"], "paths": ["/other"]}]}))

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    context = openssl_client(None)
    folder = ground.home() / "identities" / "caller"
    context.load_cert_chain(folder / "svid.pem", folder / "key.pem")
    async with servers.running("uvicorn-httptools", mesh, application) as port:
        before = await asyncio.to_thread(_got, port, context, None)
        try:
            mesh.gate.publish(strict.config.server_plan(), time.monotonic())
            after = await asyncio.to_thread(_got, port, context, before[1])
        finally:
            mesh.gate.publish(mesh.config.server_plan(), time.monotonic())
    assert before[0] == 200, before
    return {"authz_reevaluated", "deny"} if after[0] == 403 else {"allowed_by_the_ticket"}


def _got(port: int, context: ssl.SSLContext, session: Any) -> tuple[int, Any, bool]:
    import socket

    with socket.create_connection(("127.0.0.1", port), 5) as plug:
        with context.wrap_socket(plug, server_hostname="svc", session=session) as tls:
            tls.sendall(b"GET /x HTTP/1.1\r\nhost: svc.local\r\nconnection: close\r\n\r\n")
            answer = b""
            with contextlib.suppress(ssl.SSLError):
                while data := tls.recv(65536):
                    answer += data
            return int(answer.split(b" ")[1]), tls.session, bool(tls.session_reused)


def _ticket_lifetime(case: Case, words: str) -> Answer:
    """A client whose certificate has ten minutes left, and one whose has a day."""
    for life in (600, 86400):
        for version in BOTH:
            found = shaken(own_server(), openssl_client(issued(CLIENT, not_after=f"+{life}"), version))
            if found.session is not None and found.session.ticket_lifetime_hint > min(life, 3600):
                return {"uncapped"}
    return {"capped"}


# ------------------------------------------------------------------------------------------------ the handshake itself


def _version(case: Case, words: str) -> Answer:
    """A client that speaks nothing newer, byte by byte."""
    found = re.search(r"(ssl|tls)\s*v?\s*([\d.]+)", words)
    if found is None or (number := VERSIONS.get(found[1] + found[2])) is None:
        raise not_understood(case)
    if number >= 0x0303:
        version = BOTH[number - 0x0303]
        one = shaken(own_server(), openssl_client(issued(CLIENT), version))
        return {"refuse"} if one.is_refused else {"accept"}
    return {"refuse", "reject"} if _is_refused(_hello(number)) and _is_refused_by_us(number) else {"accept"}


def _hello(
    version: int, ciphers: tuple[int, ...] = (0xC02B, 0xC02F, 0xC009, 0xC013, 0x002F, 0x0035), compression: bytes = b"\0"
) -> bytes:
    """A ClientHello of an old version, without any of the extensions of TLS 1.3."""
    suites = b"".join(struct.pack("!H", cipher) for cipher in ciphers)
    groups = b"\x00\x0a\x00\x06\x00\x04\x00\x17\x00\x18"
    signatures = b"\x00\x0d\x00\x0a\x00\x08\x04\x03\x08\x04\x04\x01\x02\x01"
    extensions = b"" if version < 0x0301 else groups + signatures
    body = struct.pack("!H", version) + os.urandom(32) + b"\0" + struct.pack("!H", len(suites)) + suites
    body += bytes([len(compression)]) + compression + struct.pack("!H", len(extensions)) + extensions
    message = b"\x01" + struct.pack("!I", len(body))[1:] + body
    return b"\x16" + struct.pack("!HH", min(version, 0x0301), len(message)) + message


def _is_refused(hello: bytes) -> bool:
    """Our server answers with an alert, and with nothing else."""
    connection = core.TlsConnection(own_server())
    try:
        _, out, _ = connection.receive(hello)
    except MeshError:
        return True
    return out[:1] not in (b"\x16", b"") or (out == b"" and not connection.is_handshaking)


def _is_refused_by_us(version: int) -> bool:
    """Our client does not go on with a ServerHello of an old version."""
    own = issued(CLIENT)
    wire = core.HttpConnection(core.TlsClient(own.pem, own.key, roots(), 1), SERVER, "127.0.0.1:443")
    wire.open()
    body = struct.pack("!H", version) + os.urandom(32) + b"\0" + b"\xc0\x2b" + b"\0" + b"\0\0"
    message = b"\x02" + struct.pack("!I", len(body))[1:] + body
    record = b"\x16" + struct.pack("!HH", version, len(message)) + message
    try:
        wire.receive(record, len(record))
    except MeshError:
        return True
    return False


def _cipher(case: Case, words: str) -> Answer:
    """Only what nobody should speak."""
    weak = {
        "null": (0x0001, 0x0002, 0xC006), "rc4": (0x0004, 0x0005, 0xC007), "export": (0x0003, 0x0008), "3des": (0x000A, 0xC008),
        "des": (0x0009,), "cbc": (0xC009, 0xC013, 0x002F), "anon": (0x0018, 0xC018), "rsa": (0x009C, 0x002F), "md5": (0x0004,),
    }  # fmt: skip
    chosen = next((suites for word, suites in weak.items() if word in words), None)
    if chosen is None:
        raise not_understood(case)
    return {"refuse", "reject"} if _is_refused(_hello(0x0303, chosen)) else {"accept"}


def _compression(case: Case, words: str) -> Answer:
    connection = core.TlsConnection(own_server())
    try:
        _, out, _ = connection.receive(_hello(0x0303, compression=b"\x01\x00"))
    except MeshError:
        return {"refuse", "off", "not_negotiated"}
    # Behind the header of record and message: version, random, session, cipher, compression.
    start = 9 + 2 + 32
    chosen = out[start + 1 + out[start] + 2]
    return {"off", "refuse", "not_negotiated", "ignored"} if chosen == 0 else {"accept"}


def _sni(case: Case, words: str) -> Answer:
    name = str(case.given.get("sni", "svc"))
    found = shaken(own_server(), openssl_client(issued(CLIENT)), name=name)
    if found.is_refused:
        return {"reject", "refuse"}
    return (
        {"normalise", "normalize", "lower_cased", "accept"}
        if found.server_name == name.lower().rstrip(".")
        else {f"sni:{found.server_name}"}
    )


def _alpn(case: Case, words: str) -> Answer:
    """A client that offers only what this port does not speak."""
    context = openssl_client(issued(CLIENT))
    offered = [word for word in re.split(r"[,\s]+", words) if word and word not in ("only", "unknown", "mismatch", "alpn:")] or [
        "spdy/1"
    ]
    context.set_alpn_protocols(["spdy/1" if "unknown" in words or "mismatch" in words else offered[0]])
    found = shaken(own_server(), context)
    return {"refuse", "reject"} if found.is_refused else {f"alpn:{(found.alpn or b'').decode()}", "accept"}


def _fragmented(case: Case, words: str) -> Answer:
    """The ClientHello in many small records: the same questions are asked, and the same certificate is needed."""

    def cut(data: bytes) -> list[bytes]:
        if data[:1] != b"\x16" or data[5:6] != b"\x01":
            return [data]
        version, size = data[1:3], struct.unpack("!H", data[3:5])[0]
        message, rest = data[5 : 5 + size], data[5 + size :]
        parts = [message[place : place + 20] for place in range(0, len(message), 20)]
        return [b"\x16" + version + struct.pack("!H", len(part)) + part for part in parts] + [rest]

    def byte_by_byte(data: bytes) -> list[bytes]:
        return [data[place : place + 1] for place in range(len(data))]

    for way in (cut, byte_by_byte):
        known = shaken(own_server(), openssl_client(issued(CLIENT)), on_wire=way)
        nobody = shaken(own_server(), openssl_client(None), on_wire=way)
        if known.peer != CLIENT or not nobody.is_refused:
            return {"downgraded"}
    return {"no_downgrade", "same_policy", "policy_applied", "accept", "normal", "mtls_enforced", "same_policy_applied"}


def _no_certificate(case: Case, words: str) -> Answer:
    found = [shaken(own_server(), openssl_client(None, version)) for version in BOTH]
    return {"reject", "refuse", "close"} if all(one.is_refused for one in found) else {"accept"}


def _peer(case: Case, words: str) -> Answer:
    if "plain" in words:
        return asyncio.run(_plain(words))
    if any(word in words for word in ("no cert", "without", "missing", "anonymous")):
        return _no_certificate(case, words)
    if any(word in words for word in ("expire", "outlive", "notafter")):
        return asyncio.run(_outlived())
    raise not_understood(case)


async def _plain(words: str) -> set[str]:
    """HTTP without TLS at a port in mode enforce."""
    from tests.secure.cases import servers

    reached: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    mode = "permissive" if "permissive" in words else "enforce"
    mesh = ground.mesh_of(ground.document({"mode": mode}, {"allow": [ANYONE]}))
    async with servers.running("uvicorn-httptools", mesh, application) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /x HTTP/1.1\r\nhost: svc.local\r\n\r\n")
        await asyncio.wait_for(reader.read(), 5)
        writer.close()
    return {"accept"} if reached else {"close", "reject", "refuse"}


async def _outlived() -> set[str]:
    """A connection that is still open when the peer's certificate ends: what is asked then is not answered, and it closes."""
    from tests.secure.cases import servers

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    mesh = ground.mesh_of(ground.document(own={"allow": [ANYONE]}))
    context = openssl_client(None)
    authority = ground.authority()
    made = authority.issue("caller", 2.0)
    _load(context, pki.held(made.chain, made.key))
    async with servers.running("uvicorn-httptools", mesh, application) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="svc")
        request = b"GET /x HTTP/1.1\r\nhost: svc.local\r\n\r\n"
        writer.write(request)
        first = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        await asyncio.sleep(max(0.0, made.not_after - time.time()) + 0.05)
        with contextlib.suppress(OSError):
            writer.write(request)
        answer = b""
        with contextlib.suppress(OSError, ssl.SSLError):
            answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert b" 200 " in first
    return {"close", "reject", "closed_at_not_after"} if b" 200 " not in answer else {"accept"}


def _keylog(case: Case, words: str) -> Answer:
    """Handshakes on both sides, and one of the way out, with SSLKEYLOGFILE in the environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys.log"
        with mock.patch.dict(os.environ, {"SSLKEYLOGFILE": str(file)}):
            found = shaken(own_server(), openssl_client(issued(CLIENT)))
            own = issued(CLIENT)
            called = _called(core.TlsClient(own.pem, own.key, roots(), 1), issued(SERVER), SERVER)
            import httpx

            from meshlib.client.egress import roots as platform

            context = platform(httpx)
            _ = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="svc")
        assert not found.is_refused and called is not None
        is_logged = file.exists() or bool(context.keylog_filename)
    return {"logged"} if is_logged else {"ignored_unless_debug_flag", "ignored", "ignore"}


def _without_identity(case: Case, words: str) -> Answer:
    """A mesh whose identity is not there."""
    import meshlib

    content = ground.document({"identity": {"folder": str(ground.home() / "nowhere")}}, {"allow": [ANYONE]})
    try:
        meshlib.Mesh.load(ground.written(content), service=ground.SERVICE).close()
    except IdentityError:
        return {"refuse_to_start", "no_listener", "fail_closed", "refuse", "not_listening"}
    except MeshError:
        return {"refuse_to_start", "refuse", "no_listener"}
    return {"started"}


# ------------------------------------------------------------------------------------------------ by the command `openssl`


@contextlib.asynccontextmanager
async def _listening(server: core.TlsServer) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Our TLS at a port, with an answer to every request; and what it was sent as plain text."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = core.TlsConnection(server)
        with contextlib.suppress(MeshError, OSError):
            while data := await reader.read(65536):
                try:
                    plain, out, is_over = connection.receive(data)
                except MeshError:
                    writer.write(connection.pending())
                    break
                writer.write(out)
                if plain:
                    heard.append(plain)
                    writer.write(connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"))
                if is_over:
                    break
        writer.close()

    port = free_port()
    listener = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield port, heard
    finally:
        listener.close()


def _early_data(case: Case, words: str) -> Answer:
    return asyncio.run(_sent_early())


async def _sent_early() -> set[str]:
    with tempfile.TemporaryDirectory() as folder:
        own, ticket, early = Path(folder) / "own.pem", Path(folder) / "ticket", Path(folder) / "early"
        made = issued(CLIENT)
        own.write_bytes(made.pem + made.key)
        early.write_bytes(b"GET /early HTTP/1.1\r\nhost: svc.local\r\n\r\n")
        async with _listening(own_server()) as (port, heard):
            common = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-cert", str(own), "-tls1_3", "-servername", "svc"]
            await asyncio.to_thread(_run, [*common, "-sess_out", str(ticket)], b"GET / HTTP/1.1\r\nhost: h\r\n\r\n")
            assert ticket.exists(), "no session was won"
            said = await asyncio.to_thread(_run, [*common, "-sess_in", str(ticket), "-early_data", str(early)], b"")
    text = said.decode("latin-1").lower()
    is_taken = "early data was accepted" in text or any(b"/early" in plain for plain in heard)
    return {"accept"} if is_taken else {"refuse", "reject", "off", "reject_early_data", "0rtt_off", "disabled", "not_accepted"}


def _renegotiation(case: Case, words: str) -> Answer:
    return asyncio.run(_renegotiated())


async def _renegotiated() -> set[str]:
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "own.pem"
        made = issued(CLIENT)
        own.write_bytes(made.pem + made.key)
        async with _listening(own_server()) as (port, heard):
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-cert", str(own), "-tls1_2", "-servername", "svc"]
            said = await asyncio.to_thread(_run, command, b"hello\n", b"R\n", b"after\n")
    text = said.decode("latin-1").lower()
    is_done = (
        "renegotiating" in text and any(b"after" in plain for plain in heard) and "error" not in text and "alert" not in text
    )
    return {"accept"} if is_done else {"refuse", "reject", "close", "no_renegotiation"}


def _run(command: list[str], *lines: bytes) -> bytes:
    """A command that is fed line by line, so that the other side has time to answer."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        assert child.stdin is not None and child.stdout is not None
        for line in lines or (b"",):
            time.sleep(0.15)
            with contextlib.suppress(OSError):
                child.stdin.write(line)
                child.stdin.flush()
        time.sleep(0.15)
        try:
            said, _ = child.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            said, _ = child.communicate()
        return said


_SCENARIOS: list[tuple[str, Any]] = [
    ("resume", _resume),
    ("resumption", _resume),
    ("ticket_lifetime", _ticket_lifetime),
    ("version", _version),
    ("early_data", _early_data),
    ("0-rtt", _early_data),
    ("0rtt", _early_data),
    ("renegotiation", _renegotiation),
    ("cipher", _cipher),
    ("ciphers", _cipher),
    ("compression", _compression),
    ("sni", _sni),
    ("alpn", _alpn),
    ("keylog", _keylog),
    ("peer", _peer),
    ("connection", lambda case, words: asyncio.run(_outlived())),
]
_BY_WORD: list[tuple[tuple[str, ...], Any]] = [
    (("early data", "early_data", "0-rtt", "0rtt"), _early_data),
    (("renegotiat",), _renegotiation),
    (("fragment", "split", "byte by byte", "tiny record"), _fragmented),
    (("before identity", "no identity", "without identity", "not certified", "listener"), _without_identity),
    (("certificate missing", "no client cert", "without client cert", "client_cert"), _no_certificate),
    (("ticket", "session"), _resume),
    (
        ("outlive", "mid-connection", "still open", "not_after", "notafter", "max age"),
        lambda case, words: asyncio.run(_outlived()),
    ),
    (("downgrade",), lambda case, words: _version(case, "tls1.1")),
    (("plain",), lambda case, words: asyncio.run(_plain(words))),
    (("keylog",), _keylog),
]
