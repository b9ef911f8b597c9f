"""A process that serves nothing but gRPC, to be sent signals: `grpc_served.py MESH_YAML aio|sync`. Prints its address, then "ended"."""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent import futures
from typing import Any

import grpc
import grpc.aio

import meshlib


async def slow_aio(request: bytes, context: Any) -> bytes:
    await asyncio.sleep(float(request))
    return b"at last"


def slow(request: bytes, context: Any) -> bytes:
    end = time.monotonic() + float(request)
    while time.monotonic() < end and context.is_active():
        time.sleep(0.02)
    return b"at last"


def deaf(request: bytes, context: Any) -> bytes:
    time.sleep(float(request))
    return b"too late"


def add(mesh: meshlib.Mesh, server: Any, handler: Any) -> None:
    methods = {"Slow": grpc.unary_unary_rpc_method_handler(handler), "Deaf": grpc.unary_unary_rpc_method_handler(deaf)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    mesh.add_grpc_health(server)
    print(f"127.0.0.1:{mesh.add_grpc_port(server, '127.0.0.1:0')}", flush=True)


async def main(mesh: meshlib.Mesh) -> None:
    server = grpc.aio.server(interceptors=mesh.grpc_server_interceptors())
    add(mesh, server, slow_aio)
    await mesh.serve_grpc(server)


mesh = meshlib.Mesh.load(sys.argv[1], service="inventory")
if sys.argv[2] == "aio":
    asyncio.run(main(mesh))
else:
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=mesh.sync_grpc_server_interceptors())
    add(mesh, server, slow)
    mesh.sync_serve_grpc(server)
print("ended", flush=True)
