"""Do calls go out and come in by the real daemon, `meshlib agent run`, which knows its processes by attestation?"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.client.test_delegated_proxy import carried, eventually, hello, tls_of
from tests.proxy_agent import needs_proxy
from tests.server.inside import SHOP
from tests.support import PYTHON, Scripted, free_port, identities, mesh_of, process, wait_until_listening, write_config

pytestmark = needs_proxy

MESHLIB = str(Path(PYTHON).parent / "meshlib")


def agent_in(folder: Path, service: str) -> dict[str, Any]:
    sockets = {name: str(folder / f"{name}.sock") for name in ("socket", "data", "admin")}
    return {
        **sockets,
        "state": str(folder / "state"),
        "ca": str(folder / "ca"),
        "entries": [{"service": service, "uid": os.geteuid()}],
    }


@contextmanager
def daemon(file: Path) -> Iterator[Any]:
    with process(MESHLIB, "agent", "run", "--config", str(file)) as child:
        yield child


async def test_delegated_calls_go_by_the_daemon(tmp_path: Path) -> None:
    """A process of the entry's user; and by itself while the daemon is killed and comes again."""
    identities(tmp_path, "me", "orders")
    server = Scripted(hello)
    await server.start(ssl=tls_of(tmp_path))
    services = {"orders": {"discover": {"static": [server.address]}, "delegate": "agent"}}
    agent = agent_in(tmp_path, "me")
    try:
        with mesh_of(tmp_path, services, mode="enforce", agent=agent) as mesh:
            async with mesh.client() as http:
                assert mesh.delegation is not None
                watch = mesh.delegation.watch
                for _ in range(2):
                    with daemon(tmp_path / "mesh.yaml") as child:
                        await eventually(lambda: watch.state == "up", 15.0)
                        answer = await http.get("http://orders/a")
                        assert (answer.text, carried(answer)) == ("hello from /a", ["agent"])
                        os.kill(child.pid, signal.SIGKILL)
                        child.wait()
                        answer = await http.get("http://orders/b")
                        assert (answer.text, carried(answer)) in [
                            ("hello from /b", [word]) for word in ("gone", "away", "closed")
                        ]
                    await eventually(lambda: watch.is_away, 5.0)
    finally:
        await server.stop()


async def test_the_daemon_hands_over_to_an_application(tmp_path: Path) -> None:
    """It tells the secret to the process that its entry names, and to nobody else; uvicorn's own command serves."""
    identities(tmp_path, "me", "storefront")
    port, path = free_port(), tmp_path / "app.sock"
    me = {"listen": f"127.0.0.1:{port}", "inbound": {"agent": str(path)}, "secure": {"allow": [{"name": "shop", "from": [SHOP]}]}}
    file = write_config(tmp_path, {"me": me, "storefront": {}}, mode="enforce", agent=agent_in(tmp_path, "me"))
    callers = tmp_path / "callers"
    callers.mkdir()
    (callers / "identities").symlink_to(tmp_path / "identities")
    env = {"MESHLIB_CONFIG": str(file), "MESHLIB_SERVICE": "me"}
    with daemon(file) as agent:
        wait_until_listening(port, agent)
        with process(PYTHON, "-m", "uvicorn", "tests.server.handed_app:asgi", "--uds", str(path), env=env):
            end = time.monotonic() + 20
            while not path.exists():
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
            address = {"discover": {"static": [f"127.0.0.1:{port}"]}}
            with mesh_of(callers, {"me": address, "storefront": {}}, service="storefront", mode="enforce") as mesh:
                async with mesh.client() as http:
                    answer = await http.get("http://me/who")
            assert answer.status_code == 200, answer.text
            assert answer.json()["peer"] == SHOP
