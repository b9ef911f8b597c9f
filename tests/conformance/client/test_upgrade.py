"""Is a connection the application's own after an Upgrade? httpx-ws runs unmodified, and `network_stream` does what httpcore documents."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpcore
import httpx
import httpx_ws
import pytest

import meshlib
from meshlib.client.faults import IDLE_TIMEOUT
from meshlib.client.upgraded import streams
from tests.conformance.client.caller import drive
from tests.conformance.client.shop import Shop
from tests.support import mesh_of

UPGRADE = {"connection": "upgrade", "upgrade": "raw"}


@contextlib.asynccontextmanager
async def raw() -> AsyncIterator[str]:
    """A server that changes to a protocol in which every line is answered with itself in capitals."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            if b"upgrade: raw" not in head.lower():
                writer.write(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 2\r\n\r\nno")
            else:
                # The first words of the new protocol come together with the head.
                writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\nwelcome\n")
                while line := await reader.readline():
                    if line == b"bye\n":
                        break
                    if line != b"silence\n":
                        writer.write(line.upper())
                        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def at(address: str) -> dict[str, Any]:
    return {"orders": {"discover": {"static": [address]}}}


async def test_the_stream_is_the_application_s(tmp_path: Path) -> None:
    """Read in any sizes, write, time out and go on, see the end."""
    async with raw() as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http, http.stream("GET", "http://orders/", headers=UPGRADE) as answer:
                assert answer.status_code == 101
                stream = answer.extensions["network_stream"]
                assert [await stream.read(3), await stream.read(100)] == [b"wel", b"come\n"]
                await stream.write(b"hello\n")
                assert await stream.read(100, timeout=5) == b"HELLO\n"
                await stream.write(b"silence\n")
                with pytest.raises(httpcore.ReadTimeout) as late:
                    await stream.read(100, timeout=0.05)
                assert isinstance(late.value, meshlib.AttemptTimeout) and late.value.reason == IDLE_TIMEOUT
                await stream.write(b"still here\n")
                assert await stream.read(100) == b"STILL HERE\n"
                assert stream.get_extra_info("server_addr") == ("127.0.0.1", int(address.rpartition(":")[2]))
                assert stream.get_extra_info("client_addr")[0] == "127.0.0.1"
                assert stream.get_extra_info("ssl_object") is None
                assert stream.get_extra_info("socket") is not None
                await stream.write(b"bye\n")
                assert await stream.read(100) == b""
                await stream.aclose()
            assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_the_blocking_stream_too(tmp_path: Path) -> None:
    """The same, on a thread."""

    def work(mesh: meshlib.Mesh) -> Any:
        with mesh.sync_client() as http, http.stream("GET", "http://orders/", headers=UPGRADE) as answer:
            stream = answer.extensions["network_stream"]
            heard = [stream.read(3), stream.read(100)]
            stream.write(b"hello\n")
            heard.append(stream.read(100))
            stream.write(b"bye\n")
            heard.append(stream.read(100))
            stream.close()
            return heard

    async with raw() as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            assert await asyncio.to_thread(work, mesh) == [b"wel", b"come\n", b"HELLO\n", b""]
            assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_one_thread_reads_while_another_writes(tmp_path: Path) -> None:
    """More than all buffers hold goes up and comes down: neither waits for the other, and at the end the socket is closed."""
    line = b"x" * 99_999 + b"\n"

    def work(mesh: meshlib.Mesh) -> Any:
        size = len(b"welcome\n")
        with mesh.sync_client() as http, http.stream("GET", "http://orders/", headers=UPGRADE) as answer:
            stream = answer.extensions["network_stream"]
            plug = stream.get_extra_info("socket")

            def say() -> None:
                for _ in range(200):
                    stream.write(line)
                stream.write(b"bye\n")

            with ThreadPoolExecutor(1) as pool:
                said = pool.submit(say)
                seen = 0
                while piece := stream.read(65_536, timeout=20):
                    seen += len(piece)
                said.result()
            return seen == size + 200 * len(line), plug.fileno(), stream.read(1, timeout=1)

    async with raw() as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            assert await asyncio.to_thread(work, mesh) == (True, -1, b"")
            assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_closing_wakes_the_thread_that_reads(tmp_path: Path) -> None:
    """It waits without a timeout, and the socket isn't closed under it."""

    def work(mesh: meshlib.Mesh) -> Any:
        with mesh.sync_client() as http, http.stream("GET", "http://orders/", headers=UPGRADE) as answer:
            stream = answer.extensions["network_stream"]
            plug = stream.get_extra_info("socket")
            assert stream.read(100) == b"welcome\n"
            with pytest.raises(httpcore.ReadTimeout):
                stream.read(100, timeout=0.01)
            begun = threading.Event()

            def listen() -> Any:
                begun.set()
                try:
                    return stream.read(100)
                except httpcore.ReadError:
                    return b""

            with ThreadPoolExecutor(1) as pool:
                heard = pool.submit(listen)
                begun.wait()
                stream.close()
                return heard.result(5), plug.fileno()

    async with raw() as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            assert await asyncio.to_thread(work, mesh) == (b"", -1)


async def test_an_open_body_s_stream_only_tells_of_the_connection(tmp_path: Path) -> None:
    """Its bytes are the response's."""
    async with raw() as address:
        with mesh_of(tmp_path, at(address)) as mesh:
            async with mesh.client() as http, http.stream("GET", "http://orders/") as answer:
                assert (answer.status_code, await answer.aread()) == (426, b"no")
                stream = answer.extensions.get("network_stream")
                if stream is not None:
                    with pytest.raises(RuntimeError, match="101"):
                        await stream.read(1)


@pytest.mark.parametrize("driver", ["asyncio", "uvloop"])
@pytest.mark.parametrize("security", ["plain", "mtls"])
def test_httpx_ws_runs_unmodified(tmp_path: Path, shop: Shop, driver: str, security: str) -> None:
    """Text, bytes, a large message, and a close from this side."""
    with shop.mesh(tmp_path, "uvicorn", security) as mesh:

        async def talk() -> None:
            async with mesh.client() as http, httpx_ws.aconnect_ws("http://orders/ws", http) as ws:
                await ws.send_text("hello")
                assert await ws.receive_text(timeout=5) == "hello"
                await ws.send_bytes(b"\x00" * 300_000)
                assert len(await ws.receive_bytes(timeout=5)) == 300_000
                for n in range(50):
                    await ws.send_json({"n": n})
                assert [(await ws.receive_json(timeout=5))["n"] for _ in range(50)] == list(range(50))

        drive(driver, talk)
        assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


@pytest.mark.parametrize("security", ["plain", "mtls"])
def test_blocking_httpx_ws_runs_unmodified(tmp_path: Path, shop: Shop, security: str) -> None:
    """It reads on a thread of its own while another writes."""
    with shop.mesh(tmp_path, "uvicorn", security) as mesh, mesh.sync_client() as http:
        with httpx_ws.connect_ws("http://orders/ws", http) as ws:
            ws.send_text("hello")
            assert ws.receive_text(timeout=5) == "hello"
            for n in range(50):
                ws.send_json({"n": n})
            assert [ws.receive_json(timeout=5)["n"] for _ in range(50)] == list(range(50))
        assert sum(row["in_flight"] for row in mesh.engine.stats(0.0)) == 0


async def test_a_refused_upgrade_is_an_ordinary_answer(tmp_path: Path, shop: Shop) -> None:
    """As httpx-ws tells it."""
    with mesh_of(tmp_path, at(shop.address)) as mesh:
        async with mesh.client() as http:
            with pytest.raises(httpx_ws.WebSocketUpgradeError):
                async with httpx_ws.aconnect_ws("http://orders/closed", http):
                    pass
            assert (await http.get("http://orders/echo")).status_code == 200


class Fake:
    """An upgraded answer, without a connection."""

    status = 101

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.stream = self
        self.written = b""
        self.is_closed = False

    async def read(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    async def write(self, data: bytes) -> None:
        self.written += data

    async def close(self) -> None:
        self.is_closed = True

    def info(self, name: str) -> Any:
        return struct.pack("!H", 1) if name == "ssl_object" else None


@pytest.mark.parametrize("core", [httpcore], ids=["httpcore"])
async def test_the_stream_is_of_httpcore_s_class(core: Any) -> None:
    """httpx-ws and others ask with isinstance; no byte is lost between two reads."""
    kinds = streams(core)
    fake = Fake(b"abcdef", b"gh")
    stream = kinds.AsyncStream(fake)
    assert isinstance(stream, core.AsyncNetworkStream)
    assert [await stream.read(4), await stream.read(1), await stream.read(9), await stream.read(9), await stream.read(9)] == [
        b"abcd",
        b"e",
        b"f",
        b"gh",
        b"",
    ]
    await stream.write(b"x")
    await stream.aclose()
    assert (fake.written, fake.is_closed) == (b"x", True)
    blocking = kinds.Stream(Fake(b"abcdef"))
    assert isinstance(blocking, core.NetworkStream)
    assert [blocking.read(4), blocking.read(4)] == [b"abcd", b"ef"]
    assert httpx.__version__
