"""Which of the processes that come of a fork is entered in a registry? The one that serves."""

from __future__ import annotations

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
  orders: {listen: "127.0.0.1:1", register: memory}
  stock: {discover: {static: ["127.0.0.1:9"]}}
"""


def begin(tmp_path: Path, *what: str) -> tuple[subprocess.Popen[str], Path]:
    file, entered = tmp_path / "mesh.yaml", tmp_path / "entered"
    file.write_text(HEAD)
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
