"""What ends when the client of a gRPC call goes away: outgoing calls that may be repeated, and what the call held. Real servers."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlib
from meshlib.call import current_visit

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import until

CALL = "/shop.Inventory/Call"
Code = grpc.StatusCode

YAML = """\
mesh: shop
secure: {{mode: observe}}
services:
  inventory: {{protocol: grpc{more}}}
  stock: {{discover: {{static: ["127.0.0.1:{http}"]}}}}
  depot: {{protocol: grpc, discover: {{static: ["127.0.0.1:{rpc}"]}}}}
"""


class Elsewhere:
    """Two services that never answer, over HTTP and over gRPC, and see who hangs up and when."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.left_at = 0.0

    async def over_http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked.set()
        await reader.read()
        self.left_at = time.monotonic()
        writer.close()

    async def over_grpc(self, request: bytes, context: Any) -> bytes:
        self.asked.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.left_at = time.monotonic()
            raise
        return b""


@pytest.fixture
async def elsewhere() -> AsyncIterator[tuple[Elsewhere, int, int]]:
    made = Elsewhere()
    http = await asyncio.start_server(made.over_http, "127.0.0.1", 0)
    rpc = grpc.aio.server()
    methods = {"Call": grpc.unary_unary_rpc_method_handler(made.over_grpc)}
    rpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    yield made, http.sockets[0].getsockname()[1], port
    http.close()
    await rpc.stop(None)


def mesh_of(folder: Path, http: int = 1, rpc: int = 1, more: str = "") -> meshlib.Mesh:
    file = folder / "mesh.yaml"
    file.write_text(YAML.format(http=http, rpc=rpc, more=more))
    return meshlib.Mesh.load(file, service="inventory")


def in_flight(mesh: meshlib.Mesh) -> int:
    return mesh.gate.load()["in_flight"] + sum(row["in_flight"] for row in mesh.engine.stats(time.monotonic()))


async def served(mesh: meshlib.Mesh, handler: Any) -> tuple[Any, Any]:
    server = grpc.aio.server(futures.ThreadPoolExecutor(4), interceptors=mesh.grpc_server_interceptors())
    methods = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    await server.start()
    return server, grpc.aio.insecure_channel(f"127.0.0.1:{port}")


@pytest.mark.parametrize("how", ["http", "grpc", "task"])
async def test_outgoing_calls_end_with_the_handler_that_grpc_cancels(
    tmp_path: Path, elsewhere: tuple[Elsewhere, int, int], how: str
) -> None:
    """Within a tenth of a second, in its own task or in one that it left behind; and everything is given back."""
    other, http, rpc = elsewhere
    mesh = mesh_of(tmp_path, http, rpc)
    client, channel = mesh.client(), mesh.grpc_channel("depot")
    ended: list[BaseException] = []
    tasks: list[asyncio.Task[Any]] = []

    async def handler(request: bytes, context: Any) -> bytes:
        try:
            if how == "http":
                await client.get("http://stock/items/7")
            elif how == "grpc":
                await channel.unary_unary(CALL)(b"")
            else:
                tasks.append(asyncio.create_task(client.get("http://stock/items/7")))
                await asyncio.sleep(60)
        except BaseException as error:
            ended.append(error)
            raise
        return b""

    server, caller = await served(mesh, handler)
    call = caller.unary_unary(CALL)(b"")
    await asyncio.wait_for(other.asked.wait(), 10)
    assert in_flight(mesh) > 1
    begun = time.monotonic()
    call.cancel()
    await until(lambda: other.left_at > 0)
    assert other.left_at - begun < 0.1
    await until(lambda: in_flight(mesh) == 0)
    assert [type(error) for error in ended] == [asyncio.CancelledError]
    if tasks:
        assert isinstance((await asyncio.gather(*tasks, return_exceptions=True))[0], meshlib.CallerGone)
    # gRPC's number of it, once.
    assert [row["codes"] for row in mesh.gate.stats()] == [{"1": 1}]
    assert current_visit.get() is None
    await client.aclose()
    await channel.close()
    await caller.close()
    await server.stop(None)
    mesh.close()


class Blocking:
    """A handler in a thread, which goes on without its client, and looks around then."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.found: list[Any] = []

    def unary(self, request: bytes, context: Any) -> bytes:
        self._look()
        return b"nobody hears it"

    def stream(self, request: bytes, context: Any) -> Iterator[bytes]:
        yield b"first"
        self._look()
        yield b"second"

    def _look(self) -> None:
        visit = current_visit.get()
        assert visit is not None
        self.begun.set()
        end = time.monotonic() + 3
        while not visit.is_gone and time.monotonic() < end and not self.found:
            time.sleep(0.005)
        self.found += [visit.is_gone]
        try:
            visit.errand()
        except meshlib.CallerGone as error:
            self.found.append(type(error))


@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_in_a_thread_calls_that_begin_afterwards_are_refused(tmp_path: Path, kind: str) -> None:
    """Nobody can cancel the handler; what it would ask on behalf of its client that may be repeated is not wanted any more."""
    mesh, blocking = mesh_of(tmp_path), Blocking()
    handler = (
        grpc.unary_unary_rpc_method_handler(blocking.unary)
        if kind == "unary"
        else grpc.unary_stream_rpc_method_handler(blocking.stream)
    )
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=mesh.sync_grpc_server_interceptors())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", {"Call": handler}),))
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(CALL).future(b"") if kind == "unary" else channel.unary_stream(CALL)(b"")
        assert blocking.begun.wait(5)
        call.cancel()
        _wait(lambda: len(blocking.found) == 2 and mesh.gate.load()["in_flight"] == 0)
    assert blocking.found == [True, meshlib.CallerGone]
    assert [row["codes"] for row in mesh.gate.stats()] == [{"1": 1}]
    server.stop(None).wait(5)
    mesh.close()


def test_on_a_route_that_says_so_nothing_ends(tmp_path: Path) -> None:
    """`on_disconnect: nothing`, for a handler in a thread: its calls go on without the client."""
    route = ", route: [{match: {path: {exact: /shop.Inventory/Call}}, on_disconnect: nothing}]"
    mesh = mesh_of(tmp_path, more=route)
    left, go_on, found = threading.Event(), threading.Event(), list[Any]()

    def handler(request: bytes, context: Any) -> bytes:
        visit = current_visit.get()
        assert visit is not None
        context.add_callback(left.set)
        go_on.set()
        left.wait(5)
        time.sleep(0.05)
        found.append((visit.is_gone, visit.ends_calls))
        return b""

    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=mesh.sync_grpc_server_interceptors())
    methods = {"Call": grpc.unary_unary_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Inventory", methods),))
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(CALL).future(b"")
        assert go_on.wait(5)
        call.cancel()
        _wait(lambda: bool(found))
    assert found == [(False, False)]
    server.stop(None).wait(5)
    mesh.close()


async def test_a_thread_of_an_asyncio_server_hears_of_it_too(tmp_path: Path) -> None:
    """gRPC leaves the thread alone, and so do we; its calls are refused from then on."""
    mesh, blocking = mesh_of(tmp_path), Blocking()
    server, caller = await served(mesh, blocking.unary)
    call = caller.unary_unary(CALL)(b"")
    await until(blocking.begun.is_set)
    call.cancel()
    await until(lambda: len(blocking.found) == 2 and in_flight(mesh) == 0)
    assert blocking.found == [True, meshlib.CallerGone]
    await caller.close()
    await server.stop(None)
    mesh.close()


async def test_a_call_that_ends_well_has_no_client_that_left(tmp_path: Path) -> None:
    """gRPC calls back at every end: that of an answer says nothing about the client."""
    mesh = mesh_of(tmp_path)
    visits: list[Any] = []

    def handler(request: bytes, context: Any) -> bytes:
        visits.append(current_visit.get())
        return b"well"

    server, caller = await served(mesh, handler)
    assert await caller.unary_unary(CALL)(b"") == b"well"
    await asyncio.sleep(0.1)
    assert [(visit.is_gone, visit.end, visit.ends_calls) for visit in visits] == [(False, None, False)]
    assert [row["codes"] for row in mesh.gate.stats()] == [{"0": 1}]
    await caller.close()
    await server.stop(None)
    mesh.close()


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.005)
