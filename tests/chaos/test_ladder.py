"""Can a system climb from nothing to observe, permissive and enforce, one service at a time, without a failed call?

Five processes in a chain, a → b → c → d → e, under a steady load from outside. First plain uvicorn and plain httpx; each is then
restarted with the mesh around it (its listening socket is kept, as systemd would), and then only the one mesh.yaml changes, which
every process takes up by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

import meshlib
from tests.support import PYTHON, TRUST_DOMAIN, identities

CHAIN = ("a", "b", "c", "d", "e")
SERVICE = """
import asyncio, json, os, sys
import httpx, uvicorn

name, following, address, fd, is_mesh = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5] == "mesh"
if is_mesh:
    import meshlib
    mesh = meshlib.Mesh.load(service=name)
    http, base = mesh.client(), f"http://{following}"
else:
    http, base = httpx.AsyncClient(limits=httpx.Limits(max_keepalive_connections=0)), f"http://{address}"

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    path = [name]
    if following != "-":
        answer = await http.get(base + "/")
        answer.raise_for_status()
        path += answer.json()
    body = json.dumps(path).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

if is_mesh:
    mesh.serve(app, listen=f"fd:{fd}")
else:
    uvicorn.run(app, fd=fd, log_level="error")
"""


class System:
    """The five processes and their one mesh.yaml."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sockets = {name: self._listen() for name in CHAIN}
        self.modes = dict.fromkeys((*CHAIN, "me"), "observe")
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "service.py").write_text(SERVICE)
        identities(folder, *CHAIN, "me")
        self.write()

    @staticmethod
    def _listen() -> socket.socket:
        plug = socket.socket()
        plug.bind(("127.0.0.1", 0))
        plug.listen(512)
        return plug

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.sockets[name].getsockname()[1]}"

    def write(self) -> None:
        callers = dict(zip(CHAIN, ("me", *CHAIN), strict=False))
        services: dict[str, Any] = {
            name: {
                "discover": {"static": [self.address(name)]},
                "secure": {"mode": self.modes[name], "allow": [{"name": "chain", "from": [callers[name]], "methods": ["GET"]}]},
            }
            for name in CHAIN
        }
        services["me"] = {"secure": {"mode": self.modes["me"]}}
        secure = {"mode": "observe", "trust_domain": TRUST_DOMAIN, "identity": {"folder": str(self.folder / "identities")}}
        fresh = self.folder / "mesh.yaml.new"
        fresh.write_text(json.dumps({"mesh": "shop", "secure": secure, "services": services}))
        fresh.rename(self.folder / "mesh.yaml")

    def start(self, name: str, kind: str) -> None:
        following = dict(zip(CHAIN, (*CHAIN[1:], "-"), strict=True))[name]
        address = self.address(following) if following != "-" else "-"
        fd = self.sockets[name].fileno()
        self.children[name] = subprocess.Popen(
            [PYTHON, "service.py", name, following, address, str(fd), kind],
            cwd=self.folder,
            env={**os.environ, "MESHLIB_CONFIG": str(self.folder / "mesh.yaml")},
            pass_fds=[fd],
        )

    def restart(self, name: str, kind: str) -> None:
        """The old one ends its work while the new one already takes connections from the same socket."""
        old = self.children[name]
        self.start(name, kind)
        time.sleep(1.0)
        old.send_signal(signal.SIGTERM)
        assert old.wait(15) is not None

    def stop(self) -> None:
        for child in self.children.values():
            child.kill()
            child.wait()
        for plug in self.sockets.values():
            plug.close()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_five_services_climb_the_ladder_without_a_failed_call(tmp_path: Path) -> None:
    """0 failed calls from nothing to enforce; at the end each edge is mutual TLS."""
    system = System(tmp_path)
    failures: list[str] = []
    calls = 0
    is_over = asyncio.Event()
    try:
        for name in CHAIN:
            system.start(name, "plain")
        mesh = meshlib.Mesh.load(tmp_path / "mesh.yaml", service="me")
        async with mesh.client() as http:
            end = time.monotonic() + 30
            while True:
                try:
                    assert (await http.get("http://a/")).json() == list(CHAIN)
                    break
                except Exception:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.2)

            async def load() -> None:
                nonlocal calls
                while not is_over.is_set():
                    calls += 1
                    try:
                        answer = await http.get("http://a/")
                        if answer.status_code != 200 or answer.json() != list(CHAIN):
                            failures.append(f"{answer.status_code} {answer.text}")
                    except Exception as error:
                        failures.append(repr(error))
                    await asyncio.sleep(0.02)

            workers = [asyncio.create_task(load()) for _ in range(4)]
            for name in CHAIN:  # nothing → observe
                await asyncio.to_thread(system.restart, name, "mesh")
            assert failures == []
            for mode in ("permissive", "enforce"):
                for name in (*CHAIN, "me"):
                    system.modes[name] = mode
                    system.write()
                    await asyncio.sleep(2.2)  # every process looks once a second
                    assert failures == [], f"when {name} went to {mode}"
            is_over.set()
            await asyncio.gather(*workers)
            assert (await http.get("http://a/")).json() == list(CHAIN)
        assert calls > 300
        reader, writer = await asyncio.open_connection(*system.address("e").split(":"))
        writer.write(b"GET / HTTP/1.1\r\nhost: e\r\n\r\n")
        assert b"mutual TLS" in await reader.read(2000)
        writer.close()
        mesh.close()
    finally:
        system.stop()
    assert failures == []
