"""How does a gRPC stub call a Service of the mesh?

Through a channel that is a `grpc.aio.Channel` (or a `grpc.Channel`) for generated stubs and has a gRPC channel to each endpoint
underneath: every attempt of every call is a pick of the engine, as for HTTP. Public API of grpcio only. The request's way is in
course.py, call objects in calls.py and streams.py (asyncio), sync.py and sync_calls.py (threads), connections
in links.py.

For channels that users build themselves there are interceptors: deadline, trace, attempt's number, limits and budget, without
balancing (interceptors.py). grpc-web, Connect and JSON transcoding are not spoken here: they are for a gateway.

gRPC calls are never idempotent by themselves. What may be repeated after it may have been processed is declared: by the route, by
`idempotent=("/pkg.Svc/Method", "/pkg.Svc/*")` of the channel, or for one call by the metadata `x-mesh-idempotent: 1`, which stays
here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from ..way import OutboundWay
from .course import IDEMPOTENT
from .interceptors import client_interceptors, sync_client_interceptors
from .links import READY, AioLinks, Options, peer_names
from .status import rpc_error
from .stubs import StreamStream, StreamUnary, UnaryStream, UnaryUnary
from .sync import MeshSyncChannel
from .way import GrpcWay

__all__ = [
    "IDEMPOTENT",
    "MeshChannel",
    "MeshSyncChannel",
    "client_interceptors",
    "open_channel",
    "open_sync_channel",
    "rpc_error",
    "sync_client_interceptors",
]

# How often a caller that waits for a connection looks, while there is no channel to an endpoint yet.
LOOK_EVERY = 0.05


def open_channel(mesh: Any, service: str, *, idempotent: Iterable[str] = (), options: Options = ()) -> MeshChannel:
    """A `grpc.aio.Channel` to a Service of a mesh."""
    return MeshChannel(service, mesh.outbound, idempotent=idempotent, options=options, names=peer_names(mesh.config, service))


def open_sync_channel(mesh: Any, service: str, *, idempotent: Iterable[str] = (), options: Options = ()) -> MeshSyncChannel:
    """A `grpc.Channel` to a Service of a mesh."""
    return MeshSyncChannel(service, mesh.outbound, idempotent=idempotent, options=options, names=peer_names(mesh.config, service))


class MeshChannel(grpc.aio.Channel):
    """A `grpc.aio.Channel` to a Service: to all its endpoints, one picked for each attempt.

    It belongs to the event loop of its first call. `options` are gRPC's channel arguments (message sizes, keepalive) and can't
    switch the mesh's own off.
    """

    def __init__(
        self,
        service: str,
        outbound: OutboundWay,
        *,
        idempotent: Iterable[str] = (),
        options: Options = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._links = AioLinks(service, outbound, options, names)
        self._way = GrpcWay(service, outbound, self._links, idempotent)

    def __repr__(self) -> str:
        return f"<MeshChannel to {self._way.service!r}{' closed' if self._links.is_closed else ''}>"

    async def __aenter__(self) -> MeshChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        await self.close(None)
        return None

    async def close(self, grace: float | None = None) -> None:
        """Take no new calls; wait up to `grace` seconds for those under way, then cancel them."""
        await self._links.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """READY if an endpoint is connected, else IDLE: connections come with calls, so `try_to_connect` has nobody to try."""
        if self._links.is_closed:
            return grpc.ChannelConnectivity.SHUTDOWN
        return READY if any(state is READY for _, state in self._links.states()) else grpc.ChannelConnectivity.IDLE

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        while self.get_state() is last_observed_state:  # noqa: ASYNC110  # endpoints come and go, and nobody tells
            await asyncio.sleep(LOOK_EVERY)

    async def channel_ready(self) -> None:
        """Return when the engine knows an endpoint that a call could go to. The connection is made by the call."""
        way = self._way
        engine = way.outbound.engine
        while not any(row["service"] == way.service and row["endpoint"] for row in engine.stats(way.clock())):  # noqa: ASYNC110  # the same
            await asyncio.sleep(LOOK_EVERY)

    def unary_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> UnaryUnary:
        return UnaryUnary(self._way, method, request_serializer, response_deserializer, _registered_method)

    def unary_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> UnaryStream:
        return UnaryStream(self._way, method, request_serializer, response_deserializer, _registered_method)

    def stream_unary(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> StreamUnary:
        return StreamUnary(self._way, method, request_serializer, response_deserializer, _registered_method)

    def stream_stream(
        self,
        method: str,
        request_serializer: Any = None,
        response_deserializer: Any = None,
        _registered_method: bool | None = False,
    ) -> StreamStream:
        return StreamStream(self._way, method, request_serializer, response_deserializer, _registered_method)
