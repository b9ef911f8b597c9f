"""Does any call feel it that the registry is away for long, stands still, or has forgotten everything? And where it tells the truth,
that most of a service has gone? Is it run over when it is back?

A real etcd. A mesh calls a service that it finds there, a hundred times a second whatever becomes of the calls before, while etcd is
killed for twenty seconds (`MESHLIB_CHAOS=long`: ten minutes), paused, or started again without its data. Then two hundred clients, each
with a directory, a registry and connections of its own, lose it in one moment, and a relay counts how they come back.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

pytest.importorskip("meshlib_etcd", reason="meshlib-etcd is not installed")

from integrations.etcd.tests.cluster import Etcd
from meshlib.config import load
from meshlib.discover.directory import Directory
from meshlib.keeper import Keeper
from tests.chaos.grpc_shop import IS_LONG
from tests.chaos.inbound_load import percentile
from tests.chaos.outage import RATE, Learned, by_second, densest, orders_under_load, relay_to, until
from tests.support import write_config

AWAY = 600.0 if IS_LONG else 20.0
PAUSED = 20.0
# Within this time after it is back, what changes there counts.
SOON = 10.0
# A watch that is silent is confirmed every five seconds, so what is known may be that old when the outage begins.
CONFIRMED = 6.0

CLIENTS, RESTART = 200, 5.0
MOST_A_SECOND = 50

pytestmark = [
    pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed"),
    pytest.mark.slow,
    pytest.mark.timeout(AWAY + 100),
]


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_no_call_fails_while_the_registry_is_away(tmp_path: Path, how: str) -> None:
    """How old what is known is, is told all the time; and what is new when it is back is called soon."""
    seconds = AWAY if how == "killed" else PAUSED
    async with orders_under_load(tmp_path) as orders:
        await asyncio.sleep(1.0)
        begun = time.monotonic()
        if how == "killed":
            await asyncio.to_thread(orders.etcd.kill)
        else:
            orders.etcd.send(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        told, scraped, failures = orders.row, orders.metric("meshlib_discover_age_seconds"), orders.row["failures"]
        if how == "killed":
            await asyncio.to_thread(orders.etcd.start)
        else:
            orders.etcd.send(signal.SIGCONT)
        away = time.monotonic() - begun
        await orders.enter(3)
        found = await orders.until_called(3, patience=2 * SOON)
        await orders.until_called(0, 1, 2, patience=5.0)
        after = orders.row
        said = await orders.rest()
        print(
            f"\n{how} for {away:.1f} s: {said}; age told {told['age']:.1f} s, scraped {scraped:.1f} s, {failures} tries failed; "
            f"a new endpoint called {found:.1f} s after its return; loop late by {orders.late:.2f} s"
        )
        assert orders.failed == []
        assert len(orders.took) > 0.9 * RATE * seconds
        assert seconds - 0.5 <= told["age"] <= seconds + CONFIRMED
        assert abs(scraped - told["age"]) < 1.0
        assert failures >= 1 and told["error"] and not told["is_held"]
        assert (after["error"], after["is_held"]) == ("", False) and after["age"] < CONFIRMED
        assert found <= SOON


async def test_no_call_fails_when_the_registry_comes_back_empty(tmp_path: Path) -> None:
    """It isn't believed, and an alarm says so; what is entered again counts at once, and the alarm ends."""
    async with orders_under_load(tmp_path) as orders:
        await asyncio.sleep(1.0)
        await asyncio.to_thread(orders.etcd.empty)
        assert await asyncio.to_thread(orders.etcd.all_keys) == []
        held = await until(lambda: bool(orders.row["is_held"]), 2 * SOON)
        await orders.until_called(0, 1, 2, patience=5.0)
        await asyncio.sleep(CONFIRMED)
        await orders.until_called(0, 1, 2, patience=5.0)
        alarm = {name: orders.metric(f"meshlib_discover_{name}") for name in ("held", "holds_total", "kept", "endpoints")}
        age = orders.row["age"]
        await orders.enter(0, 1, 2, 3)
        found = await orders.until_called(0, 1, 2, 3, patience=SOON)
        freed = await until(lambda: not orders.row["is_held"], 5.0)
        said = await orders.rest()
        print(
            f"\nempty: {said}; held {held:.1f} s after its return, alarm {alarm}, age told {age:.1f} s; entered again, the new one is "
            f"called after {found:.1f} s and the alarm is over {freed:.1f} s later; loop late by {orders.late:.2f} s"
        )
        assert orders.failed == []
        assert alarm == {"held": 1.0, "holds_total": 1.0, "kept": 3.0, "endpoints": 3.0}
        assert held <= SOON
        assert age >= CONFIRMED


@pytest.mark.parametrize("policy", ["peak_ewma", "round_robin"])
@pytest.mark.parametrize("left", [1, 3])
async def test_no_call_fails_when_most_of_a_service_has_gone(tmp_path: Path, policy: str, left: int) -> None:
    """What etcd says is true for once, and not believed for five minutes: those that are gone are tried once, and then left alone."""
    async with orders_under_load(tmp_path, 10, policy) as orders:
        await asyncio.sleep(1.0)
        await orders.leave(left)
        served = orders.served.copy()
        await asyncio.sleep(10.0)
        row = orders.row
        said = await orders.rest()
        print(f"\n10 -> {left}, {policy}: {said}; {row['kept']} are held")
        assert (row["is_held"], row["kept"]) == (True, 10 - left)
        assert orders.failed == []
        assert all(orders.served[number] > served[number] for number in range(left))


async def test_two_hundred_clients_do_not_run_over_a_registry_that_restarts(tmp_path: Path) -> None:
    """At most fifty new connections in any second, and all know what is new ten seconds after it is back."""
    etcd, keeper = Etcd(tmp_path), Keeper()
    learned = [Learned() for _ in range(CLIENTS)]
    async with AsyncExitStack() as stack:
        stack.callback(etcd.kill)
        await asyncio.to_thread(etcd.start)
        relay, port = await stack.enter_async_context(relay_to(etcd.port))
        await asyncio.to_thread(etcd.instance, "orders", "old", "10.0.0.1:80")
        registries = {"etcd": {"url": f"http://127.0.0.1:{port}", "cache": False}}
        services = {"me": {}, "orders": {"discover": {"registry": "etcd"}}}
        config = load(write_config(tmp_path, services, registries=registries), service="me")
        directories = [Directory(each, keeper) for each in learned]
        stack.callback(keeper.stop)

        async def end() -> None:
            for directory in directories:
                directory.cancel()
            await until(lambda: not relay.open, 10.0)

        stack.push_async_callback(end)

        def begin() -> None:
            for directory in directories:
                directory.follow(config)
                directory.start(limit=0.01)

        await asyncio.to_thread(begin)
        await until(lambda: all("10.0.0.1:80" in each.when for each in learned), 30.0)
        connected = len(relay.taken)
        # Not together as they were begun.
        await asyncio.sleep(2.0)

        killed = time.monotonic()
        await asyncio.to_thread(etcd.kill)
        await asyncio.sleep(RESTART - (time.monotonic() - killed))
        await asyncio.to_thread(etcd.start)
        back = time.monotonic()
        await asyncio.to_thread(etcd.instance, "orders", "new", "10.0.0.2:80")
        await until(lambda: all("10.0.0.2:80" in each.when for each in learned), 40.0)
        # What else is opened afterwards counts, too: each asks etcd about a watch that is silent.
        await asyncio.sleep(back + SOON + 11.0 - time.monotonic())
        when = sorted(each.when["10.0.0.2:80"] - back for each in learned)
        taken = [moment for moment in relay.taken if moment > killed]
        tries = [moment for moment in relay.tries if moment > killed]
        print(
            f"\n{CLIENTS} clients ({connected} connections), away for {back - killed:.1f} s: {len(taken)} new connections, "
            f"at most {densest(taken)} in any second (with those that nobody took {len(tries)}, {densest(tries)}), "
            f"converged p50 {percentile(when, 0.5):.1f}, p99 {percentile(when, 0.99):.1f}, last {when[-1]:.2f} s after its return; "
            f"by second {by_second(taken, killed)}"
        )
        assert len(taken) >= CLIENTS
        assert densest(tries) <= MOST_A_SECOND
        assert when[-1] <= SOON
