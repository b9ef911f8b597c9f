"""What do the servers of `test_handed_servers.py` serve? Who called, from where, and which headers came in; by ASGI, WSGI and gRPC."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import meshlib

mesh = meshlib.Mesh.load()


def _told(headers: list[str], address: str, port: Any) -> bytes:
    peer = meshlib.peer()
    found = "" if peer is None else peer.spiffe_id
    return json.dumps({"peer": found, "headers": headers, "address": address, "port": port}).encode()


async def plain(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    names = [name.decode() for name, _ in scope["headers"]]
    body = _told(names, scope["client"][0] if scope["client"] else "", scope["server"][1])
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def plain_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    names = [name[5:].replace("_", "-").lower() for name in environ if name.startswith("HTTP_")]
    body = _told(names, environ["REMOTE_ADDR"], int(environ["SERVER_PORT"] or 0))
    start_response("200 OK", [("content-length", str(len(body)))])
    return [body]


asgi = mesh.asgi(plain)
wsgi = mesh.wsgi(plain_wsgi)


def who(request: bytes, context: Any) -> bytes:
    return _told([key for key, _ in context.invocation_metadata()], "", 0)


async def who_aio(request: bytes, context: Any) -> bytes:
    return who(request, context)


def _grpc(path: str) -> None:
    import grpc

    server = grpc.server(ThreadPoolExecutor(4), interceptors=list(mesh.sync_grpc_server_interceptors()))
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", methods),))
    mesh.add_grpc_port(server, f"unix:{path}")
    mesh.sync_serve_grpc(server)


async def _grpc_aio(path: str) -> None:
    import grpc.aio

    server = grpc.aio.server(interceptors=list(mesh.grpc_server_interceptors()))
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who_aio)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Who", methods),))
    mesh.add_grpc_port(server, f"unix:{path}")
    await mesh.serve_grpc(server)


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        _grpc(sys.argv[2])
    else:
        import asyncio

        asyncio.run(_grpc_aio(sys.argv[2]))
