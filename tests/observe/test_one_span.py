"""Is one call one span, when OpenTelemetry's instrumentations are active too, inside of the mesh and around it?

With the extensions for FastAPI and Flask: integrations/*/tests.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from meshlib.observe.spans import is_traced_inside
from tests.traced import check_one_span, stories

SOURCE = """
from fastapi import FastAPI
from flask import Flask
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.routing import Route
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware as AroundASGI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware as AroundWSGI


async def answer(request):
    return JSONResponse(await handle_later())


def starlette(*middleware):
    return Starlette(routes=[Route("/wares/{ware}", answer)], middleware=[Middleware(each) for each in middleware])


def fastapi(**options):
    app = FastAPI(**options)
    app.get("/wares/{ware}")(handle_later)
    return app


def flask():
    app = Flask("under test")
    app.get("/wares/<ware>")(lambda ware: handle_now())
    return app


@nesting
def mesh_alone(): return mesh.asgi(starlette())
@nesting
def asgi_around(): return AroundASGI(mesh.asgi(starlette()))
@nesting
def asgi_inside(): return mesh.asgi(AroundASGI(starlette()))
@nesting
def starlette_middleware(): return mesh.asgi(starlette(AroundASGI))
@nesting
def on_both_sides(): return AroundASGI(mesh.asgi(mesh.asgi(starlette())))
@nesting
def fastapi_by_itself(): return mesh.asgi(fastapi())
@nesting
def fastapi_kept_from_it(): return mesh.asgi(fastapi(telemetry={"tracing": False}))

@nesting
def fastapi_instrumented():
    app = fastapi()
    face = mesh.asgi(app)
    FastAPIInstrumentor.instrument_app(app)
    return face

@nesting
def wsgi_alone(): return mesh.wsgi(flask())
@nesting
def wsgi_around(): return AroundWSGI(mesh.wsgi(flask()))
@nesting
def wsgi_inside(): return mesh.wsgi(AroundWSGI(flask()))

@nesting
def flask_instrumented():
    app = flask()
    FlaskInstrumentor().instrument_app(app)
    return mesh.wsgi(app)

@nesting
def flask_instrumented_around_the_mesh():
    app = flask()
    app.wsgi_app = mesh.wsgi(app.wsgi_app)
    FlaskInstrumentor().instrument_app(app)
    return app
"""

WARES = "/wares/{ware}"
CONTRIB = "opentelemetry.instrumentation."


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return stories(SOURCE, "/wares/7")


@pytest.mark.parametrize(
    ("nesting", "by", "name", "route"),
    [
        ("mesh_alone", "meshlib", f"GET {WARES}", WARES),
        ("asgi_around", CONTRIB + "asgi", f"GET {WARES}", WARES),
        ("asgi_inside", CONTRIB + "asgi", "GET /wares/7", None),
        ("starlette_middleware", CONTRIB + "asgi", "GET /wares/7", None),
        ("on_both_sides", CONTRIB + "asgi", f"GET {WARES}", WARES),
        ("fastapi_by_itself", "fastapi", f"GET {WARES}", WARES),
        ("fastapi_kept_from_it", "meshlib", f"GET {WARES}", WARES),
        ("fastapi_instrumented", CONTRIB + "fastapi", f"GET {WARES}", WARES),
        ("wsgi_alone", "meshlib", f"GET {WARES}", WARES),
        ("wsgi_around", CONTRIB + "wsgi", f"GET {WARES}", WARES),
        ("wsgi_inside", CONTRIB + "wsgi", "GET /wares/7", None),
        ("flask_instrumented", CONTRIB + "flask", "GET /wares/<ware>", "/wares/<ware>"),
        ("flask_instrumented_around_the_mesh", CONTRIB + "flask", "GET /wares/<ware>", "/wares/<ware>"),
    ],
)
def test_one_call_is_one_span_wherever_the_mesh_stands(
    found: dict[str, Any], nesting: str, by: str, name: str, route: str | None
) -> None:
    """Who made it knows the route, the caller's trace goes on, and the handler's spans and calls are under it."""
    check_one_span(found[nesting], by=by, name=name, route=route)


def test_a_span_of_others_is_told_who_called(found: dict[str, Any]) -> None:
    """An instrumentation around the mesh can't know it."""
    for nesting in ("mesh_alone", "asgi_around", "wsgi_around", "on_both_sides"):
        (server,) = (span for span in found[nesting]["allowed"]["spans"] if span["kind"] == "SERVER")
        assert server["peer"] == "spiffe://shop.internal/ns/default/sa/web", nesting


def test_a_refused_call_has_a_span_although_the_application_makes_them(found: dict[str, Any]) -> None:
    """It doesn't get as far as the instrumentation."""
    for nesting in ("asgi_inside", "fastapi_by_itself", "flask_instrumented", "wsgi_inside"):
        assert [span["by"] for span in found[nesting]["refused"]["spans"]] == ["meshlib"], nesting


def test_layers_that_answer_anything_are_looked_through_and_found_empty() -> None:
    """A proxy that raises, a mock that has everything, a ring: no answer is made up, and it ends."""

    class Ring:
        @property
        def app(self) -> Ring:
            return self

    class Unbound:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("working outside of application context")

    def plain(scope: Any) -> None: ...

    assert [is_traced_inside(app) for app in (Ring(), mock.MagicMock(), plain, None, Unbound())] == [False] * 5
