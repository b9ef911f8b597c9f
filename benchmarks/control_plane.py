"""What does a control plane say to grpcio's own balancer?

The aggregated discovery service (ADS) of xDS v3 for one file of resources that never change: each subscription is answered once, and again when it asks for
other names. `python -m benchmarks.control_plane PORT FILE`, in an environment that has grpcio and xds-protos; it imports nothing else of this project.
It pushes no changes, and believes every caller.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2
from google.protobuf import any_pb2, json_format

# What is JSON becomes a message only if its type has been loaded.
TYPES = (
    "config.listener.v3.listener",
    "config.listener.v3.api_listener",
    "config.route.v3.route",
    "config.cluster.v3.cluster",
    "config.endpoint.v3.endpoint",
    "extensions.filters.network.http_connection_manager.v3.http_connection_manager",
    "extensions.filters.http.router.v3.router",
)


class Plane(ads_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def __init__(self, resources: list[dict[str, Any]]) -> None:
        self._by_type: dict[str, dict[str, Any]] = {}
        for resource in resources:
            name = resource.get("name") or resource["cluster_name"]
            self._by_type.setdefault(resource["@type"], {})[name] = json_format.ParseDict(resource, any_pb2.Any())

    async def StreamAggregatedResources(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        asked: dict[str, frozenset[str]] = {}
        async for request in requests:
            if request.HasField("error_detail"):
                print(f"refused: {request.type_url}: {request.error_detail.message}", file=sys.stderr, flush=True)
                continue
            names = frozenset(request.resource_names)
            if asked.get(request.type_url) == names:
                continue  # it says that it has taken what it got
            asked[request.type_url] = names
            known = self._by_type.get(request.type_url, {})
            found = [resource for name, resource in known.items() if not names or name in names]
            yield discovery_pb2.DiscoveryResponse(
                version_info="1", type_url=request.type_url, nonce=str(len(asked)), resources=found
            )


async def main(port: str, file: str) -> None:
    for name in TYPES:
        importlib.import_module(f"envoy.{name}_pb2")
    server = grpc.aio.server()
    ads_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Plane(json.loads(Path(file).read_text())), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
