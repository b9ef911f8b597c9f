"""How much does one user send over HTTP/2, whatever connection it comes by?

Frames cost their sender nine bytes, and us a good deal more. So they are counted by their heads, before they are parsed, for all
connections of a user together: one that was ended is opened anew. What led to an answer is given back, so that a client who only has much
to ask is never taken for a flood.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# What a connection begins with; and the bytes of a frame's head, three of which are the length of the rest.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD: Final = 9


class Tally:
    """What one user has sent within a window, over all of their connections: frames, less those that led to an answer."""

    __slots__ = ("_clock", "_count", "_is_over", "_until", "_window")

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = window
        self._clock = clock
        self._until = clock() + window
        self._count = 0
        self._is_over = False

    @property
    def has_ended(self) -> bool:
        """Its window is over, and so nothing of it counts any more."""
        return self._clock() >= self._until

    @property
    def is_over(self) -> bool:
        """It was too much, and the window isn't over."""
        return self._is_over and not self.has_ended

    def add(self, frames: int, most: int) -> bool:
        """Count them; False if it is too much, as it stays until the window ends."""
        if self.has_ended:
            self._until, self._count, self._is_over = self._clock() + self._window, 0, False
        self._count += frames
        self._is_over = self._is_over or self._count > most
        return not self._is_over

    def give_back(self, frames: int) -> None:
        """What was sent has led to something. There is never more to give back than was sent."""
        self._count = max(0, self._count - frames)


class Frames:
    """How many frames begin in what is read? The library doesn't tell of all of them: not of those on streams that are closed, say."""

    __slots__ = ("_rest", "_skip")

    def __init__(self) -> None:
        self._rest = b""
        self._skip = len(PREFACE)

    def of(self, data: bytes) -> int:
        data, at, count = self._rest + data, self._skip, 0
        while at + HEAD <= len(data):
            count += 1
            at += HEAD + int.from_bytes(data[at : at + 3])
        self._rest, self._skip = data[at:], max(0, at - len(data))
        return count
