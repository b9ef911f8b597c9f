"""How does a TestService stand in a process of its own? `python -m tests.interop.serve KIND GENERATED [MESH_YAML]`, which says its port.

KIND is `aio` or `sync`; GENERATED is the folder of the compiled protocol. With a mesh.yaml it is the mesh's server, as the service
`interop` and in the mode that stands there; without one it is grpcio alone, in plain text. It ends with SIGTERM.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from tests.interop.protocol import compiled
from tests.interop.servicers import add_aio, add_sync
from tests.interop.town import LISTENING, SERVICE

ANY_PORT = "127.0.0.1:0"
OWN_PORT = [("grpc.so_reuseport", 0)]


def _mesh(file: str) -> Any:
    import meshlib

    return meshlib.Mesh.load(file, service=SERVICE)


async def aio(generated: Path, file: str) -> None:
    mesh = _mesh(file) if file else None
    interceptors = mesh.grpc_server_interceptors() if mesh else []
    server = grpc.aio.server(interceptors=interceptors, options=OWN_PORT)
    add_aio(compiled(generated), server)
    port = mesh.add_grpc_port(server, ANY_PORT) if mesh else server.add_insecure_port(ANY_PORT)
    await server.start()
    print(f"{LISTENING}{port}", flush=True)
    await server.wait_for_termination()


def sync(generated: Path, file: str) -> None:
    mesh = _mesh(file) if file else None
    interceptors = mesh.sync_grpc_server_interceptors() if mesh else []
    # A stream holds a thread until its client's cancellation has arrived.
    server = grpc.server(futures.ThreadPoolExecutor(32), interceptors=interceptors, options=OWN_PORT)
    add_sync(compiled(generated), server)
    port = mesh.add_grpc_port(server, ANY_PORT) if mesh else server.add_insecure_port(ANY_PORT)
    server.start()
    print(f"{LISTENING}{port}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    kind, generated, file = sys.argv[1], Path(sys.argv[2]), "".join(sys.argv[3:])
    if kind == "aio":
        asyncio.run(aio(generated, file))
    else:
        sync(generated, file)
