"""Does the public face have the types that a user expects? Checked by mypy --strict, never run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, assert_type

import grpc
import grpc.aio
import httpx

import meshlib


async def outbound(mesh: meshlib.Mesh) -> None:
    assert_type(mesh.client(), httpx.AsyncClient)
    assert_type(mesh.sync_client(), httpx.Client)
    assert_type(mesh.transport(), httpx.AsyncBaseTransport)
    assert_type(mesh.sync_transport(), httpx.BaseTransport)
    assert_type(mesh.grpc_channel("inventory"), grpc.aio.Channel)
    assert_type(mesh.sync_grpc_channel("inventory"), grpc.Channel)
    async with mesh.client() as http:
        response = await http.get("http://orders/items/7")
        assert_type(response, httpx.Response)
    with mesh.deadline(0.8) as end:
        assert_type(end, float)


def inbound(mesh: meshlib.Mesh, server: Any) -> None:
    assert_type(mesh.grpc_server_interceptors(), Sequence[grpc.aio.ServerInterceptor[Any, Any]])
    assert_type(mesh.add_grpc_port(server, "127.0.0.1:8443"), int)
    peer = meshlib.peer()
    assert_type(peer, meshlib.Peer | None)
    if peer is not None:
        assert_type(peer.spiffe_id, str)
    assert_type(meshlib.remaining(), float | None)


def failures() -> None:
    try:
        raise meshlib.CircuitOpen
    except meshlib.MeshError as error:
        assert_type(error.reason, str)
        assert_type(error.hint, str)
    try:
        meshlib.Mesh.load("mesh.yaml")
    except meshlib.ConfigError as error:
        assert_type(error.problems, list[meshlib.Problem])
