"""Is this endpoint well, right now?

One check of one endpoint: HTTP GET, gRPC health (grpc.health.v1) or a TCP connect, with plain non-blocking sockets of the running loop and
the sans-I/O wire of the calls. So a check proves the endpoint's identity by mutual TLS exactly as a call does; for gRPC's checks it is
HTTP/2 by hand, since grpcio can't compare SPIFFE IDs, and its threads don't survive a fork. Every check opens its own connection: that a
new one can be had is part of what is asked.

A check is a request that this process makes on somebody else's word. So link-local addresses (metadata services of clouds) are reached
only where they are written in `static`, which is looked at after names were resolved; redirects are answers, and not followed; at most
64 KiB are read.

Loopback and private addresses are reached, whoever gave them: sidecars, UNIX sockets and a whole mesh on one machine live there, and
calls, which say more than a check can, go to the same addresses. What a forger of discovery gains is one GET of the configured path (or
an empty health request, or a connect) without any credential, of whose answer nothing is told but its status. Who must not even
allow that says `kind: tcp`, or demands mutual TLS: then no byte of the request is sent to who can't prove the service's identity.

It limits no time and remembers nothing; `checks.py` does.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from meshlib import errors
from meshlib._native import core

from .names import Busy, Names

BUFFER = 16 * 1024
MOST = 64 * 1024
GRPC_PATH = "/grpc.health.v1.Health/Check"
# A frame with an empty HealthCheckRequest: the health of the server as a whole.
GRPC_ASK = b"\0\0\0\0\0"
SERVING = 1
NAMES = {0: "UNKNOWN", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}


@dataclass(frozen=True, slots=True)
class Check:
    """How the endpoints of one Service are checked. `identity` is "" in plain text; `listed` are the addresses in `static`."""

    service: str
    kind: str
    path: str
    every: float
    timeout: float
    failures: int
    successes: int
    identity: str
    is_http2: bool
    listed: frozenset[str]


class Failing(Exception):
    """Why a check failed."""


class Unknowable(Exception):
    """Why a check could not be made: nothing that the endpoint did."""


# ---------------------------------------------------------------------- one check


async def probe(check: Check, address: str, identity: str, own: Callable[[], core.TlsClient | None], names: Names) -> None:
    """Check one endpoint now. Raises what is wrong with it, or Unknowable."""
    # A thread to resolve its name must be had early enough to say so before the time is up.
    sock = await _connected(address, names, check.timeout / 2, is_listed=address in check.listed)
    try:
        if check.kind == "tcp":
            return
        tls = own() if identity else None
        if identity and tls is None:
            raise Unknowable("it is asked for with mutual TLS, and this process has no identity yet")
        is_http2 = check.kind == "grpc" or check.is_http2
        wire = core.HttpConnection(tls, identity, address, "h2" if is_http2 else "http/1.1")
        host = (b"host", check.service.encode())
        if check.kind == "grpc":
            fields = [host, (b"content-type", b"application/grpc"), (b"te", b"trailers")]
            _judge_grpc(*await _exchange(sock, wire, "POST", GRPC_PATH, fields, GRPC_ASK))
        else:
            fields = [host, (b"user-agent", b"meshlib-check"), (b"accept", b"*/*")]
            if not is_http2:
                fields.append((b"connection", b"close"))
            status, _, _ = await _exchange(sock, wire, "GET", check.path, fields, None)
            if not 200 <= status < 300:
                raise Failing(f"it answers {status}")
    finally:
        sock.close()


async def _connected(address: str, names: Names, patience: float, *, is_listed: bool) -> socket.socket:
    if address.startswith("unix:"):
        family, where = socket.AF_UNIX, address.removeprefix("unix:")
        return await _connect(family, where)
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        if _is_literal(host):
            rows = list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
        else:
            rows = await names.look_up(host, patience)
    except Busy as error:
        raise Unknowable(str(error)) from None
    except ValueError:  # a part of it is longer than 63 characters, or empty
        raise Failing(f"{host!r} can't be looked up: it is no host name") from None
    failure: OSError | None = None
    for family, _, _, _, place in rows:
        if not is_listed and is_link_local(str(place[0])):
            raise Unknowable(f"{place[0]} is link-local, and only addresses in `static` may be")
        try:
            return await _connect(family, (place[0], int(port), *place[2:]))
        except OSError as error:
            failure = error
    raise failure or Failing(f"{host} has no address")


async def _connect(family: int, place: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, place)
    except BaseException:
        sock.close()
        raise
    return sock


async def _exchange(
    sock: socket.socket,
    wire: core.HttpConnection,
    method: str,
    target: str,
    fields: list[tuple[bytes, bytes]],
    body: bytes | None,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """One request and its answer: status, headers with trailers, and the body. For a GET the head is enough."""
    loop = asyncio.get_running_loop()
    buffer = bytearray(BUFFER)
    status, found, content = 0, dict[bytes, bytes](), b""
    out = wire.open()
    is_asked = False
    while True:
        if wire.is_open and not is_asked:
            is_asked = True
            out += wire.send(method, target, fields, body, False)
        if out:
            await loop.sock_sendall(sock, out)
        size = await loop.sock_recv_into(sock, buffer)
        try:
            out, events = wire.receive(buffer, size) if size else (b"", wire.receive_eof() if wire.has_received else [])
        except errors.MeshError:
            # Let the other side know why; it is of no use to wait for it.
            alert = wire.pending()
            if alert:
                try:
                    sock.send(alert)
                except OSError:
                    pass
            raise
        for event in events:
            if event[0] in (core.EVENT_HEAD, core.EVENT_RESPONSE):
                status = event[1]
                found.update(event[4])
                if body is None:
                    return status, found, b""
                if event[0] == core.EVENT_RESPONSE:
                    return status, found, event[5]
            elif event[0] == core.EVENT_BODY:
                content += event[1]
                if len(content) > MOST:
                    raise Failing("its answer is too long")
            elif event[0] == core.EVENT_END:
                found.update(event[2])
                return status, found, content
            elif event[0] == core.EVENT_RESET:
                raise event[1]
        if not size:
            raise Failing("it closed the connection without an answer")


def _judge_grpc(status: int, fields: Mapping[bytes, bytes], content: bytes) -> None:
    if status != 200:
        raise Failing(f"it answers {status}")
    code = fields.get(b"grpc-status", b"")
    if code == b"12":
        raise Failing("it has no health service (grpc.health.v1.Health)")
    if code != b"0":
        raise Failing(f"its health service answers with gRPC status {code.decode('latin-1') or 'none'}")
    word = _status_of(content)
    if word != SERVING:
        raise Failing(f"it says {NAMES.get(word, 'nothing that is known')}")


def _status_of(content: bytes) -> int:
    """`HealthCheckResponse.status`, field 1, of a message in a gRPC frame; -1 if it can't be read. A default isn't written: 0."""
    if len(content) < 5 or content[0] != 0 or int.from_bytes(content[1:5], "big") != len(content) - 5:
        return -1
    message = content[5:]
    if not message:
        return 0
    # A tag and a small number; nobody has added a field since 2015.
    return message[1] if len(message) == 2 and message[0] == 0x08 else -1


# ---------------------------------------------------------------------- where to


def is_link_local(host: str) -> bool:
    """169.254/16 and fe80::/10, in IPv6's clothes too."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return inner.is_link_local
    return address.is_link_local


NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
