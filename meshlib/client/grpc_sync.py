"""How does a thread call a Service of the mesh over gRPC?

Through a `grpc.Channel` for generated stubs. A call with one message each way goes the same outbound way as under asyncio, in the
calling thread. What gRPC moves on threads of its own (`future()`, streams) is picked once, tried once and recorded when it ends;
retries for those are not offered here.

The latency of a stream is taken at its first response, so a response stream is handed out in a thin wrapper.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import grpc

from .grpc_calls import Method, extras
from .grpc_links import Options, SyncLinks
from .grpc_way import Course, GrpcWay
from .way import OutboundWay


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
        return _UnaryUnary(
            self._way, self._method("unary_unary", method, request_serializer, response_deserializer, _registered_method)
        )

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _UnaryStream:
        return _UnaryStream(
            self._way, self._method("unary_stream", method, request_serializer, response_deserializer, _registered_method)
        )

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _StreamUnary:
        return _StreamUnary(
            self._way, self._method("stream_unary", method, request_serializer, response_deserializer, _registered_method)
        )

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> _StreamStream:
        return _StreamStream(
            self._way, self._method("stream_stream", method, request_serializer, response_deserializer, _registered_method)
        )


class _Watched:
    """A call that gRPC drives on its own: one attempt, whose head and end are noted once each."""

    __slots__ = ("_course", "_lock", "inner")

    def __init__(
        self, way: GrpcWay, method: Method, starter: str, request: Any, timeout: float | None, metadata: Any, more: Any
    ) -> None:
        self._lock = threading.RLock()
        course = self._course = Course(
            way,
            method.name,
            timeout,
            metadata,
            is_idempotent=method.is_idempotent,
            is_replayable=False,
            is_stream=method.kind != "unary_unary",
        )
        course.step()  # the first attempt never has to wait
        try:
            start = method.on(course.link)
            start = getattr(start, starter) if starter else start
            self.inner = start(request, timeout=course.timeout, metadata=course.sent, **more)
        except BaseException:
            course.give_up()
            raise
        if not self.inner.add_callback(self.end):
            self.end()

    def head(self) -> None:
        """The first response is there."""
        with self._lock:
            self._course.head()

    def end(self) -> None:
        """gRPC says that the call is over."""
        code = self.inner.code()
        with self._lock:
            course = self._course
            if code is grpc.StatusCode.OK or course.is_headed:
                course.head()
                course.end(code, is_cancelled=code is grpc.StatusCode.CANCELLED)
            elif code is grpc.StatusCode.CANCELLED:
                course.give_up()
            else:
                course.fail(self.inner)


class _Responses:
    """A stream of responses that tells when its first one came. Everything else is gRPC's own call."""

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        self._inner = watched.inner

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        message = next(self._inner)
        self._watched.head()
        return message

    next = __next__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __del__(self) -> None:
        inner = self.__dict__.get("_inner")
        if inner is not None:
            inner.cancel()


class _Stub:
    def __init__(self, way: GrpcWay, method: Method) -> None:
        self._way = way
        self._method = method

    def _watch(
        self, starter: str, request: Any, timeout: float | None, metadata: Any, credentials: Any, compression: Any
    ) -> _Watched:
        more = extras(credentials, compression)
        return _Watched(self._way, self._method, starter, request, timeout, metadata, more)


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
        return self.with_call(request, timeout, metadata, credentials, wait_for_ready, compression)[0]

    def with_call(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> tuple[Any, Any]:
        method, more = self._method, extras(credentials, compression)
        message = method.write(request)
        course = Course(
            self._way,
            method.name,
            timeout,
            metadata,
            is_idempotent=method.is_idempotent,
            is_replayable=True,
            is_stream=False,
        )
        try:
            while True:
                while pause := course.step():
                    time.sleep(pause)
                try:
                    start = method.on(course.link).with_call
                    reply: tuple[Any, Any] = start(message, timeout=course.timeout, metadata=course.sent, **more)
                    break
                except grpc.RpcError as error:
                    if not course.fail(error):
                        raise
            course.head()
            course.end()
            return reply
        finally:
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
        return self._watch("future", self._method.write(request), timeout, metadata, credentials, compression).inner


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
        return _Responses(self._watch("", self._method.write(request), timeout, metadata, credentials, compression))


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
        return self._watch("future", request_iterator, timeout, metadata, credentials, compression).inner


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
        return _Responses(self._watch("", request_iterator, timeout, metadata, credentials, compression))
