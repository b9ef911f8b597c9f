"""Do gRPC calls of a delegated service go by the native proxy, and what if that one is killed or hangs?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

import meshlib
from meshlib.client.delegated_agent import ANSWERED, AgentWatch
from tests.client.test_delegated_proxy import eventually, proxied
from tests.proxy_agent import needs_proxy
from tests.support import identities, mesh_of

pytestmark = needs_proxy

IDEMPOTENT = (("x-mesh-idempotent", "1"),)
ECHO, COUNT, SUM, CHAT, FAIL, SLOW = (f"/test.Shop/{name}" for name in ("Echo", "Count", "Sum", "Chat", "Fail", "Slow"))


class Shop:
    """A gRPC server with mutual TLS, which notes what it was asked with."""

    def __init__(self, folder: Path) -> None:
        own = folder / "identities" / "orders"
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Shop", self._methods()),))
        pair = [((own / "key.pem").read_bytes(), (own / "svid.pem").read_bytes())]
        roots = (own / "bundle.pem").read_bytes()
        credentials = grpc.ssl_server_credentials(pair, root_certificates=roots, require_client_auth=True)
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.keys: list[set[str]] = []
        self.release = asyncio.Event()

    def _methods(self) -> dict[str, Any]:
        async def echo(request: bytes, context: Any) -> bytes:
            self.keys.append({key for key, _ in context.invocation_metadata()})
            return request

        async def slow(request: bytes, context: Any) -> bytes:
            self.keys.append(set())
            if len(self.keys) == 1:
                await self.release.wait()
            return request

        async def fail(request: bytes, context: Any) -> bytes:
            self.keys.append(set())
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the till is closed")
            return b""

        async def count(request: bytes, context: Any) -> AsyncIterator[bytes]:
            for number in range(int(request)):
                yield b"%d" % number

        async def add(requests: Any, context: Any) -> bytes:
            return b"%d" % sum([int(request) async for request in requests])

        async def chat(requests: Any, context: Any) -> AsyncIterator[bytes]:
            async for request in requests:
                yield b"re: " + request

        return {
            "Echo": grpc.unary_unary_rpc_method_handler(echo),
            "Slow": grpc.unary_unary_rpc_method_handler(slow),
            "Fail": grpc.unary_unary_rpc_method_handler(fail),
            "Count": grpc.unary_stream_rpc_method_handler(count),
            "Sum": grpc.stream_unary_rpc_method_handler(add),
            "Chat": grpc.stream_stream_rpc_method_handler(chat),
        }


@contextlib.asynccontextmanager
async def shopping(folder: Path) -> AsyncIterator[tuple[meshlib.Mesh, Shop]]:
    shop = Shop(folder)
    await shop.server.start()
    try:
        orders = {"discover": {"static": [f"127.0.0.1:{shop.port}"]}, "delegate": "agent", "protocol": "grpc"}
        agent = {"data": str(folder / "data.sock"), "ca": "ca"}
        with mesh_of(folder, {"orders": orders}, mode="enforce", agent=agent) as mesh:
            yield mesh, shop
    finally:
        await shop.server.stop(None)


def carried(call: Any) -> list[str]:
    found: list[str] = call.mesh_call.record()["carried"]
    return found


async def numbers() -> AsyncIterator[bytes]:
    for number in (1, 2, 3):
        yield str(number).encode()


async def test_all_four_kinds_go_by_the_proxy(tmp_path: Path) -> None:
    """From asyncio and from threads, with mutual TLS to the endpoint; what is for the agent stays there."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path):
        async with shopping(tmp_path) as (mesh, shop):
            async with mesh.grpc_channel("orders") as channel:
                call = channel.unary_unary(ECHO)(b"hello", metadata=(("x-mesh-endpoint", "10.0.0.1:1"), ("x-own", "1")))
                assert await call == b"hello"
                assert carried(call) == ["agent"]
                assert [message async for message in channel.unary_stream(COUNT)(b"3")] == [b"0", b"1", b"2"]
                assert await channel.stream_unary(SUM)(numbers()) == b"6"
                assert [message async for message in channel.stream_stream(CHAT)(numbers())] == [b"re: 1", b"re: 2", b"re: 3"]
            assert "x-own" in shop.keys[0]
            assert not {key for key in shop.keys[0] if key in ("x-mesh-endpoint", "x-mesh-expect", "x-mesh-protocol")}
            assert mesh.delegation is not None
            assert mesh.delegation.stats()["sent"] == 4

            def blocking() -> list[str]:
                with mesh.sync_grpc_channel("orders") as channel:
                    answer, call = channel.unary_unary(ECHO).with_call(b"hello")
                    assert answer == b"hello"
                    assert list(channel.unary_stream(COUNT)(b"2")) == [b"0", b"1"]
                    return [str(call.code())]

            assert await asyncio.to_thread(blocking) == ["StatusCode.OK"]
            assert mesh.delegation.stats()["sent"] == 6
            assert sum(mesh.delegation.stats()["fallbacks"].values()) == 0


async def test_what_the_endpoint_answers_is_its_own(tmp_path: Path) -> None:
    """UNAVAILABLE of a handler is no failure of the agent: it was processed, and isn't tried again."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path):
        async with shopping(tmp_path) as (mesh, shop), mesh.grpc_channel("orders") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(FAIL)(b"")
            assert caught.value.details() == "the till is closed"
            assert len(shop.keys) == 1
            assert mesh.delegation is not None
            assert sum(mesh.delegation.stats()["fallbacks"].values()) == 0


async def test_an_endpoint_that_is_down_is_told_by_the_proxy(tmp_path: Path) -> None:
    """As a refused connection, of which the engine is told; this process doesn't try it as well."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path):
        async with shopping(tmp_path) as (mesh, shop), mesh.grpc_channel("orders") as channel:
            await shop.server.stop(None)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(ECHO)(b"")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            call: Any = getattr(caught.value, "call", None)
            events = call.record()["events"]
            assert "refused" in {event["what"] for event in events if event["phase"] == "send"}
            assert set(call.record()["carried"]) == {"agent"}


@pytest.mark.parametrize("kind", ["aio", "sync"])
async def test_without_the_agent_calls_go_by_this_process(tmp_path: Path, kind: str) -> None:
    """Nothing was sent, so that no call has to be idempotent for it."""
    identities(tmp_path, "me", "orders")
    async with shopping(tmp_path) as (mesh, _):
        if kind == "aio":
            async with mesh.grpc_channel("orders") as channel:
                for _ in range(2):
                    call = channel.unary_unary(ECHO)(b"x")
                    assert await call == b"x"
                    assert carried(call) == ["away"]
        else:

            def blocking() -> None:
                with mesh.sync_grpc_channel("orders") as channel:
                    assert channel.unary_unary(ECHO)(b"x") == b"x"

            await asyncio.to_thread(blocking)
        assert mesh.delegation is not None
        assert mesh.delegation.stats()["sent"] == 0


@pytest.mark.parametrize("kind", ["aio", "sync"])
async def test_a_killed_proxy_costs_no_call_that_may_be_repeated(tmp_path: Path, kind: str) -> None:
    """The call under way goes on in this process; one that may not be repeated fails, and nobody is blamed."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path) as agent:
        async with shopping(tmp_path) as (mesh, shop):
            stack = contextlib.ExitStack()
            if kind == "aio":
                channel = mesh.grpc_channel("orders")
                call = asyncio.ensure_future(_awaited(channel.unary_unary(SLOW)(b"x", metadata=IDEMPOTENT)))
            else:
                blocking = stack.enter_context(mesh.sync_grpc_channel("orders"))
                call = asyncio.ensure_future(asyncio.to_thread(blocking.unary_unary(SLOW), b"x", metadata=IDEMPOTENT))
            await eventually(lambda: shop.keys, 5)
            os.kill(agent.pid, signal.SIGKILL)
            assert await asyncio.wait_for(call, 5) == b"x"
            assert mesh.delegation is not None
            assert mesh.delegation.stats()["fallbacks"]["closed"] == 1, mesh.delegation.stats()
            shop.release.set()
            if kind == "aio":
                await channel.close()
            stack.close()


async def _awaited(call: Any) -> Any:
    return await call


async def test_a_call_that_may_not_be_repeated_fails_with_the_proxy(tmp_path: Path) -> None:
    """It may have been processed."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path) as agent:
        async with shopping(tmp_path) as (mesh, shop), mesh.grpc_channel("orders") as channel:
            call = asyncio.ensure_future(_awaited(channel.unary_unary(SLOW)(b"x")))
            await eventually(lambda: shop.keys, 5)
            os.kill(agent.pid, signal.SIGKILL)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(call, 5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert len(shop.keys) == 1
            shop.release.set()
            assert await channel.unary_unary(ECHO)(b"y") == b"y"


async def test_a_proxy_that_hangs_is_left(tmp_path: Path) -> None:
    """The call under way by gRPC's own ping, the next ones by the watch; and it comes back."""
    identities(tmp_path, "me", "orders")
    with proxied(tmp_path) as agent:
        async with shopping(tmp_path) as (mesh, _), mesh.grpc_channel("orders") as channel:
            assert await channel.unary_unary(ECHO)(b"x") == b"x"
            os.kill(agent.pid, signal.SIGSTOP)
            try:
                begun = time.monotonic()
                call = channel.unary_unary(ECHO)(b"y", metadata=IDEMPOTENT)
                assert await call == b"y"
                assert time.monotonic() - begun < 4.0
                assert carried(call) == ["closed"]
                call = channel.unary_unary(ECHO)(b"z")
                assert await call == b"z"
                assert carried(call) == ["away"]
            finally:
                os.kill(agent.pid, signal.SIGCONT)
            assert mesh.delegation is not None
            watch = mesh.delegation.watch
            assert await eventually(lambda: not watch.is_away, 5.0) < 5.0
            call = channel.unary_unary(ECHO)(b"x")
            assert await call == b"x"
            assert carried(call) == ["agent"]


@pytest.mark.parametrize("kind", ["async", "blocking"])
async def test_the_rest_of_a_stream_is_not_sent_as_if_it_were_the_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that ends has taken messages of it already: the call fails in words, and the endpoint sees nothing of it."""

    async def look(watch: AgentWatch) -> None:
        watch.tell(ANSWERED)

    class Ending(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            async def add(requests: Any, context: Any) -> bytes:
                await anext(aiter(requests))
                context.set_trailing_metadata((("x-mesh-failed", "agent; written=0"),))
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the agent ends: nothing was tried.")
                return b""

            return grpc.stream_unary_rpc_method_handler(add)

    def slowly() -> Iterator[bytes]:
        for number in (b"1", b"2", b"3"):
            yield number
            time.sleep(0.2)

    async def slowly_too() -> AsyncIterator[bytes]:
        for number in (b"1", b"2", b"3"):
            yield number
            await asyncio.sleep(0.2)

    monkeypatch.setattr(AgentWatch, "look", look)
    identities(tmp_path, "me", "orders")
    agent = grpc.aio.server()
    agent.add_generic_rpc_handlers((Ending(),))
    agent.add_insecure_port(f"unix:{tmp_path}/data.sock")
    await agent.start()
    try:
        async with shopping(tmp_path) as (mesh, _):
            if kind == "async":
                async with mesh.grpc_channel("orders") as channel:
                    with pytest.raises(grpc.RpcError) as caught:
                        await channel.stream_unary(SUM)(slowly_too())
            else:
                with mesh.sync_grpc_channel("orders") as blocking, pytest.raises(grpc.RpcError) as caught:
                    await asyncio.to_thread(lambda: blocking.stream_unary(SUM)(slowly()))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    finally:
        await agent.stop(None)
