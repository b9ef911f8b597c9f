"""Does what the configuration says of hosts outside hold for aiohttp too: credentials, what stays inside, redirects?"""

from __future__ import annotations

import contextlib
import os
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import meshlib_aiohttp
import pytest

import meshlib
from meshlib.client.egress import Credential, EgressRules
from tests.client.test_egress import hello, outside_tls, to
from tests.support import mesh_of, scripted

SECRET = "sk_live"


async def test_a_credential_goes_to_its_host_over_verified_tls_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where TLS proves nothing, not where a redirect leads, and never into what the application is shown."""
    tls = outside_tls(tmp_path, monkeypatch)
    context = ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])
    monkeypatch.setenv("KEY_OF_OUTSIDE", SECRET)
    places: list[str] = []
    async with (
        scripted(hello, ssl=tls) as server,
        scripted(to(lambda: places[0]), ssl=tls) as first,
        scripted(hello) as plain,
    ):
        with mesh_of(tmp_path, {}) as mesh:
            credential = Credential("localhost", "x-api-key", env="KEY_OF_OUTSIDE")
            mesh.outbound.egress = EgressRules("deny", ["localhost", "127.0.0.1"], [credential])
            async with meshlib_aiohttp.session(mesh) as session:
                answer = await session.get(f"https://localhost:{server.port}/", ssl=context, headers={"baggage": "a=b"})
                assert SECRET not in repr(answer.request_info)
                await session.get(f"https://localhost:{server.port}/", ssl=False)
                places[:] = [f"http://localhost:{plain.port}/"]
                await session.get(f"https://localhost:{first.port}/", ssl=context)
                places[:] = ["http://evil.example/"]
                with pytest.raises(meshlib.Denied):
                    await session.get(f"https://localhost:{first.port}/", ssl=context)
    assert [request.headers.get("x-api-key") for request in server.requests] == [SECRET, None]
    assert "baggage" not in server.requests[0].headers
    assert [request.headers.get("x-api-key") for request in first.requests] == [SECRET, SECRET]
    assert plain.requests[0].headers.get("x-api-key") is None


@pytest.mark.parametrize(
    ("of_connector", "of_request", "is_given"),
    [
        ("verified", {}, True),
        ("verified", {"server_hostname": "localhost"}, True),
        (False, {}, False),
        ("unverified", {}, False),
        (False, {"ssl": True}, False),
        ("verified", {"server_hostname": "127.0.0.1"}, False),
    ],
)
async def test_a_credential_goes_only_where_the_settings_in_force_prove_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_connector: Any, of_request: dict[str, Any], is_given: bool
) -> None:
    """A request that says nothing is under its connector's setting, and proof of another name is none."""
    tls = outside_tls(tmp_path, monkeypatch)
    contexts = {
        "verified": ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"]),
        "unverified": ssl._create_unverified_context(),
    }
    monkeypatch.setenv("KEY_OF_OUTSIDE", SECRET)
    async with scripted(hello, ssl=tls) as server:
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules("allow", [], [Credential("localhost", "x-api-key", env="KEY_OF_OUTSIDE")])
            connector = meshlib_aiohttp.MeshConnector(mesh, ssl=contexts.get(of_connector, of_connector))
            async with aiohttp.ClientSession(connector=connector) as session:
                # To the name of another host the server proves nothing: what it was sent is what counts.
                with contextlib.suppress(aiohttp.ClientConnectorCertificateError):
                    await session.get(f"https://localhost:{server.port}/", **of_request)
    assert SECRET not in [request.headers.get("x-api-key") for request in server.requests] or is_given
    assert not is_given or [request.headers.get("x-api-key") for request in server.requests] == [SECRET]
