"""How long has a call, and who is told?"""

from __future__ import annotations

from tests.conformance.server.behaviours.table import behaviour
from tests.conformance.server.servers import Server


@behaviour()
def the_callers_deadline_reaches_the_handler(server: Server) -> None:
    """As what is left of it."""
    left = server.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 5000").json["left"]
    assert 3.0 < left <= 5.0


@behaviour()
def what_is_left_of_a_deadline_shrinks(server: Server) -> None:
    """From the arrival on, while the handler works."""
    found = server.ask("GET", "/slow?0.1", "X-Mesh-Deadline-Ms: 60000").json
    # Of what a call waited for a thread the gate knows too.
    assert (round(found["call"]["left"]), 50 < found["left"] <= 59.95) == (60, True)


@behaviour()
def without_a_deadline_there_is_none(server: Server) -> None:
    """Nor with one that is no number."""
    for headers in ((), ("X-Mesh-Deadline-Ms: soon",), ("X-Mesh-Deadline-Ms: ",)):
        assert server.ask("GET", "/items/7", *headers).json["left"] is None


@behaviour()
def a_deadline_is_the_calls_alone(server: Server) -> None:
    """The next one on this connection, and in this thread, has its own or none."""
    with server.connect() as wire:
        first = wire.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 5000").json["left"]
        assert 0 < first <= 5
        if server.has("kept-alive"):
            assert wire.ask("GET", "/items/7").json["left"] is None
    for _ in range(12):
        assert server.ask("GET", "/items/7").json["left"] is None


@behaviour()
def a_call_that_is_late_already_does_not_reach_the_handler(server: Server) -> None:
    """504 at once; nobody waits for an answer to it."""
    before = server.numbers()["reached"].get("items", 0)
    for late in ("0", "-20"):
        answer = server.ask("POST", "/items/7", f"X-Mesh-Deadline-Ms: {late}", body=b"x")
        assert (answer.status, answer.reason) == (504, "deadline.exceeded")
    assert server.numbers()["reached"].get("items", 0) == before


@behaviour("background")
def what_runs_behind_an_answer_has_no_deadline(server: Server) -> None:
    """It is nobody's call any more; but it may know whose it was."""
    left = server.ask("GET", "/late", "X-Mesh-Deadline-Ms: 5000").json["left"]
    assert 0 < left <= 5
    notes: list[dict[str, object]] = []
    server.until(lambda: notes.extend(filter(None, [server.ask("GET", "/note").json])) or bool(notes))  # type: ignore[func-returns-value]
    assert (notes[0]["left"], notes[0]["peer"]) == (None, server.usual_peer)
