"""What is served with Flask and `meshlib_flask`?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, g, request, stream_with_context
from meshlib_flask import MeshFlask, peer_required
from werkzeug.urls import iri_to_uri

import meshlib
from tests.conformance.server.served import common
from tests.conformance.server.served.bare_wsgi import in_thread
from tests.conformance.server.served.common import Body

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


def made(mesh: Any) -> Any:
    app = Flask("conformance")
    handlers = (boom, half, stream, paced, big, numbers, note, late, pieces, ignore, empty, thread, slow, hold, mine, sync)
    for handler in handlers:
        app.add_url_rule(f"/{handler.__name__}", view_func=handler, methods=METHODS, provide_automatic_options=False)
    app.add_url_rule("/items/<number>", "items", items, methods=METHODS, provide_automatic_options=False)
    app.add_url_rule("/", "root", rest, methods=METHODS, provide_automatic_options=False)
    app.add_url_rule("/<path:rest>", "rest", rest, methods=METHODS, provide_automatic_options=False)
    MeshFlask(app, mesh)
    return app


def seen(handler: str, body: Body | None = None) -> dict[str, Any]:
    environ, path = request.environ, request.path
    decoded = {"request.path": path, "PATH_INFO": environ["PATH_INFO"].encode("latin-1").decode()}
    quoted = {key: environ[key] for key in ("RAW_URI", "REQUEST_URI") if key in environ}
    if not {"?", "%"} & set(path):
        # Werkzeug writes these for people: decoded where that is possible, so that a path with such a sign can't be told from another.
        decoded |= {"full_path": common.path_in(request.full_path)}
        quoted |= {"url": iri_to_uri(request.url), "base_url": iri_to_uri(request.base_url)}
    return common.seen(
        handler=handler,
        path=path,
        decoded=decoded,
        quoted=quoted,
        query=request.query_string.decode(),
        method=request.method,
        scheme=request.scheme,
        headers=list(request.headers.items()),
        body=body or Body(request.get_data()),
        tls=common.tls_keys(environ),
        own=g.peer.spiffe_id if g.peer else "",
    )


def items(number: str) -> dict[str, Any]:
    return seen("items")


def rest(rest: str = "") -> dict[str, Any]:
    return seen("rest")


async def sync() -> dict[str, Any]:
    # A coroutine: Flask runs it in a loop of its own.
    return seen("rest")


def boom() -> Response:
    raise RuntimeError("boom")


def half() -> Response:
    return Response(stream_with_context(common.half_blocking()))


def stream() -> Response:
    return Response(iter(common.PIECES), mimetype="text/plain")


def paced() -> Response:
    return Response(common.paced_blocking(request.query_string.decode()))


def big() -> Response:
    return Response(common.BIG)


def numbers() -> dict[str, Any]:
    return common.numbers()


def note() -> Any:
    from flask import jsonify

    return jsonify(common.NOTES.pop() if common.NOTES else None)


def late() -> Response:
    from flask import jsonify

    response = jsonify({"left": meshlib.remaining()})
    response.call_on_close(lambda: common.NOTES.append(common.known()))
    return response


def pieces() -> dict[str, Any]:
    body = Body()
    for piece in _read():
        body.add(piece)
        if body.pieces == 1:
            common.mark(request.query_string.decode())
    return {"size": body.size, "pieces": body.pieces}


def _read() -> Iterator[bytes]:
    while piece := request.stream.read(1024):
        yield piece


def ignore() -> dict[str, Any]:
    return {"is_ignored": True}


def empty() -> tuple[str, int]:
    return "", 204


def thread() -> dict[str, Any]:
    found: dict[str, Any] = in_thread(common.known)
    return found


def slow() -> dict[str, Any]:
    time.sleep(float(request.query_string or 1))
    return seen("rest")


def hold() -> dict[str, Any]:
    common.until_let_go_blocking(request.query_string.decode())
    return seen("rest")


@peer_required
def mine() -> str:
    spiffe_id: str = g.peer.spiffe_id
    return spiffe_id
