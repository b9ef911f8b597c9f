"""Who is it, are they allowed, and is the wire private?

The phase `secure` on Python's side: our identity and where it comes from, the embedded CA, the throw-away CA of
development. Peers are verified and calls are authorised in the native core. Names are imported when they are first
used: cryptography is heavy, and a process in mode observe needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alarms import Alarm
    from .ca import CertificateAuthority, Issued
    from .dev import DEV_TRUST_DOMAIN
    from .federation import Federation
    from .files import Secret
    from .folder import FolderSource
    from .identity import Identity, IdentitySource, IdentityStore, renewal_of
    from .mounted import MountedSource
    from .proof import Parts, prove
    from .sources import identity_source_of
    from .workload import WorkloadSource

_HOMES = {
    "Alarm": "alarms",
    "CertificateAuthority": "ca",
    "DEV_TRUST_DOMAIN": "dev",
    "Federation": "federation",
    "FolderSource": "folder",
    "Identity": "identity",
    "IdentitySource": "identity",
    "IdentityStore": "identity",
    "Issued": "ca",
    "MountedSource": "mounted",
    "Parts": "proof",
    "Secret": "files",
    "WorkloadSource": "workload",
    "identity_source_of": "sources",
    "prove": "proof",
    "renewal_of": "identity",
}

__all__ = [
    "DEV_TRUST_DOMAIN",
    "Alarm",
    "CertificateAuthority",
    "Federation",
    "FolderSource",
    "Identity",
    "IdentitySource",
    "IdentityStore",
    "Issued",
    "MountedSource",
    "Parts",
    "Secret",
    "WorkloadSource",
    "identity_source_of",
    "prove",
    "renewal_of",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
