"""What do the tests of this folder share? A server with a bit of everything, and what is asked of a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import os
import socket
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import meshlib_aiohttp
from aiohttp import web

import meshlib
from tests.support import (
    PYTHON,
    Request,
    Scripted,
    mesh_of,
    ok,
)

EXAMPLE = Path(__file__).parent.parent / "example.py"
# Other integrations have an `example` too.
PATH = os.pathsep.join([str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")])
MESHLIB = str(Path(PYTHON).parent / "meshlib")
# One endpoint after the other, so that each has its turn.
EACH = {"policy": "round_robin"}
# What the mesh says itself. It asks nobody before it sends a body.
HIDDEN = ("expect", "host", "x-mesh-deadline-ms", "traceparent", "tracestate", "date")


# ------------------------------------------------------------------------------------- a server with a bit of everything


async def echo(request: web.Request) -> web.Response:
    body = await request.read()
    boundary = request.headers.get("content-type", "").partition("boundary=")[2]
    headers = sorted((k.lower(), v) for k, v in request.headers.items() if k.lower() not in HIDDEN and "boundary" not in v)
    text = body.replace(boundary.encode(), b"boundary") if boundary else body
    found = {"method": request.method, "target": request.raw_path, "headers": headers, "sha": hashlib.sha256(text).hexdigest()}
    return web.json_response({**found, "size": len(body) if not boundary else 0})


async def cookies(request: web.Request) -> web.Response:
    answer = web.Response(status=302, headers={"location": "/echo"})
    answer.set_cookie("a", "1")
    answer.set_cookie("b", "two", path="/echo", httponly=True)
    answer.del_cookie("gone")
    return answer


async def go(request: web.Request) -> web.Response:
    return web.Response(status=int(request.match_info["status"]), headers={"location": request.query["to"]}, text="elsewhere")


async def status(request: web.Request) -> web.Response:
    headers = [("link", '</next>; rel="next"'), ("x-twice", "1"), ("x-twice", "2")]
    return web.Response(status=int(request.match_info["status"]), headers=headers, text="so it is")


async def packed(request: web.Request) -> web.Response:
    how = request.match_info["how"]
    text = b"packed " * 1000
    body = gzip.compress(text) if how == "gzip" else zlib.compress(text) if how == "deflate" else b"no gzip at all"
    return web.Response(body=body, headers={"content-encoding": "gzip" if how == "broken" else how}, content_type="text/plain")


async def chunks(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    for number in range(5):
        await answer.write(f"line {number}\n".encode())
        await asyncio.sleep(0)
    return answer


async def big(request: web.Request) -> web.Response:
    return web.Response(body=bytes(range(256)) * 4096)


async def typed(request: web.Request) -> web.Response:
    charset = request.match_info["charset"]
    return web.Response(body="grün".encode(charset), content_type="text/plain", charset=charset)


async def nothing(request: web.Request) -> web.Response:
    return web.Response(status=204)


async def talk(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=("chat",))
    await socket.prepare(request)
    async for message in socket:
        if message.type is aiohttp.WSMsgType.TEXT:
            await socket.send_str(message.data + " you said")
        else:
            await socket.send_bytes(message.data)
        if message.data == "bye":
            await socket.close(code=4000)
    return socket


@asynccontextmanager
async def everything() -> AsyncIterator[int]:
    app = web.Application(client_max_size=1 << 26)
    app.add_routes([web.get("/cookies", cookies), web.route("*", "/go/{status}", go), web.route("*", "/status/{status}", status)])
    app.add_routes([web.get("/packed/{how}", packed), web.get("/chunks", chunks), web.get("/big", big), web.get("/talk", talk)])
    app.add_routes([web.get("/typed/{charset}", typed), web.route("*", "/nothing", nothing), web.route("*", "/{rest:.*}", echo)])
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@asynccontextmanager
async def both(tmp_path: Path, **options: Any) -> AsyncIterator[Callable[[Callable[[Any, str], Awaitable[Any]]], Any]]:
    """Do something with a plain session and with one of the mesh, and give both results."""
    async with everything() as port:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [f"127.0.0.1:{port}"]}}}) as mesh:
            jar = aiohttp.CookieJar(unsafe=True)
            async with (
                aiohttp.ClientSession(cookie_jar=jar, **options) as plain,
                meshlib_aiohttp.session(mesh, **options) as ours,
            ):

                async def compare(do: Callable[[Any, str], Awaitable[Any]]) -> tuple[Any, Any]:
                    return await do(plain, f"http://127.0.0.1:{port}"), await do(ours, "http://orders")

                yield compare
            assert in_flight(mesh) == 0


def at(*servers: Scripted | str, **more: Any) -> dict[str, Any]:
    return {"orders": {"discover": {"static": [s if isinstance(s, str) else s.address for s in servers]}, **more}}


@contextmanager
def full() -> Iterator[str]:
    """The address of a listener that takes no more connections: to connect takes for ever."""
    with contextlib.ExitStack() as plugs:
        listener = plugs.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            plug = plugs.enter_context(socket.socket())
            plug.setblocking(False)
            plug.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def in_flight(mesh: meshlib.Mesh) -> int:
    return sum(row["in_flight"] for row in mesh.engine.stats(0.0))


async def settled(mesh: meshlib.Mesh) -> bool:
    """A call that is given up ends in the next turns of the loop."""
    for _ in range(100):
        if in_flight(mesh) == 0:
            return True
        await asyncio.sleep(0.01)
    return False


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


async def die(server: Scripted, request: Request) -> None:
    return None


async def counted(size: int) -> AsyncIterator[bytes]:
    for _ in range(size):
        yield b"0123456789" * 1000
        await asyncio.sleep(0)
