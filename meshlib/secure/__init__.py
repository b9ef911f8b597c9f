"""Who is it, are they allowed, and is the wire private?

The phase `secure` on Python's side: our identity and where it comes from, the embedded CA, the throw-away CA of
development. Peers are verified and calls are authorised in the native core. Names are imported when they are first
used: cryptography is heavy, and a process in mode observe needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ca import CertificateAuthority, Issued
    from .dev import DEV_TRUST_DOMAIN
    from .folder import FolderSource
    from .identity import Identity, IdentitySource, IdentityStore

_HOMES = {
    "CertificateAuthority": "ca",
    "DEV_TRUST_DOMAIN": "dev",
    "FolderSource": "folder",
    "Identity": "identity",
    "IdentitySource": "identity",
    "IdentityStore": "identity",
    "Issued": "ca",
}

__all__ = [
    "DEV_TRUST_DOMAIN",
    "CertificateAuthority",
    "FolderSource",
    "Identity",
    "IdentitySource",
    "IdentityStore",
    "Issued",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
