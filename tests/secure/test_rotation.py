"""Is an identity renewed in time, given up when it is taken back, and told about when neither happens?"""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from meshlib.errors import IdentityError, IdentityWithdrawn
from meshlib.secure import (
    Alarm,
    CertificateAuthority,
    FolderSource,
    Identity,
    IdentityStore,
    renewal_of,
)
from tests.secure.stores import LIFE, NOW, Clock, Renewing, Told, store_of


@pytest.fixture(autouse=True)
def _generations_begin_at_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted for the process; each test here is one."""
    monkeypatch.setattr("meshlib.secure.identity._generations", itertools.count(1))


# ---------------------------------------------------------------------------------------------------- taken back


def test_identity_that_is_taken_back_is_not_used_any_more(
    source: FolderSource, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Unlike after any other failure: no client, no server, an error that says why, told once."""
    told = Told(source.load())
    store = store_of(told, clock)
    store.require(0.0)
    store.server_tls(True)
    told.said = IdentityWithdrawn("the agent took it back.", hint="Ask its operator.")
    assert [store.refresh(now) for now in (1.0, 2.0)] == [False, False]
    assert (store.current, store.client_tls, store.failures, store.spent) == (None, None, 2, 0.0)
    with pytest.raises(IdentityError, match=r"no identity to serve TLS with.*the agent took it back"):
        store.server_tls(True)
    with pytest.raises(IdentityWithdrawn):
        store.require(3.0)
    assert caplog.text.count("the agent took it back") == 1
    assert [(alarm.kind, "withdrawn" in alarm.message) for alarm in store.alarms] == [("withdrawn", True)]


def test_identity_that_comes_back_goes_on_with_the_counters(source: FolderSource, clock: Clock) -> None:
    """The same servers, the next generation; the alarm is over."""
    identity = source.load()
    told = Told(identity)
    store = store_of(told, clock)
    store.require(0.0)
    before: list[Any] = [store.client_tls, store.server_tls(True)]
    told.said = IdentityWithdrawn("taken back.")
    store.refresh(1.0)
    told.said = identity
    assert store.refresh(2.0) is True
    after: list[Any] = [store.client_tls, store.server_tls(True)]
    assert [each.before for each in after] == before
    assert (after[0].generation, store.rotations, store.alarms, store.last_error) == (2, 1, (), None)


def test_withdrawn_identity_stays_withdrawn_in_a_forked_child(source: FolderSource, clock: Clock) -> None:
    """And the source is told of the fork, and of the end."""
    told = Told(source.load())
    store = store_of(told, clock)
    store.require(0.0)
    told.said = IdentityWithdrawn("taken back.")
    store.refresh(1.0)
    store.after_fork()
    store.close()
    assert (store.current, told.calls, [alarm.kind for alarm in store.alarms]) == (None, ["after_fork", "close"], ["withdrawn"])


def test_bundle_that_withdraws_all_keys_withdraws_us(store: IdentityStore, out: Path) -> None:
    """A SPIFFE bundle without keys: nothing that our trust domain signed is believed, our own certificate neither."""
    store.require(0.0)
    (out / "orders" / "bundle.pem").unlink()
    (out / "orders" / "bundle.json").write_bytes(b'{"keys": []}')
    assert (store.refresh(1.0), store.current, type(store.last_error)) == (False, None, IdentityWithdrawn)
    assert "has withdrawn its keys" in str(store.last_error)


# ---------------------------------------------------------------------------------------------------- renewed


@pytest.mark.parametrize(("chance", "share"), [(0.0, 0.45), (0.5, 0.5), (1.0, 0.55)])
def test_renewal_is_due_at_half_of_the_life_give_or_take_a_tenth(source: FolderSource, chance: float, share: float) -> None:
    """Of a fleet whose certificates were issued together, not all ask at once."""
    identity = source.load()
    assert renewal_of(identity, lambda: chance) == pytest.approx(NOW - 30 + share * (LIFE + 30))


def test_source_that_renews_is_asked_when_it_says(source: FolderSource, clock: Clock) -> None:
    """Not each second: to ask may mean to call somebody."""
    told = Renewing(source.load())
    store = store_of(told, clock)
    store.require(0.0)
    for _ in range(3):
        store.refresh(1.0)
    assert (told.loads, store.is_renewing) == (1, True)
    clock.now = renewal_of(source.load(), lambda: 0.5) - 1.0
    store.refresh(2.0)
    assert told.loads == 1
    clock.now += 1.0
    store.refresh(3.0)
    assert told.loads == 2


@pytest.mark.parametrize("fails", [False, True])
def test_clock_that_is_set_back_delays_no_renewal(source: FolderSource, clock: Clock, fails: bool) -> None:
    """How long until it is asked again is counted by a clock that nobody sets back, too."""
    steady = Clock(0.0)
    told = Renewing(source.load())
    store = store_of(told, clock, clock=steady, chance=lambda: 0.5)
    store.require(0.0)
    pause = renewal_of(source.load(), lambda: 0.5) - clock.now
    if fails:
        clock.now += pause
        told.said = IdentityError("the CA is away.", hint="Wait.")
        store.refresh(1.0)
        pause, told.loads = 1.0, 1
    clock.now -= 86_400.0
    steady.now += pause - 0.5
    store.refresh(1.0)
    assert told.loads == 1
    steady.now += 0.5
    store.refresh(2.0)
    assert told.loads == 2


def test_renewal_that_fails_is_tried_again_ever_more_rarely(source: FolderSource, clock: Clock) -> None:
    """After 1, 2, 4 … seconds and at most a minute, give or take a tenth; each failure is counted once, however often it's looked."""
    told = Renewing(source.load())
    store = store_of(told, clock, chance=lambda: 0.5)
    first = store.require(0.0)
    clock.now = renewal_of(first, lambda: 0.5)
    told.said = IdentityError("the CA is away.", hint="Wait.")
    began, asked = clock.now, []
    for _ in range(400):
        before = told.loads
        store.refresh(0.0)
        if told.loads > before:
            asked.append(clock.now - began)
        clock.now += 1.0
    assert asked == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0, 123.0, 183.0, 243.0, 303.0, 363.0]
    assert (store.failures, store.current) == (12, first)
    told.said = source._proved(source._read(), None)
    clock.now = NOW + LIFE - 1.0
    assert (store.refresh(0.0), store.last_error) == (False, None)


async def test_source_that_renews_is_asked_on_a_thread_of_its_own(source: FolderSource, clock: Clock) -> None:
    """The keeper's loop does everything else meanwhile; a file is read where we are."""
    threads: list[str] = []

    class Slow(Renewing):
        def load(self) -> Identity:
            threads.append(threading.current_thread().name)
            return super().load()

    store = store_of(Slow(source.load()), clock)
    await store.look(0.0)
    await store.look(1.0)
    assert threads == ["meshlib-identity"]
    quick = Told(source.load())
    plain = store_of(quick, clock)
    await plain.look(0.0)
    assert (quick.loads, plain.current is not None, store.current is not None) == (1, True, True)


# ---------------------------------------------------------------------------------------------------- never half good


@pytest.mark.parametrize(("shift", "what"), [(LIFE, "has expired"), (-31.0, "is not valid yet")])
def test_certificate_outside_its_life_never_replaces_one_inside(
    source: FolderSource, authority: CertificateAuthority, out: Path, clock: Clock, shift: float, what: str
) -> None:
    """Whatever the source thinks of it; and nothing starts with one."""
    told = Told(source.load())
    store = store_of(told, clock)
    first = store.require(0.0)
    clock.now -= shift
    authority.write("orders", out, ttl=LIFE)
    told.said = source.load()
    clock.now += shift
    assert (store.refresh(1.0), store.current, what in str(store.last_error)) == (False, first, True)
    with pytest.raises(IdentityError, match=what):
        store_of(told, clock).require(0.0)


@pytest.mark.parametrize("shift", [LIFE, -31.0])
def test_certificate_file_outside_its_life_keeps_the_last_good(
    store: IdentityStore, authority: CertificateAuthority, out: Path, clock: Clock, shift: float
) -> None:
    """An old backup was put back, or another machine's clock is wrong."""
    first = store.require(0.0)
    clock.now -= shift
    authority.write("orders", out, ttl=LIFE)
    clock.now += shift
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 1)


def test_clock_that_is_set_back_keeps_us_serving_with_an_alarm(store: IdentityStore, clock: Clock) -> None:
    """Our certificate isn't valid by this machine's clock any more; by everybody else's it is."""
    first = store.require(0.0)
    clock.now -= 3600.0
    assert (store.refresh(1.0), store.current, store.failures) == (False, first, 0)
    assert [(alarm.kind, "another 3570 s" in alarm.message) for alarm in store.alarms] == [("clock", True)]
    clock.now += 3600.0
    store.refresh(2.0)
    assert store.alarms == ()


def test_alarm_calls_back_once_when_it_begins(store: IdentityStore, clock: Clock) -> None:
    """And again when it begins again; a callback that fails keeps nobody else from it."""
    told: list[tuple[str, float]] = []

    def fail(_: Alarm) -> None:
        raise RuntimeError("callback")

    store.on_alarm(fail)
    store.on_alarm(lambda alarm: told.append((alarm.kind, clock.now - NOW)))
    store.require(0.0)
    for gone in (0.0, 0.8 * LIFE, 0.9 * LIFE, LIFE, 0.0, 0.8 * LIFE):
        clock.now = NOW + gone
        store.refresh(1.0)
    assert told == [("life", 0.8 * LIFE), ("expired", LIFE), ("life", 0.8 * LIFE)]
