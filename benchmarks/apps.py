"""What do the servers serve in `server.py`? One route, 54 bytes of JSON: Starlette and Flask, bare and with OpenTelemetry.

With OpenTelemetry every call makes a span, and the spans go through the SDK's batching processor to an exporter that drops them: that
is what the application's process pays, without a collector on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .peers import ANSWER

ITEM = json.loads(ANSWER)


def asgi() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def item(request: Request) -> JSONResponse:
        return JSONResponse({**ITEM, "id": int(request.path_params["id"])})

    return Starlette(routes=[Route("/items/{id}", item)])


def wsgi() -> Any:
    from flask import Flask, Response

    app = Flask("shop")

    @app.get("/items/<int:number>")
    def item(number: int) -> Response:
        return Response(json.dumps({**ITEM, "id": number}, separators=(",", ":")), mimetype="application/json")

    return app


def asgi_traced() -> Any:
    """For the mesh: the SDK is configured, and the mesh makes its spans with it."""
    _configure_tracing()
    return asgi()


def wsgi_traced() -> Any:
    _configure_tracing()
    return wsgi()


def asgi_otel() -> Any:
    """OpenTelemetry's own middleware."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    _configure_tracing()
    return OpenTelemetryMiddleware(asgi())


def wsgi_otel() -> Any:
    from opentelemetry.instrumentation.wsgi import OpenTelemetryMiddleware

    _configure_tracing()
    return OpenTelemetryMiddleware(wsgi())


def _configure_tracing() -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Dropping(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Dropping()))
    trace.set_tracer_provider(provider)
