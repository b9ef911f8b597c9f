"""What is counted and traced?"""

from __future__ import annotations

import re
import secrets

from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.world import STOREFRONT


def counted(server: Server, code: str, *, route: str | None = None, method: str | None = None) -> int:
    """How many calls ended with this code, under these labels."""
    rows = server.numbers()["gate"]
    return sum(row["codes"].get(code, 0) for row in rows if route in (None, row["route"]) and method in (None, row["method"]))


@behaviour()
def calls_are_counted_by_route_and_method(server: Server) -> None:
    """By the names in mesh.yaml, so that no caller makes a series."""
    before = counted(server, "200", route="items", method="PATCH")
    for number in range(5):
        server.ask("PATCH", f"/items/{number}{secrets.token_hex(4)}")
    server.until(lambda: counted(server, "200", route="items", method="PATCH") == before + 5)
    assert {row["route"] for row in server.numbers()["gate"]} <= {"items", "rest", ""}


@behaviour(modes=ENFORCE)
def refusals_are_counted_too(server: Server) -> None:
    """Under the path that they asked for, as refused."""
    before = counted(server, "403"), sum(row["refused"] for row in server.numbers()["gate"])
    server.ask("GET", "/admin")
    assert (counted(server, "403"), sum(row["refused"] for row in server.numbers()["gate"])) == (before[0] + 1, before[1] + 1)


@behaviour()
def callers_are_counted_by_who_they_are(server: Server) -> None:
    """By the identity of the connection; nobody is a peer of its own."""
    server.ask("GET", "/items/7", "X-Mesh-Peer: spiffe://shop.internal/admin")
    peers = {row["peer"] for row in server.numbers()["gate"]}
    assert server.usual_peer in peers
    assert peers <= {"", STOREFRONT, *(f"{STOREFRONT.rpartition('/')[0]}/{name}" for name in ("gateway", "stranger"))}


@behaviour()
def prometheus_is_told_of_the_calls(server: Server) -> None:
    """The series that dashboards are made of, with the labels of the convention."""
    server.ask("GET", "/items/7")
    text = server.numbers()["metrics"]
    lines = [line for line in text.splitlines() if line.startswith("http_server_request_duration_seconds_count")]
    found = [line for line in lines if 'http_route="/items/{id}"' in line and 'http_request_method="GET"' in line]
    assert found, lines[:5]


@behaviour()
def a_trace_goes_on(server: Server) -> None:
    """The handler is in the trace that its caller told; a bad name begins a new one."""
    trace = secrets.token_hex(16)
    told = f"Traceparent: 00-{trace}-00f067aa0ba902b7-01"
    assert server.ask("GET", "/items/7", told).json["trace"] == trace
    fresh = server.ask("GET", "/items/7", f"Traceparent: 00-{trace}-0000000000000000-01").json["trace"]
    assert (fresh != trace, re.fullmatch("[0-9a-f]{32}", fresh) is not None) == (True, True)


@behaviour("spans")
def a_call_is_one_span(server: Server) -> None:
    """One of a server, below the caller's, with method, status and the trace; also for a handler that raises."""
    server.numbers()
    for target, status in (("/items/7", 200), ("/boom", 500)):
        trace = secrets.token_hex(16)
        server.ask("GET", target, f"Traceparent: 00-{trace}-00f067aa0ba902b7-01")
        found: list[dict[str, object]] = []
        server.until(lambda: found.extend(each for each in server.numbers()["spans"] if each["trace"] == trace) or bool(found))  # type: ignore[func-returns-value]
        assert [(each["kind"], each["parent"], each["status"]) for each in found] == [("SERVER", "00f067aa0ba902b7", status)]
        assert str(found[0]["name"]).startswith("GET")


@behaviour("spans", "named")
def a_span_has_the_route_of_the_framework(server: Server) -> None:
    """The template, not the path."""
    trace = secrets.token_hex(16)
    server.ask("GET", "/items/7", f"Traceparent: 00-{trace}-00f067aa0ba902b7-01")
    found: list[dict[str, object]] = []
    server.until(lambda: found.extend(each for each in server.numbers()["spans"] if each["trace"] == trace) or bool(found))  # type: ignore[func-returns-value]
    assert re.fullmatch(r"/?items/[{<](\w+:)?number[}>]", str(found[0]["route"])), found
    assert found[0]["name"] == f"GET {found[0]['route']}"


@behaviour("lifespan")
def an_application_is_started_once(server: Server) -> None:
    """Before the first call, and not again."""
    assert server.numbers()["life"] == {"startup": 1}
