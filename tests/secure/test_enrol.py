"""Does a service on another machine get its identity, keep it, lose it when it must, and never for want of a network?"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from meshlib.errors import ConnectFailed, IdentityError, IdentityWithdrawn, MeshError, PeerIdentityError
from meshlib.secure import CertificateAuthority, FolderSource, Identity, IdentityStore, certificates, exchange, files
from meshlib.secure.authority import Request, Service
from meshlib.secure.ca import DAY
from meshlib.secure.enrol import LONGEST_PAUSE, LOOK_EVERY, SOON, TRUST_EVERY, EnrolledSource, Line
from meshlib.secure.tokens import Token, fingerprint_matches
from tests.secure.ca_world import ORDERS, Foreign, events, serving, token_file, token_of, url_of
from tests.secure.crashes import is_done
from tests.secure.test_ca import NOW, Clock, mode_of, roots_of

URL = "https://ca.host:8444"


class Wire:
    """The way to the CA, without a network: counts what is asked, can be down, and can garble answers."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.asked: list[str] = []
        self.sent: list[str] = []
        self.is_down = False
        self.garble: Callable[[bytes], bytes] = lambda answer: answer

    def first_roots(self, place: exchange.Place, token: Token) -> bytes:
        self._reach("roots of anybody")
        roots = x509.load_pem_x509_certificates(self.service.authority.bundle)
        known = [root for root in roots if fingerprint_matches(root, token)]
        if not known:
            raise PeerIdentityError("no root with the fingerprint", reason="enroll.fingerprint")
        return certificates.pem(*known)

    def ask(
        self,
        place: exchange.Place,
        roots: bytes,
        method: str,
        path: str,
        content: dict[str, Any] | None = None,
        *,
        pair: tuple[bytes, bytes] | None = None,
        seconds: float = 5.0,
    ) -> bytes:
        self._reach(path)
        body = b"" if content is None else json.dumps(content).encode()
        self.sent.append(body.decode())
        peer, chain = None, tuple[bytes, ...]()
        if pair is not None:
            shown = x509.load_pem_x509_certificates(pair[0])
            assert load_pem_private_key(pair[1], None).public_key() == shown[0].public_key()
            peer, chain = certificates.uris_of(shown[0])[0], tuple(each.public_bytes(Encoding.DER) for each in shown)
        reply = self.service.answer(Request(method, path, body, peer, chain, "192.0.2.7"))
        if reply.status != 200:
            raise exchange._refusal(place, reply.status, reply.body)
        return self.garble(reply.body)

    def _reach(self, what: str) -> None:
        self.asked.append(what)
        if self.is_down:
            raise ConnectFailed("the CA's service can't be reached.")

    @property
    def line(self) -> Line:
        return Line(self.first_roots, self.ask)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


@pytest.fixture
def wire(authority: CertificateAuthority, clock: Clock) -> Wire:
    return Wire(Service(authority, clock=clock))


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """The other machine."""
    return tmp_path / "box"


def source_of(box: Path, wire: Wire, clock: Clock, chance: float = 0.5) -> EnrolledSource:
    return EnrolledSource(
        URL, box / "state", "orders", "shop.internal", ORDERS,
        token=box / "token", wall_clock=clock, chance=lambda: chance, line=wire.line,
    )  # fmt: skip


@pytest.fixture
def source(box: Path, wire: Wire, clock: Clock, authority: CertificateAuthority) -> EnrolledSource:
    """One with a token beside it."""
    token_file(box, token_of(authority))
    return source_of(box, wire, clock)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------------- the first time


def test_token_becomes_an_identity_and_is_gone(source: EnrolledSource, box: Path, authority: CertificateAuthority) -> None:
    """In the files that `meshlib ca issue` writes, with their rights; for 24 hours."""
    identity = source.load()
    assert (identity.spiffe_id, identity.not_after, identity.notes) == (ORDERS, NOW + DAY, ())
    assert identity.bundles == {"shop.internal": authority.bundle}
    state = box / "state" / "orders"
    assert {path.name: mode_of(path) for path in state.iterdir()} == {
        "bundle.pem": 0o644, "crl.pem": 0o644, "key.pem": 0o600, "svid.pem": 0o644,
    }  # fmt: skip
    assert mode_of(state) == 0o700
    assert not (box / "token").exists()
    assert (
        FolderSource(box / "state", "orders", "shop.internal", ORDERS, wall_clock=source._wall_clock).load().serial
        == identity.serial
    )


def test_key_never_leaves_the_machine(source: EnrolledSource, wire: Wire, clock: Clock, tmp_path: Path) -> None:
    """Neither at enrolment nor at renewal is there anything of it in what is sent, or in the CA's folder."""
    first = source.load()
    clock.now += DAY / 2
    second = source.load()
    assert first.key != second.key
    held = b"".join(path.read_bytes() for path in (tmp_path / "ca").rglob("*") if path.is_file()) + "".join(wire.sent).encode()
    for identity in (first, second):
        assert identity.key.splitlines()[1] not in held
    assert "PRIVATE" not in "".join(wire.sent)


def test_unchanged_identity_is_the_same_object(source: EnrolledSource, wire: Wire) -> None:
    """And costs no question to the CA."""
    first = source.load()
    asked = len(wire.asked)
    assert source.load() is first
    assert len(wire.asked) == asked


def test_without_token_or_identity_the_way_is_told(box: Path, wire: Wire, clock: Clock) -> None:
    """Nobody is asked."""
    with pytest.raises(IdentityError, match="orders is not enrolled.*meshlib ca token … orders.*put the token into"):
        source_of(box, wire, clock).load()
    assert wire.asked == []


def test_token_that_was_stolen_and_used_says_so_and_is_not_tried_again(
    source: EnrolledSource, wire: Wire, authority: CertificateAuthority, box: Path, clock: Clock
) -> None:
    """Until there is another one."""
    thief = wire.service
    token = Token.parse((box / "token").read_text())
    from tests.secure.ca_world import enroll

    assert enroll(thief, token).status == 200
    for _ in range(3):
        with pytest.raises(IdentityError, match="was used already") as refused:
            source.load()
        clock.now += 600
    assert (refused.value.reason, wire.asked.count("/v1/enroll")) == ("token.used", 1)
    token_file(box, token_of(authority))
    assert source.load().spiffe_id == ORDERS
    assert events(authority).count("token.refused") == 1


def test_token_of_another_service_is_not_sent(box: Path, wire: Wire, clock: Clock, authority: CertificateAuthority) -> None:
    """The CA would give us the other one's identity."""
    token_file(box, token_of(authority, "web"))
    with pytest.raises(IdentityError, match=f"the token is for .*/web, and this service is {ORDERS}"):
        source_of(box, wire, clock).load()
    assert wire.asked == []
    assert (box / "token").exists()


def test_token_that_others_can_read_is_refused(source: EnrolledSource, wire: Wire, box: Path) -> None:
    """They may have used it already."""
    (box / "token").chmod(0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        source.load()
    assert wire.asked == []


def test_ca_that_can_not_be_reached_is_tried_again(source: EnrolledSource, wire: Wire, clock: Clock, box: Path) -> None:
    """After a pause, with the same token."""
    wire.is_down = True
    with pytest.raises(ConnectFailed):
        source.load()
    with pytest.raises(ConnectFailed):
        source.load()
    assert len(wire.asked) == 1
    wire.is_down = False
    clock.now += 1
    assert source.load().spiffe_id == ORDERS


def test_store_gets_an_identity_from_it(source: EnrolledSource, clock: Clock, authority: CertificateAuthority) -> None:
    """As from every source; a revocation of somebody else arrives with the next look at the trust."""
    store = IdentityStore(source, mode="enforce", wall_clock=clock)
    assert store.require(0.0).spiffe_id == ORDERS
    victim = authority.issue("web")
    authority.revoke("web")
    clock.now += 2 * TRUST_EVERY
    assert store.refresh(1.0)
    assert store.current is not None
    (crl, _) = certificates.crls_of(store.current.crls["shop.internal"])
    assert [certificates.serial_text(entry.serial_number) for entry in crl] == [victim.serial]


# ---------------------------------------------------------------------------------------------------- renewal


def test_renewal_is_at_half_of_the_life_and_not_before(source: EnrolledSource, clock: Clock, wire: Wire) -> None:
    """With another key, over what the present certificate opens."""
    first = source.load()
    clock.now = NOW + DAY / 2 - 1
    assert source.load().serial == first.serial
    clock.now = NOW + DAY / 2
    second = source.load()
    assert (second.serial != first.serial, second.not_after) == (True, clock.now + DAY)
    assert wire.asked.count("/v1/renew") == 1


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.45), (0.5, 0.5), (1.0, 0.55)])
def test_renewals_of_a_fleet_are_spread(
    box: Path, wire: Wire, clock: Clock, authority: CertificateAuthority, chance: float, share: float
) -> None:
    """By a tenth of the half, either way; drawn once for each certificate."""
    token_file(box, token_of(authority))
    source = source_of(box, wire, clock, chance)
    identity = source.load()
    assert source.renewal_at(identity) == pytest.approx(NOW + share * DAY, abs=1)
    assert source.renewal_at(identity) == source.renewal_at(identity)


def test_restart_needs_no_ca(source: EnrolledSource, box: Path, wire: Wire, clock: Clock) -> None:
    """What lies in the folder is in force before anybody is asked, which may take seconds; that the CA is away is a note at once."""
    first = source.load()
    wire.is_down = True
    asked, restarted = len(wire.asked), source_of(box, wire, clock)
    again = restarted.load()
    assert (again.serial, again.key, again.notes, len(wire.asked)) == (first.serial, first.key, (), asked)
    assert restarted.refresh_at(again, clock.now) <= clock.now
    later = restarted.load()
    assert later.serial == first.serial
    assert "could not be used" in later.notes[0]


def test_restart_takes_no_revocation_back(source: EnrolledSource, box: Path, wire: Wire, clock: Clock, authority: Any) -> None:
    """One that is known here counts at once, and one that isn't with the second look."""
    first = source.load()
    authority.revoke("orders")
    restarted = source_of(box, wire, clock)
    assert restarted.load().serial == first.serial
    with pytest.raises(IdentityWithdrawn):
        restarted.load()
    wire.is_down = True
    with pytest.raises(IdentityWithdrawn):
        source_of(box, wire, clock).load()


def test_short_process_leaves_no_renewal_to_others(source: EnrolledSource, box: Path, wire: Wire, clock: Clock) -> None:
    """Jobs that look once and end would let it expire."""
    first = source.load()
    clock.now = NOW + DAY / 2
    assert source_of(box, wire, clock).load().serial != first.serial


def test_failed_renewal_keeps_the_identity_and_backs_off(source: EnrolledSource, clock: Clock, wire: Wire, caplog: Any) -> None:
    """1, 2, 4 … 300 s; told once in the log, by a note as long as it lasts; then all is well again."""
    first = source.load()
    clock.now = NOW + DAY / 2
    wire.is_down = True
    caplog.set_level(logging.WARNING, "meshlib.secure")
    pauses = []
    for _ in range(12):
        identity = source.load()
        assert (identity.serial, "can't be reached" in identity.notes[-1]) == (first.serial, True)
        pauses.append(source._pause.until - clock.now)
        asked = len(wire.asked)
        source.load()
        assert len(wire.asked) == asked
        clock.now = source._pause.until
    # The chance of one half makes three quarters of each pause.
    assert pauses == pytest.approx([0.75 * min(LONGEST_PAUSE, 2.0**number) for number in range(12)], abs=1e-3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    wire.is_down = False
    renewed = source.load()
    assert (renewed.serial != first.serial, renewed.notes, source.load() is renewed) == (True, (), True)


def test_store_alarms_while_a_renewal_fails(source: EnrolledSource, clock: Clock, wire: Wire) -> None:
    """By a note at once, and by the life of the certificate when three quarters of it are gone."""
    store = IdentityStore(source, mode="enforce", wall_clock=clock)
    store.require(0.0)
    wire.is_down = True
    clock.now = NOW + DAY / 2
    store.refresh(1.0)
    assert [alarm.kind for alarm in store.alarms] == ["note"]
    clock.now = NOW + 0.8 * DAY
    store.refresh(2.0)
    assert sorted(alarm.kind for alarm in store.alarms) == ["life", "note"]
    wire.is_down = False
    clock.now += LONGEST_PAUSE
    store.refresh(3.0)
    assert store.alarms == ()


def test_machine_that_was_off_for_a_week_comes_back_with_a_token(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, authority: CertificateAuthority
) -> None:
    """Renewal is refused with the way out; a token in the old place is found by the running process, and by a new one."""
    first = source.load()
    clock.now += 7 * DAY
    for each in (source, source_of(box, wire, clock)):
        with pytest.raises(
            IdentityError, match=r"expired at .* only a valid one can be renewed\. .*meshlib ca token … orders"
        ) as refused:
            each.load()
        assert refused.value.reason == "renew.expired"
    assert "/v1/renew" not in wire.asked
    token_file(box, token_of(authority))
    clock.now += 60
    again = source.load()
    assert (again.serial != first.serial, again.not_after) == (True, clock.now + DAY)
    assert source_of(box, wire, clock).load().serial == again.serial


def test_root_that_is_on_its_way_out_makes_the_renewal_due(
    source: EnrolledSource, clock: Clock, authority: CertificateAuthority
) -> None:
    """So a rotation needs minutes, not half a day: the new roots within the look at the trust, the leaf within a minute."""
    first = source.load()
    authority.begin_rotation()
    clock.now += TRUST_EVERY
    assert len(roots_of(source.load().bundles["shop.internal"])) == 2
    assert source.load().serial == first.serial
    authority.activate_rotation()
    clock.now += TRUST_EVERY
    source.load()
    clock.now += SOON
    second = source.load()
    assert second.serial != first.serial
    authority.finish_rotation()
    clock.now += TRUST_EVERY
    assert roots_of(source.load().bundles["shop.internal"]) == roots_of(authority.bundle)
    assert source.load().serial == second.serial


# ---------------------------------------------------------------------------------------------------- taken back


def test_revoked_service_gives_its_identity_up(
    source: EnrolledSource, clock: Clock, authority: CertificateAuthority, box: Path, wire: Wire
) -> None:
    """Within the look at the trust, also over a restart; a new token is a new beginning."""
    first = source.load()
    authority.revoke("orders")
    clock.now += TRUST_EVERY
    for _ in range(2):
        with pytest.raises(IdentityWithdrawn, match=f"revoked the certificate {first.serial}"):
            source.load()
    wire.is_down = True
    with pytest.raises(IdentityWithdrawn):
        source_of(box, wire, clock).load()
    wire.is_down = False
    token_file(box, token_of(authority))
    clock.now += LONGEST_PAUSE
    assert source.load().serial != first.serial


def test_renewal_that_is_refused_because_of_a_revocation_is_the_end(
    source: EnrolledSource, clock: Clock, authority: CertificateAuthority, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the list doesn't say so (yet)."""
    source.load()
    empty = authority.crl
    authority.revoke("orders")
    monkeypatch.setattr(CertificateAuthority, "crl", empty)
    clock.now = NOW + DAY / 2
    for _ in range(2):
        with pytest.raises(IdentityWithdrawn):
            source.load()


def test_process_of_a_revoked_service_stops_using_it(
    source: EnrolledSource, clock: Clock, authority: CertificateAuthority
) -> None:
    """The store has no identity any more, and an alarm."""
    store = IdentityStore(source, mode="enforce", wall_clock=clock)
    store.require(0.0)
    authority.revoke("orders")
    clock.now += 2 * TRUST_EVERY
    store.refresh(1.0)
    assert (store.current, [alarm.kind for alarm in store.alarms]) == (None, ["withdrawn"])


# ---------------------------------------------------------------------------------------------------- answers that are no good


def _of(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def garble(answer: bytes) -> bytes:
        content = json.loads(answer)
        change(content)
        return json.dumps(content).encode()

    return garble


STRANGER = CertificateAuthority.create(None, "shop.internal", clock=Clock())
FOREIGN = CertificateAuthority.create(None, "other.internal", clock=Clock())


@pytest.mark.parametrize(
    "garble",
    [
        lambda answer: b"",
        lambda answer: b"[]",
        lambda answer: answer[:-200],
        _of(lambda content: content.pop("bundle")),
        _of(lambda content: content.update(chain=7)),
        _of(lambda content: content.update(chain="")),
        _of(lambda content: content.update(bundle="")),
        _of(lambda content: content.update(crl="-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n")),
        _of(lambda content: content.update(chain=STRANGER.issue("orders").chain.decode())),
        _of(lambda content: content.update(bundle=STRANGER.bundle.decode(), crl="")),
        _of(lambda content: content.update(bundle=FOREIGN.bundle.decode(), crl="")),
    ],
)
def test_answer_that_is_no_identity_changes_nothing(
    source: EnrolledSource, clock: Clock, wire: Wire, box: Path, garble: Callable[[bytes], bytes]
) -> None:
    """At a renewal the present one goes on."""
    first = source.load()
    before = files_in(box / "state" / "orders")
    clock.now = NOW + DAY / 2
    wire.garble = lambda answer: garble(answer) if answer.startswith(b'{"spiffe_id"') else answer
    assert source.load().serial == first.serial
    now = files_in(box / "state" / "orders")
    assert {name: now[name] for name in before if name != "crl.pem"} == {
        name: before[name] for name in before if name != "crl.pem"
    }
    wire.garble = lambda answer: answer
    clock.now += LONGEST_PAUSE
    assert source.load().serial != first.serial


def test_enrolment_with_a_bad_answer_leaves_nothing_behind(source: EnrolledSource, wire: Wire, box: Path) -> None:
    """No half of a pair."""
    wire.garble = lambda answer: answer[:-200]
    with pytest.raises(MeshError):
        source.load()
    assert files_in(box / "state" / "orders") == {}


@pytest.mark.parametrize("garbled", [b"", b"-----BEGIN CERTIFICATE-----\nMIG", FOREIGN.bundle, b"{}"])
def test_bundle_that_is_none_is_not_taken(source: EnrolledSource, clock: Clock, wire: Wire, box: Path, garbled: bytes) -> None:
    """The roots of before stay, in memory and in the folder."""
    first = source.load()
    wire.garble = lambda answer: garbled if answer.startswith(b"-----BEGIN CERT") else answer
    clock.now += 2 * TRUST_EVERY
    identity = source.load()
    assert (identity.bundles, identity.serial) == (first.bundles, first.serial)
    assert (box / "state" / "orders" / "bundle.pem").read_bytes() == first.bundles["shop.internal"]


def test_old_list_of_revocations_forgets_nothing(
    source: EnrolledSource, clock: Clock, wire: Wire, authority: CertificateAuthority, box: Path
) -> None:
    """Whoever plays back a list from before is not believed."""
    source.load()
    old = authority.crl
    authority.issue("web")
    clock.now += 100
    authority.revoke("web")
    clock.now += 2 * TRUST_EVERY
    new = source.load().crls["shop.internal"]
    wire.garble = lambda answer: old if answer.startswith(b"-----BEGIN X509 CRL") else answer
    clock.now += 2 * TRUST_EVERY
    assert source.load().crls["shop.internal"] == new
    assert (box / "state" / "orders" / "crl.pem").read_bytes() == new


# ---------------------------------------------------------------------------------------------------- the folder


def test_crash_while_a_renewal_is_written_leaves_a_pair(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the machine stops, the next start finds a key with its certificate: the old pair or the new."""
    source.load()
    whole = box / "whole"
    shutil.copytree(box / "state", whole)
    clock.now = NOW + DAY / 2
    crashes, serials = 0, set()
    while True:
        shutil.rmtree(box / "state")
        shutil.copytree(whole, box / "state")
        before = source_of(box, wire, clock)
        before._trust_due = clock.now + TRUST_EVERY  # the renewal alone
        is_through = is_done(monkeypatch, crashes, before.load)
        wire.is_down = True
        serials.add(source_of(box, wire, clock).load().serial)
        wire.is_down = False
        if is_through:
            break
        crashes += 1
    assert crashes >= 5
    assert len(serials) >= 3


def test_processes_of_one_folder_take_turns(source: EnrolledSource, box: Path, wire: Wire, clock: Clock) -> None:
    """One renews, the other finds new files."""
    first = source.load()
    other = source_of(box, wire, clock)
    assert other.load().serial == first.serial
    clock.now = NOW + DAY / 2
    second = source.load()
    assert other.load().serial == second.serial != first.serial
    assert wire.asked.count("/v1/renew") == 1


def test_who_was_quicker_is_seen_when_it_is_our_turn(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our turn another process has renewed: its files are taken, and nobody is asked again."""
    source.load()
    other = source_of(box, wire, clock)
    other.load()
    clock.now = NOW + DAY / 2
    turn = source._kept.turn

    @contextlib.contextmanager
    def later(patience: float = 0.0) -> Iterator[bool]:
        other.load()
        with turn(patience) as is_ours:
            yield is_ours

    monkeypatch.setattr(source._kept, "turn", later)
    source._trust_due = clock.now + TRUST_EVERY
    found = source.load()
    assert (found.serial, wire.asked.count("/v1/renew")) == (other.load().serial, 1)


def test_while_another_process_asks_we_wait_for_its_files(source: EnrolledSource, box: Path, wire: Wire, clock: Clock) -> None:
    """Without being held up."""
    first = source.load()
    clock.now = NOW + DAY / 2
    held = os.open(box / "state" / "orders", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert source.load().serial == first.serial
        assert "/v1/renew" not in wire.asked
    finally:
        os.close(held)
    assert source.load().serial != first.serial


def test_processes_that_start_together_with_one_token_all_get_its_identity(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, authority: CertificateAuthority
) -> None:
    """One enrols; the others, which have nothing yet, wait for it. Nobody uses the token twice: that would look like a theft."""
    is_asking, may_go_on = threading.Event(), threading.Event()
    asked = wire.first_roots

    def slow(place: exchange.Place, token: Token) -> bytes:
        is_asking.set()
        assert may_go_on.wait(10)
        return asked(place, token)

    wire.first_roots = slow  # type: ignore[method-assign]
    sources = [source_of(box, wire, clock) for _ in range(4)]
    found: list[str] = []
    threads = [threading.Thread(target=lambda each=each: found.append(each.load().serial)) for each in sources]
    for thread in threads:
        thread.start()
    assert is_asking.wait(10)
    may_go_on.set()
    for thread in threads:
        thread.join(20)
    assert (len(found), len(set(found)), wire.asked.count("/v1/enroll")) == (4, 1, 1)
    assert "token.refused" not in events(authority)


def test_who_finds_the_token_gone_looks_for_what_it_has_bought(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look at the folder and that at the token another process has enrolled."""
    late = source_of(box, wire, clock)
    real = late._token_text

    def later() -> Any:
        source.load()
        return real()

    monkeypatch.setattr(late, "_token_text", later)
    assert late.load().serial == source.load().serial


def test_process_that_hangs_while_it_enrols_is_told(
    source: EnrolledSource, box: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait for some seconds, here for none, and say what they have waited for."""
    monkeypatch.setattr("meshlib.secure.enrol.PATIENCE", 0.0)
    held = os.open(files.make_private(box / "state" / "orders"), os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(IdentityError, match="another process has been enrolling orders"):
            source.load()
        assert (wire.asked, (box / "token").exists()) == ([], True)
    finally:
        os.close(held)


@contextlib.contextmanager
def full_disk(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing can be written where the service keeps what it has; the CA has room."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if "/state/" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        real(fd)

    with patch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        yield


def test_with_a_full_disk_it_goes_on_in_memory(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renewed and used, with a note; and when there is room again, it is written."""
    first = source.load()
    before = files_in(box / "state" / "orders")
    clock.now = NOW + DAY / 2
    with full_disk(monkeypatch):
        second = source.load()
        assert (second.serial != first.serial, "No space left" in second.notes[-1]) == (True, True)
        clock.now += DAY / 2
        third = source.load()
        assert third.serial not in {first.serial, second.serial}
        assert files_in(box / "state" / "orders") == before
    again = source.load()
    assert (again.serial, again.notes) == (third.serial, ())
    wire.is_down = True
    assert source_of(box, wire, clock).load().serial == third.serial


def test_with_a_full_disk_trust_is_withdrawn_all_the_same(
    source: EnrolledSource, clock: Clock, authority: CertificateAuthority, box: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revocation counts, whether or not it can be written; and it is written later."""
    source.load()
    victim = authority.issue("web")
    authority.revoke("web")
    clock.now += 2 * TRUST_EVERY
    with full_disk(monkeypatch):
        identity = source.load()
    (crl, _) = certificates.crls_of(identity.crls["shop.internal"])
    assert [certificates.serial_text(entry.serial_number) for entry in crl] == [victim.serial]
    assert "can't be kept" in identity.notes[-1]
    assert source.load().notes == ()
    assert (box / "state" / "orders" / "crl.pem").read_bytes() == identity.crls["shop.internal"]


def test_enrolment_with_a_full_disk_is_not_lost(source: EnrolledSource, box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is spent: so what it bought is used, and written later."""
    with full_disk(monkeypatch):
        first = source.load()
    assert not (box / "state" / "orders" / "svid.pem").exists()
    assert source.load().serial == first.serial
    assert (box / "state" / "orders" / "svid.pem").read_bytes() == first.chain


def test_what_is_held_in_memory_never_replaces_something_newer(
    source: EnrolledSource, box: Path, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, whose disk was not full, has renewed meanwhile."""
    source.load()
    clock.now = NOW + DAY / 2
    with full_disk(monkeypatch):
        source.load()
    clock.now += 60
    other = source_of(box, wire, clock)
    newer = other.load()
    assert source.load().serial == newer.serial


def test_token_that_can_not_be_removed_is_not_used_twice(
    source: EnrolledSource, wire: Wire, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a read-only mount, say: enrolled all the same, with a note."""
    from meshlib.secure import files

    real = files.remove

    def remove(where: Any, name: str) -> None:
        if name == "token":
            raise OSError(30, "Read-only file system")
        real(where, name)

    monkeypatch.setattr(files, "remove", remove)
    first = source.load()
    clock.now += 100
    again = source.load()
    assert (again.serial, "can't be removed" in again.notes[-1]) == (first.serial, True)
    assert wire.asked.count("/v1/enroll") == 1


def test_clock_that_was_set_back_stops_nothing(source: EnrolledSource, clock: Clock, wire: Wire) -> None:
    """A pause and a look that lie far ahead count no more."""
    source.load()
    clock.now += 10
    wire.is_down = True
    source._trust_due = 0.0
    source.load()
    wire.is_down = False
    source._pause.until = clock.now + 7 * DAY
    source._trust_due = clock.now + 7 * DAY
    asked = len(wire.asked)
    assert source.load().notes == ()
    assert wire.asked[asked:] == ["/v1/roots", "/v1/crl"]


def test_next_look_is_when_something_is_due(source: EnrolledSource, clock: Clock, wire: Wire) -> None:
    """A token or another process's files within half a minute; the trust and the renewal at their times; a retry at its."""
    identity = source.load()
    assert source.refresh_at(identity, clock.now) == clock.now + LOOK_EVERY
    clock.now = NOW + DAY / 2 - 10
    source.load()
    assert source.refresh_at(identity, clock.now) == NOW + DAY / 2
    clock.now = NOW + DAY / 2
    wire.is_down = True
    source.load()
    assert source.refresh_at(identity, clock.now) == pytest.approx(clock.now + 0.75)


def test_secrets_stay_out_of_logs_and_errors(
    source: EnrolledSource, box: Path, wire: Wire, authority: CertificateAuthority, caplog: Any
) -> None:
    """The token's secret, and the key."""
    caplog.set_level(logging.DEBUG)
    token = Token.parse((box / "token").read_text())
    from tests.secure.ca_world import enroll

    enroll(wire.service, token)
    with pytest.raises(IdentityError) as refused:
        source.load()
    secret = bytes(token.proof).decode().split(".")[1]
    assert secret not in f"{refused.value} {refused.value!r} {caplog.text} {source!r} {json.dumps(authority.issued())}"


def test_it_is_a_source_like_every_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By the checks for sources; what is published here is the CA's business, so the rules about that are left out."""
    from meshlib.testing import check_identity_source

    class World:
        def __init__(self, spiffe_id: str) -> None:
            self.spiffe_id = spiffe_id
            self.folder = tmp_path_factory.mktemp("world")
            self.authority = CertificateAuthority.create(self.folder / "ca", certificates.trust_domain_of(spiffe_id))
            self.line = Wire(Service(self.authority)).line

        def publish(self, chain: bytes, key: bytes, bundle: bytes) -> None:
            raise NotImplementedError

        def source(self) -> EnrolledSource:
            service = self.spiffe_id.rpartition("/")[2]
            token = token_file(self.folder / "box", token_of(self.authority, service))
            domain = self.authority.trust_domain
            return EnrolledSource(URL, self.folder / "state", service, domain, self.spiffe_id, token=token, line=self.line)

        def close(self) -> None:
            pass

    assert check_identity_source(World) == [
        "a_good_identity_is_answered_whole",
        "an_unchanged_identity_is_the_same_object",
        "an_answer_is_quick",
        "a_source_that_renews_says_when",
        "a_key_is_never_shown",
        "an_identity_is_never_pickled",
    ]


# ---------------------------------------------------------------------------------------------------- over the network


@pytest.fixture
def live(tmp_path: Path) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "live", "shop.internal")


def test_enrolment_and_renewal_over_the_network(live: CertificateAuthority, box: Path) -> None:
    """HTTPS and mTLS over loopback, with the real line."""
    with serving(Service(live)) as server:
        token_file(box, token_of(live))
        source = EnrolledSource(url_of(server), box / "state", "orders", "shop.internal", ORDERS, token=box / "token")
        first = source.load()
        source._renewals = {first.serial: 0.0}
        second = source.load()
        source._trust_due = 0.0
        live.issue("web")
        live.revoke("web")
        third = source.load()
    assert (first.spiffe_id, second.serial != first.serial, third.serial) == (ORDERS, True, second.serial)
    assert third.crls["shop.internal"] == live.crl
    assert [entry.get("by") for entry in live.issued() if entry["event"] in {"issue", "renewal"}][:3] == [
        None,
        "token",
        "renewal",
    ]


def test_ca_of_another_fingerprint_gets_no_token(live: CertificateAuthority, box: Path) -> None:
    """Somebody else answers at the address: the secret is not sent, and the token is as good as before."""
    impostor = CertificateAuthority.create(box.parent / "impostor", "shop.internal")
    token = token_of(live)
    with serving(Service(impostor)) as server:
        token_file(box, token)
        source = EnrolledSource(url_of(server), box / "state", "orders", "shop.internal", ORDERS, token=box / "token")
        with pytest.raises(PeerIdentityError, match="no root with the fingerprint.*The token was not sent"):
            source.load()
    assert (box / "token").exists()
    assert [event for event in events(impostor) if event not in {"create", "issue"}] == []


@contextlib.contextmanager
def answering(
    answer: Callable[[socket.socket], None], context: ssl.SSLContext | None = None
) -> Iterator[tuple[int, list[bytes]]]:
    """A server that isn't one of ours: its port, and what it got."""
    got: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(10)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                plug, _ = listener.accept()
                with plug, contextlib.suppress(OSError):
                    plug.settimeout(5)
                    secured = context.wrap_socket(plug, server_side=True) if context else plug
                    with secured:
                        got.append(secured.recv(65536))
                        answer(secured)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], got
    finally:
        listener.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept, as closing doesn't
        thread.join(10)
        listener.close()


def tls_of(own: Any, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (folder / "own.pem").write_bytes(own.chain + own.key)
    context.load_cert_chain(folder / "own.pem")
    return context


def test_peer_that_is_not_the_ca_is_sent_nothing(live: CertificateAuthority, tmp_path: Path) -> None:
    """A service of the same trust domain, with a good certificate, is still not the CA."""
    place = exchange.Place("127.0.0.1", 0, "shop.internal")
    with answering(lambda plug: None, tls_of(live.issue("web"), tmp_path)) as (port, got):
        with pytest.raises(PeerIdentityError, match="/sa/web, but spiffe://shop.internal/meshlib/ca was expected"):
            exchange.ask(
                exchange.Place(place.host, port, "shop.internal"),
                live.bundle,
                "POST",
                "/v1/enroll",
                {"token": "secret", "csr": ""},
            )
    assert got == []


def test_slow_ca_is_waited_for_a_few_seconds_altogether(live: CertificateAuthority, tmp_path: Path) -> None:
    """A byte now and then buys no more time."""

    def drip(plug: socket.socket) -> None:
        plug.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(200):
            plug.sendall(b"x")
            time.sleep(0.02)

    with answering(drip, tls_of(live.issue_own(), tmp_path)) as (port, _):
        began = time.monotonic()
        with pytest.raises(ConnectFailed, match="did not answer in time"):
            exchange.ask(exchange.Place("127.0.0.1", port, "shop.internal"), live.bundle, "GET", "/v1/crl", seconds=0.3)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"", "closed the connection"),
        (b"nonsense\r\n\r\n", "HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", "before|broke|closed|ended"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000000\r\n\r\n" + b"x" * 2_000_000, "more than 512 KiB"),
        (b"HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\nno", "refused: status 500"),
        (b"HTTP/1.1 302 Found\r\nlocation: https://evil/\r\ncontent-length: 0\r\n\r\n", "refused: status 302"),
        (
            b'HTTP/1.1 403 No\r\ncontent-length: 68\r\n\r\n{"detail":"a\\u001b[31m","hint":"h","reason":"token.used","status":1}',
            r"refused: a\[31m",
        ),
    ],
)
def test_answers_of_no_ca_are_errors(live: CertificateAuthority, tmp_path: Path, said: bytes, text: str) -> None:
    """Redirects are not followed, nothing is read without end, and what was said can't steer a terminal."""

    def answer(plug: socket.socket) -> None:
        plug.sendall(said)
        with contextlib.suppress(OSError):
            plug.shutdown(socket.SHUT_WR)

    with answering(answer, tls_of(live.issue_own(), tmp_path)) as (port, _), pytest.raises(MeshError, match=text):
        exchange.ask(exchange.Place("127.0.0.1", port, "shop.internal"), live.bundle, "GET", "/v1/crl")


def test_ca_that_is_not_there_is_told(live: CertificateAuthority) -> None:
    """With what to do: nothing listens, or something that speaks no TLS."""
    with socket.create_server(("127.0.0.1", 0)) as plug:
        port = plug.getsockname()[1]
    place = exchange.Place("127.0.0.1", port, "shop.internal")
    for ask in (
        lambda: exchange.ask(place, live.bundle, "GET", "/v1/crl"),
        lambda: exchange.first_roots(place, token_of(live)),
    ):
        with pytest.raises(ConnectFailed, match="Does `meshlib ca serve` run there"):
            ask()
    with answering(lambda plug: plug.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")) as (port, _):
        with pytest.raises(MeshError, match="does not speak TLS|broke off"):
            exchange.ask(exchange.Place("127.0.0.1", port, "shop.internal"), live.bundle, "GET", "/v1/crl")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ca.host:8444",
        "http://ca.host:8444",
        "https://",
        "https://ca.host:8444/v1",
        "https://u:p@ca.host",
        "https://ca.host:99999",
        "https://ca?x",
    ],
)
def test_addresses_that_are_none_are_refused(url: str, tmp_path: Path) -> None:
    """Plain HTTP above all."""
    with pytest.raises(IdentityError, match="no address of a CA"):
        EnrolledSource(url, tmp_path, "orders", "shop.internal", ORDERS)


def test_addresses_are_hosts_and_ports() -> None:
    """IPv6 in brackets; without a port it is 443."""
    assert exchange.Place.of("https://ca.host/", "td").address == "ca.host:443"
    assert exchange.Place.of("https://[2001:db8::1]:8444", "td").address == "[2001:db8::1]:8444"


def test_foreign_peers_take_what_was_enrolled(live: CertificateAuthority, box: Path) -> None:
    """OpenSSL shows it to the CA itself, and is believed."""
    from meshlib.secure import Issued

    with serving(Service(live)) as server:
        token_file(box, token_of(live))
        identity: Identity = EnrolledSource(
            url_of(server), box / "state", "orders", "shop.internal", ORDERS, token=box / "token"
        ).load()
        own = Issued("orders", ORDERS, "", 0, 0, identity.chain, b"", identity.key)
        status, answer, _ = Foreign(server, live.bundle, own).ask("POST", "/v1/renew", {"csr": "x"})
    assert (status, json.loads(answer)["reason"]) == (400, "csr.malformed")
