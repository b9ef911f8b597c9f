"""With what does a test of a registry's outage begin? A mesh under load that finds its service in a real etcd, and a relay that counts.

The load is open (`inbound_load.py`), and the servers answer at once with their number: what fails or waits is the caller's. The relay
stands in front of etcd and writes down when a connection came, and whether etcd was there to take it.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import meshlib
from integrations.etcd.tests.cluster import Etcd
from tests.chaos.inbound_load import open_load, percentile
from tests.support import Request, Scripted, mesh_of, ok, scripted

RATE = 100.0


class Orders:
    """The service `orders`: servers of this process, of which etcd knows all but the last, and the mesh of the one who calls them."""

    def __init__(self, etcd: Etcd, servers: Sequence[Scripted], mesh: meshlib.Mesh, client: Any) -> None:
        self.etcd = etcd
        self.servers = servers
        self.mesh = mesh
        self.client = client
        self.took: list[float] = []
        self.failed: list[str] = []
        self.served: Counter[int] = Counter()
        self.late = 0.0
        self.began = time.monotonic()
        self._is_over = asyncio.Event()

    async def drive(self) -> None:
        self.late = await open_load(RATE, float("inf"), self._call, self._is_over)

    async def _call(self, number: int) -> None:
        begun = time.monotonic()
        try:
            answer = await self.client.get("http://orders/")
            assert answer.status_code == 200
            self.served[int(answer.content)] += 1
        except Exception as error:
            self.failed.append(f"{begun - self.began:.1f} s: {type(error).__name__}: {error}")
        self.took.append(time.monotonic() - begun)

    async def enter(self, *numbers: int) -> None:
        """Servers are written into etcd, without an end."""
        for number in numbers:
            await asyncio.to_thread(self.etcd.instance, "orders", f"o{number}", self.servers[number].address)

    async def leave(self, first: int) -> None:
        """All from this one on (of ten at most) go as they should: together out of etcd, and then nobody listens there any more."""
        await asyncio.to_thread(self.etcd.delete, f"/meshlib/services/orders/o{first}", "/meshlib/services/orders/o:")
        await asyncio.sleep(0.5)
        for server in self.servers[first:]:
            await server.stop()

    async def until_called(self, *numbers: int, patience: float) -> float:
        """Each of them was called from now on; how many seconds it took."""
        before = self.served.copy()
        return await until(lambda: all(self.served[number] > before[number] for number in numbers), patience)

    @property
    def row(self) -> dict[str, Any]:
        """What the directory tells of it."""
        (row,) = (row for row in self.mesh.directory.stats(time.monotonic()) if row["service"] == "orders")
        return row

    def metric(self, name: str) -> float:
        """As it is scraped."""
        (line,) = (
            line for line in self.mesh.metrics().splitlines() if line.startswith(name + "{") and 'service="orders"' in line
        )
        return float(line.rpartition(" ")[2])

    async def rest(self) -> str:
        """No more calls; when the last has ended, what became of them."""
        self._is_over.set()
        while len(self.took) < sum(self.served.values()) + len(self.failed):
            await asyncio.sleep(0.01)
        took = sorted(self.took)
        return (
            f"{len(took)} calls in {time.monotonic() - self.began:.0f} s, {len(self.failed)} failed, p50 {1e3 * percentile(took, 0.5):.1f}, "
            f"p99 {1e3 * percentile(took, 0.99):.1f}, at most {1e3 * took[-1]:.0f} ms"
        )


@contextlib.asynccontextmanager
async def orders_under_load(folder: Path, entered: int = 3, policy: str = "round_robin") -> AsyncIterator[Orders]:
    """So many servers in etcd, one more that isn't, and calls at `RATE`."""
    etcd = Etcd(folder)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(etcd.kill)
        await asyncio.to_thread(etcd.start)
        servers = []
        for number in range(entered + 1):

            async def answer(server: Scripted, request: Request, number: int = number) -> bytes:
                return ok(b"%d" % number)

            server = await stack.enter_async_context(scripted(answer))
            server.requests = Unkept()
            servers.append(server)
        for number in range(entered):
            await asyncio.to_thread(etcd.instance, "orders", f"o{number}", servers[number].address)
        registries = {"etcd": {"url": etcd.url, "cache": False}}
        services = {"orders": {"discover": {"registry": "etcd"}, "balance": {"policy": policy}}}
        mesh = stack.enter_context(mesh_of(folder, services, registries=registries))
        orders = Orders(etcd, servers, mesh, await stack.enter_async_context(mesh.client()))
        driving = asyncio.create_task(orders.drive())
        stack.callback(driving.cancel)
        await orders.until_called(*range(entered), patience=5.0)
        yield orders
        if driving.done():
            driving.result()


class Unkept(list[Any]):
    """Tens of thousands of requests are not kept."""

    def append(self, _: Any) -> None:
        pass


class Relay:
    """A TCP relay to etcd. `taken` is when connections came that etcd took, `tries` when any came; `open` are there now."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.tries: list[float] = []
        self.taken: list[float] = []
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came = time.monotonic()
        self.tries.append(came)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
        except OSError:
            writer.transport.abort()
            return
        bisect.insort(self.taken, came)
        self.open += 1
        with contextlib.suppress(asyncio.CancelledError):  # by the loop's end
            await asyncio.gather(_pass_on(reader, back), _pass_on(there, writer))
        self.open -= 1


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[tuple[Relay, int]]:
    """The relay, and its port."""
    relay = Relay(port)
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0, backlog=512)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()


class Learned:
    """Takes the place of one process's engine, and notes when it learned of each address."""

    def __init__(self) -> None:
        self.when: dict[str, float] = {}

    def resolve(self, service: str, version: int, endpoints: Sequence[tuple[Any, ...]], now: float) -> None:
        for row in endpoints:
            self.when.setdefault(row[0], time.monotonic())

    def amend(
        self, service: str, base: int, version: int, changed: Sequence[tuple[Any, ...]], gone: Sequence[str], now: float
    ) -> bool:
        self.resolve(service, version, changed, now)
        return True

    def unreachable(self, service: str) -> int:
        return 0


def densest(times: Iterable[float]) -> int:
    """The most within one second, wherever it begins."""
    ordered, first, most = sorted(times), 0, 0
    for last, moment in enumerate(ordered):
        while ordered[first] <= moment - 1.0:
            first += 1
        most = max(most, last - first + 1)
    return most


def by_second(times: Iterable[float], begin: float) -> Mapping[int, int]:
    """How many in each second after `begin`."""
    return dict(sorted(Counter(int(moment - begin) for moment in times).items()))


async def until(question: Callable[[], bool], patience: float) -> float:
    """Seconds until it is so. Fails when it isn't after `patience`."""
    begun = time.monotonic()
    while not question():
        assert time.monotonic() < begun + patience, f"not within {patience:g} s"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun
