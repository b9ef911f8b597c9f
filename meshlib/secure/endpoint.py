"""What does a bundle endpoint say, and is it the right one?

One GET over TLS, blocking, on a thread that the caller gave. Two ways to prove who it is, as the configuration says and never
as the server likes:

- *https_web*: a certificate for the host of the URL, by the platform's roots (RFC 6125; the common name doesn't count).
- *https_spiffe*: an X.509-SVID of exactly the configured SPIFFE ID, by the roots of its trust domain. The wire of the mesh's
  own calls checks it, so that it is the same check; our own identity is not shown.

Redirects are followed three times at most, each under the same rules, and forgotten afterwards. Neither they nor the URL itself may
lead to this machine, its link or a metadata service, unless the configuration says `local: true`: whoever can write a URL, or
answer for one, must not choose whom we call in here. A proxy of the environment is not used, nor are keys logged for debuggers.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, urljoin, urlsplit

from .._native import core
from ..errors import IdentityError
from . import bundle, certificates
from .fetch import Fetching, flaw_of, is_near, platform_context

# Seconds for a fetch as a whole, redirects included.
PATIENCE: Final = 20.0
MOST_REDIRECTS: Final = 3

_PIECE: Final = 16 * 1024
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


def fetch(url: str, spiffe_id: str, roots: bytes, fetching: Fetching, *, can_be_near: bool = False) -> bytes:
    """The document at a bundle endpoint; with a `spiffe_id` by https_spiffe. Raises IdentityError and OSError."""
    end = time.monotonic() + PATIENCE
    for _ in range(MOST_REDIRECTS + 1):
        if flaw := flaw_of(url):
            raise IdentityError(f"the endpoint's url is no good: {flaw}.", hint="A redirect must keep to the rules of endpoints.")
        parts = urlsplit(url)
        with _connected(parts, end, can_be_near=can_be_near) as plug:
            fetching.begin(plug)
            exchange = _by_spiffe(spiffe_id, roots) if spiffe_id else _by_web
            status, location, content = exchange(plug, parts, end, fetching)
        if status == 200:
            return content
        if status not in _REDIRECTS or not location:
            raise IdentityError(f"the endpoint answers {status}.", hint="Is the URL right, and does it ask for no credentials?")
        url = urljoin(url, location)
    raise IdentityError(f"the endpoint redirects more than {MOST_REDIRECTS} times.", hint="Configure where the bundle is.")


Answer = tuple[int, str, bytes]


def _by_web(plug: socket.socket, parts: SplitResult, end: float, fetching: Fetching) -> Answer:
    context = platform_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    try:
        with context.wrap_socket(plug, server_hostname=parts.hostname, do_handshake_on_connect=False) as wrapped:
            fetching.begin(wrapped)  # the plain socket is an empty shell from here on
            wrapped.do_handshake()
            connection = http.client.HTTPConnection(parts.netloc)
            connection.sock = wrapped
            connection.request("GET", _target(parts), headers=dict(_fields(parts)))
            with connection.getresponse() as answer:
                content = bytearray()
                while answer.status == 200 and len(content) <= bundle.LIMIT:
                    give_time(wrapped, end)
                    piece = answer.read1(_PIECE)
                    if not piece:
                        break
                    content += piece
                return answer.status, answer.getheader("location", ""), bytes(content)
    except ssl.SSLCertVerificationError as error:
        raise IdentityError(
            f"the endpoint did not prove that it is {parts.hostname}: {error.verify_message}.",
            hint="Is its certificate from a public CA and for this name? If it shows an SVID, the profile is https_spiffe.",
        ) from None
    except http.client.HTTPException as error:
        raise IdentityError(f"the endpoint does not speak HTTP: {type(error).__name__}.", hint="Is the URL right?") from None


def _by_spiffe(spiffe_id: str, roots: bytes) -> Callable[[socket.socket, SplitResult, float, Fetching], Answer]:
    def exchange(plug: socket.socket, parts: SplitResult, end: float, fetching: Fetching) -> Answer:
        tls = core.TlsClient(None, None, {certificates.trust_domain_of(spiffe_id): roots}, 1)
        wire = core.HttpConnection(tls, spiffe_id, f"{parts.hostname}:{parts.port or 443}")
        plug.setblocking(False)
        events: list[tuple[Any, ...]] = []

        def go_on(data: bytes) -> None:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("it took too long")
            code, found = wire.converse(plug.fileno(), data, left, True)
            if code == core.CONVERSE_CLOSED and not found:
                found = wire.receive_eof()
                if not found:
                    raise IdentityError("the endpoint closed the connection without an answer.", hint="See its log.")
            elif code == core.CONVERSE_LATE:
                raise TimeoutError("it took too long")
            events.extend(found)

        hello = wire.open()
        while not wire.is_open:
            go_on(hello)
            hello = b""
        events.clear()
        fields = [(name.encode(), value.encode()) for name, value in _fields(parts)]
        data = wire.send("GET", _target(parts), fields, None, False)
        status, location, content = 0, "", bytearray()
        while True:
            if not events:
                go_on(data)
                data = b""
                continue
            event = events.pop(0)
            if event[0] in {core.EVENT_HEAD, core.EVENT_RESPONSE}:
                status = event[1]
                location = dict(event[4]).get(b"location", b"").decode("latin-1")
                if event[0] == core.EVENT_RESPONSE:
                    return status, location, event[5]
            elif event[0] == core.EVENT_BODY:
                content += event[1]
                if len(content) > bundle.LIMIT:
                    return status, location, bytes(content)
            elif event[0] == core.EVENT_END:
                return status, location, bytes(content)
            elif event[0] == core.EVENT_RESET:
                raise event[1]

    return exchange


def _connected(parts: SplitResult, end: float, *, can_be_near: bool) -> socket.socket:
    failure: OSError | None = None
    rows = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    near = next((str(row[4][0]) for row in rows if is_near(str(row[4][0]))), "")
    if near and not can_be_near:
        raise IdentityError(
            f"the endpoint {parts.hostname} is at {near}, an address of this machine, its link or a metadata service.",
            hint="If that is right, say `local: true` beside its url.",
        )
    for family, kind, protocol, _, place in rows:
        plug = socket.socket(family, kind, protocol)
        try:
            give_time(plug, end)
            plug.connect(place)
        except OSError as error:
            plug.close()
            failure = error
        else:
            return plug
    raise failure or OSError(f"{parts.hostname} has no address")


def give_time(plug: socket.socket, end: float) -> None:
    """Give a socket the time that is left."""
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    plug.settimeout(left)


def _target(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _fields(parts: SplitResult) -> list[tuple[str, str]]:
    return [("host", parts.netloc), ("accept", "application/json"), ("accept-encoding", "identity"), ("connection", "close")]
