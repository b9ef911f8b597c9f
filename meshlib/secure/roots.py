"""Which roots does a certificate authority have, and where does turning them over stand?

Every process must trust a new root before the first certificate signed by it appears, and no certificate of the old
root may be in use when that root leaves. So a rotation has three steps, and two roots in the bundle between them:

    steady    ── begin ──▶  begun      both roots in the bundle, the old one signs
    begun     ── activate ▶ activated  both roots in the bundle, the new one signs; the old key is gone
    activated ── finish ──▶ steady     the new root alone

In a folder the files are the state: next.pem and next.key belong to a root that is coming, previous.pem to one that is
leaving. Each step is committed by one rename, and `load` completes what a crash left behind. With folder None the roots
live in memory.

When a step may be taken is the authority's question (`ca.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import IdentityError, KeyFileError
from . import certificates, files

STEADY: Final = "steady"
BEGUN: Final = "begun"
ACTIVATED: Final = "activated"

# What a step needs, and what comes next.
NEXT_STEP: Final = {STEADY: "begin", BEGUN: "activate", ACTIVATED: "finish"}

_BACKUP: Final = "Put it back from your backup."


@dataclass(slots=True)
class Root:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, trust_domain: str, life: float, now: float) -> Root:
        key = certificates.new_key()
        return cls(certificates.new_root(key, trust_domain, life, now), key)


@dataclass(slots=True)
class Roots:
    """State of the authority: the root that signs, and the one that is coming or leaving."""

    folder: Path | None
    signing: Root
    coming: Root | None = None
    leaving: x509.Certificate | None = None

    @property
    def stage(self) -> str:
        return BEGUN if self.coming else ACTIVATED if self.leaving else STEADY

    @property
    def bundle(self) -> bytes:
        """All roots to trust, the signing one first, as PEM."""
        others = [self.coming.certificate] if self.coming else [self.leaving] if self.leaving else []
        return certificates.pem(self.signing.certificate, *others)

    @classmethod
    def create(cls, folder: Path | None, root: Root) -> Roots:
        roots = cls(folder, root)
        if folder is not None:
            files.write(folder, [("root.key", certificates.key_pem(root.key), 0o600), *roots._public()])
        return roots

    @classmethod
    def load(cls, folder: Path) -> Roots:
        """The roots as the files tell them; completes a step that was cut short."""
        with files.folder(folder) as fd:
            signing = Root(read_certificate(fd, folder, "root.pem"), _key(fd, folder, "root.key"))
            coming = read_certificate(fd, folder, "next.pem") if (folder / "next.pem").exists() else None
            leaving = read_certificate(fd, folder, "previous.pem") if (folder / "previous.pem").exists() else None
            key = _key(fd, folder, "next.key") if coming is not None and (folder / "next.key").exists() else None
            bundle = files.read_public(fd, folder, "bundle.pem") if (folder / "bundle.pem").exists() else b""
        if coming is not None and key is not None:
            # A previous.pem beside them comes from an activation that was not committed.
            roots = cls(folder, signing, coming=Root(coming, key))
            _refuse_mismatch(roots.coming, folder, "next.key")
        elif coming is not None:
            # Its key has become root.key: an activation was committed, the certificate is still to follow.
            roots = cls(folder, Root(coming, signing.key), leaving=leaving)
        else:
            roots = cls(folder, signing, leaving=leaving)
        _refuse_mismatch(roots.signing, folder, "root.key")
        is_unfinished = coming is not None and key is None
        if is_unfinished or bundle != roots.bundle:
            files.write(folder, roots._public())
        if is_unfinished:
            files.remove(folder, "next.pem")
        return roots

    def begin(self, coming: Root) -> None:
        self.refuse_out_of_step("begin")
        self.coming = coming
        if self.folder is not None:
            # The certificate is last: it commits.
            pair = [("next.key", certificates.key_pem(coming.key), 0o600)]
            files.write(self.folder, [*pair, ("next.pem", certificates.pem(coming.certificate), 0o644)])
            files.write(self.folder, self._public())

    def activate(self) -> None:
        self.refuse_out_of_step("activate")
        if self.folder is not None:
            files.write(self.folder, [("previous.pem", certificates.pem(self.signing.certificate), 0o644)])
            (self.folder / "next.key").rename(self.folder / "root.key")  # commits; `load` does the rest
            found = Roots.load(self.folder)
            self.signing, self.coming, self.leaving = found.signing, found.coming, found.leaving
        elif self.coming is not None:
            self.signing, self.coming, self.leaving = self.coming, None, self.signing.certificate

    def finish(self) -> None:
        self.refuse_out_of_step("finish")
        self.leaving = None
        if self.folder is not None:
            files.remove(self.folder, "previous.pem")  # commits
            files.write(self.folder, self._public())

    def refuse_out_of_step(self, step: str) -> None:
        following = NEXT_STEP[self.stage]
        if step != following:
            raise IdentityError(
                f"the rotation of the root can't {step} now: it is {self.stage}.", hint=f"The next step is {following}."
            )

    def _public(self) -> list[tuple[str, bytes, int]]:
        return [
            ("bundle.pem", self.bundle, 0o644),
            ("root.pem", certificates.pem(self.signing.certificate), 0o644),
        ]


def read_certificate(fd: int, where: Path, name: str, hint: str = _BACKUP) -> x509.Certificate:
    """The first certificate in a file."""
    try:
        return x509.load_pem_x509_certificate(files.read_public(fd, where, name))
    except ValueError:
        raise KeyFileError(f"{where / name} holds no certificate in PEM.", hint=hint) from None


def _key(fd: int, where: Path, name: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(files.read_secret(fd, where, name), None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError(f"{where / name} holds no unencrypted EC key in PEM.", hint=_BACKUP)
    return key


def _refuse_mismatch(root: Root | None, where: Path, name: str) -> None:
    if root is not None and root.key.public_key() != root.certificate.public_key():
        raise KeyFileError(
            f"{where / name} does not belong to the certificate beside it.",
            hint="The folder was mixed from two CAs: put back the pair from your backup.",
        )
