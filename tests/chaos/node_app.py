"""What do the services of the two nodes serve? Who called them: `<node> <SPIFFE ID> <serial>`, at once or after `?wait=` seconds.

They know nothing of TLS: an ordinary server at a UNIX socket, whose calls the node's agent hands over. `uvicorn --factory
tests.chaos.node_app:asgi --uds PATH`, or `python -m tests.chaos.node_app PATH` for gRPC; mesh.yaml and service are those of
MESHLIB_CONFIG and MESHLIB_SERVICE, and NODE is what the node is called.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any
from urllib.parse import parse_qsl

import meshlib

WHO = "/test.Stock/Who"


def told() -> bytes:
    caller = meshlib.peer()
    return f"{os.environ['NODE']} {caller.spiffe_id or '-'} {caller.serial or '-'}".encode() if caller else b"- - -"


async def plain(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    wait = dict(parse_qsl(scope["query_string"].decode())).get("wait")
    if wait:
        await asyncio.sleep(float(wait))
    body = told()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def asgi() -> Any:
    return meshlib.Mesh.load().asgi(plain)


async def who(request: bytes, context: Any) -> bytes:
    if request:
        await asyncio.sleep(float(request))
    return told()


async def main(path: str) -> None:
    import grpc.aio

    mesh = meshlib.Mesh.load()
    server = grpc.aio.server(interceptors=list(mesh.grpc_server_interceptors()))
    methods = {"Who": grpc.unary_unary_rpc_method_handler(who)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Stock", methods),))
    mesh.add_grpc_port(server, f"unix:{path}")
    await mesh.serve_grpc(server)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
