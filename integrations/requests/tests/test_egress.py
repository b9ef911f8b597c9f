"""Does what the configuration says of hosts outside hold for requests too: credentials, what stays inside, redirects?"""

from __future__ import annotations

import asyncio
import os
import warnings
from pathlib import Path
from typing import Any

import meshlib_requests
import pytest
import requests

import meshlib
from meshlib.client.egress import Credential, EgressRules
from tests.client.test_egress import hello, outside_tls, to
from tests.support import free_port, mesh_of, scripted

SECRET = "sk_live"


async def test_a_credential_goes_to_its_host_over_verified_tls_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where TLS proves nothing, not where a redirect leads, and never into the request that the application holds."""
    tls = outside_tls(tmp_path, monkeypatch)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", os.environ["SSL_CERT_FILE"])
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

            def go() -> None:
                with meshlib_requests.session(mesh) as session, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that nothing is verified
                    answer = session.get(f"https://localhost:{server.port}/", headers={"baggage": "a=b"})
                    assert "x-api-key" not in answer.request.headers
                    session.get(f"https://localhost:{server.port}/", verify=False)
                    places[:] = [f"http://localhost:{plain.port}/"]
                    session.get(f"https://localhost:{first.port}/")
                    places[:] = ["http://evil.example/"]
                    with pytest.raises(meshlib.Denied):
                        session.get(f"https://localhost:{first.port}/")

            await asyncio.to_thread(go)
    assert [request.headers.get("x-api-key") for request in server.requests] == [SECRET, None]
    assert "baggage" not in server.requests[0].headers
    assert [request.headers.get("x-api-key") for request in first.requests] == [SECRET, SECRET]
    assert plain.requests[0].headers.get("x-api-key") is None


@pytest.mark.parametrize("verify", [False, None, "", 0])
async def test_whatever_means_that_nothing_is_verified_takes_no_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    """To requests, everything empty does; and the connection that proved nothing isn't used for who asks for proof."""
    tls = outside_tls(tmp_path, monkeypatch)
    bundle = os.environ["SSL_CERT_FILE"]
    monkeypatch.setenv("KEY_OF_OUTSIDE", SECRET)
    async with scripted(hello, ssl=tls) as server:
        with mesh_of(tmp_path, {}) as mesh:
            mesh.outbound.egress = EgressRules("allow", [], [Credential("localhost", "x-api-key", env="KEY_OF_OUTSIDE")])

            def go() -> None:
                with meshlib_requests.session(mesh) as session, warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that nothing is verified
                    session.trust_env = False
                    session.verify = verify
                    session.get(f"https://localhost:{server.port}/")
                    session.verify = bundle
                    session.get(f"https://localhost:{server.port}/")
                    session.verify = True
                    with pytest.raises(requests.exceptions.SSLError):
                        session.get(f"https://localhost:{server.port}/")

            await asyncio.to_thread(go)
    assert [request.headers.get("x-api-key") for request in server.requests] == [None, SECRET]


def test_an_error_holds_the_request_of_the_application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one with the credential, which would be in whatever is made of the error."""
    monkeypatch.setenv("KEY_OF_OUTSIDE", SECRET)
    with mesh_of(tmp_path, {}) as mesh:
        mesh.outbound.egress = EgressRules("allow", [], [Credential("localhost", "x-api-key", env="KEY_OF_OUTSIDE")])
        with meshlib_requests.session(mesh) as session:
            with pytest.raises(requests.ConnectionError) as raised:
                session.get(f"https://localhost:{free_port()}/")
    assert raised.value.request is not None
    assert "x-api-key" not in raised.value.request.headers
