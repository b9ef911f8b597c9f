"""Can a caller of the data socket reach, through the agent, what only the agent's own user may?

The agent connects as itself, and the kernel tells whoever listens on a UNIX socket that it is the agent. So a caller whom it connected
to one would be taken for it: by its own sockets, and by any other service of this machine that asks the kernel.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshlib.secure import CertificateAuthority
from tests.agent.daemon_world import DOMAIN, NOBODY, ORDERS, Daemon, as_user, mesh_file, place, running, until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv, to be two users"
)

# Its words: the data socket, the endpoint, the protocol, method and path. Says everything that comes.
CALLER = """
import sys, httpx
path, endpoint, protocol, method, target = sys.argv[1:]
transport = httpx.HTTPTransport(uds=path, http1=False, http2=True)
fields = {"x-mesh-endpoint": endpoint, "x-mesh-expect": "-", "x-mesh-protocol": protocol, "workload.spiffe.io": "true"}
body = b""
if method == "POST":
    fields |= {"content-type": "application/grpc", "te": "trailers"}
    body = bytes(5)
elif method == "PUT":
    body = b"debug"
with httpx.Client(transport=transport, base_url="http://localhost", timeout=3) as client:
    with client.stream(method, target, headers=fields, content=body) as reply:
        print(reply.status_code, dict(reply.headers), flush=True)
        try:
            for piece in reply.iter_raw():
                print(piece, flush=True)
        except httpx.ReadTimeout:
            pass
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    """The agent is root's, who has an identity too; the caller is another user with another one."""
    with place() as folder:
        CertificateAuthority.create(folder / "ca", DOMAIN)
        mesh_file(folder, entries=f"[{{service: orders, uid: 0}}, {{service: stock, uid: {NOBODY}}}]")
        with running(folder) as daemon:
            yield daemon


def asked(folder: Path, endpoint: str, method: str, target: str, protocol: str = "http1") -> str:
    """What another user gets by the data socket."""
    words = [*as_user(NOBODY), sys.executable, "-c", CALLER, str(folder / "data.sock"), endpoint, protocol, method, target]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False, cwd="/")
    return done.stdout + done.stderr


def test_nobody_becomes_the_agent_at_its_own_sockets(daemon: Daemon) -> None:
    """Neither the identity of its user, nor that one's secret of handing over, nor what its admins may."""
    own = asked(daemon.folder, "127.0.0.1:1", "GET", "/")
    assert "connect; written=0" in own, own  # this is how a call looks that the agent has tried
    for name, method, target, protocol in (
        ("data", "GET", "/handover", "http1"),
        ("socket", "POST", "/SpiffeWorkloadAPI/FetchX509SVID", "http2"),
        ("admin", "GET", "/entries", "http1"),
        ("admin", "PUT", "/log-level", "http1"),
    ):
        told = asked(daemon.folder, f"unix:{daemon.folder}/{name}.sock", method, target, protocol)
        assert "'x-mesh-failed': 'agent; written=0'" in told, (name, told)
        assert ORDERS not in told
    assert daemon.ask("/log-level")[1] == {"level": "info"}


def test_whoever_loses_an_entry_loses_their_connections() -> None:
    """A connection that is kept open is no longer the service's when its entry is gone, though another one has the same identity."""
    us = os.geteuid()
    with place() as folder:
        CertificateAuthority.create(folder / "ca", DOMAIN)
        mesh_file(folder, entries=f"[{{service: orders, uid: {us}}}, {{service: orders, uid: {NOBODY}}}]")
        with running(folder) as daemon, contextlib.closing(http.client.HTTPConnection("localhost", timeout=10)) as kept:
            kept.auto_open = 0
            kept.sock = socket.socket(socket.AF_UNIX)
            kept.sock.connect(str(folder / "data.sock"))
            kept.request("GET", "/handover")
            assert len(kept.getresponse().read()) == 64
            mesh_file(folder, entries=f"[{{service: orders, uid: {NOBODY}}}]")
            until(lambda: "configuration" in daemon.text, 10, lambda: daemon.text)
            with contextlib.suppress(http.client.HTTPException, OSError):
                kept.request("GET", "/handover")
                assert kept.getresponse().status == 503
