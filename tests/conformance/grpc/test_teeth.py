"""Would the scenarios notice? Each is run against a server that does the one thing wrong which it is about, and has to say so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.interop import scenarios_aio, scenarios_sync
from tests.interop.expected import SCENARIOS, SPECIAL_STATUS, STATUS, TRAILING
from tests.interop.protocol import UNIMPLEMENTED
from tests.interop.scenarios_aio import AioScenarios
from tests.interop.scenarios_sync import SyncScenarios
from tests.interop.servicers import aio_servicer

# Where the client alone does what it is about, no server can spoil it.
BY_THE_CLIENT = {"cancel_after_begin"}


def crook(peers: Any, scenario: str) -> Any:
    """A servicer that is right but for one thing."""
    messages = peers.town.protocol.messages
    right = type(aio_servicer(peers.town.protocol))

    def streamed(size: int) -> Any:
        return messages.StreamingOutputCallResponse(payload=messages.Payload(body=bytes(size)))

    class Crook(right):  # type: ignore[misc,valid-type]
        async def EmptyCall(self, request: Any, context: Any) -> Any:
            if scenario == "empty_unary":
                await context.abort(grpc.StatusCode.INTERNAL, "crooked")
            return await super().EmptyCall(request, context)

        async def UnaryCall(self, request: Any, context: Any) -> Any:
            if scenario == "large_unary":
                request.response_size -= 1
            if scenario == "status_code_and_message":
                request.response_status.code += 1
            if scenario == "special_status_message":
                request.response_status.message = SPECIAL_STATUS[1].strip()
            answer = await super().UnaryCall(request, context)
            if scenario == "custom_metadata":
                context.set_trailing_metadata([(TRAILING[0], TRAILING[1][:-1])])
            return answer

        async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
            if scenario == "server_streaming":
                request.response_parameters.reverse()
            async for answer in super().StreamingOutputCall(request, context):
                yield answer

        async def StreamingInputCall(self, requests: Any, context: Any) -> Any:
            answer = await super().StreamingInputCall(requests, context)
            answer.aggregated_payload_size += 1
            return answer

        async def FullDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            if scenario == "timeout_on_sleeping_server":
                return
            async for answer in super().FullDuplexCall(requests, context):
                yield streamed(1) if scenario == "cancel_after_first_response" else answer
            if scenario in {"ping_pong", "empty_stream"}:
                yield streamed(1)

    return Crook()


def busybody(scenario: str) -> grpc.GenericRpcHandler:
    """Who serves what nobody should."""
    method = UNIMPLEMENTED if scenario == "unimplemented_method" else "/grpc.testing.UnimplementedService/UnimplementedCall"

    async def answer(request: bytes, context: Any) -> bytes:
        return b""

    class Busybody(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(answer) if details.method == method else None

    return Busybody()


async def verdict(peers: Any, client: str, scenario: str, add: Callable[[Any], None]) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    add(server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        if client == "aio":
            async with grpc.aio.insecure_channel(target) as channel:
                await AioScenarios(channel, peers.town.protocol).run(scenario)
        else:
            with grpc.insecure_channel(target) as channel:
                await asyncio.to_thread(SyncScenarios(channel, peers.town.protocol).run, scenario)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("client", ["aio", "sync"])
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in BY_THE_CLIENT])
async def test_a_scenario_notices_a_server_that_does_it_wrong(
    peers: Any, scenario: str, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else about it: it passes another scenario."""
    if scenario == "timeout_on_sleeping_server":
        for module in (scenarios_aio, scenarios_sync):
            monkeypatch.setattr(module, "TIMEOUT", 10.0)  # else the time would be over before the server does what it does

    def add(server: Any) -> None:
        peers.town.protocol.services.add_TestServiceServicer_to_server(crook(peers, scenario), server)
        if scenario.startswith("unimplemented"):
            server.add_generic_rpc_handlers((busybody(scenario),))

    await verdict(peers, client, "empty_unary" if scenario != "empty_unary" else "large_unary", add)
    with pytest.raises((AssertionError, grpc.RpcError)):
        await verdict(peers, client, scenario, add)


@pytest.mark.parametrize("kind", [AioScenarios, SyncScenarios])
def test_each_scenario_is_written_for_both_kinds_of_client(kind: type) -> None:
    """All fourteen."""
    assert len(set(SCENARIOS)) == 14
    assert [name for name in SCENARIOS if not callable(getattr(kind, name, None))] == []
    assert STATUS[0] == SPECIAL_STATUS[0] == grpc.StatusCode.UNKNOWN.value[0]
