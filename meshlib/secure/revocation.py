"""What must no longer be believed, although it has not ended?

One X.509 CRL for each issuer that has signed or is about to sign certificates in use, in one PEM text: during a rotation
that is the old and the new one, so that nobody who wants a list from every issuer is ever without. The (empty) lists of
the roots follow, for verifiers that ask about the issuers too. A certificate stays listed until it would have ended by
itself.

A list is short-lived: who is kept from getting the next one notices. So somebody has to renew it: `meshlib ca serve`
does, and `meshlib ca renew` from a timer. It's made anew when something was revoked, when an issuer came or went, and
after a quarter of its life. The ledger says what was revoked; here it's only put into form.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509

from . import certificates
from .ledger import Entry, Ledger, seconds
from .roots import Issuer, Roots

LIFE: Final = 86400.0
# As RFC 5280 calls them; what needs another certificate's help (a hold, a CA) is not for us.
REASONS: Final = (
    "unspecified",
    "keyCompromise",
    "affiliationChanged",
    "superseded",
    "cessationOfOperation",
    "privilegeWithdrawn",
)

_RENEW_AT: Final = 0.25


def renewed(text: bytes, roots: Roots, ledger: Ledger, now: float, life: float = LIFE) -> bytes:
    """The lists as they have to be now: `text` itself, if that still is it."""
    signers = [root.signer for root in roots.present if root.signer is not None]
    wanted = [(signer, _revoked_by(signer, ledger, now)) for signer in signers]
    present = {_key_of(crl): crl for crl in certificates.crls_of(text)}
    of_roots = b"".join(root.crl for root in roots.present)
    owners = {certificates.key_id_of(signer.certificate) for signer in signers} | {
        _key_of(crl) for crl in certificates.crls_of(of_roots)
    }
    is_complete = present.keys() == owners
    if is_complete and all(
        _is_good(present[certificates.key_id_of(signer.certificate)], revoked, now) for signer, revoked in wanted
    ):
        return text
    made = b""
    for signer, revoked in wanted:
        before = present.get(certificates.key_id_of(signer.certificate))
        # Numbers only rise, even if the clock went back.
        number = max(int(now), _number_of(before) + 1 if before is not None else 0)
        made += certificates.pem(certificates.new_crl(signer.certificate, signer.key, revoked, life, now, number))
    return made + of_roots


def belongs_to(entry: Entry, certificate: x509.Certificate) -> bool:
    """Was it signed with the key of this certificate? Entries of earlier versions know only its serial number."""
    key = entry.get("issuer_key")
    if key is not None:
        return bool(key == certificates.key_id_of(certificate))
    return bool(entry.get("issuer") == certificates.serial_of(certificate))


def _revoked_by(signer: Issuer, ledger: Ledger, now: float) -> list[tuple[str, float, str]]:
    found = []
    for serial, entry in ledger.revoked.items():
        certificate = ledger.certificates.get(serial)
        if certificate is not None and seconds(certificate["not_after"]) > now and belongs_to(certificate, signer.certificate):
            found.append((serial, seconds(entry["time"]), entry["reason"]))
    return found


def _is_good(crl: x509.CertificateRevocationList, revoked: list[tuple[str, float, str]], now: float) -> bool:
    if crl.next_update_utc is None:
        return False
    begin, end = crl.last_update_utc.timestamp() + certificates.SKEW, crl.next_update_utc.timestamp()
    listed = {certificates.serial_text(entry.serial_number) for entry in crl}
    return {serial for serial, _, _ in revoked} <= listed and begin <= now + 1 and now - begin < _RENEW_AT * (end - begin)


def _number_of(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def _key_of(crl: x509.CertificateRevocationList) -> str:
    return (crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier or b"").hex()
