"""What does a gRPC service look like in the mesh?

A `grpc.aio` server with one method, `/shop.Inventory/Reserve`, and two additions: the mesh's interceptors, which
authorise and measure, and the mesh's port, which speaks mutual TLS. Messages are JSON instead of protobuf, so that
the example needs no generated code; gRPC itself doesn't mind. Stock is kept in memory for each process: this is no
lesson in databases. A reservation is known by its purchase, so a repeated one changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import grpc
import grpc.aio

import meshlib

METHOD = "/shop.Inventory/Reserve"
reserved: dict[str, int] = {}


async def reserve(request: dict[str, Any], context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, Any]:
    if request["item"] < 0:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"no item {request['item']}")
    reserved[request["purchase"]] = request["item"]
    return {"item": request["item"], "reservations": len(reserved)}


def to_bytes(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


async def main() -> None:
    mesh = meshlib.Mesh.load(service="inventory")
    server = grpc.aio.server(interceptors=mesh.grpc_server_interceptors())
    unary = grpc.unary_unary_rpc_method_handler(reserve, request_deserializer=json.loads, response_serializer=to_bytes)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", {"Reserve": unary}),))
    mesh.add_grpc_port(server, os.environ["INVENTORY_LISTEN"])
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(grace=1)


if __name__ == "__main__":
    asyncio.run(main())
