"""How does the mesh stand around all of Django?

    # asgi.py                                                   # wsgi.py
    from meshlib_django import get_asgi_application             from meshlib_django import get_wsgi_application
    application = get_asgi_application()                        application = get_wsgi_application()

They make what Django's functions of the same names make, with the inbound way around it: no middleware sees a call that nobody judged, or
a path that isn't canonical. `mesh_asgi` and `mesh_wsgi` do the same for an application that has Django inside, such as a router of
Channels. `meshlib serve project.asgi:application` finds the mesh in them.

Django knows no lifespan, and says so by an error; it is answered here, so that the mesh ends with the server. WSGI knows none at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from django.core.asgi import get_asgi_application as _django_asgi
from django.core.handlers.asgi import ASGIHandler
from django.core.wsgi import get_wsgi_application as _django_wsgi
from opentelemetry import trace

from meshlib import Mesh

from .process import mesh

# Where environ and scope say which span stands for the call: further in, another one may be the current one.
SPAN: Final = "meshlib_django.span"


def get_asgi_application() -> Any:
    """Django as an ASGI application behind the mesh of the settings."""
    return mesh_asgi(_django_asgi())


def get_wsgi_application() -> Any:
    """Django as a WSGI application behind the mesh of the settings."""
    return mesh_wsgi(_django_wsgi())


def mesh_asgi(app: Any) -> Any:
    """An ASGI application with Django in it, behind the mesh of the settings."""
    own = mesh()
    return own.asgi(_InsideASGI(app, own))


def mesh_wsgi(app: Any) -> Any:
    """A WSGI application with Django in it, behind the mesh of the settings."""
    return mesh().wsgi(_InsideWSGI(app))


class _InsideASGI:
    """All that is behind the mesh. It stands where the span of the call is the current one."""

    def __init__(self, app: Any, mesh: Mesh) -> None:
        self.app = app
        self._mesh = mesh

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" and isinstance(self.app, ASGIHandler):
            await self._live(receive, send)
            return
        span = trace.get_current_span()
        await self.app({**scope, SPAN: span} if span.is_recording() else scope, receive, send)

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                self._mesh.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return


class _InsideWSGI:
    def __init__(self, app: Callable[[Any, Any], Any]) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        span = trace.get_current_span()
        if span.is_recording():
            # A dictionary of our own already: the mesh has made it from what it judged.
            environ[SPAN] = span
        return self.app(environ, start_response)
