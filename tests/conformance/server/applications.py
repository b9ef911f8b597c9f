"""What do the conformance tests serve? The same behaviours, once as ASGI and once as WSGI; each answers with what it saw, as JSON."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import meshlib
from meshlib.server.door import door_of

MESH: Any = None  # the mesh of this process, set by host.py


def seen(path: str, raw: str, query: str, method: str, scheme: str, headers: dict[str, str], tls: Any) -> dict[str, Any]:
    peer = meshlib.peer()
    return {
        "path": path,
        "raw": raw,
        "query": query,
        "method": method,
        "scheme": scheme,
        "headers": headers,
        "tls": tls,
        "peer": peer.spiffe_id if peer is not None else None,
        "serial": peer.serial if peer is not None else None,
        "left": meshlib.remaining(),
    }


def numbers() -> dict[str, Any]:
    door = door_of(MESH)
    return {
        "gate": MESH.gate.stats(),
        "door": {name: getattr(door, name) for name in ("handshakes", "resumed", "failed", "plain", "refused")},
    }


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] == "websocket":
        await _chat(scope, receive, send)
        return
    path = scope["path"]
    if path == "/boom":
        raise RuntimeError("boom")
    if path == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        for index in range(50):
            await send({"type": "http.response.body", "body": b"%02d" % index * 500, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    if path == "/half":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("boom")
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    if path == "/slow":
        await asyncio.sleep(float(scope["query_string"] or 1))
    found: dict[str, Any]
    if path == "/numbers":
        found = numbers()
    else:
        tls = {
            name: value for name, value in (scope.get("extensions") or {}).get("tls", {}).items() if isinstance(value, str | int)
        }
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        raw, query = scope["raw_path"].decode(), scope["query_string"].decode()
        found = {**seen(path, raw, query, scope["method"], scope["scheme"], headers, tls), "size": size}
    body = json.dumps(found).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _chat(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    peer = meshlib.peer()
    await send({"type": "websocket.send", "text": json.dumps({"path": scope["path"], "peer": peer.spiffe_id if peer else None})})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        await send({"type": "websocket.send", "text": message.get("text"), "bytes": message.get("bytes")})


def wsgi(environ: dict[str, Any], start_response: Any) -> Any:
    path = environ["PATH_INFO"].encode("latin-1").decode()
    if path == "/boom":
        raise RuntimeError("boom")
    if path in ("/stream", "/half"):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return _pieces(path == "/half")
    size = 0
    while piece := environ["wsgi.input"].read(65536):
        size += len(piece)
    query = environ.get("QUERY_STRING", "")
    if path == "/slow":
        time.sleep(float(query or 1))
    found: dict[str, Any]
    if path == "/numbers":
        found = numbers()
    else:
        headers = {key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key.startswith("HTTP_")}
        tls = {key: value for key, value in environ.items() if key.startswith("SSL_")}
        raw = environ["RAW_URI"].partition("?")[0]
        found = {**seen(path, raw, query, environ["REQUEST_METHOD"], environ["wsgi.url_scheme"], headers, tls), "size": size}
    body = json.dumps(found).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def _pieces(is_broken: bool) -> Any:
    if is_broken:
        yield b"half"
        raise RuntimeError("boom")
    for index in range(50):
        yield b"%02d" % index * 500
