"""What does a caller cost an event loop who sends or reads a byte a second? A place, as long as there are enough. Real sockets, short times."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from meshlib.server import head
from meshlib.server.asgi import MeshASGI
from meshlib.server.line import Line
from tests.server.inside import way

PROTOCOLS = ["uvicorn.protocols.http.httptools_impl:HttpToolsProtocol", "uvicorn.protocols.http.h11_impl:H11Protocol"]


async def read(scope: Any, receive: Any, send: Any) -> None:
    """Waits for the whole body; /big answers with more than any buffer holds."""
    while (await receive()).get("more_body"):
        pass
    body = b"x" * 64_000_000 if scope["path"] == "/big" else b"done"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    for begin in range(0, len(body), 1_000_000):
        piece = body[begin : begin + 1_000_000]
        await send({"type": "http.response.body", "body": piece, "more_body": begin + len(piece) < len(body)})


@contextlib.asynccontextmanager
async def served(http: str, in_flight: int) -> AsyncIterator[tuple[int, Any]]:
    inbound = way(mode="observe", in_flight=in_flight)
    mesh = MeshASGI(read, inbound)
    module, _, name = http.partition(":")
    kind = head.bounded(getattr(importlib.import_module(module), name))

    def made() -> Any:
        line = Line(is_ours=True)
        config = Config(partial(mesh.serve, line), interface="asgi3", log_config=None)
        config.load()
        protocol = kind(config=config, server_state=ServerState(), app_state={})
        protocol.line = line
        return protocol

    server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], inbound
    finally:
        server.close()


async def drip(port: int, seconds: float) -> bytes:
    """An upload of a byte every 10 ms, until it is answered, cut or told to stop."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.create_task(reader.read(65536))
    try:
        writer.write(b"POST /up HTTP/1.1\r\nhost: orders\r\ncontent-length: 1000\r\n\r\n")
        for _ in range(int(seconds * 100)):
            writer.write(b"x")
            await asyncio.wait({answer}, timeout=0.01)
            if answer.done():
                return answer.result()
        return b"alive"
    except ConnectionError:
        return b""
    finally:
        answer.cancel()
        writer.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PACE", 0.1)


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_where_places_are_scarce_a_slow_body_is_cut(http: str) -> None:
    """Half of them are taken: whoever is slower than the least rate gives the place back."""
    async with served(http, 2) as (port, inbound):
        # 100 bytes a second are less than 500.
        assert await drip(port, 3) == b""
        while inbound.gate.load()["in_flight"]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_where_there_is_room_a_slow_body_is_waited_for(http: str) -> None:
    """A stream with pauses is no attack."""
    async with served(http, 100) as (port, _):
        assert await drip(port, 0.7) == b"alive"


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_an_answer_that_nobody_reads_gives_its_place_back(http: str) -> None:
    """The same for what goes out, where it stands still."""
    async with served(http, 2) as (port, inbound):
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(b"GET /big HTTP/1.1\r\nhost: orders\r\n\r\n")
        while not inbound.gate.load()["in_flight"]:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            while inbound.gate.load()["in_flight"]:
                await asyncio.sleep(0.01)
        writer.close()


@pytest.mark.parametrize("http", PROTOCOLS)
async def test_a_quick_caller_is_never_cut(http: str) -> None:
    """However scarce places are."""
    async with served(http, 1) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(b"POST /up HTTP/1.1\r\nhost: orders\r\ncontent-length: 200000\r\n\r\n")
            for _ in range(20):
                writer.write(b"x" * 10_000)
                await asyncio.sleep(0.02)
            assert (await reader.readuntil(b"done")).startswith(b"HTTP/1.1 200")
        writer.close()
