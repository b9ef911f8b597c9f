"""Who is refused, how, and what is told?"""

from __future__ import annotations

from tests.conformance.server.behaviours.callers import together
from tests.conformance.server.behaviours.table import ENFORCE, behaviour
from tests.conformance.server.servers import Server
from tests.conformance.server.wire import Answer
from tests.conformance.server.world import IN_FLIGHT, RATE, WAITING


@behaviour("together")
def a_full_house_takes_nobody_in(server: Server) -> None:
    """503 with a time to come again. Those who are in, and those who wait, are served; and then everybody again."""
    name, answers = server.new_name(), list[Answer]()
    with together(*[lambda: answers.append(server.ask("GET", f"/hold?{name}"))] * (IN_FLIGHT + WAITING)):
        server.until(lambda: load(server) == {"in_flight": IN_FLIGHT, "limit": IN_FLIGHT, "waiting": WAITING})
        refused = [server.ask("GET", "/items/7") for _ in range(2)]
        server.let_go(name)
    assert [(each.status, each.reason) for each in refused] == [(503, "admit.limit")] * 2
    assert [int(each.headers["retry-after"]) >= 1 for each in refused] == [True] * 2
    assert [each.status for each in answers] == [200] * (IN_FLIGHT + WAITING)
    assert server.ask("GET", "/items/7").status == 200


def load(server: Server) -> dict[str, int]:
    found: dict[str, int] = server.numbers()["load"]
    return found


@behaviour("together")
def who_finds_no_place_waits_for_one(server: Server) -> None:
    """And is served as soon as somebody has left; it is told that it waited. Its time runs meanwhile."""
    name, waiters = server.new_name(), list[Answer]()
    late = list[Answer]()
    with together(*[lambda: server.ask("GET", f"/hold?{name}")] * IN_FLIGHT):
        server.until(lambda: load(server)["in_flight"] == IN_FLIGHT)
        with together(
            lambda: waiters.append(server.ask("GET", "/items/7")),
            lambda: late.append(server.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 50")),
        ):
            server.until(lambda: load(server)["waiting"] >= 1 and late != [])
            server.let_go(name)
    assert [(each.status, each.json["call"]["waited"] > 0) for each in waiters] == [(200, True)]
    assert [(each.status, each.reason) for each in late] == [(504, "deadline.exceeded")]


@behaviour("together")
def a_probe_finds_a_place_in_a_full_house(server: Server) -> None:
    """Whether the process lives is not a question of its load."""
    name = server.new_name()
    with together(*[lambda: server.ask("GET", f"/hold?{name}")] * IN_FLIGHT):
        server.until(lambda: load(server)["in_flight"] == IN_FLIGHT)
        assert server.ask("GET", "/healthz").json["path"] == "/healthz"
        server.let_go(name)


@behaviour()
def who_asks_is_told_how_loaded_we_are(server: Server) -> None:
    """In the form that it asks for (ORCA), as a header of the answer; nobody else is."""
    for form, begin in (("text", "TEXT "), ("json", "JSON {")):
        answer = server.ask("GET", "/items/7", f"Endpoint-Load-Metrics-Format: {form}")
        if server.mode == "permissive":
            # Over plain text it is a stranger who asks.
            assert "endpoint-load-metrics" not in answer.headers
            continue
        assert answer.headers["endpoint-load-metrics"].startswith(begin), answer
    assert "endpoint-load-metrics" not in server.ask("GET", "/items/7").headers


@behaviour()
def who_calls_too_often_is_told_when_to_come_again(server: Server) -> None:
    """429 with the seconds; others are served."""
    tenant = f"X-Tenant: {server.new_name()}"
    answers = [server.ask("GET", "/items/7", tenant) for _ in range(RATE + 2)]
    assert [each.status for each in answers] == [200] * RATE + [429] * 2
    assert (answers[-1].reason, 1 <= int(answers[-1].headers["retry-after"]) <= 3600) == ("admit.rate", True)
    assert server.ask("GET", "/items/7").status == 200


@behaviour()
def a_refusal_is_problem_details(server: Server) -> None:
    """RFC 9457: for each reason the same members, and nothing of rules, paths or names."""
    tenant = f"X-Tenant: {server.new_name()}"
    answers = [server.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 0")]
    answers += [server.ask("GET", "/items/7", tenant) for _ in range(RATE + 1)][-1:]
    if server.mode == "enforce":
        answers += [server.ask("GET", "/admin"), server.ask("GET", "/token")]
    if server.has("raw"):
        answers.append(server.ask("GET", "/x//../secret"))
    for answer in answers:
        told = answer.json
        assert (answer.headers["content-type"], told["status"]) == ("application/problem+json", answer.status)
        assert (told["type"], set(told)) == (f"urn:meshlib:problem:{told['reason']}", {"type", "title", "status", "reason"})
        assert int(answer.headers["content-length"]) == len(answer.body)
        assert not any(word in answer.body for word in (b"no-admin", b"secret", b"storefront", b"tenants"))


@behaviour(modes=ENFORCE)
def a_refused_head_has_the_head_of_its_get(server: Server) -> None:
    """And no body."""
    with server.connect() as wire:
        answer = wire.ask("HEAD", "/admin", is_last=True)
        assert (answer.status, answer.headers["content-type"], wire.is_closed) == (403, "application/problem+json", True)


@behaviour()
def a_refused_call_holds_no_place(server: Server) -> None:
    """However often it comes."""
    for _ in range(IN_FLIGHT + 2):
        assert server.ask("GET", "/items/7", "X-Mesh-Deadline-Ms: 0").status == 504
    server.until(lambda: in_flight(server) == 0)
    assert server.ask("GET", "/items/7").status == 200


def in_flight(server: Server) -> int:
    """How many calls hold a place."""
    return load(server)["in_flight"]
