"""How many calls may a connection carry, and how does it end?"""

from __future__ import annotations

import contextlib
import ssl

from tests.conformance.server.behaviours.callers import together
from tests.conformance.server.behaviours.table import behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import head


@behaviour("kept-alive")
def a_connection_carries_many_calls(server: Server) -> None:
    """Each is judged by itself, and the handler sees each as its own."""
    with server.connect() as wire:
        for number in range(100):
            answer = wire.ask("GET", f"/items/{number}", f"X-Number: {number}")
            assert (answer.json["path"], answer.seen("x-number")) == (f"/items/{number}", [str(number)])


@behaviour("kept-alive", "raw")
def a_connection_goes_on_behind_a_refusal(server: Server) -> None:
    """Also behind a body that nobody read; or it is closed and says so."""
    with server.connect() as wire:
        for method, target, body, status in (
            ("GET", "/items/1", b"", 200), ("GET", "/%zz", b"", 400), ("POST", "/items/2", b"x" * 1000, 200),
            ("POST", "/a%0a", b"x" * 1000, 400), ("GET", "/items/3", b"", 200),
        ):  # fmt: skip
            answer = wire.ask(method, target, body=body)
            assert (answer.status, target) == (status, target)
            if answer.headers.get("connection") == "close":
                assert wire.is_closed
                return


@behaviour("kept-alive")
def a_body_that_nobody_read_is_no_request(server: Server) -> None:
    """What stands in it is not taken for the next call."""
    inner = head("GET", "/admin")
    with server.connect() as wire:
        wire.send(head("POST", "/ignore", f"Content-Length: {len(inner)}") + inner)
        answer = wire.answer()
        assert (answer.status, answer.json) == (200, {"is_ignored": True})
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert wire.ask("GET", "/items/7", is_last=True).json["path"] == "/items/7"
            assert wire.is_closed


@behaviour("pipeline")
def pipelined_calls_are_answered_in_order(server: Server) -> None:
    """More than fits into one read: what is decrypted already must not be forgotten."""
    filler = "X-Filler: " + "x" * 3000
    with server.connect() as wire:
        wire.send(b"".join(head("GET", f"/items/{number}", filler) for number in range(12)))
        assert [wire.answer().json["path"] for _ in range(12)] == [f"/items/{number}" for number in range(12)]


@behaviour("pipeline", modes=("enforce",))
def each_of_several_pipelined_calls_is_judged(server: Server) -> None:
    """A good one takes no bad one along."""
    with server.connect() as wire:
        wire.send(head("GET", "/items/1") + head("GET", "/admin") + head("GET", "/items/2", "Connection: close"))
        assert [wire.answer().status for _ in range(3)] == [200, 403, 200]


@behaviour()
def who_wants_to_close_is_closed(server: Server) -> None:
    """After the answer, which says so; and nothing behind it is served."""
    with server.connect() as wire:
        wire.send(head("GET", "/items/7", "Connection: close") + head("GET", "/items/8"))
        answer = wire.answer()
        # h11 in hypercorn takes more bytes for a mistake.
        assert (answer.status in (200, 400), answer.headers.get("connection", "close").lower()) == (True, "close")
        assert wire.is_closed


@behaviour()
def a_call_of_http_1_0_is_answered_and_closed(server: Server) -> None:
    """Whole, whatever it says about the connection."""
    with server.connect() as wire:
        wire.send(head("GET", "/stream", version="1.0"))
        answer = wire.answer()
        assert (answer.status, len(answer.body)) == (200, 50_000)
        assert wire.is_closed


@behaviour()
def a_head_may_come_in_drops(server: Server) -> None:
    """A byte at a time, as long as it comes to its end."""
    with server.connect() as wire:
        for byte in head("GET", "/items/7", "Connection: close"):
            wire.send(bytes([byte]))
        assert wire.answer().json["path"] == "/items/7"


@behaviour("together")
def a_slow_caller_holds_up_nobody(server: Server) -> None:
    """Connections that say nothing, half of a handshake, half of a request: others are served meanwhile."""
    with contextlib.ExitStack() as slow:
        for beginning in (b"", b"", b"\x16\x03", b"\x16\x03\x01\x00") if server.has("door") else (b"", b""):
            slow.enter_context(server.connect(None)).send(beginning)
        slow.enter_context(server.connect()).send(b"GET /items/7 HTTP/1.1\r\nHo")
        for _ in range(5):
            assert server.ask("GET", "/items/7").status == 200


@behaviour("together")
def connections_at_the_same_time_are_served(server: Server) -> None:
    """Many more than there are places for calls, as long as they take turns."""
    statuses: list[int] = []

    def ask() -> None:
        with server.connect() as wire:
            statuses.extend(wire.ask("GET", "/items/7").status for _ in range(5))

    with together(*[ask] * 5):
        pass
    assert statuses == [200] * 25
