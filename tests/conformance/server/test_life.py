"""What of a server's life concerns more than one process, or no call at all?"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.conformance.server.kinds import KINDS, Kind
from tests.conformance.server.servers import Server, output_of, running, started
from tests.conformance.server.world import STOREFRONT, World

UVICORN = next(kind for kind in KINDS if kind.name == "uvicorn/asgi")
THREADS = next(kind for kind in KINDS if kind.name == "gunicorn-threads/wsgi")
# They show no certificate of a caller.
FOREIGN = [kind for kind in KINDS if "tls" in kind.lacks]


@pytest.mark.parametrize("kind", [UVICORN, THREADS], ids=lambda kind: kind.name)
def test_workers_are_processes_of_their_own(kind: Kind, world: World) -> None:
    """Each has its own keeper after the fork; one that dies is replaced, and callers see at most the connections that it had."""
    with running(kind, "enforce", world, command=(*kind.command, "--workers", "2")) as server:
        before = workers_of(server, 2)
        os.kill(min(before), signal.SIGKILL)
        after = workers_of(server, 2, without=min(before))
        assert len(before & after) == 1
        for _ in range(20):
            assert server.ask("GET", "/items/1").json["peer"] == STOREFRONT


def workers_of(server: Server, count: int, without: int = 0) -> set[int]:
    """The children of the process that watches, once there are as many as there have to be."""

    def found() -> set[int]:
        listed = Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text()
        return {int(pid) for pid in listed.split()}

    server.until(lambda: len(found()) == count and without not in found(), seconds=15)
    return found()


@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.name)
def test_behind_a_server_that_shows_no_certificate_enforce_lets_nobody_in(kind: Kind, world: World) -> None:
    """Where the server can be told by its lifespan, it does not start; else each call is refused. Either way the log says what to do."""
    with started(kind, "enforce", world) as server:
        server.until(lambda: not server.is_running or is_listening(server.port), seconds=20)
        lies = ("X-Forwarded-Client-Cert: URI=" + STOREFRONT, "SSL-Client-Verify: SUCCESS", "X-Mesh-Peer: " + STOREFRONT)
        for headers in ((), lies):
            if server.is_running and is_listening(server.port):
                answer = server.ask("GET", "/items/7", *headers, tls=None)
                assert (answer.status, answer.reason) == (401, "secure.no_identity")
        server.until(lambda: "meshlib serve" in output_of(server.home))


def is_listening(port: int) -> bool:
    with socket.socket() as plug:
        return plug.connect_ex(("127.0.0.1", port)) == 0
