"""Who has come to a socket of the agent and fits no entry?

An entry with a wrong uid looks, from the service's side, like an agent that says no. So whoever runs the node is told in the log which
process came and as which user, which `ps` tells anybody too. Why it doesn't fit is not told: that would be the entries' selectors. One line
for a user and a minute, and so many for all users, since anybody may come as often as they like; the rest is only counted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from .attest import Caller

log = logging.getLogger("meshlib.agent")

# Seconds for which a user isn't named again, and how many users are named within them.
QUIET: Final = 60.0
MOST: Final = 32


class Strangers:
    """State of the agent: how many came, by socket; on the agent's loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._last: float | None = None
        # Of each user who was named: when, and how often it came since.
        self._named: dict[int, tuple[float, int]] = {}

    @property
    def since(self) -> float | None:
        """Seconds since the last one came."""
        return None if self._last is None else self._clock() - self._last

    def note(self, socket: str, caller: Caller) -> None:
        now = self._last = self._clock()
        self.counts[socket] += 1
        named = self._named.get(caller.uid)
        if named is not None and now - named[0] < QUIET:
            self._named[caller.uid] = named[0], named[1] + 1
            return
        if named is None and len(self._named) >= MOST:
            self._named = {uid: (when, more) for uid, (when, more) in self._named.items() if now - when < QUIET}
            if len(self._named) >= MOST:
                return
        self._named[caller.uid] = now, 0
        more = f"; {named[1]} more of this user since the last line" if named is not None and named[1] else ""
        log.warning(
            "process %d of user %d at the %s socket fits no entry, and gets nothing: does all that its entry says hold of it?"
            " A path is that of the executable itself, and of no link to it%s",
            caller.pid,
            caller.uid,
            socket,
            more,
        )
