"""When is an async function cut, and what does it cost the many that are in time?

A timer for each call would cost more than all the rest of a guarded call (asyncio.timeout takes 3 µs), and nearly none ever rings. So
there is one timer for an event loop, set to the earliest end that is known: a call in time is an entry in a dictionary and its
removal. When the timer rings, those whose end has passed are cancelled and the earliest of the rest is looked for, which is a pass over
the calls under way once in as long as a deadline lasts. How a cancellation is told from somebody else's is as in asyncio.timeout:
counted by the task. It cuts nothing that doesn't suspend.
"""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import current_task, get_running_loop
from math import inf
from typing import Any

clock = time.monotonic


class Watch:
    """The calls of one event loop that have an end. Used by that loop's thread only."""

    __slots__ = ("_loop", "_timer", "entries", "next")

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self.entries: set[Entry] = set()
        # When the timer rings.
        self.next = inf
        self._timer: asyncio.TimerHandle | None = None

    def expect(self, end: float) -> None:
        """Ring at this moment, unless it is known that something comes earlier."""
        if end < self.next:
            if self._timer is not None:
                self._timer.cancel()
            self.next = end
            self._timer = self._loop.call_later(max(end - clock(), 0.0), self._ring)

    def _ring(self) -> None:
        now, self.next, self._timer = clock(), inf, None
        earliest = inf
        for entry in list(self.entries):
            if entry.is_late:
                continue
            if entry.end <= now:
                entry.is_late = True
                entry.task.cancel()
            elif entry.end < earliest:
                earliest = entry.end
        self.expect(earliest)


class Entry:
    """One call under way: the task that runs now is cut at `end` (monotonic seconds), until it is dropped."""

    __slots__ = ("_cancelling", "_watch", "end", "is_late", "task")

    def __init__(self, end: float) -> None:
        global _last
        try:
            task = current_task()
        except RuntimeError:
            # Not even a loop.
            task = None
        if task is None:
            raise RuntimeError("a guarded async function runs in an asyncio task, and there is none here")
        loop, watch = _last
        if loop is not get_running_loop():
            loop, watch = _last = _here.watch()
        self.end = end
        self.task = task
        self.is_late = False
        self._cancelling = task.cancelling()
        self._watch = watch
        watch.entries.add(self)
        if end < watch.next:
            watch.expect(end)

    def drop(self) -> None:
        """It ended by itself."""
        self._watch.entries.discard(self)
        if self.is_late:
            self.task.uncancel()

    def is_cut(self, error: BaseException) -> bool:
        """It ended with an error: was that us?"""
        self._watch.entries.discard(self)
        # As asyncio.timeout: a cancellation that somebody else asked for as well is theirs.
        return self.is_late and self.task.uncancel() <= self._cancelling and isinstance(error, asyncio.CancelledError)


class _Here(threading.local):
    found: tuple[Any, Any] = (None, None)

    def watch(self) -> tuple[Any, Watch]:
        """The loop that runs in this thread, and its watch."""
        loop = get_running_loop()
        if self.found[0] is not loop:
            self.found = (loop, Watch(loop))
        return self.found


_here = _Here()
# What was used last, by whatever thread: nearly always there is one loop, and this costs less than a look at the thread's own.
_last: tuple[Any, Any] = (None, None)
