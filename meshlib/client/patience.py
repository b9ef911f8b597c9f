"""When does the application itself have enough, and how long does it want to wait?

A call may bring strategies of tenacity: `stop` ends the retries earlier than the configuration would, `wait` stands in the place of its
backoff. They are asked here, once an attempt has failed, and the engine decides as always: what isn't safe, or not affordable, is not
repeated, whatever they say.
"""

from __future__ import annotations

from typing import Any

from .._native import core
from ..retry.tenacity import should_stop, state_of, wait_of
from .terms import Terms


class Patience:
    """The strategies of one call, and what they have seen of it. Times are monotonic seconds."""

    __slots__ = ("_begun", "_count", "_idle", "_seconds", "_terms")

    def __init__(self, terms: Terms, begun: float) -> None:
        self._terms = terms
        self._begun = begun
        self._count = 0
        self._idle = 0.0
        self._seconds: float | None = None

    def ask(self, native: core.Call, now: float, error: BaseException | None, result: Any = None) -> None:
        """An attempt has failed, by an error or by an answer that is none: is that enough?"""
        self._count += 1
        state = state_of(self._count, self._begun, now, self._idle, error, result)
        if self._terms.wait is not None:
            self._seconds = wait_of(self._terms.wait, state)
        is_too_long = self._seconds is not None and now + self._seconds >= native.deadline
        if is_too_long or (self._terms.stop is not None and should_stop(self._terms.stop, state)):
            native.stop()

    def wait(self, native: core.Call, now: float) -> None:
        """It is tried again: after our own wait, if there is one."""
        if self._seconds is not None:
            native.wait(self._seconds, now)
            self._idle += self._seconds
