"""What do calls, and the application's event loop, feel of a service whose endpoints change without end?

A source in memory lists 10,000 endpoints of one service and tells of `CHANGES` changes a second, as a registry's watch does: an endpoint
comes, an endpoint goes, another weight, another zone. The directory follows it on the keeper's thread and amends the engine, as in an application. An asyncio loop in
the main thread, which is the application's, picks endpoints meanwhile and notes when it is late.

`p50_us` and `p99_us` are one pick (`begin` and `next`) of a loop that is at work; `first_us` is the p99 of the first one after the loop has
slept, which pays for what the processor has forgotten meanwhile, with changes or without. `apply_ms` is from the moment in which a change was told until the engine has it (p99), `stall_ms` the longest
time for which the loop was late (`stall_p99_ms`: of a hundred turns the worst), `stale_ms` how long after its removal was told an endpoint was still picked, at most. `rss_mb` is
what the endpoints hold, in Python and in the engine together. In the mode `still` nothing changes: what this machine does to a loop in any case.
It measures no registry: what comes over the wire, and how it is read, is its package's affair.
"""

from __future__ import annotations

import asyncio
import gc
import random
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from .harness import Results, Run, in_process
from .peers import Peers
from .table import print_results

PRIMARY = "p99_us"
HAS_RATIOS = False
# The goals are about a minute: `python -m benchmarks discover --rounds 1` takes two.
SECONDS: Final = 60.0
MOST_ROUNDS: Final = 2

ENDPOINTS: Final = 10_000
CHANGES: Final = 100
# Picks in one turn of the loop, and seconds between two turns.
PICKS: Final = 4
TURN: Final = 0.002


def runs(peers: Peers) -> list[Run]:
    config = partial(peers.mesh, [], is_private=False)
    return [
        Run(f"watch/10k-endpoints/{CHANGES}-changes", mode, in_process("benchmarks.discover:work", mode=mode, config=config))
        for mode in ("meshlib", "still")
    ]


def show(results: Results) -> None:
    print_results(results, [], has_ratios=HAS_RATIOS)


# --- in the worker


def address(n: int) -> str:
    return f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8443"


class Source:
    """A registry's resolver: everything, then changes."""

    service = "orders"
    interval: float | None = None

    def __init__(self, changes: int) -> None:
        from meshlib.discover import EndpointAddress

        self.pause = 1.0 / changes if changes else 0.0
        self.random = random.Random(1)
        self.known = {address(n): EndpointAddress(address(n), 1.0, f"zone-{n % 3}", {"version": "v1"}) for n in range(ENDPOINTS)}
        self.fresh = ENDPOINTS
        self.told: deque[float] = deque()  # changes that the engine has not yet
        self.gone: dict[str, float] = {}  # when its removal was told

    async def resolve(self) -> Any:
        raise NotImplementedError

    async def watch(self) -> AsyncIterator[Any]:
        from meshlib.discover import Change, Snapshot

        version = 1
        yield Snapshot(self.service, version, tuple(self.known.values()), time.monotonic())
        addresses = list(self.known)
        due = time.monotonic()
        while self.pause:
            due += self.pause
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            changed, gone = self.step(addresses)
            now = time.monotonic()
            self.told.append(now)
            self.gone.update(dict.fromkeys(gone, now))
            yield Change(self.service, version, version + 1, changed, gone, now)
            version += 1
        await asyncio.Event().wait()

    def step(self, addresses: list[str]) -> tuple[tuple[Any, ...], tuple[str, ...]]:
        """One comes, one goes, or one is not as before: a third each."""
        from meshlib.discover import EndpointAddress

        what, place = self.random.randrange(3), self.random.randrange(len(addresses))
        if what == 1:
            addresses[place], addresses[-1] = addresses[-1], addresses[place]
            return (), (addresses.pop(),)
        if what == 2:
            return (EndpointAddress(addresses[place], self.random.choice((1.0, 2.0)), "zone-0", {"version": "v2"}),), ()
        addresses.append(address(self.fresh))
        self.fresh += 1
        return (EndpointAddress(addresses[-1], 1.0, f"zone-{self.fresh % 3}", {"version": "v1"}),), ()


class Registry:
    def __init__(self, source: Source) -> None:
        self.source = source

    def resolver(self, service: str, settings: Mapping[str, Any]) -> Source:
        return self.source

    async def close(self) -> None: ...

    def after_fork(self) -> None: ...


class Sink:
    """The engine, with a clock beside it."""

    def __init__(self, engine: Any, source: Source) -> None:
        self.engine, self.source = engine, source
        self.applied = array("d")
        self.unreachable = engine.unreachable

    def resolve(self, service: str, version: int, endpoints: Sequence[Any], now: float) -> None:
        self.engine.resolve(service, version, endpoints, now)

    def amend(self, service: str, base: int, version: int, changed: Sequence[Any], gone: Sequence[str], now: float) -> bool:
        told = self.source.told
        # The keeper's thread tells and applies: what is told now is in this amendment.
        count = len(told)
        is_taken: bool = self.engine.amend(service, base, version, changed, gone, now)
        done = time.monotonic()
        self.applied.extend(done - told.popleft() for _ in range(count))
        return is_taken


def work(mode: str, config: str, seconds: float) -> dict[str, float]:
    from meshlib._native import core
    from meshlib.config import load
    from meshlib.discover import Directory
    from meshlib.keeper import Keeper

    file = Path(config).with_name("discover.yaml")
    file.write_text(
        "mesh: bench\nsecure: {mode: observe}\nregistries: {memory: {cache: false}}\n"
        "services:\n  me: {}\n  orders: {discover: memory}\n"
    )
    found = load(file, service="me")
    engine = core.Engine(1)
    engine.publish(found.client_plan(), 0.0)
    gc.collect()
    before = _resident()
    source = Source(CHANGES if mode == "meshlib" else 0)
    sink, keeper = Sink(engine, source), Keeper()
    directory = Directory(sink, keeper, open_one=lambda plugin, settings: Registry(source))  # type: ignore[arg-type, return-value]
    directory.follow(found)
    directory.start(limit=30.0)
    held = _resident() - before
    try:
        picks, first, late, stale = asyncio.run(_calls(core, engine, source, seconds))
    finally:
        directory.cancel()
        keeper.stop()
    if mode == "meshlib" and len(sink.applied) < CHANGES * seconds / 4:
        raise RuntimeError(f"only {len(sink.applied)} changes were applied in {seconds:g} s")
    applied = sorted(sink.applied) or [0.0]
    return {
        "p50_us": picks[len(picks) // 2] * 1e6,
        "p99_us": picks[len(picks) * 99 // 100] * 1e6,
        "first_us": first[len(first) * 99 // 100] * 1e6,
        "apply_ms": applied[min(len(applied) - 1, len(applied) * 99 // 100)] * 1e3,
        "stall_ms": late[-1] * 1e3,
        "stall_p99_ms": late[len(late) * 99 // 100] * 1e3,
        "stale_ms": stale * 1e3,
        "rss_mb": held / 1e6,
    }


async def _calls(core: Any, engine: Any, source: Source, seconds: float) -> tuple[list[float], list[float], list[float], float]:
    """How long picks took, those after a sleep apart, how late the loop was, and how long an endpoint was picked after its removal."""
    picks, first, late, stale = array("d"), array("d"), array("d"), 0.0
    clock, response, headers = time.perf_counter, core.OUTCOME_RESPONSE, [(b"Host", b"orders")]
    end = time.monotonic() + seconds
    due = time.monotonic()
    while due < end:
        due += TURN
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        woken = time.monotonic()
        late.append(max(0.0, woken - due))
        if woken > due + TURN:
            due = woken
        for number in range(PICKS):
            now = time.monotonic()
            begun = clock()
            call = engine.begin("orders", "GET", "/", headers, now, None, None, True, 0)
            step = call.next(now)
            (picks if number else first).append(clock() - begun)
            removed = source.gone.get(step[2])
            if removed is not None:
                stale = max(stale, now - removed)
            call.head(step[1], response, 200, now, -1.0)
            call.finish(step[1], response, now)
    return sorted(picks), sorted(first), sorted(late), stale


def _resident() -> float:
    return float(Path("/proc/self/statm").read_text().split()[1]) * 4096
