"""What does each scenario ask of a channel of grpc.aio? A method each, named as in expected.py: it returns, or raises what was wrong."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from tests.interop.expected import (
    BAD_MOMENTS,
    INITIAL,
    LARGE_REQUEST,
    LARGE_RESPONSE,
    MOMENTS,
    REQUEST_SIZES,
    RESPONSE_SIZES,
    SPECIAL_STATUS,
    STATUS,
    TIMEOUT,
    TRAILING,
    same,
)
from tests.interop.protocol import UNIMPLEMENTED, Protocol

EOF = grpc.aio.EOF


class AioScenarios:
    """All of them, over one channel."""

    def __init__(self, channel: grpc.aio.Channel, protocol: Protocol) -> None:
        self.channel = channel
        self.messages = protocol.messages
        self.stub = protocol.services.TestServiceStub(channel)
        self.nobody = protocol.services.UnimplementedServiceStub(channel)

    async def run(self, name: str, *, patience: float = 20.0) -> None:
        async with asyncio.timeout(patience):
            await getattr(self, name)()

    # --- what scenarios share

    def _request(self, **fields: Any) -> Any:
        return self.messages.SimpleRequest(
            response_size=LARGE_RESPONSE, payload=self.messages.Payload(body=bytes(LARGE_REQUEST)), **fields
        )

    def _ask(self, size: int, answer: int | None) -> Any:
        """A message of a conversation, which wants an answer of that size."""
        wanted = [] if answer is None else [self.messages.ResponseParameters(size=answer)]
        return self.messages.StreamingOutputCallRequest(
            response_parameters=wanted, payload=self.messages.Payload(body=bytes(size))
        )

    async def _fails(self, call: Any, status: tuple[int, str]) -> None:
        """The call ends with this status, in the error as in the call."""
        try:
            await call
        except grpc.RpcError as error:
            same(status, (error.code().value[0], error.details()), "the error's status")
        else:
            raise AssertionError("the call succeeded")
        same(status, ((await call.code()).value[0], await call.details()), "the call's status")

    async def _fails_as(self, call: Any, code: grpc.StatusCode) -> None:
        try:
            await call
        except grpc.RpcError as error:
            same(code, error.code(), "the error's code")
        else:
            raise AssertionError("the call succeeded")

    # --- one message each way

    async def empty_unary(self) -> None:
        same(self.messages.Empty(), await self.stub.EmptyCall(self.messages.Empty()), "the answer")

    async def large_unary(self) -> None:
        answer = await self.stub.UnaryCall(self._request())
        same(bytes(LARGE_RESPONSE), answer.payload.body, "the answer's body")

    # --- streams

    async def client_streaming(self) -> None:
        call = self.stub.StreamingInputCall()
        for size in REQUEST_SIZES:
            await call.write(self.messages.StreamingInputCallRequest(payload=self.messages.Payload(body=bytes(size))))
        await call.done_writing()
        same(sum(REQUEST_SIZES), (await call).aggregated_payload_size, "the sum")

    async def server_streaming(self) -> None:
        wanted = [self.messages.ResponseParameters(size=size) for size in RESPONSE_SIZES]
        call = self.stub.StreamingOutputCall(self.messages.StreamingOutputCallRequest(response_parameters=wanted))
        same([bytes(size) for size in RESPONSE_SIZES], [answer.payload.body async for answer in call], "the bodies")
        same(grpc.StatusCode.OK, await call.code(), "the status")

    async def ping_pong(self) -> None:
        call = self.stub.FullDuplexCall()
        for size, answer in zip(REQUEST_SIZES, RESPONSE_SIZES, strict=True):
            await call.write(self._ask(size, answer))
            same(bytes(answer), (await call.read()).payload.body, "an answer's body")
        await call.done_writing()
        same(EOF, await call.read(), "the end")
        same(grpc.StatusCode.OK, await call.code(), "the status")

    async def empty_stream(self) -> None:
        call = self.stub.FullDuplexCall()
        await call.done_writing()
        same(EOF, await call.read(), "the end")
        same(grpc.StatusCode.OK, await call.code(), "the status")

    # --- calls that are cut short

    async def cancel_after_begin(self) -> None:
        call = self.stub.StreamingInputCall()
        # So that there is something to cancel: a call that nobody waited for hasn't begun.
        await asyncio.sleep(0)
        same(True, call.cancel(), "the word of cancel()")
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            await call
        same(grpc.StatusCode.CANCELLED, await call.code(), "the status")
        same(True, call.cancelled(), "cancelled()")

    async def cancel_after_first_response(self) -> None:
        call = self.stub.FullDuplexCall()
        await call.write(self._ask(REQUEST_SIZES[0], RESPONSE_SIZES[0]))
        same(bytes(RESPONSE_SIZES[0]), (await call.read()).payload.body, "the first answer's body")
        same(True, call.cancel(), "the word of cancel()")
        try:
            seen = await call.read()
        except (asyncio.CancelledError, grpc.RpcError):
            pass
        else:
            raise AssertionError(f"after the cancellation came {seen!r}")
        same(grpc.StatusCode.CANCELLED, await call.code(), "the status")

    async def timeout_on_sleeping_server(self) -> None:
        for _ in range(MOMENTS):
            codes = await self._codes_of_sleeping_server()
            if not any(code.name in BAD_MOMENTS for code in codes):
                break
        same((grpc.StatusCode.DEADLINE_EXCEEDED,) * 2, codes, "the codes of the error and of the call")

    async def _codes_of_sleeping_server(self) -> tuple[grpc.StatusCode, grpc.StatusCode]:
        call = self.stub.FullDuplexCall(timeout=TIMEOUT)
        # The time may be over before there is a stream to write to.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await call.write(self._ask(REQUEST_SIZES[0], None))
        try:
            seen = await call.read()
        except grpc.RpcError as error:
            return error.code(), await call.code()
        raise AssertionError(f"the sleeping server sent {seen!r}")

    # --- how calls end

    async def status_code_and_message(self) -> None:
        status = self.messages.EchoStatus(code=STATUS[0], message=STATUS[1])
        await self._fails(self.stub.UnaryCall(self.messages.SimpleRequest(response_status=status)), STATUS)
        call = self.stub.FullDuplexCall()
        await call.write(self.messages.StreamingOutputCallRequest(response_status=status))
        await call.done_writing()
        try:
            seen = await call.read()
        except grpc.RpcError as error:
            same(STATUS, (error.code().value[0], error.details()), "the stream's error")
        else:
            raise AssertionError(f"the stream went on with {seen!r}")
        same(STATUS, ((await call.code()).value[0], await call.details()), "the stream's status")

    async def special_status_message(self) -> None:
        status = self.messages.EchoStatus(code=SPECIAL_STATUS[0], message=SPECIAL_STATUS[1])
        await self._fails(self.stub.UnaryCall(self.messages.SimpleRequest(response_status=status)), SPECIAL_STATUS)

    async def unimplemented_method(self) -> None:
        empty = self.messages.Empty
        method = self.channel.unary_unary(
            UNIMPLEMENTED, request_serializer=empty.SerializeToString, response_deserializer=empty.FromString
        )
        await self._fails_as(method(empty()), grpc.StatusCode.UNIMPLEMENTED)

    async def unimplemented_service(self) -> None:
        await self._fails_as(self.nobody.UnimplementedCall(self.messages.Empty()), grpc.StatusCode.UNIMPLEMENTED)

    # --- metadata

    async def custom_metadata(self) -> None:
        sent = (INITIAL, TRAILING)
        call = self.stub.UnaryCall(self._request(), metadata=sent)
        same(bytes(LARGE_RESPONSE), (await call).payload.body, "the answer's body")
        await self._echoed(call)
        call = self.stub.FullDuplexCall(metadata=sent)
        await call.write(self._ask(LARGE_REQUEST, LARGE_RESPONSE))
        same(bytes(LARGE_RESPONSE), (await call.read()).payload.body, "the stream's answer's body")
        await call.done_writing()
        same(EOF, await call.read(), "the end")
        await self._echoed(call)

    async def _echoed(self, call: Any) -> None:
        head, end = await call.initial_metadata(), await call.trailing_metadata()
        same([INITIAL[1]], [value for key, value in head if key == INITIAL[0]], "the initial metadata's echo")
        same([TRAILING[1]], [value for key, value in end if key == TRAILING[0]], "the trailing metadata's echo")
