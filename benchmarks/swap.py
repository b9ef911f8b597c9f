"""What do calls under way feel of a new configuration, or of a new list of endpoints?

One thread makes calls without end, another swaps and pauses as long as the swap took. Calls that met a swap are held against those
between the swaps, so that nothing else differs; `added_us` is what their p99 moved by. If the interpreter's lock were held, one call would meet
each swap and take as long. `ms` is one swap without anybody calling. It is a part of `decide.py`.
"""

from __future__ import annotations

import statistics
import threading
import time
from array import array
from typing import Any, Final

from .decide import HEADERS, plan

# Services, routes and endpoints of each; and what is swapped.
SIZES: Final = {"routes": (5_000, 2, 2), "endpoints": (1, 2, 10_000)}
# Swaps at least, alone and beside calls.
LEAST: Final = 5


def work(what: str, config: str, seconds: float) -> dict[str, float]:
    from meshlib._native import core

    services, routes, count = SIZES[what]
    engine: Any = core.Engine(1)
    text = plan(config, services, routes, "peak_ewma")
    # Nothing of the one stands in the other: a plan that hasn't changed would be taken over unread.
    texts = (text, text.replace(b'"deadline": 15.0', b'"deadline": 16.0'))
    if texts[0] == texts[1]:
        raise RuntimeError("the two plans are the same")
    engine.publish(text, 0.0)
    lists: dict[str, list[tuple[str, float, str, dict[str, str], str]]] = {
        f"service-{n}": [(f"10.{n >> 8}.{n & 255}.{k}:8443", 1.0, "", {}, "") for k in range(count)] for n in range(services)
    }
    for name, found in lists.items():
        engine.resolve(name, 1, found, 0.0)
    version = 1

    def swap() -> float:
        nonlocal version
        version += 1
        begun = time.perf_counter()
        if what == "routes":
            engine.publish(texts[version % 2], 1.0)
        else:
            engine.resolve("service-0", version, lists["service-0"], 1.0)
        return time.perf_counter() - begun

    alone = [swap() for _ in range(LEAST)]
    quiet, met = _beside(core, engine, swap, services, seconds)
    counted = sum(row["requests"] for row in engine.stats(1.0) if row["endpoint"])
    if counted != len(quiet) + len(met):
        raise RuntimeError(f"the endpoints have counted {counted} calls of {len(quiet) + len(met)}")
    during, between = _p99(met), _p99(quiet)
    return {
        "ms": statistics.median(alone) * 1e3,
        "p99_us": during,
        "added_us": during - between,
        "most_us": max(met),
    }


def _beside(core: Any, engine: Any, swap: Any, services: int, seconds: float) -> tuple[array[float], array[float]]:
    """What calls took between the swaps, and beside one, in microseconds."""
    is_over, is_swapping = False, False
    quiet, met = array("d"), array("d")

    def swaps() -> None:
        nonlocal is_over, is_swapping
        end, done = time.perf_counter() + seconds, 0
        # Also where the machine is busy there must be calls of both kinds.
        while (now := time.perf_counter()) < end or ((done < LEAST or not quiet or not met) and now < end + 30.0):
            is_swapping = True
            took = swap()
            is_swapping = False
            done += 1
            time.sleep(took)
        is_over = True

    swapper = threading.Thread(target=swaps)
    swapper.start()
    begin, response, clock, now, turn = engine.begin, core.OUTCOME_RESPONSE, time.perf_counter_ns, 1.0, 0
    names = [f"service-{n}" for n in range(services)]
    while not is_over:
        now += 0.00002
        turn = (turn + 7919) % services
        was_swapping = is_swapping
        begun = clock()
        call = begin(names[turn], "GET", "/", HEADERS, now, None, None, True, 0)
        token = call.next(now)[1]
        call.head(token, response, 200, now, -1.0)
        call.finish(token, response, now)
        took = (clock() - begun) / 1e3
        (met if was_swapping or is_swapping else quiet).append(took)
    swapper.join()
    return quiet, met


def _p99(values: array[float]) -> float:
    return sorted(values)[min(len(values) - 1, len(values) * 99 // 100)]
