"""How does a thread call a Service of the mesh over gRPC?

Through a `grpc.Channel` for generated stubs. A call with one message each way goes the same outbound way as under asyncio, in the
calling thread; a hedge beside it is moved by gRPC's threads. What isn't waited for at once is in sync_calls.py.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import grpc

from ..way import OutboundWay
from .calls import extras
from .course import OTHERS, Course, Leg
from .links import Options, SyncLinks
from .sync_calls import Outgoing, Responses, SyncFuture
from .way import GrpcWay, Method


class MeshSyncChannel(grpc.Channel):
    """A `grpc.Channel` to a Service: to all its endpoints, one picked for each call. For any thread of the process that used it first."""

    def __init__(
        self,
        service: str,
        outbound: OutboundWay,
        *,
        idempotent: Iterable[str] = (),
        options: Options = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._links = SyncLinks(service, outbound, options, names)
        self._way = GrpcWay(service, outbound, self._links, idempotent)

    def __repr__(self) -> str:
        return f"<MeshSyncChannel to {self._way.service!r}{' closed' if self._links.is_closed else ''}>"

    def __enter__(self) -> MeshSyncChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        self.close()
        return None

    def close(self) -> None:
        """Close every connection; calls under way are cancelled."""
        self._links.close()

    def subscribe(self, callback: Callable[[Any], None], try_to_connect: bool | None = False) -> None:
        """Told once: IDLE, or SHUTDOWN after close. Connections come with calls, and each endpoint has its own."""
        callback(grpc.ChannelConnectivity.SHUTDOWN if self._links.is_closed else grpc.ChannelConnectivity.IDLE)

    def unsubscribe(self, callback: Callable[[Any], None]) -> None:
        """Nothing to do: `subscribe` keeps nothing."""

    def _method(self, kind: str, *how: Any) -> Method:
        return Method(self._way, kind, *how)

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _UnaryUnary:
        return _UnaryUnary(self._method("unary_unary", method, request_serializer, response_deserializer, _registered_method))

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _UnaryStream:
        return _UnaryStream(self._method("unary_stream", method, request_serializer, response_deserializer, _registered_method))

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _StreamUnary:
        return _StreamUnary(self._method("stream_unary", method, request_serializer, response_deserializer, _registered_method))

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _StreamStream:
        return _StreamStream(self._method("stream_stream", method, request_serializer, response_deserializer, _registered_method))


class _Stub:
    def __init__(self, method: Method) -> None:
        self._method = method

    def _outgoing(
        self,
        starter: str,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Outgoing:
        links = self._method.way.links
        assert links is not None
        links.check_home()
        more = extras(credentials, compression)
        return Outgoing(self._method, starter, request, timeout, metadata, wait_for_ready, more)


class _UnaryUnary(_Stub, grpc.UnaryUnaryMultiCallable):  # type: ignore[type-arg]  # generic in the stubs only
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return self._ask(False, request, timeout, metadata, credentials, wait_for_ready, compression)

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return self._ask(True, request, timeout, metadata, credentials, wait_for_ready, compression)

    def _ask(
        self,
        with_call: bool,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Any:
        method, more = self._method, extras(credentials, compression)
        message = request if method.serializer is None else method.serializer(request)
        course = Course(method, timeout, metadata, wait_for_ready)
        try:
            while pause := course.step():
                time.sleep(pause)
            if course.is_hedged:
                reply = _race(course, method, message, more)
                return reply if with_call else reply[0]
            while True:
                start = method.on(course.link)
                if with_call:
                    start = start.with_call
                try:
                    answer = start(message, timeout=course.timeout, metadata=course.sent, **more)
                    break
                except grpc.RpcError as error:
                    if not course.fail(error):
                        raise
                while pause := course.step():
                    time.sleep(pause)
            course.good()
            return answer
        finally:
            if not course.is_over:
                course.give_up()

    def future(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        message = self._method.write(request)
        return SyncFuture(self._outgoing("future", message, timeout, metadata, credentials, wait_for_ready, compression))


class _UnaryStream(_Stub, grpc.UnaryStreamMultiCallable):  # type: ignore[type-arg]  # generic in the stubs only
    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        message = self._method.write(request)
        return Responses(self._outgoing("", message, timeout, metadata, credentials, wait_for_ready, compression))


class _StreamUnary(_Stub, grpc.StreamUnaryMultiCallable):  # type: ignore[type-arg]  # generic in the stubs only
    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return self.with_call(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)[0]

    def with_call(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> tuple[Any, Any]:
        future = self.future(request_iterator, timeout, metadata, credentials, wait_for_ready, compression)
        return future.result(), future

    def future(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return SyncFuture(self._outgoing("future", request_iterator, timeout, metadata, credentials, wait_for_ready, compression))


class _StreamStream(_Stub, grpc.StreamStreamMultiCallable):  # type: ignore[type-arg]  # generic in the stubs only
    def __call__(
        self,
        request_iterator: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return Responses(self._outgoing("", request_iterator, timeout, metadata, credentials, wait_for_ready, compression))


def _race(course: Course, method: Method, message: Any, more: dict[str, Any]) -> tuple[Any, Any]:
    """hedge: of the attempts under way, the one that ends first. gRPC's threads move them, and this one waits."""
    under_way: dict[Any, Leg] = {}
    landed: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pause = 0.0
    try:
        while True:
            while pause > 0.0:
                time.sleep(pause)
                pause = course.step()
            if pause != OTHERS:
                attempt = method.on(course.link).future(message, timeout=course.timeout, metadata=course.sent, **more)
                under_way[attempt] = course.put_aside()
                attempt.add_done_callback(landed.put)
            try:
                ended = landed.get(timeout=course.hedge_after())
            except queue.Empty:
                # All are slow: another endpoint is asked for the same.
                pause = course.step()
                continue
            course.take_up(under_way.pop(ended))
            if ended.code() is grpc.StatusCode.OK:
                course.good()
                return ended.result(), ended
            if not course.fail(ended):
                raise ended
            pause = course.step()
    finally:
        for attempt, leg in under_way.items():
            attempt.cancel()
            course.drop(leg)
