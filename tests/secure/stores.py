"""What do tests of our own identity need? A clock, a store without native TLS, a source that obeys, and a handshake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography import x509

from meshlib._native import core
from meshlib.secure import (
    CertificateAuthority,
    Identity,
    IdentityStore,
    certificates,
    renewal_of,
)

NOW = 1_800_000_000.0
LIFE = 1000.0
ID = "spiffe://shop.internal/ns/default/sa/orders"


class Clock:
    """A wall clock that is moved by hand."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Tls:
    """Stands for the native TLS objects: remembers what it was made of."""

    crls_until = float("inf")

    def __init__(
        self,
        chain: bytes,
        key: bytes,
        bundles: dict[str, bytes],
        generation: int,
        *more: Any,
        before: Any = None,
        crls: Any = None,
    ) -> None:
        self.chain, self.key, self.bundles, self.generation, self.more = chain, key, bundles, generation, more
        self.before, self.crls = before, crls


class Told:
    """A source that says what a test wants: an identity, or an error."""

    def __init__(self, said: Identity | Exception) -> None:
        self.said = said
        self.loads = 0
        self.calls: list[str] = []

    def load(self) -> Identity:
        self.loads += 1
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def after_fork(self) -> None:
        self.calls.append("after_fork")

    def close(self) -> None:
        self.calls.append("close")


class Renewing(Told):
    """A source that renews: it is asked when it says."""

    def refresh_at(self, identity: Identity, now: float) -> float:
        return renewal_of(identity, lambda: 0.5)


def store_of(source: Any, clock: Clock, /, mode: str = "enforce", **more: Any) -> IdentityStore:
    return IdentityStore(source, mode=mode, wall_clock=clock, **{"clock": clock, "tls_client": Tls, "tls_server": Tls, **more})


def serial_in(folder: Path) -> str:
    return certificates.serial_of(x509.load_pem_x509_certificate((folder / "svid.pem").read_bytes()))


def issuer_of(authority: CertificateAuthority) -> tuple[x509.Certificate, Any]:
    """Who signs leaves: the intermediate."""
    signing: Any = authority._roots.signing.issuer
    return signing.certificate, signing.key


def handshake(server: IdentityStore, client: IdentityStore) -> tuple[str | None, str | None, bool]:
    """Both peers as each side proved them to the other, and whether a session was resumed; raises if one refuses."""
    connection, listener = core.HttpConnection(client.client_tls, ID, "server"), core.TlsConnection(server.server_tls(True))
    flight = connection.open()
    while flight:
        _, answer, _ = listener.receive(flight)
        flight, _ = connection.receive(bytearray(answer), len(answer))
    return listener.peer, connection.peer, listener.tls_resumed
