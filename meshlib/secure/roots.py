"""Which roots and issuers does a certificate authority have, and where does turning them over stand?

A root signs one certificate: that of the issuer (the intermediate) under it, which signs everything else. So root.key is
needed only to make or renew an issuer, and may lie in a safe meanwhile. A folder of the earlier layout has no issuer:
there the root signs the leaves itself, until its next rotation brings one.

Every process must trust a new root before the first certificate under it appears, and no certificate under the old root
may be in use when that root leaves. So a rotation has three steps, and two roots in the bundle between them:

    steady    ── begin ──▶  begun      both roots in the bundle, the old issuer signs
    begun     ── activate ▶ activated  both roots in the bundle, the new issuer signs; the old root's key is gone
    activated ── finish ──▶ steady     the new root alone; the old issuer's key, kept for revocations, is gone

In a folder the files are the state: next.* and next-issuer.* belong to a root that is coming, previous.* and
previous-issuer.* to one that is leaving. Each step is committed by one rename, and `load` completes what a crash left
behind. A root's certificate is followed, in the same file, by the list of issuers that it has revoked: it is empty, and
verifiers that want a list from every signer find one although the key is away. With folder None all live in memory.

When a step may be taken is the authority's question (`ca.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import IdentityError, KeyFileError
from . import certificates, files

STEADY: Final = "steady"
BEGUN: Final = "begun"
ACTIVATED: Final = "activated"

# What a step needs, and what comes next.
NEXT_STEP: Final = {STEADY: "begin", BEGUN: "activate", ACTIVATED: "finish"}

# An issuer is renewed by the root whenever a leaf would outlive it; so long, where the root's key has to be fetched.
ISSUER_LIFE: Final = 730 * 86400.0

_BACKUP: Final = "Put it back from your backup."
_PRIVATE: Final = 0o600
_PUBLIC: Final = 0o644


@dataclass(slots=True)
class Issuer:
    """What signs leaves and revocations: a certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(slots=True)
class Root:
    """A root with the issuer under it. `key` is None where it was taken away, `issuer` where the root signs itself."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | None
    issuer: Issuer | None = None
    crl: bytes = b""

    @classmethod
    def make(cls, trust_domain: str, life: float, now: float) -> Root:
        key = certificates.new_key()
        certificate = certificates.new_root(key, trust_domain, life, now)
        below = certificates.new_key()
        issuer = certificates.new_issuer(below, certificate, key, trust_domain, min(life, ISSUER_LIFE), now)
        return cls(
            certificate, key, Issuer(issuer, below), certificates.pem(certificates.new_crl(certificate, key, (), life, now, 1))
        )

    @property
    def signer(self) -> Issuer | None:
        """What signs under this root; None if its key is gone."""
        if self.issuer is not None or self.key is None:
            return self.issuer
        return Issuer(self.certificate, self.key)

    @property
    def chain(self) -> tuple[x509.Certificate, ...]:
        """What a leaf has to show between itself and the root."""
        return () if self.issuer is None else (self.issuer.certificate,)


@dataclass(slots=True)
class Roots:
    """State of the authority: the root under which leaves are signed, and the one that is coming or leaving."""

    folder: Path | None
    signing: Root
    coming: Root | None = None
    leaving: Root | None = None

    @property
    def stage(self) -> str:
        return BEGUN if self.coming else ACTIVATED if self.leaving else STEADY

    @property
    def present(self) -> list[Root]:
        """The roots to trust, the signing one first."""
        return [root for root in (self.signing, self.coming, self.leaving) if root is not None]

    @property
    def bundle(self) -> bytes:
        """All roots to trust, the signing one first, as PEM."""
        return certificates.pem(*(root.certificate for root in self.present))

    @classmethod
    def create(cls, folder: Path | None, root: Root) -> Roots:
        roots = cls(folder, root)
        if folder is not None:
            files.write(folder, [*_keys(root, "root.key", "issuer.key"), *roots._public()])
        return roots

    @classmethod
    def load(cls, folder: Path) -> Roots:
        """The roots as the files tell them; completes a step that was cut short."""
        with files.folder(folder) as fd:
            read = _Reader(fd, folder)
            bundle = read.text("bundle.pem") or b""
            leaving = read.root("previous", "previous-issuer", is_whole=False) if read.has("previous.pem") else None
            has_issuer = read.has("next-issuer.pem")
            if not read.has("next.pem"):
                roots, is_unfinished = cls(folder, read.root("root", "issuer"), leaving=leaving), False
            elif read.has("next-issuer.key" if has_issuer else "next.key"):
                # A previous.pem beside them comes from an activation that was not committed.
                coming = read.root("next", "next-issuer")
                roots, is_unfinished = cls(folder, read.root("root", "issuer"), coming=coming), False
            else:
                # The coming key has become the signing one: an activation was committed, the rest is still to follow.
                roots, is_unfinished = cls(folder, read.activated(), leaving=leaving), True
        if is_unfinished:
            roots._complete()
        elif bundle != roots.bundle:
            files.write(folder, roots._public())
        if leaving is None and (folder / "previous-issuer.key").exists():
            roots._forget_the_old()  # a finish was committed
        return roots

    def begin(self, coming: Root) -> None:
        self.refuse_out_of_step("begin")
        self.coming = coming
        if self.folder is not None:
            # The root's certificate is last: it commits.
            pairs = _keys(coming, "next.key", "next-issuer.key")
            files.write(self.folder, [*pairs, *_public(coming, "next.pem", "next-issuer.pem")])
            files.write(self.folder, self._public())

    def activate(self) -> None:
        self.refuse_out_of_step("activate")
        old, coming = self.signing, self.coming
        assert coming is not None
        if self.folder is None:
            self.signing, self.coming = coming, None
            self.leaving = Root(old.certificate, None, old.signer, old.crl)
            return
        # The key that signed goes on signing revocations until the old root has left. Its certificate is that of the
        # issuer or, in the earlier layout, that of the root.
        kept = _public(old, "previous.pem", "previous-issuer.pem")[::-1]
        if old.signer is not None:
            kept.append(("previous-issuer.key", certificates.key_pem(old.signer.key), _PRIVATE))
        files.write(self.folder, kept)
        pair = ("next-issuer.key", "issuer.key") if coming.issuer is not None else ("next.key", "root.key")
        (self.folder / pair[0]).rename(self.folder / pair[1])  # commits; `load` does the rest
        found = Roots.load(self.folder)
        self.signing, self.coming, self.leaving = found.signing, found.coming, found.leaving

    def finish(self) -> None:
        self.refuse_out_of_step("finish")
        self.leaving = None
        if self.folder is not None:
            files.remove(self.folder, "previous.pem")  # commits
            files.write(self.folder, self._public())
            self._forget_the_old()

    def renew_issuer(self, trust_domain: str, root_key: ec.EllipticCurvePrivateKey, now: float) -> None:
        """A new certificate for the issuer's name and key; one rename puts it into force."""
        root, old = self.signing.certificate, self.signing.issuer
        if old is None:
            raise IdentityError(
                "this CA has no issuer under its root.", hint="It gets one when the root is turned over (rotate)."
            )
        if root_key.public_key() != root.public_key():
            raise KeyFileError("that is not the key of this CA's root.", hint="Fetch root.key of this very CA.")
        life = min(ISSUER_LIFE, root.not_valid_after_utc.timestamp() - now)
        renewed = certificates.new_issuer(old.key, root, root_key, trust_domain, life, now, old.certificate.subject)
        self.signing.issuer = Issuer(renewed, old.key)
        if self.folder is not None:
            files.write(self.folder, [("issuer.pem", certificates.pem(renewed), _PUBLIC)])

    def refuse_out_of_step(self, step: str) -> None:
        following = NEXT_STEP[self.stage]
        if step != following:
            raise IdentityError(
                f"the rotation of the root can't {step} now: it is {self.stage}.", hint=f"The next step is {following}."
            )

    def _public(self) -> list[tuple[str, bytes, int]]:
        return [("bundle.pem", self.bundle, _PUBLIC), *_public(self.signing, "root.pem", "issuer.pem")]

    def _complete(self) -> None:
        folder, root = self.folder, self.signing
        assert folder is not None
        if (folder / "next.key").exists():
            (folder / "next.key").rename(folder / "root.key")
        elif root.key is None:
            files.remove(folder, "root.key")  # the new one was taken to a safe; the old one must not outlive its root
        files.write(folder, self._public())
        for name in ("next.pem", "next-issuer.pem"):  # without the first, nothing of it counts
            files.remove(folder, name)

    def _forget_the_old(self) -> None:
        assert self.folder is not None
        for name in ("previous-issuer.pem", "previous-issuer.key"):
            files.remove(self.folder, name)


def read_key(fd: int, where: Path, name: str) -> ec.EllipticCurvePrivateKey:
    """The unencrypted EC key in a file that nobody else can read."""
    try:
        key = load_pem_private_key(files.read_secret(fd, where, name), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{where / name} holds no unencrypted EC key in PEM.", hint=_BACKUP)
    return key


def read_certificate(fd: int, where: Path, name: str, hint: str = _BACKUP) -> x509.Certificate:
    """The first certificate in a file."""
    try:
        return x509.load_pem_x509_certificate(files.read_public(fd, where, name))
    except ValueError:
        raise KeyFileError(f"{where / name} holds no certificate in PEM.", hint=hint) from None


@dataclass(frozen=True, slots=True)
class _Reader:
    fd: int
    folder: Path

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def text(self, name: str) -> bytes | None:
        return files.read_public(self.fd, self.folder, name) if self.has(name) else None

    def root(self, name: str, below: str, *, is_whole: bool = True) -> Root:
        """A root and its issuer by the names of their files; `is_whole` unless it may miss the key that signs."""
        certificate, crl = self._certificate(f"{name}.pem")
        key, issuer = None, None
        if self.has(f"{below}.pem"):
            issuer = self._issuer(f"{below}.pem", f"{below}.key", certificate, is_whole)
        elif self.has(f"{below}.key"):
            issuer = self._pair(certificate, f"{below}.key")  # it signed itself, and its key was kept under this name
        if self.has(f"{name}.key") or (is_whole and issuer is None):
            key = self._pair(certificate, f"{name}.key").key
        return Root(certificate, key, issuer, crl)

    def activated(self) -> Root:
        """The root of next.pem, whose issuer's key (in the earlier layout its own) has its place already."""
        certificate, crl = self._certificate("next.pem")
        if not self.has("next-issuer.pem"):
            return Root(certificate, self._pair(certificate, "root.key").key, None, crl)
        issuer = self._issuer("next-issuer.pem", "issuer.key", certificate, True)
        for name in ("next.key", "root.key"):
            if self.has(name) and (key := read_key(self.fd, self.folder, name)).public_key() == certificate.public_key():
                return Root(certificate, key, issuer, crl)
        return Root(certificate, None, issuer, crl)

    def _certificate(self, name: str) -> tuple[x509.Certificate, bytes]:
        certificate = read_certificate(self.fd, self.folder, name)
        return certificate, b"".join(re.findall(rb"-----BEGIN X509 CRL-----.+", self.text(name) or b"", re.DOTALL))

    def _issuer(self, name: str, key: str, root: x509.Certificate, is_whole: bool) -> Issuer | None:
        if not is_whole and not self.has(key):
            return None
        pair = self._pair(read_certificate(self.fd, self.folder, name), key)
        try:
            pair.certificate.verify_directly_issued_by(root)
        except (ValueError, TypeError, InvalidSignature):
            raise KeyFileError(
                f"{self.folder / name} was not signed by the root beside it.",
                hint="The folder was mixed from two CAs: put back root and issuer from your backup.",
            ) from None
        return pair

    def _pair(self, certificate: x509.Certificate, key_name: str) -> Issuer:
        key = read_key(self.fd, self.folder, key_name)
        if key.public_key() != certificate.public_key():
            raise KeyFileError(
                f"{self.folder / key_name} does not belong to the certificate beside it.",
                hint="The folder was mixed from two CAs: put back the pair from your backup.",
            )
        return Issuer(certificate, key)


def _keys(root: Root, own: str, below: str) -> list[tuple[str, bytes, int]]:
    pairs: list[tuple[str, ec.EllipticCurvePrivateKey | None]] = [(own, root.key)]
    pairs.append((below, root.issuer.key if root.issuer else None))
    return [(name, certificates.key_pem(key), _PRIVATE) for name, key in pairs if key is not None]


def _public(root: Root, own: str, below: str) -> list[tuple[str, bytes, int]]:
    issuer = [(below, certificates.pem(root.issuer.certificate), _PUBLIC)] if root.issuer else []
    return [*issuer, (own, certificates.pem(root.certificate) + root.crl, _PUBLIC)]
