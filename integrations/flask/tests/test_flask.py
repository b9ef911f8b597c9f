"""Does a Flask application live in the mesh as it did without, and know its callers? Behind real servers, and in its own tests."""

from __future__ import annotations

import logging
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from flask import Flask, g, request
from meshlib_flask import MeshFlask, peer_required

import meshlib
from meshlib.testing import as_peer
from tests.support import PYTHON, free_port, identities, mesh_of, process, wait_until_listening, write_config
from tests.traced import check_one_span, stories

EXAMPLE = Path(__file__).parent.parent / "example.py"
MESHLIB = str(Path(PYTHON).parent / "meshlib")
ID = "spiffe://shop.internal/ns/default/sa/"
# What runs behind the real servers.
APP = """
from flask import Blueprint, Flask, Response, g
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import meshlib
from meshlib_flask import MeshFlask, peer_required

exporter = InMemorySpanExporter()
trace.set_tracer_provider(TracerProvider())
trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(exporter))

app = Flask(__name__)
mesh = meshlib.Mesh.load()
MeshFlask(app, mesh)
http = mesh.sync_client()
items = Blueprint("items", __name__, url_prefix="/v1")


@items.get("/items/<int:item>")
@peer_required
def show(item):
    return {"item": item, "peer": g.peer.spiffe_id, "tls": g.peer.is_tls}


app.register_blueprint(items)


@app.get("/who")
def who():
    return [g.peer and g.peer.spiffe_id]


@app.get("/stream")
def stream():
    def pieces():
        for _ in range(3):
            yield meshlib.peer().spiffe_id

    return Response(pieces())


@app.get("/gone/<int:item>")
def gone(item):
    return http.get(f"http://gone/{item}").json()


@app.get("/spans")
def spans():
    return [[span.kind.name, span.name, span.attributes.get("http.route")] for span in exporter.get_finished_spans()]


@app.get("/metrics")
def metrics():
    return [mesh.metrics()]
"""


@contextmanager
def serving(folder: Path, mode: str, *command: str) -> Iterator[tuple[int, Any, Path]]:
    """The application as the service `shop` behind a real server: its port, its process, and the configuration."""
    (folder / "app.py").write_text(APP)
    identities(folder, "shop", "web", "stranger")
    port = free_port()
    services = {
        "shop": {
            "listen": f"127.0.0.1:{port}",
            "discover": {"static": [f"127.0.0.1:{port}"]},
            "secure": {"allow": [{"name": "web only", "from": ["web"]}]},
        },
        "web": {},
        "stranger": {},
        "gone": {"discover": {"static": [f"127.0.0.1:{free_port()}"]}},
    }
    file = write_config(folder, services, mode=mode)
    env = {"MESHLIB_CONFIG": str(file), "MESHLIB_SERVICE": "shop", "FLASK_RUN_PORT": str(port)}
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


@pytest.mark.parametrize("options", [(), ("--workers", "2", "--threads", "1")], ids=["threads", "processes"])
def test_in_mode_enforce_a_view_knows_who_proved_what(tmp_path: Path, options: tuple[str, ...]) -> None:
    """`g.peer` has the SPIFFE ID of the connection, whatever headers say; who isn't allowed never gets there."""
    with serving(tmp_path, "enforce", MESHLIB, "serve", "app:app", *options) as (port, _child, file):
        with caller(file) as http:
            shown = http.get("http://shop/v1/items/7")
            assert (shown.status_code, shown.json()) == (200, {"item": 7, "peer": ID + "web", "tls": True})
            forged = http.get("http://shop/who", headers={"x-forwarded-client-cert": f"URI={ID}stranger"})
            assert forged.json() == [ID + "web"]
            assert http.get("http://shop/stream").text == 3 * (ID + "web")
        with caller(file, "stranger") as http:
            refused = http.get("http://shop/who")
            assert (refused.status_code, refused.json()["reason"]) == (403, "secure.denied")
        assert httpx.get(f"http://127.0.0.1:{port}/who").status_code == 400  # plain text


def test_in_mode_observe_a_plain_caller_is_nobody(tmp_path: Path) -> None:
    """Views that require a peer answer 401 with problem details, the others as before."""
    with serving(tmp_path, "observe") as (port, _child, _file):
        assert httpx.get(f"http://127.0.0.1:{port}/who").json() == [None]
        refused = httpx.get(f"http://127.0.0.1:{port}/v1/items/7", headers={"x-spiffe-id": ID + "web"})
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "mTLS")
    assert refused.headers["content-type"] == "application/problem+json"
    assert (refused.json()["status"], refused.json()["reason"]) == (401, "secure.no_identity")


def test_each_call_is_counted_and_traced_once_under_its_rule(tmp_path: Path) -> None:
    """`meshlib serve` puts the mesh around an application that has it already: one call stays one call."""
    with serving(tmp_path, "enforce") as (_port, _child, file), caller(file) as http:
        for path in ("/v1/items/7", "/v1/items/8", "/nowhere/9"):
            http.get(f"http://shop{path}")
        counted = [line for line in http.get("http://shop/metrics").json()[0].splitlines() if "secure_requests_total{" in line]
        # The call that asks isn't over yet.
        assert sum(float(line.rsplit(" ", 1)[1]) for line in counted) == 3
        spans = [span for span in http.get("http://shop/spans").json() if span[0] == "SERVER"]
    assert spans == [
        ["SERVER", "GET /v1/items/<int:item>", "/v1/items/<int:item>"],
        ["SERVER", "GET /v1/items/<int:item>", "/v1/items/<int:item>"],
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
    assert re.search(r"meshlib_flask: 502 for /gone/<int:item>: ConnectFailed: .*127\.0\.0\.1", told)


def test_flask_run_serves_it_in_mode_observe(tmp_path: Path) -> None:
    """The server that everybody develops with, and the canonical path with it."""
    with serving(tmp_path, "observe", PYTHON, "-m", "flask", "--app", "app", "run") as (port, _child, _file):
        assert httpx.get(f"http://127.0.0.1:{port}//who").json() == [None]
        assert httpx.get(f"http://127.0.0.1:{port}/who%00").json()["reason"] == "secure.path"


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
        with mesh_of(tmp_path, {"silent": {"discover": {"static": [address]}}}) as made:
            yield made


@pytest.fixture
def app(mesh: meshlib.Mesh) -> Flask:
    app = Flask(__name__)
    MeshFlask(app, mesh)

    @app.get("/items/<item>")
    @peer_required
    def show(item: str) -> dict[str, str]:
        return {"item": item, "peer": g.peer.service}

    @app.get("/open/<item>")
    def public(item: str) -> dict[str, Any]:
        return {"item": item, "peer": g.peer and g.peer.service, "path": request.path, "left": meshlib.remaining()}

    return app


def test_the_test_client_works_in_all_its_ways(app: Flask) -> None:
    """By itself, as a context, within the context of the application, and without a call at all."""
    client = app.test_client()
    assert [client.get("/items/7").status_code, client.get("/open/7").json["peer"]] == [401, None]
    with client:
        found = client.get("/open//7", headers={"x-mesh-deadline-ms": "5000"}).json
        assert (found["item"], found["path"], 0 < found["left"] <= 5) == ("7", "/open/7", True)
        assert (request.path, g.peer) == ("/open/7", None)
    with app.app_context():
        assert g.peer is None
        assert client.get("/open/7").json["item"] == "7"
    with app.test_request_context("/open/7"):
        assert g.peer is None
        assert app.preprocess_request() is None


def test_a_test_may_say_who_calls(app: Flask) -> None:
    """By default Flask's client has proved nothing. Within it `g` has the peer too."""
    client = app.test_client()
    assert client.get("/items/7").status_code == 401
    with as_peer(ID + "web"), client:
        assert client.get("/items/7").json == {"item": "7", "peer": "web"}
        assert g.peer.spiffe_id == ID + "web"
    assert client.get("/open/7").json["peer"] is None


def test_in_mode_enforce_a_test_is_judged_as_the_peer_that_it_says(tmp_path: Path) -> None:
    """As by its real server: allowed, refused by the rules, and nobody."""
    identities(tmp_path, "me")
    rules = {"secure": {"allow": [{"name": "web only", "from": ["web"], "paths": ["/items/{item}"]}]}}
    with mesh_of(tmp_path, {"me": rules, "web": {}}, mode="enforce") as mesh:
        app = Flask(__name__)
        MeshFlask(app, mesh)

        @app.get("/items/<item>")
        @peer_required
        def show(item: str) -> str:
            return str(g.peer.service)

        client = app.test_client()
        web, batch = as_peer(ID + "web"), as_peer(ID + "batch")
        assert web(client.get)("/items/7").text == "web"
        assert [web(client.get)("/other").status_code, batch(client.get)("/items/7").status_code] == [403, 403]
        assert client.get("/items/7").status_code == 401


def test_a_view_may_be_a_coroutine_function(app: Flask) -> None:
    """`peer_required` leaves it to Flask how one is run."""
    pytest.importorskip("asgiref", reason="flask[async] is not installed")

    @app.get("/slowly")
    @peer_required
    async def slowly() -> str:
        return f"done for {g.peer.service}"

    assert app.test_client().get("/slowly").status_code == 401
    with as_peer(ID + "web"):
        assert app.test_client().get("/slowly").text == "done for web"


def test_refused_calls_run_no_code_of_the_application(app: Flask) -> None:
    """Neither a view nor what comes before."""
    seen = []
    app.before_request(lambda: seen.append((request.path, g.peer)))
    assert app.test_client().get("/open/%00").status_code == 400
    assert app.test_client().get("/open//8").status_code == 200
    assert seen == [("/open/8", None)]


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
    app: Flask, error: Exception, status: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A constant body, Retry-After where it passes by itself, and the text in the log only."""

    @app.get("/call/<item>")
    def call(item: str) -> str:
        raise error

    app.testing = True
    with caplog.at_level(logging.WARNING, "meshlib_flask"):
        answer = app.test_client().get("/call/7")
    assert (answer.status_code, answer.json["status"], answer.json["reason"]) == (status, status, reason)
    assert ("retry-after" in answer.headers) is (status == 503)
    assert "secret" not in answer.text + str(answer.headers)
    assert caplog.messages == [f"{status} for /call/<item>: {type(error).__name__}: secret"]


def test_a_call_that_takes_too_long_is_a_gateway_timeout(app: Flask, mesh: meshlib.Mesh) -> None:
    """A real one, as httpx's user sees it, cut by the deadline that came in with the call."""

    @app.get("/slow")
    def slow() -> str:
        with mesh.sync_client() as http:
            return http.get("http://silent/").text

    answer = app.test_client().get("/slow", headers={"x-mesh-deadline-ms": "150"})
    assert (answer.status_code, answer.json["reason"]) == (504, "upstream.timeout")


def test_what_is_no_failed_call_stays_an_error(app: Flask) -> None:
    """A mistake of our own is no bad gateway."""

    @app.get("/broken")
    def broken() -> str:
        raise meshlib.ConfigError("secret")

    assert app.test_client().get("/broken").status_code == 500
    app.testing = True
    with pytest.raises(meshlib.ConfigError):
        app.test_client().get("/broken")


def test_the_applications_own_handlers_win(mesh: meshlib.Mesh) -> None:
    """Those that were there before, and those that come after."""
    app = Flask(__name__)
    app.register_error_handler(meshlib.DeadlineExceeded, lambda error: ("mine", 418))
    MeshFlask(mesh=mesh).init_app(app)
    app.register_error_handler(meshlib.ConnectFailed, lambda error: ("mine", 418))

    @app.get("/<name>")
    def fail(name: str) -> str:
        raise getattr(meshlib, name)("x")

    client = app.test_client()
    found = [client.get(f"/{name}").status_code for name in ("DeadlineExceeded", "ConnectFailed", "ConnectionLost")]
    assert found == [418, 418, 502]


def test_the_extension_is_for_once_and_before_the_first_call(app: Flask, mesh: meshlib.Mesh) -> None:
    """Otherwise it would do nothing, or half of it, and nobody would notice."""
    with pytest.raises(RuntimeError, match="twice"):
        MeshFlask(app, mesh)
    assert app.extensions["mesh"].mesh is mesh
    with pytest.raises(TypeError, match="Which mesh"):
        MeshFlask(Flask("other"))
    late = Flask("late")
    late.test_client().get("/")
    before = late.wsgi_app
    with pytest.raises(AssertionError):
        MeshFlask(late, mesh)
    assert late.wsgi_app == before


# --------------------------------------------------------------------- beside OpenTelemetry's own instrumentations

NESTINGS = """
import flask
from flask import Blueprint, Flask
from meshlib_flask import MeshFlask
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

items = Blueprint("items", __name__, url_prefix="/v1")
items.get("/items/<int:item>")(lambda item: handle_now())


def made(kind=Flask):
    app = kind("under test")
    app.register_blueprint(items)
    return app


@nesting
def the_mesh_alone():
    app = made()
    MeshFlask(app, mesh)
    return app

@nesting
def instrumented_after():
    app = made()
    MeshFlask(app, mesh)
    FlaskInstrumentor().instrument_app(app)
    return app

@nesting
def instrumented_before():
    app = made()
    FlaskInstrumentor().instrument_app(app)
    MeshFlask(app, mesh)
    return app

@nesting
def instrumented_everywhere():
    FlaskInstrumentor().instrument()
    app = made(flask.Flask)
    FlaskInstrumentor().uninstrument()
    MeshFlask(app, mesh)
    return app

@nesting
def middleware_inside():
    app = made()
    app.wsgi_app = OpenTelemetryMiddleware(app.wsgi_app)
    MeshFlask(app, mesh)
    return app

@nesting
def middleware_around():
    app = made()
    MeshFlask(app, mesh)
    app.wsgi_app = OpenTelemetryMiddleware(app.wsgi_app)
    return app

@nesting
def served_by_the_mesh():
    app = made()
    MeshFlask(app, mesh)
    FlaskInstrumentor().instrument_app(app)
    return mesh.wsgi(app)
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return stories(NESTINGS, "/v1/items/7")


@pytest.mark.parametrize(
    ("nesting", "by"),
    [
        ("the_mesh_alone", "meshlib"),
        ("instrumented_after", "opentelemetry.instrumentation.flask"),
        ("instrumented_before", "opentelemetry.instrumentation.flask"),
        ("instrumented_everywhere", "opentelemetry.instrumentation.flask"),
        ("middleware_inside", "opentelemetry.instrumentation.wsgi"),
        ("middleware_around", "opentelemetry.instrumentation.wsgi"),
        ("served_by_the_mesh", "opentelemetry.instrumentation.flask"),
    ],
)
def test_one_call_is_one_span_under_its_rule(found: dict[str, Any], nesting: str, by: str) -> None:
    """Whoever makes it, in whatever order they were put around the application; nobody complains, and the trace goes on."""
    check_one_span(found[nesting], by=by, name="GET /v1/items/<int:item>", route="/v1/items/<int:item>")
