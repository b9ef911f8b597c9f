"""How does a server begin and end, and how does a connection? Processes of their own, signals, certificates that end."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.server.host import KINDS
from tests.conformance.server.servers import Server, World, running
from tests.conformance.server.wire import Answer, context
from tests.support import TRUST_DOMAIN


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A server that the test may end."""
    with running(request.param, "enforce", World(tmp_path)) as started:
        started.ask("GET", "/public")
        yield started


def test_a_signal_lets_what_is_in_flight_end(server: Server) -> None:
    """The call is answered, idle connections are closed, nothing new is taken, and the exit is clean."""
    answers: list[Answer] = []
    with server.connect() as busy, contextlib.ExitStack() as idle:
        idlers = [idle.enter_context(server.connect()) for _ in range(3)] if server.is_kept_alive else []
        for wire in idlers:
            assert wire.ask("GET", "/public").status == 200
        asking = threading.Thread(target=lambda: answers.append(busy.ask("GET", "/slow?1.0")))
        asking.start()
        time.sleep(0.3)  # it must be in flight
        begun = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        asking.join()
        assert [answer.status for answer in answers] == [200]
        assert server.child.wait(20) == 0
        assert time.monotonic() - begun < 10
        for wire in idlers:
            assert wire.is_closed
    with pytest.raises(OSError):
        server.ask("GET", "/public")


def test_a_second_signal_ends_at_once(server: Server) -> None:
    """Whoever sends it twice means it."""
    with server.connect() as wire:
        wire.send(b"GET /slow?20 HTTP/1.1\r\nHost: orders\r\n\r\n")
        time.sleep(0.3)
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.child.poll() is None
        begun = time.monotonic()
        server.child.send_signal(signal.SIGTERM)
        server.child.wait(15)
        assert time.monotonic() - begun < 6


def test_certificates_rotate_on_a_live_listener(server: Server) -> None:
    """New connections get the new one at once; an old connection ends with an answer that says so, and none fails."""
    world, home = server.world, server.world.folder / "enforce" / "identities"
    before = serial_of_server(server)
    with server.connect() if server.is_kept_alive else contextlib.nullcontext() as old:
        if old is not None:
            assert old.ask("GET", "/items/1").headers.get("connection", "keep-alive") == "keep-alive"
        world.authority.write("orders", home)
        end, serials = time.monotonic() + 15, [before]
        # Each process looks by itself, once a second: all have to be seen.
        while (before in serials[-8:] or len(serials) < 8) and time.monotonic() < end:
            serials.append(serial_of_server(server))
            time.sleep(0.05)
        assert before not in serials[-8:]
        if old is not None:
            last = old.ask("GET", "/items/2")
            assert (last.status, last.headers["connection"]) == (200, "close")
            assert old.is_closed


def serial_of_server(server: Server) -> bytes:
    from cryptography import x509

    with server.connect() as wire:
        assert isinstance(wire.sock, ssl.SSLSocket)
        der = wire.sock.getpeercert(binary_form=True)
        assert der is not None
        wire.ask("GET", "/public", is_last=True)
    return str(x509.load_der_x509_certificate(der).serial_number).encode()


# gunicorn's sync worker serves one call per connection, one connection at a time: it is for behind a proxy.
@pytest.mark.parametrize("server", [kind for kind in KINDS if kind != "gunicorn-sync"], indirect=True)
def test_a_connection_ends_with_its_callers_certificate(server: Server) -> None:
    """Not a request is served on a proof that has ended."""
    out = server.world.folder / "short"
    server.world.authority.write("storefront", out, ttl=3.0)
    tls = context(out / "storefront")
    with server.connect(tls) as wire:
        assert wire.ask("GET", "/items/1").status == 200
        time.sleep(4.2)  # certificates count whole seconds
        with pytest.raises((ConnectionError, ssl.SSLError)):
            answer = wire.ask("GET", "/items/2")
            raise AssertionError(f"it was answered: {answer}")
    with pytest.raises((ConnectionError, ssl.SSLError)):
        server.ask("GET", "/items/1", tls=tls)


@pytest.mark.parametrize("server", [kind for kind in KINDS if kind != "gunicorn-sync"], indirect=True)
def test_a_slow_caller_holds_up_nobody(server: Server) -> None:
    """Connections that say nothing, half of a handshake, half of a request: others are served meanwhile."""
    with contextlib.ExitStack() as slow:
        for beginning in (b"", b"", b"\x16\x03", b"\x16\x03\x01\x00"):
            slow.enter_context(server.connect(None)).send(beginning)
        slow.enter_context(server.connect()).send(b"GET /items/7 HTTP/1.1\r\nHo")
        begun = time.monotonic()
        for _ in range(5):
            assert server.ask("GET", "/items/7").status == 200
        assert time.monotonic() - begun < 3


def test_workers_are_processes_of_their_own(tmp_path: Path) -> None:
    """Each has its own keeper after the fork; one that dies is replaced, and callers see at most the connections that it had."""
    with running("gunicorn-uvicorn", "enforce", World(tmp_path)) as server:
        before = workers_of(server, 2)
        os.kill(min(before), signal.SIGKILL)
        after = workers_of(server, 2, without=min(before))
        assert len(before & after) == 1
        for _ in range(20):
            assert server.ask("GET", "/items/1").json["peer"] == f"spiffe://{TRUST_DOMAIN}/ns/default/sa/storefront"


def workers_of(server: Server, count: int, without: int = 0) -> set[int]:
    """The children of the process that watches, once there are as many as there have to be."""
    found: set[int] = set()
    end = time.monotonic() + 15
    while time.monotonic() < end:
        found = {int(pid) for pid in Path(f"/proc/{server.child.pid}/task/{server.child.pid}/children").read_text().split()}
        if len(found) == count and without not in found:
            break
        time.sleep(0.05)
    assert len(found) == count
    return found
