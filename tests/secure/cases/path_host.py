"""How is one kind of server started for the cases on paths? `python -m tests.secure.cases.path_host KIND PORT`.

The application has real routes, in Starlette or in Flask, and says which handler ran and which path it saw. Before it stands the mesh's
middleware, once for each policy; which of them counts is a number in a file that the tests share with this process, so that nothing of a
request has to say it. Number 0 is no middleware at all. The identity of the caller is put where our own servers put it.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from meshlib._native import core
from meshlib.call import Peer
from meshlib.config import load
from meshlib.server.asgi import MeshASGI
from meshlib.server.door import PEER
from meshlib.server.way import InboundWay
from meshlib.server.wsgi import MeshWSGI

FOLDER = "PATH_HOST_FOLDER"
ASGI = ("uvicorn-h11", "uvicorn-httptools", "hypercorn", "granian")
WSGI = ("gunicorn", "waitress", "granian-wsgi")
KINDS = (*ASGI, *WSGI)
CALLER = Peer("spiffe://td/caller", is_tls=True)
ROUTES = ("/admin", "/admin/x", "/admin/", "/public", "/productpage", "/users/@me", "/caf\u00e9", "/administrator", "/")


def _starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def handler(name: str) -> Any:
        async def handle(request: Any) -> Any:
            seen = f"{name} {request.scope['path']!a}"
            return PlainTextResponse("reached", headers={"x-reached": seen})

        return handle

    listed = [Route(path, handler(path.encode().decode("latin-1"))) for path in ROUTES]
    return Starlette(routes=[*listed, Route("/{rest:path}", handler("*"), methods=["GET", "OPTIONS"])])


def _flask() -> Any:
    from flask import Flask, Response, request

    app = Flask("paths")

    def handler(name: str) -> Any:
        def handle(**parts: str) -> Any:
            seen = request.environ["PATH_INFO"].encode("latin-1").decode("utf-8", "replace")
            return Response("reached", headers={"x-reached": f"{name} {seen!a}"})

        handle.__name__ = f"handle{len(app.view_functions)}"
        return handle

    for path in ROUTES:
        app.add_url_rule(path, view_func=handler(path.encode().decode("latin-1")))
    app.add_url_rule("/<path:rest>", view_func=handler("*"))
    return app


class Chosen:
    """The application behind the policy that counts now."""

    def __init__(self, *, is_asgi: bool) -> None:
        folder = Path(os.environ[FOLDER])
        with (folder / "policy").open("rb") as file:
            self._number = mmap.mmap(file.fileno(), 4, access=mmap.ACCESS_READ)
        application = _starlette() if is_asgi else _flask()
        self._all: list[Any] = [application]
        for number in range(1, len(list(folder.glob("*.yaml"))) + 1):
            # A mesh's way in, without what it needs for its way out.
            gate = core.Gate()
            gate.publish(load(folder / f"{number}.yaml", service="svc").server_plan(), 0.0)
            way = InboundWay(gate)
            self._all.append(MeshASGI(application, way) if is_asgi else MeshWSGI(application, way))

    @property
    def now(self) -> Any:
        return self._all[int.from_bytes(self._number[:4], "little")]


_chosen: Chosen | None = None


def _app(*, is_asgi: bool) -> Any:
    global _chosen
    _chosen = _chosen or Chosen(is_asgi=is_asgi)
    return _chosen.now


async def asgi(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "http":
        scope["extensions"] = {**(scope.get("extensions") or {}), "tls": {PEER: CALLER}}
    await _app(is_asgi=True)(scope, receive, send)


def wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    environ[PEER] = CALLER
    return _app(is_asgi=False)(environ, start_response)  # type: ignore[no-any-return]


def main(kind: str, port: int) -> None:
    if kind.startswith("uvicorn"):
        import uvicorn

        uvicorn.run(asgi, port=port, http=kind.partition("-")[2], lifespan="off", log_level="error")
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

        interface, name = (Interfaces.WSGI, "wsgi") if kind.endswith("wsgi") else (Interfaces.ASGINL, "asgi")
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
