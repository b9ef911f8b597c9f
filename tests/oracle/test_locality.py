"""How are calls split between zones, when endpoints fail and when there are not enough? As by Envoy's priorities and zone awareness.

The golden tables are Envoy's own arithmetic. Each row runs in a real Envoy (100 addresses for each priority, the unhealthy ones named in
the configuration) and in our engine, and both must fit the row by chi-square.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.oracle.backends import Backends
from tests.oracle.chance import LIMIT, likeness, probability
from tests.oracle.envoy_side import Client
from tests.oracle.our_side import Ours
from tests.support import free_port
from tests.wire.envoy import envoy, fleet, listener, locality

CALLS = 1200
# Healthy per cent of each priority -> its share of the calls in per cent.
GOLDEN: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((100, 100), (100, 0)),
    ((72, 100), (100, 0)),
    ((71, 100), (99, 1)),
    ((50, 100), (70, 30)),
    ((25, 100), (35, 65)),
    ((0, 100), (0, 100)),
    ((71, 71), (99, 1)),
    ((50, 50), (70, 30)),
    ((10, 50), (17, 83)),
    ((25, 25), (50, 50)),
    ((72, 72, 100), (100, 0, 0)),
    ((50, 50, 100), (70, 30, 0)),
    ((25, 100, 100), (35, 65, 0)),
    ((25, 25, 100), (35, 35, 30)),
    # Envoy's documentation has 37/35/28 here, which holds only without panic; with it, the shares go by size: see below.
    ((25, 25, 20), (1, 1, 1)),
]
# Five callers in our zone, three and two elsewhere.
CALLERS = ["a"] * 5 + ["b"] * 3 + ["c"] * 2
# (endpoints by zone, unhealthy ones of the first) -> shares of the calls in per cent.
ZONES: list[tuple[tuple[int, int, int], int, tuple[float, ...]]] = [
    ((5, 3, 2), 0, (100, 0, 0)),
    ((8, 1, 1), 0, (100, 0, 0)),
    ((3, 4, 3), 0, (60, 20, 20)),
    ((2, 5, 3), 0, (40, 40, 20)),
    ((5, 4, 3), 2, (60, 20, 20)),
    ((1, 2, 2), 0, (20, 40, 40)),
]


def name_of(row: Sequence[object]) -> str:
    return "-".join(map(str, row))


class World:
    def __init__(self, client: Client, backends: Backends) -> None:
        self.client, self.backends = client, backends


def priorities(backends: Backends, healthy: Sequence[int], sizes: Sequence[int] = ()) -> tuple[list[list[str]], list[str]]:
    """Addresses by priority, and the unhealthy ones of all; a hundred of each, unless `sizes` says otherwise."""
    lists = [backends.addresses(zone, size) for zone, size in enumerate(sizes or [100] * len(healthy), 1)]
    return lists, [address for at, count in zip(lists, healthy, strict=True) for address in at[count:]]


def zones_of(backends: Backends, counts: Sequence[int]) -> list[list[str]]:
    return [backends.addresses(zone, count) for zone, count in enumerate(counts, 1)]


@pytest.fixture(scope="module")
def world(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    clusters = []

    def levels(name: str, healthy: Sequence[int], sizes: Sequence[int] = (), **more: Any) -> None:
        lists, unhealthy = priorities(backends, healthy, sizes)
        all_of_them = [locality(at, unhealthy=unhealthy, zone=f"p{n}", priority=n) for n, at in enumerate(lists)]
        clusters.append(fleet(name, "ROUND_ROBIN", *all_of_them, **more))

    for healthy, _ in GOLDEN:
        levels(f"priority-{name_of(healthy)}", healthy)
    levels("calm", (25, 25, 20), common_lb_config={"healthy_panic_threshold": {"value": 0}})
    levels("unequal", (10, 20), (50, 100))
    for counts, sick, _ in ZONES:
        lists = zones_of(backends, counts)
        places = [locality(at, unhealthy=lists[0][:sick], zone=zone) for zone, at in zip("abc", lists, strict=True)]
        more = {"common_lb_config": {"zone_aware_lb_config": {"routing_enabled": {"value": 100}, "min_cluster_size": 6}}}
        clusters.append(fleet(f"zones-{name_of((*counts, sick))}", "ROUND_ROBIN", *places, **more))
    callers = zones_of(backends, [CALLERS.count(zone) for zone in "abc"])
    clusters.append(fleet("callers", "ROUND_ROBIN", *(locality(at, zone=zone) for zone, at in zip("abc", callers, strict=True))))
    bootstrap: dict[str, Any] = {
        "node": {"id": "me", "cluster": "callers", "locality": {"zone": "a"}},
        "cluster_manager": {"local_cluster_name": "callers"},
    }
    port = free_port()
    route = {"route": {"cluster_header": "x-cluster"}}
    with envoy(tmp_path_factory.mktemp("envoy"), [listener(port, route)], clusters, **bootstrap):
        with contextlib.closing(Client(port)) as client:
            yield World(client, backends)


def by_list(order: Sequence[str], lists: list[list[str]]) -> list[int]:
    """Calls by zone; nothing may go anywhere else."""
    counts = [sum(address in at for address in order) for at in map(set, lists)]
    assert sum(counts) == len(order)
    return counts


def failover(lists: list[list[str]], **balance: Any) -> Ours:
    """Our engine in the zone of the first list, which fails over to the others in order."""
    zones = [f"p{n}" for n, at in enumerate(lists) for _ in at]
    policy = {"policy": "failover", "order": ["p1", "p2"], "overprovisioning": 1.4, "least_endpoints": 6}
    return Ours(
        "round_robin",
        [address for at in lists for address in at],
        zones=zones,
        zone="p0",
        balance={"locality": policy, **balance},
    )


@pytest.mark.parametrize(("healthy", "shares"), GOLDEN, ids=[name_of(row[0]) for row in GOLDEN])
def test_priorities_share_the_calls_as_in_the_golden_table(
    world: World, healthy: tuple[int, ...], shares: tuple[int, ...]
) -> None:
    """A priority takes 1.4 times its healthy share, the next ones the rest; nothing goes to a sick endpoint but in panic."""
    lists, unhealthy = priorities(world.backends, healthy)
    theirs = world.client.order(f"priority-{name_of(healthy)}", CALLS)
    engine = failover(lists)
    engine.fail(*unhealthy)
    ours = engine.order(CALLS)
    for order in (theirs, ours):
        assert probability(by_list(order, lists), shares) > LIMIT
    counts = [{str(n): count for n, count in enumerate(by_list(order, lists))} for order in (theirs, ours)]
    assert likeness(*counts) > LIMIT
    # Panic needs both: this priority below half, and all of them together short of the whole.
    is_short = sum(min(100, 140 * part // 100) for part in healthy) < 100
    for order in (theirs, ours):
        used_sick = [bool(set(order) & set(at) & set(unhealthy)) for at in lists]
        assert used_sick == [is_short and part < 50 for part in healthy]


def test_panic_in_all_priorities_shares_by_size(world: World) -> None:
    """A fifth of 50 and of 100 is healthy: no health counts, every endpoint takes the same, a third and two thirds of the calls."""
    lists, unhealthy = priorities(world.backends, (10, 20), (50, 100))
    engine = failover(lists)
    engine.fail(*unhealthy)
    theirs, ours = world.client.order("unequal", 2 * CALLS), engine.order(2 * CALLS)
    for order in (theirs, ours):
        assert probability(by_list(order, lists), (1, 2)) > LIMIT
        assert len(set(order)) == 150


def test_without_panic_the_shares_go_by_health_to_the_end(world: World) -> None:
    """37, 35 and 28 of a hundred where 25, 25 and 20 are healthy: the first one takes what the integers leave."""
    lists, unhealthy = priorities(world.backends, (25, 25, 20))
    engine = failover(lists, panic=0.0)
    engine.fail(*unhealthy)
    for order in (world.client.order("calm", 2 * CALLS), engine.order(2 * CALLS)):
        assert probability(by_list(order, lists), (37, 35, 28)) > LIMIT
        assert not set(order) & set(unhealthy)


def test_isolated_by_hand_counts_as_sick(world: World) -> None:
    """29 of 100 taken out by a person weigh as 29 that fail their checks: 99 to 1."""
    lists, unhealthy = priorities(world.backends, (71, 100))
    engine = failover(lists)
    for address in unhealthy:
        assert engine.engine.isolate("orders", address, True, engine.now)
    assert probability(by_list(engine.order(CALLS), lists), (99, 1)) > LIMIT


@pytest.mark.parametrize(("counts", "sick", "shares"), ZONES, ids=[name_of((*row[0], row[1])) for row in ZONES])
def test_zones_share_the_calls_by_callers_and_endpoints(
    world: World, counts: tuple[int, int, int], sick: int, shares: tuple[float, ...]
) -> None:
    """Of ten callers five are in our zone: what it has beyond that stays, what it lacks is sent where there is more than enough.

    With fewer than six endpoints zones don't count.
    """
    lists = zones_of(world.backends, counts)
    theirs = world.client.order(f"zones-{name_of((*counts, sick))}", CALLS)
    zones = [zone for zone, at in zip("abc", lists, strict=True) for _ in at]
    policy = {"policy": "zone_aware", "order": [], "overprovisioning": 1.4, "least_endpoints": 6}
    engine = Ours(
        "round_robin",
        [address for at in lists for address in at],
        zones=zones,
        zone="a",
        callers=CALLERS,
        balance={"locality": policy},
    )
    engine.fail(*lists[0][:sick])
    ours = engine.order(CALLS)
    for order in (theirs, ours):
        assert probability(by_list(order, lists), shares) > LIMIT
        assert not set(order) & set(lists[0][:sick])


@pytest.mark.parametrize(("healthy", "is_panic"), [(50, False), (49, True)])
def test_panic_begins_below_half(world: World, healthy: int, is_panic: bool) -> None:
    """At half the healthy still carry all; below, everybody does. One zone, ours; Envoy's side is the ejection test and the table."""
    addresses = world.backends.addresses(1, 100)
    engine = Ours("round_robin", addresses)
    engine.fail(*addresses[healthy:])
    used = Counter(engine.order(300))
    assert used == (dict.fromkeys(addresses, 3) if is_panic else dict.fromkeys(addresses[:50], 6))
