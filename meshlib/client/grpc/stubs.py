"""What does a generated stub hold for each of its methods on a mesh channel under asyncio?

A multicallable of gRPC's four kinds, with gRPC's arguments.
"""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from .calls import UnaryUnaryCall, extras
from .streams import Run, StreamStreamCall, StreamUnaryCall, UnaryStreamCall
from .way import GrpcWay, Method


class _Stub:
    _kind = ""

    def __init__(self, way: GrpcWay, name: str, serializer: Any, deserializer: Any, is_registered: bool | None) -> None:
        self._method = Method(way, self._kind, name, serializer, deserializer, is_registered)

    def _run(
        self,
        request: Any,
        timeout: float | None,
        metadata: Any,
        credentials: Any,
        wait_for_ready: bool | None,
        compression: Any,
    ) -> Run:
        links = self._method.way.links
        assert links is not None
        links.check_home()
        return Run(self._method, request, timeout, metadata, wait_for_ready, extras(credentials, compression))


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
        method = self._method
        message = request if method.serializer is None else method.serializer(request)
        return UnaryUnaryCall(method, message, timeout, metadata, wait_for_ready, extras(credentials, compression))


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
        return UnaryStreamCall(self._run(message, timeout, metadata, credentials, wait_for_ready, compression))


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
        return StreamUnaryCall(self._run(request_iterator, timeout, metadata, credentials, wait_for_ready, compression))


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
        return StreamStreamCall(self._run(request_iterator, timeout, metadata, credentials, wait_for_ready, compression))
