"""Does a FastAPI application live in the mesh as it did without, and know its callers? Behind real servers, and in its own tests."""

from __future__ import annotations

import logging
import re
import signal
import socket
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from fastapi import APIRouter, FastAPI, WebSocket
from meshlib_fastapi import OptionalPeer, Peer, install, optional_peer
from websockets.sync.client import connect

import meshlib
from meshlib.testing import as_peer
from tests.support import PYTHON, free_port, identities, mesh_of, process, wait_until_listening, write_config
from tests.traced import check_one_span, stories

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer ones would rather have a successor of httpx
    from fastapi.testclient import TestClient

EXAMPLE = Path(__file__).parent.parent / "example.py"
MESHLIB = str(Path(PYTHON).parent / "meshlib")
ID = "spiffe://shop.internal/ns/default/sa/"
# What runs behind the real servers.
APP = """
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import APIRouter, FastAPI, WebSocket
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import meshlib
from meshlib_fastapi import OptionalPeer, Peer, install

exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))


@asynccontextmanager
async def lifespan(app):
    story = Path("story.txt")
    story.write_text("up")
    yield {"color": "blue"}
    story.write_text(story.read_text() + " down")


app = FastAPI(lifespan=lifespan)
mesh = meshlib.Mesh.load()
install(app, mesh)
http = mesh.client()
router = APIRouter(prefix="/items")


@router.get("/{item}")
async def show(item: int, peer: Peer):
    return {"item": item, "peer": peer.spiffe_id, "tls": peer.is_tls}


app.include_router(router, prefix="/v1")
inner = FastAPI()
app.mount("/inner", inner)


@inner.get("/{item}")
def deep(item: int, peer: OptionalPeer):
    return peer and peer.spiffe_id


@app.get("/who")
async def who(peer: OptionalPeer):
    return peer and peer.spiffe_id


@app.get("/gone/{item}")
async def gone(item: int):
    return (await http.get(f"http://gone/{item}")).json()


@app.get("/spans")
async def spans():
    return [[span.kind.name, span.name, span.attributes.get("http.route")] for span in exporter.get_finished_spans()]


@app.get("/metrics")
async def metrics():
    return mesh.metrics()


@app.websocket("/talk/{room}")
async def talk(socket: WebSocket, room: str, peer: Peer):
    await socket.accept()
    await socket.send_text(f"{room} {peer.service}")
    await socket.close()
"""


@contextmanager
def serving(folder: Path, mode: str, *command: str, source: str = APP, secure: Any = None) -> Iterator[tuple[int, Any, Path]]:
    """The application as the service `shop` behind a real server: its port, its process, and the configuration."""
    (folder / "app.py").write_text(source)
    identities(folder, "shop", "web", "stranger")
    port = free_port()
    services = {
        "shop": {
            "listen": f"127.0.0.1:{port}",
            "discover": {"static": [f"127.0.0.1:{port}"]},
            "secure": secure or {"allow": [{"name": "web only", "from": ["web"]}]},
        },
        "web": {},
        "stranger": {},
        "gone": {"discover": {"static": [f"127.0.0.1:{free_port()}"]}},
    }
    file = write_config(folder, services, mode=mode)
    env = {"MESHLIB_CONFIG": str(file), "MESHLIB_SERVICE": "shop", "PORT": str(port)}
    with process(*(command or (MESHLIB, "serve", "app:app")), env=env, cwd=folder) as child:
        wait_until_listening(port, child)
        yield port, child, file


@contextmanager
def caller(file: Path, service: str = "web") -> Iterator[httpx.Client]:
    mesh = meshlib.Mesh.load(file, service=service)
    try:
        with mesh.sync_client() as http:
            yield http
    finally:
        mesh.close()


# ------------------------------------------------------------------------------------------- behind real servers


def test_in_mode_enforce_a_handler_knows_who_proved_what(tmp_path: Path) -> None:
    """The dependency has the SPIFFE ID of the connection, in coroutines and threads; who isn't allowed never gets there."""
    with serving(tmp_path, "enforce") as (port, _child, file):
        with caller(file) as http:
            shown = http.get("http://shop/v1/items/7")
            assert (shown.status_code, shown.json()) == (200, {"item": 7, "peer": ID + "web", "tls": True})
            assert [http.get("http://shop/who").json(), http.get("http://shop/inner/3").json()] == [ID + "web"] * 2
            # A header proves nothing.
            forged = http.get("http://shop/who", headers={"x-forwarded-client-cert": f"URI={ID}stranger"})
            assert forged.json() == ID + "web"
        with caller(file, "stranger") as http:
            refused = http.get("http://shop/who")
            assert (refused.status_code, refused.json()["reason"]) == (403, "secure.denied")
        assert httpx.get(f"http://127.0.0.1:{port}/who").status_code == 400  # plain text


def test_in_mode_observe_a_plain_caller_is_nobody(tmp_path: Path) -> None:
    """Handlers that ask for a peer answer 401 with problem details, the others as before; so do websockets."""
    with serving(tmp_path, "observe") as (port, _child, _file):
        at = f"127.0.0.1:{port}"
        assert httpx.get(f"http://{at}/who").json() is None
        refused = httpx.get(f"http://{at}/v1/items/7", headers={"x-spiffe-id": ID + "web"})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "mTLS")
        assert refused.headers["content-type"] == "application/problem+json"
        assert (refused.json()["status"], refused.json()["reason"]) == (401, "secure.no_identity")
        with pytest.raises(websockets.InvalidStatus) as denied, connect(f"ws://{at}/talk/room"):
            pass
        assert denied.value.response.status_code == 401


def test_each_call_is_counted_and_traced_once_under_its_template(tmp_path: Path) -> None:
    """`meshlib serve` puts the mesh around an application that has it already, and FastAPI traces too: one call stays one call."""
    with serving(tmp_path, "enforce") as (_port, _child, file), caller(file) as http:
        for path in ("/v1/items/7", "/v1/items/8", "/inner/3", "/nowhere/9"):
            http.get(f"http://shop{path}")
        counted = [line for line in http.get("http://shop/metrics").json().splitlines() if "secure_requests_total{" in line]
        # The call that asks isn't over yet.
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 4
        spans = [span for span in http.get("http://shop/spans").json() if span[0] == "SERVER"]
    assert spans == [
        ["SERVER", "GET /v1/items/{item}", "/v1/items/{item}"],
        ["SERVER", "GET /v1/items/{item}", "/v1/items/{item}"],
        ["SERVER", "GET /inner/{item}", "/inner/{item}"],
        ["SERVER", "GET", None],
        ["SERVER", "GET /metrics", "/metrics"],
    ]


def test_an_outgoing_call_that_failed_is_a_bad_gateway(tmp_path: Path) -> None:
    """Nobody listens there: our caller gets problem details that tell nothing of it, and the log tells all."""
    with serving(tmp_path, "enforce") as (_port, child, file):
        with caller(file) as http:
            answer = http.get("http://shop/gone/7", extensions=meshlib.policy(idempotent=False))
        assert (answer.status_code, answer.headers["content-type"]) == (502, "application/problem+json")
        assert answer.json() == {
            "type": "urn:meshlib:problem:upstream.failed",
            "title": "A service behind this one failed",
            "status": 502,
            "reason": "upstream.failed",
        }
        child.send_signal(signal.SIGTERM)
        told = child.communicate(timeout=30)[0]
    assert re.search(r"meshlib_fastapi: 502 for /gone/{item}: ConnectFailed: .*127\.0\.0\.1", told)


def test_the_applications_own_lifespan_stays(tmp_path: Path) -> None:
    """It begins and ends as before, around it the mesh, and the process ends well."""
    with serving(tmp_path, "enforce") as (_port, child, file):
        with caller(file) as http:
            assert http.get("http://shop/who").status_code == 200
        assert (tmp_path / "story.txt").read_text() == "up"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 0
    assert (tmp_path / "story.txt").read_text() == "up down"


def test_a_bare_uvicorn_serves_it_in_mode_observe(tmp_path: Path) -> None:
    """Whoever doesn't want another server yet keeps the one they have."""
    source = APP + "\n\nif __name__ == '__main__':\n    import os, uvicorn\n    uvicorn.run(app, port=int(os.environ['PORT']))\n"
    with serving(tmp_path, "observe", PYTHON, "app.py", source=source) as (port, child, _file):
        assert httpx.get(f"http://127.0.0.1:{port}/inner//3").json() is None
        assert httpx.get(f"http://127.0.0.1:{port}/inner/%00").json()["reason"] == "secure.path"
        child.send_signal(signal.SIGINT)
        child.wait(30)
    assert (tmp_path / "story.txt").read_text() == "up down"


def test_the_example_runs(tmp_path: Path) -> None:
    """Both services of it, and then only one: the customer is told that something behind it failed."""
    ports = {"8200": str(free_port()), "8201": str(free_port())}
    text = EXAMPLE.with_name("mesh.yaml").read_text()
    for old, new in ports.items():
        text = text.replace(old, new)
    (tmp_path / "mesh.yaml").write_text(text)
    identities(tmp_path, "storefront", "orders")
    env = {"MESHLIB_CONFIG": str(tmp_path / "mesh.yaml")}

    def serve(service: str) -> Any:
        return process(MESHLIB, "serve", f"example:{service}()", "--service", service, env=env, cwd=EXAMPLE.parent)

    with serve("storefront") as storefront:
        wait_until_listening(int(ports["8200"]), storefront)
        with serve("orders") as orders:
            wait_until_listening(int(ports["8201"]), orders)
            bought = httpx.get(f"http://127.0.0.1:{ports['8200']}/buy/7")
            assert (bought.status_code, bought.json()) == (
                200,
                {"customer": "somebody", "order": {"item": 7, "price": 12, "for": "storefront"}},
            )
        failed = httpx.get(f"http://127.0.0.1:{ports['8200']}/buy/7")
        assert failed.status_code in (502, 503)
        assert failed.json()["reason"].startswith("upstream.")


# ------------------------------------------------------------------------------------- in the application's tests


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[meshlib.Mesh]:
    """Mode observe. `silent` takes connections and says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with mesh_of(tmp_path, {"silent": {"discover": {"static": [address]}}}, observe={"metrics": "127.0.0.1:0"}) as made:
            yield made


@pytest.fixture
def app(mesh: meshlib.Mesh) -> FastAPI:
    app = FastAPI()
    install(app, mesh)

    @app.get("/items/{item}")
    async def show(item: str, peer: Peer) -> dict[str, str]:
        return {"item": item, "peer": peer.service}

    @app.get("/open/{item}")
    async def public(item: str, peer: OptionalPeer) -> dict[str, Any]:
        return {"item": item, "peer": peer and peer.service}

    return app


def test_a_test_may_say_who_calls(app: FastAPI) -> None:
    """For all that knows a caller, or for the dependency only; by default FastAPI's client has proved nothing."""
    client = TestClient(app)
    assert [client.get("/items/7").status_code, client.get("/open/7").json()["peer"]] == [401, None]
    with as_peer(ID + "web"):
        assert client.get("/items/7").json() == {"item": "7", "peer": "web"}
        assert client.get("/open/7").json() == {"item": "7", "peer": "web"}
    app.dependency_overrides[optional_peer] = lambda: meshlib.Peer(ID + "batch", is_tls=True)
    assert client.get("/items/7").json() == {"item": "7", "peer": "batch"}


def test_in_mode_enforce_a_test_is_judged_as_the_peer_that_it_says(tmp_path: Path) -> None:
    """With the application's own lifespan, as by its real server: allowed, refused by the rules, and nobody."""
    identities(tmp_path, "me")
    rules = {"secure": {"allow": [{"name": "web only", "from": ["web"], "paths": ["/items/{item}"]}]}}
    with mesh_of(tmp_path, {"me": rules, "web": {}}, mode="enforce") as mesh:
        app = FastAPI()
        install(app, mesh)

        @app.get("/items/{item}")
        def show(item: int, peer: Peer) -> str:
            return peer.service

        with TestClient(app) as client:
            web, batch = as_peer(ID + "web"), as_peer(ID + "batch")
            assert web(client.get)("/items/7").json() == "web"
            assert [web(client.get)("/other").status_code, batch(client.get)("/items/7").status_code] == [403, 403]
            assert client.get("/items/7").status_code == 401


def test_an_application_may_be_begun_and_ended_as_often_as_tests_do(app: FastAPI) -> None:
    """A suite has one application and a client for each test: the last is served as the first, and told nothing of an end."""
    for _ in range(3):
        with TestClient(app) as client, as_peer(ID + "web"):
            answer = client.get("/items/7")
            assert (answer.status_code, "connection" in answer.headers) == (200, False)


def test_middleware_that_is_added_later_stands_behind_the_mesh(app: FastAPI) -> None:
    """It runs only for what is let in, and sees the canonical path."""
    seen = []

    @app.middleware("http")
    async def watch(request: Any, call_next: Any) -> Any:
        seen.append(request.url.path)
        return await call_next(request)

    client = TestClient(app)
    assert client.get("/open/%00").status_code == 400
    assert client.get("/open//7").json()["item"] == "7"
    assert seen == ["/open/7"]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (meshlib.DeadlineExceeded("secret"), 504, "upstream.timeout"),
        (meshlib.AttemptTimeout("secret"), 504, "upstream.timeout"),
        (meshlib.NoEndpoint("secret"), 503, "upstream.unavailable"),
        (meshlib.CircuitOpen("secret"), 503, "upstream.unavailable"),
        (meshlib.LimitExceeded("secret"), 503, "upstream.unavailable"),
        (meshlib.RateLimited("secret"), 503, "upstream.unavailable"),
        (meshlib.KeyFileError("secret"), 503, "upstream.unavailable"),
        (meshlib.Denied("secret", rule="secret"), 502, "upstream.failed"),
        (meshlib.UnknownService("secret"), 502, "upstream.failed"),
        (meshlib.NoRoute("secret"), 502, "upstream.failed"),
        (meshlib.ConnectionLost("secret"), 502, "upstream.failed"),
        (meshlib.PeerIdentityError("secret"), 502, "upstream.failed"),
    ],
)
def test_each_error_has_its_answer(
    app: FastAPI, error: Exception, status: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A constant body, Retry-After where it passes by itself, and the text in the log only."""

    @app.get("/call/{item}")
    def call(item: int) -> None:
        raise error

    with caplog.at_level(logging.WARNING, "meshlib_fastapi"):
        answer = TestClient(app).get("/call/7")
    assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (status, status, reason)
    assert ("retry-after" in answer.headers) is (status == 503)
    assert "secret" not in answer.text + str(answer.headers)
    assert caplog.messages == [f"{status} for /call/{{item}}: {type(error).__name__}: secret"]


def test_a_call_that_takes_too_long_is_a_gateway_timeout(app: FastAPI, mesh: meshlib.Mesh) -> None:
    """A real one, as httpx's user sees it, cut by the deadline that came in with the call."""

    @app.get("/slow")
    async def slow() -> str:
        async with mesh.client() as http:
            return (await http.get("http://silent/")).text

    answer = TestClient(app).get("/slow", headers={"x-mesh-deadline-ms": "150"})
    assert (answer.status_code, answer.json()["reason"]) == (504, "upstream.timeout")


def test_what_is_no_failed_call_stays_an_error(app: FastAPI) -> None:
    """A mistake of our own is no bad gateway."""

    @app.get("/broken")
    async def broken() -> None:
        raise meshlib.ConfigError("secret")

    assert TestClient(app, raise_server_exceptions=False).get("/broken").status_code == 500
    with pytest.raises(meshlib.ConfigError):
        TestClient(app).get("/broken")


def test_the_applications_own_handlers_win(mesh: meshlib.Mesh) -> None:
    """Those that were there before, and those that come after."""
    from fastapi.responses import PlainTextResponse

    async def mine(request: Any, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("mine", 418)

    app = FastAPI(exception_handlers={meshlib.DeadlineExceeded: mine})
    install(app, mesh)
    app.add_exception_handler(meshlib.ConnectFailed, mine)

    @app.get("/{name}")
    async def fail(name: str) -> None:
        raise getattr(meshlib, name)("x")

    client = TestClient(app)
    found = [client.get(f"/{name}").status_code for name in ("DeadlineExceeded", "ConnectFailed", "ConnectionLost")]
    assert found == [418, 418, 502]


def test_a_failed_call_ends_a_conversation(app: FastAPI) -> None:
    """1011 for a websocket that was accepted, a refusal for one that wasn't yet."""
    from starlette.testclient import WebSocketDenialResponse
    from starlette.websockets import WebSocketDisconnect

    @app.websocket("/{when}")
    async def talk(socket: WebSocket, when: str) -> None:
        if when == "late":
            await socket.accept()
        raise meshlib.NoEndpoint("secret")

    client = TestClient(app)
    with client.websocket_connect("/late") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert closed.value.code == 1011
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/early"):
        pass
    assert (denied.value.status_code, denied.value.json()["reason"]) == (503, "upstream.unavailable")


def test_the_lifespan_keeps_its_state_and_may_run_again(mesh: meshlib.Mesh) -> None:
    """Each `with TestClient(app)` is a life: what the application yields is there, and the mesh is closed after it, and only then."""
    story: list[str] = []

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
        story.append("up")
        yield {"color": "blue"}
        story.append("down" if mesh.metrics_port else "down without a mesh")

    app = FastAPI(lifespan=lifespan)
    install(app, mesh)
    router = APIRouter()

    @router.get("/color")
    async def color() -> str:
        return "blue"

    app.include_router(router)
    for _ in range(2):
        with TestClient(app) as client:
            assert client.app_state["color"] == "blue"
            assert client.get("/color").status_code == 200
            assert mesh.metrics_port
        assert mesh.metrics_port is None
    assert story == ["up", "down"] * 2


def test_a_lifespan_that_fails_leaves_nothing_running(mesh: meshlib.Mesh) -> None:
    """The server hears of it, and the mesh is closed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    app = FastAPI(lifespan=lifespan)
    install(app, mesh)
    with pytest.raises(RuntimeError, match="no database"), TestClient(app):
        pass
    assert mesh.metrics_port is None


def test_install_is_for_once_and_before_the_first_call(app: FastAPI, mesh: meshlib.Mesh) -> None:
    """Otherwise it would do nothing, or close the mesh twice, and nobody would notice."""
    with pytest.raises(RuntimeError, match="twice"):
        install(app, mesh)
    late = FastAPI()
    TestClient(late).get("/")
    with pytest.raises(RuntimeError, match="begun"):
        install(late, mesh)


# --------------------------------------------------------------------- beside OpenTelemetry's own instrumentations

NESTINGS = """
import fastapi
from fastapi import APIRouter, FastAPI
from meshlib_fastapi import install
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

router = APIRouter(prefix="/v1")
router.get("/items/{item}")(handle_later)


def made(kind=FastAPI):
    app = kind()
    app.include_router(router)
    return app


@nesting
def the_mesh_alone():
    app = made()
    install(app, mesh)
    return app

@nesting
def instrumented_after():
    app = made()
    install(app, mesh)
    FastAPIInstrumentor.instrument_app(app)
    return app

@nesting
def instrumented_before():
    app = made()
    FastAPIInstrumentor.instrument_app(app)
    install(app, mesh)
    return app

@nesting
def middleware_inside():
    app = made()
    install(app, mesh)
    app.add_middleware(OpenTelemetryMiddleware)
    return app

@nesting
def middleware_around():
    app = made()
    install(app, mesh)
    return OpenTelemetryMiddleware(app)

@nesting
def served_by_the_mesh():
    app = made()
    install(app, mesh)
    FastAPIInstrumentor.instrument_app(app)
    return mesh.asgi(app)

@nesting
def instrumented_everywhere():
    FastAPIInstrumentor().instrument()  # of all that is made from here on
    app = made(fastapi.FastAPI)
    install(app, mesh)
    return app
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return stories(NESTINGS, "/v1/items/7")


@pytest.mark.parametrize(
    ("nesting", "by"),
    [
        ("the_mesh_alone", "meshlib"),
        ("instrumented_after", "opentelemetry.instrumentation.fastapi"),
        ("instrumented_before", "opentelemetry.instrumentation.fastapi"),
        ("instrumented_everywhere", "opentelemetry.instrumentation.fastapi"),
        ("middleware_inside", "opentelemetry.instrumentation.asgi"),
        ("middleware_around", "opentelemetry.instrumentation.asgi"),
        ("served_by_the_mesh", "opentelemetry.instrumentation.fastapi"),
    ],
)
def test_one_call_is_one_span_under_its_template(found: dict[str, Any], nesting: str, by: str) -> None:
    """Whoever makes it, in whatever order they were put around the application; nobody complains, and the trace goes on."""
    check_one_span(found[nesting], by=by, name="GET /v1/items/{item}", route="/v1/items/{item}")
