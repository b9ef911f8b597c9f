"""Who may come in at the public listener, who waits for a place, and what is told to whom asks how loaded we are? In process."""

from __future__ import annotations

import asyncio
from typing import Any

import meshlib
from meshlib.server.asgi import MeshASGI
from meshlib.server.line import Line
from tests.server.inside import SHOP, SOMEBODY, Caller, Clock, exact, http_scope, in_flight, rule, way
from tests.server.test_asgi import App

ITEMS = rule("catalogue", "/items/*", methods=["GET"])


async def call(mesh: MeshASGI, line: Line, *headers: tuple[str, str], target: str = "/items/7", method: str = "GET") -> Caller:
    caller = Caller()
    await mesh.serve(line, http_scope(target, *headers, method=method, peer=None), caller.receive, caller.send)
    return caller


def fields(caller: Caller) -> dict[bytes, bytes]:
    return dict(caller.sent[0]["headers"])


# ------------------------------------------------------------------------------------------------ the public listener


async def test_a_caller_without_identity_gets_in_where_a_rule_of_the_public_listener_says_so() -> None:
    """In mode enforce, and nowhere else: the same rule on the mesh's own port is for those who proved who they are."""
    mesh = MeshASGI(App(), way(rule("all"), public_rules=[ITEMS]))
    assert (await call(mesh, Line(is_public=True))).status == 200
    assert (await call(mesh, Line())).status == 401


async def test_the_rules_of_the_mesh_do_not_hold_at_the_public_listener() -> None:
    """What is for everybody in the mesh is not for everybody in the world."""
    mesh = MeshASGI(App(), way(rule("all"), public_rules=[ITEMS]))
    answer = await call(mesh, Line(is_public=True), target="/internal")
    assert (answer.status, answer.problem["reason"]) == (403, "secure.denied")
    assert (await call(mesh, Line(is_public=True), method="POST")).status == 403
    assert (await call(mesh, Line(SOMEBODY, is_public=True), target="/internal")).status == 403


async def test_without_rules_nobody_gets_in_at_the_public_listener() -> None:
    """Deny on doubt."""
    mesh = MeshASGI(App(), way(rule("all")))
    assert (await call(mesh, Line(SOMEBODY, is_public=True))).status == 403


async def test_the_handler_knows_at_which_listener_it_is_called() -> None:
    """By the record of the call; a caller without identity is nobody there."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        record = meshlib.current_call()
        peer = meshlib.peer()
        assert record is not None
        assert peer is not None
        seen.append((record["listener"], peer.spiffe_id))
        await App()(scope, receive, send)

    mesh = MeshASGI(app, way(rule("all"), public_rules=[ITEMS]))
    await call(mesh, Line(is_public=True))
    await call(mesh, Line(SOMEBODY))
    assert seen == [("public", ""), ("mesh", SOMEBODY.spiffe_id)]


# ------------------------------------------------------------------------------------------------ waiting


class Slow:
    """A handler that is held until it is let go, one by one; it notes who came in, in order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.doors: dict[str, asyncio.Event] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = scope["query_string"].decode()
        self.order.append(name)
        self.doors[name] = asyncio.Event()
        await self.doors[name].wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


ROOM = {"in_flight": 1, "queue": 3.0, "target": 0.005, "interval": 5.0}


def begin(mesh: MeshASGI, name: str, line: Line | None = None, *headers: tuple[str, str]) -> asyncio.Task[Caller]:
    return asyncio.create_task(call(mesh, line or Line(SOMEBODY), *headers, target=f"/items/7?{name}"))


async def test_a_call_waits_for_a_place_and_gets_the_next_one() -> None:
    """First come, first served, as long as nothing has waited long; one more than may wait is refused at once."""
    slow = Slow()
    inbound = way(admission=ROOM)
    mesh = MeshASGI(slow, inbound)
    tasks = []
    for name in ("a", "b", "c", "d"):
        tasks.append(begin(mesh, name))
        await asyncio.sleep(0)
    refused = await begin(mesh, "e")
    assert (refused.status, fields(refused)[b"retry-after"]) == (503, b"1")
    for name in ("a", "b", "c", "d"):
        while name not in slow.doors:
            await asyncio.sleep(0)
        slow.doors[name].set()
    assert [(await task).status for task in tasks] == [200] * 4
    assert (slow.order, in_flight(inbound)) == (["a", "b", "c", "d"], 0)


async def test_who_waits_too_long_is_told_not_to_try_again() -> None:
    """Shed: the place never came free, and elsewhere it is no better."""
    slow = Slow()
    inbound = way(admission={**ROOM, "interval": 0.02})
    mesh = MeshASGI(slow, inbound)
    first = begin(mesh, "a")
    await asyncio.sleep(0)
    shed = await begin(mesh, "b")
    assert (shed.status, shed.problem["reason"], fields(shed)[b"x-mesh-no-retry"]) == (503, "admit.shed", b"1")
    slow.doors["a"].set()
    await first
    assert (slow.order, inbound.gate.load()["waiting"]) == (["a"], 0)


async def test_a_call_that_is_cancelled_while_it_waits_leaves_nothing() -> None:
    """Neither a place in the queue nor one inside."""
    slow = Slow()
    inbound = way(admission=ROOM)
    mesh = MeshASGI(slow, inbound)
    first, second = begin(mesh, "a"), begin(mesh, "b")
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait({second})
    slow.doors["a"].set()
    await first
    third = begin(mesh, "c")
    await asyncio.sleep(0.01)
    slow.doors["c"].set()
    assert (await third).status == 200
    load = inbound.gate.load()
    assert (slow.order, load["in_flight"], load["waiting"]) == (["a", "c"], 0, 0)


async def test_the_more_important_call_goes_first() -> None:
    """By what a trusted identity says of its calls; what others say counts for nothing."""
    slow = Slow()
    told = {"from": exact(SHOP), "paths": [], "as": "told"}
    inbound = way(admission={**ROOM, "priorities": [told]})
    mesh = MeshASGI(slow, inbound)
    trusted, other = Line(meshlib.Peer(SHOP, is_tls=True)), Line(SOMEBODY)
    tasks = [
        begin(mesh, "first", trusted),
        begin(mesh, "batch", trusted, ("x-mesh-priority", "sheddable")),
        begin(mesh, "liar", other, ("x-mesh-priority", "critical_plus")),
        begin(mesh, "checkout", trusted, ("x-mesh-priority", "critical_plus")),
    ]
    await asyncio.sleep(0.01)
    for _ in tasks:
        while len(slow.order) == sum(door.is_set() for door in slow.doors.values()):
            await asyncio.sleep(0)
        slow.doors[slow.order[-1]].set()
    await asyncio.gather(*tasks)
    assert slow.order == ["first", "checkout", "liar", "batch"]


async def test_what_was_waited_for_is_told_and_the_deadline_still_holds() -> None:
    """The remaining time starts at arrival: a call whose time ends in the queue is refused before the handler runs."""
    slow, clock = Slow(), Clock()
    mesh = MeshASGI(slow, way(admission={**ROOM, "interval": 0.05}, clock=clock))
    first = begin(mesh, "a")
    second = begin(mesh, "b", None, ("x-mesh-deadline-ms", "20"))
    await asyncio.sleep(0)
    clock.now += 0.021
    slow.doors["a"].set()
    await first
    late = await second
    assert (late.status, late.problem["reason"], slow.order) == (504, "deadline.exceeded", ["a"])


# ------------------------------------------------------------------------------------------------ load


async def test_a_caller_that_asks_is_told_how_loaded_we_are() -> None:
    """In Envoy's form, and only who asks; the question itself is for the mesh alone."""
    app = App()
    mesh = MeshASGI(app, way())
    line = Line(SOMEBODY)
    told = fields(await call(mesh, line, ("endpoint-load-metrics-format", "TEXT")))[b"endpoint-load-metrics"]
    assert told.startswith(b"TEXT ")
    assert b"application_utilization:" in told
    json_told = fields(await call(mesh, line, ("endpoint-load-metrics-format", "json")))[b"endpoint-load-metrics"]
    assert json_told.startswith(b"JSON {")
    assert b"endpoint-load-metrics" not in fields(await call(mesh, line))
    assert all(name != b"endpoint-load-metrics-format" for scope in app.scopes for name, _ in scope["headers"])


# ------------------------------------------------------------------------------------------------ the end of the server


async def test_while_the_server_ends_every_answer_is_the_last_of_its_connection() -> None:
    """Refusals too."""
    inbound = way(rule("items", "/items/*"))
    mesh = MeshASGI(App(), inbound)
    assert b"connection" not in fields(await call(mesh, Line(SOMEBODY)))
    inbound.is_closing = True
    assert fields(await call(mesh, Line(SOMEBODY)))[b"connection"] == b"close"
    assert fields(await call(mesh, Line(SOMEBODY), target="/other"))[b"connection"] == b"close"


async def test_a_server_that_shows_no_certificates_does_not_start_in_mode_enforce() -> None:
    """With a clear word, by the only way that such a server has to say it."""

    async def receive() -> Any:
        return {"type": "lifespan.startup"}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    receive.__module__ = "hypercorn.asyncio.lifespan"
    inbound = way()
    inbound.door = type("Door", (), {"mode": "enforce"})()  # type: ignore[assignment]
    app = App()
    await MeshASGI(app, inbound)({"type": "lifespan"}, receive, send)
    assert [message["type"] for message in sent] == ["lifespan.startup.failed"]
    assert "hypercorn shows the application no certificate" in sent[0]["message"]
    assert app.scopes == []
