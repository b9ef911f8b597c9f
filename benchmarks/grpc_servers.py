"""How does each gRPC server give the same answer?

`python -m benchmarks.grpc_servers aio|sync PORT BESIDE`: a server of grpcio whose handlers give back what they got, as bytes. With `--config` it is the service `orders`
of that mesh, by the mesh's interceptors and its port; with `--identity` it stands behind grpcio's own mutual TLS; with neither it is
bare. At the port BESIDE there is always a bare one in the same process, which is idle unless the two are compared by turns. The asynchronous one is on uvloop, the blocking one has eight threads. Handlers, loop and threads are the same with and without the mesh.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio

from .grpc_peers import CALL, CHAT
from .worker import on_loop

THREADS: Final = 8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpc_servers")
    parser.add_argument("kind", choices=("aio", "sync"))
    parser.add_argument("port", type=int)
    parser.add_argument("beside", type=int)
    parser.add_argument("--config", default="")
    parser.add_argument("--identity", default="")
    given = parser.parse_args()
    mesh = None
    if given.config:
        import meshlib

        mesh = meshlib.Mesh.load(given.config, service="orders")
    # The bare one first: who waits for the other knows that both are there.
    wanted = [(f"127.0.0.1:{given.beside}", None, ""), (f"127.0.0.1:{given.port}", mesh, given.identity)]
    if given.kind == "sync":
        for server in [_server(*each) for each in wanted]:
            server.wait_for_termination()
        return

    async def serve() -> dict[str, float]:
        for server in [await _server_aio(*each) for each in wanted]:
            await server.wait_for_termination()
        return {}

    on_loop("uvloop", serve)


async def _server_aio(address: str, mesh: Any, identity: str) -> grpc.aio.Server:
    server = grpc.aio.server(interceptors=list(mesh.grpc_server_interceptors()) if mesh else None)
    server.add_generic_rpc_handlers((_handlers(_call_aio, _chat_aio),))
    _listen(server, address, mesh, identity)
    await server.start()
    return server


def _server(address: str, mesh: Any, identity: str) -> grpc.Server:
    interceptors = list(mesh.sync_grpc_server_interceptors()) if mesh else None
    server = grpc.server(futures.ThreadPoolExecutor(THREADS), interceptors=interceptors)
    server.add_generic_rpc_handlers((_handlers(_call, _chat),))
    _listen(server, address, mesh, identity)
    server.start()
    return server


def _listen(server: Any, address: str, mesh: Any, identity: str) -> None:
    if mesh is not None:
        mesh.add_grpc_port(server, address)
    elif identity:
        own = Path(identity)
        key, chain, roots = ((own / name).read_bytes() for name in ("key.pem", "svid.pem", "bundle.pem"))
        server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)], roots, require_client_auth=True))
    else:
        server.add_insecure_port(address)


def _handlers(call: Any, chat: Any) -> Any:
    service, method = CALL.strip("/").split("/")
    known = {
        method: grpc.unary_unary_rpc_method_handler(call),
        CHAT.rpartition("/")[2]: grpc.stream_stream_rpc_method_handler(chat),
    }
    return grpc.method_handlers_generic_handler(service, known)


async def _call_aio(request: bytes, context: Any) -> bytes:
    return request


async def _chat_aio(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


def _call(request: bytes, context: Any) -> bytes:
    return request


def _chat(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from requests


if __name__ == "__main__":
    main()
