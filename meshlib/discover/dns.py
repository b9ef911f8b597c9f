"""Where are they, by DNS?

All A and AAAA records of a name are endpoints, at one port. The system's resolver is asked (so /etc/hosts, search
domains and nsswitch hold), off the loop and one lookup at a time, with a limit: a lookup that hangs is waited for
again, not started again. The system does not tell how long an answer may be kept, so the name is asked every few
seconds.

A negative answer is an error and not an empty list: a name that vanishes is far more often a fault of DNS than a
service without endpoints, so the directory keeps the last good addresses and exports their age. SRV records are
`srv.py`'s.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Sequence

from meshlib.errors import ConfigError
from meshlib.keeper import apart

from .resolver import EndpointAddress, Snapshot

EVERY = 5.0
LIMIT = 5.0  # seconds that a look waits; the lookup itself goes on, and the next look takes its answer

Lookup = Callable[[str, int], Sequence[str]]  # blocking: host and port to addresses without port


def system_lookup(host: str, port: int) -> list[str]:
    """The addresses of a host, each once. Blocks; raises OSError."""
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))


class DnsResolver:
    """The addresses of one Service behind a name and a port."""

    def __init__(
        self,
        service: str,
        name: str,
        *,
        every: float = EVERY,
        lookup: Lookup = system_lookup,
        limit: float = LIMIT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.service = service
        self.interval: float | None = every
        self.host, self.port = _split(service, name)
        self._lookup = lookup
        self._limit = limit
        self._clock = clock
        self._pending: asyncio.Task[Sequence[str]] | None = None
        self._snapshot = Snapshot(service, 0, (), clock())

    async def resolve(self) -> Snapshot:
        """Ask. Raises OSError for a negative answer or a broken resolver, TimeoutError when none came in time."""
        addresses = await self._ask()
        if not addresses:
            raise OSError(f"{self.host} has no addresses")
        endpoints = tuple(EndpointAddress(_join(address, self.port)) for address in sorted(set(addresses)))
        has_changed = endpoints != self._snapshot.endpoints
        if not has_changed:
            endpoints = self._snapshot.endpoints
        self._snapshot = Snapshot(self.service, self._snapshot.version + has_changed, endpoints, self._clock())
        return self._snapshot

    async def _ask(self) -> Sequence[str]:
        # A pending lookup of another loop was left behind in a parent process.
        if self._pending is None or self._pending.get_loop() is not asyncio.get_running_loop():
            work = apart(lambda: self._lookup(self.host, self.port), f"meshlib-dns-{self.service}")
            self._pending = asyncio.get_running_loop().create_task(work)
        done, _ = await asyncio.wait({self._pending}, timeout=self._limit)
        if not done:
            raise TimeoutError(f"no answer for {self.host} within {self._limit:g} s")
        pending, self._pending = self._pending, None
        return pending.result()


def _split(service: str, name: str) -> tuple[str, int]:
    host, colon, port = name.rpartition(":")
    if name.startswith("_"):
        raise ConfigError(
            f"services.{service}.discover.dns: {name!r} names SRV records.",
            hint='Write {srv: …} for those; here, a host and port, whose addresses are the endpoints, such as "orders.internal:8443".',
        )
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigError(
            f"services.{service}.discover.dns: {name!r} is not host:port.",
            hint='DNS gives addresses without ports, so the port is written, such as "orders.internal:8443".',
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
