"""Does an endpoint's name that nobody answers for hold up those who ask for others?"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# In a mount namespace of its own, with a name server that is silent. One identity asks for many names, another one for one that is known.
SCRIPT = """
import contextlib, pathlib, socket, sys
from tests.agent.proxy_support import CALLER, ORDERS, World, asking, echo
folder = pathlib.Path(sys.argv[1])
silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
silent.bind(("127.0.0.99", 53))
world = World(folder)
with contextlib.closing(world):
    port = world.listen(world.application(echo))
    def ask(own, host, fields):
        plug = world.caller(own)
        told = {**asking(port, **fields), "x-mesh-endpoint": f"{host}:{port}"}
        plug.sendall(("GET / HTTP/1.1\\r\\nhost: a\\r\\n" + "".join(f"{k}: {v}\\r\\n" for k, v in told.items()) + "\\r\\n").encode())
        return plug
    slow = [ask(CALLER, f"slow{number}.test", {"connect": 500}) for number in range(40)]
    assert b"connect_timeout" in slow[-1].recv(65536)
    print(ask(ORDERS, "localhost", {"connect": 2000}).recv(65536).split(b"\\r\\n")[0].decode(), flush=True)
    import os
    os._exit(0)
"""


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare, for a name server of its own"
)
def test_names_that_nobody_answers_for_hold_up_nobody_else(tmp_path: Path) -> None:
    """The system's resolver waits for ten seconds, on a thread that can't be called back; others have theirs."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.99\n")
    shell = f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {sys.executable} -c "$0" {tmp_path}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", shell, SCRIPT], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    if "mount" in done.stderr and not done.stdout:
        pytest.skip("no mount namespace can be made here")
    assert done.stdout == "HTTP/1.1 200 OK\n", done.stderr
