"""What does a process do with limits on what comes in that it shares with others? The store is a list of answers, time a number."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

import meshlib.admit.limiter as module
from meshlib.admit.inbound import STAND_IN, Answer, InboundRates, network
from meshlib.admit.limiter import RateGuard, Stores
from meshlib.client.way import run
from meshlib.errors import ConfigError, RateLimited

from .test_limiter import FAR, Store, rate

PEER, CLIENT = "spiffe://shop/a", "192.0.2.7"
SETTINGS = {"url": "redis://:secret@host", "timeout": 0.05}


class Process:
    """The rates of both ways, their stores, and a clock."""

    def __init__(
        self, store: Store, *rates: Any, outbound: tuple[Any, ...] = (), stores: Mapping[str, Store] | None = None
    ) -> None:
        self.store, self.now, self.opened = store, 100.0, 0
        self.by_name = {"redis": store, **(stores or {})}
        self.config: Any = SimpleNamespace(
            name="shop",
            service="orders",
            services={"orders": None},
            stores=dict.fromkeys(self.by_name, SETTINGS),
            rates_of=lambda service: outbound,
            own=SimpleNamespace(inbound_global_rates=rates),
        )
        stores_of_both = Stores(self.open)
        self.rates = InboundRates(stores_of_both, clock=lambda: self.now, source=random.Random(1))
        self.guard = RateGuard(stores_of_both, clock=lambda: self.now, source=random.Random(1))
        self.rates.prepare(self.config)()
        self.guard.prepare(self.config)()

    def open(self, name: str, settings: Mapping[str, Any]) -> Store:
        self.opened += 1
        assert settings == SETTINGS
        return self.by_name[name]

    def take(self, *headers: tuple[bytes, bytes], route: str = "items", peer: str = PEER, client: str = CLIENT) -> Answer:
        return self.rates.take_blocking(route, peer, client, headers)

    def call(self) -> bool:
        """A call that goes out."""
        return run(self.guard.take("orders", "", None, [], FAR, is_blocking=True))

    @property
    def row(self) -> dict[str, Any]:
        return {key: value for key, value in self.rates.stats()[0].items() if key in ("asked", "refused", "failed", "skipped")}


# ---------------------------------------------------------------- asking


async def test_handlers_of_both_kinds_ask_the_same() -> None:
    """The rate as it is configured, within the time of the store; what fits needs no word."""
    process = Process(Store(0.0), rate())
    assert process.take() is None
    assert await process.rates.take("items", PEER, CLIENT, []) is None
    assert process.store.asked == [("shop:orders/inbound:r", 5, 1.0, 5, 0.05)] * 2


def test_without_such_limits_there_is_nothing_to_ask() -> None:
    """The way looks once, and takes the short way."""
    process = Process(Store(0.0))
    assert (bool(process.rates), process.take(), process.store.asked, process.rates.stats()) == (False, None, [], [])
    assert bool(Process(Store(0.0), rate()).rates)


async def test_a_refusal_is_a_number_of_seconds_and_is_remembered_for_that_long() -> None:
    """An overload is not passed on to the store, whoever handles the calls."""
    process = Process(Store(0.4, 0.0), rate())
    assert process.take() == 0.4
    process.now += 0.3
    assert process.take() == pytest.approx(0.1)
    assert await process.rates.take("", "", "", []) == pytest.approx(0.1)
    assert len(process.store.asked) == 1
    process.now += 0.11
    assert process.take() is None
    assert process.row == {"asked": 2, "refused": 3, "failed": 0, "skipped": 0}


def test_refusals_of_many_callers_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys come from strangers."""
    monkeypatch.setattr(module, "MAX_REMEMBERED", 10)
    process = Process(Store(0.5), rate("r", ("client", "")))
    for host in range(200):
        assert process.take(client=f"192.0.2.{host}") == 0.5
    assert len(process.rates.stores.named("redis", SETTINGS)._full) <= 10


def test_all_rates_count_in_their_order() -> None:
    """The first that refuses ends it; each has its own key."""
    process = Process(Store(0.0, 0.7), rate("wide"), rate("narrow"), rate("never"))
    assert process.take() == 0.7
    assert [key for key, *_ in process.store.asked] == ["shop:orders/inbound:wide", "shop:orders/inbound:narrow"]


def test_both_ways_share_a_store_and_no_counter() -> None:
    """It is opened once; a call from the service to itself is counted on its way out, and on its way in."""
    process = Process(Store(0.0), rate(), outbound=(rate(),))
    assert (process.take(), process.call(), process.opened) == (None, False, 1)
    assert [key for key, *_ in process.store.asked] == ["shop:orders/inbound:r", "shop:orders:r"]


# ---------------------------------------------------------------- what is counted together


def key_of(by: list[tuple[str, str]], *headers: tuple[bytes, bytes], **call: Any) -> str:
    process = Process(Store(0.0), rate("r", *by))
    process.take(*headers, **call)
    return str(process.store.asked[0][0])


def test_what_differs_is_counted_apart() -> None:
    """Route, peer, client and header, each for itself; what isn't there counts as empty, and nobody is one caller."""
    both = [("peer", ""), ("client", "")]
    keys = [
        key_of([("service", "")]),
        key_of([("route", "")]),
        key_of([("route", "")], route=""),
        key_of([("peer", "")]),
        key_of([("peer", "")], peer=""),
        key_of([("client", "")]),
        key_of([("client", "")], client=""),
        key_of([("header", "x-tenant")]),
        key_of([("header", "x-tenant")], (b"X-Tenant", b"a")),
        key_of(both),
        key_of(both, peer=CLIENT, client=""),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of([("client", "")], route="x", peer="y") == key_of([("client", "")])


def test_a_key_tells_nobody_who_calls() -> None:
    """Addresses, identities and header values go in as a digest, the same in every process."""
    key = key_of([("client", ""), ("peer", ""), ("header", "x-api-key")], (b"x-api-key", b"hunter2"))
    assert key == "shop:orders/inbound:r:" + key.rpartition(":")[2]
    assert len(key.rpartition(":")[2]) == 32
    assert not {"hunter2", CLIENT, PEER} & set(key.split(":"))


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:DB8:1:2::9", "2001:db8:1:2::"),
        ("::1", "::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
        ("unix:", ""),
        ("no address", ""),
    ],
)
def test_a_subscriber_has_one_counter(client: str, expected: str) -> None:
    """IPv6 counts by its /64, which is what one subscriber is given, and which he may use up."""
    assert expected == network(client)


def test_addresses_of_one_subscriber_are_counted_together() -> None:
    """And of two, apart."""
    by = [("client", "")]
    assert key_of(by, client="2001:db8::1") == key_of(by, client="2001:db8::ffff:1")
    assert key_of(by, client="2001:db8::1") != key_of(by, client="2001:db8:0:1::1")
    assert key_of(by, client="::ffff:192.0.2.7") == key_of(by, client="192.0.2.7")


# ---------------------------------------------------------------- a store that is away


@pytest.mark.parametrize(("on_failure", "expected"), [("local", STAND_IN), ("open", None)])
def test_without_an_answer_a_call_goes_on_as_configured(on_failure: str, expected: Answer) -> None:
    """Under the gate's own count, or freely; and so it does while the store is left alone."""
    process = Process(Store(OSError("gone")), rate(on_failure=on_failure))
    assert [process.take(), process.take()] == [expected, expected]
    assert process.row == {"asked": 1, "refused": 0, "failed": 1, "skipped": 1}


def test_without_an_answer_a_closed_rate_refuses_until_the_store_is_tried_again() -> None:
    """A number as any refusal, which says when to come again."""
    process = Process(Store(OSError("gone"), 0.0), rate(on_failure="closed"))
    waits = [process.take(), process.take()]
    assert all(isinstance(wait, float) and 0.8 <= wait <= 1.2 for wait in waits)
    process.now += 1.21
    assert process.take() is None


@pytest.mark.parametrize("answer", ["soon", None, float("nan")])
def test_what_is_no_number_is_no_answer(answer: Any) -> None:
    """A store of somebody else's that answers nonsense is away, and neither lets in nor breaks a call."""
    process = Process(Store(0.0), rate())
    process.store.take = lambda *_: answer  # type: ignore[method-assign]
    assert (process.take(), process.row["failed"]) == (STAND_IN, 1)


@pytest.mark.parametrize(("answer", "expected"), [(1, 1.0), (True, 1.0), (float("inf"), 86400.0), (-1, None), (0, None)])
def test_any_number_is_taken_as_seconds(answer: Any, expected: Answer) -> None:
    """The gate is told a float, of a day at most."""
    process = Process(Store(answer), rate())
    said = process.take()
    assert (said, type(said)) == (expected, type(expected))


def test_a_rate_that_refuses_wins_over_one_that_nobody_can_tell_of() -> None:
    """Each has its store; a stand-in is asked for only if nobody has refused."""
    away, here = Store(OSError("gone")), Store(0.3, 0.0)
    process = Process(away, rate("a"), rate("b", store="valkey"), stores={"valkey": here})
    assert process.take() == 0.3
    process.now += 0.31
    assert (process.take(), len(away.asked), len(here.asked)) == (STAND_IN, 1, 2)


def test_a_store_that_is_away_is_so_for_both_ways(caplog: pytest.LogCaptureFixture) -> None:
    """It is tried again by one call, whichever way that takes; that it is away is said once, and without its URL."""
    caplog.set_level(logging.INFO, "meshlib.admit")
    process = Process(Store(OSError("gone"), OSError("gone"), 0.0), rate(), outbound=(rate(),))
    assert (process.take(), process.call(), process.guard.is_away("orders")) == (STAND_IN, True, True)
    assert len(process.store.asked) == 1
    process.now += 1.21
    assert (process.call(), process.take(), len(process.store.asked)) == (True, STAND_IN, 2)
    process.now += 1.21
    assert (process.take(), process.call(), process.guard.is_away("orders")) == (None, False, False)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "secret" not in caplog.text


async def test_a_store_that_never_answers_costs_its_time_once() -> None:
    """Its own time, whatever the caller's deadline is; then nobody waits for it."""
    process = Process(Store(None), rate())
    async with asyncio.timeout(5):
        assert [await process.rates.take("", "", "", []) for _ in range(3)] == [STAND_IN] * 3
    assert [asked[-1] for asked in process.store.asked] == [0.05]


async def test_a_cancelled_call_says_nothing_of_the_store() -> None:
    """Its client went away; the cancellation goes through."""
    process = Process(Store(None), rate())
    task = asyncio.create_task(process.rates.take("", "", "", []))  # type: ignore[arg-type]
    while not process.store.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.rates.stats()[0]["is_away"] is False


def test_a_store_that_would_suspend_a_thread_is_told_as_what_it_is() -> None:
    """A thread would wait for ever."""
    process = Process(Store(0.0), rate())

    async def never(*_: Any, **__: Any) -> float | None:
        await asyncio.sleep(0)
        return None

    object.__setattr__(process.rates, "_rates", (SimpleNamespace(key=lambda *_: "", ask=never, rate=rate()),))
    with pytest.raises(RuntimeError, match="must block instead"):
        process.take()


# ---------------------------------------------------------------- configuration


def test_a_reload_keeps_the_store_and_the_counters() -> None:
    """Before `apply` nothing has changed; a limit with other numbers counts on, and one that is gone is asked no more."""
    process = Process(Store(0.0), rate(calls=5))
    process.take()
    process.config.own.inbound_global_rates = (rate(calls=9), rate("new"))
    apply = process.rates.prepare(process.config)
    process.take()
    assert [asked[1] for asked in process.store.asked] == [5, 5]
    apply()
    assert ([row["asked"] for row in process.rates.stats()], process.opened) == ([2, 0], 1)
    process.take()
    assert [asked[1] for asked in process.store.asked] == [5, 5, 9, 5]
    process.config.own.inbound_global_rates = ()
    process.rates.prepare(process.config)()
    assert (bool(process.rates), process.take()) == (False, None)


def test_a_store_that_both_ways_get_anew_is_opened_once_more() -> None:
    """Its settings are others; the old one goes when nobody uses it any more."""
    process = Process(Store(0.0), rate(), outbound=(rate(),))
    before = process.rates.stores.named("redis", SETTINGS)
    changed = {**SETTINGS, "timeout": 1.0}
    process.config.stores = {"redis": changed}
    process.rates.stores._open = lambda name, settings: process.store
    applies = [process.rates.prepare(process.config), process.guard.prepare(process.config)]
    assert process.rates.stores.named("redis", SETTINGS) is before
    for apply in applies:
        apply()
    process.take()
    process.call()
    assert [asked[-1] for asked in process.store.asked] == [1.0, 1.0]
    del before, applies, apply
    assert len(process.rates.stores._known) == 1


def test_a_store_that_can_not_be_opened_is_a_mistake_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by `prepare`, while what was in force still is; an URL is never told."""
    process = Process(Store(0.0), rate())
    process.config.stores = {"redis": {**SETTINGS, "timeout": 1.0}}
    monkeypatch.setattr("meshlib.config.plugin.entry_points", lambda **_: ())
    process.rates.stores._open = module.open_store
    with pytest.raises(ConfigError, match="no installed package") as caught:
        process.rates.prepare(process.config)
    assert "secret" not in str(caught.value)
    assert (process.take(), process.store.asked[0][-1]) == (None, 0.05)


def test_a_refusal_of_one_way_is_none_of_the_other() -> None:
    """The counters are two."""
    process = Process(Store(0.5, 0.0), rate(), outbound=(rate(),))
    assert process.take() == 0.5
    assert process.call() is False
    process.now += 0.2
    assert process.take() == pytest.approx(0.3)
    process.store.answers = [0.6]
    with pytest.raises(RateLimited):
        process.call()
