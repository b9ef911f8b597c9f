"""What does a message of the Workload API say about us?

Each message is the whole truth of that moment: an SVID, a bundle or a list of revocations that is not in it any more is not ours
any more. A message that lacks what it must have is discarded as a whole, and what was known before stays. Of several SVIDs with
one hint the first counts; ours is the one with the configured hint or, without one, the one of our SPIFFE ID.

Whether the parts make an identity is judged by `proof.py`, as for every source. Whose class a message is doesn't matter, as long as it
has the fields of the standard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from ...errors import IdentityError
from ..files import Secret
from ..proof import Parts

_MANDATORY: Final = ("spiffe_id", "x509_svid", "x509_svid_key", "bundle")
_AGENT: Final = "The agent sent something that the standard doesn't allow: see its log, and its version."
_SEQUENCE: Final = 0x30


class Message(Protocol):
    """An X509SVIDResponse, of whatever class."""

    @property
    def svids(self) -> Sequence[Any]: ...
    @property
    def crl(self) -> Iterable[bytes]: ...
    @property
    def federated_bundles(self) -> Mapping[str, bytes]: ...


class NotOurs(Exception):
    """A good message, and there is no SVID for us in it. `entitled` are the SPIFFE IDs that are."""

    def __init__(self, entitled: Sequence[str]) -> None:
        super().__init__(", ".join(entitled))
        self.entitled = entitled


def parts_of(message: Message, spiffe_id: str, hint: str = "") -> Parts:
    """Our SVID in a message, and whom to trust. Raises NotOurs, and IdentityError if the message must be discarded."""
    if not message.svids:
        raise IdentityError("a message of the Workload API holds no SVID, and was discarded.", hint=_AGENT)
    for svid in message.svids:
        if missing := [name for name in _MANDATORY if not getattr(svid, name)]:
            raise IdentityError(
                f"an SVID of the Workload API lacks {', '.join(missing)}, and the message was discarded.", hint=_AGENT
            )
    ours = _ours(message.svids, spiffe_id, hint)
    own = _name(ours.spiffe_id.removeprefix("spiffe://").partition("/")[0])
    try:
        chain = _pem(_certificates(ours.x509_svid))
        key = load_der_private_key(ours.x509_svid_key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        federated = {_name(name): _roots(document) for name, document in message.federated_bundles.items()}
        federated.pop(own, None)  # that one stands beside the SVID
        bundle = _roots(ours.bundle)
        crl = b"".join(x509.load_der_x509_crl(each).public_bytes(Encoding.PEM) for each in message.crl)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        # Its text may quote what it read.
        raise IdentityError(
            f"a message of the Workload API can't be read, and was discarded: {type(error).__name__}.", hint=_AGENT
        ) from None
    return Parts(chain, Secret(key), bundle, crl, federated)


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


def _name(trust_domain: str) -> str:
    """The standard calls a trust domain by its SPIFFE ID; some agents by its name."""
    return trust_domain.removeprefix("spiffe://")


def _roots(document: bytes) -> bytes:
    # They come as a set: in the same order each time, so that what is the same looks the same.
    return _pem(sorted(_certificates(document), key=lambda root: root.public_bytes(Encoding.DER)))


def _certificates(data: bytes) -> list[x509.Certificate]:
    """Certificates in a row, without anything between them."""
    found, at = list[x509.Certificate](), 0
    while at < len(data):
        end = at + _length(data, at)
        found.append(x509.load_der_x509_certificate(data[at:end]))
        at = end
    if not found:
        raise ValueError("there is no certificate")
    return found


def _length(data: bytes, at: int) -> int:
    """Of the DER sequence that begins there, with its head."""
    head = data[at : at + 6]
    if len(head) < 2 or head[0] != _SEQUENCE:
        raise ValueError("there is no sequence")
    if head[1] < 0x80:
        size, content = 2, head[1]
    else:
        size = 2 + (head[1] & 0x7F)
        if not 3 <= size <= len(head):
            raise ValueError("its length can't be read")
        content = int.from_bytes(head[2:size])
    if content > len(data) - at - size:
        raise ValueError("it is cut off")
    return size + content


def _pem(certificates: Iterable[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
