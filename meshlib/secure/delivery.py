"""What does a service find in its folder, and who put it there?

    <out>/<service>/svid.pem, key.pem, bundle.pem      and crl.pem and tokens.json where there are such

The CA fills these folders, on its own machine. It looks into them again to bring new roots and revocations, and to see
which certificates are to be issued anew. What it finds there proves little: a certificate that leads to one of our roots
`is_ours`, but everybody has seen it in a handshake. Only who `holds_key` is the one it speaks of; what follows from it the
CA decides.

What is wrong in one folder is noted and stops nothing in the others: whoever can spoil theirs must not be able to keep
revocations from everybody.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import KeyFileError, MeshError
from . import certificates, files


@dataclass(frozen=True, slots=True)
class Issued:
    """What a service needs to stand up with its identity: the certificate chain, its key, and the roots to trust.

    `key` is empty where the service made its key itself, `crl` where nothing was ever revoked.
    """

    service: str
    spiffe_id: str
    serial: str
    not_before: float
    not_after: float
    chain: bytes = field(repr=False)
    bundle: bytes = field(repr=False)
    key: bytes = field(repr=False)
    crl: bytes = field(repr=False, default=b"")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an issued identity can't be pickled or copied: it holds a private key")


@dataclass(frozen=True, slots=True)
class Served:
    """A service's folder, by the certificate in it."""

    where: Path
    leaf: x509.Certificate
    spiffe_id: str
    is_ours: bool

    @property
    def service(self) -> str:
        return self.where.name

    @property
    def serial(self) -> str:
        return certificates.serial_of(self.leaf)

    @property
    def dns_name(self) -> str:
        return next(iter(certificates.dns_names_of(self.leaf)), "")

    @property
    def life(self) -> float:
        return (self.leaf.not_valid_after_utc - self.leaf.not_valid_before_utc).total_seconds() - certificates.SKEW

    @property
    def holds_key(self) -> bool:
        """Does the key of the certificate lie beside it?"""
        try:
            with files.folder(self.where) as fd:
                key = load_pem_private_key(files.read_secret(fd, self.where, "key.pem"), None)
        except (KeyFileError, ValueError, TypeError, UnsupportedAlgorithm):
            return False
        return key.public_key() == self.leaf.public_key()

    def is_past_half(self, now: float) -> bool:
        return now >= self.leaf.not_valid_after_utc.timestamp() - self.life / 2


def fill(where: Path, issued: Issued, tokens: bytes = b"") -> Issued:
    """Put it there, with the keys of the trust domain's tokens if it has any; a running process picks it up."""
    files.make_private(where)
    # The bundle first: who presents the new certificate must already trust what it trusts.
    pair = [("key.pem", issued.key, 0o600), ("svid.pem", issued.chain, 0o644)]
    files.write(where, [*_public(issued.bundle, issued.crl, tokens), *pair])
    return issued


def publish(out: Path, trust_domain: str, bundle: bytes, crl: bytes, faults: list[str], tokens: bytes = b"") -> list[Path]:
    """Bring roots, revocations and keys of tokens into every folder of this trust domain; what fails is added to `faults`."""
    found = []
    for each in served(out, trust_domain, [], faults):
        with noted(each.where, faults):
            files.write(each.where, _public(bundle, crl, tokens))
            found.append(each.where)
    return found


def served(out: Path, trust_domain: str, roots: list[x509.Certificate], faults: list[str]) -> Iterator[Served]:
    """The folders under `out` in which there is a certificate of this trust domain; what can't be read is added to `faults`."""
    for path in sorted(out.glob("*/svid.pem")):
        found: Served | None = None
        with noted(path.parent, faults):
            found = _found(path, trust_domain, roots)
        if found is not None:
            yield found


@contextmanager
def noted(where: Path, faults: list[str]) -> Iterator[None]:
    """What goes wrong in the block, with this folder, is added to `faults`."""
    try:
        yield
    except (MeshError, OSError) as error:
        faults.append(str(error) if str(where) in str(error) else f"{where}: {error}")
    except Exception as error:  # a certificate is read by many hands, and each has errors of its own
        faults.append(f"{where}: {type(error).__name__}: {error}")


def refuse(faults: list[str]) -> None:
    """One error for all faults, if there are any."""
    if faults:
        raise KeyFileError(
            f"{len(faults)} of the services' folders could not be served: {' '.join(faults)}",
            hint="All others are up to date. Mend these, or take them away, and do it again.",
        )


def _found(path: Path, trust_domain: str, roots: list[x509.Certificate]) -> Served | None:
    with files.folder(path.parent) as fd:
        try:
            chain = x509.load_pem_x509_certificates(files.read_public(fd, path.parent, path.name))
        except ValueError:
            raise KeyFileError(f"{path} holds no certificate in PEM.", hint="Take it away, and issue it anew.") from None
    uris = certificates.uris_of(chain[0])
    if [certificates.trust_domain_of(uri) for uri in uris] != [trust_domain]:
        return None
    return Served(path.parent, chain[0], uris[0], certificates.is_anchored(chain, roots))


def _public(bundle: bytes, crl: bytes, tokens: bytes) -> list[tuple[str, bytes, int]]:
    found = (("bundle.pem", bundle), ("crl.pem", crl), ("tokens.json", tokens))
    return [(name, content, 0o644) for name, content in found if content]
