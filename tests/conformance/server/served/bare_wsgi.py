"""What is served as WSGI without a framework?"""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import meshlib
from tests.conformance.server.served import common
from tests.conformance.server.served.common import Body

TEXT = [("Content-Type", "text/plain")]


def made(mesh: Any) -> Any:
    return mesh.wsgi(application)


def application(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    path, query = path_of(environ), environ.get("QUERY_STRING", "")
    if path == "/boom":
        raise RuntimeError("boom")
    if path == "/ignore":
        return _send(start_response, {"is_ignored": True})
    if path == "/empty":
        start_response("204 No Content", [])
        return []
    if path in ("/stream", "/paced", "/half"):
        start_response("200 OK", TEXT)
        return {
            "/stream": lambda: iter(common.PIECES),
            "/paced": lambda: common.paced_blocking(query),
            "/half": common.half_blocking,
        }[path]()
    if path == "/big":
        return _send(start_response, common.BIG)
    body = Body()
    while piece := environ["wsgi.input"].read(65536 if path != "/pieces" else 1024):
        body.add(piece)
        if path == "/pieces" and body.pieces == 1:
            common.mark(query)
    if path == "/numbers":
        return _send(start_response, common.numbers())
    if path == "/note":
        return _send(start_response, common.NOTES.pop() if common.NOTES else None)
    if path == "/pieces":
        return _send(start_response, {"size": body.size, "pieces": body.pieces})
    if path == "/thread":
        return _send(start_response, in_thread(common.known))
    if path == "/late":
        return _Late(_send(start_response, {"left": meshlib.remaining()}))
    if path == "/slow":
        time.sleep(float(query or 1))
    elif path == "/hold":
        common.until_let_go_blocking(query)
    if path == "/sync":
        return _send(start_response, asyncio.run(_seen_async(environ, body)))
    return _send(start_response, _seen(environ, body))


def path_of(environ: dict[str, Any]) -> str:
    text: str = environ["PATH_INFO"]
    return text.encode("latin-1").decode()


def in_thread(work: Any) -> Any:
    """What a thread finds, to which the context was handed over."""
    found: list[Any] = []
    context = contextvars.copy_context()
    thread = threading.Thread(target=lambda: found.append(context.run(work)))
    thread.start()
    thread.join()
    return found[0]


async def _seen_async(environ: dict[str, Any], body: Body) -> dict[str, Any]:
    return _seen(environ, body)


def _seen(environ: dict[str, Any], body: Body) -> dict[str, Any]:
    path = path_of(environ)
    return common.seen(
        handler="items" if path.startswith("/items/") else "rest",
        path=path,
        decoded={"PATH_INFO": path},
        quoted={key: environ[key] for key in ("RAW_URI", "REQUEST_URI") if key in environ},
        query=environ.get("QUERY_STRING", ""),
        method=environ["REQUEST_METHOD"],
        scheme=environ["wsgi.url_scheme"],
        headers=common.key_headers(environ),
        body=body,
        tls=common.tls_keys(environ),
    )


def _send(start_response: Any, content: Any) -> list[bytes]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


class _Late:
    """A body behind which something is done, when it has been sent."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pieces)

    def close(self) -> None:
        common.NOTES.append(common.known())
