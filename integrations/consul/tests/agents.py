"""Which Consul do the tests talk to? The stand-in, and a real agent where there is one: both are changed by Consul's own HTTP API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from integrations.consul.tests.standin import PATIENCE, StandIn

# A real agent asks for leafs by a new root at a moment of its choice within 30 s (agent/leafcert), so that a fleet doesn't ask at once.
ROTATION = 30.0 + PATIENCE

BINARY = os.environ.get("CONSUL_BIN") or shutil.which("consul") or ""


class Told:
    """What a test does to an agent, by its API."""

    url = ""
    token = ""

    def call(self, method: str, path: str, said: Any = None) -> bytes:
        body = said if isinstance(said, bytes) or said is None else json.dumps(said).encode()
        headers = {"X-Consul-Token": self.token} if self.token else {}
        asked = urllib.request.Request(f"{self.url}{path}", data=body, method=method, headers=headers)
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            return bytes(answer.read())

    def put(self, service: str, port: int, **more: Any) -> None:
        """An instance that is there and well."""
        said = {"ID": f"{service}-{port}", "Name": service, "Address": "127.0.0.1", "Port": port, **more}
        said.setdefault("Check", {"TTL": "1h", "Status": "passing"})
        self.call("PUT", "/v1/agent/service/register?replace-existing-checks=true", said)

    def remove(self, service: str, port: int) -> None:
        self.call("PUT", f"/v1/agent/service/deregister/{service}-{port}")

    def say(self, word: str, service: str, port: int) -> None:
        self.call("PUT", f"/v1/agent/check/{word}/service:{service}-{port}")

    def instances(self, service: str, *, passing: bool = True) -> list[dict[str, Any]]:
        found = json.loads(self.call("GET", f"/v1/health/service/{service}{'?passing=1' if passing else ''}"))
        return list(found)

    def set(self, key: str, value: bytes) -> None:
        self.call("PUT", f"/v1/kv/{key}", value)

    def rotate(self) -> None:
        """Another root."""
        self.call(
            "PUT",
            "/v1/connect/ca/configuration",
            {"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": 384}},
        )


class StandInAgent(Told):
    is_real = False

    def __init__(self) -> None:
        self.standin = StandIn().start()
        self.url = self.standin.url

    def kill(self) -> None:
        self.standin.kill()

    def restart(self) -> None:
        self.standin.restart()

    def pause(self) -> None:
        self.standin.pause()

    def resume(self) -> None:
        self.standin.resume()

    def close(self) -> None:
        self.standin.kill()


class RealAgent(Told):
    """`consul agent -dev`, which keeps nothing on disk."""

    is_real = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = [free_port() for _ in range(6)]
        self.url = f"http://127.0.0.1:{self.ports[0]}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        http, serf_lan, serf_wan, server, grpc, grpc_tls = self.ports
        told = {
            "ports": {"http": http, "dns": -1, "serf_lan": serf_lan, "serf_wan": serf_wan, "server": server, "grpc": grpc, "grpc_tls": grpc_tls},
            "connect": {"enabled": True},
            "disable_update_check": True,
            "node_name": f"test-{http}",
        }  # fmt: skip
        file = self.folder / "agent.json"
        file.write_text(json.dumps(told))
        with (self.folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, "agent", "-dev", "-bind=127.0.0.1", f"-config-file={file}"],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with contextlib.suppress(OSError, urllib.error.URLError):
                if len(self.call("GET", "/v1/status/leader")) > 4 and self.call("GET", "/v1/connect/ca/roots"):
                    return
            time.sleep(0.1)
        raise AssertionError(f"no agent: {(self.folder / 'agent.log').read_text()[-2000:]}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(PATIENCE)

    def restart(self) -> None:
        self.kill()
        self.start()

    def pause(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.resume()
        self.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
