"""What does an xDS client of grpcio need to be told? A control plane that serves a file: `control_plane.py RESOURCES_JSON [PORT]`; prints its port.

The file is a list of resources, each with its `@type`. ADS, state of the world, and nothing ever changes: each type is answered when a
client's names for it do. It runs with the Python of `.venv-peers`, since xds-protos writes into the trees of other packages and must not
be installed beside OpenTelemetry.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf import any_pb2, json_format

# JSON becomes an Any only of types that are known.
for _known in (
    "config.listener.v3.listener",
    "config.route.v3.route",
    "config.cluster.v3.cluster",
    "config.endpoint.v3.endpoint",
    "extensions.filters.network.http_connection_manager.v3.http_connection_manager",
    "extensions.filters.http.router.v3.router",
    "extensions.transport_sockets.tls.v3.tls",
):
    importlib.import_module(f"envoy.{_known}_pb2")


class ControlPlane(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def __init__(self, resources: list[dict[str, Any]]) -> None:
        self._known: dict[tuple[str, str], any_pb2.Any] = {}
        for resource in resources:
            name = resource.get("name") or resource["cluster_name"]
            self._known[resource["@type"], name] = json_format.ParseDict(resource, any_pb2.Any())

    async def StreamAggregatedResources(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        told: dict[str, tuple[str, ...]] = {}
        async for request in requests:
            if request.HasField("error_detail"):
                print("refused:", request.error_detail.message, file=sys.stderr, flush=True)
            names = tuple(sorted(request.resource_names))
            if told.get(request.type_url) == names:
                continue
            told[request.type_url] = names
            found = [any_ for (kind, name), any_ in self._known.items() if kind == request.type_url and name in names]
            yield discovery_pb2.DiscoveryResponse(version_info="1", type_url=request.type_url, nonce="1", resources=found)


async def main(file: str, port: str = "0") -> None:
    server = grpc.aio.server()
    resources = json.loads(Path(file).read_text())
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(ControlPlane(resources), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print(f"listening on port {bound}", flush=True)
    await server.wait_for_termination()


asyncio.run(main(*sys.argv[1:]))
