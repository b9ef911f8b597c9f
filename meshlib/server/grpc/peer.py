"""Who is at the other end of a gRPC connection?

Exactly one URI SAN, a SPIFFE ID, in a certificate that is still valid, with a chain that leads to a root of that very trust domain, by
the same function that judges the handshakes which are ours. gRPC has judged the chain too, when the connection was made; but it can't
tell which root belongs to which trust domain, looks at no list of revocations, and keeps a connection whose root has left the bundle
or whose certificate has ended. So the chain is judged again under each new identity of ours, and the end of its validity is looked
at for each call: such a connection stays open, and who calls over it is a caller without identity.

What can't be read proves nothing, and is no error: the rules decide what a caller without identity may do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

from meshlib import errors
from meshlib._native import core
from meshlib.call import Peer

from ..line import PLAIN, PLAIN_TLS

# Chains of peers whose judgement is remembered, for as long as our own identity is the same.
CHAINS_KEPT: Final = 1024


class Callers:
    """Reads the peer from a connection's auth context. `identity` answers ours, with the bundles and revocations in force."""

    __slots__ = ("_identity", "_judged", "_wall_clock")

    def __init__(self, identity: Callable[[], Any], wall_clock: Callable[[], float] = time.time) -> None:
        self._identity = identity
        self._wall_clock = wall_clock
        # One pair, so that no answer under an identity that has gone can slip among those of the next.
        self._judged: tuple[Any, dict[bytes, bool]] = (None, {})

    def peer_of(self, auth: Any) -> Peer:
        if auth.get("transport_security_type") != [b"ssl"]:
            return PLAIN
        names, uris, certificates = auth.get("peer_spiffe_id"), auth.get("peer_uri"), auth.get("x509_pem_cert")
        if not names or names != uris or len(names) != 1 or not certificates:
            return PLAIN_TLS
        peer = _read(names[0], certificates[0])
        if peer is None or peer.not_after <= self._wall_clock():
            return PLAIN_TLS
        # What a server is told of the chain begins behind the leaf.
        chain = certificates[0] + b"\n" + b"\n".join(auth.get("x509_pem_cert_chain") or ())
        return peer if self._is_believed(chain, peer) else PLAIN_TLS

    def _is_believed(self, chain: bytes, peer: Peer) -> bool:
        current = self._identity()
        if current is None:
            return False
        identity, judged = self._judged
        if identity is not current or len(judged) >= CHAINS_KEPT:
            judged = {}
            self._judged = current, judged
        found = judged.get(chain)
        if found is None:
            found = judged[chain] = _proves(chain, peer.spiffe_id, current, self._wall_clock())
        return found


def _proves(chain: bytes, name: str, identity: Any, now: float) -> bool:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        # Each once: it depends on gRPC's TLS whether the leaf stands in both.
        certificates = list(dict.fromkeys(found.public_bytes(Encoding.DER) for found in x509.load_pem_x509_certificates(chain)))
        proved = core.verify_chain(certificates, identity.bundles, "", now, "clients", identity.crls)
    except (ValueError, errors.MeshError):
        return False
    return bool(proved["id"] == name)


@lru_cache(maxsize=CHAINS_KEPT)
def _read(name: bytes, certificate: bytes) -> Peer | None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    from meshlib.secure.certificates import serial_of

    try:
        text = name.decode("ascii")
        core.parse_spiffe_id(text)
        leaf = x509.load_pem_x509_certificate(certificate)
        return Peer(
            text,
            is_tls=True,
            serial=serial_of(leaf),
            not_after=leaf.not_valid_after_utc.timestamp(),
            chain=(leaf.public_bytes(Encoding.DER),),
        )
    except Exception:
        return None  # what can't be read proves nothing
