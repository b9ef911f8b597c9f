"""Is there no runtime in the application's process? The `h2` crate brings tokio along, and only its traits may be compiled.

A runtime behind Python hangs forked workers, and a timer or a socket of its own would be I/O that nobody sees. What Cargo would
compile is asked of Cargo itself. The extension also holds the node agent's data path, which does need a runtime of one thread: there
the bound is wider, and that nothing of it runs unasked is seen by counting threads.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.support import ROOT

# With these tokio runs tasks, opens sockets, keeps time or starts threads.
FORBIDDEN = {"full", "fs", "macros", "net", "process", "rt", "rt-multi-thread", "signal", "test-util", "time"}


# What the data path may have of it: never a pool of threads, processes, signals or files.
PATH = {"net", "rt", "time"}


@pytest.mark.parametrize(("package", "allowed"), [("mesh-wire", set()), ("mesh-binding", PATH)])
def test_tokio_is_compiled_without_runtime_network_and_time(package: str, allowed: set[str]) -> None:
    """Only what the traits of `h2` need; for the extension as a whole, what the agent's data path needs besides."""
    cargo = shutil.which("cargo") or pytest.skip("cargo is not installed")
    command = [cargo, "tree", "--offline", "--locked", "-p", package, "-e", "normal,build", "-f", "{p} [{f}]", "--prefix", "none"]
    folder = ROOT / "meshlib" / "_native"
    tree = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout
    lines = {line.removesuffix(" (*)") for line in tree.splitlines() if line.startswith("tokio v")}
    assert len(lines) == 1, lines
    features = set(lines.pop().partition("[")[2].rstrip("]").split(","))
    assert features & FORBIDDEN == allowed
    assert "io-util" in features


def test_no_thread_starts_before_a_proxy_is_made() -> None:
    """A call over TLS and HTTP/2 objects made: one thread in the process, as before. Then a Proxy is made, and its worker is there."""
    code = """if True:
        import os
        from meshlib._native import core
        count = lambda: len(os.listdir("/proc/self/task"))
        core.HttpConnection(None, "", "localhost:1").open()
        before = count()
        proxy = core.Proxy(2)
        print(before, count())
        proxy.stop(1.0)
        print(count())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout.split() == ["1", "3", "1"], done.stderr
