"""How does each client make the same call?

A function for each mode opens its client and gives a list of functions, one for each caller, that make the call and return its body.
Every client checks the certificate chain and a name: peers the DNS name of the SVID, the mesh its SPIFFE ID. Each is set up as is best
for it: aiohttp's limit of connections is lifted, while httpx's stays as it comes (it keeps 20 idle connections; to keep more makes
it three times slower at 64 callers, since it looks at each of them for each call). Runs in the worker's process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import ANSWER, SERVER_NAME
from .worker import drive, drive_in_turn, drive_threads, on_loop, spin

PATH = "/items/7"
Ask = Callable[[], Awaitable[bytes]]


@dataclass(frozen=True)
class Job:
    """Where to and as whom. `config` is the mesh's file, `identity` the folder with our SVID; both may be "".

    `steps` are those of `spin` that a caller does for each of its calls, half before and half after it.
    """

    mode: str
    loop: str
    count: int
    is_private: bool
    addresses: list[str]
    config: str
    identity: str
    path: str = PATH
    length: int = len(ANSWER)
    steps: int = 0

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def scheme(self) -> str:
        return "https" if self.is_private else "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}{self.path}"

    @property
    def mesh_url(self) -> str:
        return f"http://orders{self.path}"

    def tls(self) -> ssl.SSLContext | None:
        if not self.is_private:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(f"{self.identity}/bundle.pem")
        context.load_cert_chain(f"{self.identity}/svid.pem", f"{self.identity}/key.pem")
        return context


def tasks(seconds: float, **job: Any) -> dict[str, float]:
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with ASYNC[made.mode](made) as calls:
            return await drive([_working(call, made.steps) for call in calls], seconds, made.length)

    return on_loop(made.loop, main)


def added(seconds: float, **job: Any) -> dict[str, float]:
    """The CPU that a layer of the mesh takes for a call, above its bare wire client."""
    made = Job(**job)

    async def main() -> dict[str, float]:
        async with ASYNC[made.mode](made) as calls, meshlib_wire(made) as bare:
            return await drive_in_turn(calls, bare, seconds)

    return on_loop(made.loop, main)


def _working(call: Ask, steps: int) -> Ask:
    if not steps:
        return call

    async def work() -> bytes:
        spin(steps // 2)
        body = await call()
        spin(steps - steps // 2)
        return body

    return work


def threads(seconds: float, **job: Any) -> dict[str, float]:
    made = Job(**job)
    with BLOCKING[made.mode](made) as calls:
        return drive_threads(calls, seconds)


# --- the mesh, from the outside to the inside


@contextlib.contextmanager
def _mesh(job: Job) -> Iterator[Any]:
    import meshlib

    mesh = meshlib.Mesh.load(job.config, service="me")
    try:
        yield mesh
    finally:
        mesh.close()


@contextlib.asynccontextmanager
async def meshlib_client(job: Job) -> AsyncIterator[list[Ask]]:
    url = job.mesh_url
    with _mesh(job) as mesh:
        async with mesh.client() as http:

            async def ask() -> bytes:
                return (await http.get(url)).content  # type: ignore[no-any-return]

            yield [ask] * job.count


@contextlib.asynccontextmanager
async def meshlib_transport(job: Job) -> AsyncIterator[list[Ask]]:
    import httpx

    url = job.mesh_url
    with _mesh(job) as mesh:
        async with httpx.AsyncClient(transport=mesh.transport()) as http:

            async def ask() -> bytes:
                return (await http.get(url)).content

            yield [ask] * job.count


# What httpx sends by itself, so that the layers below it have as much to send.
HEADERS = [
    (b"Host", b"orders"),
    (b"Accept", b"*/*"),
    (b"Accept-Encoding", b"gzip, deflate"),
    (b"Connection", b"keep-alive"),
    (b"User-Agent", b"python-httpx/0.28.1"),
]


@contextlib.asynccontextmanager
async def meshlib_way(job: Job) -> AsyncIterator[list[Ask]]:
    """The whole mesh, without httpx."""
    from meshlib.client.loop import LoopCarriers

    with _mesh(job) as mesh:
        mesh.start()
        way, carriers = mesh.outbound, LoopCarriers()

        async def ask() -> bytes:
            answer = await way.send(carriers.current(), "orders", "GET", job.path, HEADERS)
            return answer.body  # type: ignore[no-any-return]

        yield [ask] * job.count
        carriers.close()


@contextlib.asynccontextmanager
async def meshlib_wire(job: Job) -> AsyncIterator[list[Ask]]:
    """The mesh's own pool and wire, without the mesh: no decision, no header, no record."""
    from meshlib.client.loop import LoopCarriers
    from meshlib.client.way import Attempt

    with _mesh(job) as mesh:
        carriers = LoopCarriers()
        identity, tls = "", None
        if job.is_private:
            identity, tls = mesh.config.identity_of("orders"), mesh.identity.client_tls
        addresses = itertools.cycle(job.addresses)

        async def ask() -> bytes:
            now = time.monotonic()
            attempt = Attempt(
                address=next(addresses),
                identity=identity,
                tls=tls,
                method="GET",
                target=job.path,
                headers=HEADERS,
                body=None,
                now=now,
                end=now + 15.0,
            )
            body = (await carriers.current().exchange(attempt))[4]
            if isinstance(body, bytes):
                return body
            # From a server that sends it apart from the head.
            pieces = []
            while piece := await body.read():
                pieces.append(piece)
            return b"".join(pieces)

        yield [ask] * job.count
        carriers.close()


@contextlib.contextmanager
def meshlib_sync(job: Job) -> Iterator[list[Callable[[], bytes]]]:
    url = job.mesh_url
    with _mesh(job) as mesh, mesh.sync_client() as http:
        yield [lambda: http.get(url).content] * job.count


# --- the peers


@contextlib.asynccontextmanager
async def httpx_client(job: Job) -> AsyncIterator[list[Ask]]:
    import httpx

    url = job.url
    extensions = {"sni_hostname": SERVER_NAME} if job.is_private else {}
    async with httpx.AsyncClient(verify=job.tls() or False) as http:

        async def ask() -> bytes:
            return (await http.get(url, extensions=extensions)).content

        yield [ask] * job.count


@contextlib.contextmanager
def httpx_sync(job: Job) -> Iterator[list[Callable[[], bytes]]]:
    import httpx

    url = job.url
    extensions = {"sni_hostname": SERVER_NAME} if job.is_private else {}
    with httpx.Client(verify=job.tls() or False) as http:
        yield [lambda: http.get(url, extensions=extensions).content] * job.count


@contextlib.asynccontextmanager
async def aiohttp_client(job: Job) -> AsyncIterator[list[Ask]]:
    import aiohttp

    url = job.url
    options: Any = {"server_hostname": SERVER_NAME} if job.is_private else {}
    connector = aiohttp.TCPConnector(limit=0, ssl=job.tls() or False)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def ask() -> bytes:
            async with http.get(url, **options) as answer:
                return await answer.read()

        yield [ask] * job.count


def _pyreqwest(job: Job, builder: Any) -> tuple[Any, str]:
    """It checks names and takes no other name than the URL's, but can be told where that name is."""
    if not job.is_private:
        return builder.build(), job.url
    folder = Path(job.identity)
    builder = builder.add_root_certificate_pem((folder / "bundle.pem").read_bytes())
    builder = builder.identity_pem((folder / "svid.pem").read_bytes() + (folder / "key.pem").read_bytes())
    return builder.resolve(SERVER_NAME, "127.0.0.1", job.port).build(), f"https://{SERVER_NAME}:{job.port}{job.path}"


@contextlib.asynccontextmanager
async def pyreqwest_client(job: Job) -> AsyncIterator[list[Ask]]:
    from pyreqwest.client import ClientBuilder

    client, url = _pyreqwest(job, ClientBuilder())
    async with client as http:

        async def ask() -> bytes:
            answer = await http.get(url).build().send()
            return bytes(await answer.bytes())

        yield [ask] * job.count


@contextlib.contextmanager
def pyreqwest_sync(job: Job) -> Iterator[list[Callable[[], bytes]]]:
    from pyreqwest.client import SyncClientBuilder

    client, url = _pyreqwest(job, SyncClientBuilder())
    with client as http:
        yield [lambda: bytes(http.get(url).build().send().bytes())] * job.count


@contextlib.asynccontextmanager
async def streams(job: Job) -> AsyncIterator[list[Ask]]:
    """No HTTP library at all: the least that Python code can do with the loop's own streams. A connection for each caller."""
    tls: Any = {"ssl": job.tls(), "server_hostname": SERVER_NAME} if job.is_private else {}
    lines = b"".join(b"%b: %b\r\n" % header for header in HEADERS)
    request = b"GET %b HTTP/1.1\r\n%b\r\n" % (job.path.encode(), lines)
    host, _, port = job.address.rpartition(":")
    # What was best for it: the usual buffer for one large body, and room for the whole of it where several come at once.
    limit = max(2**16, job.length) if job.count > 1 else 2**16

    async def caller() -> tuple[Ask, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(host, int(port), limit=limit, **tls)

        async def ask() -> bytes:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(head[:80].decode())
            begin = head.index(b"Content-Length: ") + 16
            return await reader.readexactly(int(head[begin : head.index(b"\r", begin)]))

        return ask, writer

    callers = [await caller() for _ in range(job.count)]
    yield [ask for ask, _ in callers]
    for _, writer in callers:
        writer.close()


ASYNC = {
    "meshlib": meshlib_client,
    "meshlib-transport": meshlib_transport,
    "meshlib-way": meshlib_way,
    "meshlib-wire": meshlib_wire,
    "httpx": httpx_client,
    "httpx-envoy-pair": httpx_client,
    "aiohttp": aiohttp_client,
    "pyreqwest": pyreqwest_client,
    "streams": streams,
}
BLOCKING = {"meshlib-sync": meshlib_sync, "httpx-sync": httpx_sync, "pyreqwest-sync": pyreqwest_sync}
