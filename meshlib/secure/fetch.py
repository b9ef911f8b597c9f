"""What does this URL say, and may we ask there at all?

Key sets of token providers are fetched from URLs that stand in a configuration, and who can write one must not be able to
make this process call what only this machine can reach: its own ports, its link, the metadata service of its cloud. So:

- https only, the host proved by its certificate, with the roots of the platform; no user or password in the URL
- no redirects: whoever answers for the URL doesn't choose whom we call next
- the host is looked up once, all its addresses are judged, and the connection goes to one of these very addresses: a name
  that leads elsewhere at a second look can't be used, since there is none
- 512 KiB at most, as plain JSON, and five seconds for everything together

Addresses of private networks are taken: that's where the provider of a company is. It blocks, on a thread that the caller
gave; a proxy of the environment is not used, nor are keys of TLS logged for debuggers. It knows nothing of keys.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from ..errors import MeshError

LIMIT: Final = 512 * 1024
# Seconds for all of it, the lookup included.
PATIENCE: Final = 5.0

_PIECE: Final = 16 * 1024
_MAX_AGE: Final = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?([0-9]{1,9})\b", re.IGNORECASE)
# Metadata services that are not on the link: of AWS (IPv6), Alibaba and Oracle.
_METADATA: Final = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "192.0.0.192")))
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_NOBODYS: Final = ipaddress.IPv4Network("0.0.0.0/8")

Lookup = Callable[[str, int], Sequence[tuple[Any, ...]]]  # what socket.getaddrinfo answers


@dataclass(frozen=True, slots=True)
class Fetched:
    """A document, and for how many seconds its server wants it kept; None: it doesn't say."""

    content: bytes
    max_age: float | None


class Fetching:
    """A fetch in progress. `abort` ends it from any thread, and does nothing to one that has ended."""

    __slots__ = ("_socket", "is_aborted")

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self.is_aborted = False

    def begin(self, plug: socket.socket) -> None:
        self._socket = plug
        if self.is_aborted:
            raise TimeoutError

    def abort(self) -> None:
        self.is_aborted = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def failed(text: str, hint: str) -> MeshError:
    return MeshError(text, hint=hint, reason="secure.fetch")


def late(url: str) -> MeshError:
    return failed(f"{urlsplit(url).hostname} did not answer within {PATIENCE:g} s.", "Is it reachable from here?")


def flaw_of(url: str) -> str:
    """What keeps a URL from being asked; "" if nothing does."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return "it has characters that a URL can't have"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "it is no URL"
    if parts.scheme != "https":
        return "it must begin with https://"
    if not parts.hostname:
        return "it names no host"
    if "@" in parts.netloc:
        return "it must hold no user or password"
    return ""


def platform_context() -> ssl.SSLContext:
    """A context that trusts whom the platform trusts ($SSL_CERT_FILE and $SSL_CERT_DIR, or OpenSSL's own store)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def system_lookup(host: str, port: int) -> Sequence[tuple[Any, ...]]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def fetch(
    url: str,
    context: ssl.SSLContext,
    *,
    is_near_allowed: bool = False,
    fetching: Fetching | None = None,
    lookup: Lookup = system_lookup,
) -> Fetched:
    """The document at a URL. `is_near_allowed`: also from this machine, its link, and metadata services. Raises MeshError,
    with the same text each time that the same thing is wrong.
    """
    end = time.monotonic() + PATIENCE
    if flaw := flaw_of(url):
        raise failed(f"{shown(url)} can't be fetched: {flaw}.", "Give an https URL.")
    parts = urlsplit(url)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.hostname_checks_common_name = False
    try:
        fetching = fetching or Fetching()
        with _connected(parts, is_near_allowed, end, fetching, lookup) as plug:
            return _ask(plug, parts, context, end, fetching)
    except ssl.SSLCertVerificationError as error:
        raise failed(
            f"{parts.hostname} did not prove who it is: {error.verify_message}.",
            "Is its certificate for this name, and from a CA that this machine trusts ($SSL_CERT_FILE)?",
        ) from None
    except http.client.HTTPException as error:
        text = f"{parts.hostname} does not speak HTTP as it should ({type(error).__name__})."
        raise failed(text, "Is the URL right?") from None
    except TimeoutError:
        raise late(url) from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise failed(f"{parts.hostname} can't be reached: {why}.", "Is the URL right, and the network?") from None


def is_near(text: str) -> bool:
    """Whether an address is this machine's, its link's, a metadata service's, or nobody's."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        elif int(address) >> 32 == 0 and int(address) > 1:
            inner = ipaddress.IPv4Address(int(address))
        if inner is not None and is_near(str(inner)):
            return True
    is_nobodys = address.is_unspecified or address.is_multicast or address in _NOBODYS
    return address.is_loopback or address.is_link_local or is_nobodys or address in _METADATA


def shown(url: str) -> str:
    """A URL for logs and errors: without query, user and control bytes."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the URL"
    return "".join(each for each in f"{parts.scheme}://{host}{parts.path}" if each.isprintable())[:200]


def _connected(parts: SplitResult, is_near_allowed: bool, end: float, fetching: Fetching, lookup: Lookup) -> socket.socket:
    host = parts.hostname or ""
    rows = lookup(host, parts.port or 443)
    if not is_near_allowed and any(is_near(str(row[4][0])) for row in rows):
        raise failed(
            f"{host} leads to this machine, to its link or to a metadata service, and is not asked.",
            "If it is right, list the host as one that may.",
        )
    failure: OSError | None = None
    for family, kind, protocol, _, place in rows:
        plug = socket.socket(family, kind, protocol)
        try:
            fetching.begin(plug)
            _give_time(plug, end)
            plug.connect(place)
        except OSError as error:
            plug.close()
            failure = error
        else:
            return plug
    raise failure or OSError("it has no address")


def _ask(plug: socket.socket, parts: SplitResult, context: ssl.SSLContext, end: float, fetching: Fetching) -> Fetched:
    _give_time(plug, end)
    with context.wrap_socket(plug, server_hostname=parts.hostname, do_handshake_on_connect=False) as wrapped:
        fetching.begin(wrapped)  # the plain socket is an empty shell from here on
        wrapped.do_handshake()
        connection = http.client.HTTPConnection(parts.netloc)
        connection.sock = wrapped
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        fields = {"accept": "application/json", "accept-encoding": "identity", "connection": "close", "user-agent": "meshlib"}
        connection.request("GET", target, headers=fields)
        with connection.getresponse() as answer:
            if 300 <= answer.status < 400:
                text = f"{parts.hostname} redirects ({answer.status}), and redirects are not followed."
                raise failed(text, "Configure the URL where the keys are.")
            if answer.status != 200:
                raise failed(f"{parts.hostname} answers {answer.status}.", "Is the URL right?")
            if answer.getheader("content-encoding", "identity").strip().lower() != "identity":
                raise failed(f"{parts.hostname} answers compressed, though it was asked not to.", "See its settings.")
            content = bytearray()
            while True:
                _give_time(wrapped, end)
                piece = answer.read1(_PIECE)
                if not piece:
                    break
                content += piece
                if len(content) > LIMIT:
                    text = f"{parts.hostname} answers with more than {LIMIT // 1024} KiB."
                    raise failed(text, "That is no key set.")
            if answer.length:
                raise failed(f"{parts.hostname} broke off in the middle of its answer.", "It will be asked again.")
            return Fetched(bytes(content), _max_age(answer.getheader("cache-control", "")))


def _max_age(text: str) -> float | None:
    found = _MAX_AGE.search(text)
    return float(found[1]) if found else None


def _give_time(plug: socket.socket, end: float) -> None:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    plug.settimeout(left)
