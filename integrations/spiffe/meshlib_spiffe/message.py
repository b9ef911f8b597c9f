"""What does a message of the Workload API say about us?

Each message is the whole truth of that moment: an SVID, a bundle or a list of revocations that is not in it any more is not ours
any more. A message that lacks what it must have is discarded as a whole, and what was known before stays. Of several SVIDs with
one hint the first counts; ours is the one with the configured hint or, without one, the one of our SPIFFE ID.

The parsers are those of the library `spiffe`; whether the parts make an identity is judged by the mesh, as for every source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from spiffe import TrustDomain, X509Bundle, X509Svid
from spiffe.errors import PySpiffeError

from meshlib.errors import IdentityError
from meshlib.secure import Parts, Secret

if TYPE_CHECKING:
    from spiffe._proto import workload_pb2

_MANDATORY = ("spiffe_id", "x509_svid", "x509_svid_key", "bundle")
_AGENT = "The agent sent something that the standard doesn't allow: see its log, and its version."


class NotOurs(Exception):
    """A good message, and there is no SVID for us in it. `entitled` are the SPIFFE IDs that are."""

    def __init__(self, entitled: Sequence[str]) -> None:
        super().__init__(", ".join(entitled))
        self.entitled = entitled


def parts_of(message: workload_pb2.X509SVIDResponse, spiffe_id: str, hint: str = "") -> Parts:
    """Our SVID in a message, and whom to trust. Raises NotOurs, and IdentityError if the message must be discarded."""
    if not message.svids:
        raise IdentityError("a message of the Workload API holds no SVID, and was discarded.", hint=_AGENT)
    for svid in message.svids:
        if missing := [name for name in _MANDATORY if not getattr(svid, name)]:
            raise IdentityError(
                f"an SVID of the Workload API lacks {', '.join(missing)}, and the message was discarded.", hint=_AGENT
            )
    ours = _ours(message.svids, spiffe_id, hint)
    try:
        parsed = X509Svid.parse_raw(ours.x509_svid, ours.x509_svid_key)
        key = parsed.private_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        if str(parsed.spiffe_id) != ours.spiffe_id:
            raise IdentityError(
                f"an SVID of the Workload API is for {parsed.spiffe_id}, and is called {ours.spiffe_id}.", hint=_AGENT
            )
        own = parsed.spiffe_id.trust_domain
        federated = {}
        for name, document in message.federated_bundles.items():
            domain = TrustDomain(name)
            if domain != own:  # that one stands beside the SVID
                federated[domain.name] = _bundle(domain, document)
        bundle = _bundle(own, ours.bundle)
        crl = b"".join(x509.load_der_x509_crl(each).public_bytes(Encoding.PEM) for each in message.crl)
    except (PySpiffeError, ValueError, TypeError) as error:
        # Their texts name what is wrong with the certificate, and never quote a key. The error behind them might.
        said = str(error) if isinstance(error, PySpiffeError) else type(error).__name__
        raise IdentityError(f"a message of the Workload API can't be read, and was discarded: {said}.", hint=_AGENT) from None
    return Parts(_pem(parsed.cert_chain), Secret(key), bundle, crl, federated)


def _ours(svids: Iterable[Any], spiffe_id: str, hint: str) -> Any:
    seen, counting = set[str](), list[Any]()
    for svid in svids:
        if not svid.hint or svid.hint not in seen:
            counting.append(svid)
        seen.add(svid.hint)
    for svid in counting:
        if svid.hint == hint if hint else svid.spiffe_id == spiffe_id:
            return svid
    raise NotOurs([svid.spiffe_id for svid in counting])


def _bundle(domain: TrustDomain, document: bytes) -> bytes:
    # They come as a set: in the same order each time, so that what is the same looks the same.
    return _pem(sorted(X509Bundle.parse_raw(domain, document).x509_authorities, key=lambda root: root.public_bytes(Encoding.DER)))


def _pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
