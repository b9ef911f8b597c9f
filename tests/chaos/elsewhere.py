"""How does a test get a peer that its own loop knows nothing of?

Servers here run on a loop of their own in a thread of their own, so that `asyncio.all_tasks()`, warnings and blocked callers of the
test are the client's alone. `elsewhere` answers HTTP by a function of the path, `listening` hands raw connections to a function,
`mute` takes connections and says nothing, `full` doesn't even take them. They hold no body and know nothing of the mesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from tests.support import Request, Scripted, identities

# The ports that were listened on here; the kernel gives none of them to a caller.
_ports: set[int] = set()

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.contextmanager
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()

    def work() -> None:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextlib.contextmanager
def elsewhere(
    answer: Callable[[Scripted, Request], Awaitable[bytes | None]], tls: ssl.SSLContext | None = None
) -> Iterator[Scripted]:
    """An HTTP/1.1 server whose every answer is a function of the request."""
    with _loop() as loop:
        server = Scripted(answer)
        asyncio.run_coroutine_threadsafe(server.start(ssl=tls), loop).result(10)
        _ports.add(server.port)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)


@contextlib.contextmanager
def listening(serve: Serve, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server below HTTP; yields its address."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client had enough, or the test is over
        finally:
            writer.transport.abort()

    with _loop() as loop:
        made: Any = asyncio.start_server(one, "127.0.0.1", 0, ssl=tls)
        server: asyncio.Server = asyncio.run_coroutine_threadsafe(made, loop).result(10)
        try:
            yield _address(server.sockets[0])
        finally:
            loop.call_soon_threadsafe(server.close)


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as plug:
        yield _address(plug)


@contextlib.contextmanager
def full() -> Iterator[str]:
    """A port whose backlog is full: a connect neither succeeds nor fails."""
    with contextlib.ExitStack() as stack:
        plug = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(plug.getsockname())
            _ports.add(filler.getsockname()[1])
        yield _address(plug)


def _address(plug: Any) -> str:
    port = plug.getsockname()[1]
    _ports.add(port)
    return f"127.0.0.1:{port}"


def tls_of(folder: Path) -> ssl.SSLContext:
    """What an endpoint `orders` proves itself with; makes the identities of `me` and `orders` in `folder`."""
    identities(folder, "me", "orders")
    own = folder / "identities" / "orders"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "svid.pem", own / "key.pem")
    context.load_verify_locations(own / "bundle.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def at(*addresses: str, **more: Any) -> dict[str, Any]:
    return {"orders": {"discover": {"static": list(addresses)}, **more}}


def in_flight(mesh: Any) -> int:
    """All permits that are out, of service and endpoints."""
    return sum(row["in_flight"] for row in mesh.engine.stats(time.monotonic()))


def sockets() -> int:
    """Open TCP sockets of this process that were made to call somebody, whatever has become of their connection."""
    return sum(_is_calling(int(name)) for name in os.listdir("/proc/self/fd"))


def _is_calling(number: int) -> bool:
    try:
        if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
            return False
        with socket.socket(fileno=os.dup(number)) as plug:
            if plug.family != socket.AF_INET or plug.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return False
            # Those of the servers here, which share the process, have the port that was listened on.
            return plug.getsockname()[1] not in _ports
    except OSError:
        return False  # closed meanwhile
