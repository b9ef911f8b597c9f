"""Does what is long or big pass through, with the policy on, and without being kept?

Twenty thousand messages of a WebSocket and an upload of 1 GiB, both with mutual TLS in mode enforce, and the memory of the server's
process is looked at from outside: where it was, where it is, and the most that it was meanwhile. And streams of events that last
forty times as long as the deadline of their route: the configuration has a seventy-fifth of the usual times, so that eight seconds stand for ten
minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from tests.chaos.inbound_server import RULES, Served, World, begin_peak, memory, peak, serving
from tests.support import free_port, write_config

# Not the blocking one: its two threads share a connection of Python's ssl, which may then lose what it has read.
client: Any = pytest.importorskip("websockets.asyncio.client")

MIB = 1024 * 1024

# What a process may have more than before. Buffers of the kernel, of the loop and of the allocator's making are within it; a
# message kept of each thousand would not be, nor two per cent of the upload.
FLAT = 16.0

MESSAGES = 20_000
UPLOAD = 1024 * MIB
PIECE = os.urandom(MIB)

# A seventy-fifth of the deadline and of stream_idle that are usual (15 s, 60 s), and of ten minutes.
DEADLINE, IDLE, LASTS = 0.2, 0.8, 8.0
EVERY = 0.2
COUNT = int(LASTS / EVERY)


@pytest.fixture(scope="module")
def enforcing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """uvicorn, for what is big."""
    world = World(tmp_path_factory.mktemp("world"))
    with serving(world, "uvicorn", world.write("enforce")) as served:
        yield served


@contextlib.contextmanager
def mesh_at(served: Served, **more: Any) -> Iterator[meshlib.Mesh]:
    """A mesh of the storefront that knows the server as `orders`."""
    folder = served.world.folder / "storefront"
    folder.mkdir(exist_ok=True)
    if not (folder / "identities").exists():
        (folder / "identities").symlink_to(served.world.folder / "identities")
    services = {"storefront": {}, "orders": {"discover": {"static": [served.address]}, **more}}
    mesh = meshlib.Mesh.load(write_config(folder, services, mode="enforce"), service="storefront")
    try:
        yield mesh
    finally:
        mesh.close()


def begun(served: Served) -> float:
    """The memory now; the peak counts from here."""
    (pid,) = served.pids()
    begin_peak(pid)
    return memory(pid)


def grown(served: Served, before: float) -> str:
    """How much more memory a process has and had at most than before, "" if that is nothing to speak of."""
    (pid,) = served.pids()
    after, most = memory(pid), peak(pid)
    found = f"{before:.1f} MiB before, {after:.1f} after, {most:.1f} at most"
    print(found)
    return "" if max(after, most) < before + FLAT else found


async def test_twenty_thousand_messages_pass_in_flat_memory(enforcing: Served) -> None:
    """Over one conversation with mutual TLS, and each comes back as it was sent."""
    tls = enforcing.world.tls()
    async with client.connect(f"wss://{enforcing.address}/echo", ssl=tls, proxy=None) as chat:
        await talk(chat, 2000)
        before = begun(enforcing)
        await talk(chat, MESSAGES)
        assert grown(enforcing, before) == ""
    assert enforcing.numbers(tls)["load"]["in_flight"] == 1
    assert enforcing.complaints() == []


async def talk(chat: Any, count: int) -> None:
    """A hundred are on their way at a time: one of 20 KB, and of the others every second is text."""
    for start in range(0, count, 100):
        sent = [PIECE[:20_000] if not n % 100 else (b"%d" % n if n % 2 else str(n)) for n in range(start, start + 100)]
        for message in sent:
            await chat.send(message)
        assert [await chat.recv() for _ in sent] == sent


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield PIECE


async def upload(mesh: meshlib.Mesh, size: int, target: str) -> Any:
    async with mesh.client() as http:
        answer = await http.post(f"http://orders{target}", content=pieces(size // MIB))
        assert answer.status_code == 200
        return answer.json()


async def uploaded_flat(served: Served, size: int) -> None:
    with mesh_at(served, deadline="60s") as mesh:
        await upload(mesh, 32 * MIB, "/upload")
        before, own = begun(served), memory(os.getpid())
        begin_peak(os.getpid())
        assert (await upload(mesh, size, "/upload?before=0.3"))["size"] == size
        assert grown(served, before) == ""
        # The client keeps nothing either.
        assert peak(os.getpid()) < own + 2 * FLAT
    assert served.complaints() == []


async def test_an_upload_of_a_gibibyte_passes_in_flat_memory(enforcing: Served) -> None:
    """From the mesh's own client with mutual TLS. The handler takes a moment before it reads, and nobody reads ahead for it."""
    await uploaded_flat(enforcing, UPLOAD)


async def test_an_upload_to_threads_passes_in_flat_memory(tmp_path: Path) -> None:
    """The same to gthread, a quarter as big."""
    world = World(tmp_path)
    with serving(world, "gthread", world.write("enforce")) as served:
        await uploaded_flat(served, UPLOAD // 4)


async def test_a_big_answer_passes_in_flat_memory(enforcing: Served) -> None:
    """256 MiB in pieces, each behind the one before, to a client that takes a moment now and then."""
    count, size = 4096, 64 * 1024
    with mesh_at(enforcing) as mesh:
        before = begun(enforcing)
        came, wanted, number = hashlib.sha256(), hashlib.sha256(), 0
        target = f"http://orders/parts?count={count}&size={size}&every=0"
        async with mesh.client() as http, http.stream("GET", target) as answer:
            async for piece in answer.aiter_raw():
                came.update(piece)
                number += 1
                await asyncio.sleep(0.01 if not number % 256 else 0)
        for number in range(count):
            wanted.update(b"%08d" % number * (size // 8))
        assert came.digest() == wanted.digest()
        assert grown(enforcing, before) == ""


@pytest.fixture(scope="module")
def ticking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, meshlib.Mesh]]:
    """The server `orders`, behind it `ticker` (uvicorn) and `threads` (gthread), and a mesh of the storefront that knows them all."""
    world = World(tmp_path_factory.mktemp("ticking"), "ticker", "threads")
    ports = {name: free_port() for name in ("orders", "ticker", "threads")}
    services = {name: {"secure": RULES, "discover": {"static": [f"127.0.0.1:{port}"]}} for name, port in ports.items()}
    config = world.write("enforce", services=services, deadline=f"{DEADLINE}s", stream_idle=f"{IDLE}s")
    with (
        serving(world, "uvicorn", config, service="ticker", port=ports["ticker"]),
        serving(world, "gthread", config, service="threads", port=ports["threads"]),
        serving(world, "uvicorn", config, port=ports["orders"]) as orders,
    ):
        mesh = meshlib.Mesh.load(config, service="storefront")
        try:
            yield orders, mesh
        finally:
            mesh.close()


async def warm(http: Any, *targets: str) -> None:
    """Until every hop has its connection: a first handshake may take longer than a seventy-fifth of the usual."""
    for target in targets:
        for _ in range(50):
            with contextlib.suppress(httpx.HTTPError):
                if (await http.get(target)).is_success:
                    break
            await asyncio.sleep(0.1)


SHORT = "count=1&every=0"


def events(count: int) -> str:
    return "".join(f"data: {number}\n\n" for number in range(count)) + "data: end\n\n"


@pytest.mark.slow
async def test_streams_of_events_outlive_every_deadline(ticking: tuple[Served, meshlib.Mesh]) -> None:
    """Forty times the deadline: of one server, through two hops of clients and servers of the mesh, and from threads to a thread."""
    orders, mesh = ticking
    paths = ("http://orders/events", "http://orders/relay", "http://threads/events")
    query = f"count={COUNT}&every={EVERY}"
    async with mesh.client() as http:
        await warm(http, *(f"{path}?{SHORT}" for path in paths))
        before = len(orders.complaints())

        async def whole(path: str) -> tuple[str, bool]:
            start = time.monotonic()
            async with http.stream("GET", f"{path}?{query}") as answer:
                text = "".join([piece async for piece in answer.aiter_text()])
            return text, time.monotonic() - start > 0.95 * LASTS

        def blocking() -> tuple[str, bool]:
            start = time.monotonic()
            with mesh.sync_client() as other, other.stream("GET", f"{paths[2]}?{query}") as answer:
                text = "".join(answer.iter_text())
            return text, time.monotonic() - start > 0.95 * LASTS

        found = await asyncio.gather(*map(whole, paths), asyncio.to_thread(blocking))
    assert [text for text, _ in found] == [events(COUNT)] * 4
    assert [is_long for _, is_long in found] == [True] * 4
    assert orders.complaints()[before:] == []


async def test_a_handler_may_ask_others_as_long_as_it_streams(ticking: tuple[Served, meshlib.Mesh]) -> None:
    """The caller's deadline was for the answer's head: an event whose making needs another service comes after it, too."""
    orders, mesh = ticking
    count = 12
    async with mesh.client() as http:
        await warm(http, f"http://orders/polls?{SHORT}")
        before = len(orders.complaints())
        async with http.stream("GET", f"http://orders/polls?count={count}&every=0.1") as answer:
            text = "".join([piece async for piece in answer.aiter_text()])
    assert text == events(count)
    assert orders.complaints()[before:] == []


async def test_a_stream_without_a_sign_of_life_is_cut(ticking: tuple[Served, meshlib.Mesh]) -> None:
    """After `stream_idle`, by its caller, who is told which setting it was."""
    orders, mesh = ticking
    async with mesh.client() as http:
        await warm(http, f"http://orders/events?{SHORT}")
        before = len(orders.complaints())
        start = time.monotonic()
        with pytest.raises(httpx.ReadTimeout) as caught:
            async with http.stream("GET", "http://orders/events?count=2&every=0&silence=30") as answer:
                first = [piece async for piece in answer.aiter_text()]
                raise AssertionError(f"it ended well: {first}")
        assert IDLE * 0.9 < time.monotonic() - start < IDLE * 4
        assert "stream_idle" in str(caught.value)
    assert orders.complaints()[before:] == []
