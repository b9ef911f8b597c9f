"""Do a real Envoy and the mesh accept each other's SPIFFE certificates, and refuse what is wrong, both ways?"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

import meshlib
from tests.support import PYTHON, free_port, identities, mesh_of, process, wait_until_listening, write_config
from tests.wire.envoy import cluster, envoy, listener, stat, tls

ID = "spiffe://shop.internal/ns/default/sa/"
APP = """
async def app(scope, receive, send):
    import meshlib
    body = meshlib.peer().spiffe_id.encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})
"""


def test_mesh_client_calls_an_envoy_listener(tmp_path: Path) -> None:
    """Envoy requires a certificate with our SPIFFE ID, and we require its."""
    identities(tmp_path, "me", "orders", "thief")
    folder, port, picky = tmp_path / "identities", free_port(), free_port()
    answer = {
        "direct_response": {"status": 200, "body": {"inline_string": "from envoy"}},
        "response_headers_to_add": [{"header": {"key": "x-peer", "value": "%DOWNSTREAM_PEER_URI_SAN%"}}],
    }
    listeners = [
        listener(port, answer, tls(folder, "orders", ID + "me", is_server=True)),
        listener(picky, answer, tls(folder, "orders", ID + "somebody-else", is_server=True)),
    ]
    with envoy(tmp_path, listeners, []) as admin:
        services = {"orders": {"discover": {"static": [f"127.0.0.1:{port}"]}}}
        with mesh_of(tmp_path, services, mode="enforce") as mesh, mesh.sync_client() as http:
            seen = [http.get("http://orders/items/7") for _ in range(3)]
            assert [(a.status_code, a.text, a.headers["x-peer"]) for a in seen] == [(200, "from envoy", ID + "me")] * 3
        assert stat(admin, "ssl.handshake") == 1

        before = stat(admin, f"p{port}.downstream_rq_completed")
        # Envoy is who it is, but we expect somebody else: refused by us, and nothing is sent.
        services = {"thief": {"discover": {"static": [f"127.0.0.1:{port}"]}}}
        with mesh_of(tmp_path, services, mode="enforce") as mesh, mesh.sync_client() as http:
            with pytest.raises(meshlib.PeerIdentityError):
                http.get("http://thief/")
        assert stat(admin, f"p{port}.downstream_rq_completed") == before

        # We are who we are, but Envoy expects somebody else: refused by Envoy.
        services = {"orders": {"discover": {"static": [f"127.0.0.1:{picky}"]}}}
        with mesh_of(tmp_path, services, mode="enforce") as mesh, mesh.sync_client() as http:
            with pytest.raises(httpx.TransportError):
                http.get("http://orders/")
        assert stat(admin, "ssl.fail_verify_san") >= 1

        # Without a certificate nobody comes in.
        bundle = folder / "me" / "bundle.pem"
        with pytest.raises(httpx.TransportError):
            import ssl

            context = ssl.create_default_context(cafile=str(bundle))
            context.check_hostname = False
            httpx.get(f"https://127.0.0.1:{port}/", verify=context)
        assert stat(admin, "ssl.fail_verify_no_cert") >= 1


def test_an_envoy_client_reaches_the_mesh_server(tmp_path: Path) -> None:
    """The mesh server sees Envoy's SPIFFE ID; a wrong one is denied, and none is refused."""
    identities(tmp_path, "orders", "envoy", "thief")
    folder, port = tmp_path / "identities", free_port()
    (tmp_path / "app.py").write_text(APP)
    allow = [{"name": "envoy only", "from": ["envoy"], "methods": ["GET"], "paths": ["/items/*"]}]
    file = write_config(
        tmp_path, {"orders": {"listen": f"127.0.0.1:{port}", "secure": {"allow": allow}}, "envoy": {}}, mode="enforce"
    )
    command = (str(Path(PYTHON).parent / "meshlib"), "serve", "app:app", "--config", str(file), "--service", "orders")
    right, wrong, none, elsewhere = (free_port() for _ in range(4))

    def out(local: int, name: str) -> dict[str, object]:
        return listener(local, {"route": {"cluster": name, "host_rewrite_literal": "orders"}})

    clusters = [
        cluster("right", port, tls(folder, "envoy", ID + "orders", is_server=False)),
        cluster("wrong", port, tls(folder, "thief", ID + "orders", is_server=False)),
        cluster("none", port, tls(folder, "envoy", ID + "orders", is_server=False, with_certificate=False)),
        cluster("elsewhere", port, tls(folder, "envoy", ID + "payments", is_server=False)),
    ]
    listeners = [out(right, "right"), out(wrong, "wrong"), out(none, "none"), out(elsewhere, "elsewhere")]
    with process(*command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path) as server:
        wait_until_listening(port, server)
        with envoy(tmp_path, listeners, clusters) as admin:
            answer = httpx.get(f"http://127.0.0.1:{right}/items/7")
            assert (answer.status_code, answer.text) == (200, ID + "envoy")
            refused = httpx.get(f"http://127.0.0.1:{wrong}/items/7")
            assert refused.status_code == 403
            assert "envoy only" not in refused.text  # the caller learns no rule
            assert httpx.get(f"http://127.0.0.1:{right}/admin").status_code == 403
            assert httpx.get(f"http://127.0.0.1:{none}/items/7").status_code == 503
            assert httpx.get(f"http://127.0.0.1:{elsewhere}/items/7").status_code == 503
            assert stat(admin, "ssl.fail_verify_san") >= 1
            plain = httpx.get(f"http://127.0.0.1:{port}/items/7")
            assert plain.status_code == 400
            assert "TLS" in plain.text
