"""What does a process do with limits that it shares with others? The store is a list of answers, and time a number."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import meshlib.admit.limiter as module
from meshlib.admit.limiter import RateGuard, Stores, open_store
from meshlib.client.way import run
from meshlib.errors import ConfigError, RateLimited
from tests.support import mesh_of, write_config

FAR = 1e9


class Store:
    """Answers what it was told to, the last answer for ever: seconds, an exception, or None for no answer at all."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    def take(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        self.asked.append((key, calls, per, burst, timeout))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        assert answer is not None
        return answer

    async def take_async(self, key: str, calls: int, per: float, burst: int, timeout: float) -> float:
        if self.answers[0] is None:
            self.asked.append((key, calls, per, burst, timeout))
            await asyncio.Event().wait()
        return self.take(key, calls, per, burst, timeout)


def rate(name: str = "r", *by: tuple[str, str], on_failure: str = "local", store: str = "redis", calls: int = 5) -> Any:
    from meshlib.config import RatePart, RatePolicy

    return RatePolicy(name, calls, 1.0, calls, tuple(RatePart(*part) for part in by or [("service", "")]), store, on_failure)


class Process:
    """A guard with a store and a clock."""

    def __init__(self, store: Store, *rates: Any, timeout: float = 0.05, mesh: str = "shop") -> None:
        self.store, self.now, self.opened = store, 100.0, 0
        self.config: Any = SimpleNamespace(
            name=mesh,
            services={"orders": None, "free": None},
            stores={"redis": {"url": "redis://:secret@host", "timeout": timeout}},
            rates_of=lambda service: rates if service == "orders" else (),
        )
        self.guard = RateGuard(Stores(self.open), clock=lambda: self.now, source=random.Random(1))
        self.guard.prepare(self.config)()

    def open(self, name: str, settings: Mapping[str, Any]) -> Store:
        self.opened += 1
        assert (name, settings["url"]) == ("redis", "redis://:secret@host")
        return self.store

    def take(
        self,
        *headers: tuple[bytes, bytes],
        service: str = "orders",
        route: str = "orders/0",
        peer: str | None = None,
        left: float = FAR,
    ) -> bool:
        """As a blocking caller does, who must never be suspended."""
        return run(self.guard.take(service, route, peer, headers, self.now + left, is_blocking=True))

    @property
    def row(self) -> dict[str, Any]:
        return {key: value for key, value in self.guard.stats()[0].items() if key in ("asked", "refused", "failed", "skipped")}


# ---------------------------------------------------------------- asking


async def test_both_kinds_of_callers_ask_the_same() -> None:
    """The rate as it is configured, within the time of the store, or of the call if that is less."""
    store = Store(0.0)
    process = Process(store, rate())
    assert process.take() is False
    assert await process.guard.take("orders", "orders/0", None, [], FAR, is_blocking=False) is False
    process.take(left=0.02)
    asked = ("shop:orders:r", 5, 1.0, 5)
    assert store.asked == [(*asked, 0.05), (*asked, 0.05), (*asked, pytest.approx(0.02))]


def test_a_service_without_such_limits_asks_nobody() -> None:
    """The way looks with `in`, which costs a look into a dict."""
    process = Process(Store(0.0), rate())
    assert ("orders" in process.guard, "free" in process.guard) == (True, False)
    assert (process.take(service="free"), process.store.asked) == (False, [])


def test_a_refusal_says_when_and_is_remembered_for_that_long() -> None:
    """An overload is not passed on to the store."""
    store = Store(0.4, 0.0)
    process = Process(store, rate())
    with pytest.raises(RateLimited, match="limit 'r' of 'orders' is used up: 5 calls in 1 s") as caught:
        process.take()
    assert (caught.value.retry_after, caught.value.reason) == (0.4, "admit.rate")
    process.now += 0.3
    with pytest.raises(RateLimited) as caught:
        process.take()
    assert (round(caught.value.retry_after, 6), len(store.asked)) == (0.1, 1)
    process.now += 0.11
    assert process.take() is False
    assert process.row == {"asked": 2, "refused": 2, "failed": 0, "skipped": 0}


def test_a_refusal_is_remembered_for_a_second_at_most() -> None:
    """The limit of an hour may be raised, or its counter taken away by hand."""
    process = Process(Store(3000.0, 0.0), rate())
    with pytest.raises(RateLimited) as caught:
        process.take()
    process.now += 1.0
    assert (caught.value.retry_after, process.take()) == (3000.0, False)


def test_refusals_of_many_callers_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys come from headers, which anybody may write."""
    monkeypatch.setattr(module, "MAX_REMEMBERED", 10)
    process = Process(Store(0.5), rate("r", ("header", "x-user")))
    for user in range(1000):
        with pytest.raises(RateLimited):
            process.take((b"x-user", str(user).encode()))
    assert len(process.guard.stores.named("redis", process.config.stores["redis"])._full) <= 10


def test_all_rates_count_in_their_order() -> None:
    """The first that refuses ends it; each has its own key."""
    process = Process(Store(0.0, 0.7), rate("wide"), rate("narrow"))
    with pytest.raises(RateLimited, match="narrow"):
        process.take()
    assert [key for key, *_ in process.store.asked] == ["shop:orders:wide", "shop:orders:narrow"]


# ---------------------------------------------------------------- what is counted together


def key_of(by: list[tuple[str, str]], *headers: tuple[bytes, bytes], mesh: str = "shop", **call: Any) -> str:
    store = Store(0.0)
    Process(store, rate("r", *by), mesh=mesh).take(*headers, **call)
    return str(store.asked[0][0])


def test_a_key_is_the_same_in_every_process_and_tells_no_secret() -> None:
    """Route, peer and header values go in as a digest."""
    by = [("header", "X-Api-Key"), ("route", ""), ("peer", "")]
    key = key_of(by, (b"x-api-key", b"hunter2"), peer="spiffe://shop/a")
    assert key == key_of(by, (b"X-API-KEY", b"hunter2"), (b"other", b"1"), peer="spiffe://shop/a")
    assert key == "shop:orders:r:6537479aecd4d44bd38957e1f32289db"


def test_what_differs_is_counted_apart() -> None:
    """Also where the pieces, written one after the other, would read the same; what isn't there counts as empty."""
    by = [("header", "a"), ("header", "b")]
    keys = [
        key_of(by, (b"a", b"1"), (b"b", b"23")),
        key_of(by, (b"a", b"12"), (b"b", b"3")),
        key_of(by, (b"a", b"123")),
        key_of(by, (b"b", b"123")),
        key_of(by),
        key_of([("header", "a")]),
        key_of([("header", "a")], mesh="other"),
        key_of([("route", "")], route=""),
        key_of([("peer", "")]),
        key_of([("service", "")]),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of([("peer", "")]) == key_of([("peer", "")], peer="")


# ---------------------------------------------------------------- a store that is away


@pytest.mark.parametrize(("on_failure", "expected"), [("local", True), ("open", False)])
def test_without_an_answer_a_call_goes_on_as_configured(on_failure: str, expected: bool) -> None:
    """Under the engine's own limit, or freely."""
    process = Process(Store(OSError("gone")), rate(on_failure=on_failure))
    assert (process.take(), process.guard.is_away("orders")) == (expected, expected)
    assert process.take() is expected
    process.now += 1.3
    assert process.guard.is_away("orders") is False
    assert (process.take(), process.guard.is_away("orders"), len(process.store.asked)) == (expected, expected, 2)


def test_without_an_answer_a_closed_rate_refuses() -> None:
    """With a reason of its own: nobody knows whether there were too many."""
    process = Process(Store(OSError("gone")), rate(on_failure="closed"))
    with pytest.raises(RateLimited, match="can't be asked for") as caught:
        process.take()
    assert caught.value.reason == "admit.rate_store"
    assert 0.8 <= caught.value.retry_after <= 1.2


def test_a_store_that_failed_is_left_alone_and_then_asked_by_one_call(caplog: pytest.LogCaptureFixture) -> None:
    """After a second, give or take a fifth. That it is away is said once, and that it is back."""
    caplog.set_level(logging.INFO, "meshlib.admit")
    store = Store(OSError("gone"), OSError("gone"), 0.0)
    process = Process(store, rate())
    for _ in range(5):
        assert process.take() is True
    assert (len(store.asked), process.row) == (1, {"asked": 1, "refused": 0, "failed": 1, "skipped": 4})
    process.now += 0.79
    process.take()
    assert len(store.asked) == 1
    process.now += 0.42
    process.take()
    process.take()
    assert len(store.asked) == 2
    process.now += 1.21
    assert (process.take(), process.take(), len(store.asked)) == (False, False, 4)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "redis can't be asked" in caplog.text and "secret" not in caplog.text


async def test_a_store_that_never_answers_costs_its_time_once() -> None:
    """The guard's own limit holds, whatever the store does with the one that it is told."""
    process = Process(Store(None), rate(), timeout=0.01)
    async with asyncio.timeout(5):
        assert await process.guard.take("orders", "", None, [], FAR, is_blocking=False) is True
        assert await process.guard.take("orders", "", None, [], FAR, is_blocking=False) is True
    assert len(process.store.asked) == 1


async def test_while_one_call_tries_the_store_the_others_do_not() -> None:
    """They go on at once, as configured."""
    store = Store(OSError("gone"))
    process = Process(store, rate(), timeout=5.0)
    process.take()
    process.now += 1.3
    store.answers = [None]
    asking = [asyncio.create_task(process.guard.take("orders", "", None, [], FAR, is_blocking=False)) for _ in range(5)]  # type: ignore[arg-type]
    done, waiting = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
    assert ([task.result() for task in done], len(waiting), len(store.asked)) == ([True] * 4, 1, 2)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def test_a_call_in_a_hurry_says_nothing_of_the_store() -> None:
    """Its own time was too short, and the next one asks again; with no time left nobody is asked."""
    process = Process(Store(TimeoutError(), 0.0), rate())
    assert process.take(left=0.001) is True
    assert (process.guard.is_away("orders"), process.take(left=-1.0), process.take()) == (False, False, False)
    assert len(process.store.asked) == 2


async def test_a_cancelled_call_says_nothing_of_the_store() -> None:
    """The cancellation goes through."""
    process = Process(Store(None), rate(), timeout=5.0)
    task = asyncio.create_task(process.guard.take("orders", "", None, [], FAR, is_blocking=False))  # type: ignore[arg-type]
    while not process.store.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert process.guard.is_away("orders") is False


# ---------------------------------------------------------------- configuration


def test_a_reload_keeps_the_store_and_the_counters() -> None:
    """A store is opened again only if its settings are others; before `apply` nothing has changed."""
    process = Process(Store(0.0), rate())
    process.take()
    process.guard.prepare(process.config)()
    assert (process.opened, process.row["asked"]) == (1, 1)
    process.config.stores = {"redis": {**process.config.stores["redis"], "timeout": 1.0}}
    apply = process.guard.prepare(process.config)
    process.take()
    apply()
    process.take()
    assert (process.opened, [asked[-1] for asked in process.store.asked]) == (2, [0.05, 0.05, 1.0])
    process.config.services = {}
    process.guard.prepare(process.config)()
    assert ("orders" in process.guard, process.guard.stats()) == (False, [])


def test_a_limit_with_other_numbers_counts_on() -> None:
    """By its name, as in metrics; what happens until the reload is in force counts, too."""
    process = Process(Store(0.0), rate(calls=5))
    process.config.rates_of = lambda service: (rate(calls=9, store="redis"), rate("new")) if service == "orders" else ()
    apply = process.guard.prepare(process.config)
    process.take()
    apply()
    assert [row["asked"] for row in process.guard.stats()] == [1, 0]
    process.take()
    assert ([row["asked"] for row in process.guard.stats()], process.store.asked[1][1]) == ([2, 1], 9)


def test_without_shared_limits_calls_take_the_short_way_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload that takes the last one away takes the guard away, and one that brings one brings it back."""
    monkeypatch.setattr(module, "open_store", lambda name, settings: Store(0.0))
    plain: dict[str, Any] = {"discover": {"static": ["127.0.0.1:9"]}}
    limited = {**plain, "admit": {"rate": [{"calls": 5, "store": "redis"}]}}
    stores = {"redis": {"url": "redis://host"}}
    has_guard = []
    with mesh_of(tmp_path, {"orders": limited}, stores=stores) as mesh:
        has_guard.append(mesh.outbound.rates is not None)
        for orders in (plain, limited):
            write_config(tmp_path, {"me": {}, "orders": orders}, stores=stores)
            mesh.reload()
            has_guard.append(mesh.outbound.rates is not None)
    assert has_guard == [True, False, True]


def test_a_store_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't installed, or can't be used, is a mistake of the configuration; an URL is never told."""

    def found(group: str, name: str) -> list[EntryPoint]:
        assert group == "meshlib.limit"
        values = {"good": "tests.admit.test_limiter:Store", "bad": "tests.admit.test_limiter:broken", "gone": "no_such_module:x"}
        return [EntryPoint(name, values[name], group)] if name in values else []

    monkeypatch.setattr("meshlib.config.plugin.entry_points", found)
    assert type(open_store("good", {})).__name__ == "Store"
    with pytest.raises(ConfigError, match="no installed package"):
        open_store("redis", {})
    for name in ("bad", "gone"):
        with pytest.raises(ConfigError, match=f"stores.{name}: .* can't be used") as caught:
            open_store(name, {"url": "redis://:secret@host"})
        assert "secret" not in str(caught.value)


def broken(settings: Mapping[str, Any]) -> Store:
    raise ValueError(f"can't use {settings['url']}")


def test_rate_limited_can_be_made_as_before() -> None:
    """The core raises it with a text and a hint."""
    error = RateLimited("Too many.", hint="Wait.")
    assert (str(error), error.retry_after, error.reason) == ("Too many. Wait.", 0.0, "admit.rate")
