"""Does a call of a WSGI server take the inbound way, the whole of it, and back? No sockets: the tests are the server."""

from __future__ import annotations

import contextvars
import io
import json
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

import pytest

import meshlib
from meshlib.call import Peer, Visit, current_visit, outer_layer
from meshlib.server.door import ARRIVED, PEER
from meshlib.server.wsgi import MeshWSGI
from tests.server.inside import SHOP, SOMEBODY, Clock, exact, in_flight, row, rule, way


def environ(
    path: str = "/items/7", *, method: str = "GET", peer: Peer | None = SOMEBODY, raw: str | None = None, **more: Any
) -> dict[str, Any]:
    """`path` is decoded, as a server hands it over; `raw` is the target on the wire."""
    found: dict[str, Any] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "HTTP_HOST": "orders",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.file_wrapper": FileWrapper,
    }
    if raw is not None:
        found["RAW_URI"] = raw
    if peer is not None:
        found[PEER] = peer
    return {**found, **more}


class Caller:
    """The server's half of a WSGI call. It runs each in a context of its own, as a thread has one."""

    def __init__(self) -> None:
        self.status = ""
        self.headers: dict[str, str] = {}
        self.pieces: list[bytes] = []

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.status = status
        self.headers = dict(headers)
        return self.pieces.append

    def __call__(self, app: Any, env: dict[str, Any]) -> Caller:
        contextvars.copy_context().run(self._run, app, env)
        return self

    def _run(self, app: Any, env: dict[str, Any]) -> None:
        body = app(env, self.start_response)
        try:
            self.pieces += body
        finally:
            if hasattr(body, "close"):
                body.close()

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


class App:
    """An application that remembers what it saw."""

    def __init__(self, body: Any = (b"done",)) -> None:
        self.environs: list[dict[str, Any]] = []
        self.peers: list[Any] = []
        self.body = body

    def __call__(self, env: dict[str, Any], start_response: Any) -> Any:
        self.environs.append(env)
        self.peers.append(meshlib.peer())
        start_response("200 OK", [("Content-Type", "text/plain")])
        return self.body


def call(mesh: MeshWSGI, env: dict[str, Any]) -> Caller:
    return Caller()(mesh, env)


def test_an_allowed_call_reaches_the_handler_and_is_counted() -> None:
    """Status and end come from what the application does."""
    inbound = way()
    caller = call(MeshWSGI(App([b"a", b"b"]), inbound), environ())
    assert (caller.status, caller.body) == ("200 OK", b"ab")
    found = row(inbound)
    assert (found["route"], found["method"], found["codes"], found["in_flight"]) == ("items", "GET", {"200": 1}, 0)


@pytest.mark.parametrize(
    ("raw", "decoded", "seen"),
    [
        ("/x/../items/7?q=1", "/x/../items/7", "/items/7"),
        ("//items/7", "//items/7", "/items/7"),
        ("/items%2F7", "/items/7", "/items/7"),
        ("/items/caf%C3%A9", "/items/caf\u00c3\u00a9", "/items/caf\u00c3\u00a9"),
    ],
)
def test_the_handler_sees_the_path_that_was_judged(raw: str, decoded: str, seen: str) -> None:
    """In PATH_INFO (bytes as latin-1, as WSGI has it) and in the server's own key; the query stays."""
    app = App()
    assert call(MeshWSGI(app, way(rule("items", "/items/*"))), environ(decoded, raw=raw, QUERY_STRING="q=1")).status == "200 OK"
    (env,) = app.environs
    assert env["PATH_INFO"] == seen
    canonical = meshlib._native.core.canonical_path(env["RAW_URI"].encode())
    assert (canonical[0].encode().decode("latin-1"), env["QUERY_STRING"]) == (seen, "q=1")


@pytest.mark.parametrize("raw", ["/admin", "//admin", "/x/../admin", "/%61dmin", "/admin%2fx", "/admin/"])
@pytest.mark.parametrize("key", ["RAW_URI", "REQUEST_URI"])
def test_another_spelling_of_a_denied_path_is_denied(raw: str, key: str) -> None:
    """Judged is what was on the wire, not what the server made of it."""
    app = App()
    mesh = MeshWSGI(app, way(rule("all"), rule("no", "/admin", "/admin/*", action="deny")))
    assert (call(mesh, environ("/public", **{key: raw})).status, app.environs) == ("403 Forbidden", [])


def test_a_server_that_tells_no_target_is_judged_by_the_decoded_path() -> None:
    """The strictest reading: a percent sign in it stands for itself."""
    for path, status in (
        ("/items/7", "200 OK"),
        ("/admin\n", "400 Bad Request"),
        ("/items/%2e", "400 Bad Request"),
        ("//x/../admin", "403 Forbidden"),
    ):
        mesh = MeshWSGI(App(), way(rule("all"), rule("no", "/admin", action="deny")))
        assert call(mesh, environ(path)).status == status, path


def test_an_application_under_a_prefix_sees_its_part_of_the_path() -> None:
    """SCRIPT_NAME stays; the whole path is judged; a path that climbs out of it is not for this application."""
    app = App()
    mesh = MeshWSGI(app, way(rule("all"), rule("no", "/shop/admin", action="deny")))
    assert call(mesh, environ("//items/../7", raw="/shop//items/../7", SCRIPT_NAME="/shop")).status == "200 OK"
    assert (app.environs[0]["SCRIPT_NAME"], app.environs[0]["PATH_INFO"]) == ("/shop", "/7")
    assert call(mesh, environ("/./admin", raw="/shop/./admin", SCRIPT_NAME="/shop")).status == "403 Forbidden"
    for raw in ("/shop/../other", "/shopping"):
        assert call(mesh, environ("/x", raw=raw, SCRIPT_NAME="/shop")).status == "400 Bad Request"
    assert (len(app.environs), in_flight(mesh.way)) == (1, 0)


def test_a_header_cannot_move_the_application() -> None:
    """Some servers take SCRIPT_NAME from a header: then what is judged would not be what is routed."""
    app = App()
    mesh = MeshWSGI(app, way(rule("public", "/public/*")))
    env = environ("/admin", raw="/public/admin", SCRIPT_NAME="/public", HTTP_SCRIPT_NAME="/public")
    assert call(mesh, env).status == "200 OK"
    assert (app.environs[0]["SCRIPT_NAME"], app.environs[0]["PATH_INFO"]) == ("", "/public/admin")
    assert "HTTP_SCRIPT_NAME" not in app.environs[0]


@pytest.mark.parametrize(
    "key",
    ["HTTP_X_FORWARDED_CLIENT_CERT", "HTTP_CLIENT_CERT", "HTTP_X_MESH_PEER", "HTTP_X_ENVOY_MAX_RETRIES", "HTTP_X_REWRITE_URL"],
)
def test_identity_headers_from_outside_never_get_in(key: str) -> None:
    """In WSGI a name with an underscore and its twin with a dash are one key."""
    app = App()
    env = environ(HTTP_X_OK="1", **{key: "spiffe://shop.internal/admin"})
    call(MeshWSGI(app, way()), env)
    assert key not in app.environs[0]
    assert app.environs[0]["HTTP_X_OK"] == "1"
    assert key in env  # the server's own is not ours to change


def test_headers_are_frozen_when_authorised() -> None:
    """What is added to the server's environ later is not in the one that the handler has."""
    env = environ()

    def app(inner: dict[str, Any], start_response: Any) -> Any:
        env["HTTP_X_FORWARDED_CLIENT_CERT"] = "URI=spiffe://shop.internal/admin"
        start_response("200 OK", [])
        return [str("HTTP_X_FORWARDED_CLIENT_CERT" in inner).encode()]

    assert call(MeshWSGI(app, way()), env).body == b"False"


def test_the_peer_is_the_one_of_the_connection() -> None:
    """From the environ, as our worker put it there; a text is no peer."""
    peer = Peer(SHOP, is_tls=True)
    app = App()
    mesh = MeshWSGI(app, way(rule("shop", callers=exact(SHOP))))
    assert call(mesh, environ(peer=peer)).status == "200 OK"
    assert app.peers == [peer]
    assert call(mesh, environ(peer=None)).status == "401 Unauthorized"
    assert call(mesh, environ(**{PEER: SHOP, "wsgi.url_scheme": "https"})).status == "401 Unauthorized"
    assert call(mesh, environ(peer=None, HTTP_MESHLIB_PEER=SHOP, SSL_CLIENT_S_DN=SHOP)).status == "401 Unauthorized"
    assert len(app.peers) == 1


def test_a_refusal_is_a_problem_detail() -> None:
    """RFC 9457; a HEAD gets its head."""
    mesh = MeshWSGI(App(), way(rule("none", "/nowhere")))
    caller = call(mesh, environ(peer=None))
    assert caller.headers["content-type"] == "application/problem+json"
    assert json.loads(caller.body) == {
        "type": "urn:meshlib:problem:secure.no_identity", "title": "An identity is required", "status": 401, "reason": "secure.no_identity",
    }  # fmt: skip
    head = call(mesh, environ(method="HEAD", peer=None))
    assert (head.status, head.body, head.headers["content-length"]) == ("401 Unauthorized", b"", str(len(caller.body)))


def test_the_deadline_and_the_attempt_reach_the_handler() -> None:
    """Also while the body is being made; afterwards the thread has its own context back."""
    clock, seen = Clock(), []

    def app(env: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [])

        def body() -> Any:
            seen.append((meshlib.remaining(clock()), outer_layer()))
            yield b"x"

        return body()

    def thread() -> None:
        outer = Visit(Peer("spiffe://shop.internal/outer"))
        current_visit.set(outer)
        Caller()._run(MeshWSGI(app, way(clock=clock)), environ(HTTP_X_MESH_DEADLINE_MS="250", HTTP_X_MESH_ATTEMPT="1"))
        assert (current_visit.get(), outer_layer()) == (outer, 0)

    contextvars.copy_context().run(thread)
    assert seen == [(0.25, 1)]


def test_time_in_line_for_a_thread_is_the_calls_own() -> None:
    """Its deadline counts from when it came, and so does its time; whoever came too late for it is refused before the handler."""
    clock, app = Clock(), App()
    clock.now = 100.0
    mesh = MeshWSGI(app, way(clock=clock))
    left: list[float | None] = []

    def timed(env: dict[str, Any], start_response: Any) -> Any:
        left.append(meshlib.remaining(clock()))
        return app(env, start_response)

    in_time = call(MeshWSGI(timed, mesh.way), {**environ(HTTP_X_MESH_DEADLINE_MS="3000"), ARRIVED: 98.0})
    assert row(mesh.way)["latency_sum"] == 2.0
    late = call(mesh, {**environ(HTTP_X_MESH_DEADLINE_MS="1500"), ARRIVED: 98.0})
    assert (in_time.status, late.status) == ("200 OK", "504 Gateway Timeout")
    assert left == [pytest.approx(1.0)]
    assert len(app.environs) == 1


def test_when_it_came_is_only_believed_of_our_own_worker() -> None:
    """And never a time that is still to come."""
    clock, app = Clock(), App()
    clock.now = 100.0
    mesh = MeshWSGI(app, way(clock=clock, mode="observe"))
    foreign = {**environ(peer=None, HTTP_X_MESH_DEADLINE_MS="1500"), ARRIVED: 98.0}
    ahead = {**environ(HTTP_X_MESH_DEADLINE_MS="0"), ARRIVED: 500.0}
    assert [call(mesh, env).status for env in (foreign, ahead)] == ["200 OK", "504 Gateway Timeout"]


def test_a_body_that_is_made_holds_its_place_until_the_server_closes_it() -> None:
    """And the application's own close runs, once."""
    inbound, closed = way(), []

    class Pieces:
        def __iter__(self) -> Any:
            yield b"a"
            assert in_flight(inbound) == 1
            yield b"b"

        def close(self) -> None:
            closed.append(in_flight(inbound))

    assert call(MeshWSGI(App(Pieces()), inbound), environ()).body == b"ab"
    assert (closed, in_flight(inbound), row(inbound)["codes"]) == ([1], 0, {"200": 1})


def test_a_body_that_nobody_closes_is_over_when_nobody_has_it_any_more() -> None:
    """A server has to close it; test clients forget to, and must not fill the house."""
    inbound = way(in_flight=1)
    for _ in range(3):
        body = MeshWSGI(App(iter((b"x",))), inbound)(environ(), Caller().start_response)
        assert (list(body), in_flight(inbound)) == ([b"x"], 1)
        del body
        assert in_flight(inbound) == 0


def test_a_body_that_nobody_closes_takes_nothing_from_the_call_that_runs_by_then() -> None:
    """The collector comes when it likes: the running call keeps its peer, and nothing of either is left behind."""
    forgotten: list[Any] = []
    shop = Peer(SHOP, is_tls=True)
    peers: list[Peer | None] = []

    def handler(env: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        forgotten.clear()
        peers.append(meshlib.peer())
        return [b"done"]

    def thread() -> None:
        app = MeshWSGI(App(iter([b"a"])), way())
        forgotten.append(app(environ(), Caller().start_response))
        MeshWSGI(handler, way())(environ(peer=shop), Caller().start_response)
        peers.append(meshlib.peer())

    contextvars.copy_context().run(thread)
    assert peers == [shop, None]


def test_a_body_that_fails_gives_its_place_back() -> None:
    """The server closes it, as it must; a close that fails is no reason to keep the place."""
    inbound = way(in_flight=1)

    def broken() -> Any:
        yield b"a"
        raise RuntimeError("boom")

    class Unclosable(list[bytes]):
        def __iter__(self) -> Any:
            return iter((b"x",))

        def close(self) -> None:
            raise RuntimeError("boom")

    class Wrapped:
        def __iter__(self) -> Any:
            return iter(())

        close = Unclosable.close

    for body in (broken(), Wrapped()):
        with pytest.raises(RuntimeError):
            call(MeshWSGI(App(body), inbound), environ())
        assert in_flight(inbound) == 0


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("boom"), "500"), (SystemExit(1), "500")], ids=["failed", "stopped"])
def test_a_call_that_is_left_by_an_exception_gives_its_place_back(error: BaseException, code: str) -> None:
    """Exactly once, with the status that the server will answer."""

    def app(env: dict[str, Any], start_response: Any) -> Any:
        raise error

    inbound = way(in_flight=1)
    for _ in range(3):
        with pytest.raises(type(error)):
            call(MeshWSGI(app, inbound), environ())
    assert (row(inbound)["codes"], in_flight(inbound)) == ({code: 3}, 0)


def test_a_file_stays_a_file() -> None:
    """Servers know their file wrapper and send the file themselves; its close ends the call."""
    inbound = way()
    wrapped = FileWrapper(io.BytesIO(b"content"))
    mesh = MeshWSGI(App(wrapped), inbound)
    body = mesh(environ(), Caller().start_response)
    assert (body is wrapped, in_flight(inbound)) == (True, 1)
    body.close()  # type: ignore[attr-defined]
    assert (in_flight(inbound), wrapped.filelike.closed) == (0, True)


def test_the_write_callable_and_exc_info_are_the_servers() -> None:
    """start_response is handed on with all that it has."""
    given = []

    def start_response(*args: Any) -> Any:
        given.append(args)
        return len

    def app(env: dict[str, Any], start: Any) -> Any:
        write = start("200 OK", [("a", "b")])
        error = (RuntimeError, RuntimeError("x"), None)
        start("500 Internal Server Error", [], error)
        assert write is len
        return []

    inbound = way()
    MeshWSGI(app, inbound)(environ(), start_response)
    assert [len(args) for args in given] == [2, 3]
    assert row(inbound)["codes"] == {"500": 1}


def test_an_application_that_is_wrapped_twice_is_judged_once() -> None:
    """By `mesh.wsgi` and by a framework's integration."""
    inbound = way(in_flight=1)
    assert call(MeshWSGI(MeshWSGI(App(), inbound), inbound), environ()).status == "200 OK"
    assert row(inbound)["requests"] == 1


def test_a_path_that_was_rewritten_in_between_is_judged_again() -> None:
    """A rewrite must not lead around a rule."""
    inbound, app = way(rule("all"), rule("no", "/admin", action="deny")), App()
    inner = MeshWSGI(app, inbound)

    def rewrite(env: dict[str, Any], start_response: Any) -> Any:
        return inner({**env, "PATH_INFO": "/admin", "RAW_URI": "/admin"}, start_response)

    assert (call(MeshWSGI(rewrite, inbound), environ()).status, app.environs) == ("403 Forbidden", [])


def test_the_middleware_is_sound_wsgi() -> None:
    """Between two validators, one as its server and one as its application."""

    def app(env: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        yield b"ok"

    assert call(validator(MeshWSGI(validator(app), way())), environ()).body == b"ok"  # type: ignore[arg-type]
