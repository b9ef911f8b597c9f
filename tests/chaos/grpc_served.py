"""What is at the other end of the gRPC chaos tests? A backend in a process of its own, which does as it is told while calls come in.

`python -m tests.chaos.grpc_served CONFIG SERVICE ADDRESS aio|sync` serves until TERM. A line on its standard input is a command, and gets
a line of JSON:

    {"slow": 0.3}              calls take so long from now on
    {"fail": "UNAVAILABLE"}    calls end with that code from now on
    {}                         calls are answered at once again
    ask                        nothing changes

The answer has `at`, the moment from which that holds, and `arrivals`, the moments at which calls of `Echo` came in since the last
command that changed something; on Linux, both by a clock that all processes share. `streams` tells how many began and how many were
handed out whole. It ends when its standard input does, so that no backend outlives its test. Messages are bytes; both kinds of server have
the same methods.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.aio

import meshlib

SERVICE = "shop.Inventory"
ECHO, WHO, COUNT, CHAT, FAIL = (f"/{SERVICE}/{name}" for name in ("Echo", "Who", "Count", "Chat", "Fail"))

# Of a server that the mesh doesn't end.
GRACE = 8.0

OPTIONS = [("grpc.so_reuseport", 0)]
UNARY, STREAM, BOTH = (
    grpc.unary_unary_rpc_method_handler,
    grpc.unary_stream_rpc_method_handler,
    grpc.stream_stream_rpc_method_handler,
)


class Conduct:
    """How calls are treated at the moment, and when they came."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.code: grpc.StatusCode | None = None
        self.arrivals: list[float] = []
        self.begun = self.whole = 0

    def listen(self) -> None:
        """Do as the lines on the standard input say, until there are no more."""
        for line in sys.stdin:
            at = time.monotonic()
            if line.strip() != "ask":
                said = json.loads(line)
                self.delay = said.get("slow", 0.0)
                self.code = grpc.StatusCode[said["fail"]] if "fail" in said else None
                at, self.arrivals = time.monotonic(), []
            answer = {"at": at, "arrivals": self.arrivals, "streams": [self.begun, self.whole]}
            print(json.dumps(answer), flush=True)
        os._exit(0)

    def who(self) -> bytes:
        caller = meshlib.peer()
        assert caller is not None
        return caller.serial.encode()


def blocking_handlers(conduct: Conduct) -> dict[str, Any]:
    def echo(request: bytes, context: Any) -> bytes:
        conduct.arrivals.append(time.monotonic())
        if conduct.delay:
            time.sleep(conduct.delay)
        if conduct.code is not None:
            context.abort(conduct.code, "told to fail")
        return request

    def fail(request: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode[request.decode()], "as asked")
        return b""

    def count(request: bytes, context: Any) -> Iterator[bytes]:
        conduct.begun += 1
        number, pause = request.split()
        for each in range(int(number)):
            time.sleep(float(pause))
            yield str(each).encode()
        conduct.whole += 1

    def chat(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        conduct.begun += 1
        for request in requests:
            yield b"re: " + request
        conduct.whole += 1

    who = UNARY(lambda request, context: conduct.who())
    return {"Echo": UNARY(echo), "Who": who, "Fail": UNARY(fail), "Count": STREAM(count), "Chat": BOTH(chat)}


def handlers(conduct: Conduct) -> dict[str, Any]:
    async def echo(request: bytes, context: Any) -> bytes:
        conduct.arrivals.append(time.monotonic())
        if conduct.delay:
            await asyncio.sleep(conduct.delay)
        if conduct.code is not None:
            await context.abort(conduct.code, "told to fail")
        return request

    async def who(request: bytes, context: Any) -> bytes:
        return conduct.who()

    async def fail(request: bytes, context: Any) -> bytes:
        await context.abort(grpc.StatusCode[request.decode()], "as asked")
        return b""

    async def count(request: bytes, context: Any) -> AsyncIterator[bytes]:
        conduct.begun += 1
        number, pause = request.split()
        for each in range(int(number)):
            await asyncio.sleep(float(pause))
            yield str(each).encode()
        conduct.whole += 1

    async def chat(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        conduct.begun += 1
        async for request in requests:
            yield b"re: " + request
        conduct.whole += 1

    return {"Echo": UNARY(echo), "Who": UNARY(who), "Fail": UNARY(fail), "Count": STREAM(count), "Chat": BOTH(chat)}


async def serve(mesh: Any, address: str, conduct: Conduct) -> None:
    server = grpc.aio.server(interceptors=mesh.grpc_server_interceptors(), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers(conduct)),))
    mesh.add_grpc_port(server, address)
    if hasattr(mesh, "serve_grpc"):
        await mesh.serve_grpc(server)
        return
    await server.start()
    is_told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, is_told.set)
    await is_told.wait()
    await server.stop(GRACE)


def serve_in_threads(mesh: Any, address: str, conduct: Conduct) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(64), interceptors=mesh.sync_grpc_server_interceptors(), options=OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, blocking_handlers(conduct)),))
    mesh.add_grpc_port(server, address)
    if hasattr(mesh, "sync_serve_grpc"):
        mesh.sync_serve_grpc(server)
        return
    server.start()
    is_told = threading.Event()
    signal.signal(signal.SIGTERM, lambda sig, frame: is_told.set())
    while not is_told.wait(0.05):
        pass
    server.stop(GRACE).wait()


def main(config: str, service: str, address: str, kind: str) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    mesh, conduct = meshlib.Mesh.load(config, service=service), Conduct()
    threading.Thread(target=conduct.listen, daemon=True).start()
    if kind == "aio":
        asyncio.run(serve(mesh, address, conduct))
    else:
        serve_in_threads(mesh, address, conduct)
    mesh.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
