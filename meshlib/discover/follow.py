"""How is a source followed that tells by itself?

One task on the keeper's loop for each service: it takes a stream, hands on what it tells, and when the stream is lost waits its time
(`pace.py`) and takes a new one. Nothing else waits for a source to come back, so that the numbers of `pace.py` hold for the process. A
refusal (`is_refusal` in `resolver.py`) is no loss of the registry: only this service waits. A change that doesn't fit what is known ends
the stream like an error of its own: what was missed comes with the next stream's first answer. It judges no answer and publishes none.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from .pace import Delays, Pace
from .resolver import Change, Snapshot, Watching, is_refusal


class Listener(Protocol):
    """Who hears of one service."""

    def told(self, answer: Snapshot | Change) -> bool:
        """False if it doesn't fit what is known, so that all has to be told again."""
        ...

    def lost(self, error: Exception) -> None: ...


async def follow(
    resolver: Watching,
    listener: Listener,
    pace: Pace,
    delays: Delays,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] = asyncio.sleep,
) -> None:
    """Follow it for ever."""
    while True:
        while (wait := pace.wait(clock(), delays)) > 0.0:
            await sleep(wait)
        pace.begin(clock(), delays)
        pause = await _one(resolver, listener, pace, delays, clock)
        await sleep(pause)


async def _one(resolver: Watching, listener: Listener, pace: Pace, delays: Delays, clock: Callable[[], float]) -> float:
    """One stream to its end; seconds until this service may have another."""
    is_live, begun = False, clock()
    stream = resolver.watch()
    try:
        async for answer in stream:
            if not is_live:
                is_live = True
                pace.answered()
            if not listener.told(answer):
                break
            delays.answered()
    except Exception as error:
        listener.lost(error)
        if is_refusal(error):
            pace.refused(clock(), was_live=is_live)
            return delays.refused()
        is_everybodys = pace.failed(clock(), was_live=is_live)
        own = delays.failed()
        return 0.0 if is_everybodys else own
    except BaseException:
        pace.ended(was_live=is_live)
        raise
    finally:
        await _closed(stream)
    pace.ended(was_live=is_live)
    return delays.ended(clock() - begun)


async def _closed(stream: AsyncIterator[Any]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        with contextlib.suppress(Exception):
            await close()
