"""How does systemd, or whoever else started us, hear how we are?

By datagrams to the socket that NOTIFY_SOCKET names (sd_notify): ready, reloading, stopping, a line about the state, and at half of
WATCHDOG_USEC that the loop still turns. Without that variable, nothing is told to nobody. It needs no library: the protocol is a few
lines of text. What is told is no secret, and nothing is answered.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Final

from ..observe.redact import one_line

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"
ALIVE: Final = "WATCHDOG=1"


class Notifier:
    """Tells whoever started this process. `environment` as it was given to us."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        found = os.environ if environment is None else environment
        self._place = _place_of(found.get("NOTIFY_SOCKET", ""))
        self.watchdog = _watchdog_of(found)

    def tell(self, *states: str, status: str = "") -> None:
        """Send it; who doesn't listen misses it."""
        if not self._place:
            return
        lines = [*states, *([f"STATUS={one_line(status)}"] if status else [])]
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), self._place)

    def reloading(self) -> None:
        """`ready` ends it. The time tells systemd which reload is meant."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def _place_of(written: str) -> str:
    if written.startswith("@"):
        return "\0" + written[1:]
    return written if written.startswith("/") else ""


def _watchdog_of(environment: Mapping[str, str]) -> float | None:
    """Seconds between two signs of life, where somebody waits for them: half of what they endure."""
    written, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not (written.isascii() and written.isdigit()) or int(written) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(written) / 2_000_000
