"""How are certificates made that are wrong in exactly one way? Authorities by name, and leaves as a case describes them.

An authority is made when its name is first heard, and each name has one. What the library won't sign (weak digests) is signed by hand: the
same certificate with another name of the algorithm in it.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

KEY_USES = (
    "digitalSignature", "contentCommitment", "keyEncipherment", "dataEncipherment", "keyAgreement", "keyCertSign", "cRLSign", "encipherOnly",
    "decipherOnly",
)  # fmt: skip
PURPOSES = {
    "serverauth": ExtendedKeyUsageOID.SERVER_AUTH, "clientauth": ExtendedKeyUsageOID.CLIENT_AUTH, "codesigning": ExtendedKeyUsageOID.CODE_SIGNING,
    "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, "emailprotection": ExtendedKeyUsageOID.EMAIL_PROTECTION,
}  # fmt: skip
_WEAK = {
    "sha1": (hashes.SHA1, "2a864886f70d010105"),
    "md5": (hashes.MD5, "2a864886f70d010104"),
    "md2": (hashes.MD5, "2a864886f70d010102"),
}


def moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def seconds_of(text: Any) -> float:
    """`+1h`, `-30m`, `-1d`, `+60`."""
    found = re.fullmatch(r"([+-]?\d+)\s*([smhdw]?)", str(text).strip())
    if found is None:
        raise ValueError(text)
    return int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


def new_key(kind: str) -> Any:
    kind = kind.lower().replace("-", "").replace("_", "")
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind[3:] or 2048))
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind == "ed448":
        return ed448.Ed448PrivateKey.generate()
    curves = {
        "p256": ec.SECP256R1,
        "p384": ec.SECP384R1,
        "p521": ec.SECP521R1,
        "secp256k1": ec.SECP256K1,
        "p224": ec.SECP224R1,
        "p192": ec.SECP192R1,
    }
    if kind.removeprefix("ec").removeprefix("dsa") in curves:
        return ec.generate_private_key(curves[kind.removeprefix("ec").removeprefix("dsa")]())
    raise ValueError(kind)


def digest_for(key: Any) -> Any:
    return None if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()


def usage(*uses: str) -> x509.KeyUsage:
    wanted = {use.lower() for use in uses}
    return x509.KeyUsage(*(use.lower() in wanted for use in KEY_USES))


@dataclass(frozen=True, eq=False)
class Authority:
    """A certificate that signs others, and its key; `above` are those over it, without the root."""

    certificate: x509.Certificate
    key: Any
    above: tuple[x509.Certificate, ...] = ()

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)


@lru_cache(maxsize=64)
def authority(name: str, kind: str = "p256", constraint: str = "") -> Authority:
    """The root of a name."""
    key = new_key(kind)
    life = (-7200.0, -3600.0) if "expired" in name else (-60.0, 7200.0)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = _builder(subject, subject, key, *life)
    builder = _signing(builder, None)
    if constraint:
        names = [x509.UniformResourceIdentifier(part) for part in _hosts(constraint)]
        is_excluded = "exclu" in constraint
        limits = x509.NameConstraints(None if is_excluded else names, names if is_excluded else None)
        builder = builder.add_extension(limits, True)
    return Authority(builder.sign(key, digest_for(key)), key)


def _hosts(constraint: str) -> list[str]:
    return [part.strip().removeprefix("spiffe://") for part in constraint.split(":", 1)[-1].split(",")]


def intermediate(below: Authority, remark: str = "") -> Authority:
    """A CA under another, as a few words describe it."""
    key = new_key("p256")
    limit = re.search(r"pathlen\s*[:=]?\s*(\d+)", remark.lower())
    life = (-7200.0, -3600.0) if "expired" in remark else (3600.0, 7200.0) if "not yet" in remark else (-60.0, 7200.0)
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"intermediate {x509.random_serial_number() % 10**8} {remark}"[:64])]
    )
    builder = _builder(subject, below.certificate.subject, key, *life)
    if any(word in remark.lower() for word in ("not ca", "not a ca", "no ca", "ca false", "leaf")):
        builder = builder.add_extension(x509.BasicConstraints(False, None), True).add_extension(usage("digitalSignature"), True)
    else:
        builder = _signing(builder, int(limit[1]) if limit else None, may_sign="keycertsign" not in remark.lower())
    certificate = builder.sign(below.key, digest_for(below.key))
    is_root = below.certificate.subject == below.certificate.issuer
    return Authority(certificate, key, (certificate,) if is_root else (certificate, *below.above))


def _signing(builder: x509.CertificateBuilder, limit: int | None, *, may_sign: bool = True) -> x509.CertificateBuilder:
    uses = ("keyCertSign", "cRLSign") if may_sign else ("cRLSign",)
    return builder.add_extension(x509.BasicConstraints(True, limit), True).add_extension(usage(*uses), True)


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, begin: float, end: float) -> x509.CertificateBuilder:
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=moment(begin),
        not_valid_after=moment(end),
    )


@dataclass(frozen=True)
class Leaf:
    """A chain and its key, as a peer presents them."""

    chain: tuple[bytes, ...]  # DER, leaf first
    key: bytes

    @property
    def pem(self) -> bytes:
        return b"".join(ssl.DER_cert_to_PEM_cert(der).encode() for der in self.chain)


def held(chain: bytes, key: bytes) -> Leaf:
    """A chain in PEM as a peer presents it."""
    certificates = x509.load_pem_x509_certificates(chain)
    return Leaf(tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in certificates), bytes(key))


def leaf(given: dict[str, Any], issuer: Authority | None, above: tuple[x509.Certificate, ...] = ()) -> Leaf:
    """A leaf with the names, uses and times that a case gives; the rest as it should be. Without an issuer it signs itself."""
    key = new_key(str(given.get("key", "p256")))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, given["cn"])] if given.get("cn") else [])
    begin = seconds_of(given["not_before"]) if "not_before" in given else -60.0
    end = seconds_of(given["not_after"]) if "not_after" in given else max(3600.0, begin + 3600.0)
    builder = _builder(subject, issuer.certificate.subject if issuer else subject, key, min(begin, end - 3600.0), end)
    names = _names(given)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), bool(given.get("san_critical", not given.get("cn"))))
    if given.get("basic_constraints", "") is not None:
        builder = builder.add_extension(x509.BasicConstraints(bool(given.get("ca", False)), None), True)
    uses = given.get("ku", given.get("key_usage", ["digitalSignature"]))
    if uses is not None:
        builder = builder.add_extension(usage(*uses), bool(given.get("ku_critical", True)))
    purposes = given.get("eku", ["serverAuth", "clientAuth"])
    if purposes:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([_purpose(purpose) for purpose in purposes]), bool(given.get("eku_critical", False))
        )
    if given.get("unknown_critical_extension") or given.get("critical_extension"):
        builder = builder.add_extension(x509.UnrecognizedExtension(ObjectIdentifier("1.3.6.1.4.1.99999.1"), b"\x05\x00"), True)
    signer = issuer.key if issuer else key
    der = builder.sign(signer, digest_for(signer)).public_bytes(serialization.Encoding.DER)
    weak = next((word for word in _WEAK if word in str(given.get("sig", "")).lower()), None)
    if weak is not None:
        der = _signed_weakly(der, signer, weak)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Leaf((der, *(certificate.public_bytes(serialization.Encoding.DER) for certificate in above)), private)


def _names(given: dict[str, Any]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(_unescaped(uri)) for uri in _all(given, "uri")]
    names += [x509.DNSName(name) for name in _all(given, "dns")]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in _all(given, "ip")]
    names += [x509.RFC822Name(name) for name in _all(given, "email")]
    for text in _all(given, "other_name"):
        value = text.encode()
        names.append(x509.OtherName(ObjectIdentifier("1.3.6.1.4.1.99999.2"), b"\x0c" + bytes([len(value)]) + value))
    return names


def _unescaped(text: str) -> str:
    """Cases write a NUL as `\\x00`."""
    return re.sub(r"\\x([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)


def _all(given: dict[str, Any], name: str) -> list[str]:
    value = given.get(name) or []
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _purpose(word: str) -> ObjectIdentifier:
    return PURPOSES.get(word.lower().replace("_", ""), ExtendedKeyUsageOID.CODE_SIGNING)


def _signed_weakly(der: bytes, key: rsa.RSAPrivateKey, weak: str) -> bytes:
    """The same certificate, signed with a digest that the library refuses to sign with."""
    digest, algorithm = _WEAK[weak]
    strong, other = bytes.fromhex("2a864886f70d01010b"), bytes.fromhex(algorithm)
    certificate = x509.load_der_x509_certificate(der)
    body = certificate.tbs_certificate_bytes.replace(strong, other)
    signature = key.sign(body, padding.PKCS1v15(), digest())
    name = b"\x30\x0d\x06\x09" + other + b"\x05\x00"
    content = body + name + b"\x03" + _length(len(signature) + 1) + b"\x00" + signature
    return b"\x30" + _length(len(content)) + content


def _length(size: int) -> bytes:
    if size < 128:
        return bytes([size])
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(octets)]) + octets


def revoked_by(issuer: Authority, *serials: int) -> bytes:
    """A list of what an authority has revoked, as PEM."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(moment(-60))
        .next_update(moment(3600))
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
    builder = builder.add_extension(identifier, False).add_extension(x509.CRLNumber(1), False)
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment(-30)).build()
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(issuer.key, digest_for(issuer.key)).public_bytes(serialization.Encoding.PEM)
