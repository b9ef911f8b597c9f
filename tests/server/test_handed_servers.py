"""Do the usual servers know their callers when the node agent holds the connections? Real servers in processes of their own."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import proxy_agent
from tests.client.node_agent import SECRET, NodeAgent
from tests.proxy_agent import needs_proxy
from tests.server.inside import SHOP
from tests.server.test_handed import header
from tests.support import PYTHON, free_port, identities, mesh_of, process, wait_until_listening, write_config

BIN = Path(PYTHON).parent
APP = "tests.server.handed_app"
ASGI = {
    "uvicorn": ["uvicorn", f"{APP}:asgi", "--uds", "PATH"],
    "uvicorn-h11": ["uvicorn", f"{APP}:asgi", "--uds", "PATH", "--http", "h11"],
    "hypercorn": ["hypercorn", f"{APP}:asgi", "--bind", "unix:PATH"],
    "granian": ["granian", "--interface", "asgi", "--uds", "PATH", f"{APP}:asgi"],
    "meshlib": ["meshlib", "serve", f"{APP}:asgi"],
}
WSGI = {
    "gunicorn": ["gunicorn", f"{APP}:wsgi", "--bind", "unix:PATH"],
    "gunicorn-threads": ["gunicorn", f"{APP}:wsgi", "--bind", "unix:PATH", "--threads", "4"],
    "granian-wsgi": ["granian", "--interface", "wsgi", "--uds", "PATH", f"{APP}:wsgi"],
    "meshlib-wsgi": ["meshlib", "serve", f"{APP}:wsgi"],
}
HTTP = {**ASGI, **WSGI}
GRPC = {"grpc": [PYTHON, "-m", APP, "grpc", "PATH"], "grpc-aio": [PYTHON, "-m", APP, "aio", "PATH"]}


@contextlib.contextmanager
def served(folder: Path, command: list[str], port: int = 8443, path: Path | None = None) -> Iterator[Path]:
    """A server for `me` in mode enforce, whose calls the agent at FOLDER/data.sock hands over. It listens at `path`."""
    program = command[0] if Path(command[0]).is_absolute() else shutil.which(command[0], path=str(BIN))
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    handed = folder / "app.sock"
    path = path or handed
    rules = [{"name": "shop", "from": [SHOP]}]
    file = write_config(
        folder,
        {"me": {"listen": f"127.0.0.1:{port}", "inbound": {"agent": str(handed)}, "secure": {"allow": rules}}, "storefront": {}},
        mode="enforce",
        agent={"data": str(folder / "data.sock"), "ca": "ca"},
    )
    env = {"MESHLIB_CONFIG": str(file), "MESHLIB_SERVICE": "me"}
    with process(program, *(part.replace("PATH", str(path)) for part in command[1:]), env=env) as child:
        end = time.monotonic() + 20
        with socket.socket(socket.AF_UNIX) as plug:
            while plug.connect_ex(str(path)):
                assert child.poll() is None, child.stdout.read() if child.stdout else ""
                assert time.monotonic() < end, "nothing listens"
                time.sleep(0.05)
        yield path


def who(path: Path, *values: str) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as http:
        return http.get("http://me/who", headers=[("x-mesh-handed", value) for value in values])


@pytest.mark.parametrize("server", HTTP)
async def test_a_server_knows_whom_the_agent_names(tmp_path: Path, server: str) -> None:
    """By the right secret, and by nothing else. The header goes no further."""
    import asyncio

    identities(tmp_path, "me")
    async with NodeAgent(tmp_path / "data.sock") as agent:

        def ask() -> None:
            with served(tmp_path, HTTP[server]) as path:
                answer = who(path, header(SECRET))
                assert answer.status_code == 200, answer.text
                told: dict[str, Any] = answer.json()
                assert told["peer"] == SHOP
                assert (told["address"], told["port"]) == ("10.0.0.7", 8443)
                assert "x-mesh-handed" not in told["headers"]
                for values in ([], [header("0" * 48)], [header(SECRET), header(SECRET)]):
                    assert who(path, *values).status_code == 401

        await asyncio.to_thread(ask)
        assert "/handover" in agent.asked


@pytest.mark.parametrize("server", GRPC)
async def test_a_grpc_server_knows_whom_the_agent_names(tmp_path: Path, server: str) -> None:
    """The same by metadata, which the handler doesn't see."""
    import asyncio

    import grpc

    identities(tmp_path, "me")
    async with NodeAgent(tmp_path / "data.sock"):

        def ask() -> None:
            with served(tmp_path, GRPC[server]) as path, grpc.insecure_channel(f"unix:{path}") as channel:
                call = channel.unary_unary("/test.Who/Who")
                # The server listens before its keeper has asked for the secret.
                told = json.loads(_eventually(lambda: call(b"", timeout=5, metadata=[("x-mesh-handed", header(SECRET))])))
                assert told["peer"] == SHOP
                assert "x-mesh-handed" not in told["headers"]
                for value in ("", header("0" * 48)):
                    with pytest.raises(grpc.RpcError) as caught:
                        call(b"", timeout=5, metadata=[("x-mesh-handed", value)] if value else [])
                    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

        await asyncio.to_thread(ask)


def _eventually(ask: Any, seconds: float = 5.0) -> Any:
    import grpc

    end = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except grpc.RpcError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


@pytest.mark.parametrize("server", ["meshlib", "meshlib-wsgi", "grpc", "grpc-aio"])
def test_servers_of_ours_let_the_agents_user_connect(tmp_path: Path, server: str) -> None:
    """Which has no right to the files of others. The secret keeps the rest out, not the mode of the socket."""
    identities(tmp_path, "me")
    with served(tmp_path, {**HTTP, **GRPC}[server]) as path:
        assert path.stat().st_mode & 0o777 == 0o666


def test_another_socket_of_ours_is_for_our_own_user_and_group(tmp_path: Path) -> None:
    """Nothing is handed over there."""
    elsewhere = tmp_path / "elsewhere.sock"
    identities(tmp_path, "me")
    with served(tmp_path, [*HTTP["meshlib"], "--listen", f"unix:{elsewhere}"], path=elsewhere):
        assert elsewhere.stat().st_mode & 0o777 == 0o660


@needs_proxy
@pytest.mark.parametrize("server", HTTP)
def test_the_proxy_hands_over_to_any_server(tmp_path: Path, server: str) -> None:
    """Mutual TLS at the proxy, with the certificate of a caller that the rules allow; behind it a server that knows nothing of TLS."""
    identities(tmp_path, "me", "storefront", "stranger")
    port = free_port()
    with process(PYTHON, "-m", "tests.proxy_agent", str(tmp_path), str(port), str(tmp_path / "app.sock"), "enforce") as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith("ready")
        wait_until_listening(port, agent)
        with served(tmp_path, HTTP[server], port):
            callers = tmp_path / "callers"
            callers.mkdir()
            shutil.copytree(tmp_path / "identities", callers / "identities")
            address = {"discover": {"static": [f"127.0.0.1:{port}"]}, "identity": proxy_agent.ME}
            with (
                mesh_of(callers, {"me": address, "storefront": {}}, service="storefront", mode="enforce") as mesh,
                mesh.sync_client() as http,
            ):
                for method in ("GET", "POST"):
                    answer = http.request(method, "http://me/who", headers={"x-mesh-handed": header(SECRET, id=proxy_agent.ME)})
                    assert answer.status_code == 200, answer.text
                    assert answer.json()["peer"] == SHOP
                    assert answer.json()["address"] == "127.0.0.1"
                    assert answer.json()["port"] == port
            with (
                mesh_of(callers, {"me": address, "stranger": {}}, service="stranger", mode="enforce") as mesh,
                mesh.sync_client() as http,
            ):
                assert http.get("http://me/who").status_code == 403


@needs_proxy
@pytest.mark.parametrize("server", GRPC)
async def test_the_proxy_hands_over_to_grpc(tmp_path: Path, server: str) -> None:
    """As HTTP/2, with the calls of a mesh channel."""
    import asyncio

    import grpc

    identities(tmp_path, "me", "storefront", "stranger")
    port = free_port()
    callers = tmp_path / "callers"
    callers.mkdir()
    shutil.copytree(tmp_path / "identities", callers / "identities")
    address = {"discover": {"static": [f"127.0.0.1:{port}"]}, "identity": proxy_agent.ME, "protocol": "grpc"}

    def ask(service: str) -> Any:
        with mesh_of(callers, {"me": address, service: {}}, service=service, mode="enforce") as mesh:
            with mesh.sync_grpc_channel("me") as channel:
                return json.loads(_eventually(lambda: channel.unary_unary("/test.Who/Who")(b"", timeout=5)))

    with process(PYTHON, "-m", "tests.proxy_agent", str(tmp_path), str(port), str(tmp_path / "app.sock"), "enforce") as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith("ready")
        with served(tmp_path, GRPC[server], port):
            told = await asyncio.to_thread(ask, "storefront")
            assert told["peer"] == SHOP
            assert "x-mesh-handed" not in told["headers"]
            with pytest.raises(grpc.RpcError) as caught:
                await asyncio.to_thread(ask, "stranger")
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
