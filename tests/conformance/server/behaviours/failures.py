"""What if the handler fails, or its caller goes away?"""

from __future__ import annotations

import ssl

import pytest

from tests.conformance.server.behaviours.limits import in_flight
from tests.conformance.server.behaviours.observed import counted
from tests.conformance.server.behaviours.table import behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import head


@behaviour()
def a_handler_that_raises_is_500(server: Server) -> None:
    """It is counted as such, and gives its place back."""
    before = counted(server, "500")
    for _ in range(3):
        assert server.ask("GET", "/boom").status == 500
    server.until(lambda: counted(server, "500") == before + 3)
    server.until(lambda: in_flight(server) == 0)


@behaviour("breaks")
def an_answer_that_breaks_off_is_seen_to_break_off(server: Server) -> None:
    """It is too late for a status: the caller must not take half for the whole. The place is given back."""
    with server.connect() as wire, pytest.raises((ConnectionError, ssl.SSLError, ValueError)):
        wire.ask("GET", "/half")
    server.until(lambda: in_flight(server) == 0)


@behaviour()
def callers_that_go_away_leave_nothing_behind(server: Server) -> None:
    """In the head, in the body, before the answer, in the middle of it."""
    beginnings = [
        b"GET /slow?0.1 HTT",
        head("POST", "/items/7", "Content-Length: 100000") + b"xxx",
        head("GET", "/slow?0.05"),
        head("GET", "/stream"),
    ]
    for beginning in beginnings * 3:
        with server.connect() as wire:
            wire.send(beginning)
            wire.abort()
    # They may still be coming in: once there is room again, all of them are over.
    server.until(lambda: server.ask("GET", "/items/7").status == 200)
    server.until(lambda: in_flight(server) == 0)


@behaviour("tls", modes=("enforce", "permissive"))
def callers_that_go_away_in_the_handshake_leave_nothing_behind(server: Server) -> None:
    """After a byte, and in the middle of a record."""
    for beginning in (b"\x16", b"\x16\x03\x01\x02\x00\x01", b"\x16\x03\x01\x00\x05hello"):
        with server.connect(None) as wire:
            wire.send(beginning)
            wire.abort()
    assert server.ask("GET", "/items/7").status == 200
    server.until(lambda: in_flight(server) == 0)


@behaviour("broken")
def a_caller_that_breaks_off_in_its_body_is_no_success(server: Server) -> None:
    """A handler that waits for the rest does not take what came for the whole."""
    before = counted(server, "200", route="items")
    with server.connect() as wire:
        wire.send(head("POST", "/items/7", "Content-Length: 100000") + b"x" * 5000)
        wire.abort()
    server.until(lambda: in_flight(server) == 0)
    assert counted(server, "200", route="items") == before
