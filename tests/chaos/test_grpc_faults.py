"""Does anybody notice that one of three gRPC backends dies, dawdles or refuses everything?

Three processes, mutual TLS, five hundred idempotent calls a second by one channel, of asyncio or for threads. One backend takes 300 ms,
another ends every call with UNAVAILABLE, the third is killed (-9), in turn, each well again after. No call may fail, and the traffic
moves within five calls. What that means is different for each:

    refusing     the calls that came to it, by its own count, after the caller had counted its first failure there
    slow         the calls that came to it, by its own count, after its first slow answer can have been seen
    killed       the attempts that failed at it after the caller had counted the first: nobody else is left to count

Until then nobody can know, and calls that are under way together can't learn from one another: how many those were is printed. (The
caller's count is looked at every two milliseconds, so that one call may slip through this net.) What counts are the first `SOON` seconds, in
which no breaker that opened lets a probe through. What comes later is told apart as probes, of which there may be one for each second.
The latencies are counted from the time at which a call was due.

`MESHLIB_CHAOS=long` leaves each fault in place for ten seconds instead of less than two.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.grpc_served import ECHO
from tests.chaos.grpc_shop import IS_LONG, Backend, Load, Shop, backends, lateness, percentile
from tests.support import free_port

RATE, SLOW = 500.0, 0.3
FAULT, BETWEEN = (10.0, 4.0) if IS_LONG else (1.6, 0.8)

# Calls that may reach a backend after it has failed, and the seconds in which no breaker lets another through.
FEW, SOON = 5, 0.9

# How often the caller's count is looked at.
EVERY = 0.002

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@contextlib.contextmanager
def called(mesh: Any, kind: str, rate: float = RATE) -> Iterator[Load]:
    """The load, by one channel."""
    load = Load(rate)

    async def main(load: Load) -> None:
        async with mesh.grpc_channel("inventory") as channel:
            echo = channel.unary_unary(ECHO)

            async def call(number: int) -> None:
                assert await echo(b"%d" % number) == b"%d" % number

            await load.drive(call)

    with contextlib.ExitStack() as stack:
        if kind == "aio":
            load.in_loop(main)
        else:
            echo = stack.enter_context(mesh.sync_grpc_channel("inventory")).unary_unary(ECHO)

            def call(number: int) -> None:
                assert echo(b"%d" % number) == b"%d" % number

            load.in_threads(call)
        try:
            yield load
        finally:
            load.stop()


def counted(mesh: Any, backend: Backend, what: str) -> int:
    """`requests` or `failures`: the attempts at a backend that have ended, or failed."""
    rows = mesh.engine.stats(time.monotonic())
    return sum(row[what] for row in rows if row["endpoint"] == backend.address)


def busiest(mesh: Any, among: list[Backend]) -> Backend:
    """The one that gets the most calls at the moment: what happens to another might not be noticed at all."""
    had = {backend.address: counted(mesh, backend, "requests") for backend in among}
    time.sleep(BETWEEN)
    return max(among, key=lambda backend: counted(mesh, backend, "requests") - had[backend.address])


class Phases:
    """What was seen while each fault was there."""

    def __init__(self, mesh: Any, load: Load) -> None:
        self.mesh = mesh
        self.load = load
        self.before: dict[str, int] = {}
        self.soon: dict[str, int] = {}
        self.later: dict[str, int] = {}
        self.p99: dict[str, float] = {}

    def slow(self, backend: Backend) -> None:
        begun = backend.tell({"slow": SLOW})["at"]
        time.sleep(FAULT)
        came = backend.tell()["arrivals"]
        backend.tell({})
        self._note("slow", begun, came, min(came, default=begun) + SLOW)

    def refusing(self, backend: Backend) -> None:
        had = counted(self.mesh, backend, "failures")
        begun = backend.tell({"fail": "UNAVAILABLE"})["at"]
        failures = self._watch(backend, had)
        came = backend.tell()["arrivals"]
        backend.tell({})
        self._note("refusing", begun, came, failures[0])

    def killed(self, backend: Backend) -> None:
        had, begun = counted(self.mesh, backend, "failures"), time.monotonic()
        backend.send(signal.SIGKILL)
        failures = self._watch(backend, had)
        self._note("killed", begun, failures, failures[0] + 1e-9)
        backend.end()
        backend.start()

    def _watch(self, backend: Backend, had: int) -> list[float]:
        """When the caller counted each failure there, while the fault lasts."""
        failures, end = [], time.monotonic() + FAULT
        while (now := time.monotonic()) < end:
            new = counted(self.mesh, backend, "failures") - had - len(failures)
            failures += [now] * new
            time.sleep(EVERY)
        assert failures, "the fault was never met"
        return failures

    def _note(self, name: str, begun: float, came: list[float], known: float) -> None:
        found = self.load.between(begun, begun + FAULT)
        before, soon = sum(at < known for at in came), sum(known <= at < known + SOON for at in came)
        self.before[name], self.soon[name], self.later[name] = before, soon, len(came) - before - soon
        self.p99[name] = percentile(found, 0.99)
        print(
            f"{name:9} {len(found)} calls; to it {before} before it was known, after {1000 * (known - begun):.0f} ms, {soon} then, "
            f"{self.later[name]} later; from when they were due: p50 {percentile(found, 0.5):.1f} ms, p99 {self.p99[name]:.1f} ms, at most {percentile(found, 1.0):.0f} ms"
        )

    @property
    def excess(self) -> dict[str, Any]:
        """What is more than it may be."""
        return {
            **{f"{name}, at first": count for name, count in self.soon.items() if count > FEW},
            **{f"{name}, later": count for name, count in self.later.items() if count > FAULT},
            # Nobody waits for the slow one but those who were the first.
            **{f"{name}, p99": ms for name, ms in self.p99.items() if ms >= 1000 * SLOW},
        }


def three_faults(folder: Path, kind: str) -> Phases:
    """All three in turn. Returns what was seen."""
    folder.mkdir()
    shop = Shop(folder, "inventory")
    ports = [free_port() for _ in range(3)]
    addresses = {"inventory": [f"127.0.0.1:{port}" for port in ports]}
    with (
        backends(shop.write(addresses), *[("inventory", "aio")] * 3, ports=ports) as three,
        shop.mesh(addresses) as mesh,
        called(mesh, kind) as load,
        lateness() as late,
    ):
        phases, well = Phases(mesh, load), list(three)
        for fault in (phases.slow, phases.refusing, phases.killed):
            backend = busiest(mesh, well)
            well.remove(backend)
            if fault == phases.slow:
                quiet = load.between(0.0, time.monotonic())
                print(
                    f"\n{kind}: first {len(quiet)} calls, p50 {percentile(quiet, 0.5):.1f} ms, p99 {percentile(quiet, 0.99):.1f} ms"
                )
            fault(backend)
        time.sleep(BETWEEN)
        load.stop()
        took = load.done[-1].due - load.done[0].due
        retries = sum(row["retries"] for row in mesh.engine.stats(time.monotonic()) if row["endpoint"] == "")
        complaints = [line for backend in three for line in backend.complaints()]
    print(
        f"{kind}: {len(load.done)} calls in {took:.1f} s, {len(load.faults)} failed, {retries} tried again; "
        f"the machine was late by {1000 * late[0]:.0f} ms"
    )
    assert load.faults == []
    assert complaints == []
    assert len(load.done) >= 0.9 * RATE * took
    # The faults were there, and met.
    assert retries >= 2
    assert min(phases.before.values()) >= 1
    return phases


@pytest.mark.parametrize("kind", ["aio", "sync"])
def test_no_call_fails_while_one_of_three_is_slow_refusing_or_killed(tmp_path: Path, kind: str) -> None:
    for again in range(3):
        # A machine that stands still makes all three look slow, and calls that waited meet the fault together. Then the figures are
        # taken again, but no failure is forgiven.
        phases = three_faults(tmp_path / str(again), kind)
        if not phases.excess:
            break
    assert phases.excess == {}
