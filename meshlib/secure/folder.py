"""What lies in a service's folder?

svid.pem, key.pem and the roots (bundle.pem, or a SPIFFE bundle in bundle.json), as `meshlib ca issue` writes them; beside
them, where there are any, revocations (crl.pem) and the bundles of other trust domains (federated/<trust domain>.pem or
.json). They are read as a set: nobody else can read the key or change the rest, links are not followed, and what was read is
judged as a whole (`proof.py`). Unchanged content is not parsed again. Key and certificate must be replaced together, but a
bundle counts whatever becomes of the pair beside it: trust that was withdrawn is never kept because of another fault.

The trust domain of `meshlib dev` counts only in the folder that `meshlib dev` made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cryptography import x509

from ..errors import IdentityError, IdentityWithdrawn, KeyFileError, TrustDomainError
from . import certificates, dev, files
from .identity import Identity
from .proof import Names, Parts, prove, trust_of

FEDERATED = "federated"
MOST_FEDERATED = 64


class FileSource:
    """What all sources in files have in common: read, compare, judge. A subclass says how to `_read`."""

    def __init__(self, spiffe_id: str, names: Names, *, wall_clock: Callable[[], float] = time.time) -> None:
        self.spiffe_id = spiffe_id
        self.trust_domain = certificates.trust_domain_of(spiffe_id)
        self._names = names
        self._wall_clock = wall_clock
        # What was read last, and what it made: one value, so that threads can't mix two of them.
        self._kept: tuple[bytes, Identity] | None = None

    def load(self) -> Identity:
        """The identity in the files now: the same object as before where nothing changed."""
        found = self._read()
        kept = self._kept
        if kept is not None and found.digest == kept[0]:
            return kept[1]
        last = kept[1] if kept is not None else None
        try:
            loaded = self._proved(found, last)
        except IdentityWithdrawn:
            raise
        except IdentityError:
            # A writer may be between its renames: what it finishes meanwhile is read once more.
            again = self._read()
            if again.digest == found.digest:
                changed = self._with_trust(found, last) if last is not None else None
                if changed is None:
                    raise
                # The pair is no good, the bundle is: trust counts as it is now, and the next load tells the fault.
                self._kept = (b"", changed)
                return changed
            loaded, found = self._proved(again, last), again
        self._kept = (found.digest, loaded)
        return loaded

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.spiffe_id} in {self._names.chain}>"

    def _read(self) -> Parts:
        raise NotImplementedError

    def _proved(self, parts: Parts, last: Identity | None) -> Identity:
        return prove(parts, self.spiffe_id, self._wall_clock(), names=self._names, last=last)

    def _with_trust(self, parts: Parts, last: Identity) -> Identity | None:
        """The last identity with the trust of now; None if that is the same."""
        chain = x509.load_pem_x509_certificates(last.chain)
        trust = trust_of(parts, self.trust_domain, names=self._names, last=last, chain=chain)
        if (trust.bundles, trust.crls) == (last.bundles, last.crls):
            return None
        return replace(last, bundles=trust.bundles, crls=trust.crls, notes=trust.notes)


class FolderSource(FileSource):
    """`folder`/`service`/ with svid.pem, key.pem and bundle.pem, as `meshlib ca issue` writes them.

    The bundle holds the roots of our own trust domain only.
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
        path = self.path = Path(folder) / service
        names = Names(*(str(path / name) for name in ("svid.pem", "key.pem", "bundle.pem", "crl.pem")))
        super().__init__(spiffe_id, names, wall_clock=wall_clock)

    def _read(self) -> Parts:
        with files.folder(self.path) as fd:
            present = set(files.names(fd))
            key = files.read_secret(fd, self.path, "key.pem", may_group=True)
            chain = files.read_public(fd, self.path, "svid.pem")
            crl = optional(lambda: files.read_public(fd, self.path, "crl.pem")) if "crl.pem" in present else b""
            return Parts(chain, key, self._bundle(fd, present), crl, self._federated() if FEDERATED in present else {})

    def _bundle(self, fd: int, present: set[str]) -> bytes:
        name = "bundle.json" if "bundle.json" in present else "bundle.pem"
        if {"bundle.json", "bundle.pem"} <= present:
            raise KeyFileError(
                f"{self.path} holds both bundle.pem and bundle.json.", hint="Which one counts? Take the other one away."
            )
        self._names = self._names._replace(bundle=str(self.path / name))
        return files.read_public(fd, self.path, name)

    def _federated(self) -> dict[str, bytes | KeyFileError]:
        """The bundles of other trust domains, by the names of their files."""
        where = self.path / FEDERATED
        found: dict[str, bytes | KeyFileError] = {}
        with files.folder(where) as fd:
            for name in files.names(fd):
                trust_domain, dot, kind = name.rpartition(".")
                if not dot or kind not in {"pem", "json"} or name.startswith("."):
                    continue
                if trust_domain in found:
                    hint = "Which one counts? Take the other one away."
                    found[trust_domain] = KeyFileError(f"{where} holds two bundles of {trust_domain}.", hint=hint)
                elif len(found) < MOST_FEDERATED:
                    found[trust_domain] = optional(lambda name=name: files.read_public(fd, where, name))  # type: ignore[misc]
                else:
                    raise KeyFileError(f"{where} holds too many bundles.", hint=f"At most {MOST_FEDERATED} are read.")
        return found


def optional(read: Callable[[], bytes]) -> bytes | KeyFileError:
    """What was read, or why it can't be: a fault of what is not worth the identity."""
    try:
        return read()
    except KeyFileError as error:
        return error.with_traceback(None)
