"""What lies in a service's folder, and may we stand up with it?

svid.pem, key.pem and bundle.pem are read as a set and judged as a whole: nobody else can read the key or change the
rest, key and certificate belong together, the certificate is an X.509-SVID of exactly the expected SPIFFE ID and is
valid now, and the bundle holds roots of our own trust domain only. Anything else is refused with what, why and what to
do. A peer would refuse most of it too, but an hour later and in other words.

The trust domain of `meshlib dev` counts only in the folder that `meshlib dev` made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ..errors import IdentityError, KeyFileError, TrustDomainError
from . import certificates, dev, files
from .files import Secret
from .identity import Identity, digest_of

_ANEW: Final = "Issue it anew: meshlib ca issue"
_CUT_OFF: Final = f"Was it cut off while copying? {_ANEW}"


class FolderSource:
    """`folder`/`service`/ with svid.pem, key.pem and bundle.pem, as `meshlib ca issue` writes them.

    bundle.pem holds the roots of our own trust domain only.
    """

    def __init__(
        self,
        folder: str | Path,
        service: str,
        trust_domain: str,
        spiffe_id: str,
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if trust_domain == dev.DEV_TRUST_DOMAIN and not dev.is_on(folder):
            raise TrustDomainError(
                f"the trust domain {trust_domain} counts only under `meshlib dev`.",
                hint="Name your own in mesh.yaml (secure.trust_domain), or start the process by `meshlib dev -- …`.",
            )
        self.path = Path(folder) / service
        self.trust_domain = trust_domain
        self.spiffe_id = spiffe_id
        self._wall_clock = wall_clock
        self._digest = b""
        self._loaded: Identity | None = None

    def load(self) -> Identity:
        chain, key, bundle = self._read()
        digest = digest_of(chain, key, bundle)
        if self._loaded is None or digest != self._digest:
            try:
                self._loaded = self._checked(chain, key, bundle)
            except IdentityError:
                # A writer may be between its renames: what it finishes meanwhile is read once more.
                again = self._read()
                if again != (chain, key, bundle):
                    self._loaded = self._checked(*again)
                    digest = digest_of(*again)
                elif self._loaded is not None and self._loaded.bundles != (bundles := self._checked_bundle(bundle)):
                    # The pair is no good, the bundle is: trust counts as it is now, and the next load tells the fault.
                    self._loaded, self._digest = replace(self._loaded, bundles=bundles), b""
                    return self._loaded
                else:
                    raise
            self._digest = digest
        return self._loaded

    def _read(self) -> tuple[bytes, Secret, bytes]:
        with files.folder(self.path) as fd:
            key = files.read_secret(fd, self.path, "key.pem")
            return files.read_public(fd, self.path, "svid.pem"), key, files.read_public(fd, self.path, "bundle.pem")

    def _checked(self, chain: bytes, key: Secret, bundle: bytes) -> Identity:
        svid = self.path / "svid.pem"
        leaf = _certificates(chain, svid)[0]
        if _public_key(key, self.path / "key.pem") != leaf.public_key():
            raise KeyFileError(
                f"{self.path / 'key.pem'} is not the key of {svid}.",
                hint="One of the two was replaced without the other: issue the pair anew (`meshlib ca issue`).",
            )
        uris = certificates.uris_of(leaf)
        domains = {certificates.trust_domain_of(uri) for uri in uris}
        if domains and domains != {self.trust_domain}:
            raise _wrong_domain(svid, domains, self.trust_domain)
        if flaw := certificates.flaw_of_leaf(leaf):
            raise IdentityError(f"{svid} is no X.509-SVID: {flaw}.", hint=_ANEW)
        if uris[0] != self.spiffe_id:
            raise IdentityError(
                f"{svid} is for {uris[0]}, and this service is {self.spiffe_id}.",
                hint="Is MESHLIB_SERVICE right, and does the folder belong to this service and namespace?",
            )
        now, begin, end = self._wall_clock(), leaf.not_valid_before_utc, leaf.not_valid_after_utc
        if now >= end.timestamp():
            raise IdentityError(f"{svid} expired at {end:%Y-%m-%d %H:%M:%S} UTC.", hint=_ANEW)
        if now < begin.timestamp():
            raise IdentityError(
                f"{svid} is not valid before {begin:%Y-%m-%d %H:%M:%S} UTC.", hint="Is this machine's clock right?"
            )
        return Identity(
            spiffe_id=self.spiffe_id,
            chain=chain,
            key=bytes(key),
            bundles=self._checked_bundle(bundle),
            serial=certificates.serial_of(leaf),
            not_before=begin.timestamp(),
            not_after=end.timestamp(),
        )

    def _checked_bundle(self, bundle: bytes) -> dict[str, bytes]:
        for root in _certificates(bundle, self.path / "bundle.pem"):
            domains = {certificates.trust_domain_of(uri) for uri in certificates.uris_of(root)}
            if domains and domains != {self.trust_domain}:
                raise _wrong_domain(self.path / "bundle.pem", domains, self.trust_domain)
        return {self.trust_domain: bundle}


def _certificates(text: bytes, path: Path) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(text)
    except ValueError:
        raise KeyFileError(f"{path} holds no certificates in PEM.", hint=_CUT_OFF) from None
    try:
        for certificate in found:
            # Both are parsed when they are first asked for: asked here, no later question can fail.
            certificate.public_key(), certificate.extensions
    except (ValueError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise KeyFileError(f"{path} holds a malformed certificate: {error}.", hint=_ANEW) from None
    return found


def _public_key(key: Secret, path: Path) -> Any:
    try:
        return load_pem_private_key(key, None).public_key()
    except TypeError:
        raise KeyFileError(
            f"{path} is encrypted.",
            hint="A service can't type a password: give it the plain key, protected by mode 0600.",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise KeyFileError(f"{path} holds no private key in PEM.", hint=_CUT_OFF) from None


def _wrong_domain(path: Path, found: set[str], expected: str) -> TrustDomainError:
    names = ", ".join(sorted(name or "(not a SPIFFE ID)" for name in found))
    hint = "Set secure.trust_domain, or issue it by the CA of this trust domain."
    if dev.DEV_TRUST_DOMAIN in found:
        hint = "It was made by `meshlib dev`, and counts nowhere else."
    return TrustDomainError(f"{path} is of the trust domain {names}, and the configuration says {expected}.", hint=hint)
