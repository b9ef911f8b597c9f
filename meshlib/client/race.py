"""How do two attempts of one call run side by side?

A hedge is sent beside an attempt that is slow, and then each of them is a task of its own, whichever ends first is looked at first,
and what is left when the call is over is cancelled: its connection is closed, or its stream reset. When a hedge goes out, where, and
what an answer is worth is the engine's word (`Call.hedge`, `Call.head`); `way.py` asks it, in the order in which this file says that
attempts have ended. It is for event loops only: a blocking carrier has one thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._native import core
    from .way import Attempt, Carrier, Reply

Ended = tuple["asyncio.Task[Reply]", "Attempt", int, Any]


class Race:
    """The attempts of one call that are under way. Belongs to the task that makes the call."""

    __slots__ = ("_carrier", "_clock", "_native", "_running")

    def __init__(self, carrier: Carrier, native: core.Call, clock: Callable[[], float]) -> None:
        self._carrier = carrier
        self._native = native
        self._clock = clock
        self._running: dict[asyncio.Task[Reply], tuple[Attempt, int, Any]] = {}

    def start(self, attempt: Attempt, token: int, span: Any) -> None:
        self._running[asyncio.ensure_future(self._exchange(attempt))] = (attempt, token, span)

    async def first(self) -> Ended | None:
        """The attempt that ended first, however it ended; None when it is time for another one beside it."""
        while True:
            ended = next((task for task in self._running if task.done()), None)
            if ended is not None:
                return (ended, *self._running.pop(ended))
            wait = self._native.hedge(self._clock())
            if wait == 0.0:
                return None
            await asyncio.wait(self._running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """Nobody waits for the rest any more. Never suspends: what it ends has the loop's next turn for it."""
        running, self._running = self._running, {}
        for task, (_, _, span) in running.items():
            if span is not None:
                span.end(0, asyncio.CancelledError("another attempt was quicker, or the caller gave up"))
            if task.cancel():
                task.add_done_callback(_forgive)
            elif _forgive(task) is None:
                body = task.result()[4]
                if not isinstance(body, bytes):
                    await body.close()

    async def _exchange(self, attempt: Attempt) -> Reply:
        # The connection is taken within the task: one that is cancelled before its first step must not have taken any.
        return await self._carrier.exchange(attempt)


def _forgive(task: asyncio.Task[Reply]) -> BaseException | None:
    """How a loser fails is nobody's any more."""
    return asyncio.CancelledError() if task.cancelled() else task.exception()
