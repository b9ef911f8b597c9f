"""How does a mesh run on a laptop, with real certificates and nobody's CA?

`meshlib dev` makes a CA in memory, writes short-lived certificates for every service into a private folder, renews
them while it runs, and takes the folder away at the end. All of it belongs to one trust domain that can exist nowhere
else (`.invalid` is reserved), and that every other configuration refuses: an identity that leaks from a laptop opens
nothing.

This module is the folder's life; the process that runs in it is `meshlib.cli.dev`'s.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .ca import CertificateAuthority

DEV_TRUST_DOMAIN: Final = "dev.meshlib.invalid"
VARIABLE: Final = "MESHLIB_DEV"
# Short, so that renewal is a daily experience in development and not a surprise in production.
LIFE: Final = 3600.0

_PREFIX: Final = "meshlib-dev-"


def is_on(folder: str | os.PathLike[str]) -> bool:
    """True if `meshlib dev` runs this process and made that folder; only then does its trust domain count."""
    made = os.environ.get(VARIABLE, "")
    return bool(made) and os.path.realpath(made) == os.path.realpath(folder)


class DevIdentities:
    """A private folder with an identity for each service, from the start of the `with` block to its end."""

    def __init__(self, *, parent: str | None = None, life: float = LIFE, clock: Callable[[], float] = time.time) -> None:
        self.renew_every = life / 2
        self._parent = parent
        self._life = life
        self._clock = clock
        self._services: Mapping[str, str] = {}
        self._authority: CertificateAuthority | None = None
        self._folder: Path | None = None
        self._hold = -1

    @property
    def folder(self) -> Path:
        if self._folder is None:
            raise RuntimeError("the folder exists only inside the with block")
        return self._folder

    def __enter__(self) -> DevIdentities:
        from .ca import CertificateAuthority

        parent = self._parent or _parent()
        _sweep(parent)
        self._folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._hold = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._hold, fcntl.LOCK_EX)
        self._authority = CertificateAuthority.create(None, DEV_TRUST_DOMAIN, clock=self._clock)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._hold)
        self._folder, self._authority = None, None

    def issue(self, services: Mapping[str, str]) -> None:
        """Write an identity for each service; `services` maps names to SPIFFE IDs of the development's trust domain."""
        self._services = dict(services)
        self.renew()

    def renew(self) -> None:
        """Issue for every service anew, and replace the files."""
        if self._authority is None:
            raise RuntimeError("certificates are renewed only inside the with block")
        for service, spiffe_id in self._services.items():
            self._authority.write(service, self.folder, self._life, spiffe_id=spiffe_id)


def _parent() -> str:
    run = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    try:
        is_ours = run.is_absolute() and run.stat().st_uid == os.geteuid()
    except OSError:
        is_ours = False
    return str(run) if is_ours else tempfile.gettempdir()


def _sweep(parent: str) -> None:
    """Remove what a killed `meshlib dev` left behind: ours, older than its certificates, and held by no process."""
    for path in Path(parent).glob(f"{_PREFIX}*"):
        try:
            found = path.lstat()
            if found.st_uid != os.geteuid() or time.time() - found.st_mtime < 2 * LIFE:
                continue
            hold = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except OSError:
            pass  # alive
        finally:
            os.close(hold)
