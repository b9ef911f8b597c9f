"""What is served as ASGI without a framework?"""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import AsyncIterator
from typing import Any

import meshlib
from tests.conformance.server.served import common
from tests.conformance.server.served.common import Body

JSON = [(b"content-type", b"application/json")]


def made(mesh: Any) -> Any:
    return mesh.asgi(application)


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await _live(receive, send)
    elif scope["type"] == "websocket":
        await _chat(scope, receive, send)
    else:
        await _answer(scope, receive, send)


async def _live(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        is_end = message["type"] == "lifespan.shutdown"
        (common.set_down if is_end else common.rise)()
        await send({"type": message["type"] + ".complete"})
        if is_end:
            return


async def _answer(scope: Any, receive: Any, send: Any) -> None:
    path, query = scope["path"], scope["query_string"].decode()
    if path == "/boom":
        raise RuntimeError("boom")
    if path == "/ignore":
        await _send(send, {"is_ignored": True})
        return
    if path == "/empty":
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})
        return
    if path == "/stream":
        await _stream(send, common.each(common.PIECES))
        return
    if path == "/paced":
        await _stream(send, common.paced(query))
        return
    if path == "/half":
        await _stream(send, common.half())
        return
    if path == "/big":
        await _send(send, common.BIG)
        return
    body = Body()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the caller has gone")
        body.add(message.get("body", b""))
        more = message.get("more_body", False)
        if path == "/pieces" and body.pieces == 1 and more:
            common.mark(query)
    if path == "/numbers":
        await _send(send, common.numbers())
    elif path == "/note":
        await _send(send, common.NOTES.pop() if common.NOTES else None)
    elif path == "/pieces":
        await _send(send, {"size": body.size, "pieces": body.pieces})
    elif path == "/thread":
        run = contextvars.copy_context().run
        await _send(send, await asyncio.get_running_loop().run_in_executor(None, run, common.known))
    elif path == "/late":
        await _send(send, {"left": meshlib.remaining()})
        common.NOTES.append(common.known())
    else:
        if path == "/slow":
            await asyncio.sleep(float(query or 1))
        elif path == "/hold":
            await common.until_let_go(query)
        looked = asyncio.to_thread(_seen, scope, body) if path == "/sync" else _seen_here(scope, body)
        await _send(send, await looked)


async def _seen_here(scope: Any, body: Body) -> dict[str, Any]:
    return _seen(scope, body)


def _seen(scope: Any, body: Body) -> dict[str, Any]:
    path, raw = scope["path"], scope["raw_path"].decode()
    return common.seen(
        handler="items" if path.startswith("/items/") else "rest",
        path=path,
        decoded={"scope.path": path},
        quoted={"scope.raw_path": raw},
        query=scope["query_string"].decode(),
        method=scope["method"],
        scheme=scope["scheme"],
        headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]],
        body=body,
        tls=common.tls_extension(scope),
    )


async def _send(send: Any, content: Any) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [*JSON, (b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def _stream(send: Any, pieces: AsyncIterator[bytes]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _chat(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    path = scope["path"]
    if path == "/denied":
        await send({"type": "websocket.close", "code": 4003})
        return
    if path == "/denial":
        await send({"type": "websocket.http.response.start", "status": 418, "headers": [(b"x-why", b"teapot")]})
        await send({"type": "websocket.http.response.body", "body": b"no"})
        return
    offered = scope.get("subprotocols") or [None]
    await send({"type": "websocket.accept", "subprotocol": offered[0]})
    headers = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]]
    told = {"path": path, "query": scope["query_string"].decode(), "headers": headers, **common.known()}
    await send({"type": "websocket.send", "text": json.dumps(told)})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("text") == "bye":
            await send({"type": "websocket.close", "code": 4001, "reason": "as you wish"})
            return
        if message.get("text") == "boom":
            raise RuntimeError("boom")
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})
