"""What do the mesh's decisions on one call cost, however large the mesh is?

`begin`, `next`, `head` and `finish` of the engine, called from Python as the client's way calls them: route, balance, breaker, limits,
budget, record, and the seam between the languages. No bytes are moved. `meshlib` is the default policy (peak-EWMA); `begin` … `finish` are
its parts, measured over 64 calls in flight. An empty native call, and the loop around it, are taken off once. `rss_mb` is
what the plan and the endpoints hold. What Python does around the engine is in `client.py` (`meshlib-way`).

`meshlib-rust` is the same without Python. `growth` is how many times more a call takes with so many endpoints of one service than with
ten, block by block in one process: by each policy, for turns with weights of 1 to 5, for hashes with a key for each call. `swap` is in `swap.py`.
`jwt/seen` is a token that was verified before, `jwt/first` one that wasn't. `authorize` is one request, judged by a thousand rules.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

from .harness import Comparison, Results, Run, in_process
from .native import by_example
from .peers import Peers

PRIMARY = "ns"
# `begin` … `finish` are parts of a call, not rivals.
HAS_RATIOS = False
# Services, and endpoints of each; a service has two routes in the first case.
CASES: Final = {"call/10k-routes-50k-endpoints": (5_000, 2, 10), "call/1-route-10-endpoints": (1, 1, 10)}
PARTS: Final = ("begin", "next", "head", "finish")
POLICIES: Final = ("random", "least_request", "peak_ewma", "maglev", "ring_hash", "round_robin")
GROWN: Final = {"1k": 1_000, "10k": 10_000, "100k": 100_000}
SWAPPED: Final = ("routes", "endpoints")
# Where the rule stands that allows a request; all of them by turns, with a denial, are the case itself.
JUDGED: Final = ("mix", "first", "middle", "last", "miss")
# Calls of one measured block, and calls in flight where the parts are measured.
BLOCK: Final = 2_048
FLIGHT: Final = 64


def runs(peers: Peers) -> list[Run]:
    return [
        Run(
            case,
            mode,
            in_process(
                "benchmarks.decide:work",
                mode=mode,
                size=size,
                config=lambda: peers.mesh([], is_private=False),
            ),
        )
        for case, size in CASES.items()
        for mode in ("meshlib", "round_robin", *PARTS)
    ] + [*_native_runs(), *_swaps(peers)]


def _native_runs() -> list[Run]:
    return [
        *(
            Run(case, "meshlib-rust", by_example("decide", "call", size, "peak_ewma"))
            for case, size in zip(CASES, ("large", "small"), strict=True)
        ),
        *(
            Run(f"growth/{policy}/{name}-endpoints", "meshlib-rust", by_example("decide", "growth", str(count), policy))
            for policy in POLICIES
            for name, count in GROWN.items()
        ),
        *(Run(f"swap/10k-{what}", "meshlib-rust", by_example("decide", "swap", what)) for what in SWAPPED),
        *(
            Run(f"jwt/{what}/{algorithm}", "meshlib-rust", by_example("jwt", algorithm, what))
            for algorithm in ("RS256", "ES256")
            for what in ("first", "seen")
        ),
        *(
            Run(f"authorize/1000-rules{'' if place == 'mix' else f'/{place}'}", "meshlib-rust", by_example("authorize", place))
            for place in JUDGED
        ),
    ]


def _swaps(peers: Peers) -> list[Run]:
    config = partial(peers.mesh, [], is_private=False)
    return [Run(f"swap/10k-{what}", "meshlib", in_process("benchmarks.swap:work", what=what, config=config)) for what in SWAPPED]


def compared(results: Results) -> list[Comparison]:
    large, small = CASES
    found: tuple[tuple[str, float | None, str], ...] = (
        (f"ns: {large} / {small}", results.ratio((large, "meshlib"), (small, "meshlib"), "ns"), "what the caches cost"),
        *(
            (f"ns: round_robin / peak-EWMA, {case}", results.ratio((case, "round_robin"), (case, "meshlib"), "ns"), "")
            for case in CASES
        ),
    )
    return [Comparison(label, ratio, wanted) for label, ratio, wanted in found if ratio is not None]


# --- in the worker

HEADERS = [
    (b"Host", b"orders"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"gzip, deflate"),
    (b"Connection", b"keep-alive"),
    (b"User-Agent", b"python-httpx/0.28.1"),
]


def work(mode: str, size: tuple[int, int, int], config: str, seconds: float) -> dict[str, float]:
    from meshlib._native import core

    services, routes, endpoints = size
    text = plan(config, services, routes, "round_robin" if mode == "round_robin" else "peak_ewma")
    before = _resident()
    engine = core.Engine(1)
    engine.publish(text, 0.0)
    for n in range(services):
        addresses: list[tuple[str, float, str, dict[str, str], str]] = [
            (f"10.{n >> 8}.{n & 255}.{k}:8443", 1.0, "", {}, "") for k in range(1, endpoints + 1)
        ]
        engine.resolve(f"service-{n}", 1, addresses, 0.0)
    held = _resident() - before
    source = random.Random(1)
    paths = ("/items/7", "/") if routes > 1 else ("/items/7",)
    targets = [(f"service-{source.randrange(services)}", source.choice(paths)) for _ in range(BLOCK)]
    if mode in PARTS:
        return {"ns": _part(core, engine, targets, mode, seconds)}
    return {"ns": _whole(core, engine, targets, seconds), "rss_mb": held / 1e6}


def plan(config: str, services: int, routes: int, policy: str) -> bytes:
    """The plan of one service as the configuration makes it, many times over: every field is what a user gets."""
    from meshlib.config import load

    whole = json.loads(load(Path(config), service="me").client_plan())
    one = next(s for s in whole["services"] if s["name"] == "orders")
    one["routes"] = one["routes"][-routes:]
    one["balance"]["policy"] = policy
    every = []
    for n in range(services):
        name = f"service-{n}"
        named = [{**route, "name": f"{name}/{k}"} for k, route in enumerate(one["routes"])]
        every.append({**one, "name": name, "hosts": [name], "routes": named})
    return json.dumps({**whole, "services": every}).encode()


def _whole(core: Any, engine: Any, targets: list[tuple[str, str]], seconds: float) -> float:
    begin, response, clock = engine.begin, core.OUTCOME_RESPONSE, time.perf_counter_ns
    now = 1.0

    def block() -> int:
        nonlocal now
        begun = clock()
        for authority, path in targets:
            now += 0.00002
            call = begin(authority, "GET", path, HEADERS, now, None, None, True, 0)
            token = call.next(now)[1]
            call.head(token, response, 200, now + 0.001, -1.0)
            call.finish(token, response, now + 0.001)
        return clock() - begun

    # As near to an empty native call as the seam has: a method that finds nothing to give.
    pending = core.HttpConnection(None, "", "127.0.0.1:1").pending

    def empty() -> int:
        nonlocal now
        begun = clock()
        for authority, path in targets:
            now += 0.00002
            pending()
        return clock() - begun

    block()
    blocks: list[int] = []
    empties: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not blocks:
        blocks.append(block())
        empties.append(empty())
    return (statistics.median(blocks) - statistics.median(empties)) / BLOCK


def _part(core: Any, engine: Any, targets: list[tuple[str, str]], part: str, seconds: float) -> float:
    begin, response, clock = engine.begin, core.OUTCOME_RESPONSE, time.perf_counter_ns
    now = 1.0
    took: dict[str, list[int]] = {part: [] for part in PARTS}

    def flight(some: list[tuple[str, str]]) -> None:
        nonlocal now
        now += 0.001
        later = now + 0.001
        marks = [clock()]
        calls = [begin(authority, "GET", path, HEADERS, now, None, None, True, 0) for authority, path in some]
        marks.append(clock())
        tokens = [call.next(now)[1] for call in calls]
        pairs = list(zip(calls, tokens, strict=True))
        marks.append(clock())
        for call, token in pairs:
            call.head(token, response, 200, later, -1.0)
        marks.append(clock())
        for call, token in pairs:
            call.finish(token, response, later)
        marks.append(clock())
        for name, first, last in zip(PARTS, marks[:-1], marks[1:], strict=True):
            took[name].append(last - first)

    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not took[part]:
        for first in range(0, BLOCK, FLIGHT):
            flight(targets[first : first + FLIGHT])
    return statistics.median(took[part]) / FLIGHT


def _resident() -> float:
    with contextlib.suppress(OSError):
        return float(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0.0
