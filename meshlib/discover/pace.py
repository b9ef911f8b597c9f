"""When may a source that has failed be asked again?

A registry that restarts loses the watches of all processes in one moment, and must not get them back in one: two hundred of them are to
make fifty tries a second at most, and be there again within ten seconds. So the numbers follow from the spread, not from the doubling
alone. All times are drawn (full jitter: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015):

    it had answered, and was lost        0 to 9.1 s: 22 a second of 200, as evenly as chance can
    every try after that                 9 to 9.2 s: who came too early comes again at his place in the line, so that it is 22 a second
                                         for as long as it lasts, and all are back within 10 s, also after ten minutes
    it has never answered                0 to 0.1, 0.2, 0.4, 0.8 s, since somebody waits for it to start; then 1 s to twice as much
                                         as before, 30 s at most
    the stream has ended by itself       0 to 0.1 s, then doubling: it wants to begin anew, and nobody is down

One `Pace` belongs to a registry in a process, however many services are watched there: while none of its streams lives it is down, and
one of them tries for all. It reads no clock and waits for nothing.

A service that is refused for a reason of its own (no right, an answer that can't be read) says that the registry lives: nobody else waits
for it, and it waits by its own delays. Only where nothing else lives, those that are refused take turns, as seldom as if the registry
were down: else a process with many of them, or two hundred whose token has ended, would ask all the time. Who was refused least often
is first in that line, so that one that was refused in passing isn't kept back by those that always are.
"""

from __future__ import annotations

import random

BASE = 0.1
MOST = 30.0
LEAST = 1.0  # once it is known to be down
LOST = ((0.0, 9.1), (9.0, 9.2))
EAGER = 4  # tries of somebody who waits for a first answer
STEP = 0.01  # seconds in the line of those that are refused, for each time
LONGEST_LINE = 50
LAST = 0.15  # of an entry's life
PATIENCE = 1.0  # with one question about an entry


def pause_within(left: float, life: float) -> float:
    """Seconds until an entry whose keeping has failed is to be kept again, with `left` of its `life` to go.

    Drawn from most of what is left (full jitter), and a fifth of the life or half of what is left at least: one question that was lost
    costs no entry, also where much time was lost with it, and two hundred processes whose registry is away ask it less than two and a half
    times as often as they do anyway, three times in a life. What is left at the very end isn't halved any more.
    """
    least = max(LAST * life, min(0.2 * life, 0.5 * left))
    return random.uniform(least, max(least, 0.8 * left))


def limit_within(left: float) -> float | None:
    """Seconds that one question about an entry may take with so much of its life to go; None for as long as any other question.

    A third: one that hangs must leave time to ask again. But none that is answered within a second is given up.
    """
    return max(left / 3, min(left, PATIENCE)) if left > 0.0 else None


class Delays:
    """One source's own: seconds until its next try."""

    __slots__ = ("_had_answered", "_random", "ends", "failures", "is_refused", "refusals")

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self.failures = 0
        self.ends = 0
        self.refusals = 0  # since it has answered
        self.is_refused = False  # the last time
        self._had_answered = False

    def answered(self) -> None:
        self.failures, self.refusals = 0, 0
        self.is_refused, self._had_answered = False, True

    def refused(self) -> float:
        self.refusals += 1
        self.is_refused = True
        return self._next()

    def failed(self) -> float:
        self.is_refused = False
        return self._next()

    def _next(self) -> float:
        self.failures += 1
        if self._had_answered:
            return self._random.uniform(*LOST[min(self.failures, len(LOST)) - 1])
        return self._random.uniform(LEAST if self.failures > EAGER else 0.0, _doubled(self.failures))

    def ended(self, lived: float) -> float:
        """It stopped without an error, after so many seconds."""
        self.ends = 1 if lived > MOST else self.ends + 1
        return self._random.uniform(0.0, _doubled(self.ends))


def _doubled(times: int) -> float:
    return min(MOST, BASE * 2.0 ** min(times - 1, 20))


class Pace:
    """All streams of one registry. `live` are those that have answered and are not lost."""

    __slots__ = ("_delays", "_is_refusing", "_random", "_refused", "_tried_until", "_turn", "live", "not_before")

    def __init__(self, source: random.Random) -> None:
        self._random = source
        self.reset()

    def reset(self) -> None:
        """In a forked child nothing is known."""
        self.live = 0
        self.not_before = 0.0
        self._tried_until = 0.0
        self._delays = Delays(self._random)
        self._is_refusing = False  # its last word, and no stream of it lives
        self._refused = Delays(self._random)
        self._turn = 0.0  # when the next of those that are refused may try

    @property
    def is_down(self) -> bool:
        return not self.live and not self._is_refusing and self._delays.failures > 0

    def wait(self, now: float, own: Delays | None = None) -> float:
        """Seconds until a try may begin, or this is to be asked again: 0 is now, and then `begin` it."""
        if self.is_down:
            return LEAST if now < self._tried_until else max(0.0, self.not_before - now)
        if self.live or own is None or not own.is_refused or now >= self._turn:
            return 0.0
        left = self._turn - now
        return left + STEP * min(own.refusals, LONGEST_LINE) if left <= LEAST else LEAST

    def begin(self, now: float, own: Delays | None = None) -> None:
        """A try has begun. One that hangs does not keep the others from trying for ever."""
        self._tried_until = now + MOST
        if own is not None and own.is_refused and not self.live:
            self._turn = now + self._refused.failed()

    def answered(self) -> None:
        """The first answer of a stream."""
        self._tried_until = 0.0
        self.live += 1
        self._is_refusing = False
        self._delays.answered()
        self._refused.answered()

    def refused(self, now: float, *, was_live: bool) -> None:
        """A stream was refused for a reason of its own, or is so now: the registry lives. How patiently it was asked is not forgotten."""
        self.live -= was_live
        self._tried_until = 0.0
        self._is_refusing = True
        if not self.live and now >= self._turn:
            self._turn = now + self._refused.failed()

    def failed(self, now: float, *, was_live: bool) -> bool:
        """A stream is lost, or a try has failed. True if the registry is down, so that its next try is everybody's."""
        if was_live:
            self.live -= 1
        else:
            self._tried_until = 0.0
        if self.live:
            return False
        self._is_refusing = False
        self.not_before = now + self._delays.failed()
        return True

    def ended(self, *, was_live: bool) -> None:
        """A stream is over without an error, or was cancelled."""
        if was_live:
            self.live -= 1
        else:
            self._tried_until = 0.0
