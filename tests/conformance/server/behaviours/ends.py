"""How does what was proved end, and how does the server?

These come last: the certificate of the server is another one behind the first of them, and behind the last one it is gone.
"""

from __future__ import annotations

import contextlib
import signal
import ssl
import threading
import time

import pytest
from cryptography import x509

from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import Answer, Wire, context, head


@behaviour("tls", modes=ENFORCE)
def certificates_rotate_on_a_live_listener(server: Server) -> None:
    """New connections get the new one; an old connection ends with an answer that says so, and none fails."""
    before = serial_of_server(server)
    with server.connect() if server.has("kept-alive") else contextlib.nullcontext() as old:
        if old is not None:
            assert old.ask("GET", "/items/1").headers.get("connection", "keep-alive") == "keep-alive"
        server.world.authority.write("orders", server.home / "identities")
        server.until(lambda: serial_of_server(server) != before)
        if old is not None:
            last = old.ask("GET", "/items/2")
            assert (last.status, last.headers["connection"]) == (200, "close")
            assert old.is_closed


def serial_of_server(server: Server) -> int:
    with server.connect() as wire:
        assert isinstance(wire.sock, ssl.SSLSocket)
        der = wire.sock.getpeercert(binary_form=True)
        assert der is not None
        wire.ask("GET", "/public", is_last=True)
    return x509.load_der_x509_certificate(der).serial_number


@behaviour("tls", "kept-alive", modes=ENFORCE)
def a_connection_ends_with_its_callers_certificate(server: Server) -> None:
    """Not a request is served on a proof that has ended."""
    name = server.new_name()
    server.world.authority.write("storefront", server.home / name, ttl=2.0)
    tls = context(server.home / name / "storefront")
    with server.connect(tls) as wire:
        assert wire.ask("GET", "/items/1").status == 200
        # Certificates count whole seconds.
        time.sleep(3.1)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            answer = wire.ask("GET", "/items/2")
            raise AssertionError(f"it was answered: {answer}")
    with pytest.raises((ConnectionError, ssl.SSLError)):
        server.ask("GET", "/items/1", tls=tls)


@behaviour("graceful")
def a_signal_lets_what_is_in_flight_end(server: Server) -> None:
    """The call is answered, and told that it is the last one; idle connections are closed, nothing new is taken, and the exit is clean."""
    name, answers = server.new_name(), list[Answer]()

    def ask(wire: Wire) -> None:
        answers.append(wire.ask("GET", f"/hold?{name}"))

    with server.connect() as busy, contextlib.ExitStack() as idle:
        idlers = [idle.enter_context(server.connect()) for _ in range(3)] if server.has("together") else []
        for wire in idlers:
            assert wire.ask("GET", "/public").status == 200
        asking = threading.Thread(target=ask, args=(busy,), daemon=True)
        asking.start()
        server.until(lambda: server.waits(name) == 1)
        server.child.send_signal(signal.SIGTERM)
        if server.has("drained"):
            for wire in idlers:
                assert wire.is_closed
        server.let_go(name)
        asking.join(20)
        code = server.child.wait(25)
    assert [answer.status for answer in answers] == [200]
    if server.has("drained"):
        assert answers[0].headers["connection"] == "close"
    assert code in ((0,) if server.has("drained") else (0, -signal.SIGTERM))
    with pytest.raises(OSError):
        server.ask("GET", "/public")
    if server.has("lifespan"):
        assert [line.split()[1:] for line in (server.home / "ended").read_text().splitlines()] == [["1", "1"]]


@behaviour("listeners")
def readiness_goes_before_the_service(server: Server) -> None:
    """Told to end, it says so to those who ask, and serves those who have not asked yet."""
    server.until(lambda: server.ask_at("probe", "GET", "/readyz").status == 200)
    server.child.send_signal(signal.SIGTERM)
    server.until(lambda: server.ask_at("probe", "GET", "/readyz").status == 503)
    assert server.ask("GET", "/items/7").status == 200
    assert server.ask_at("probe", "GET", "/livez").status == 200
    assert server.child.wait(25) == 0


@behaviour("drained", "twice", modes=ENFORCE)
def a_second_signal_ends_at_once(server: Server) -> None:
    """Whoever sends it twice means it."""
    name = server.new_name()
    with server.connect() as wire:
        wire.send(head("GET", f"/hold?{name}"))
        server.until(lambda: server.waits(name) == 1)
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # the first one must have been taken
        assert server.child.poll() is None
        server.child.send_signal(signal.SIGTERM)
        server.child.wait(6)
