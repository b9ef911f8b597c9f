"""Is a request lost when a server is told to end, in the middle of its work?

Five hundred requests a second, whose handlers take up to two seconds, so that a hundred are under way at any time; then `kill -TERM`.
The callers go on as if nothing had happened, and count: a request that was sent and not answered is lost. One that found nobody
to send it to is not: by then a load balancer would have seen for a while that the process isn't ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.inbound_load import Answer, Caller, Crew, Lost, Tally, open_load
from tests.chaos.inbound_server import Served, World, serving, until
from tests.support import free_port

# Requests a second, and the seconds that they take: 0.2 on average, 2 at most, so that a hundred are under way.
RATE, MEAN, MOST = 500.0, 0.2, 2.0

# Seconds, on a machine that has other things to do.
AT_ONCE = 2.0


def seconds_of(number: int) -> float:
    """The same for the same request, whenever the test is run."""
    return min(random.Random(number).expovariate(1 / MEAN), MOST)


class Ended:
    """What was seen of a server's end."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.under_way = 0
        self.took = 0.0
        self.code: int | None = None
        self.ready_then: list[int] = []


async def told_to_end(served: Served, crew: Crew, probe: int, rate: float, ask: str = "/busy?seconds={:.3f}") -> Ended:
    """Load, the signal in the middle of it, load until nobody takes it any more."""
    seen, over = Ended(), asyncio.Event()

    async def one(number: int) -> None:
        await seen.tally.count(crew.ask("GET", ask.format(seconds_of(number))))

    load = asyncio.ensure_future(open_load(rate, 30.0, one, over))
    await asyncio.sleep(1.0)
    seen.ready_then.append(await readiness(probe))
    seen.under_way = seen.tally.in_flight
    begun = time.monotonic()
    served.child.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.35)
    seen.ready_then.append(await readiness(probe))
    while served.child.poll() is None and time.monotonic() < begun + 35:
        await asyncio.sleep(0.02)
    seen.took, seen.code = time.monotonic() - begun, served.child.poll()
    over.set()
    await load
    crew.close()
    print(
        f"{seen.under_way} under way, {seen.took:.1f} s, {dict(seen.tally.statuses)}, {len(seen.tally.lost)} lost, "
        f"{seen.tally.turned_away} turned away, {seen.tally.most_in_flight} at most"
    )
    return seen


async def readiness(port: int) -> int:
    caller = await Caller.at(port)
    try:
        return (await caller.ask("GET", "/readyz", "Connection: close")).status
    finally:
        caller.close()


def proved(seen: Ended, served: Served, least: int) -> None:
    assert seen.under_way >= least
    assert seen.tally.lost == []
    assert set(seen.tally.statuses) == {200}
    assert seen.ready_then == [200, 503]
    assert seen.code == 0
    assert seen.took < 30
    assert served.complaints() == []


# What is said beyond the kind, whether callers have TLS, and how many have to be under way.
CASES = {
    "uvicorn": ((), True, 60),
    "uvicorn x4": ((), True, 60),
    "gthread": (("--threads", "80", "--workers", "2"), True, 60),
    "sync": (("--workers", "4"), False, 30),
}


@pytest.mark.parametrize("kind", CASES)
async def test_nothing_is_lost_when_a_server_is_told_to_end(tmp_path: Path, kind: str) -> None:
    """All that are under way are answered, readiness goes first, and the process has ended within 30 seconds."""
    more, is_tls, least = CASES[kind]
    world, probe = World(tmp_path), free_port()
    inbound = {"probe": f"127.0.0.1:{probe}", "drain": {"wait": "0.7s", "grace": "25s"}}
    with serving(world, kind, world.write("enforce" if is_tls else "permissive", inbound), *more) as served:
        if kind == "sync":
            # One request at a time for each worker, and one for each connection: four workers do 133 a second, so that most of those
            # under way wait in the kernel for a worker when the end comes.
            crew = Crew(served.port, is_kept=False)
            seen = await told_to_end(served, crew, probe, 170.0, "/busy?seconds=0.03")
        else:
            crew = Crew(served.port, world.tls() if is_tls else None)
            await crew.open(120)
            seen = await told_to_end(served, crew, probe, RATE)
        proved(seen, served, least)


async def test_idle_connections_may_ask_once_more(tmp_path: Path) -> None:
    """A client that has a kept-alive connection may be sending while we close: the answer says that it was the last, and comes."""
    world = World(tmp_path)
    config = world.write("enforce")

    async def each(served: Served) -> set[tuple[int, bool]]:
        callers = [await Caller.at(served.port, world.tls()) for _ in range(30)]
        for caller in callers:
            assert (await caller.ask("GET", "/busy")).status == 200
        served.child.send_signal(signal.SIGTERM)
        # Nobody could see readiness here, so that the end begins at once; and each has two seconds.
        found = set()
        for caller in callers:
            await asyncio.sleep(0.04)
            found.add(((await caller.ask("GET", "/busy")).status, caller.is_over))
        assert await asyncio.to_thread(served.child.wait, 10) == 0
        return found

    with serving(world, "uvicorn", config) as one, serving(world, "gthread", config) as other:
        assert await asyncio.gather(each(one), each(other)) == [{(200, True)}] * 2


@pytest.mark.slow
async def test_a_second_signal_ends_every_server_at_once(tmp_path: Path) -> None:
    """With handlers that would take another twenty seconds, and callers that wait for them."""
    world = World(tmp_path)
    took = {}
    with contextlib.ExitStack() as stack:
        for kind, (more, _, _) in CASES.items():
            served = stack.enter_context(
                serving(world, kind, world.write("permissive", {"drain": {"wait": "1s", "grace": "25s"}}), *more)
            )
            callers = [await Caller.at(served.port) for _ in range(100)]
            waiting = [asyncio.ensure_future(caller.ask("GET", "/busy?seconds=20")) for caller in callers]
            await asyncio.sleep(0.2)
            served.child.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            assert served.child.poll() is None
            begun = time.monotonic()
            served.child.send_signal(signal.SIGTERM)
            await asyncio.to_thread(served.child.wait, 15)
            took[kind] = time.monotonic() - begun
            assert until(lambda: left_of(served) == [], 1.0), (kind, left_of(served))
            # Cut, or told so.
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert {end.status if isinstance(end, Answer) else type(end) for end in ends} <= {500, 503, Lost}, kind
    print(took)
    assert {kind: seconds for kind, seconds in took.items() if seconds > AT_ONCE} == {}


def left_of(served: Served) -> list[str]:
    """What still runs of its session, which nobody else is in."""
    left = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if folder.name.isdigit():
                state, _, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(session) == served.child.pid and state != "Z":
                    left.append(f"{folder.name} {state}")
    return left
