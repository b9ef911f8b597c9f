"""What do the servers serve in `server.py`? One route, 54 bytes of JSON: Starlette and Flask, bare and with OpenTelemetry.

With OpenTelemetry the SDK is set up as an application does it, and alike for the mesh and for OpenTelemetry's own middleware: its
batching processor with its own limits, its OTLP exporter over HTTP. Where to, and which share of the traces, is said by the
variables that OpenTelemetry has for it. The spans that wait when the server ends are sent then.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from .peers import ANSWER

ITEM = json.loads(ANSWER)


def asgi(at_end: Callable[[], object] | None = None) -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def item(request: Request) -> JSONResponse:
        return JSONResponse({**ITEM, "id": int(request.path_params["id"])})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if at_end is not None:
            at_end()

    return Starlette(routes=[Route("/items/{id}", item)], lifespan=lifespan)


def wsgi() -> Any:
    from flask import Flask, Response

    app = Flask("shop")

    @app.get("/items/<int:number>")
    def item(number: int) -> Response:
        return Response(json.dumps({**ITEM, "id": number}, separators=(",", ":")), mimetype="application/json")

    return app


def asgi_traced() -> Any:
    """For the mesh: the SDK is configured, and the mesh makes its spans with it."""
    # uvicorn ends by the signal that it got, and then nobody asks what was to be done at the end.
    return asgi(_trace())


def wsgi_traced() -> Any:
    _trace()
    return wsgi()


def asgi_otel() -> Any:
    """OpenTelemetry's own middleware as it comes: a span for the call, and one for each message that is sent for it."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(asgi(_trace()))


def asgi_otel_lean() -> Any:
    """The same with a span for the call alone, as the mesh makes it."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(asgi(_trace()), exclude_spans=["receive", "send"])


def wsgi_otel() -> Any:
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

    _trace()
    return OpenTelemetryMiddleware(wsgi())


def _trace() -> Callable[[], object]:
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown
