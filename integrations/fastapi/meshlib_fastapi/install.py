"""What has to change in a FastAPI application, so that its calls go the mesh's way?

The mesh stands around the whole stack of middleware, also around what is added after `install`: what stood outside would see paths and
headers that nobody judged. So it's the building of the stack that is wrapped, not the list of middleware that is added to. The mesh's
face is made at once, since that is how `meshlib serve` finds the mesh of an application.

It does not serve: `meshlib serve module:app`, or any ASGI server in mode observe, does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from opentelemetry import trace
from starlette.middleware.errors import ServerErrorMiddleware

from meshlib import AttemptFailed, DeadlineExceeded, IdentityError, Mesh, Refused

from .peer import IdentityRequired
from .problems import answer_for_failed_call, answer_for_missing_identity
from .route import is_traced_by_others, name_span


def install(app: FastAPI, mesh: Mesh) -> None:
    """Put an application into the mesh; once, and before its first request.

    Handlers that the application has for an error of meshlib, before or after, win over those of this module.
    """
    if IdentityRequired in app.exception_handlers:
        raise RuntimeError("This application is in the mesh already: meshlib_fastapi.install was called twice for it.")
    if app.middleware_stack is not None:
        raise RuntimeError("The application has begun to work; call meshlib_fastapi.install(app, mesh) where it is made.")
    _surround(app, mesh)
    _close_with(app, mesh)
    app.exception_handlers[IdentityRequired] = answer_for_missing_identity
    for kind in (DeadlineExceeded, Refused, AttemptFailed, IdentityError):
        app.exception_handlers.setdefault(kind, answer_for_failed_call)
    _leave_spans_to_the_mesh(app)


def _surround(app: FastAPI, mesh: Mesh) -> None:
    inside = _Inside()
    outside = mesh.asgi(inside)
    build = app.build_middleware_stack

    def build_behind_the_mesh() -> Any:
        inside.app = build()
        inside.is_traced_inside = is_traced_by_others(inside.app)
        # OpenTelemetry's instrumentation, where it comes later, looks for this kind of middleware, and would else leave the application be.
        return ServerErrorMiddleware(outside) if getattr(app, "_is_instrumented_by_opentelemetry", False) else outside

    app.build_middleware_stack = build_behind_the_mesh  # type: ignore[method-assign]


class _Inside:
    """All that is behind the mesh. It stands where the span of the call is the current one, be it the mesh's or of what is around it."""

    # FastAPI and others look along `.app` for what is in the stack.
    app: Any = None
    # An instrumentation further in makes the span: the mesh then makes none, and here there is none yet.
    is_traced_inside = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        span = trace.get_current_span()
        if scope["type"] == "lifespan" or not (span.is_recording() or self.is_traced_inside):
            await self.app(scope, receive, send)
            return
        if span.is_recording():
            # Keeps FastAPI applications that are mounted in this one from making a SERVER span each.
            scope.setdefault("fastapi.telemetry", None)

        async def named(message: Any) -> None:
            # Whoever made the span may end it with the answer, so that afterwards is too late.
            if message["type"] in _BEGINNINGS:
                name_span(span if span.is_recording() else trace.get_current_span(), scope)
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            name_span(span, scope)


_BEGINNINGS: Final = frozenset({"http.response.start", "websocket.accept"})


def _close_with(app: FastAPI, mesh: Mesh) -> None:
    """The mesh starts by itself, at the latest with the lifespan, before the application does; here it is ended, after it."""
    inner = app.router.lifespan_context

    def lifespan(app: Any) -> AbstractAsyncContextManager[Any]:
        return _living(mesh, inner(app))

    app.router.lifespan_context = lifespan


@asynccontextmanager
async def _living(mesh: Mesh, inner: AbstractAsyncContextManager[Any]) -> AsyncIterator[Any]:
    try:
        async with inner as state:
            try:
                yield state
            finally:
                # The application's own end may take a while, and may call others.
                mesh.drain()
    finally:
        mesh.close()


def _leave_spans_to_the_mesh(app: FastAPI) -> None:
    """Newer versions of FastAPI make a SERVER span of their own, which would stand beside the mesh's for the same call.

    The public switch is the constructor's `telemetry={"tracing": False}`, which is past; so this reaches for where that is kept. A tracer
    that the application named there is meant, and stays. FastAPI's metrics and logs are not touched.
    """
    telemetry = getattr(app, "_telemetry", None)
    if isinstance(telemetry, dict) and telemetry.get("tracer_provider") is None:
        telemetry["tracing"] = False
