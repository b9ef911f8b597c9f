"""Which of the processes that come of a fork is entered in a registry? The one that serves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support import free_port

HEAD = """\
mesh: shop
secure: {mode: observe}
registries:
  memory: {cache: false}
services:
  orders: {listen: "127.0.0.1:1", register: memory OWN}
  stock: {discover: {static: ["127.0.0.1:9"]}}
"""


def begin(tmp_path: Path, *what: str, own: str = "", more: str = "") -> tuple[subprocess.Popen[str], Path]:
    file, entered = tmp_path / "mesh.yaml", tmp_path / "entered"
    file.write_text(more + HEAD.replace("OWN", own))
    entered.mkdir()
    command = [sys.executable, "-m", "tests.discover.forked_server", str(file), str(entered), *what]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True), entered


def test_child_of_a_grpc_server_is_not_entered(tmp_path: Path) -> None:
    """It has its parent's mesh and not its port: an entry of its own would send calls to the parent for as long as the child lives."""
    server, entered = begin(tmp_path, "grpc")
    said, _ = server.communicate(timeout=30)
    assert said == "called\n"
    assert [file.name for file in entered.iterdir()] == [str(server.pid)]


def test_workers_are_entered_where_their_parent_was_told_to_listen(tmp_path: Path) -> None:
    """Each by itself, and not where the configuration says."""
    address = f"127.0.0.1:{free_port()}"
    server, entered = begin(tmp_path, "served", address)
    try:
        end = time.monotonic() + 20.0
        while len(list(entered.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        assert [file.read_text() for file in entered.iterdir()] == [address, address]
        assert str(server.pid) not in {file.name for file in entered.iterdir()}
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0


def test_command_is_entered_where_it_was_told_to_listen(tmp_path: Path) -> None:
    """`meshlib serve --listen`, and not where the configuration says."""
    address = f"127.0.0.1:{free_port()}"
    assert entered_by(tmp_path, "command", address) == [address]


def test_what_the_agent_hands_over_is_entered_where_the_agent_listens(tmp_path: Path) -> None:
    """A socket of this machine is no address for others."""
    socket = tmp_path / "app.sock"
    own = f", inbound: {{agent: {socket}}}, protocol: grpc"
    agent = f"agent: {{ca: ca, entries: [{{service: orders, uid: {os.getuid()}}}]}}\n"
    assert entered_by(tmp_path, "grpc", f"unix:{socket}", own, agent) == ["127.0.0.1:1"]


def entered_by(folder: Path, what: str, address: str, own: str = "", more: str = "") -> list[str]:
    server, entered = begin(folder, what, address, own=own, more=more)
    try:
        end = time.monotonic() + 20.0
        while not list(entered.iterdir()) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
        return [file.read_text() for file in entered.iterdir()]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
