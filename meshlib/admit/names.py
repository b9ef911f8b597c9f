"""Which addresses has a host name, and how many threads may be busy with finding out?

The system's resolver blocks, may take half a minute over a dead server, and can't be stopped. A check every few seconds that
began a lookup of its own would pile up threads in just the moment in which DNS is ill. So one name is looked up once at a time:
whoever comes meanwhile waits for the same answer, and one who gives up leaves the lookup to the next. All names together have
`MOST` threads; where these hang, that says something of the resolver and nothing of the endpoint, and is told as `Busy`.

Answers aren't kept: a check asks how things are now. Endpoints that discovery finds by DNS are addresses, and don't come here.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import Any

from meshlib.keeper import apart

MOST = 8

# As getaddrinfo gives them: family, type, protocol, canonical name, and the place with port 0.
Rows = list[tuple[Any, ...]]


class Busy(Exception):
    """No thread was free to look a name up."""


class Names:
    """The lookups of one process that are under way. A loop that is new (after a fork, too) begins anew."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pending: dict[str, asyncio.Task[Rows]] = {}

    async def look_up(self, host: str, patience: float) -> Rows:
        """The addresses of a host. Raises OSError, ValueError for what can't be a host's name, and Busy after `patience` s."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._pending = loop, {}
        end = loop.time() + patience
        while host not in self._pending and len(self._pending) >= MOST:
            if loop.time() >= end:
                raise Busy(f"no thread is free to look {host} up: {MOST} other lookups hang")
            await asyncio.wait(self._pending.values(), timeout=end - loop.time(), return_when=asyncio.FIRST_COMPLETED)
        pending = self._pending.get(host)
        if pending is None:
            pending = self._pending[host] = loop.create_task(_ask(host))
            pending.add_done_callback(partial(_end, self._pending, host))
        return await asyncio.shield(pending)


async def _ask(host: str) -> Rows:
    # Not getaddrinfo of the loop: that would start threads which stay.
    return await apart(lambda: list(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)), "meshlib-check-dns")


def _end(pending: dict[str, asyncio.Task[Rows]], host: str, task: asyncio.Task[Rows]) -> None:
    del pending[host]
    if not task.cancelled():
        task.exception()  # maybe nobody waits any more, and asyncio would complain that nobody looked
