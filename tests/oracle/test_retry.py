"""How often is a request sent, and where does it go the next time? As with Envoy's `retry_on: 5xx` and its predicate previous_hosts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from meshlib._native import core
from tests.oracle.backends import Backends
from tests.oracle.envoy_side import Client
from tests.oracle.our_side import Answer, Ours
from tests.support import free_port
from tests.wire.envoy import envoy, fleet, listener, locality, stat

SCRIPTS = [
    "200",
    "404",
    "429",
    "500 200",
    "503 200",
    "502 503 200",
    "504 500 503 200",
    "500 503 502 504",
    "503 404",
    "503 429 200",
]
NUMBER = itertools.count()


def retrying(retries: int) -> dict[str, Any]:
    kind = "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
    other = {"name": "other", "typed_config": {"@type": f"type.googleapis.com/{kind}"}}
    policy = {
        "retry_on": "5xx", "num_retries": retries, "retry_host_predicate": [other], "host_selection_retry_max_attempts": 100,
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
    }  # fmt: skip
    return {"route": {"cluster_header": "x-cluster", "retry_policy": policy}}


class World:
    def __init__(self, clients: dict[int, Client], admin: int, backends: Backends) -> None:
        self.clients, self.admin, self.backends = clients, admin, backends
        self.five = backends.addresses(0, 5)

    def theirs(self, cluster: str, retries: int, script: str, method: str = "GET") -> tuple[int, list[str]]:
        """The final status, and where the attempts went."""
        call = f"{next(NUMBER)}"
        script += " 200" * 4  # whoever asks more often than he should is seen
        status, _ = self.clients[retries].call(cluster, method, x_call=call, x_script=script)
        return status, self.backends.seen[call]

    def ours(self, addresses: list[str], retries: int, script: str, method: str = "GET", seed: int = 1) -> tuple[int, list[str]]:
        attempts = engine_of(addresses, retries, seed).call(scripted(script), method)
        return attempts[-1][1], [address for address, _ in attempts]


def engine_of(addresses: list[str], retries: int, seed: int = 1) -> Ours:
    return Ours("random", addresses, seed=seed, retry={"attempts": retries}, breaker={"max_ejected": 0.0})


def scripted(script: str) -> Answer:
    statuses = [int(status) for status in script.split()] + [200] * 4
    return lambda address, attempt: (core.OUTCOME_RESPONSE, statuses[attempt])


@pytest.fixture(scope="module")
def world(backends: Backends, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    ports = {retries: free_port() for retries in (1, 2, 3)}
    five = backends.addresses(0, 5)
    clusters = [
        fleet("five", "RANDOM", locality(five)),
        fleet("two", "RANDOM", locality(five[:2])),
        fleet("gone", "ROUND_ROBIN", locality([five[0], *backends.refusing(1)])),
    ]
    listeners = [listener(port, retrying(retries)) for retries, port in ports.items()]
    with envoy(tmp_path_factory.mktemp("envoy"), listeners, clusters) as admin, contextlib.ExitStack() as stack:
        clients = {retries: stack.enter_context(contextlib.closing(Client(port))) for retries, port in ports.items()}
        yield World(clients, admin, backends)


@pytest.mark.parametrize("retries", [1, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_attempts_and_final_status_are_the_same(world: World, retries: int, script: str) -> None:
    """The backends see the same number of requests, and the caller the same status: a 4xx is final, the last 5xx is delivered."""
    theirs, ours = world.theirs("five", retries, script), world.ours(world.five, retries, script)
    assert (ours[0], len(ours[1])) == (theirs[0], len(theirs[1]))


def test_retries_go_to_endpoints_that_were_not_tried(world: World) -> None:
    """Four attempts among five endpoints chosen at random never meet one twice, in a hundred calls of each."""
    for n in range(100):
        for status, went in (world.theirs("five", 3, "503 503 503 200"), world.ours(world.five, 3, "503 503 503 200", seed=n)):
            assert (status, len(went), len(set(went))) == (200, 4, 4)


def test_retries_are_done_although_there_is_no_other_endpoint_left(world: World) -> None:
    """Three retries among two endpoints: both are used, and then again, in both."""
    for status, went in (world.theirs("two", 3, "503 503 503 200"), world.ours(world.five[:2], 3, "503 503 503 200")):
        assert (status, len(went), len(set(went))) == (200, 4, 2)


def test_request_that_may_not_be_repeated_is_repeated_by_envoy_only(world: World) -> None:
    """A POST that was answered with 503: Envoy sends it again.

    By choice: it may have been processed, and a library can ask the application whether that matters. Declared idempotent, it is
    repeated by us as well.
    """
    assert [len(world.theirs("five", 1, "503 200", "POST")[1]), len(world.ours(world.five, 1, "503 200", "POST")[1])] == [2, 1]
    declared = Ours("random", world.five, retry={"attempts": 1, "idempotent": True}).call(scripted("503 200"), "POST")
    assert len(declared) == 2


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_refused_connection_is_retried_elsewhere_whatever_the_method(world: World, method: str) -> None:
    """Nothing was sent: of twenty calls to a live and a dead endpoint each that meets the dead one is sent once more, in both."""
    counters = ("upstream_cx_connect_fail", "upstream_rq_retry")
    before = [stat(world.admin, f"cluster.gone.{name}") for name in counters]
    assert {world.clients[1].call("gone", method)[0] for _ in range(20)} == {200}
    refused, again = (stat(world.admin, f"cluster.gone.{name}") - n for name, n in zip(counters, before, strict=True))
    assert again == refused > 0

    live, dead = world.five[0], world.backends.refusing(1)[0]

    def refusing(address: str, attempt: int) -> tuple[int, int]:
        return (core.OUTCOME_REFUSED, 0) if address == dead else (core.OUTCOME_RESPONSE, 200)

    # With the breaker the first one would be the last.
    engine = Ours("round_robin", [live, dead], retry={"attempts": 1}, breaker={"max_ejected": 0.0})
    calls = {tuple(engine.call(refusing, method)) for _ in range(20)}
    assert ((dead, 0), (live, 200)) in calls
    assert calls <= {((dead, 0), (live, 200)), ((live, 200),)}
