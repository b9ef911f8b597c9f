"""Do other trust domains stand beside ours, each under its own name, and never in its place?"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from meshlib.errors import MeshError
from meshlib.secure import (
    CertificateAuthority,
    FolderSource,
    IdentityStore,
    bundle,
)
from tests.secure.stores import LIFE, Clock, handshake, store_of


@pytest.fixture(autouse=True)
def _generations_begin_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted for the process; each test here is one."""
    monkeypatch.setattr("meshlib.secure.identity._generations", itertools.count(1))


def other_root(name: str, clock: Clock) -> bytes:
    return CertificateAuthority.create(None, name, clock=clock).bundle


def test_federated_bundles_in_the_folder_stand_each_under_its_own_name(source: FolderSource, out: Path, clock: Clock) -> None:
    """PEM or a SPIFFE bundle; other files are none."""
    federated = out / "orders" / "federated"
    federated.mkdir(mode=0o755)
    partner, other = other_root("partner.example", clock), other_root("other.example", clock)
    (federated / "partner.example.pem").write_bytes(partner)
    (federated / "other.example.json").write_bytes(bundle.format(bundle.parse(other)))
    (federated / "README").write_bytes(b"x")
    (federated / ".hidden.pem").write_bytes(b"x")
    identity = source.load()
    own = (out / "orders" / "bundle.pem").read_bytes()
    assert identity.bundles == {"shop.internal": own, "partner.example": partner, "other.example": other}
    assert identity.notes == ()


def test_federated_bundle_that_is_bad_keeps_the_last_good_and_nothing_else(
    store: IdentityStore, out: Path, authority: CertificateAuthority, clock: Clock
) -> None:
    """It alarms, and our own rotation goes on; one that is taken away is not believed any more."""
    federated = out / "orders" / "federated"
    federated.mkdir(mode=0o755)
    (federated / "partner.example.pem").write_bytes(partner := other_root("partner.example", clock))
    store.require(0.0)
    for spoil in (
        lambda file: file.write_bytes(b"half"),
        lambda file: file.chmod(0o666),
        lambda file: (file.chmod(0o644), file.write_bytes(other_root("third.example", clock))),
    ):
        spoil(federated / "partner.example.pem")
        authority.write("orders", out, ttl=LIFE)
        assert (store.refresh(1.0), [alarm.kind for alarm in store.alarms]) == (True, ["note"])
        current = store.current
        assert current is not None
        assert current.bundles["partner.example"] == partner
    (federated / "partner.example.pem").unlink()
    assert (store.refresh(2.0), store.alarms) == (True, ())
    current = store.current
    assert current is not None
    assert sorted(current.bundles) == ["shop.internal"]


def test_federated_bundle_of_our_own_trust_domain_is_ignored(source: FolderSource, out: Path, clock: Clock) -> None:
    """Beside our own it would be a second set of roots, in one pool with ours."""
    federated = out / "orders" / "federated"
    federated.mkdir(mode=0o755)
    (federated / "shop.internal.pem").write_bytes(other_root("shop.internal", clock))
    (federated / "Not A Domain.pem").write_bytes(other_root("other.example", clock))
    identity = source.load()
    assert identity.bundles == {"shop.internal": (out / "orders" / "bundle.pem").read_bytes()}
    assert [re.search("'(.*?)'", note)[1] for note in identity.notes] == ["Not A Domain", "shop.internal"]  # type: ignore[index]


class Partners:
    """Stands for `Federation`."""

    def __init__(self) -> None:
        self.bundles: dict[str, bytes] = {}
        self.told: dict[str, str] = {}

    def faults(self) -> dict[str, str]:
        return self.told


def test_federation_adds_bundles_and_never_to_ours(source: FolderSource, clock: Clock) -> None:
    """A change is a new generation; what the configuration names wins over what the source found; our own can't be replaced."""
    partners = Partners()
    store = store_of(source, clock, federation=partners)
    own = store.require(0.0).bundles
    partners.bundles = {"partner.example": b"partner", "shop.internal": b"evil"}
    assert store.refresh(1.0) is True
    client: Any = store.client_tls
    assert client.bundles == {**own, "partner.example": b"partner"}
    assert store.refresh(2.0) is False
    partners.bundles = {}
    assert store.refresh(3.0) is True
    client = store.client_tls
    assert client.bundles == own


def test_federation_counts_although_the_source_fails(store: IdentityStore, out: Path, clock: Clock) -> None:
    """A root of a partner that was withdrawn is not kept because a file of ours is missing."""
    partners = Partners()
    partners.bundles = {"partner.example": b"partner"}
    store.federation = partners
    store.require(0.0)
    (out / "orders" / "key.pem").unlink()
    partners.bundles = {}
    assert (store.refresh(1.0), store.failures) == (True, 1)
    client: Any = store.client_tls
    assert sorted(client.bundles) == ["shop.internal"]


def test_fault_of_federation_is_an_alarm(source: FolderSource, clock: Clock) -> None:
    """As long as it lasts, by trust domain."""
    partners = Partners()
    store = store_of(source, clock, federation=partners)
    store.require(0.0)
    partners.told = {"partner.example": "it is 900 s old"}
    store.refresh(1.0)
    assert [(alarm.kind, alarm.about, "900 s" in alarm.message) for alarm in store.alarms] == [
        ("federation", "partner.example", True)
    ]
    partners.told = {}
    store.refresh(2.0)
    assert store.alarms == ()


def test_member_of_another_trust_domain_is_known_by_its_own_bundle_only(tmp_path: Path) -> None:
    """On the wire: with its bundle it comes in, under ours it doesn't, and a root of ours can't speak for it."""
    ours, theirs = (CertificateAuthority.create(tmp_path / name, name) for name in ("shop.internal", "partner.example"))
    ours.write("orders", tmp_path)
    theirs.write("web", tmp_path)
    stores = {}
    for authority, service in ((ours, "orders"), (theirs, "web")):
        source = FolderSource(tmp_path, service, authority.trust_domain, authority.id_of(service))
        stores[service] = IdentityStore(source, mode="enforce")
        stores[service].require(0.0)
    for service, name, pem in (("orders", "partner.example", theirs.bundle), ("web", "shop.internal", ours.bundle)):
        with pytest.raises(MeshError):
            handshake(stores["orders"], stores["web"])
        (tmp_path / service / "federated").mkdir(mode=0o755)
        (tmp_path / service / "federated" / f"{name}.pem").write_bytes(pem)
        assert stores[service].refresh(1.0) is True
    assert handshake(stores["orders"], stores["web"])[:2] == (theirs.id_of("web"), ours.id_of("orders"))
