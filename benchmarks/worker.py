"""What happens in the process of one mode?

It reads one job from stdin, does it, and prints one JSON object. Clients are driven by `drive` (on an event loop) or
`drive_threads`: callers that each ask again as soon as they have their answer (a closed loop), first to warm up, then for a measured
time. CPU is that of the whole process, so that a library's own threads count. The same two reads of the clock and the same check of
the answer are in every mode's figures. Between warming up and measuring it says "ready" and waits for a line, so that several
processes can begin together.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import os
import statistics
import sys
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from .machine import cpu_of
from .peers import ANSWER, Absent

# No more calls than this in one measurement: the latencies are kept, and the sockets of peers are not endless.
MOST: Final = 400_000
LENGTH: Final = len(ANSWER)
# Seconds that one of two has before it is the other's turn.
SLICE: Final = 0.02


def main() -> None:
    task = json.loads(sys.stdin.readline())
    module, _, function = task["work"].partition(":")
    try:
        result = getattr(importlib.import_module(module), function)(**task["job"])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("benchmarks", "meshlib")):
            raise
        result = {"absent": f"the package {error.name} is not installed"}
    except Absent as reason:
        result = {"absent": str(reason)}
    print(json.dumps(result))


def on_loop(loop: str, main: Callable[[], Awaitable[dict[str, float]]]) -> dict[str, float]:
    """Run on "uvloop" or "asyncio"."""
    factory: Any = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop

    async def run() -> dict[str, float]:
        return await main()

    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(run())


async def drive(
    calls: Sequence[Callable[[], Awaitable[bytes]]],
    seconds: float,
    length: int = LENGTH,
    cpu: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """One task for each of `calls`, all at once. `cpu` is asked before and after what is measured, by default for our own."""

    async def ask(call: Callable[[], Awaitable[bytes]], end: float, least: int, most: int, took: array[float]) -> None:
        clock = time.perf_counter
        count, now = 0, clock()
        while (now < end and count < most) or count < least:
            begun = now
            if len(await call()) != length:
                raise RuntimeError("a wrong answer")
            now = clock()
            took.append(now - begun)
            count += 1

    async def phase(seconds: float, least: int) -> tuple[array[float], float]:
        took: array[float] = array("d")
        begun = time.perf_counter()
        await asyncio.gather(*(ask(call, begun + seconds, least, MOST // len(calls), took) for call in calls))
        return took, time.perf_counter() - begun

    await phase(min(0.5, seconds / 3), 3)
    _await_others()
    before = cpu()
    took, wall = await phase(seconds, 1)
    return figures(took, wall, cpu() - before)


async def drive_beside(
    calls: Sequence[Callable[[], Awaitable[bytes]]], pid: int, seconds: float, length: int = LENGTH
) -> dict[str, float]:
    """The same, where `cpu_us` is the CPU of a server, and `client_us` our own."""
    own: list[float] = []
    wall: list[float] = []

    def cpu() -> float:
        own.append(time.process_time())
        wall.append(time.perf_counter())
        return cpu_of(pid)

    found = await drive(calls, seconds, length, cpu)
    return {**found, "client_us": (own[1] - own[0]) / (found["rps"] * (wall[1] - wall[0])) * 1e6}


async def drive_in_turn(
    ones: Sequence[Callable[[], Awaitable[bytes]]],
    others: Sequence[Callable[[], Awaitable[bytes]]],
    seconds: float,
    length: int = LENGTH,
    cpu: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """What `ones` take more than `others`: both by one process, in short slices by turns, so that nothing else differs."""

    async def ask(call: Callable[[], Awaitable[bytes]], end: float) -> int:
        count = 0
        while time.perf_counter() < end or not count:
            if len(await call()) != length:
                raise RuntimeError("a wrong answer")
            count += 1
        return count

    async def slice_of(calls: Sequence[Callable[[], Awaitable[bytes]]]) -> float:
        before = cpu()
        end = time.perf_counter() + SLICE
        count = sum(await asyncio.gather(*(ask(call, end) for call in calls)))
        return (cpu() - before) / count * 1e6

    async def phase(seconds: float) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not found:
            # Who begins changes, so that being second is no advantage.
            if len(found) % 2:
                other, one = await slice_of(others), await slice_of(ones)
            else:
                one, other = await slice_of(ones), await slice_of(others)
            found.append((one, other))
        return found

    await phase(seconds / 3)
    _await_others()
    found = await phase(seconds)
    return {
        "cpu_us": statistics.median(one for one, _ in found),
        "added_us": statistics.median(one - other for one, other in found),
    }


def drive_threads(calls: Sequence[Callable[[], bytes]], seconds: float, length: int = LENGTH) -> dict[str, float]:
    """One thread for each of `calls`, all at once."""
    failures: list[BaseException] = []

    def ask(call: Callable[[], bytes], end: float, least: int, most: int, took: array[float]) -> None:
        clock = time.perf_counter
        count, now = 0, clock()
        try:
            while (now < end and count < most) or count < least:
                begun = now
                if len(call()) != length:
                    raise RuntimeError("a wrong answer")
                now = clock()
                took.append(now - begun)
                count += 1
        except BaseException as error:
            failures.append(error)

    def phase(seconds: float, least: int) -> tuple[array[float], float]:
        took: array[float] = array("d")
        begun = time.perf_counter()
        threads = [threading.Thread(target=ask, args=(call, begun + seconds, least, MOST // len(calls), took)) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return took, time.perf_counter() - begun

    phase(min(0.5, seconds / 3), 3)
    _await_others()
    cpu = time.process_time()
    took, wall = phase(seconds, 1)
    return figures(took, wall, time.process_time() - cpu)


def _await_others() -> None:
    gc.collect()
    print("ready", flush=True)
    sys.stdin.readline()


def spin(steps: int) -> int:
    """Work as an application does it, in pure Python."""
    total = 0
    for step in range(steps):
        total += step & 3
    return total


def steps_of(seconds: float) -> int:
    """How many steps of `spin` take so long on this machine, when nothing disturbs it."""
    steps = 20_000
    took = []
    for _ in range(25):
        begun = time.thread_time_ns()
        spin(steps)
        took.append(time.thread_time_ns() - begun)
    return round(steps * seconds * 1e9 / min(took))


def figures(took: array[float], wall: float, cpu: float) -> dict[str, float]:
    ordered = sorted(took)
    count = len(ordered)
    return {
        "rps": count / wall,
        "cpu_us": cpu / count * 1e6,
        "p50_us": ordered[count // 2] * 1e6,
        "p99_us": ordered[min(count - 1, count * 99 // 100)] * 1e6,
    }


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
        sys.stdout.flush()
        # Some peers' threads abort a Python that ends. The figures are out by then.
        os._exit(0)
