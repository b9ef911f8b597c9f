"""What does each scenario ask of a blocking grpc.Channel? A method each, named as in expected.py: it returns, or raises what was wrong."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc

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


class Requests:
    """An iterator of requests that is fed while gRPC takes from it, in a thread of gRPC's; it ends when the scenario does."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._queue.get, None)

    def send(self, message: Any) -> None:
        self._queue.put(message)

    def end(self) -> None:
        self._queue.put(None)


class SyncScenarios:
    """All of them, over one channel."""

    def __init__(self, channel: grpc.Channel, protocol: Protocol) -> None:
        self.channel = channel
        self.messages = protocol.messages
        self.stub = protocol.services.TestServiceStub(channel)
        self.nobody = protocol.services.UnimplementedServiceStub(channel)

    def run(self, name: str, *, patience: float = 20.0) -> None:
        """In a thread of its own, so that a call which never ends is told of."""
        ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                getattr(self, name)()
            except BaseException as error:
                ends.put(error)
            else:
                ends.put(None)

        threading.Thread(target=work, name=name, daemon=True).start()
        try:
            error = ends.get(timeout=patience)
        except queue.Empty:
            raise TimeoutError(f"{name} still waits after {patience:g} s") from None
        if error is not None:
            raise error

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

    def _fails(self, method: Any, request: Any) -> Any:
        try:
            method(request)
        except grpc.RpcError as error:
            return error
        raise AssertionError("the call succeeded")

    def _breaks(self, call: Any) -> Any:
        """The stream ends with an error, and not with an answer or with success."""
        try:
            seen = next(call)
        except grpc.RpcError as error:
            return error
        except StopIteration:
            raise AssertionError("the stream ended with success") from None
        raise AssertionError(f"the stream went on with {seen!r}")

    def _ends(self, call: Any) -> None:
        same([], [len(answer.payload.body) for answer in call], "what comes after the last answer")
        same(grpc.StatusCode.OK, call.code(), "the status")

    # --- one message each way

    def empty_unary(self) -> None:
        same(self.messages.Empty(), self.stub.EmptyCall(self.messages.Empty()), "the answer")

    def large_unary(self) -> None:
        same(bytes(LARGE_RESPONSE), self.stub.UnaryCall(self._request()).payload.body, "the answer's body")

    # --- streams

    def client_streaming(self) -> None:
        made = self.messages.StreamingInputCallRequest
        requests = [made(payload=self.messages.Payload(body=bytes(size))) for size in REQUEST_SIZES]
        answer = self.stub.StreamingInputCall(iter(requests))
        same(sum(REQUEST_SIZES), answer.aggregated_payload_size, "the sum")

    def server_streaming(self) -> None:
        wanted = [self.messages.ResponseParameters(size=size) for size in RESPONSE_SIZES]
        call = self.stub.StreamingOutputCall(self.messages.StreamingOutputCallRequest(response_parameters=wanted))
        same([bytes(size) for size in RESPONSE_SIZES], [answer.payload.body for answer in call], "the bodies")
        same(grpc.StatusCode.OK, call.code(), "the status")

    def ping_pong(self) -> None:
        with Requests() as requests:
            call = self.stub.FullDuplexCall(iter(requests))
            for size, answer in zip(REQUEST_SIZES, RESPONSE_SIZES, strict=True):
                requests.send(self._ask(size, answer))
                same(bytes(answer), next(call).payload.body, "an answer's body")
            requests.end()
            self._ends(call)

    def empty_stream(self) -> None:
        self._ends(self.stub.FullDuplexCall(iter(())))

    # --- calls that are cut short

    def cancel_after_begin(self) -> None:
        with Requests() as requests:
            call = self.stub.StreamingInputCall.future(iter(requests))
            call.cancel()
            same(grpc.StatusCode.CANCELLED, call.code(), "the status")
            same(True, call.cancelled(), "cancelled()")

    def cancel_after_first_response(self) -> None:
        with Requests() as requests:
            call = self.stub.FullDuplexCall(iter(requests))
            requests.send(self._ask(REQUEST_SIZES[0], RESPONSE_SIZES[0]))
            same(bytes(RESPONSE_SIZES[0]), next(call).payload.body, "the first answer's body")
            call.cancel()
            same(grpc.StatusCode.CANCELLED, self._breaks(call).code(), "the error's code")
            same(grpc.StatusCode.CANCELLED, call.code(), "the status")

    def timeout_on_sleeping_server(self) -> None:
        for _ in range(MOMENTS):
            codes = self._codes_of_sleeping_server()
            if not any(code.name in BAD_MOMENTS for code in codes):
                break
        same((grpc.StatusCode.DEADLINE_EXCEEDED,) * 2, codes, "the codes of the error and of the call")

    def _codes_of_sleeping_server(self) -> tuple[grpc.StatusCode, grpc.StatusCode]:
        with Requests() as requests:
            call = self.stub.FullDuplexCall(iter(requests), timeout=TIMEOUT)
            requests.send(self._ask(REQUEST_SIZES[0], None))
            return self._breaks(call).code(), call.code()

    # --- how calls end

    def status_code_and_message(self) -> None:
        status = self.messages.EchoStatus(code=STATUS[0], message=STATUS[1])
        error = self._fails(self.stub.UnaryCall, self.messages.SimpleRequest(response_status=status))
        same(STATUS, (error.code().value[0], error.details()), "the status")
        call = self.stub.FullDuplexCall(iter([self.messages.StreamingOutputCallRequest(response_status=status)]))
        error = self._breaks(call)
        same(STATUS, (error.code().value[0], error.details()), "the stream's error")
        same(STATUS, (call.code().value[0], call.details()), "the stream's status")

    def special_status_message(self) -> None:
        status = self.messages.EchoStatus(code=SPECIAL_STATUS[0], message=SPECIAL_STATUS[1])
        error = self._fails(self.stub.UnaryCall, self.messages.SimpleRequest(response_status=status))
        same(SPECIAL_STATUS, (error.code().value[0], error.details()), "the status")

    def unimplemented_method(self) -> None:
        empty = self.messages.Empty
        method = self.channel.unary_unary(
            UNIMPLEMENTED, request_serializer=empty.SerializeToString, response_deserializer=empty.FromString
        )
        same(grpc.StatusCode.UNIMPLEMENTED, self._fails(method, empty()).code(), "the code")

    def unimplemented_service(self) -> None:
        error = self._fails(self.nobody.UnimplementedCall, self.messages.Empty())
        same(grpc.StatusCode.UNIMPLEMENTED, error.code(), "the code")

    # --- metadata

    def custom_metadata(self) -> None:
        sent = (INITIAL, TRAILING)
        answer, call = self.stub.UnaryCall.with_call(self._request(), metadata=sent)
        same(bytes(LARGE_RESPONSE), answer.payload.body, "the answer's body")
        self._echoed(call)
        with Requests() as requests:
            call = self.stub.FullDuplexCall(iter(requests), metadata=sent)
            requests.send(self._ask(LARGE_REQUEST, LARGE_RESPONSE))
            same(bytes(LARGE_RESPONSE), next(call).payload.body, "the stream's answer's body")
            requests.end()
            self._ends(call)
            self._echoed(call)

    def _echoed(self, call: Any) -> None:
        head, end = call.initial_metadata(), call.trailing_metadata()
        same([INITIAL[1]], [value for key, value in head if key == INITIAL[0]], "the initial metadata's echo")
        same([TRAILING[1]], [value for key, value in end if key == TRAILING[0]], "the trailing metadata's echo")
