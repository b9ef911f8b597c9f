"""How does our TestService answer? Once for grpc.aio and once for threads, both through the generated code, as a user would write it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc

from tests.interop.expected import INITIAL, TRAILING
from tests.interop.protocol import Protocol

_CODES = {code.value[0]: code for code in grpc.StatusCode}


def add_aio(protocol: Protocol, server: Any) -> None:
    """To a grpc.aio server."""
    protocol.services.add_TestServiceServicer_to_server(aio_servicer(protocol), server)


def add_sync(protocol: Protocol, server: Any) -> None:
    """To a grpc.server."""
    protocol.services.add_TestServiceServicer_to_server(sync_servicer(protocol), server)


def _echo(context: Any, name: str) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in context.invocation_metadata() if key == name]


def aio_servicer(protocol: Protocol) -> Any:
    messages = protocol.messages

    def streamed(size: int) -> Any:
        return messages.StreamingOutputCallResponse(payload=messages.Payload(body=bytes(size)))

    async def begin(context: Any) -> None:
        if head := _echo(context, INITIAL[0]):
            await context.send_initial_metadata(head)
        if end := _echo(context, TRAILING[0]):
            context.set_trailing_metadata(end)

    async def may_end(request: Any, context: Any) -> None:
        status = request.response_status
        if status.code:
            await context.abort(_CODES[status.code], status.message)

    class Service(protocol.services.TestServiceServicer):
        async def EmptyCall(self, request: Any, context: Any) -> Any:
            return messages.Empty()

        async def UnaryCall(self, request: Any, context: Any) -> Any:
            await begin(context)
            await may_end(request, context)
            return messages.SimpleResponse(payload=messages.Payload(body=bytes(request.response_size)))

        async def StreamingOutputCall(self, request: Any, context: Any) -> AsyncIterator[Any]:
            await may_end(request, context)
            for wanted in request.response_parameters:
                await asyncio.sleep(wanted.interval_us / 1e6)
                yield streamed(wanted.size)

        async def StreamingInputCall(self, requests: Any, context: Any) -> Any:
            total = sum([len(request.payload.body) async for request in requests])
            return messages.StreamingInputCallResponse(aggregated_payload_size=total)

        async def FullDuplexCall(self, requests: Any, context: Any) -> AsyncIterator[Any]:
            await begin(context)
            async for request in requests:
                await may_end(request, context)
                for wanted in request.response_parameters:
                    await asyncio.sleep(wanted.interval_us / 1e6)
                    yield streamed(wanted.size)

    return Service()


def sync_servicer(protocol: Protocol) -> Any:
    messages = protocol.messages

    def streamed(size: int) -> Any:
        return messages.StreamingOutputCallResponse(payload=messages.Payload(body=bytes(size)))

    def begin(context: Any) -> None:
        if head := _echo(context, INITIAL[0]):
            context.send_initial_metadata(head)
        if end := _echo(context, TRAILING[0]):
            context.set_trailing_metadata(end)

    def may_end(request: Any, context: Any) -> None:
        status = request.response_status
        if status.code:
            context.abort(_CODES[status.code], status.message)

    class Service(protocol.services.TestServiceServicer):
        def EmptyCall(self, request: Any, context: Any) -> Any:
            return messages.Empty()

        def UnaryCall(self, request: Any, context: Any) -> Any:
            begin(context)
            may_end(request, context)
            return messages.SimpleResponse(payload=messages.Payload(body=bytes(request.response_size)))

        def StreamingOutputCall(self, request: Any, context: Any) -> Iterator[Any]:
            may_end(request, context)
            for wanted in request.response_parameters:
                time.sleep(wanted.interval_us / 1e6)
                yield streamed(wanted.size)

        def StreamingInputCall(self, requests: Any, context: Any) -> Any:
            total = sum(len(request.payload.body) for request in requests)
            return messages.StreamingInputCallResponse(aggregated_payload_size=total)

        def FullDuplexCall(self, requests: Any, context: Any) -> Iterator[Any]:
            begin(context)
            for request in requests:
                may_end(request, context)
                for wanted in request.response_parameters:
                    time.sleep(wanted.interval_us / 1e6)
                    yield streamed(wanted.size)

    return Service()
