"""Is the wire of the matrix as private as it says? Who is somebody else, or nobody, passes no scenario in mode enforce."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.interop.proxies import proxied
from tests.interop.scenarios_sync import SyncScenarios
from tests.interop.town import DNS_NAME, SERVICE

OPTIONS = [("grpc.ssl_target_name_override", DNS_NAME), ("grpc.use_local_subchannel_pool", 1)]


@contextlib.contextmanager
def refused(*codes: grpc.StatusCode) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() in codes, caught.value


def call(peers: Any, channel: grpc.Channel) -> None:
    with channel:
        SyncScenarios(channel, peers.town.protocol).run("empty_unary")


def test_a_mesh_client_refuses_an_envoy_that_is_somebody_else(peers: Any) -> None:
    """Its certificate is of our CA, but for another service."""
    with (
        proxied(peers.town, inward=[peers.server("aio")], as_service="stranger") as (port,),
        peers.town.mesh("enforce", f"127.0.0.1:{port}") as mesh,
    ):
        with refused(grpc.StatusCode.UNAVAILABLE):
            call(peers, mesh.sync_grpc_channel(SERVICE))


@pytest.mark.parametrize("server", ["aio", "sync"])
def test_a_mesh_server_refuses_who_has_no_certificate(peers: Any, server: str) -> None:
    """In plain text, and with TLS from one side alone."""
    target = f"127.0.0.1:{peers.server(server, 'enforce')}"
    with refused(grpc.StatusCode.UNAVAILABLE):
        call(peers, grpc.insecure_channel(target))
    bundle = peers.town.pem("caller", "bundle").read_bytes()
    with refused(grpc.StatusCode.UNAVAILABLE):
        call(peers, grpc.secure_channel(target, grpc.ssl_channel_credentials(bundle), OPTIONS))


@pytest.mark.parametrize("server", ["aio", "sync"])
def test_a_mesh_server_denies_whom_no_rule_allows(peers: Any, server: str) -> None:
    """A certificate opens the connection, and no more; neither does Envoy's open more for others."""
    target = f"127.0.0.1:{peers.server(server, 'enforce')}"
    with refused(grpc.StatusCode.PERMISSION_DENIED):
        call(peers, grpc.secure_channel(target, peers.town.credentials("stranger"), OPTIONS))
    with proxied(peers.town, outward=[peers.server(server, "enforce")], as_service="stranger") as (port,):
        with refused(grpc.StatusCode.PERMISSION_DENIED):
            call(peers, grpc.insecure_channel(f"127.0.0.1:{port}"))
