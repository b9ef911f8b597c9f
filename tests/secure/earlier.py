"""What did a CA's folder look like before there were issuers? Made by hand, since no code of today makes it.

The root signs the leaves itself (path length 0), and the log has neither hashes nor the keys of signers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from meshlib.secure import certificates, files
from meshlib.secure.ledger import moment

TRUST_DOMAIN = "shop.internal"


def make_earlier_ca(folder: Path, now: float, *services: str) -> dict[str, bytes]:
    """A CA of the earlier layout in `folder`, and for each service a certificate in `folder`/identities; its root and key."""
    key = certificates.new_key()
    serial = x509.random_serial_number()
    name = certificates._named("root", serial)
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{TRUST_DOMAIN}")])
    root = (
        certificates._builder(name, name, key, serial, 3650 * 86400.0, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(certificates._usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = certificates.pem(root)
    folder.mkdir(mode=0o700)
    files.write(folder, [("root.key", certificates.key_pem(key), 0o600), ("bundle.pem", pem, 0o644), ("root.pem", pem, 0o644)])
    _log(folder, "create", root, now)
    for service in services:
        own = certificates.new_key()
        spiffe_id = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/{service}"
        leaf = certificates.new_leaf(own, root, key, spiffe_id, f"{service}.default.{TRUST_DOMAIN}", 90 * 86400.0, now)
        _log(folder, "issue", leaf, now, service=service, spiffe_id=spiffe_id, issuer=certificates.serial_of(root))
        where = files.make_private(folder / "identities" / service)
        pair = [("key.pem", certificates.key_pem(own), 0o600), ("svid.pem", certificates.pem(leaf), 0o644)]
        files.write(where, [("bundle.pem", pem, 0o644), *pair])
    return {"root.pem": pem, "root.key": certificates.key_pem(key)}


def _log(folder: Path, event: str, certificate: x509.Certificate, now: float, **more: str) -> None:
    entry = {
        "time": moment(now),
        "event": event,
        "serial": certificates.serial_of(certificate),
        **more,
        "not_before": moment(certificate.not_valid_before_utc.timestamp()),
        "not_after": moment(certificate.not_valid_after_utc.timestamp()),
        "uid": os.getuid(),
    }
    files.append(folder, "issued.jsonl", json.dumps(entry, separators=(",", ":")).encode())
