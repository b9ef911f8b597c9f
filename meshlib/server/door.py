"""May this connection come in, and who is at its other end?

Decided once per connection, before a byte of it is taken for a request. The first byte tells TLS (22, a handshake record) from plain
text. The mode of the service says what is taken: enforce takes mutual TLS only, and tells a plain caller so in words that a person
with curl understands; permissive takes TLS and plain text on the same port; observe takes plain text, and TLS too once there is an
identity to serve it with. On the public listener, for callers without an identity, plain text is welcome in every mode, and so is TLS
with a certificate or without: the gate has rules of its own for them. Every new connection gets the newest identity. TLS itself is the
wire crate's: what is asked here is which TLS, and what it proved, parsed once for the life of the connection.

What was proved can cease to hold while the connection is open: the certificate ends, or a root is withdrawn. `standing` says so, by
the very TLS that shook hands against the one in force: the servers ask before each request, and close what is idle.

It does no I/O: `uvicorn.py` moves the bytes for event loops, `gunicorn.py` for threads. It does not authorise: that is done per
request, by the gate.
"""

from __future__ import annotations

import logging
import re
import time
import weakref
from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol
from weakref import WeakSet

from .._native import core
from ..call import Peer
from ..errors import MeshError, PeerIdentityError
from .line import PLAIN_TLS
from .way import InboundWay

if TYPE_CHECKING:
    from ..admit.inbound import InboundRates
    from ..config import Config
    from ..keeper import Keeper
    from ..observe import Observer
    from ..observe.edges import Watch
    from ..secure import IdentityStore
    from ..secure.trust import Trust
    from ..upkeep import Upkeep
    from .handed import Handed
    from .waiting import Room

log = logging.getLogger("meshlib.server")

# The first byte of every TLS connection: the record type "handshake". No HTTP request begins with it.
HANDSHAKE: Final = 22

# Seconds from a connection's first moment to the end of its handshake.
PATIENCE: Final = 10.0

# The head of a request: from its first byte to its last within `PATIENCE`, in no more bytes than this, in no more fields.
HEAD: Final = 60 * 1024
FIELDS: Final = 100

# Seconds between two lines in the log on handshakes that failed in the same way. Whoever can connect can cause them.
QUIET: Final = 10.0
KINDS: Final = 100

_WORDS: Final = (
    b"This port speaks mutual TLS. The caller sent plain HTTP; it needs a certificate of this mesh and https.\n"
    b"(Service in mode enforce. In mode permissive it would take both.)\n"
)
REFUSAL: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    % len(_WORDS)
) + _WORDS


# To a caller that does speak TLS, when we have no identity (any more) to speak it with: the fatal alert internal_error.
ALERT: Final = b"\x15\x03\x03\x00\x02\x02\x50"


def refusal_of(first: int) -> bytes:
    """What a connection gets that `Door.open` refused, in the language that it speaks."""
    return ALERT if first == HANDSHAKE else REFUSAL


class Standing(IntEnum):
    """How far the proof of a connection's peer still goes."""

    GOOD = 0
    # Proved under an identity that is not in force any more, and it would do for the new one too: one more answer, then a new handshake.
    LAST = 1
    # Ended or withdrawn: nothing more is answered.
    OVER = 2


class Inside(Protocol):
    """What is behind the door: a `Mesh`, as far as the servers need it."""

    config: Config
    service: str
    gate: core.Gate
    observer: Observer
    keeper: Keeper
    trust: Trust
    watch: Watch
    upkeep: Upkeep
    room: Room
    ways: WeakSet[InboundWay]
    inbound_rates: InboundRates | None
    handed: Handed | None

    @property
    def identity(self) -> IdentityStore | None: ...

    def start(self) -> object: ...
    def drain(self) -> object: ...
    def close(self) -> object: ...
    def metrics(self) -> str: ...


class Door:
    """The door of one mesh. State of the Service that we are; its mode and identity are asked anew for every connection.

    Counters: `handshakes` (of them `resumed`), `failed` handshakes, `plain` connections taken and `refused` ones, and those that
    `ended` because what their peer had proved ceased to hold.
    """

    __slots__ = (
        *("__weakref__", "_clock", "_mesh", "_public", "_told"),
        *("ended", "failed", "handshakes", "is_served", "plain", "refused", "resumed"),
    )

    def __init__(self, mesh: Inside, clock: Callable[[], float] = time.monotonic) -> None:
        # Weak: the table of doors must not keep a mesh that nobody else has any more.
        self._mesh = weakref.ref(mesh)
        self.handshakes = self.resumed = self.failed = self.plain = self.refused = self.ended = 0
        self._clock = clock
        self._public: int | None = None
        # By `serve`, with all the listeners of the configuration; a server's own command knows one.
        self.is_served = False
        # When a kind of failure was told last, and how many came since.
        self._told: dict[str, tuple[float, int]] = {}

    @property
    def mesh(self) -> Inside:
        mesh = self._mesh()
        if mesh is None:
            raise RuntimeError("the mesh of this door is gone: keep it as long as its server runs")
        return mesh

    @property
    def mode(self) -> str:
        return self.mesh.config.own.mode

    def is_public(self, port: int) -> bool:
        """Is this port of ours the public listener's? To be asked with what the socket says, and never with what a request does.

        As it was when the first connection came: a listener that is open doesn't change sides with the configuration.
        """
        if self._public is None:
            public = self.mesh.config.own.inbound.public
            self._public = 0 if public is None else int(public.rpartition(":")[2])
        return port != 0 and port == self._public

    def is_agents(self, port: int) -> bool:
        """Does the node agent hand calls over at this socket? They come in plain, and the agent's word stands for their proof."""
        return port == 0 and bool(self.mesh.config.own.inbound.agent)

    def takes_only_plain(self, *, is_public: bool = False) -> bool:
        """True where nothing is to be told apart: plain text is welcome, and there is no identity to serve TLS with."""
        return (is_public or self.mode == "observe") and self._store() is None

    def admits_plain(self, first: int, *, is_public: bool = False) -> bool:
        """Judge a connection by its first byte: True, it is plain text and welcome; False, it must speak TLS."""
        if first == HANDSHAKE and self._store() is not None:
            return False
        return is_public or self.mode != "enforce"

    def open(self, first: int, *, is_public: bool = False) -> core.TlsConnection | None:
        """TLS with the newest identity for a connection that must speak it; None if it doesn't try, or if we have none to speak it with:
        it gets `refusal_of`.
        """
        store = self._store()
        if first != HANDSHAKE or store is None:
            self.refused += 1
            if first == HANDSHAKE:
                text = "refused a TLS connection: this service has no identity (any more); the log says why it is gone"
                self._tell(text, "%s%s", text)
            else:
                log.info("refused a plain connection: this service is in mode enforce")
            return None
        return core.TlsConnection(store.server_tls(self.demands(is_public=is_public)))

    def welcome(self, tls: core.TlsConnection, address: str = "") -> tuple[Peer, dict[str, Any]]:
        """Who is there, now that the handshake is done: the peer, and the ASGI TLS extension with it. `address`: where it is."""
        chain = tuple(tls.peer_chain)
        pem, subject, serial = _described(chain)
        self.handshakes += 1
        self.resumed += tls.tls_resumed
        identity = tls.peer
        peer = Peer(identity, True, serial, tls.peer_not_after, chain) if identity else PLAIN_TLS
        if identity and address:
            self.mesh.watch.proved(address, identity)
        version, cipher = tls.tls_version or "", tls.tls_cipher or ""
        return peer, {
            # As published (version 0.2 of the extension).
            "server_cert": None,
            "client_cert_chain": pem,
            "client_cert_name": subject,
            "client_cert_error": None,
            "tls_version": VERSIONS.get(version),
            "cipher_suite": _CIPHERS.get(cipher.removeprefix("TLS_")),
            # As it is going to be: the certificate itself.
            "client_cert": chain[0] if chain else None,
            PEER: peer,
            SNI: tls.server_name or "",
        }

    def fail(self, error: Exception) -> None:
        """A handshake failed: counted, and told, each kind once in a while, so that nobody can fill the log or hide in it."""
        self.failed += 1
        kind = _kind_of(error)
        if kind not in self._told and len(self._told) >= KINDS:
            kind = type(error).__name__
        self._tell(kind, "a TLS handshake failed%s: %s", error, is_last=True)

    def _tell(self, kind: str, line: str, what: object, *, is_last: bool = False) -> None:
        now = self._clock()
        told, more = self._told.get(kind, (-QUIET, 0))
        if now - told < QUIET:
            self._told[kind] = told, more + 1
            return
        self._told[kind] = now, 0
        others = f" (and {more} more of this kind since the last line)" if more else ""
        log.warning(line, *((others, what) if is_last else (what, others)))

    def standing(self, tls: core.TlsConnection, *, is_public: bool = False) -> Standing:
        """Does what the handshake of this connection proved still hold?"""
        end = tls.peer_not_after
        if end and time.time() >= end:
            return Standing.OVER
        present = self.tls_for(is_public=is_public)
        if tls.server is present:
            return Standing.GOOD
        return Standing.LAST if present is not None and present.accepts(tls.peer_chain) else Standing.OVER

    def demands(self, *, is_public: bool = False) -> bool:
        """Is nobody let in without a certificate?"""
        return self.mode == "enforce" and not is_public

    def tls_for(self, *, is_public: bool = False) -> core.TlsServer | None:
        """The TLS that new connections get; None without an identity."""
        store = self._store()
        try:
            return store.server_tls(self.demands(is_public=is_public)) if store is not None else None
        except MeshError:
            return None

    @property
    def force(self) -> tuple[object, object]:
        """What connections are judged by: as long as both are the same objects, what was proved holds as it did."""
        mesh = self.mesh
        store = mesh.identity
        return mesh.config, None if store is None else store.generation

    def seconds_left(self, tls: core.TlsConnection) -> float | None:
        """How long the proof of this connection's peer holds; None for a peer without one."""
        end = tls.peer_not_after
        return max(0.0, end - time.time()) if end else None

    def _store(self) -> IdentityStore | None:
        store = self.mesh.identity
        return store if store is not None and store.current is not None else None


# The key under which a server of ours hands over the peer: in the TLS extension of ASGI, and in the environ of WSGI. It can't come
# from a request: keys made of headers look different.
PEER: Final = "meshlib.peer"
SNI: Final = "meshlib.sni"
# In the environ of WSGI beside them: our own port as the socket says it, and whether it is the public listener's.
PORT: Final = "meshlib.port"
PUBLIC: Final = "meshlib.public"
# And when the request had come, by the monotonic clock: it may have waited for a thread since.
ARRIVED: Final = "meshlib.arrived"


class Proof:
    """What the handshake of one connection proved, asked before each request: does it still hold? State of the connection.

    Nearly always nothing has changed since it was asked last, and then the clock is all that is looked at.
    """

    __slots__ = ("_door", "_end", "_force", "_is_public", "_tls")

    def __init__(self, door: Door, tls: core.TlsConnection, *, is_public: bool = False) -> None:
        self._door = door
        self._tls = tls
        self._is_public = is_public
        self._end = tls.peer_not_after
        self._force: tuple[object, object] | None = None

    def __call__(self) -> Standing:
        config, generation = self._door.force
        known = self._force
        if known is not None and known[0] is config and known[1] is generation and (not self._end or time.time() < self._end):
            return Standing.GOOD
        standing = self._door.standing(self._tls, is_public=self._is_public)
        if standing is Standing.GOOD:
            self._force = config, generation
        elif standing is Standing.OVER:
            self._door.ended += 1
        return standing


_doors: weakref.WeakKeyDictionary[Inside, Door] = weakref.WeakKeyDictionary()
_latest: Door | None = None


def door_of(mesh: Inside) -> Door:
    """The one door of a mesh."""
    global _latest
    door = _doors.get(mesh)
    if door is None:
        door = _doors[mesh] = Door(mesh)
    _latest = door
    return door


def way_into(mesh: Inside) -> InboundWay:
    """An inbound way of a mesh, which starts the mesh in the process that takes the first call."""
    from .drain import Phase, drain_of

    door = door_of(mesh)

    def wake() -> None:
        drain = drain_of(mesh)
        if drain.phase is Phase.ENDED:
            drain.renew()  # an application that is started again, as test clients do
        inbound = mesh.config.own.inbound
        if not door.is_served and (inbound.probe or inbound.public):
            log.warning(
                "inbound.public and inbound.probe of services.%s are opened by `meshlib serve` and mesh.serve(), and not by a server's own "
                "command: nobody listens there now.",
                mesh.service,
            )
        mesh.start()
        mesh.keeper.start()  # in a forked child, the mesh is started and its thread is not

    way = InboundWay(
        mesh.gate,
        mesh.observer,
        door=door,
        wake=wake,
        depart=lambda: drain_of(mesh).depart(),
        trust=mesh.trust,
        room=mesh.room,
    )
    drain_of(mesh).follow(way)
    way.rates = mesh.inbound_rates
    way.agent = mesh.handed
    mesh.ways.add(way)
    return way


def has_latest() -> bool:
    return _latest is not None


def latest() -> Door:
    """The door of the mesh in this process, for servers that are started by their own command line."""
    door = _latest
    if door is None:
        raise RuntimeError(
            "this server was told to speak for a mesh, and the application has none: wrap it (`app = mesh.asgi(app)` or "
            "`mesh.wsgi(app)`), or start it with `meshlib serve`."
        )
    return door


def _kind_of(error: Exception) -> str:
    """The text of an error without what a stranger chose in it: names, numbers and whatever is quoted."""
    text = str(error).split("\n", 1)[0][:300]
    kind = _CHOSEN.sub("…", text)
    return f"{type(error).__name__}: {kind}"


_CHOSEN: Final = re.compile(r"spiffe://[^\s,]*|\"[^\"]*\"|'[^']*'|\(.*\)|\d+")


@lru_cache(maxsize=512)
def _described(chain: tuple[bytes, ...]) -> tuple[tuple[str, ...], str | None, str]:
    """Chain as PEM, the subject's name and the serial number. The same few peers come again and again."""
    if not chain:
        return (), None, ""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from ..secure.certificates import serial_text

    try:
        certificates = [x509.load_der_x509_certificate(der) for der in chain]
        pem = tuple(certificate.public_bytes(Encoding.PEM).decode() for certificate in certificates)
        return pem, certificates[0].subject.rfc4514_string(), serial_text(certificates[0].serial_number)
    except Exception as error:
        # TLS verified what it needs of a chain; what is beside that may be anything.
        raise PeerIdentityError(
            "The peer's certificates can't be described: one of them can't be parsed.",
            hint="Likely cause: a chain with more in it than the certificates that sign one another. Issue its identity again.",
        ) from error


VERSIONS: Final = {"TLSv1.2": 0x0303, "TLSv1.3": 0x0304}
_CIPHERS: Final = {
    "AES_128_GCM_SHA256": 0x1301,
    "AES_256_GCM_SHA384": 0x1302,
    "CHACHA20_POLY1305_SHA256": 0x1303,
    "ECDHE_ECDSA_WITH_AES_128_GCM_SHA256": 0xC02B,
    "ECDHE_ECDSA_WITH_AES_256_GCM_SHA384": 0xC02C,
    "ECDHE_RSA_WITH_AES_128_GCM_SHA256": 0xC02F,
    "ECDHE_RSA_WITH_AES_256_GCM_SHA384": 0xC030,
    "ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256": 0xCCA8,
    "ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256": 0xCCA9,
}
