"""Do the mesh's clients and servers pass gRPC's interoperability scenarios with peers that know nothing of the mesh?

The scenarios are in tests/interop, each once for grpc.aio and once for threads, and written for any channel: so each is run over bare
channels and over the mesh's. `python -m tests.interop` runs them with peers of other languages.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.interop.expected import SCENARIOS
from tests.interop.scenarios_aio import AioScenarios
from tests.interop.scenarios_sync import SyncScenarios
from tests.interop.town import DNS_NAME, SERVICE

pytestmark = pytest.mark.timeout(90)

KINDS = ("aio", "sync")
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
each_client = pytest.mark.parametrize("client", KINDS)
each_server = pytest.mark.parametrize("server", KINDS)


async def over_mesh(peers: Any, mode: str, port: int, client: str, scenario: str) -> None:
    mesh = peers.mesh(mode, port)
    if client == "aio":
        async with mesh.grpc_channel(SERVICE) as channel:
            await AioScenarios(channel, peers.town.protocol).run(scenario)
    else:
        with mesh.sync_grpc_channel(SERVICE) as channel:
            SyncScenarios(channel, peers.town.protocol).run(scenario)
    # And leaves no permit behind, once gRPC has said from its own thread that the call is over.
    patience = time.monotonic() + 5.0
    while in_flight := sum(row["in_flight"] for row in mesh.engine.stats(0.0)):
        assert time.monotonic() < patience, in_flight
        await asyncio.sleep(0.01)


async def over_grpc(peers: Any, port: int, client: str, scenario: str, *, is_mutual: bool = False) -> None:
    target = f"127.0.0.1:{port}"
    credentials = peers.town.credentials() if is_mutual else None
    options = [("grpc.ssl_target_name_override", DNS_NAME), ("grpc.use_local_subchannel_pool", 1)]
    if client == "aio":
        made = grpc.aio.secure_channel(target, credentials, options) if is_mutual else grpc.aio.insecure_channel(target, options)
        async with made as channel:
            await AioScenarios(channel, peers.town.protocol).run(scenario)
    else:
        made = grpc.secure_channel(target, credentials, options) if is_mutual else grpc.insecure_channel(target, options)
        with made as channel:
            SyncScenarios(channel, peers.town.protocol).run(scenario)


# --- the mesh's clients


@each_client
@each_server
@every_scenario
async def test_a_mesh_client_calls_a_bare_server(peers: Any, scenario: str, server: str, client: str) -> None:
    """In mode observe, in plain text."""
    await over_mesh(peers, "observe", peers.server(server), client, scenario)


@each_client
@each_server
@every_scenario
async def test_a_mesh_client_calls_a_mesh_server(peers: Any, scenario: str, server: str, client: str) -> None:
    """In mode enforce, with mutual TLS and a rule that allows it."""
    await over_mesh(peers, "enforce", peers.server(server, "enforce"), client, scenario)


@each_client
@each_server
@every_scenario
async def test_a_mesh_client_calls_a_bare_server_behind_envoy(peers: Any, scenario: str, server: str, client: str) -> None:
    """Envoy takes the mutual TLS in, and checks our SPIFFE ID."""
    await over_mesh(peers, "enforce", peers.inward(server), client, scenario)


# --- the mesh's servers


@each_client
@each_server
@every_scenario
async def test_a_bare_client_calls_a_mesh_server(peers: Any, scenario: str, server: str, client: str) -> None:
    """In mode observe, in plain text."""
    await over_grpc(peers, peers.server(server, "observe"), client, scenario)


@each_client
@each_server
@every_scenario
async def test_a_bare_client_with_a_certificate_calls_a_mesh_server(peers: Any, scenario: str, server: str, client: str) -> None:
    """In mode enforce: the certificate is of our CA, and gRPC compares the DNS name in the server's."""
    await over_grpc(peers, peers.server(server, "enforce"), client, scenario, is_mutual=True)


@each_client
@each_server
@every_scenario
async def test_a_bare_client_calls_a_mesh_server_through_envoy(peers: Any, scenario: str, server: str, client: str) -> None:
    """In mode enforce: Envoy has the certificate, and the rule allows Envoy."""
    await over_grpc(peers, peers.outward(server), client, scenario)


@each_client
@each_server
@pytest.mark.parametrize("mode", ["observe", "enforce"])
@every_scenario
def test_a_proxyless_client_calls_a_mesh_server(peers: Any, scenario: str, mode: str, server: str, client: str) -> None:
    """grpcio's own xDS client, in plain text, and with mutual TLS that its control plane demands."""
    peers.xds(server, mode).run(client, scenario)
