"""Does a burst of calls share as few HTTP/2 connections as it can, and does nobody wait for what won't come?"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from meshlib import errors
from meshlib.client.faults import CONNECT_TIMEOUT, too_slow
from meshlib.client.http2_pool import Http2Pool
from meshlib.client.pool import MAX_AGE

KEY = ("10.0.0.1:443", "spiffe://td/orders", "h2")


class Fake:
    """As much of a connection as the pool sees."""

    def __init__(self, pool: Http2Pool, room: int = 2, protocol: str = "h2", tls: Any = None) -> None:
        self.pool, self.room, self.tls, self.key = pool, room, tls, KEY
        self.wire = SimpleNamespace(protocol=protocol)
        self.born = asyncio.get_running_loop().time()
        self.not_after = float("inf")
        self.exchanges = 0
        self.is_retired = False

    def is_usable(self) -> bool:
        return not self.is_retired and self.exchanges < self.room

    def retire(self) -> None:
        self.is_retired = True
        self.pool.retire(self)  # type: ignore[arg-type]


class Bench:
    """A pool, and a `connect` that waits until the test lets it."""

    def __init__(self, **options: Any) -> None:
        self.wall = 0.0
        self.pool = Http2Pool(asyncio.get_running_loop(), lambda: self.wall)
        self.options = options
        self.gate = asyncio.Event()
        self.made: list[Fake] = []
        self.failure: BaseException | None = None

    async def connect(self) -> Any:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.made.append(Fake(self.pool, **self.options))
        return self.made[-1]

    async def call(self, tls: Any = None, seconds: float = 10.0) -> Any:
        end = asyncio.get_running_loop().time() + seconds
        connection = await self.pool.lease(KEY, tls, end, self.connect)
        connection.exchanges += 1
        return connection

    async def burst(self, count: int) -> list[Any]:
        calls = [asyncio.create_task(self.call()) for _ in range(count)]
        for _ in range(5):
            await asyncio.sleep(0)
        self.gate.set()
        return await asyncio.gather(*calls, return_exceptions=True)


async def test_burst_opens_one_connection_after_the_other() -> None:
    """Each is filled before the next is opened."""
    bench = Bench()
    found = await bench.burst(5)
    assert (len(bench.made), [one.exchanges for one in bench.made], len(set(found))) == (3, [2, 2, 1], 3)
    bench.made[0].exchanges = 0
    assert await bench.call() is bench.made[0]


async def test_failure_to_connect_is_told_to_all_who_waited() -> None:
    """At once and each its own; who comes later tries anew."""
    bench = Bench()
    bench.failure = errors.ConnectFailed("refused", is_written=False)
    found = await bench.burst(3)
    assert ([type(error) for error in found], len({id(error) for error in found})) == ([errors.ConnectFailed] * 3, 3)
    bench.failure = None
    assert await bench.call() is bench.made[0]


async def test_short_deadline_of_one_is_not_the_others() -> None:
    """Somebody else opens the connection then, and so if the first is cancelled."""
    bench = Bench()
    first, second = [asyncio.create_task(bench.call()) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    bench.failure = too_slow(KEY[0])
    bench.gate.set()
    with pytest.raises(errors.ConnectFailed) as caught:
        await first
    assert caught.value.reason == CONNECT_TIMEOUT
    bench.failure = None
    assert await second is bench.made[0]

    bench = Bench()
    first, second = [asyncio.create_task(bench.call()) for _ in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    bench.gate.set()
    assert (await second is bench.made[0], first.cancelled()) == (True, True)


async def test_wait_for_somebody_elses_connection_has_an_end() -> None:
    """And its end is no end for the one who opens."""
    bench = Bench()
    first = asyncio.create_task(bench.call())
    await asyncio.sleep(0)
    with pytest.raises(errors.ConnectFailed) as caught:
        await bench.call(seconds=0.01)
    assert caught.value.reason == CONNECT_TIMEOUT
    bench.gate.set()
    assert await first is bench.made[0]


async def test_endpoint_that_speaks_http1_makes_nobody_wait() -> None:
    """Its connections carry one exchange each; after a while it is asked again what it speaks."""
    bench = Bench(protocol="http/1.1")
    found = await bench.burst(3)
    assert (len(set(found)), len(bench.pool)) == (3, 0)
    bench.gate.clear()
    calls = [asyncio.create_task(bench.call()) for _ in range(3)]
    for _ in range(3):
        await asyncio.sleep(0)
    # All of them connect at once.
    assert repr(bench.pool) == "<Http2Pool connections=0 exchanges=0 opening=0>"
    bench.gate.set()
    await asyncio.gather(*calls)
    bench.pool._plain[KEY] = 0.0
    bench.options = {"protocol": "h2"}
    assert (await bench.call() is bench.made[-1], len(bench.pool)) == (True, 1)


async def test_old_generations_ages_and_certificates_are_retired() -> None:
    """What they carry goes on; new exchanges go elsewhere."""
    for spoil in ("tls", "age", "certificate"):
        bench = Bench()
        bench.gate.set()
        old = await bench.call()
        if spoil == "age":
            old.born -= MAX_AGE + 1
        elif spoil == "certificate":
            old.not_after = bench.wall = 5.0
        tls: Any = object() if spoil == "tls" else None
        bench.options = {"tls": tls}
        assert (await bench.call(tls) is old, old.is_retired, len(bench.pool)) == (False, True, 1)
