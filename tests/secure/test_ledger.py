"""Does the audit log tell everything, and does it show when somebody changed it?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from meshlib.secure import CertificateAuthority, files
from meshlib.secure.ca import DAY
from meshlib.secure.ledger import EXPIRED, GENESIS, REVOKED, SUPERSEDED, VALID, Ledger
from tests.secure.test_ca import NOW, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> CertificateAuthority:
    return CertificateAuthority.create(tmp_path / "ca", "shop.internal", clock=clock)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "ca" / "issued.jsonl"


def test_every_line_holds_the_hash_of_the_line_before(authority: CertificateAuthority, log: Path) -> None:
    """The first one that of nothing."""
    for name in ("orders", "web", "billing"):
        authority.issue(name)
    lines = log.read_bytes().splitlines()
    hashes = [GENESIS, *(hashlib.sha256(line).hexdigest() for line in lines)]
    assert [json.loads(line)["prev"] for line in lines] == hashes[:-1]
    chain = authority.verify_log()
    assert (chain.entries, chain.head, chain.faults, chain.unchained, chain.torn) == (4, hashes[-1], (), 0, 0)


def _changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:1], lines[1].replace(b"orders", b"ordres"), *lines[2:]]


def _taken_out(lines: list[bytes]) -> list[bytes]:
    return [*lines[:1], *lines[2:]]


def _put_in(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], b'{"event":"issue"}', *lines[2:]]


def _swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[2], lines[1], *lines[3:]]


def _made_unreadable(lines: list[bytes]) -> list[bytes]:
    return [*lines[:1], lines[1][:-5], *lines[2:]]


@pytest.mark.parametrize(
    ("forge", "places"),
    [
        (_changed, [3]),
        (_taken_out, [2]),
        (_put_in, [3, 4]),
        (_swapped, [2, 3, 4]),
        (_made_unreadable, [3]),
    ],
)
def test_whatever_was_changed_in_the_middle_is_found_where_it_is(
    authority: CertificateAuthority, log: Path, forge: Callable[[list[bytes]], list[bytes]], places: list[int]
) -> None:
    """The line behind it no longer fits."""
    for name in ("orders", "web", "billing"):
        authority.issue(name)
    log.write_bytes(b"\n".join(forge(log.read_bytes().splitlines())) + b"\n")
    assert [line for line, _ in CertificateAuthority.open(log.parent).verify_log().faults] == places


def test_end_that_was_cut_off_is_told_by_a_hash_that_was_noted(authority: CertificateAuthority, log: Path) -> None:
    """Without one nothing is wrong with a shorter log; with one it shows, and a longer log is as good as before."""
    authority.issue("orders")
    noted = authority.verify_log().head
    authority.issue("web")
    assert authority.verify_log(noted).faults == ()
    whole = log.read_bytes()
    log.write_bytes(b"".join(whole.splitlines(keepends=True)[:1]))
    again = CertificateAuthority.open(log.parent)
    assert again.verify_log().faults == ()
    ((line, fault),) = again.verify_log(noted).faults
    assert (line, "its end was cut off" in fault) == (1, True)


def test_line_that_a_crash_cut_off_is_bound_into_the_chain(authority: CertificateAuthority, log: Path) -> None:
    """It tells nothing, and can't be changed afterwards either."""
    with log.open("ab") as file:
        file.write(b'{"time":"2027-01-')
    authority.issue("orders")
    chain = authority.verify_log()
    assert (chain.entries, chain.torn, chain.faults) == (3, 1, ())
    log.write_bytes(log.read_bytes().replace(b'{"time":"2027-01-\n', b'{"time":"2027-02-\n'))
    assert [line for line, _ in CertificateAuthority.open(log.parent).verify_log().faults] == [3]


def test_line_that_the_disk_did_not_take_is_an_error(
    authority: CertificateAuthority, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the system said of it: the log is looked at before anything is handed out."""

    def half(where: Path, name: str, line: bytes) -> None:
        with (where / name).open("ab") as file:
            file.write(line[: len(line) // 2])

    with monkeypatch.context() as patched:
        patched.setattr(files, "append", half)
        with pytest.raises(OSError, match="did not take the line"):
            authority.issue("orders")
    authority.issue("web")
    again = CertificateAuthority.open(log.parent)
    assert ([entry.get("service") for entry in again.issued()], again.verify_log().faults) == ([None, "web"], ())


def test_two_who_share_a_log_continue_one_chain(authority: CertificateAuthority, log: Path, clock: Clock) -> None:
    """Each looks at what the other has added before it adds something."""
    other = CertificateAuthority.open(log.parent, clock=clock)
    for each in (authority, other, other, authority, other):
        each.issue("orders")
    assert (authority.verify_log().entries, other.verify_log().faults) == (6, ())


def test_log_in_memory_is_chained_too() -> None:
    """As that of `meshlib dev`."""
    authority = CertificateAuthority.create(None, "shop.internal", clock=Clock())
    authority.issue("orders")
    assert (authority.verify_log().entries, authority.verify_log().faults) == (2, ())


def test_certificates_stand_as_they_are(authority: CertificateAuthority, clock: Clock) -> None:
    """Valid, superseded by a newer one of the same ID, expired, revoked; a revoked one that has ended is revoked."""
    authority.issue("orders", ttl=DAY)
    authority.issue("orders")
    authority.issue("web", ttl=DAY)
    authority.issue("billing", ttl=2 * DAY)
    authority.revoke("billing")
    clock.now += DAY / 2
    during = [state for _, state in authority.standing(is_whole=True)]
    clock.now += 3 * DAY
    after = [state for _, state in authority.standing(is_whole=True)]
    assert during == [SUPERSEDED, VALID, VALID, REVOKED]
    assert after == [EXPIRED, VALID, EXPIRED, REVOKED]
    assert [entry["service"] for entry, _ in authority.standing()] == ["orders", "web", "billing"]


def test_memory_of_a_long_log_is_bounded_by_what_is_alive() -> None:
    """Certificates that have ended are forgotten, but for the newest of each service; the log keeps them."""
    ledger = Ledger(None)
    for number in range(10_000):
        now = NOW + number * 60
        end = f"{2027 + number // 1000}-01-01T00:00:00.000Z"
        ledger.note("renewal", now, serial=f"{number:x}", spiffe_id=f"spiffe://td/{number % 3}", not_after=end)
    ledger._prune(NOW + 20 * 365 * DAY)
    assert (len(ledger.certificates), len(ledger.entries())) == (3, 10_000)


def test_log_that_became_shorter_is_read_anew(authority: CertificateAuthority, log: Path) -> None:
    """A backup that was put back counts, and nothing of what it doesn't know."""
    first = authority.issue("orders")
    kept = log.read_bytes()
    authority.revoke(first.serial)
    log.write_bytes(kept)
    assert not authority.is_revoked(first.serial)
