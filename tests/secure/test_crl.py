"""Does what was revoked stay revoked, whatever becomes of the list?"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib.errors import KeyFileError, MeshError
from meshlib.secure import (
    CertificateAuthority,
    FolderSource,
    IdentityStore,
    certificates,
)
from tests.secure.stores import LIFE, Clock, handshake, issuer_of


@pytest.fixture(autouse=True)
def _generations_begin_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted for the process; each test here is one."""
    monkeypatch.setattr("meshlib.secure.identity._generations", itertools.count(1))


class Listed:
    """Lists of revocations of the test's CA, and of others."""

    def __init__(self, authority: CertificateAuthority, clock: Clock) -> None:
        self.root, self.clock = authority._roots.signing, clock

    def crl(self, *serials: str, at: float = 0.0, life: float = LIFE, by: Any = None) -> bytes:
        root = by or self.root
        revoked = [(serial, self.clock.now, "unspecified") for serial in serials]
        return certificates.pem(certificates.new_crl(root.certificate, root.key, revoked, life, self.clock.now + at, 1))


@pytest.fixture
def listed(authority: CertificateAuthority, clock: Clock) -> Listed:
    return Listed(authority, clock)


def test_revocations_reach_both_sides_of_a_generation(store: IdentityStore, out: Path, listed: Listed) -> None:
    """By trust domain; a changed list is a new generation, so that sessions of who was revoked die."""
    store.require(0.0)
    first: Any = store.client_tls
    assert first.crls is None
    (out / "orders" / "crl.pem").write_bytes(text := listed.crl("0a"))
    assert store.refresh(1.0) is True
    sides: list[Any] = [store.client_tls, store.server_tls(True)]
    assert [side.crls for side in sides] == [{"shop.internal": text}] * 2


def test_revoked_peer_is_refused(tmp_path: Path) -> None:
    """As soon as the list lies in the folder, in full handshakes and in resumed ones."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    stores = {}
    for service in ("orders", "web"):
        authority.write(service, tmp_path)
        stores[service] = IdentityStore(
            FolderSource(tmp_path, service, "shop.internal", authority.id_of(service)), mode="enforce"
        )
    web = stores["web"].require(0.0)
    stores["orders"].require(0.0)
    assert [handshake(stores["orders"], stores["web"])[2] for _ in range(2)] == [False, True]
    issuer, key = issuer_of(authority)
    crl = certificates.new_crl(issuer, key, [(web.serial, time.time(), "unspecified")], 3600.0, time.time(), 1)
    (tmp_path / "orders" / "crl.pem").write_bytes(certificates.pem(crl))
    assert (stores["orders"].refresh(1.0), stores["orders"].last_error) == (True, None)
    with pytest.raises(MeshError, match="revoked"):
        handshake(stores["orders"], stores["web"])


def test_own_certificate_that_is_revoked_is_not_used_any_more(tmp_path: Path) -> None:
    """Peers refuse it; and whoever took it has its key as well. A number on another issuer's list is another certificate's."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    authority.write("orders", tmp_path)
    store = IdentityStore(FolderSource(tmp_path, "orders", "shop.internal", authority.id_of("orders")), mode="enforce")
    first, root, issuer = store.require(0.0), authority._roots.signing, issuer_of(authority)

    revoked = [(first.serial, time.time(), "unspecified")]
    lists = [certificates.new_crl(*by, revoked, 3600.0, time.time(), 1) for by in ((root.certificate, root.key), issuer)]
    (tmp_path / "orders" / "crl.pem").write_bytes(certificates.pem(lists[0]))
    assert (store.refresh(1.0), store.current is not None) == (True, True)
    (tmp_path / "orders" / "crl.pem").write_bytes(certificates.pem(*lists))
    for now in (2.0, 3.0):
        assert (store.refresh(now), store.current, [alarm.kind for alarm in store.alarms]) == (False, None, ["withdrawn"])
    assert "has been revoked" in str(store.last_error)
    authority.write("orders", tmp_path)
    assert (store.refresh(4.0), store.alarms) == (True, ())


BAD_LISTS = [
    pytest.param(lambda listed: b"", "crl.pem is gone|holds no list", id="empty"),
    pytest.param(lambda listed: b"nothing", "holds no list", id="nothing"),
    pytest.param(lambda listed: listed.crl("0b")[:-40], "half of one", id="cut off"),
    pytest.param(lambda listed: listed.crl("0b") + listed.crl("0c")[:100], "half of one", id="second cut off"),
    pytest.param(
        lambda listed: listed.crl("0b").replace(b"MII", b"AAA", 1).replace(b"MIH", b"AAA", 1), "can't be read", id="garbage"
    ),
    pytest.param(lambda listed: listed.crl(at=-60.0), "older than what we have", id="older"),
    pytest.param(
        lambda listed: listed.crl("0b", by=CertificateAuthority.create(None, "shop.internal", clock=listed.clock)._roots.signing),
        "signed by nobody whom we know",
        id="stranger",
    ),
    pytest.param(lambda listed: _forged(listed), "is not signed by", id="forged"),
    pytest.param(
        lambda listed: _of_the_issuer_alone(listed), "it lacks the list of CN=meshlib root", id="another issuer's alone"
    ),
]


def _of_the_issuer_alone(listed: Listed) -> bytes:
    return listed.crl("0b", by=listed.root.issuer)


def _forged(listed: Listed) -> bytes:
    """In the name of our root, signed by somebody else."""
    other = SimpleNamespace(certificate=listed.root.certificate, key=certificates.new_key())
    return listed.crl(by=other)


@pytest.mark.parametrize(("spoil", "text"), BAD_LISTS)
def test_bad_list_of_revocations_keeps_the_last_good_and_alarms(
    store: IdentityStore, out: Path, listed: Listed, spoil: Callable[[Listed], bytes], text: str
) -> None:
    """To forget what was revoked is the one answer that helps an attacker. Our own rotation goes on beside it."""
    (out / "orders" / "crl.pem").write_bytes(good := listed.crl("0a"))
    store.require(0.0)
    (out / "orders" / "crl.pem").write_bytes(spoil(listed))
    assert store.refresh(1.0) is False
    assert [(alarm.kind, bool(re.search(text, alarm.message))) for alarm in store.alarms] == [("note", True)]
    current = store.current
    assert current is not None
    assert (current.crls, store.last_error) == ({"shop.internal": good}, None)
    (out / "orders" / "crl.pem").write_bytes(better := listed.crl("0a", "0b", at=1.0))
    assert store.refresh(2.0) is True
    current = store.current
    assert current is not None
    assert (current.crls, store.alarms) == ({"shop.internal": better}, ())


@pytest.mark.parametrize(("spoil", "text"), [pytest.param(*case.values, id=case.id) for case in BAD_LISTS[1:5] + BAD_LISTS[6:8]])
def test_bad_list_of_revocations_stops_the_start(
    store: IdentityStore, out: Path, listed: Listed, spoil: Callable[[Listed], bytes], text: str
) -> None:
    """There is nothing to keep, and without it who was revoked would come in."""
    (out / "orders" / "crl.pem").write_bytes(spoil(listed))
    with pytest.raises(KeyFileError, match=text):
        store.require(0.0)


def test_list_of_revocations_that_is_gone_goes_on_counting(store: IdentityStore, out: Path, listed: Listed) -> None:
    """A file that a copy forgot is no pardon; nor is one that others may change."""
    crl = out / "orders" / "crl.pem"
    crl.write_bytes(good := listed.crl("0a"))
    store.require(0.0)
    crl.chmod(0o666)
    assert (store.refresh(1.0), [alarm.kind for alarm in store.alarms]) == (False, ["note"])
    crl.unlink()
    assert (store.refresh(2.0), [alarm.kind for alarm in store.alarms]) == (False, ["note"])
    current = store.current
    assert current is not None
    assert current.crls == {"shop.internal": good}


def test_list_of_an_issuer_that_we_do_not_know_stands_beside_ours(source: FolderSource, out: Path, listed: Listed) -> None:
    """It counts for who comes with a certificate of that issuer; but we don't take it alone."""
    stranger = CertificateAuthority.create(None, "shop.internal", clock=listed.clock)._roots.signing
    (out / "orders" / "crl.pem").write_bytes(text := listed.crl("0a") + listed.crl("0b", by=stranger))
    assert source.load().crls == {"shop.internal": text}


def test_list_of_revocations_past_its_date_goes_on_counting_with_an_alarm(tmp_path: Path) -> None:
    """What it revokes stays revoked. To refuse everybody because a publication failed would help nobody but a saboteur."""
    authority = CertificateAuthority.create(tmp_path / "ca", "shop.internal")
    authority.write("orders", tmp_path)
    clock = Clock(time.time())
    root = authority._roots.signing
    crl = certificates.new_crl(root.certificate, root.key, [], 60.0, clock.now, 1)
    (tmp_path / "orders" / "crl.pem").write_bytes(certificates.pem(crl))
    source = FolderSource(tmp_path, "orders", "shop.internal", authority.id_of("orders"))
    store = IdentityStore(source, mode="enforce", wall_clock=clock)
    store.require(0.0)
    assert store.alarms == ()
    clock.now += 61.0
    store.refresh(1.0)
    assert [(alarm.kind, "stays revoked" in alarm.message) for alarm in store.alarms] == [("revocations", True)]
    current = store.current
    assert current is not None
    assert current.crls == {"shop.internal": certificates.pem(crl)}


def test_revocation_counts_beside_a_pair_that_is_no_good(store: IdentityStore, out: Path, listed: Listed) -> None:
    """Like a root that was withdrawn."""
    first = store.require(0.0)
    (out / "orders" / "key.pem").write_bytes(b"half")
    (out / "orders" / "crl.pem").write_bytes(text := listed.crl("0a"))
    assert store.refresh(1.0) is True
    current = store.current
    assert current is not None
    assert (current.serial, current.crls) == (first.serial, {"shop.internal": text})
