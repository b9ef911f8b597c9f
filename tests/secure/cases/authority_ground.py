"""How does a stranger's body reach the service of the CA? By its answers, which sockets and TLS only carry."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

from meshlib.secure.authority import Request, Service
from meshlib.secure.ca import CertificateAuthority
from tests.secure.cases import ground


@lru_cache(maxsize=1)
def service() -> Service:
    return Service(authority())


@lru_cache(maxsize=1)
def authority() -> CertificateAuthority:
    """A CA of its own: tokens for enrolment are kept in its folder."""
    return CertificateAuthority.create(Path(tempfile.mkdtemp(dir=ground.home())) / "ca", "td")


def answered(body: bytes, path: str = "/v1/enroll") -> int:
    """The status with which `meshlib ca serve` answers a request to enrol with this body."""
    return service().answer(Request("POST", path, body, source="203.0.113.9")).status
