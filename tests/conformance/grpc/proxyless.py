"""How does grpcio's proxyless client find a server of the mesh? By a small control plane, which names it and says who it must be."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.interop.town import SERVICE, Town, port_of, spiffe_id
from tests.support import PYTHON, ROOT, process

PEERS = ROOT / ".venv-peers" / "bin" / "python"
_TYPE = "type.googleapis.com/envoy."
_ADS = {"ads": {}, "resource_api_version": "V3"}


@contextlib.contextmanager
def xds_client(town: Town, port: int, *, is_mutual: bool) -> Iterator[XdsClient]:
    """A process with grpcio's xDS client, whose `xds:///interop` is the server on this port."""
    _need_peers()
    name = f"xds-{port}"
    file = town.folder / f"{name}.json"
    file.write_text(json.dumps(_resources(port, is_mutual=is_mutual)))
    with process(str(PEERS), str(ROOT / "tests/conformance/grpc/control_plane.py"), str(file)) as control_plane:
        bootstrap = town.folder / f"{name}-bootstrap.json"
        bootstrap.write_text(json.dumps(_bootstrap(town, port_of(control_plane))))
        command = (PYTHON, "-m", "tests.conformance.grpc.xds_caller", str(town.protocol.folder), "mtls" if is_mutual else "plain")
        # Its own words go to the test's output: what it answers must be lines of JSON alone.
        child = subprocess.Popen(
            command,
            env=_environment(str(bootstrap)),
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            yield XdsClient(child)
        finally:
            child.kill()
            child.communicate()


class XdsClient:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def run(self, kind: str, scenario: str) -> None:
        """Raises AssertionError with what the process saw."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(f"{kind} {scenario}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline()
        if not answer:
            raise AssertionError(f"grpcio's xDS client ended with {self._child.wait(5)}: its words stand in the test's output.")
        wrong = json.loads(answer)
        if wrong is not None:
            raise AssertionError(wrong)


def _need_peers() -> None:
    if (
        not PEERS.exists()
        or subprocess.run([PEERS, "-c", "import envoy.service.discovery.v3.ads_pb2_grpc"], capture_output=True).returncode
    ):
        pytest.skip("there is no control plane: make .venv-peers/made")


def _environment(bootstrap: str) -> dict[str, str]:
    import os

    return {**os.environ, "GRPC_XDS_BOOTSTRAP": bootstrap}


def _bootstrap(town: Town, port: int) -> dict[str, Any]:
    files = {
        "certificate_file": str(town.pem("caller", "svid")),
        "private_key_file": str(town.pem("caller", "key")),
        "ca_certificate_file": str(town.pem("caller", "bundle")),
        "refresh_interval": "60s",
    }
    return {
        "xds_servers": [
            {"server_uri": f"127.0.0.1:{port}", "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}
        ],
        "node": {"id": "caller"},
        "certificate_providers": {"files": {"plugin_name": "file_watcher", "config": files}},
    }


def _resources(port: int, *, is_mutual: bool) -> list[dict[str, Any]]:
    manager = {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "rds": {"route_config_name": "routes", "config_source": _ADS},
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_TYPE}extensions.filters.http.router.v3.Router"}}],
    }
    everything = [{"match": {"prefix": ""}, "route": {"cluster": "servers"}}]
    servers = {
        "@type": f"{_TYPE}config.cluster.v3.Cluster",
        "name": "servers",
        "type": "EDS",
        "eds_cluster_config": {"eds_config": _ADS, "service_name": "endpoints"},
        "lb_policy": "ROUND_ROBIN",
    }
    if is_mutual:
        provider = {"instance_name": "files"}
        validation = {"ca_certificate_provider_instance": provider, "match_subject_alt_names": [{"exact": spiffe_id(SERVICE)}]}
        common = {
            "tls_certificate_provider_instance": provider,
            "combined_validation_context": {"default_validation_context": validation},
        }
        tls = {"@type": f"{_TYPE}extensions.transport_sockets.tls.v3.UpstreamTlsContext", "common_tls_context": common}
        servers["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": tls}
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    here = {
        "locality": {"zone": "a"},
        "load_balancing_weight": 1,
        "lb_endpoints": [{"endpoint": {"address": address}, "health_status": "HEALTHY"}],
    }
    return [
        {"@type": f"{_TYPE}config.listener.v3.Listener", "name": SERVICE, "api_listener": {"api_listener": manager}},
        {
            "@type": f"{_TYPE}config.route.v3.RouteConfiguration",
            "name": "routes",
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": everything}],
        },
        servers,
        {"@type": f"{_TYPE}config.endpoint.v3.ClusterLoadAssignment", "cluster_name": "endpoints", "endpoints": [here]},
    ]
