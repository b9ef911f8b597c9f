"""SRV records of a real name server: what they say, how long it counts, and what becomes of it when the server is in trouble."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlib.discover import EndpointAddress, Resolver, SrvResolver
from meshlib.discover import srv as srv_module
from meshlib.testing import check_resolver
from tests.discover.names import ZONE, Server, host, srv
from tests.discover.test_conformance import ALL, Base

NAME = f"_http._tcp.orders.{ZONE}"
A, B, C = (f"{letter}.{ZONE}" for letter in "abc")


@pytest.fixture(autouse=True)
def only_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has IPv6 decides what is asked; here it has none, if a test doesn't say so."""
    monkeypatch.setattr(srv_module, "_has_ipv6", lambda: False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.thaw()
    server.stop()


def resolver_of(server: Server, limit: float = 5.0) -> SrvResolver:
    return SrvResolver("orders", NAME, nameservers=["127.0.0.1"], port=server.port, limit=limit)


def found(resolver: SrvResolver) -> dict[str, float]:
    return {e.address: e.weight for e in asyncio.run(resolver.resolve()).endpoints}


def test_targets_have_ports_and_weights(server: Server) -> None:
    """Each with its own; two addresses of one target share its weight."""
    server.serve([srv(A, 8001, weight=10), srv(B, 8002, weight=30), *host(A, "127.0.0.1"), *host(B, "127.0.0.2", "127.0.0.3")])
    assert found(resolver_of(server)) == {"127.0.0.1:8001": 10.0, "127.0.0.2:8002": 15.0, "127.0.0.3:8002": 15.0}


def test_without_weights_all_are_alike_and_a_zero_beside_others_is_hardly_ever(server: Server) -> None:
    """RFC 2782 gives a weight of 0 a very small chance, and none where all have it."""
    server.serve([srv(A, 80), srv(B, 80), *host(A, "127.0.0.1"), *host(B, "127.0.0.2")])
    assert found(resolver_of(server)) == {"127.0.0.1:80": 1.0, "127.0.0.2:80": 1.0}
    server.serve([srv(A, 80), srv(B, 80, weight=5), *host(A, "127.0.0.1"), *host(B, "127.0.0.2")])
    assert found(resolver_of(server)) == {"127.0.0.1:80": 0.01, "127.0.0.2:80": 5.0}


def test_only_the_lowest_priority_that_has_addresses_counts(server: Server) -> None:
    """The next one is for the case that the first has none."""
    lines = [srv(A, 80, priority=10), srv(B, 80, priority=20), srv(C, 80, priority=20)]
    server.serve([*lines, *host(A, "127.0.0.1"), *host(B, "127.0.0.2"), *host(C, "127.0.0.3")])
    resolver = resolver_of(server)
    assert found(resolver) == {"127.0.0.1:80": 1.0}
    server.serve([*lines, *host(B, "127.0.0.2"), *host(C, "127.0.0.3")])
    assert found(resolver_of(server)) == {"127.0.0.2:80": 1.0, "127.0.0.3:80": 1.0}
    # Who knew an address of the first keeps it: that a name is gone is far more often a fault of DNS.
    assert found(resolver) == {"127.0.0.1:80": 1.0}


def test_addresses_of_ipv6_are_asked_for_where_there_is_a_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each call to one of them would be in vain."""
    server.serve([srv(A, 80), *host(A, "127.0.0.1"), *host(A, "::1")])
    assert found(resolver_of(server)) == {"127.0.0.1:80": 1.0}
    monkeypatch.setattr(srv_module, "_has_ipv6", lambda: True)
    assert found(resolver_of(server)) == {"127.0.0.1:80": 1.0, "[::1]:80": 1.0}


@pytest.mark.parametrize(("ttl", "expected"), [(1, 1.0), (3, 3.0), (600, 5.0)])
def test_answer_is_kept_as_long_as_it_says_but_not_for_long(tmp_path: Path, ttl: int, expected: float) -> None:
    """At least a second, five at most."""
    server = Server(tmp_path, ttl=ttl)
    try:
        server.serve([srv(A, 80), *host(A, "127.0.0.1")])
        resolver = resolver_of(server)
        asyncio.run(resolver.resolve())
        assert resolver.interval == expected
    finally:
        server.stop()


def test_same_answer_is_the_same_object(server: Server) -> None:
    """Order is nobody's: name servers turn it around. The version stays, and the list is the same."""
    server.serve([srv(A, 80), srv(B, 80), *host(A, "127.0.0.1"), *host(B, "127.0.0.2")])
    resolver = resolver_of(server)
    first, second = asyncio.run(resolver.resolve()), asyncio.run(resolver.resolve())
    assert first.endpoints is second.endpoints
    assert (first.version, second.version) == (1, 1)


def test_name_that_is_gone_is_an_error(server: Server) -> None:
    """NXDOMAIN, no such records, and targets without addresses: three words for not knowing."""
    server.serve([srv(A, 80), *host(A, "127.0.0.1")])
    resolver = resolver_of(server)
    asyncio.run(resolver.resolve())
    server.serve([])
    with pytest.raises(OSError, match="NXDOMAIN"):
        asyncio.run(resolver.resolve())
    server.serve(host(NAME.removeprefix("_http._tcp."), "127.0.0.1"))
    with pytest.raises(OSError, match=r"NXDOMAIN|has no SRV records"):
        asyncio.run(resolver.resolve())
    server.serve([srv(A, 80)])
    with pytest.raises(OSError, match="none of the 1 targets"):
        asyncio.run(resolver_of(server).resolve())


def test_target_of_a_point_says_that_there_is_nothing(server: Server) -> None:
    """That is an answer, and no error: the directory's hold decides what to make of it."""
    server.serve([f"srv-host={NAME},,0"])
    assert asyncio.run(resolver_of(server).resolve()).endpoints == ()


def test_server_that_hangs_is_waited_for_no_longer_than_the_limit(server: Server) -> None:
    """And the loop goes on meanwhile."""
    server.serve([srv(A, 80), *host(A, "127.0.0.1")])
    resolver = resolver_of(server, limit=0.5)
    server.freeze()
    turns = 0

    async def both() -> float:
        nonlocal turns

        async def turn() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0.01)
                turns += 1

        task = asyncio.ensure_future(turn())
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            await resolver.resolve()
        task.cancel()
        return time.monotonic() - begun

    assert asyncio.run(both()) < 2.0
    assert turns > 10
    server.thaw()
    assert found(resolver) == {"127.0.0.1:80": 1.0}


def test_target_with_a_silent_name_server_holds_up_no_other(server: Server) -> None:
    """The others are used as they are now, it keeps what it had, and one of which nothing was known is left out; well within the limit."""
    known, new = "a.elsewhere.test", "b.elsewhere.test"
    server.serve([srv(A, 80), srv(known, 80), *host(A, "127.0.0.1"), *host(known, "127.0.0.9")])
    resolver = resolver_of(server, limit=2.0)
    assert found(resolver) == {"127.0.0.1:80": 1.0, "127.0.0.9:80": 1.0}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        elsewhere = f"server=/elsewhere.test/127.0.0.1#{silent.getsockname()[1]}"
        server.serve([elsewhere, srv(B, 80), srv(known, 80), srv(new, 80), *host(B, "127.0.0.2")])
        begun = time.monotonic()
        assert found(resolver) == {"127.0.0.2:80": 1.0, "127.0.0.9:80": 1.0}
        assert time.monotonic() - begun < 1.5
        assert found(resolver_of(server, limit=2.0)) == {"127.0.0.2:80": 1.0}


def test_server_that_is_gone_is_an_error(server: Server) -> None:
    """Nobody listens at its port any more."""
    server.serve([srv(A, 80), *host(A, "127.0.0.1")])
    resolver = resolver_of(server, limit=1.0)
    asyncio.run(resolver.resolve())
    server.stop()
    with pytest.raises((OSError, TimeoutError)):
        asyncio.run(resolver.resolve())


class OfServices(Base):
    """SRV records of dnsmasq."""

    carries = frozenset({"weight"})

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.server = Server(folder)
        self.server.serve([])

    def write(self) -> None:
        lines = []
        for endpoint in self.known.values():
            address, _, port = endpoint.address.rpartition(":")
            name = f"h{address.replace('.', '-')}.{ZONE}"
            lines += [srv(name, int(port), weight=int(endpoint.weight)), *host(name, address)]
        self.server.serve(lines)

    def fail(self) -> None:
        self.server.stop()

    def mend(self) -> None:
        self.server.stop()
        self.server.start()

    async def open(self) -> Resolver:
        return SrvResolver(self.service, NAME, nameservers=["127.0.0.1"], port=self.server.port, limit=1.0)

    def close(self) -> None:
        self.server.stop()


def test_srv_records_conform(tmp_path: Path) -> None:
    """All rules."""
    assert check_resolver(lambda: OfServices(tmp_path)) == ALL


def test_ten_thousand_records_are_read_off_the_loop_in_good_time() -> None:
    """What is made of the records costs little, however many there are."""
    targets = [srv_module.Target(0, 1, 80, f"h{n}.{ZONE}") for n in range(10_000)]
    addresses: dict[str, tuple[str, ...]] = {f"h{n}.{ZONE}": (f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}",) for n in range(10_000)}
    begun = time.process_time()
    endpoints = srv_module._endpoints(targets, addresses)
    assert time.process_time() - begun < 1.0
    assert endpoints[7] == EndpointAddress("10.0.0.7:80", 1.0)
