"""How does a machine talk to its CA?

One request on one connection, to the service that `authority.py` describes, within a few seconds altogether. TLS is the
wire's, so the CA proves itself as every peer of the mesh does: by a chain that ends in a root of our bundle, and by its
SPIFFE ID, exactly. No DNS name counts. Nothing is sent before that.

There is one exception, the very first contact: then there is no root to verify anything with. `first_roots` asks whoever
answers for the roots, sends nothing that anybody could use, and takes only a root whose SHA-256 stands in the token.
Whoever sits in between can give another one and gets nothing for it.

Looking up a host's name takes as long as the system's resolver wants. Nothing here is tried twice: that's `enrol.py`'s.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography import x509

from .._native import core
from ..errors import ConnectFailed, IdentityError, MeshError, PeerIdentityError, ProtocolError
from . import certificates
from .ca import OWN_PATH
from .tokens import Token, fingerprint_matches

SECONDS: Final = 5.0
LIMIT: Final = 512 * 1024

_PIECE: Final = 16 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    """Where a CA's service is, and of which trust domain it must prove to be."""

    host: str
    port: int
    trust_domain: str

    @classmethod
    def of(cls, url: str, trust_domain: str) -> Place:
        """The place in a URL such as https://ca.host:8444."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or 443
        except ValueError:
            parts, host, port = urlsplit(""), "", 0
        is_bare = parts.path in {"", "/"} and not (parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme != "https" or not host or not is_bare:
            raise IdentityError(
                f"{url!r} is no address of a CA.", hint="It looks like https://ca.host:8444: https, host and port."
            )
        return cls(host, port, trust_domain)

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def spiffe_id(self) -> str:
        return f"spiffe://{self.trust_domain}{OWN_PATH}"


def first_roots(place: Place, token: Token, seconds: float = SECONDS) -> bytes:
    """The roots that the token vouches for, as PEM, from whomever answers there."""
    end = time.monotonic() + seconds
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # what comes is judged by its hash
    with _dialled(place, end) as plug:
        try:
            plug.settimeout(_left(end, place))
            with context.wrap_socket(plug) as secured:
                wire = core.HttpConnection(None, "", place.address)
                status, body = _converse(secured, wire, place, end, "GET", "/v1/roots", None)
        except OSError as error:
            raise _lost(place, error) from error
    try:
        roots = x509.load_pem_x509_certificates(body) if status == 200 else []
    except ValueError:
        roots = []
    known = [root for root in roots if fingerprint_matches(root, token)]
    if not known:
        raise PeerIdentityError(
            f"{place.address} has no root with the fingerprint that stands in the token.",
            hint="Is it the CA that made the token? Then its root was turned over meanwhile: make another token there."
            " If not, somebody else answers at this address. The token was not sent.",
            reason="enroll.fingerprint",
        )
    return certificates.pem(*known)


def ask(
    place: Place,
    roots: bytes,
    method: str,
    path: str,
    content: dict[str, Any] | None = None,
    *,
    pair: tuple[bytes, bytes] | None = None,
    seconds: float = SECONDS,
) -> bytes:
    """What the CA answers. `pair` is our certificate chain and key, where we have to show them.

    What it refuses is an IdentityError with its reason; what fails on the way, another MeshError.
    """
    end = time.monotonic() + seconds
    chain, key = pair or (None, None)
    tls = core.TlsClient(chain, key, {place.trust_domain: roots}, 1)
    wire = core.HttpConnection(tls, place.spiffe_id, place.address)
    body = None if content is None else json.dumps(content, separators=(",", ":")).encode()
    with _dialled(place, end) as plug:
        try:
            status, found = _converse(plug, wire, place, end, method, path, body)
        except OSError as error:
            if isinstance(error, MeshError):
                raise
            raise _lost(place, error) from error
    if status != 200:
        raise _refusal(place, status, found)
    return found


def _dialled(place: Place, end: float) -> socket.socket:
    try:
        plug = socket.create_connection((place.host, place.port), _left(end, place))
    except OSError as error:
        raise ConnectFailed(
            f"the CA's service can't be reached at {place.address}: {error.strerror or error}.",
            hint="Does `meshlib ca serve` run there, and is the port open to this machine?",
        ) from error
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return plug


def _converse(
    plug: socket.socket, wire: core.HttpConnection, place: Place, end: float, method: str, path: str, body: bytes | None
) -> tuple[int, bytes]:
    """One exchange: status and body."""
    headers = [(b"host", place.address.encode()), (b"connection", b"close"), (b"accept", b"application/json")]
    if body is not None:
        headers.append((b"content-type", b"application/json"))
    try:
        plug.settimeout(_left(end, place))
        plug.sendall(wire.open())
        while not wire.is_open:
            piece = _read(plug, end, place)
            if not piece:
                raise _ended(place)
            plug.sendall(wire.receive(piece, len(piece))[0])
        plug.sendall(wire.send(method, path, headers, body, False))
        status, parts, size = 0, list[bytes](), 0
        while True:
            piece = _read(plug, end, place)
            out, events = wire.receive(piece, len(piece)) if piece else (b"", wire.receive_eof())
            if out:
                plug.sendall(out)
            for event in events:
                kind = event[0]
                if kind == core.EVENT_RESPONSE:
                    return _sized(place, event[1], event[5])
                if kind == core.EVENT_HEAD:
                    status = event[1]
                elif kind == core.EVENT_BODY:
                    parts.append(event[1])
                    size += len(event[1])
                    _sized(place, status, b"" if size <= LIMIT else bytes(LIMIT + 1))
                elif kind == core.EVENT_END:
                    return status, b"".join(parts)
            if not piece:
                raise _ended(place)
    except MeshError:
        _farewell(plug, wire)
        raise


def _read(plug: socket.socket, end: float, place: Place) -> bytes:
    plug.settimeout(_left(end, place))
    return plug.recv(_PIECE)


def _left(end: float, place: Place) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{place.address} did not answer in time")
    return left


def _sized(place: Place, status: int, body: bytes) -> tuple[int, bytes]:
    if len(body) > LIMIT:
        raise ProtocolError(f"{place.address} answered with more than {LIMIT // 1024} KiB.", hint="That is no CA of meshlib.")
    return status, body


def _ended(place: Place) -> MeshError:
    return ProtocolError(f"{place.address} ended the connection before its answer.", hint="Look at the CA's log.")


def _farewell(plug: socket.socket, wire: core.HttpConnection) -> None:
    """The alert that tells the other side why."""
    try:
        plug.sendall(wire.pending())
    except OSError:
        pass  # it is gone already


def _lost(place: Place, error: OSError) -> MeshError:
    if isinstance(error, TimeoutError):
        return ConnectFailed(f"the CA at {place.address} did not answer in time.", hint="It will be tried again.")
    return ConnectFailed(
        f"the talk with the CA at {place.address} broke off: {error.strerror or error}.", hint="It will be tried again."
    )


def _refusal(place: Place, status: int, body: bytes) -> IdentityError:
    """What the CA said, as far as it can be read."""
    try:
        said = json.loads(body)
        detail, hint, reason = (str(said[name])[:500] for name in ("detail", "hint", "reason"))
    except (ValueError, TypeError, KeyError):
        detail, hint, reason = f"status {status}", "Look at the CA's log.", "enroll.refused"
    text = f"the CA at {place.address} refused: {detail}"
    return IdentityError("".join(each for each in text if each.isprintable()), hint=hint, reason=reason)
