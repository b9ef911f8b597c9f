"""gRPC's standard health service, spoken without protocol buffers: asked by gRPC's own stubs, and by the letters of its messages."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlib
from meshlib.server.drain import drain_of
from meshlib.server.grpc.health import WATCHERS, service_in, status_out, statuses_out

sys.path.insert(0, str(Path(__file__).parent.parent / "grpc_support"))
from grpc_world import ECHO, Backend, Shop, until, yaml_of

health_pb2 = pytest.importorskip("grpc_health.v1.health_pb2", reason="grpcio-health-checking is not installed")
health_pb2_grpc = pytest.importorskip("grpc_health.v1.health_pb2_grpc")

Code = grpc.StatusCode
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
CHECK = "/grpc.health.v1.Health/Check"
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"


def request(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


@pytest.fixture
def mesh(tmp_path: Path) -> Any:
    file = tmp_path / "mesh.yaml"
    file.write_text(
        "mesh: shop\nsecure: {mode: observe}\nservices: {inventory: {protocol: grpc, inbound: {drain: {wait: 1s, grace: 5s}}}}\n"
    )
    mesh = meshlib.Mesh.load(file, service="inventory")
    yield mesh
    mesh.close()


@pytest.fixture
async def stub(mesh: meshlib.Mesh) -> AsyncIterator[Any]:
    server = grpc.aio.server(interceptors=mesh.grpc_server_interceptors())
    mesh.add_grpc_health(server, "shop.Inventory")
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    await server.stop(None)


async def test_a_server_serves_until_it_begins_to_end(mesh: meshlib.Mesh, stub: Any) -> None:
    """As a whole, by the service's name in the mesh, and by the names that were given; no other is known."""
    for name in ("", "inventory", "shop.Inventory"):
        assert (await stub.Check(request(name))).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        await stub.Check(request("shop.Other"))
    assert caught.value.code() is Code.NOT_FOUND
    mesh.drain()
    assert (await stub.Check(request(""))).status == NOT_SERVING


async def test_who_watches_is_told_at_once(mesh: meshlib.Mesh, stub: Any) -> None:
    """Each state once; and when the server closes, watchers hold nothing up."""
    watch, unknown = aiter(stub.Watch(request("inventory"))), aiter(stub.Watch(request("shop.Other")))
    assert (await anext(watch)).status == SERVING
    assert (await anext(unknown)).status == SERVICE_UNKNOWN
    begun = time.monotonic()
    await asyncio.to_thread(mesh.drain)
    assert (await anext(watch)).status == NOT_SERVING
    assert time.monotonic() - begun < 0.5
    assert drain_of(mesh).phase.name == "LEAVING"
    # The keeper looks each second.
    assert [each async for each in watch] == []
    assert [each async for each in unknown] == []
    assert mesh.gate.load()["in_flight"] == 0


async def test_all_names_can_be_listed(stub: Any) -> None:
    """Where the installed protocol knows that."""
    if not hasattr(health_pb2, "HealthListRequest"):
        pytest.skip("this release of grpcio-health-checking has no List")
    told = await stub.List(health_pb2.HealthListRequest())
    assert {name: each.status for name, each in told.statuses.items()} == {"": 1, "inventory": 1, "shop.Inventory": 1}


def test_a_blocking_server_has_the_same_service_and_few_watchers(mesh: meshlib.Mesh) -> None:
    """Each of them holds a thread, so that the next is refused; one that leaves makes room."""
    server = grpc.server(futures.ThreadPoolExecutor(6), interceptors=mesh.sync_grpc_server_interceptors())
    mesh.add_grpc_health(server)
    port = mesh.add_grpc_port(server, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(request("inventory")).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(request("x"))
        assert caught.value.code() is Code.NOT_FOUND
        watches = [stub.Watch(request("")) for _ in range(WATCHERS)]
        assert [next(watch).status for watch in watches] == [SERVING] * WATCHERS
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(request("")))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        watches[0].cancel()
        end = time.monotonic() + 5
        while mesh.gate.load()["in_flight"] >= WATCHERS:
            assert time.monotonic() < end
            time.sleep(0.01)
        again = stub.Watch(request(""))
        assert next(again).status == SERVING
        mesh.drain()
        assert next(again).status == NOT_SERVING
        assert list(again) == []
    assert server.wait_for_termination(5) is False
    mesh.close()


def test_its_messages_are_those_of_the_protocol() -> None:
    """Read and written as by gRPC's own package, with fields of later versions; what is no message is no service's name."""
    for name in ("", "shop.Inventory", "ü" * 200):
        assert service_in(request(name).SerializeToString()) == name
    assert (
        service_in(b"\x10\x96\x01" + b"\x1d" + bytes(4) + b"\x21" + bytes(8) + b"\x0a\x01a" + b"\x22\x02xy" + b"\x0a\x01b") == "b"
    )
    for status in (SERVING, NOT_SERVING, SERVICE_UNKNOWN):
        assert health_pb2.HealthCheckResponse.FromString(status_out(status)).status == status
    if hasattr(health_pb2, "HealthListResponse"):
        told = health_pb2.HealthListResponse.FromString(statuses_out({"": 1, "n" * 300: 2}))
        assert {name: each.status for name, each in told.statuses.items()} == {"": 1, "n" * 300: 2}
    for broken in (b"\x0a\x05a", b"\x0a", b"\x0b", b"\xff" * 11, b"\x0a\x01\xff", b"\x02\x01a", b"\x09\x00"):
        with pytest.raises(ValueError):  # of UTF-8, too
            service_in(broken)


async def test_in_enforce_health_and_reflection_are_open_by_a_rule_and_nothing_else(tmp_path: Path) -> None:
    """They are methods like others: who may ask how a server is may not therefore call it."""
    rules = (
        'allow: [{name: shop, from: [storefront], paths: ["/shop.Inventory/*"]},'
        ' {name: ask, from: ["*"], paths: ["/grpc.health.v1.Health/*", "/grpc.reflection.v1.ServerReflection/*"]}]'
    )
    shop = Shop(tmp_path, yaml_of(allow=rules))
    backend: Backend = await shop.start("a")

    async def reflect(requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for each in requests:
            yield each

    handler = grpc.stream_stream_rpc_method_handler(reflect)
    name, method = REFLECT.removeprefix("/").split("/")
    backend.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {method: handler}),))
    identity = shop.party("burglar").identity
    assert identity is not None
    assert identity.current is not None
    own = identity.current
    credentials = grpc.ssl_channel_credentials(own.bundles["shop.internal"], bytes(own.key), own.chain)
    options = [("grpc.ssl_target_name_override", "inventory.default.shop.internal")]
    async with grpc.aio.secure_channel(backend.address, credentials, options=options) as channel:
        assert await channel.unary_unary(CHECK)(b"") == b"\x08\x01"
        assert [each async for each in channel.stream_stream(REFLECT)(iter([b"", b""]))] == [b"", b""]
        with pytest.raises(grpc.RpcError) as caught:
            await channel.unary_unary(ECHO)(b"")
        assert caught.value.code() is Code.PERMISSION_DENIED
    assert backend.calls == 0
    await until(lambda: backend.party.gate.load()["in_flight"] == 0)
    await shop.stop()
