"""What has somebody mounted for us?

Kubernetes (a Secret or projected volume, cert-manager and its CSI driver), Docker and systemd hand over files under names of
their own, in folders that they fill and change. Kubernetes changes them all at once, by turning a link (`..data`) from one
folder to the next; so links are followed here, inside the mount, and each is looked at once per reading: certificate and key
come from the same moment. Who may read the key is checked as everywhere, except that our own group may (`fsGroup`, a Docker
secret with a gid). Certificate and key may stand in one file, as SPIFFE's credential bundles have them.

The rest is as in a folder: judged as a whole, the last good identity stays. It asks nobody for renewal: who mounts, renews.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..errors import KeyFileError
from . import files
from .folder import FileSource, optional
from .proof import Names, Parts

# A mount that was turned while it was read is read again; the third time it is a fault.
TRIES = 3


class MountedSource(FileSource):
    """Certificate, key, bundle (PEM or a SPIFFE bundle) and perhaps revocations, each under the path that is configured."""

    def __init__(
        self,
        certificate: str | Path,
        key: str | Path,
        bundle: str | Path,
        spiffe_id: str,
        *,
        crl: str | Path | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._certificate, self._key, self._bundle = Path(certificate), Path(key), Path(bundle)
        self._crl = Path(crl) if crl is not None else None
        names = Names(*(str(path) for path in (certificate, key, bundle, crl or "the list of revocations")))
        super().__init__(spiffe_id, names, wall_clock=wall_clock)

    def _read(self) -> Parts:
        for _ in range(TRIES - 1):
            try:
                return self._read_once()
            except KeyFileError:
                pass
        return self._read_once()

    def _read_once(self) -> Parts:
        with ExitStack() as stack:
            mounts: dict[Path, files.Mount] = {}

            def mount_of(path: Path) -> files.Mount:
                if path.parent not in mounts:
                    mounts[path.parent] = stack.enter_context(files.mount(path.parent))
                return mounts[path.parent]

            def public(path: Path) -> bytes:
                return mount_of(path).read_public(path.name)

            key = mount_of(self._key).read_secret(self._key.name)
            chain = key if self._certificate == self._key else public(self._certificate)
            crl: bytes | KeyFileError = b""
            if (path := self._crl) is not None:
                crl = optional(lambda: public(path))
            return Parts(chain, key, public(self._bundle), crl)
