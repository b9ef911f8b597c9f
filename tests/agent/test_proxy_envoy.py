"""Do a real Envoy and the agent's data path understand each other, both ways, over mutual TLS with SPIFFE IDs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.agent.proxy_support import CALLER, ORDERS, World, asking, echo, world
from tests.support import free_port
from tests.wire.envoy import cluster, envoy, listener, stat, tls

__all__ = ["world"]

HTTP2 = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """The same certificates as files, for Envoy."""
    for service, spiffe_id in (("caller", CALLER), ("orders", ORDERS)):
        own = tmp_path / "files" / service
        own.mkdir(parents=True)
        issued = world.issued[spiffe_id]
        (own / "svid.pem").write_bytes(issued.chain)
        (own / "key.pem").write_bytes(issued.key)
        (own / "bundle.pem").write_bytes(world.root.pem)
    return tmp_path / "files"


def speaking(transport: dict[str, Any], *protocols: str) -> dict[str, Any]:
    transport["typed_config"]["common_tls_context"]["alpn_protocols"] = list(protocols)
    return transport


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_a_delegated_call_reaches_an_envoy(world: World, folder: Path, tmp_path: Path, protocol: str) -> None:
    """Envoy wants a certificate with our SPIFFE ID, and the agent wants Envoy's; a wrong one is nobody's."""
    port, picky = free_port(), free_port()
    answer = {
        "direct_response": {"status": 200, "body": {"inline_string": "from envoy"}},
        "response_headers_to_add": [{"header": {"key": "x-peer", "value": "%DOWNSTREAM_PEER_URI_SAN%"}}],
    }
    listeners = [
        listener(port, answer, speaking(tls(folder, "orders", CALLER, is_server=True), "h2", "http/1.1")),
        listener(picky, answer, speaking(tls(folder, "orders", "spiffe://td/other", is_server=True), "h2", "http/1.1")),
    ]
    with envoy(tmp_path, listeners, []) as admin:
        client = world.client()
        seen = [client.get("/items/7", headers=asking(port, protocol=protocol)) for _ in range(3)]
        assert [(a.status_code, a.text, a.headers["x-peer"]) for a in seen] == [(200, "from envoy", CALLER)] * 3
        assert stat(admin, "ssl.handshake") == 1
        assert stat(admin, "downstream_cx_http2_total") == (1 if protocol == "http2" else 0)
        wrong = client.get("/", headers=asking(port, protocol=protocol, expect="spiffe://td/somebody"))
        assert (wrong.status_code, wrong.headers["x-mesh-failed"]) == (502, "identity; written=0")
        refused = client.get("/", headers=asking(picky, protocol=protocol))
        # In TLS 1.3 the handshake is over for us before its verdict comes: before the request is written, or after.
        assert refused.status_code == 502
        assert refused.headers["x-mesh-failed"].partition(";")[0] in {"tls", "unwritten", "closed"}
        assert stat(admin, "ssl.fail_verify_san") >= 1


@pytest.mark.parametrize("protocol", ["http1", "http2"])
def test_an_envoy_calls_an_application_behind_the_agent(world: World, folder: Path, tmp_path: Path, protocol: str) -> None:
    """The application learns Envoy's SPIFFE ID from the agent, and nothing of what Envoy says about it."""
    inbound, outbound, bare = world.listen(world.application(echo)), free_port(), free_port()
    alpn = ("h2",) if protocol == "http2" else ("http/1.1",)
    more: dict[str, Any] = {}
    if protocol == "http2":
        options = {"@type": f"type.googleapis.com/{HTTP2}", "explicit_http_config": {"http2_protocol_options": {}}}
        more = {"typed_extension_protocol_options": {HTTP2: options}}
    clusters = [
        cluster("agent", inbound, speaking(tls(folder, "caller", ORDERS, is_server=False), *alpn)) | more,
        cluster("bare", inbound, speaking(tls(folder, "caller", ORDERS, is_server=False, with_certificate=False), *alpn)) | more,
    ]
    forged = {"request_headers_to_add": [{"header": {"key": "x-mesh-handed", "value": "id=spiffe://td/root"}}]}
    listeners = [
        listener(outbound, {"route": {"cluster": "agent"}} | forged),
        listener(bare, {"route": {"cluster": "bare"}}),
    ]
    with envoy(tmp_path, listeners, clusters):
        with httpx.Client(timeout=10) as http:
            answer = http.post(f"http://127.0.0.1:{outbound}/a%2Fb?c=d", content=b"x" * 100_000)
            assert (answer.status_code, answer.headers["x-target"], len(answer.content)) == (200, "/a%2Fb?c=d", 100_000)
            handed = answer.headers["x-came-x-mesh-handed"]
            assert f";id={CALLER};" in handed
            assert "root" not in handed
            assert http.get(f"http://127.0.0.1:{bare}/").status_code == 503
