"""How is one kind of server started for the cases? `python -m tests.secure.cases.path_host KIND PORT`.

The application has real routes, in Starlette or in Flask, and says which handler ran, and which path, headers and caller it saw. Before it
stands the mesh's middleware, once for each policy; which of them counts is a number in a file that the tests share with this process, so
that nothing of a request has to say it. Number 0 is no middleware at all. Who calls, and from where, is put where our own servers put it,
since these servers tell nobody whose certificate they saw; so is what else the policy's companion asks for (`<number>.json`): something
between the mesh and the application that changes paths.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import meshlib
from meshlib._native import core
from meshlib.call import Peer
from meshlib.config import load
from meshlib.server.asgi import MeshASGI
from meshlib.server.door import PEER
from meshlib.server.line import LINE, Line
from meshlib.server.way import InboundWay
from meshlib.server.wsgi import MeshWSGI

FOLDER = "PATH_HOST_FOLDER"
ASGI = ("uvicorn-h11", "uvicorn-httptools", "hypercorn", "granian")
WSGI = ("gunicorn", "waitress", "granian-wsgi")
KINDS = (*ASGI, *WSGI)
CALLER = "spiffe://td/caller"
ROUTES = ("/admin", "/admin/x", "/admin/", "/public", "/productpage", "/users/@me", "/caf\u00e9", "/administrator", "/")
# The policy under which the application is told of its start; it need not be there.
AT_START = "start"
METHODS = ["GET", "POST", "OPTIONS"]

# Whether the application was told of its start.
_is_started = False


def _told(path: str, raw: str, headers: list[tuple[str, str]], source: str) -> dict[str, Any]:
    """What a handler says of the call that it serves."""
    peer = meshlib.peer()
    return {
        "path": path,
        "raw_path": raw,
        "headers": headers,
        "peer": peer.spiffe_id if peer else None,
        "client": (meshlib.current_call() or {}).get("client") or source,
        "is_started": _is_started,
    }


def _starlette() -> Any:
    from contextlib import asynccontextmanager

    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        global _is_started
        _is_started = True
        yield

    def handler(name: str) -> Any:
        async def handle(request: Any) -> Any:
            scope = request.scope
            headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope["headers"]]
            source = (scope.get("client") or ("",))[0]
            told = _told(scope["path"], (scope.get("raw_path") or b"").decode("latin-1"), headers, source)
            return JSONResponse(told, headers={"x-reached": f"{name} {scope['path']!a}"})

        return handle

    listed = [Route(path, handler(path.encode().decode("latin-1")), methods=METHODS) for path in ROUTES]
    return Starlette(routes=[*listed, Route("/{rest:path}", handler("*"), methods=METHODS)], lifespan=lifespan)


def _flask() -> Any:
    from flask import Flask, Response, request

    app = Flask("paths")

    def handler(name: str) -> Any:
        def handle(**parts: str) -> Any:
            environ = request.environ
            seen = environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
            raw = str(environ.get("RAW_URI", "")).partition("?")[0]
            headers = [(key[5:].lower(), value) for key, value in environ.items() if key.startswith("HTTP_")]
            told = _told(seen, raw, headers, environ.get("REMOTE_ADDR", ""))
            return Response(json.dumps(told), headers={"x-reached": f"{name} {seen!a}"})

        handle.__name__ = f"handle{len(app.view_functions)}"
        return handle

    for path in ROUTES:
        app.add_url_rule(path, view_func=handler(path.encode().decode("latin-1")), methods=METHODS)
    app.add_url_rule("/<path:rest>", view_func=handler("*"), methods=METHODS)
    return app


def rewriter(given: dict[str, Any]) -> Callable[[str], str] | None:
    """What stands between the mesh and the application, and changes paths; None if nothing does."""
    prefix = given.get("strip_prefix", given.get("mount"))
    if isinstance(prefix, str):
        return lambda path: path.removeprefix(prefix) or "/"
    rewrite = given.get("rewrite", given.get("replace"))
    if isinstance(rewrite, str) and "->" in rewrite:
        pattern, _, to = (part.strip() for part in rewrite.partition("->"))
        template = re.sub(r"\$(\d)", r"\\\1", to)
        return lambda path: re.sub(f"^{pattern}$", template, path)
    if isinstance(given.get("add_prefix"), str):
        return lambda path: given["add_prefix"] + path
    return None


class Chosen:
    """The application behind one policy, called by one peer."""

    def __init__(self, folder: Path, number: str, *, is_asgi: bool) -> None:
        self.application = _starlette() if is_asgi else _flask()
        self.peer = Peer(CALLER, is_tls=True)
        self.source = ""
        file = folder / f"{number}.yaml"
        if not file.exists():
            return
        # A mesh's way in, without what it needs for its way out.
        gate = core.Gate()
        gate.publish(load(file, service="svc").server_plan(), 0.0)
        way = InboundWay(gate)
        beside = folder / f"{number}.json"
        said = json.loads(beside.read_text()) if beside.exists() else {}
        if said:
            self.peer, self.source = Peer(said["peer"], is_tls=said["is_tls"]), said["source"]
        rewrite = rewriter(said)
        if is_asgi:
            if rewrite is not None:
                self.application = _rewriting_asgi(MeshASGI(self.application, way), rewrite)
            self.application = MeshASGI(self.application, way)
        else:
            if rewrite is not None:
                self.application = _rewriting_wsgi(MeshWSGI(self.application, way), rewrite)
            self.application = MeshWSGI(self.application, way)


def _rewriting_asgi(inner: Any, rewrite: Callable[[str], str]) -> Any:
    async def outer(scope: Any, receive: Any, send: Any) -> None:
        path = rewrite(scope["path"])
        await inner({**scope, "path": path, "raw_path": quote(path).encode()}, receive, send)

    return outer


def _rewriting_wsgi(inner: Any, rewrite: Callable[[str], str]) -> Any:
    def outer(environ: dict[str, Any], start_response: Any) -> Any:
        path = rewrite(environ["PATH_INFO"])
        raw = {"RAW_URI": quote(path)} if "RAW_URI" in environ else {}
        return inner({**environ, "PATH_INFO": path, **raw}, start_response)

    return outer


class Choice:
    """What was made for each policy, and which of them counts now."""

    def __init__(self, *, is_asgi: bool) -> None:
        self._folder = Path(os.environ[FOLDER])
        self._is_asgi = is_asgi
        self._made: dict[str, Chosen] = {}
        with (self._folder / "policy").open("rb") as file:
            self._number = mmap.mmap(file.fileno(), 4, access=mmap.ACCESS_READ)

    def of(self, number: str) -> Chosen:
        chosen = self._made.get(number)
        if chosen is None:
            chosen = self._made[number] = Chosen(self._folder, number, is_asgi=self._is_asgi)
        return chosen

    @property
    def now(self) -> Chosen:
        return self.of(str(int.from_bytes(self._number[:4], "little")))


_choice: Choice | None = None


def _choose(*, is_asgi: bool) -> Choice:
    global _choice
    _choice = _choice or Choice(is_asgi=is_asgi)
    return _choice


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    choice = _choose(is_asgi=True)
    if scope["type"] == "lifespan":
        await choice.of(AT_START).application(scope, receive, send)
        return
    chosen = choice.now
    if chosen.source:
        scope["client"] = (chosen.source, 40000)
    scope[LINE] = Line(chosen.peer, (scope.get("client") or ("",))[0], 8443)
    await chosen.application(scope, receive, send)


def wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    chosen = _choose(is_asgi=False).now
    environ[PEER] = chosen.peer
    environ["wsgi.url_scheme"] = "https" if chosen.peer.is_tls else "http"
    if chosen.source:
        environ["REMOTE_ADDR"] = chosen.source
    return chosen.application(environ, start_response)  # type: ignore[no-any-return]


def main(kind: str, port: int) -> None:
    if kind.startswith("uvicorn"):
        import uvicorn

        uvicorn.run(asgi, port=port, http=kind.partition("-")[2], log_level="error", proxy_headers=False)
    elif kind == "hypercorn":
        import asyncio

        from hypercorn.asyncio import serve
        from hypercorn.config import Config

        config = Config()
        config.bind = [f"127.0.0.1:{port}"]
        asyncio.run(serve(asgi, config))
    elif kind.startswith("granian"):
        from granian import Granian
        from granian.constants import Interfaces

        interface, name = (Interfaces.WSGI, "wsgi") if kind.endswith("wsgi") else (Interfaces.ASGI, "asgi")
        Granian(
            f"tests.secure.cases.path_host:{name}", address="127.0.0.1", port=port, interface=interface, log_enabled=False
        ).serve()
    elif kind == "gunicorn":
        from gunicorn.app.base import BaseApplication

        class Application(BaseApplication):
            def load_config(self) -> None:
                self.cfg.set("bind", f"127.0.0.1:{port}")
                self.cfg.set("loglevel", "critical")

            def load(self) -> Any:
                return wsgi

        Application().run()
    else:
        from waitress import serve as wait

        wait(wsgi, host="127.0.0.1", port=port, threads=2)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
