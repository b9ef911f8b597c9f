"""What does a generated stub hold for each of its methods on a mesh channel under asyncio?

A multicallable of gRPC's four kinds, with gRPC's arguments. `wait_for_ready` is accepted and has no effect.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from .grpc_calls import Method, UnaryUnaryCall, extras
from .grpc_streams import Run, StreamStreamCall, StreamUnaryCall, UnaryStreamCall
from .grpc_way import GrpcWay


class _Stub:
    _kind = ""

    def __init__(self, way: GrpcWay, name: str, serializer: Any, deserializer: Any, is_registered: bool | None) -> None:
        self._way = way
        self._method = Method(way, self._kind, name, serializer, deserializer, is_registered)

    def _run(self, request: Any, timeout: float | None, metadata: Any, credentials: Any, compression: Any) -> Run:
        assert self._way.links is not None
        self._way.links.check_home()
        return Run(self._way, self._method, request, timeout, metadata, extras(credentials, compression))


class UnaryUnary(_Stub, grpc.aio.UnaryUnaryMultiCallable[Any, Any]):
    _kind = "unary_unary"

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        method, more = self._method, extras(credentials, compression)
        return UnaryUnaryCall(self._way, method, method.write(request), timeout, metadata, more)


class UnaryStream(_Stub, grpc.aio.UnaryStreamMultiCallable[Any, Any]):
    _kind = "unary_stream"

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
        return UnaryStreamCall(self._run(message, timeout, metadata, credentials, compression))


class StreamUnary(_Stub, grpc.aio.StreamUnaryMultiCallable[Any, Any]):
    _kind = "stream_unary"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return StreamUnaryCall(self._run(request_iterator, timeout, metadata, credentials, compression))


class StreamStream(_Stub, grpc.aio.StreamStreamMultiCallable[Any, Any]):
    _kind = "stream_stream"

    def __call__(
        self,
        request_iterator: Any = None,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        return StreamStreamCall(self._run(request_iterator, timeout, metadata, credentials, compression))
