"""Is what the README says of the node agent true today?

Its configuration is run, with the addresses and users of this machine: a real agent, an ordinary server behind it, and a caller.
"""

from __future__ import annotations

import json
import os
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
