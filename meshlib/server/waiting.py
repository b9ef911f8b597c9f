"""Who waits for a place, and how do they hear that there is one?

The gate decides who waits, how long at most, and whose turn it is; it gives each a ticket, and calls tickets when places come free. Here
is what a call waits on: a future of its own event loop, or an event of its own thread. One process may have both, and several loops:
a place that a thread gives back may be called for on a loop.

A ticket may be called before its call has come to wait for it: so whoever begins to wait asks whether it was, after leaving word. And
whoever hears nothing asks again when its patience is over, so that no call waits on a word that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable

from .._native import core


class Room:
    """Those who wait at one gate, in one process. All ways through the gate share it: whoever ends a call calls everybody's tickets."""

    __slots__ = ("_clock", "_gate", "_waiting")

    def __init__(self, gate: core.Gate, clock: Callable[[], float]) -> None:
        self._gate = gate
        self._clock = clock
        self._waiting: dict[int, Callable[[], object]] = {}

    def renew(self) -> None:
        """In a forked child: those who wait stayed with the parent."""
        self._waiting = {}

    def call(self, tickets: Iterable[int]) -> None:
        """These have a place now, or will never have one: they ask the gate which it is."""
        for ticket in tickets:
            wake = self._waiting.pop(ticket, None)
            if wake is not None:
                with contextlib.suppress(RuntimeError):  # its loop is being closed
                    wake()

    async def wait(self, entry: core.Entry, lost: int = 0) -> bool:
        """True: it is in. Cancelled, it gives back what it may have been given, and has ended with the status `lost`."""
        loop = asyncio.get_running_loop()
        word = loop.create_future()
        ticket = entry.ticket
        self._waiting[ticket] = lambda: _tell(loop, word)
        timer = loop.call_later(entry.patience, _hear, word)
        if entry.is_called:
            _hear(word)
        self.call(self._gate.called())
        try:
            await word
        except BaseException:
            self._waiting.pop(ticket, None)
            self.call(entry.finish(lost, self._clock()) or ())
            raise
        finally:
            timer.cancel()
        return self._resume(entry, ticket)

    def wait_blocking(self, entry: core.Entry) -> bool:
        """The same for a thread."""
        word, ticket = threading.Event(), entry.ticket
        self._waiting[ticket] = word.set
        self.call(self._gate.called())
        if not entry.is_called:
            word.wait(entry.patience)
        return self._resume(entry, ticket)

    def _resume(self, entry: core.Entry, ticket: int) -> bool:
        self._waiting.pop(ticket, None)
        if entry.resume(self._clock()):
            return True
        # It may have had a place, and no time left to use it.
        self.call(self._gate.called())
        return False


def _hear(word: asyncio.Future[None]) -> None:
    if not word.done():
        word.set_result(None)


def _tell(loop: asyncio.AbstractEventLoop, word: asyncio.Future[None]) -> None:
    """From whichever thread the place came free in."""
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is loop:
        _hear(word)
    elif not loop.is_closed():
        loop.call_soon_threadsafe(_hear, word)
