"""What is served with Starlette? The routes of FastAPI's application are these, too: it is Starlette underneath, with dependencies."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import meshlib
from tests.conformance.server.served import common
from tests.conformance.server.served.common import Body

# Without HEAD, which Starlette adds to GET, and which FastAPI leaves to whoever asks for it.
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def made(mesh: Any) -> Any:
    return mesh.asgi(Starlette(routes=routes(), lifespan=lifespan))


@contextlib.asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    common.rise()
    yield
    common.set_down()


def routes() -> list[Any]:
    handlers = {
        "/boom": boom, "/half": half, "/stream": stream, "/paced": paced, "/big": big, "/numbers": numbers, "/note": note, "/late": late,
        "/pieces": pieces, "/ignore": ignore, "/empty": empty, "/thread": thread, "/slow": slow, "/hold": hold,
    }  # fmt: skip
    found: list[Any] = [Route(path, handler, methods=METHODS) for path, handler in handlers.items()]
    found.append(Route("/sync", sync, methods=METHODS))
    found.append(Route("/items/{number}", items, methods=METHODS))
    found.append(WebSocketRoute("/chat", chat))
    found.append(WebSocketRoute("/denied", denied))
    found.append(WebSocketRoute("/denial", denial))
    found.append(Route("/{rest:path}", rest, methods=METHODS))
    return found


def seen(request: Request, handler: str, body: bytes = b"", own: str | None = None) -> dict[str, Any]:
    path = request.scope["path"]
    decoded = {"scope.path": path}
    if "?" not in path:
        # Starlette writes the decoded path into the URL, and then takes a question mark in it for the beginning of the query.
        decoded |= {"url": common.path_in(str(request.url)), "url.path": request.url.path}
    return common.seen(
        handler=handler,
        path=path,
        decoded=decoded,
        quoted={"scope.raw_path": request.scope["raw_path"].decode()},
        query=request.url.query,
        method=request.method,
        scheme=request.url.scheme,
        headers=list(request.headers.items()),
        body=Body(body),
        tls=common.tls_extension(request.scope),
        own=own,
    )


async def items(request: Request) -> Response:
    return JSONResponse(seen(request, "items", await request.body()))


async def rest(request: Request) -> Response:
    return JSONResponse(seen(request, "rest", await request.body()))


def sync(request: Request) -> Response:
    # In a thread of Starlette's pool.
    return JSONResponse(seen(request, "rest"))


async def boom(request: Request) -> Response:
    raise RuntimeError("boom")


async def half(request: Request) -> Response:
    return StreamingResponse(common.half())


async def stream(request: Request) -> Response:
    return StreamingResponse(iter(common.PIECES), media_type="text/plain")


async def paced(request: Request) -> Response:
    return StreamingResponse(common.paced(request.url.query))


async def big(request: Request) -> Response:
    return Response(common.BIG)


async def numbers(request: Request) -> Response:
    return JSONResponse(common.numbers())


async def note(request: Request) -> Response:
    return JSONResponse(common.NOTES.pop() if common.NOTES else None)


async def late(request: Request) -> Response:
    return JSONResponse({"left": meshlib.remaining()}, background=BackgroundTask(lambda: common.NOTES.append(common.known())))


async def pieces(request: Request) -> Response:
    body = Body()
    async for piece in request.stream():
        body.add(piece)
        if body.pieces == 1:
            common.mark(request.url.query)
    return JSONResponse({"size": body.size, "pieces": body.pieces})


async def ignore(request: Request) -> Response:
    return JSONResponse({"is_ignored": True})


async def empty(request: Request) -> Response:
    return Response(status_code=204)


async def thread(request: Request) -> Response:
    run = contextvars.copy_context().run
    return JSONResponse(await asyncio.get_running_loop().run_in_executor(None, run, common.known))


async def slow(request: Request) -> Response:
    await asyncio.sleep(float(request.url.query or 1))
    return JSONResponse(seen(request, "rest"))


async def hold(request: Request) -> Response:
    await common.until_let_go(request.url.query)
    return JSONResponse(seen(request, "rest"))


async def chat(socket: WebSocket) -> None:
    offered = socket.scope.get("subprotocols") or [None]
    await socket.accept(subprotocol=offered[0])
    headers = [list(pair) for pair in socket.headers.items()]
    await socket.send_json({"path": socket.url.path, "query": socket.url.query, "headers": headers, **common.known()})
    with contextlib.suppress(WebSocketDisconnect):
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if message.get("text") == "bye":
                await socket.close(4001, "as you wish")
                return
            if message.get("text") == "boom":
                raise RuntimeError("boom")
            if message.get("text") is not None:
                await socket.send_text(message["text"])
            else:
                await socket.send_bytes(message["bytes"])


async def denied(socket: WebSocket) -> None:
    await socket.close(4003)


async def denial(socket: WebSocket) -> None:
    await socket.send_denial_response(Response("no", 418, {"x-why": "teapot"}))
