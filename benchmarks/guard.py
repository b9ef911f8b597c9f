"""What does it cost to guard a function, where nothing fails?

A function that returns at once is called bare and guarded, in turns of some hundred calls; the bare call is taken off. `call/async` is a
coroutine that never suspends, so that there is nothing but the guard; in `call/async-waits` it gives way to the loop once (uvloop), and a
guard with a deadline has something to watch. `meshlib` has all of it: limits, breaker, budget, deadline, record. The peers have
what they have: `tenacity` (its decorator), `tenacity-retrying` (the `for attempt in` form, which makes a controller per call), `stamina`
retry; `pybreaker` is a breaker for blocking functions only; `hyx` is a breaker and a retry for coroutines only. None of them has a budget, a
limit or a deadline. What a failure costs is not measured: it waits.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from .harness import Run, in_process
from .peers import Absent, Peers

PRIMARY = "ns"
HAS_RATIOS = True
SECONDS: Final = 1.0
MODES: Final = {
    "call/async": ("meshlib", "tenacity", "tenacity-retrying", "stamina", "hyx", "bare"),
    "call/async-waits": ("meshlib", "tenacity", "tenacity-retrying", "stamina", "hyx", "bare"),
    "call/sync": ("meshlib-sync", "tenacity", "tenacity-retrying", "stamina", "pybreaker", "bare"),
}
# Calls of one turn: short enough that a moment of the machine spoils few turns.
BLOCK: Final = 256


def runs(peers: Peers) -> list[Run]:
    return [
        Run(
            case,
            mode,
            in_process("benchmarks.guard:work", case=case, mode=mode, config=lambda: peers.mesh([], is_private=False)),
        )
        for case, modes in MODES.items()
        for mode in modes
    ]


# --- in the worker


async def at_once() -> int:
    return 1


async def waits() -> int:
    await asyncio.sleep(0)
    return 1


def blocking() -> int:
    return 1


def work(case: str, mode: str, config: str, seconds: float) -> dict[str, float]:
    if case == "call/sync":
        return {"ns": _sync(_guarded_sync(mode, blocking, config), mode, seconds)}
    function = waits if case == "call/async-waits" else at_once
    import uvloop

    return {"ns": uvloop.run(_async(_guarded(mode, function, config), function, mode, seconds))}


def _mesh(config: str) -> Any:
    import meshlib

    return meshlib.Mesh.load(Path(config), service="me")


def _guarded(mode: str, function: Callable[[], Awaitable[int]], config: str) -> Callable[[], Awaitable[int]]:
    guarded: Any = function
    if mode == "meshlib":
        return _mesh(config).guard("ledger", idempotent=True)(function)  # type: ignore[no-any-return]
    if mode == "tenacity":
        import tenacity

        guarded = tenacity.retry(**_tenacity())(function)
    elif mode == "tenacity-retrying":
        from tenacity import AsyncRetrying

        async def guarded() -> int:
            async for attempt in AsyncRetrying(**_tenacity()):
                with attempt:
                    return await function()
            raise AssertionError

    elif mode == "stamina":
        guarded = _stamina().retry(on=OSError, attempts=2)(function)
    elif mode == "hyx":
        try:
            from hyx.circuitbreaker import consecutive_breaker
            from hyx.retry import retry
        except ImportError as error:
            raise Absent(f"hyx is not installed ({error})") from None
        breaker = consecutive_breaker(exceptions=(OSError,), failure_threshold=5, recovery_time_secs=1)
        guarded = retry(on=OSError, attempts=2)(breaker(function))
    return guarded  # type: ignore[no-any-return]


def _guarded_sync(mode: str, function: Callable[[], int], config: str) -> Callable[[], int]:
    guarded: Any = function
    if mode == "meshlib-sync":
        return _mesh(config).guard("ledger", idempotent=True)(function)  # type: ignore[no-any-return]
    if mode == "tenacity":
        import tenacity

        guarded = tenacity.retry(**_tenacity())(function)
    elif mode == "tenacity-retrying":
        from tenacity import Retrying

        def guarded() -> int:
            for attempt in Retrying(**_tenacity()):
                with attempt:
                    return function()
            raise AssertionError

    elif mode == "stamina":
        guarded = _stamina().retry(on=OSError, attempts=2)(function)
    elif mode == "pybreaker":
        import pybreaker

        guarded = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=1)(function)
    return guarded  # type: ignore[no-any-return]


def _tenacity() -> dict[str, Any]:
    import tenacity

    return {
        "stop": tenacity.stop_after_attempt(2),
        "wait": tenacity.wait_random_exponential(max=0.25),
        "retry": tenacity.retry_if_exception_type(OSError),
        "reraise": True,
    }


def _stamina() -> Any:
    try:
        import stamina
    except ImportError as error:
        raise Absent(f"stamina is not installed ({error})") from None
    return stamina


async def _async(guarded: Callable[[], Awaitable[int]], bare: Callable[[], Awaitable[int]], mode: str, seconds: float) -> float:
    clock = time.perf_counter_ns

    async def block(function: Callable[[], Awaitable[int]]) -> int:
        begun = clock()
        for _ in range(BLOCK):
            await function()
        return clock() - begun

    assert await guarded() == 1
    ours: list[int] = []
    bares: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not ours:
        ours.append(await block(guarded))
        bares.append(await block(bare))
    return _left(ours, bares, mode)


def _sync(guarded: Callable[[], int], mode: str, seconds: float) -> float:
    clock = time.perf_counter_ns

    def block(function: Callable[[], int]) -> int:
        begun = clock()
        for _ in range(BLOCK):
            function()
        return clock() - begun

    assert guarded() == 1
    ours: list[int] = []
    bares: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not ours:
        ours.append(block(guarded))
        bares.append(block(blocking))
    return _left(ours, bares, mode)


def _left(guarded: list[int], bare: list[int], mode: str) -> float:
    """Nanoseconds of one call without those of the bare one; the bare one's own are told as they are."""
    off = 0.0 if mode == "bare" else statistics.median(bare)
    return (statistics.median(guarded) - off) / BLOCK
