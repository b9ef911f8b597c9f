"""Is what the README says of the node agent true today?

Its configuration is run, with the addresses and users of this machine: a real agent, an ordinary server behind it, and a caller.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
import yaml

from meshlib import cli
from tests.support import PYTHON, free_port, process, wait_until_listening
from tests.test_readme import block

APP = """\
import meshlib

mesh = meshlib.Mesh.load("agent.yaml", service="orders")


async def orders(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    body = str(meshlib.peer().spiffe_id).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


app = mesh.asgi(orders)
"""
CALLER = """\
import asyncio
import json

import meshlib


async def main():
    mesh = meshlib.Mesh.load("agent.yaml", service="storefront")
    async with mesh.client() as http:
        for _ in range(100):
            answer = await http.get("http://orders/items/7")
            if answer.status_code == 200:
                break
            await asyncio.sleep(0.1)
        print(json.dumps([answer.status_code, answer.text, answer.extensions["meshlib.call"].explain()]))
    mesh.close()


asyncio.run(main())
"""


# What is said of each server: its words for a socket that the agent may connect to, and for a group's; and its mode without them.
SERVERS = {
    "hypercorn": ("--bind unix:PATH app:app", "--umask 0", "--umask 7", 0o755),
    "granian": ("--interface asgi --uds PATH app:app", "--uds-permissions 0666", "--uds-permissions 0660", 0o755),
    "waitress-serve": ("--unix-socket=PATH app:wsgi", "--unix-socket-perms=666", "--unix-socket-perms=660", 0o600),
}


@pytest.mark.parametrize("server", SERVERS)
def test_a_server_opens_its_socket_for_the_agent_as_the_readme_says(tmp_path: Path, server: str) -> None:
    """By words that both texts have; without them it is as the table of the units' says."""
    rest, everybody, group, plain = SERVERS[server]
    assert f"{server} {everybody}" in Path("README.md").read_text()
    table = Path("integrations/systemd/README.md").read_text()
    assert f"| {plain:04o} | `{server} {everybody}` | `{server} {group}` |" in table
    program = Path(sys.executable).with_name(server)
    if not program.exists():
        pytest.skip(f"{server} is not installed")
    (tmp_path / "app.py").write_text("async def app(scope, receive, send): ...\ndef wsgi(environ, start_response): ...\n")
    path = tmp_path / "app.sock"
    for words, mode in (("", plain), (everybody, 0o666), (group, 0o660)):
        with process(str(program), *words.split(), *rest.replace("PATH", str(path)).split(), cwd=tmp_path) as served:
            end = time.monotonic() + 20
            with socket.socket(socket.AF_UNIX) as plug:
                while plug.connect_ex(str(path)):
                    assert served.poll() is None, served.stdout.read() if served.stdout else ""
                    assert time.monotonic() < end
                    time.sleep(0.05)
            found = path.stat().st_mode & 0o777
            assert found & 0o666 == mode & 0o666
        path.unlink(missing_ok=True)


@pytest.mark.timeout(120)
def test_an_ordinary_server_knows_its_caller_behind_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README has it; hypercorn has no idea of certificates."""
    monkeypatch.chdir(tmp_path)
    port = free_port()
    document = yaml.safe_load(block("agent.yaml"))
    agent = document["agent"]
    agent.update(state="./state", **{name: f"{tmp_path}/{name}.sock" for name in ("socket", "data", "admin")})
    agent["entries"] = [{"service": entry["service"], "uid": os.geteuid()} for entry in agent["entries"]]
    orders = document["services"]["orders"]
    orders.update(
        listen=f"127.0.0.1:{port}", inbound={"agent": f"{tmp_path}/app.sock"}, discover={"static": [f"127.0.0.1:{port}"]}
    )
    Path("agent.yaml").write_text(yaml.safe_dump(document))
    Path("agent.yaml").chmod(0o600)
    Path("app.py").write_text(APP)
    Path("caller.py").write_text(CALLER)
    assert cli.main(["ca", "init", "ca", "--trust-domain", "shop.internal"]) == 0
    meshlib = str(Path(sys.executable).with_name("meshlib"))
    hypercorn = str(Path(sys.executable).with_name("hypercorn"))
    with process(meshlib, "agent", "run", "--config", "agent.yaml", cwd=tmp_path) as running:
        wait_until_listening(port, running)
        with process(hypercorn, "--bind", f"unix:{tmp_path}/app.sock", "app:app", cwd=tmp_path) as served:
            end = time.monotonic() + 20
            while not Path("app.sock").exists():
                assert served.poll() is None
                assert time.monotonic() < end
                time.sleep(0.05)
            with process(PYTHON, "caller.py", cwd=tmp_path) as caller:
                said, _ = caller.communicate(timeout=60)
            status, who, why = json.loads(said.splitlines()[-1])
            assert (status, who) == (200, "spiffe://shop.internal/ns/default/sa/storefront")
            assert "carried" in why
            assert "by the node agent" in why
            capsys.readouterr()
            assert cli.main(["agent", "status", "--config", "agent.yaml", "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert {row["service"] for row in told["entries"]} == {"orders", "storefront"}
            assert len(told["certificates"]) == 2
