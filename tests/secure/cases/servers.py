"""Which real servers run in this process for a moment? uvicorn with each of its parsers, and hypercorn; each with the mesh's middleware."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import meshlib
from meshlib.server.door import door_of
from meshlib.server.drain import drain_of
from meshlib.server.serve import uvicorn_server, wrapped

KINDS = ("uvicorn-httptools", "uvicorn-h11", "hypercorn")


def kinds_of(word: str) -> list[str]:
    """The servers that a word may mean; all of them where it means none."""
    found = [kind for kind in KINDS if word and (word in kind or kind in word)]
    return found or list(KINDS)


@contextlib.asynccontextmanager
async def running(kind: str, mesh: meshlib.Mesh, application: Any) -> AsyncIterator[int]:
    """The port at which an ASGI application is served on this loop, behind the mesh."""
    sock = socket.create_server(("127.0.0.1", 0))
    port = int(sock.getsockname()[1])
    if kind == "hypercorn":
        task, stop = _hypercorn(sock, mesh.asgi(application))
    else:
        task, stop = _uvicorn(kind, sock, mesh, application)
    try:
        await _listening(port)
        yield port
    finally:
        stop()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(task, 5)
        sock.close()


def _uvicorn(kind: str, sock: socket.socket, mesh: meshlib.Mesh, application: Any) -> tuple[asyncio.Task[Any], Any]:
    from uvicorn.protocols.http.h11_impl import H11Protocol
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from meshlib.server.uvicorn import MeshHTTP

    door = door_of(mesh)
    # The server before it, for the same mesh, has ended.
    drain_of(mesh).renew()
    http = MeshHTTP.behind(door, H11Protocol if kind.endswith("h11") else HttpToolsProtocol)
    server = uvicorn_server(
        wrapped(mesh, application, is_asgi=True), door, http=http, loop="asyncio", lifespan="off", log_level="error"
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]

    def stop() -> None:
        server.should_exit = server.force_exit = True

    return asyncio.create_task(server.serve(sockets=[sock])), stop


def _hypercorn(sock: socket.socket, application: Any) -> tuple[asyncio.Task[Any], Any]:
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"fd://{sock.fileno()}"]
    config.errorlog = None
    config.graceful_timeout = 0.1
    ended = asyncio.Event()
    task = asyncio.create_task(serve(application, config, shutdown_trigger=ended.wait))
    return task, ended.set


async def _listening(port: int) -> None:
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.01)
            continue
        writer.close()
        return
    raise AssertionError("the server does not listen")
