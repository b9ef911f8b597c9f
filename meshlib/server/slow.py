"""How slow may a caller be, before nobody waits for them any more?

A thread that waits for a caller serves nobody else, so that a few callers with a byte a second would hold a whole server. Two answers.
`Arrival` says when a request is worth a thread: when its head is there, and of its body all or the first 64 KiB; until then the
connection waits in the poller, where waiting costs nothing. `Pace` says when to give up on a caller that a thread does wait for, in
either direction: whoever is slower than a least rate uses up a patience, and gets it back by being quick.

The bytes belong to somebody else: the work grows with their number and no faster, in however many pieces they come, and whatever they
are: no regular expression ever sees them. What is no HTTP is let through for the server's own parser to refuse. Event loops need none of
this: there a slow body costs a connection.
"""

from __future__ import annotations

import math
from typing import Final

from .door import HEAD

# Seconds that a caller may let us wait, and the bytes a second that earn it back: what Apache takes for sane, mod_reqtimeout's
# "body=20,MinRate=500" (on by default since 2.4.39). Unlike there, a quick beginning earns no more than the first patience: a caller
# with 10 MB sent may not be silent for six hours.
PATIENCE_BODY: Final = 20.0
LEAST_RATE: Final = 500.0

# And in all: seconds that a thread waits for one caller, beyond what one needs with these bytes a second. Without it, 500 bytes a second
# hold a thread as long as they like; a phone at the edge of a cell has ten thousand, and nobody's upload is slower for five minutes.
PATIENCE_ALL: Final = 300.0
STEADY_RATE: Final = 10_000.0

# As much of a body as is waited for before it takes a thread. nginx keeps 16 KiB and haproxy (option http-buffer-request) one buffer of
# 16 KiB in memory; with four times that nearly every call of an API comes whole, and a thousand slow callers hold 64 MiB at most.
AHEAD: Final = 64 * 1024

# A line that says how long a chunk is: longer ones are gunicorn's to refuse.
_CHUNK_LINE: Final = 256
# The fields of a head that say something about its body.
_LENGTH: Final = b"content-length"
_CHUNKED: Final = b"transfer-encoding"
_EXPECTS: Final = b"expect"


class Pace:
    """The patience with one direction of a connection: seconds that are left. Only what was waited counts, not what we did meanwhile."""

    __slots__ = ("_all", "_now")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Something new, with a patience of its own."""
        self._now, self._all = PATIENCE_BODY, PATIENCE_ALL

    def waited(self, seconds: float, size: int) -> None:
        """So long for so many bytes."""
        self._now = min(self._now - seconds + size / LEAST_RATE, PATIENCE_BODY)
        self._all = min(self._all - seconds + size / STEADY_RATE, PATIENCE_ALL)

    @property
    def left(self) -> float:
        return min(self._now, self._all)

    @property
    def is_over(self) -> bool:
        return self.left <= 0


class TooLarge(Exception):  # no error of ours: the connection ends
    """A head that does not end in time."""


class Arrival:
    """How far the next request in a buffer has come. `head`: where its head ends, 0 before that."""

    __slots__ = ("_chunk", "_need", "_searched", "_start", "expects", "head")

    def __init__(self) -> None:
        self.head = 0
        # It waits for "100 Continue" before it sends its body.
        self.expects = False
        self._start = 0
        self._searched = 0
        # The size that the buffer must have; None while only the chunks tell.
        self._need: int | None = 0
        # Where the next chunk of a body begins.
        self._chunk = 0

    def is_worth_a_thread(self, data: bytes | bytearray) -> bool:
        """Is there enough of it? Raises `TooLarge`."""
        if not self.head and not self._has_head(data):
            return False
        size = len(data)
        if self._need is not None:
            return size >= self._need
        return size - self.head >= AHEAD or self._has_last_chunk(data)

    def _has_head(self, data: bytes | bytearray) -> bool:
        size = len(data)
        if self._searched <= self._start:
            # Empty lines before a request are to be overlooked (RFC 9112 section 2.2).
            while self._start < size and data[self._start] in b"\r\n":
                self._start += 1
        end = data.find(b"\r\n\r\n", max(self._searched - 3, self._start))
        if end < 0:
            self._searched = size
            if size - self._start > HEAD or self._start > HEAD:
                raise TooLarge(f"the head of a request is longer than {HEAD} bytes")
            return False
        if end - self._start > HEAD:
            raise TooLarge(f"the head of a request is longer than {HEAD} bytes")
        self.head = end + 4
        self._read(bytes(data[self._start : end]).lower())
        return True

    def _read(self, head: bytes) -> None:
        """How long is the body?"""
        self._need = self.head
        first, *lines = head.split(b"\r\n")
        told: dict[bytes, list[bytes]] = {}
        for line in lines:
            name, _, value = line.partition(b":")
            if name in (_LENGTH, _CHUNKED, _EXPECTS):
                told.setdefault(name, []).append(value.strip(b" \t"))
        if not told:
            return
        lengths = told.get(_LENGTH, [])
        if _CHUNKED in told:
            self._need = None
            self._chunk = self.head
        elif len(lengths) == 1 and lengths[0].isdigit() and len(lengths[0]) < 20:
            # Anything else is refused by who parses it.
            self._need = self.head + min(int(lengths[0]), AHEAD)
        if _EXPECTS in told and not first.endswith(b"http/1.0"):
            self.expects = b"100-continue" in told[_EXPECTS]
            if not self.expects:
                # It expects what nobody here knows, and is refused before its body comes.
                self._need = self.head

    def _has_last_chunk(self, data: bytes | bytearray) -> bool:
        """Step over the chunks that are there. True too for what is no chunk."""
        while True:
            end = data.find(b"\r\n", self._chunk, self._chunk + _CHUNK_LINE)
            if end < 0:
                return len(data) - self._chunk >= _CHUNK_LINE
            try:
                size = int(bytes(data[self._chunk : end]).partition(b";")[0], 16)
            except ValueError:
                return True
            if size < 0:
                return True
            if size == 0:
                # Nothing behind it, or trailers.
                return data.startswith(b"\r\n", end + 2) or data.find(b"\r\n\r\n", end) >= 0
            if end + 2 + size + 2 > len(data):
                return False
            self._chunk = end + 2 + size + 2


def least(*limits: float | None) -> float:
    """The shortest of some times, of which None is none."""
    return min((limit for limit in limits if limit is not None), default=math.inf)
