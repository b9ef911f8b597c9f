"""Do two services that Consul names and lists talk with each other, in mode enforce, whatever becomes of its CA?"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

import meshlib
from integrations.consul.tests.agents import ROTATION
from integrations.consul.tests.test_connect import id_of, trust_domain_of
from tests.support import PYTHON, free_port, process, wait_until_listening

pytest.importorskip("meshlib.discover.follow", reason="this meshlib follows no registries")

PATIENCE = 20.0
MESHLIB = str(Path(PYTHON).parent / "meshlib")
APP = """\
import meshlib
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = meshlib.peer().spiffe_id.encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
"""


@pytest.mark.slow
async def test_calls_go_on_while_leafs_and_roots_are_rotated_and_the_agent_is_killed(agent: Any, tmp_path: Path) -> None:
    """Each proves the name that Consul gave it, to the end: a new root beside the old one, new leafs, and no agent at all."""
    port = free_port()
    (tmp_path / "answering.py").write_text(APP)
    told = {"url": agent.url, "wait": "2s", "timeout": "2s"}
    document: Any = {
        "mesh": "shop",
        "secure": {"mode": "enforce", "trust_domain": trust_domain_of(agent), "identity": {"plugin": "consul", **told}},
        "registries": {"consul": told},
        "services": {
            "storefront": {"identity": id_of(agent, "storefront")},
            "orders": {
                "listen": f"127.0.0.1:{port}",
                "identity": id_of(agent, "orders"),
                "discover": "consul",
                "secure": {"allow": [{"from": ["storefront"]}]},
            },
        },
    }
    file = tmp_path / "mesh.yaml"
    file.write_text(json.dumps(document))
    answers, failures = list[str](), list[Exception]()
    with process(MESHLIB, "serve", "answering:app", "--config", str(file), "--service", "orders", cwd=tmp_path) as child:
        await asyncio.to_thread(wait_until_listening, port, child)
        await asyncio.to_thread(agent.put, "orders", port)
        mesh = await asyncio.to_thread(meshlib.Mesh.load, file, service="storefront")
        store: Any = mesh.identity
        try:

            async def call() -> None:
                while True:
                    try:
                        # A connection of its own each time: it is the handshake that is asked about.
                        async with mesh.client() as http:
                            answers.append((await http.get("http://orders/")).text)
                    except Exception as error:
                        failures.append(error)
                    await asyncio.sleep(0.02)

            async def until_called() -> None:
                begin, end = len(answers), time.monotonic() + PATIENCE
                while len(answers) < begin + 20:
                    assert time.monotonic() < end, f"nobody answers: {failures[-3:]}"
                    await asyncio.sleep(0.02)

            calling = asyncio.ensure_future(call())
            await until_called()
            first = store.current
            await asyncio.to_thread(agent.rotate)
            end = time.monotonic() + ROTATION
            while store.current.serial == first.serial or store.current.bundles == first.bundles:
                assert time.monotonic() < end, f"the rotation is not heard of: {store.last_error}"
                await asyncio.sleep(0.05)
            await asyncio.sleep(2.0)
            await until_called()
            await asyncio.to_thread(agent.kill)
            await asyncio.sleep(1.0)
            await until_called()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
        finally:
            await asyncio.to_thread(mesh.close)
    assert failures == []
    assert set(answers) == {document["services"]["storefront"]["identity"]}


@pytest.mark.slow
async def test_nobody_is_served_who_has_no_name_of_consul_s(agent: Any, tmp_path: Path) -> None:
    """A plain caller, where another one is served."""
    port = free_port()
    (tmp_path / "answering.py").write_text(APP)
    document = {
        "mesh": "shop",
        "secure": {"mode": "enforce", "trust_domain": trust_domain_of(agent), "identity": {"plugin": "consul", "url": agent.url}},
        "services": {"orders": {"listen": f"127.0.0.1:{port}", "identity": id_of(agent, "orders")}},
    }
    file = tmp_path / "mesh.yaml"
    file.write_text(json.dumps(document))
    with process(MESHLIB, "serve", "answering:app", "--config", str(file), "--service", "orders", cwd=tmp_path) as child:
        await asyncio.to_thread(wait_until_listening, port, child)
        async with httpx.AsyncClient(verify=False) as http:
            for scheme in ("http", "https"):
                with pytest.raises((httpx.HTTPError, ssl.SSLError)):
                    (await http.get(f"{scheme}://127.0.0.1:{port}/")).raise_for_status()
