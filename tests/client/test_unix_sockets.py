"""Can an endpoint be a UNIX socket? Both drivers, HTTP/1.1 over plain text and mutual TLS; and what is no socket."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

import meshlib
from meshlib import errors
from tests.support import Request, Scripted, identities, mesh_of, ok


async def hello(server: Scripted, request: Request) -> bytes:
    return ok(b"hello from " + request.target.encode())


def server_tls(folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own = folder / "identities" / "orders"
    context.load_cert_chain(own / "svid.pem", own / "key.pem")
    context.load_verify_locations(own / "bundle.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    return context


@pytest.mark.parametrize("mode", ["observe", "enforce"])
async def test_an_endpoint_may_be_a_unix_socket(tmp_path: Path, mode: str) -> None:
    """The same call, the same pool, the same proof of identity."""
    identities(tmp_path, "me", "orders")
    server = Scripted(hello)
    path = tmp_path / "s"
    listening = await asyncio.start_unix_server(server._serve, path, ssl=server_tls(tmp_path) if mode == "enforce" else None)
    try:
        with mesh_of(tmp_path, {"orders": {"discover": {"static": [f"unix:{path}"]}}}, mode=mode) as mesh:
            async with mesh.client() as http:
                for _ in range(3):
                    assert (await http.get("http://orders/a")).text == "hello from /a"
                assert server.connections == 1
            with mesh.sync_client() as blocking:
                for _ in range(3):
                    assert (await asyncio.to_thread(blocking.get, "http://orders/b")).text == "hello from /b"
                assert server.connections == 2
            assert f"unix:{path}" in {row["endpoint"] for row in mesh.engine.stats(0.0)}
    finally:
        listening.close()


async def test_a_socket_where_nobody_listens_is_refused(tmp_path: Path) -> None:
    """As a port where nobody listens."""
    with mesh_of(tmp_path, {"orders": {"discover": {"static": [f"unix:{tmp_path}/gone"]}}}) as mesh:
        async with mesh.client() as http:
            with pytest.raises(errors.ConnectFailed):
                await http.post("http://orders/")
        with mesh.sync_client() as blocking, pytest.raises(errors.ConnectFailed):
            blocking.post("http://orders/")


@pytest.mark.parametrize("address", ["unix:relative", "unix:", "unix:/" + "a" * 107])
def test_what_is_no_unix_socket_is_refused_at_the_start(tmp_path: Path, address: str) -> None:
    """The kernel would refuse it at the first call."""
    with (
        pytest.raises(meshlib.ConfigError, match="UNIX socket"),
        mesh_of(tmp_path, {"orders": {"discover": {"static": [address]}}}),
    ):
        pass
