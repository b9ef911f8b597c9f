"""Is there no runtime in the application's process? The `h2` crate brings tokio along, and only its traits may be compiled.

A runtime behind Python hangs forked workers, and a timer or a socket of its own would be I/O that nobody sees. What Cargo would
compile for the extension is asked of Cargo itself.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.support import ROOT

# With these tokio runs tasks, opens sockets, keeps time or starts threads.
FORBIDDEN = {"full", "fs", "macros", "net", "process", "rt", "rt-multi-thread", "signal", "test-util", "time"}


@pytest.mark.parametrize("package", ["mesh-wire", "mesh-binding"])
def test_tokio_is_compiled_without_runtime_network_and_time(package: str) -> None:
    """Only what the traits of `h2` need."""
    cargo = shutil.which("cargo") or pytest.skip("cargo is not installed")
    command = [cargo, "tree", "--offline", "--locked", "-p", package, "-e", "normal,build", "-f", "{p} [{f}]", "--prefix", "none"]
    folder = ROOT / "meshlib" / "_native"
    tree = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout
    lines = {line.removesuffix(" (*)") for line in tree.splitlines() if line.startswith("tokio v")}
    assert len(lines) == 1, lines
    features = set(lines.pop().partition("[")[2].rstrip("]").split(","))
    assert features & FORBIDDEN == set()
    assert "io-util" in features
