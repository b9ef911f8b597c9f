"""Does a call of an ASGI server take the inbound way, the whole of it, and back? No sockets: the tests are the server."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

import meshlib
from meshlib.call import Peer, Visit, current_deadline, current_visit, outer_end, outer_layer
from meshlib.server.asgi import MeshASGI
from tests.server.inside import SHOP, Caller, Clock, exact, http_scope, in_flight, row, rule, way


class App:
    """An application that remembers what it saw."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.scopes: list[Any] = []
        self.peers: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.peers.append(meshlib.peer())
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})
            return
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


async def call(mesh: MeshASGI, scope: dict[str, Any], *messages: dict[str, Any]) -> Caller:
    caller = Caller(*messages)
    await mesh(scope, caller.receive, caller.send)
    return caller


async def test_an_allowed_call_reaches_the_handler_and_is_counted() -> None:
    """Status and end come from what the application sends."""
    inbound, app = way(), App(status=201)
    caller = await call(MeshASGI(app, inbound), http_scope())
    assert (caller.status, caller.body) == (201, b"done")
    found = row(inbound)
    assert (found["route"], found["method"], found["codes"], found["in_flight"]) == ("items", "GET", {"201": 1}, 0)


@pytest.mark.parametrize(
    ("target", "seen"),
    [
        ("/x/../items/7", "/items/7"),
        ("//items//7", "/items/7"),
        ("/items%2F7", "/items/7"),
        ("/items/%37", "/items/7"),
        ("/items/caf%C3%A9", "/items/café"),
        ("/items/7?a=/../b", "/items/7"),
        ("/items/a%20b", "/items/a b"),
    ],
)
async def test_the_handler_sees_the_path_that_was_judged(target: str, seen: str) -> None:
    """One canonical form, in `path` and in `raw_path`; the query is not part of it."""
    inbound, app = way(rule("items", "/items/*")), App()
    assert (await call(MeshASGI(app, inbound), http_scope(target))).status == 200
    (scope,) = app.scopes
    assert scope["path"] == seen
    assert meshlib._native.core.canonical_path(scope["raw_path"]) == (seen, scope["raw_path"])
    assert scope["query_string"] == target.partition("?")[2].encode()


@pytest.mark.parametrize(
    "target", ["/admin", "//admin", "/x/../admin", "/%61dmin", "/admin%2fx", "/x%5c..%5cadmin", "/admin/", "/public/..;/admin"]
)
async def test_another_spelling_of_a_denied_path_is_denied(target: str) -> None:
    """The rule names the path once; the way knows its other names."""
    app = App()
    caller = await call(MeshASGI(app, way(rule("all"), rule("no", "/admin", "/admin/*", action="deny"))), http_scope(target))
    assert (caller.status, app.scopes) == (403, [])


@pytest.mark.parametrize("target", ["/admin%0a", "/admin%00", "/%c0%afadmin", "/%252fadmin", "/x//../admin", "/%zz", "admin"])
async def test_a_path_with_two_readings_is_refused(target: str) -> None:
    """400 in every mode, before any handler."""
    for mode in ("observe", "permissive", "enforce"):
        app = App()
        caller = await call(MeshASGI(app, way(mode=mode)), http_scope(target))
        assert (caller.status, caller.problem["reason"], app.scopes) == (400, "secure.path", [])


async def test_a_server_without_raw_path_gets_the_strictest_reading() -> None:
    """What was an escape can't be told any more: a percent sign in the path stands for itself."""
    for path, status in (("/items/7", 200), ("/admin\n", 400), ("/items/%2e%2e", 400), ("/café", 200)):
        scope = http_scope(path.encode("utf-8").decode("latin-1"))
        scope["path"] = path
        del scope["raw_path"]
        assert (await call(MeshASGI(App(), way()), scope)).status == status, path


async def test_headers_are_frozen_when_authorised() -> None:
    """What is added to the server's list later is not in the list that the handler has."""
    scope, seen = http_scope("/items/7", ("x-a", "1")), []

    async def app(inner: Any, receive: Any, send: Any) -> None:
        scope["headers"].append((b"x-forwarded-client-cert", b"URI=spiffe://shop.internal/admin"))
        scope["headers"].append((b"x-b", b"2"))
        seen.extend(inner["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    await call(MeshASGI(app, way()), scope)
    assert seen == [(b"host", b"orders"), (b"x-a", b"1")]


@pytest.mark.parametrize(
    "name",
    [
        "x-forwarded-client-cert", "X-Forwarded-Client-Cert", "x_forwarded_client_cert", "client-cert", "client-cert-chain", "x-mesh-peer",
        "x-mesh-identity", "x-envoy-original-path", "x-envoy-expected-rq-timeout-ms", "x-rewrite-url", "x-original-url",
        "x-b3-sampled", "x-ssl-client-verify", "any_thing",
    ],
)  # fmt: skip
async def test_identity_headers_from_outside_never_get_in(name: str) -> None:
    """An identity comes from the connection; what a header says about it is taken away, whoever sends it."""
    app = App()
    peer = Peer(SHOP, is_tls=True)
    for scope in (
        http_scope("/items/7", (name, "1"), ("x-ok", "1")),
        http_scope("/items/7", (name, "1"), ("x-ok", "1"), peer=peer),
    ):
        await call(MeshASGI(app, way()), scope)
        assert app.scopes[-1]["headers"] == [(b"host", b"orders"), (b"x-ok", b"1")]


async def test_the_peer_is_the_one_of_the_connection() -> None:
    """From the scope's TLS extension, as our server put it there; from no other server, and not from plain connections."""
    peer = Peer(SHOP, is_tls=True)
    inbound, app = way(rule("shop", callers=exact(SHOP))), App()
    assert (await call(MeshASGI(app, inbound), http_scope(peer=peer))).status == 200
    assert app.peers == [peer]
    assert (await call(MeshASGI(app, inbound), http_scope(peer=None))).status == 401
    foreign = http_scope(peer=None, extensions={"tls": {"client_cert_name": SHOP, "meshlib.peer": SHOP}})
    assert (await call(MeshASGI(app, inbound), foreign)).status == 401
    other = http_scope(peer=Peer(SHOP + "x", is_tls=True))
    assert (await call(MeshASGI(app, inbound), other)).status == 403


async def test_a_refusal_is_a_problem_detail_that_tells_no_rule() -> None:
    """RFC 9457, the same for all callers; who decided stands in the log."""
    caller = await call(MeshASGI(App(), way(rule("secret-rule", "/x"))), http_scope(peer=Peer(SHOP, is_tls=True)))
    headers = dict(caller.sent[0]["headers"])
    assert headers[b"content-type"] == b"application/problem+json"
    assert int(headers[b"content-length"]) == len(caller.body)
    assert caller.problem == {
        "type": "urn:meshlib:problem:secure.denied",
        "title": "Not allowed",
        "status": 403,
        "reason": "secure.denied",
    }
    assert b"secret-rule" not in caller.body


async def test_the_log_tells_which_rule_refused(caplog: pytest.LogCaptureFixture) -> None:
    """With the caller and the path, and nothing in it that could forge a line."""
    with caplog.at_level("INFO", "meshlib.server"):
        await call(MeshASGI(App(), way(rule("all"), rule("no-admin", "/admin\u00e9", action="deny"))), http_scope("/admin%C3%A9"))
        await call(MeshASGI(App(), way()), http_scope("/a\nb"))
    assert "no-admin" in caplog.messages[0]
    assert "\n" not in caplog.messages[1]


async def test_a_full_house_says_when_to_come_again() -> None:
    """503 with Retry-After; the place is free again when the first call is over."""
    inbound = way(in_flight=1)
    gone = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await gone.wait()
        await App()(scope, receive, send)

    mesh = MeshASGI(slow, inbound)
    first = asyncio.create_task(call(mesh, http_scope()))
    await asyncio.sleep(0)
    second = await call(mesh, http_scope())
    assert (second.status, dict(second.sent[0]["headers"])[b"retry-after"]) == (503, b"1")
    gone.set()
    assert (await first).status == 200
    assert (await call(mesh, http_scope())).status == 200


async def test_expired_work_is_refused_before_the_handler_runs() -> None:
    """A caller whose time was spent on arrival reads no answer."""
    app = App()
    caller = await call(MeshASGI(app, way()), http_scope("/items/7", ("x-mesh-deadline-ms", "0")))
    assert (caller.status, app.scopes) == (504, [])


async def test_the_deadline_and_the_attempt_reach_the_handler() -> None:
    """The remaining time starts at arrival; in a caller's retry we don't retry."""
    clock, seen = Clock(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((outer_end(), outer_layer()))
        await App()(scope, receive, send)
        seen.append((outer_end(), outer_layer()))

    mesh = MeshASGI(app, way(clock=clock))
    await call(mesh, http_scope("/items/7", ("x-mesh-deadline-ms", "1500"), ("x-mesh-attempt", "2")))
    await call(mesh, http_scope("/items/7", ("x-mesh-attempt", "many")))
    await call(mesh, http_scope())
    # After the response there is neither any more: what runs on in the background has its own time, and its own tries.
    assert seen == [(1001.5, 2), (None, 0), (None, 1), (None, 0), (None, 0), (None, 0)]


async def test_the_context_of_the_caller_is_given_back() -> None:
    """A server may run the application in its own task."""
    outer = Visit(Peer("spiffe://shop.internal/outer", is_tls=True))
    current_visit.set(outer)
    with meshlib.deadline(60) as end:
        for boom in (False, True):
            app = _boom if boom else App()
            try:
                await call(
                    MeshASGI(app, way()), http_scope("/items/7", ("x-mesh-deadline-ms", "100"), peer=Peer(SHOP, is_tls=True))
                )
            except RuntimeError:
                assert boom
            assert (current_visit.get(), current_deadline.get()) == (outer, end)
    current_visit.set(None)


async def _boom(scope: Any, receive: Any, send: Any) -> None:
    raise RuntimeError("boom")


async def test_a_plain_call_never_sees_the_peer_of_the_task_that_runs_it() -> None:
    """Some servers run a request in a copy of another one's context."""
    app = App()
    context = contextvars.copy_context()
    context.run(current_visit.set, Visit(Peer(SHOP, is_tls=True)))
    await asyncio.create_task(call(MeshASGI(app, way(mode="permissive")), http_scope(peer=None)), context=context)
    assert app.peers == [Peer("")]


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("boom"), "500"), (asyncio.CancelledError(), "0"), (KeyboardInterrupt(), "500")],
    ids=["failed", "cancelled", "stopped"],
)
async def test_a_call_that_is_left_by_an_exception_gives_its_place_back(error: BaseException, code: str) -> None:
    """Exactly once, with the status that the server will answer; a cancelled call has none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    inbound = way(in_flight=1)
    for _ in range(3):
        with pytest.raises(type(error)):
            await call(MeshASGI(app, inbound), http_scope())
    assert (row(inbound)["codes"], in_flight(inbound)) == ({code: 3}, 0)


async def test_an_exception_after_the_response_counts_once() -> None:
    """The response was complete; what failed behind it is not the call's status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await App()(scope, receive, send)
        raise RuntimeError("in the background")

    inbound = way()
    with pytest.raises(RuntimeError):
        await call(MeshASGI(app, inbound), http_scope())
    assert (row(inbound)["codes"], row(inbound)["requests"]) == ({"200": 1}, 1)


async def test_a_call_is_over_with_its_last_byte_not_with_its_background_work() -> None:
    """The place is free while a background task runs on."""
    inbound, running = way(in_flight=1), asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await App()(scope, receive, send)
        await running.wait()

    task = asyncio.create_task(call(MeshASGI(app, inbound), http_scope()))
    await asyncio.sleep(0)
    assert in_flight(inbound) == 0
    running.set()
    await task


async def test_a_stream_holds_its_place_until_its_last_piece() -> None:
    """more_body is not the end; pieces are handed on one by one, unchanged."""
    inbound, seen = way(), []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for index in range(3):
            await send({"type": "http.response.body", "body": b"x" * index, "more_body": True})
            seen.append(in_flight(inbound))
        await send({"type": "http.response.body", "body": b""})
        seen.append(in_flight(inbound))

    caller = await call(MeshASGI(app, inbound), http_scope())
    assert (seen, [message.get("body") for message in caller.sent[1:]]) == ([1, 1, 1, 0], [b"", b"x", b"xx", b""])


async def test_a_body_is_received_as_the_server_gives_it() -> None:
    """`receive` is the server's own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert receive == caller.receive
        await App()(scope, receive, send)

    caller = Caller()
    await MeshASGI(app, way())(http_scope(method="POST"), caller.receive, caller.send)
    assert caller.status == 200


def websocket_scope(target: str = "/chat", **more: Any) -> dict[str, Any]:
    scope = http_scope(target, **more)
    del scope["method"]
    return {**scope, "type": "websocket", "scheme": "ws", "subprotocols": []}


CONNECT = {"type": "websocket.connect"}


async def test_a_websocket_takes_the_same_way() -> None:
    """It counts as a GET that was answered with 101, and gives its place back at its end."""
    inbound, app = way(rule("chat", "/chat", methods=["GET"])), App()
    caller = await call(MeshASGI(app, inbound), websocket_scope("/x/../chat"), CONNECT)
    assert [message["type"] for message in caller.sent] == ["websocket.accept", "websocket.close"]
    assert (app.scopes[0]["path"], row(inbound)["codes"], in_flight(inbound)) == ("/chat", {"101": 1}, 0)


async def test_a_refused_websocket_is_closed_before_it_is_accepted() -> None:
    """1008, of which the server makes 403; where the server can answer, with the status itself."""
    app = App()
    mesh = MeshASGI(app, way(rule("chat", "/chat", callers=exact(SHOP))))
    caller = await call(mesh, websocket_scope(peer=None), CONNECT)
    assert caller.sent == [{"type": "websocket.close", "code": 1008, "reason": "secure.no_identity"}]
    caller = await call(mesh, websocket_scope(peer=None, extensions={"websocket.http.response": {}}), CONNECT)
    assert (caller.status, caller.problem["reason"], app.scopes) == (401, "secure.no_identity", [])


async def test_a_conversation_has_no_deadline() -> None:
    """The deadline was for its beginning."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(meshlib.remaining())
        await send({"type": "websocket.accept"})
        seen.append(meshlib.remaining())
        await send({"type": "websocket.close"})

    scope = websocket_scope()
    scope["headers"].append((b"x-mesh-deadline-ms", b"5000"))
    await call(MeshASGI(app, way()), scope, CONNECT)
    assert 4 < seen[0] <= 5
    assert seen[1] is None


async def test_a_websocket_that_its_application_refuses_counts_as_403() -> None:
    """Closed before it was accepted."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.close"})

    inbound = way()
    await call(MeshASGI(app, inbound), websocket_scope(), CONNECT)
    assert row(inbound)["codes"] == {"403": 1}


async def test_lifespan_passes_untouched() -> None:
    """It is no call: a policy that denies everything does not stop the start."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive()))
        scope["state"]["pool"] = "open"
        await send({"type": "lifespan.startup.complete"})

    scope: dict[str, Any] = {"type": "lifespan", "asgi": {}, "state": {}}
    caller = await call(MeshASGI(app, way(rule("none", "/nowhere"))), scope, {"type": "lifespan.startup"})
    assert (seen[0][0] is scope, seen[0][1], caller.sent) == (
        True,
        {"type": "lifespan.startup"},
        [{"type": "lifespan.startup.complete"}],
    )
    assert scope["state"] == {"pool": "open"}


async def test_a_mesh_that_cannot_start_stops_the_server() -> None:
    """As a failed startup, not as an application that knows no lifespan."""

    def wake() -> None:
        raise meshlib.errors.IdentityError("no certificate.", hint="Issue one.")

    inbound = way()
    inbound.wake = wake
    caller = await call(MeshASGI(App(), inbound), {"type": "lifespan"}, {"type": "lifespan.startup"})
    assert caller.sent == [{"type": "lifespan.startup.failed", "message": "no certificate. Issue one."}]


async def test_an_unknown_kind_of_scope_is_refused() -> None:
    """What is not understood can't be judged."""
    app = App()
    with pytest.raises(meshlib.errors.Refused, match="'webtransport'"):
        await call(MeshASGI(app, way()), {"type": "webtransport", "path": "/"})
    assert app.scopes == []


async def test_an_application_that_is_wrapped_twice_is_judged_once() -> None:
    """By `mesh.asgi` and by a framework's integration."""
    inbound, app = way(in_flight=1), App()
    caller = await call(MeshASGI(MeshASGI(app, inbound), inbound), http_scope())
    assert (caller.status, row(inbound)["requests"]) == (200, 1)


async def test_a_path_that_was_rewritten_in_between_is_judged_again() -> None:
    """A rewrite must not lead around a rule."""
    inbound, app = way(rule("all"), rule("no", "/admin", action="deny")), App()
    inner = MeshASGI(app, inbound)

    async def rewrite(scope: Any, receive: Any, send: Any) -> None:
        await inner({**scope, "path": "/admin", "raw_path": b"/admin"}, receive, send)

    caller = await call(MeshASGI(rewrite, inbound), http_scope("/items/7"))
    assert (caller.status, app.scopes) == (403, [])


async def test_another_gate_inside_judges_too() -> None:
    """Two meshes in one process: neither answers for the other."""
    app = App()
    inner = MeshASGI(app, way(rule("shop", callers=exact(SHOP))))
    assert (await call(MeshASGI(inner, way()), http_scope())).status == 403


class Span:
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __enter__(self) -> Span:
        self.seen.append("begin")
        return self

    def end(self, status: int, error: BaseException | None = None) -> None:
        self.seen.append((status, type(error).__name__))


class Spans:
    """An observer that remembers."""

    def __init__(self, is_on: bool = True) -> None:
        self.seen: list[Any] = []
        self.is_on = is_on

    def server_span(self, method: str, route: str, headers: Any, peer: str, *, path: str) -> Span | None:
        self.seen.append((method, route, peer, path))
        return Span(self.seen) if self.is_on else None


async def test_a_call_is_observed_with_its_end() -> None:
    """The span has the route's name, the proved peer and the canonical path; refusals are observed too."""
    observer = Spans()
    inbound = way(rule("items", "/items/*", callers=exact(SHOP)), observer=observer)
    peer = Peer(SHOP, is_tls=True)
    await call(MeshASGI(App(), inbound), http_scope("//items/7", peer=peer))
    with pytest.raises(RuntimeError):
        await call(MeshASGI(_boom, inbound), http_scope(peer=peer))
    await call(MeshASGI(App(), inbound), http_scope("/nowhere", peer=peer))
    await call(MeshASGI(App(), way(observer=Spans(is_on=False))), http_scope())
    assert observer.seen == [
        ("GET", "items", SHOP, "/items/7"), "begin", (200, "NoneType"),
        ("GET", "items", SHOP, "/items/7"), "begin", (500, "RuntimeError"),
        ("GET", "", SHOP, "/nowhere"), "begin", (403, "NoneType"),
    ]  # fmt: skip


async def test_a_call_that_cannot_be_traced_goes_on() -> None:
    """A failure to observe is never a failure of the call, and costs it no place."""

    class Broken:
        def server_span(self, *args: Any, **more: Any) -> None:
            raise RuntimeError("no exporter")

    inbound = way(observer=Broken(), in_flight=1)
    for _ in range(2):
        assert (await call(MeshASGI(App(), inbound), http_scope())).status == 200


async def test_a_handler_can_ask_how_its_call_was_let_in() -> None:
    """The decision's record, for logs."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(meshlib.current_call())
        await App()(scope, receive, send)

    await call(MeshASGI(app, way(rule("everything"))), http_scope("//items/7"))
    assert seen[0] is not None
    assert (seen[0]["rule"], seen[0]["path"], meshlib.current_call()) == ("everything", "/items/7", None)


async def test_the_mesh_rises_with_the_first_call_of_a_process() -> None:
    """Once; a metrics address that is taken does not refuse the call."""
    risen = []

    def wake() -> None:
        risen.append(1)
        raise meshlib.errors.ListenError("9464 is taken.")

    inbound = way()
    inbound.wake = wake
    inbound.sleep()
    for _ in range(2):
        assert (await call(MeshASGI(App(), inbound), http_scope())).status == 200
    assert risen == [1]


async def test_a_call_that_is_cancelled_while_an_authorizer_is_asked_holds_nothing() -> None:
    """Its place is free, and its span has ended, before anybody else runs."""
    ended: list[tuple[int, BaseException | None]] = []
    asked = asyncio.Event()

    class Span:
        def __enter__(self) -> Span:
            return self

        def end(self, status: int, error: BaseException | None) -> None:
            ended.append((status, error))

    class Observer:
        def server_span(self, *given: Any, **more: Any) -> Span:
            return Span()

    class Trust:
        keys = None

        @property
        def authorizers(self) -> Trust:
            return self

        async def ask(self, name: str, inquiry: Any) -> bool:
            asked.set()
            await asyncio.Event().wait()
            return True

    custom = rule("ask", action="custom") | {"authorizer": "slow"}
    inbound = way(rule("all"), custom, observer=Observer())
    inbound.trust = Trust()  # type: ignore[assignment]
    running = asyncio.create_task(call(MeshASGI(App(), inbound), http_scope()))
    await asyncio.wait_for(asked.wait(), 5)
    assert in_flight(inbound) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert in_flight(inbound) == 0
    assert [(status, type(error)) for status, error in ended] == [(0, asyncio.CancelledError)]
