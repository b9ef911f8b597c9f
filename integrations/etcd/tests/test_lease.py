"""Does a process stay in etcd when a question about its lease is lost, and is etcd not run over for that?

Two hundred processes in virtual time, and an etcd in memory; the real one is in `test_etcd.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import cast

import pytest
from meshlib_etcd import EtcdError
from meshlib_etcd.client import Client
from meshlib_etcd.messages import UNAVAILABLE, Entry, Page
from meshlib_etcd.registration import EtcdRegistration

from tests.support import run_virtually


class Leases:
    """An etcd with one lease, in virtual time; `is_away` says at which times it resets connections."""

    def __init__(self, is_away: Callable[[float], bool]) -> None:
        self.is_away = is_away
        self.asked: list[float] = []
        self.granted = 0
        self.ends = 0.0
        self.entry: tuple[bytes, int] | None = None

    def _ask(self) -> float:
        now = asyncio.get_running_loop().time()
        if self.entry is not None and now > self.ends:
            self.entry = None
        if self.is_away(now):
            raise EtcdError("reset", code=UNAVAILABLE)
        return now

    async def grant(self, ttl: float) -> tuple[int, float]:
        self.asked.append(asyncio.get_running_loop().time())
        self.ends, self.granted = self._ask() + ttl, self.granted + 1
        return self.granted, ttl

    async def keep_alive(self, lease: int) -> float:
        self.asked.append(asyncio.get_running_loop().time())
        now = self._ask()
        if now > self.ends:
            return 0.0
        self.ends = now + 10.0
        return 10.0

    async def at(self, key: bytes) -> Page:
        self._ask()
        return Page(1, () if self.entry is None else (Entry(key, self.entry[0], 1, self.entry[1]),), False)

    async def put(self, key: bytes, value: bytes, lease: int) -> int:
        self._ask()
        self.entry = value, lease
        return 1


async def kept(registration: EtcdRegistration, after: float) -> list[float]:
    """When it raised."""
    raised = []
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(after)
        while True:
            try:
                await registration.keep()
            except EtcdError:
                raised.append(asyncio.get_running_loop().time())
            await asyncio.sleep(30)
    return raised


def two_hundred(
    is_away: Callable[[float], bool], seconds: float, *, make: type[Leases] = Leases
) -> tuple[list[Leases], list[list[float]]]:
    """As many processes whose keep-alives are spread over their rhythm; and when each of them raised."""

    async def main() -> tuple[list[Leases], list[list[float]]]:
        random.seed(7)
        leases = [make(is_away) for _ in range(200)]
        made = [EtcdRegistration(each, b"k", b"v", ttl=10.0) for each in leases]  # type: ignore[arg-type]
        tasks = [asyncio.ensure_future(kept(each, n / 60)) for n, each in enumerate(made)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        return leases, await asyncio.gather(*tasks)

    return cast(tuple[list[Leases], list[list[float]]], run_virtually(main))


@pytest.mark.parametrize("away", [0.5, 2.0, 4.5])
def test_lost_keep_alive_takes_nobody_out(away: float) -> None:
    """What ends a fifth of the lease before the lease does: nothing is raised, and no lease ends."""
    leases, raised = two_hundred(lambda now: 10.0 <= now < 10.0 + away, 40.0)
    assert sum(map(len, raised)) == 0
    assert [each.granted for each in leases] == [1] * 200
    assert all(each.entry is not None and each.ends > 40.0 for each in leases)


@pytest.mark.parametrize("which", ["keep_alive", "at"])
def test_question_that_hangs_takes_nobody_out(which: str) -> None:
    """Its answer never comes, and nobody says so: it is given up while there is time to ask again."""

    class Hanging(Leases):
        has_hung = False

        async def keep_alive(self, lease: int) -> float:
            await self._hang("keep_alive")
            return await super().keep_alive(lease)

        async def at(self, key: bytes) -> Page:
            await self._hang("at")
            return await super().at(key)

        async def _hang(self, question: str) -> None:
            if question == which and not self.has_hung and asyncio.get_running_loop().time() >= 15.0:
                self.has_hung = True
                await asyncio.sleep(5.0)  # for which the client waits
                raise EtcdError("no answer", code=UNAVAILABLE)

    leases, raised = two_hundred(lambda now: False, 40.0, make=Hanging)
    assert all(each.has_hung for each in leases if isinstance(each, Hanging))
    assert sum(map(len, raised)) == 0
    assert [each.granted for each in leases] == [1] * 200


def test_outage_is_raised_when_the_lease_is_over_and_asked_about_with_patience() -> None:
    """Not before; and two hundred ask less than two and a half times as often as their rhythm does, which is sixty a second."""
    leases, raised = two_hundred(lambda now: now >= 20.0, 40.0)
    assert all(len(each) == 1 for each in raised)
    assert all(each[0] > of.ends for of, each in zip(leases, raised, strict=True))
    times = sorted(time for each in leases for time in each.asked if time >= 20.0)
    assert max(sum(begin <= time < begin + 1.0 for time in times) for begin in times) < 150


def test_entry_tells_whether_it_stands() -> None:
    """From the answer that it is in etcd until its lease is over, also while questions are lost; not while nobody has answered yet."""
    leases = Leases(lambda now: now < 3.0 or 40.0 < now < 100.0)
    registration = EtcdRegistration(cast(Client, leases), b"key", b"value")
    seen: list[bool] = []

    async def look() -> None:
        keeping = asyncio.create_task(kept(registration, 0.0))
        for at in (2.0, 35.0, 43.0, 60.0, 115.0):
            await asyncio.sleep(at - asyncio.get_running_loop().time())
            seen.append(registration.is_entered)
        keeping.cancel()

    run_virtually(look)
    assert seen == [False, True, True, False, True]
