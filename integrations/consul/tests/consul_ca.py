"""What do the certificates of Consul's built-in CA look like?

A root and the leafs under it with the names, usages and lives that Consul gives them: the trust domain is a UUID under `.consul`, a
root may sign data too, a leaf has usages beyond a signature, begins a minute ago and lives three days, and its key is in SEC 1.
"""

from __future__ import annotations

import datetime
import uuid
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USES = (
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


class ConsulAuthority:
    def __init__(self, datacenter: str = "dc1") -> None:
        self.trust_domain = f"{uuid.uuid4()}.consul"
        self.datacenter = datacenter
        self.serial = 6
        self.known: list[tuple[x509.Certificate, ec.EllipticCurvePrivateKey]] = []
        self.crossed: list[x509.Certificate] = []
        self.rotate()

    def id_of(self, service: str) -> str:
        return f"spiffe://{self.trust_domain}/ns/default/dc/{self.datacenter}/svc/{service}"

    def rotate(self) -> None:
        """A root more, by which leafs are signed from now on; the old one signs it, too, for those who don't know it yet."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, f"pri-{uuid.uuid4().hex[:7]}.consul.ca.{self.trust_domain[:8]}.consul")]
        )
        root = self._signing(name, name, key, key, 3650)
        if self.known:
            old, old_key = self.known[-1]
            self.crossed = [self._signing(name, old.subject, key, old_key, 7)]
        self.known.append((root, key))

    def _signing(self, subject: x509.Name, issuer: x509.Name, key: Any, signer: Any, days: int) -> x509.Certificate:
        self.serial += 1
        builder = self._builder(subject, issuer, key.public_key(), datetime.timedelta(minutes=1), datetime.timedelta(days=days))
        return (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage("key_cert_sign", "crl_sign", "digital_signature"), critical=True)
            .add_extension(names(f"spiffe://{self.trust_domain}"), critical=False)
            .sign(signer, hashes.SHA256())
        )

    def drop_old_roots(self) -> None:
        self.known = self.known[-1:]

    def roots(self) -> dict[str, Any]:
        listed = [
            {
                "ID": root.fingerprint(hashes.SHA1()).hex(":"),
                "Name": "Consul CA Primary Cert",
                "SerialNumber": root.serial_number,
                "ExternalTrustDomain": self.trust_domain.partition(".")[0],
                "RootCert": pem(root),
                "IntermediateCerts": [pem(each) for each in self.crossed] if root is self.known[-1][0] else None,
                "Active": root is self.known[-1][0],
                "PrivateKeyType": "ec",
                "PrivateKeyBits": 256,
            }
            for root, _ in self.known
        ]
        return {"ActiveRootID": listed[-1]["ID"], "TrustDomain": self.trust_domain, "Roots": listed}

    def leaf(self, service: str, index: int, **changes: Any) -> dict[str, Any]:
        root, root_key = self.known[-1]
        key = ec.generate_private_key(ec.SECP256R1())
        uri = self.id_of(service)
        hour = datetime.timedelta(hours=1)
        self.serial += 1
        builder = self._builder(x509.Name([]), root.subject, key.public_key(), hour / 60, 72 * hour - hour / 60)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage("digital_signature", "key_encipherment", "data_encipherment", "key_agreement"), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
            .add_extension(names(uri), critical=True)
            .sign(root_key, hashes.SHA256())
        )
        return {
            "SerialNumber": f"{certificate.serial_number:02x}",
            "CertPEM": "".join(pem(each) for each in (certificate, *self.crossed)),
            "PrivateKeyPEM": key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode(),
            "Service": service,
            "ServiceURI": uri,
            "ValidAfter": f"{certificate.not_valid_before_utc:%Y-%m-%dT%H:%M:%SZ}",
            "ValidBefore": f"{certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}",
            "CreateIndex": index,
            "ModifyIndex": index,
            **changes,
        }

    def _builder(
        self, subject: x509.Name, issuer: x509.Name, key: Any, ago: datetime.timedelta, life: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(self.serial)
            .not_valid_before(now - ago)
            .not_valid_after(now + life)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )


def usage(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in USES})


def names(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
