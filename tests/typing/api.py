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


async def guarded(mesh: meshlib.Mesh) -> None:
    @mesh.guard("ledger", idempotent=True, timeout=2.0, fallback=meshlib.last_good(30.0))
    async def book(account: int, *, amount: float) -> str:
        return ""

    @mesh.guard("ledger", ignore=KeyError, fallback=None)
    def look(account: int) -> list[str]:
        return []

    class Books:
        @mesh.guard("ledger")
        async def all(self, account: int) -> bytes:
            return b""

    assert_type(await book(7, amount=1.0), str)
    assert_type(look(7), list[str])
    assert_type(await Books().all(7), bytes)
    look("7")  # type: ignore[arg-type]
    meshlib.policy(labels={"version": "v2"}, fallback=lambda error: {"items": []}, key="user-7")


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
    except OSError as error:
        assert_type(meshlib.call_of(error), meshlib.Call | None)
    except meshlib.ConfigError as error:
        assert_type(error.problems, list[meshlib.Problem])
