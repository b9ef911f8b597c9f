"""Where do the calls of both sides end? One server behind many addresses of the loopback network, which does what each request asks.

All of 127.0.0.0/8 is local, so that two hundred endpoints need one port and one thread. The script of a failure travels in the
request (`x-fail`, `x-script`, `x-hold`): nothing has to be agreed between threads, and both sides are failed alike. It speaks just
enough HTTP/1.1 for Envoy, which is the only one that calls it: our engine decides without I/O.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import defaultdict
from typing import Any

from tests.support import free_port


class Backends:
    """Answers each request with the address that it came to."""

    def __init__(self) -> None:
        self.port = free_port()
        self.seen: dict[str, list[str]] = defaultdict(list)  # by x-call: the addresses that its attempts came to
        self._held: list[tuple[Any, bytes]] = []
        self._bound: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def addresses(self, zone: int, count: int) -> list[str]:
        """The first so many addresses of a zone (0 to 255); they listen from now on."""
        hosts = [f"127.9.{zone}.{n}" for n in range(1, count + 1)]
        fresh = [host for host in hosts if host not in self._bound]
        if fresh:
            asyncio.run_coroutine_threadsafe(self._listen(fresh), self._loop).result(10)
            self._bound.update(fresh)
        return [f"{host}:{self.port}" for host in hosts]

    def refusing(self, count: int) -> list[str]:
        """Addresses where nobody listens."""
        return [f"127.8.0.{n}:{self.port}" for n in range(1, count + 1)]

    def held(self) -> int:
        return len(self._held)

    def release(self) -> None:
        """Answer all requests that were held."""

        def answer() -> None:
            for transport, out in self._held:
                transport.write(out)
            self._held.clear()

        self._loop.call_soon_threadsafe(answer)

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            for transport, _ in self._held:
                transport.abort()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _listen(self, hosts: list[str]) -> None:
        self._servers.append(await self._loop.create_server(lambda: _Connection(self), hosts, self.port, backlog=1024))


class _Connection(asyncio.Protocol):
    def __init__(self, backends: Backends) -> None:
        self.backends = backends
        self.buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = "{}:{}".format(*transport.get_extra_info("sockname"))

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head, self.buffer = self.buffer[:end].decode("latin-1"), self.buffer[end + 4 :]
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
            self.answer(fields)

    def answer(self, fields: dict[str, str]) -> None:
        status = 200
        if call := fields.get("x-call"):
            self.backends.seen[call].append(self.address)
        if script := fields.get("x-script"):
            status = int(script.split()[len(self.backends.seen[call or ""]) - 1])
        if self.address in fields.get("x-fail", "").split():
            status = 500
        body = self.address.encode()
        out = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)
        if self.address in fields.get("x-hold", "").split():
            self.backends._held.append((self.transport, out))
        else:
            self.transport.write(out)
