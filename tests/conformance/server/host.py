"""How is one kind of server started for the conformance tests? `python -m tests.conformance.server.host KIND CONFIG LISTEN`."""

from __future__ import annotations

import logging
import sys
from typing import Any

import meshlib
from meshlib.server.door import door_of
from meshlib.server.serve import bind, serve, uvicorn_server, wrapped
from meshlib.server.uvicorn import MeshHTTP
from tests.conformance.server import applications

ASGI = ("uvicorn-httptools", "uvicorn-h11", "gunicorn-uvicorn")
WSGI = ("gunicorn-gthread", "gunicorn-sync")
KINDS = (*ASGI, *WSGI)


def main(kind: str, config: str, listen: str) -> None:
    logging.basicConfig(level=logging.INFO)
    mesh = applications.MESH = meshlib.Mesh.load(config, service="orders")
    if kind == "uvicorn-h11":
        from uvicorn.protocols.http.h11_impl import H11Protocol

        door = door_of(mesh)
        options: dict[str, Any] = {"http": MeshHTTP.behind(door, H11Protocol), "loop": "asyncio"}
        uvicorn_server(wrapped(mesh, applications.asgi, is_asgi=True), door, **options).run(sockets=[bind(listen)])
    elif kind == "uvicorn-httptools":
        serve(mesh, applications.asgi, listen=listen)
    elif kind == "gunicorn-uvicorn":
        serve(mesh, applications.asgi, listen=listen, workers=2)
    else:
        serve(mesh, applications.wsgi, listen=listen, threads=8 if kind == "gunicorn-gthread" else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
