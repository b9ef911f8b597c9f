"""What do the tests of this phase share? A CA in memory, a folder that it filled, and a store over it; the clock is moved by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlib.secure import (
    CertificateAuthority,
    FolderSource,
    IdentityStore,
)
from tests.secure.stores import ID, LIFE, Clock, store_of


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(None, "shop.internal", clock=clock)


@pytest.fixture
def out(tmp_path: Path, authority: CertificateAuthority) -> Path:
    """A folder in which `orders` has a good identity."""
    authority.write("orders", tmp_path / "out", ttl=LIFE)
    return tmp_path / "out"


@pytest.fixture
def source(out: Path, clock: Clock) -> FolderSource:
    return FolderSource(out, "orders", "shop.internal", ID, wall_clock=clock)


@pytest.fixture
def store(source: FolderSource, clock: Clock) -> IdentityStore:
    return store_of(source, clock)
