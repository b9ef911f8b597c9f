"""What do the tests of this folder share? Servers in a thread, since requests blocks, and what is asked of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import meshlib
from tests.support import (
    PYTHON,
    Request,
    Scripted,
    ok,
)

EXAMPLE = Path(__file__).parent.parent / "example.py"
# Other integrations have an `example` too.
PATH = os.pathsep.join([str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")])
MESHLIB = str(Path(PYTHON).parent / "meshlib")
# One endpoint after the other, so that each has its turn.
EACH = {"policy": "round_robin"}
# A server with a bit of everything, for the comparison.
APP = """
import asyncio, gzip, hashlib, zlib
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

EVERY = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"]
HIDDEN = ("host", "x-mesh-deadline-ms", "traceparent", "tracestate")


async def echo(request):
    body = await request.body()
    headers = sorted((k, v) for k, v in request.headers.items() if k not in HIDDEN and "boundary" not in v)
    target = request.scope["raw_path"].decode() + "?" + request.scope["query_string"].decode()
    return JSONResponse({"method": request.method, "target": target, "headers": headers, "size": len(body),
                         "sha": hashlib.sha256(body).hexdigest() if b"boundary" not in body and b"--" not in body else ""})


async def form(request):
    boundary = request.headers["content-type"].partition("boundary=")[2]
    return PlainTextResponse((await request.body()).decode().replace(boundary, "boundary"))


async def cookies(request):
    answer = RedirectResponse("/echo", 302)
    answer.set_cookie("a", "1")
    answer.set_cookie("b", "two words", path="/echo", httponly=True)
    answer.delete_cookie("gone")
    return answer


async def go(request):
    return RedirectResponse(request.query_params["to"], int(request.path_params["status"]))


async def status(request):
    return PlainTextResponse("so it is", int(request.path_params["status"]), {"link": '</next>; rel="next"', "x-twice": "1"})


async def packed(request):
    text = b"packed " * 1000
    how = request.path_params["how"]
    body = gzip.compress(text) if how == "gzip" else zlib.compress(text) if how == "deflate" else b"no gzip at all"
    return Response(body, headers={"content-encoding": "gzip" if how == "broken" else how}, media_type="text/plain")


async def chunks(request):
    async def pieces():
        for n in range(5):
            yield f"line {n}\\nand ".encode()
            await asyncio.sleep(0)
    return StreamingResponse(pieces(), media_type="text/plain")


async def big(request):
    return Response(bytes(range(256)) * 4096, media_type="application/octet-stream")


async def typed(request):
    return Response("grün".encode(request.path_params["charset"]), media_type="text/plain; charset=" + request.path_params["charset"])


async def nothing(request):
    return Response(status_code=204)


async def digest(request):
    if not request.headers.get("authorization", "").startswith("Digest "):
        return Response("who?", 401, {"www-authenticate": 'Digest realm="r", nonce="n", qop="auth", algorithm=MD5'})
    return PlainTextResponse("welcome")


app = Starlette(routes=[
    Route("/form", form, methods=["POST"]), Route("/cookies", cookies), Route("/go/{status}", go, methods=EVERY),
    Route("/status/{status}", status), Route("/packed/{how}", packed), Route("/chunks", chunks), Route("/big", big),
    Route("/typed/{charset}", typed), Route("/nothing", nothing, methods=EVERY), Route("/digest", digest),
    Route("/{rest:path}", echo, methods=EVERY),
])
"""


@contextmanager
def serving(*answers: Callable[[Scripted, Request], Awaitable[bytes | None]]) -> Iterator[list[Scripted]]:
    """Scripted servers on a loop in a thread, for callers that block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers = [Scripted(answer) for answer in answers]
    try:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.start(), loop).result(10)
        yield servers
    finally:
        for server in servers:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


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


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


async def die(server: Scripted, request: Request) -> None:
    return None
