"""What do the servers of the inbound chaos tests serve?

The same once as ASGI and once as WSGI: uploads that are counted, streams of events, work that takes a time, work that asks another
service (`elsewhere`), and `/numbers`, which tells what is held at the moment. The mesh is the one that `meshlib serve` has loaded.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from typing import Any
from urllib.parse import parse_qsl

import meshlib
from meshlib.server import door

# How the work of /ask and /busy ended, by the name of its route.
ends: Counter[str] = Counter()

_client: Any = None


def mesh() -> Any:
    return door.latest().mesh


def numbers() -> dict[str, Any]:
    """What this process holds; the call that asks is among it."""
    try:
        tasks = len(asyncio.all_tasks())
    except RuntimeError:
        tasks = 0  # no loop
    return {"load": mesh().gate.load(), "tasks": tasks, "threads": threading.active_count(), "ends": dict(ends)}


def http() -> Any:
    """One client for the process."""
    global _client
    if _client is None:
        _client = mesh().client()
    return _client


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await _echo(receive, send)
        return
    query = dict(parse_qsl(scope["query_string"].decode()))
    _, route, *rest = scope["path"].split("/")
    if route == "events":
        await _events(send, query)
    elif route == "relay":
        await _relay(send, scope["query_string"].decode())
    elif route == "polls":
        await _polls(send, query)
    elif route == "parts":
        await _parts(send, query)
    else:
        await asyncio.sleep(float(query.get("before", 0)))
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        found: Any = {"size": size, "left": meshlib.remaining()}
        if route == "numbers":
            found = numbers()
        elif route in ("ask", "stop", "keep"):
            found["asked"] = await _ask(route, "/".join(rest), query)
        else:
            await asyncio.sleep(float(query.get("seconds", 0)))
        await _answer(send, found)


async def _answer(send: Any, found: Any) -> None:
    body = json.dumps(found).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _ask(route: str, rest: str, query: dict[str, str]) -> int:
    """Another service, on the caller's behalf. How that ended is noted."""
    try:
        answer = await http().request(query.get("method", "GET"), f"http://elsewhere/{rest}")
    except BaseException as error:
        ends[f"{route} {type(error).__name__}"] += 1
        raise
    ends[f"{route} done"] += 1
    return int(answer.status_code)


async def _events(send: Any, query: dict[str, str]) -> None:
    """So many events, one `every` so many seconds; then `silence`."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(int(query["count"])):
        await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
        await asyncio.sleep(float(query["every"]))
    await asyncio.sleep(float(query.get("silence", 0)))
    await send({"type": "http.response.body", "body": b"data: end\n\n"})


async def _relay(send: Any, query: str) -> None:
    """The events of another service, as they come."""
    async with http().stream("GET", f"http://ticker/events?{query}") as answer:
        await send(
            {"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", b"text/event-stream")]}
        )
        async for piece in answer.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _polls(send: Any, query: dict[str, str]) -> None:
    """As events, but each is the answer of another service that is asked for it."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(int(query["count"])):
        answer = await http().get(f"http://ticker/busy?{number}")
        await send(
            {"type": "http.response.body", "body": b"data: %d\n\n" % (number if answer.is_success else -1), "more_body": True}
        )
        await asyncio.sleep(float(query["every"]))
    await send({"type": "http.response.body", "body": b"data: end\n\n"})


async def _parts(send: Any, query: dict[str, str]) -> None:
    """An answer in pieces, with a moment between them."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    for number in range(int(query["count"])):
        await send({"type": "http.response.body", "body": part(number, query), "more_body": True})
        await asyncio.sleep(float(query["every"]))
    await send({"type": "http.response.body", "body": b""})


def part(number: int, query: dict[str, str]) -> bytes:
    """Each is another: what is lost or comes twice shows."""
    return b"%08d" % number * (int(query["size"]) // 8)


async def _echo(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
    query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
    route = environ["PATH_INFO"].split("/")[1]
    if route in ("events", "parts"):
        start_response("200 OK", [("Content-Type", "text/event-stream" if route == "events" else "text/plain")])
        return _pieces(route, query)
    time.sleep(float(query.get("before", 0)))
    size = 0
    while piece := environ["wsgi.input"].read(65536):
        size += len(piece)
    time.sleep(float(query.get("seconds", 0)))
    body = json.dumps(numbers() if route == "numbers" else {"size": size, "left": meshlib.remaining()}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _pieces(route: str, query: dict[str, str]) -> Any:
    for number in range(int(query["count"])):
        yield b"data: %d\n\n" % number if route == "events" else part(number, query)
        time.sleep(float(query["every"]))
    if route == "events":
        time.sleep(float(query.get("silence", 0)))
        yield b"data: end\n\n"
