"""Do callers who send a byte a second keep others waiting?

A hundred are slow with their head, a hundred with their body and a few with the handshake, on uvicorn and on a gthread worker with eight
threads; each of them alone could hold a thread for minutes. Meanwhile others call a hundred times a second, and the slowest of a hundred
of their calls takes about as long as without. Who doesn't come to the end of a head or of a handshake is gone after eleven seconds;
and so is who holds one of few places by a body that doesn't come, or by an answer that isn't read.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.inbound_load import Crew, Tally, open_load
from tests.chaos.inbound_server import Served, World, serving

SLOW, HANDSHAKES = 100, 10
RATE = 100.0

# From the first byte of a head to the end of the connection: ten are the rule, and one is for the server to see it.
FREED = 11.0
LASTS = 11.2

# The slowest of a hundred calls may take this many times as long as without slow callers, or this many seconds more: with every thread
# held it would be eleven seconds, or for ever. On a machine with nothing else to do it is the same as without.
TIMES, MORE = 3.0, 0.5

HEAD = b"GET /busy HTTP/1.1\r\nHost: orders\r\nX-Filler: "
BODY = b"POST /upload HTTP/1.1\r\nHost: orders\r\nContent-Length: 100000\r\n\r\n"
PLACES = 40
HELLO = b"\x16\x03\x01\x02\x00"


class Slow:
    """One slow caller: what it says at once, and a byte each second after that, for as long as the server lets it."""

    def __init__(self, said: bytes) -> None:
        self.said = said
        # Seconds after its first byte; None as long as it lives.
        self.ended: float | None = None

    async def drip(self, served: Served, *, is_reading: bool = True) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=4096)
        begun = time.monotonic()
        writer.write(self.said)
        end = asyncio.ensure_future(reader.read() if is_reading else asyncio.sleep(3600))
        with contextlib.suppress(OSError):
            while not end.done() and time.monotonic() - begun < LASTS:
                await asyncio.wait([end], timeout=1.0)
                writer.write(b"x")
        if end.done():
            with contextlib.suppress(OSError):
                end.result()
            self.ended = time.monotonic() - begun
        else:
            end.cancel()
        writer.close()


async def called(served: Served, seconds: float) -> Tally:
    """Ordinary callers: every fourth on a connection of its own."""
    tally, kept, fresh = Tally(), Crew(served.port), Crew(served.port, is_kept=False)

    async def one(number: int) -> None:
        await tally.count((kept if number % 4 else fresh).ask("GET", "/busy"))

    await open_load(RATE, seconds, one)
    kept.close()
    return tally


@pytest.mark.slow
async def test_slow_callers_keep_nobody_waiting(tmp_path: Path) -> None:
    """On either server, and where they have taken all the places for calls, they don't keep them. All three at a time."""
    with contextlib.ExitStack() as stack:
        served: dict[str, Served] = {}
        for name, kind in (("uvicorn", "uvicorn"), ("gthread", "gthread"), ("crowded", "uvicorn")):
            world = World(tmp_path / name)
            config = world.write("permissive", {"in_flight": PLACES} if name == "crowded" else {})
            served[name] = stack.enter_context(serving(world, kind, config))
        one, other, took = await asyncio.gather(seen(served["uvicorn"]), seen(served["gthread"]), crowded(served["crowded"]))
        print("uvicorn", one, "gthread", other, "places were free again after", took)
        for kind, found in (("uvicorn", one), ("gthread", other)):
            assert found.statuses == {200}, kind
            assert found.under < max(TIMES * found.without, found.without + MORE), (kind, found)
            assert found.first_end is not None and found.last_end < FREED, (kind, found)
        assert took < FREED + 2
        assert [each.complaints() for each in served.values()] == [[], [], []]


async def crowded(served: Served) -> float:
    """Slow with their bodies, or with reading the answer, they take every place; after so many seconds others are served again."""
    reader = b"GET /parts?count=256&size=65536&every=0 HTTP/1.1\r\nHost: orders\r\n\r\n"
    slow = [Slow(said) for said in (BODY, reader) for _ in range(PLACES * 3 // 4)]
    begun = time.monotonic()
    dripping = asyncio.gather(*(each.drip(served, is_reading=False) for each in slow))
    await asyncio.sleep(0.5)
    fresh = Crew(served.port, is_kept=False)
    assert (await fresh.ask("GET", "/busy")).status == 503
    while (await fresh.ask("GET", "/busy")).status != 200 and time.monotonic() < begun + 20:
        await asyncio.sleep(0.25)
    took = time.monotonic() - begun
    await dripping
    return took


@dataclass
class Seen:
    """The 99th percentile without and with slow callers; what the ordinary ones got; and when heads and handshakes were ended."""

    without: float
    under: float
    statuses: set[int]
    first_end: float | None
    last_end: float


async def seen(served: Served) -> Seen:
    await called(served, 0.3)
    without = await called(served, 1.5)
    slow = [Slow(said) for said, count in ((HEAD, SLOW), (HELLO, HANDSHAKES), (BODY, SLOW)) for _ in range(count)]
    dripping = asyncio.gather(*(each.drip(served) for each in slow))
    under = await called(served, LASTS)
    await dripping
    assert without.lost == under.lost == []
    assert without.turned_away == under.turned_away == 0
    assert (await Crew(served.port, is_kept=False).ask("GET", "/busy")).status == 200
    # What goes on has no end: None where one does, and it counts as the last.
    ends = [each.ended for each in slow if each.said != BODY]
    last = max(math.inf if ended is None else ended for ended in ends)
    first = min((ended for ended in ends if ended is not None), default=None)
    return Seen(without.percentile(0.99), under.percentile(0.99), set(under.statuses), first, last)
