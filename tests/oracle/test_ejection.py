"""Is a failing endpoint taken out as by Envoy's outlier detection: which, after which request, for how long, and how many at most?

Envoy's settings are the like of ours: five in a row, half of the endpoints, a base time. `update_merge_window` is off, since by
default Envoy holds back all but the first change of a second, and an ejected endpoint goes on being called for so long.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from meshlib._native import core
from tests.oracle.backends import Backends
from tests.oracle.envoy_side import Client, health, until
from tests.oracle.our_side import Ours, failing
from tests.support import free_port
from tests.wire.envoy import envoy, fleet, listener, locality, stat

BASE, INTERVAL = 0.4, 0.2
DETECTION = {
    "consecutive_5xx": 5, "interval": f"{INTERVAL}s", "base_ejection_time": f"{BASE}s", "max_ejection_percent": 50,
    "enforcing_success_rate": 0, "enforcing_consecutive_gateway_failure": 0,
}  # fmt: skip
BREAKER = {"failures": 5, "open_min": BASE, "open_max": 60.0, "max_ejected": 0.5}
SIZES = (2, 3, 4, 5, 10)


class World:
    def __init__(self, client: Client, admin: int, backends: Backends) -> None:
        self.client, self.admin = client, admin
        self.ten = backends.addresses(0, 10)
        self.four, self.bad = self.ten[:4], self.ten[1]
        self.gone = [*self.ten[:3], *backends.refusing(1)]

    def out(self, cluster: str) -> list[str]:
        return [address for address, is_healthy in health(self.admin, cluster).items() if not is_healthy]

    def fail(self, cluster: str, *addresses: str, rounds: int) -> list[int]:
        """The statuses of so many rounds of calls, in which these endpoints fail."""
        count = rounds * len(health(self.admin, cluster))
        return [status for status, _ in self.client.all(cluster, [{"x-fail": " ".join(addresses)}] * count)]


@pytest.fixture(scope="module")
def world(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ten = backends.addresses(0, 10)

    def cluster(name: str, addresses: list[str], **more: Any) -> dict[str, Any]:
        detection, at_once = {**DETECTION, **more}, {"update_merge_window": "0s"}
        return fleet(name, "ROUND_ROBIN", locality(addresses), outlier_detection=detection, common_lb_config=at_once)

    clusters = [cluster(name, ten[:4]) for name in ("row", "return", "broken-row")]
    clusters += [cluster(f"cap-{n}", ten[:n], base_ejection_time="30s") for n in SIZES]
    clusters.append(cluster("gone", [*ten[:3], *backends.refusing(1)], base_ejection_time="30s"))
    clusters.append(cluster("panic", ten[:4], max_ejection_percent=100, base_ejection_time="30s"))
    port = free_port()
    with envoy(tmp_path_factory.mktemp("envoy"), [listener(port, {"route": {"cluster_header": "x-cluster"}})], clusters) as admin:
        with contextlib.closing(Client(port)) as client:
            yield World(client, admin, backends)


def failures_until_out(engine: Ours, bad: str, most: int = 100) -> int:
    failures = 0
    for _ in range(most):
        if engine.breakers().get(bad) == "open":
            break
        failures += engine.call(failing(bad))[0] == (bad, 500)
    return failures


def seconds_until_probed(engine: Ours, bad: str, *, is_cured: bool) -> float:
    """From its ejection to the next call that it gets."""
    start = engine.now
    while engine.now < start + 100:
        engine.now += 0.002
        if engine.call(failing(*([] if is_cured else [bad])))[0][0] == bad:
            return engine.now - start
    raise AssertionError("it was never asked again")


def test_fifth_failure_in_a_row_takes_out_that_endpoint_and_no_other(world: World) -> None:
    """Five failures reach the caller, then none."""
    failures = 0
    while not world.out("row"):
        failures += world.client.call("row", x_fail=world.bad)[0] == 500
        if failures == 5:
            until(lambda: world.out("row"))
    assert (world.out("row"), failures) == ([world.bad], 5)
    assert Counter(world.client.order("row", 30)) == dict.fromkeys(set(world.four) - {world.bad}, 10)

    engine = Ours("round_robin", world.four, breaker=BREAKER)
    assert failures_until_out(engine, world.bad) == 5
    assert {address for address, state in engine.breakers().items() if state == "open"} == {world.bad}
    assert Counter(engine.order(30)) == dict.fromkeys(set(world.four) - {world.bad}, 10)


def test_ejections_in_a_row_last_longer_each_time(world: World) -> None:
    """Envoy: n times the base, to the next tick of its interval. Ours: doubled each time, and jittered by a quarter either way.

    By choice: many processes that saw the same failure must not all come back in the same moment, and what stays broken is soon
    asked rarely. Envoy's endpoint gets its whole share back and fails five calls before it is out again; ours gets one probe.
    """
    for times in (1, 2, 3):
        assert world.fail("return", world.bad, rounds=6).count(500) == 5
        start = until(lambda: world.out("return"))
        lasted = until(lambda: not world.out("return")) - start
        assert times * BASE - 0.05 <= lasted <= times * BASE + INTERVAL + 0.3

    engine = Ours("round_robin", world.four, breaker=BREAKER)
    assert failures_until_out(engine, world.bad) == 5
    for times in (1, 2, 3):
        lasted = seconds_until_probed(engine, world.bad, is_cured=False)
        assert 0.75 * BASE * 2 ** (times - 1) <= lasted <= 1.25 * BASE * 2 ** (times - 1) + 0.01
        # The failed probe took it out again, and nobody else's call was risked.
        assert engine.breakers()[world.bad] == "open"


def test_probe_that_succeeds_brings_it_back(world: World) -> None:
    """Ours: after one good answer the endpoint has its turns again. Envoy needs none, since it doesn't ask."""
    engine = Ours("round_robin", world.four, breaker=BREAKER)
    failures_until_out(engine, world.bad)
    seconds_until_probed(engine, world.bad, is_cured=True)
    assert engine.breakers()[world.bad] == "closed"
    assert Counter(engine.order(40)) == dict.fromkeys(world.four, 10)


def test_success_ends_the_row_in_both_and_only_ours_sees_the_rate(world: World) -> None:
    """Four of five calls fail there, for ever: nothing for a count in a row. Ours looks at the rate over a window as well.

    By choice: Envoy's success rate compares with the mean of the peers, needs five hosts of a hundred calls each in an interval,
    and so says nothing in a small or quiet fleet. Ours is a line (0.8) that each endpoint meets by itself, from five calls.
    """
    seen = 0
    for _ in range(80):
        fields = {"x_fail": world.bad} if seen % 5 != 4 else {}
        seen += world.client.call("broken-row", **fields)[1] == world.bad
    assert (seen, world.out("broken-row")) == (20, [])

    def story(engine: Ours) -> list[int]:
        seen: list[int] = []
        for _ in range(80):
            status = engine.call(failing(world.bad) if len(seen) % 5 != 4 else failing())[0]
            seen += [status[1]] if status[0] == world.bad else []
        return seen

    engine = Ours("round_robin", world.four, breaker=BREAKER)
    assert len(story(engine)) == 20
    assert engine.breakers()[world.bad] == "closed"
    engine = Ours("round_robin", world.four, breaker={**BREAKER, "success_rate": 0.8, "minimum_calls": 5})
    assert story(engine) == [500, 500, 500, 500, 200]
    assert engine.breakers()[world.bad] == "open"


@pytest.mark.parametrize("size", SIZES)
def test_half_of_the_endpoints_go_at_most(world: World, size: int) -> None:
    """All fail: of 2, 3, 4, 5 and 10 there go 1, 1, 2, 2 and 5, in both; the rest carries on."""
    cluster, all_of_them = f"cap-{size}", world.ten[:size]
    assert set(world.fail(cluster, *all_of_them, rounds=12)) == {500}
    until(lambda: len(world.out(cluster)) == size // 2)
    assert len(set(world.client.order(cluster, 4 * size))) == size - size // 2
    assert stat(world.admin, f"{cluster}.outlier_detection.ejections_overflow") > 0

    engine = Ours("round_robin", all_of_them, breaker={**BREAKER, "open_min": 30.0})
    for _ in range(12 * size):
        assert engine.call(failing(*all_of_them))[0][1] == 500
    assert list(engine.breakers().values()).count("open") == size // 2
    assert len(set(engine.order(4 * size))) == size - size // 2


def test_refused_connection_ejects_at_once_in_ours_and_at_the_fifth_in_envoy(world: World) -> None:
    """By choice: nobody listens there, which five more callers need not find out. A probe is as quick as the refusal was."""
    statuses = []
    for _ in range(60):
        statuses.append(world.client.call("gone")[0])
        if statuses.count(503) == 5:
            until(lambda: world.out("gone"))
    assert (statuses.count(503), world.out("gone")) == (5, [world.gone[-1]])

    def refusing(address: str, attempt: int) -> tuple[int, int]:
        return (core.OUTCOME_REFUSED, 0) if address == world.gone[-1] else (core.OUTCOME_RESPONSE, 200)

    engine = Ours("round_robin", world.gone, breaker={**BREAKER, "open_min": 30.0})
    assert [engine.call(refusing)[0][1] for _ in range(60)].count(0) == 1
    assert engine.breakers()[world.gone[-1]] == "open"


def test_panic_uses_all_when_more_than_half_are_ejected(world: World) -> None:
    """Where the cap allows three of four to go, health is ignored again, in both: below 50 % healthy nobody is left out."""
    world.fail("panic", *world.four[:3], rounds=12)
    until(lambda: len(world.out("panic")) == 3)
    assert Counter(world.client.order("panic", 40)) == dict.fromkeys(world.four, 10)
    assert stat(world.admin, "panic.lb_healthy_panic") >= 40

    engine = Ours("round_robin", world.four, breaker={**BREAKER, "open_min": 30.0, "max_ejected": 1.0})
    for _ in range(48):
        engine.call(failing(*world.four[:3]))
    assert list(engine.breakers().values()).count("open") == 3
    assert Counter(engine.order(40)) == dict.fromkeys(world.four, 10)
