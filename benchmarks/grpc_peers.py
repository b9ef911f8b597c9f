"""Who answers gRPC calls, and who stands between?

nginx that sends one file as every answer, which is the quickest server of gRPC that is at hand (15 µs of CPU a call, where grpcio's servers in Python take
200); servers of grpcio (`grpc_servers.py`) without the mesh, with its own TLS, or in the mesh; two Envoys before one of them; and a control plane for grpcio's own
balancer (that of the tests), which runs in `.venv-peers`, since the package of its messages writes into others'. Each is started when a run first asks for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from .peers import ROOT, Absent, Peers, free_port, program, running

BODY: Final = bytes(1024)
CALL, STREAM, CHAT = (f"/bench.Echo/{name}" for name in ("Call", "Stream", "Chat"))
# Messages of a response that stands for an endless one: 64 MiB.
MESSAGES: Final = 65_536
NODE: Final = "bench"
# Of the service in mesh.yaml. Two routes, as where HTTP is measured.
SERVICE: Final[dict[str, Any]] = {
    "protocol": "grpc",
    "route": [
        {"name": name, "match": {"path": {"prefix": prefix}}} for name, prefix in (("echo", "/bench.Echo/"), ("rest", "/"))
    ],
}


@dataclass(frozen=True)
class Served:
    """A server that listens."""

    address: str
    pid: int
    # Of a bare server in the same process.
    beside: str


@contextlib.contextmanager
def echoing(peers: Peers, kind: str, *, config: str = "", identity: str = "") -> Iterator[Served]:
    """A server of grpcio, `aio` or `sync`; with the mesh's `config` in the mesh, with an `identity` alone behind grpcio's own mutual TLS."""
    port, beside = free_port(), free_port()
    command = [sys.executable, "-m", "benchmarks.grpc_servers", kind, str(port), str(beside), "--config", config]
    with running(peers.folder, *command, "--identity", identity, port=port) as child:
        yield Served(f"127.0.0.1:{port}", child.pid, f"127.0.0.1:{beside}")


class GrpcPeers:
    """The other sides of one run, made when they are asked for."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def mesh(self, address: str, *, peer_check: str = "") -> str:
        """The caller's mesh.yaml: plain, or with a way to prove the server."""
        secure = {"secure": {"peer_check": peer_check}} if peer_check else {}
        return self.peers.mesh([address], is_private=bool(peer_check), **SERVICE, **secure)

    def server_mesh(self, *, is_private: bool = False) -> str:
        """The mesh.yaml of who answers, with a rule that lets the calls in."""
        rule: dict[str, Any] = {"name": "callers", "from": ["me"] if is_private else ["*"], "paths": ["/bench.Echo/*"]}
        return self.peers.mesh([], is_private=is_private, **SERVICE, secure={"allow": [rule]})

    # --- servers

    @cached_property
    def echo(self) -> str:
        return self._echo()

    @cached_property
    def tls_echo(self) -> str:
        return self._echo(identity=f"{self.peers.identities}/orders")

    @cached_property
    def mesh_echo(self) -> str:
        return self._echo(config=self.server_mesh(is_private=True))

    def _echo(self, **how: str) -> str:
        return self.peers.keep(echoing(self.peers, "aio", **how)).address

    @cached_property
    def envoy_pair(self) -> str:
        return self.peers.envoys_before(self.echo, is_grpc=True)

    @cached_property
    def answers(self) -> str:
        """nginx. It waits for no request's end, and so answers a caller that sends it all at once."""
        nginx = program("nginx", "Debian: nginx-light")
        port = free_port()
        where = self.peers.folder / "nginx-grpc"
        (where / "files").mkdir(parents=True)
        message = b"\0" + len(BODY).to_bytes(4, "big") + BODY
        (where / "files" / "one").write_bytes(message)
        (where / "files" / "many").write_bytes(message * MESSAGES)
        temporary = " ".join(f"{kind}_temp_path {where / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        file = where / "nginx.conf"
        # It serves files to no POST, so they come as the page of that error.
        file.write_text(f"""
            daemon off; {user} worker_processes 1; pid {where}/pid; error_log stderr warn;
            events {{ worker_connections 1024; }}
            http {{
              access_log off; {temporary} sendfile on; default_type application/grpc; etag off;
              keepalive_requests 1000000000; keepalive_timeout 300s; open_file_cache max=8;
              server {{
                listen 127.0.0.1:{port} http2; http2_max_concurrent_streams 1024;
                root {where}/files; add_trailer grpc-status 0 always;
                location = {CALL} {{ try_files /one =404; error_page 405 =200 /one; }}
                location = {STREAM} {{ try_files /many =404; error_page 405 =200 /many; }}
              }}
            }}""")
        command = (nginx, "-p", str(where), "-c", str(file), "-e", "stderr")
        self.peers.keep(running(self.peers.folder, *command, port=port))
        return f"127.0.0.1:{port}"

    # --- grpcio's own balancer

    @cached_property
    def bootstrap(self) -> str:
        """The file by which grpcio finds a control plane that knows `orders` at nginx."""
        python = _python_with_protos()
        port = free_port()
        resources = self.peers.folder / "xds.json"
        resources.write_text(json.dumps(_resources(int(self.answers.rpartition(":")[2]))))
        command = (python, str(ROOT / "tests/conformance/grpc/control_plane.py"), str(resources), str(port))
        self.peers.keep(running(self.peers.folder, *command, port=port))
        file = self.peers.folder / "xds-bootstrap.json"
        plane = {"server_uri": f"127.0.0.1:{port}", "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}
        file.write_text(json.dumps({"xds_servers": [plane], "node": {"id": NODE}}))
        return str(file)


def _python_with_protos() -> str:
    if not any((ROOT / ".venv-peers").glob("lib/python*/site-packages/envoy/service/discovery/v3/ads_pb2_grpc.py")):
        raise Absent("there is no control plane for grpc-xds: xds-protos is not installed (make .venv-peers/made)")
    return str(ROOT / ".venv-peers" / "bin" / "python")


_TYPE: Final = "type.googleapis.com/envoy."


def _resources(port: int) -> list[dict[str, Any]]:
    """What a control plane says of one service with one endpoint: a listener, its route, its cluster, the endpoint."""
    ads = {"ads": {}, "resource_api_version": "V3"}
    manager = {
        "@type": _TYPE + "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "rds": {"route_config_name": "orders", "config_source": ads},
        "http_filters": [{"name": "router", "typed_config": {"@type": _TYPE + "extensions.filters.http.router.v3.Router"}}],
    }
    routes = [{"match": {"prefix": ""}, "route": {"cluster": "orders"}}]
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    return [
        {"@type": _TYPE + "config.listener.v3.Listener", "name": "orders", "api_listener": {"api_listener": manager}},
        {
            "@type": _TYPE + "config.route.v3.RouteConfiguration",
            "name": "orders",
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}],
        },
        {
            "@type": _TYPE + "config.cluster.v3.Cluster",
            "name": "orders",
            "type": "EDS",
            "eds_cluster_config": {"eds_config": ads},
            "lb_policy": "ROUND_ROBIN",
        },
        {
            "@type": _TYPE + "config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": "orders",
            "endpoints": [
                {
                    "locality": {"region": "here"},
                    "load_balancing_weight": 1,
                    "lb_endpoints": [{"health_status": "HEALTHY", "endpoint": {"address": address}}],
                }
            ],
        },
    ]
