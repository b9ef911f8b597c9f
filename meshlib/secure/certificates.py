"""What stands in a certificate of the mesh?

The one place that builds and takes apart X.509, by the rules for SPIFFE X.509-SVIDs: a root and the issuer (the
intermediate) under it name their trust domain (URI SAN without a path) and may sign certificates and revocations,
nothing else; a leaf has exactly one URI SAN with a path, is no CA, and serves both ends of a connection. Its subject is
empty, so its SAN is critical. The DNS name beside the URI is for clients that can't compare URIs (gRPC).

It does not judge peers: that is the native core's. What is checked here is our own certificate, before we stand up
with it.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import IdentityError

# Clocks differ: without this, a new certificate is refused by every machine whose clock is a little behind.
SKEW: Final = 30.0
LONGEST_CHAIN: Final = 8

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_LABEL: Final = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SERVICE: Final = re.compile(_LABEL)
_SEGMENT: Final = re.compile(r"[a-zA-Z0-9._-]+")
_TRUST_DOMAIN: Final = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_CRL: Final = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----\s*", re.DOTALL)
_KEY_USES: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def checked_trust_domain(name: str) -> str:
    """The name, if a trust domain may be called so and DNS names can stand under it."""
    if not _TRUST_DOMAIN.fullmatch(name) or len(name) > 200:
        raise IdentityError(
            f"{name!r} can't be a trust domain.",
            hint='Use small letters, digits, "-" and dots, such as shop.internal; no scheme, no port, no path.',
        )
    return name


def checked_label(what: str, name: str) -> str:
    """The name, if it can be a segment of a SPIFFE ID and a label of a DNS name."""
    if not _SERVICE.fullmatch(name):
        raise IdentityError(f"{name!r} can't be a {what}.", hint='Use small letters, digits and inner "-", at most 63.')
    return name


def checked_id(spiffe_id: str, trust_domain: str) -> str:
    """The ID, if it is one of a workload in this trust domain."""
    if not spiffe_id.startswith(f"spiffe://{trust_domain}/"):
        raise IdentityError(
            f"{spiffe_id} is not of the trust domain {trust_domain}.", hint="A CA speaks for its own trust domain only."
        )
    segments = spiffe_id.split("/")[3:]
    if len(spiffe_id) > 2048 or not all(_SEGMENT.fullmatch(segment) and segment not in {".", ".."} for segment in segments):
        raise IdentityError(
            f"{spiffe_id!r} is no SPIFFE ID.", hint='Segments have letters, digits, ".", "-" and "_", and are not empty.'
        )
    return spiffe_id


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def new_root(key: ec.EllipticCurvePrivateKey, trust_domain: str, life: float, now: float) -> x509.Certificate:
    """A self-signed root, for one level of issuers of its trust domain."""
    serial = x509.random_serial_number()
    # Two roots of one trust domain stand in a bundle during a rotation: their names must differ.
    name = _named("root", serial)
    return _signing(_builder(name, name, key, serial, life, now), trust_domain, 1).sign(key, hashes.SHA256())


def new_issuer(
    key: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
    root_key: ec.EllipticCurvePrivateKey,
    trust_domain: str,
    life: float,
    now: float,
    name: x509.Name | None = None,
) -> x509.Certificate:
    """An intermediate that signs leaves and revocations, and no further CAs.

    One that is renewed keeps its name and key: so its list of revocations speaks for all that it has ever signed.
    """
    serial = x509.random_serial_number()
    builder = _builder(name or _named("issuer", serial), root.subject, key, serial, life, now)
    return _signing(builder, trust_domain, 0).add_extension(_authority_key(root), critical=False).sign(root_key, hashes.SHA256())


def new_leaf(
    key: ec.EllipticCurvePrivateKey | PublicKey,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    spiffe_id: str,
    dns_name: str,
    life: float,
    now: float,
) -> x509.Certificate:
    """An X.509-SVID for `spiffe_id`."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id)]
    if dns_name:
        names.append(x509.DNSName(dns_name))
    return (
        _builder(x509.Name([]), issuer.subject, key, x509.random_serial_number(), life, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=True)
        .add_extension(_authority_key(issuer), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def new_crl(
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    revoked: Iterable[tuple[str, float, str]],
    life: float,
    now: float,
    number: int,
) -> x509.CertificateRevocationList:
    """What an issuer has revoked: (serial, time, reason); the next list is due at the end of `life`."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(_date(math.floor(now) - SKEW))
        .next_update(_date(math.floor(now) + math.ceil(life)))
        .add_extension(_authority_key(issuer), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for serial, moment, reason in revoked:
        entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_date(math.floor(moment)))
        if reason != "unspecified":  # a list must not say so: the reason is left out
            entry = entry.add_extension(x509.CRLReason(x509.ReasonFlags(reason)), critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(issuer_key, hashes.SHA256())


def pem(*certificates: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def crls_of(text: bytes) -> list[x509.CertificateRevocationList]:
    """All lists of revocations in a PEM text; ValueError where one is none."""
    return [x509.load_pem_x509_crl(block) for block in _CRL.findall(text)]


def fingerprint_of(certificate: x509.Certificate) -> str:
    """The SHA-256 of the whole certificate, in hex, as `openssl x509 -fingerprint -sha256` shows it without colons."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def key_id_of(certificate: x509.Certificate) -> str:
    """What a certificate calls its key: the same for all certificates of one key."""
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def serial_text(serial: int) -> str:
    """Lower-case hex with an even number of digits: the bytes as they stand in the certificate."""
    return serial.to_bytes((serial.bit_length() + 7) // 8 or 1).hex()


def serial_of(certificate: x509.Certificate) -> str:
    return serial_text(certificate.serial_number)


def uris_of(certificate: x509.Certificate) -> list[str]:
    return _names_of(certificate).get_values_for_type(x509.UniformResourceIdentifier)


def dns_names_of(certificate: x509.Certificate) -> list[str]:
    return _names_of(certificate).get_values_for_type(x509.DNSName)


def trust_domain_of(uri: str) -> str:
    """What stands between `spiffe://` and the path; "" for another scheme."""
    return uri[9:].split("/", 1)[0] if uri.startswith("spiffe://") else ""


def flaw_of_leaf(certificate: x509.Certificate) -> str:
    """What keeps a certificate from being an X.509-SVID of a workload, in a few words; "" if nothing does."""
    extensions = certificate.extensions
    uris = uris_of(certificate)
    if len(uris) != 1:
        return f"it has {len(uris)} URI names instead of one SPIFFE ID"
    if not trust_domain_of(uris[0]) or not uris[0][9:].partition("/")[2]:
        return f"its URI name {uris[0]!r} is not the SPIFFE ID of a workload"
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return "it is the certificate of a CA, which must not speak for a workload"
    except x509.ExtensionNotFound:
        pass
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage)
    except x509.ExtensionNotFound:
        return "it has no key usage"
    if not usage.value.digital_signature or usage.value.key_cert_sign or usage.value.crl_sign:
        return "its key usage is not that of a workload (digital signature, and no signing of certificates)"
    try:
        purposes = set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return ""
    if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= purposes:
        return "its extended key usage does not name both server and client"
    return ""


def is_anchored(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> bool:
    """True if signatures lead from the first certificate of the chain to one of the roots.

    Asked about our own chain only, to see early that peers would refuse it; times and constraints are theirs to judge.
    """
    current, rest = chain[0], chain[1:LONGEST_CHAIN]
    while True:
        if any(_has_signed(root, current) for root in roots):
            return True
        above = next((candidate for candidate in rest if _has_signed(candidate, current)), None)
        if above is None:
            return False
        rest = [candidate for candidate in rest if candidate is not above]
        current = above


def _names_of(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def _has_signed(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _named(role: str, serial: int) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"meshlib {role} {serial_text(serial)[:8]}")])


def _signing(builder: x509.CertificateBuilder, trust_domain: str, path_length: int) -> x509.CertificateBuilder:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")])
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(names, critical=False)
    )


def _authority_key(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
        issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey | PublicKey,
    serial: int,
    life: float,
    now: float,
) -> x509.CertificateBuilder:
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    start = math.floor(now)  # certificates count in whole seconds; one start for both ends keeps the life exact
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(_date(start - SKEW))
        .not_valid_after(_date(start + math.ceil(life)))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _date(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _usage(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in _KEY_USES})
