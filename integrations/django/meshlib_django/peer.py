"""Who called, for a view?

The proof was made by the connection, before the view was chosen; the middleware only hands it over, as `request.peer`. A view that can't
do without is wrapped in `peer_required`; what an unknown caller gets is 401 with problem details.

No header says who somebody is, whatever it is called and whoever set it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest

import meshlib
from meshlib.server.line import stranger

from .problems import problem

log = logging.getLogger("meshlib_django")

View = TypeVar("View", bound=Callable[..., Any])


def proved_peer(request: HttpRequest) -> meshlib.Peer | None:
    """Who called, or None for a caller without identity (modes observe and permissive)."""
    peer = meshlib.peer() or _held_out(request)
    return peer if peer is not None and peer.spiffe_id else None


def peer_required(view: View) -> View:
    """A view that is only for callers who proved who they are. Of a class it takes what `as_view()` gives."""
    if iscoroutinefunction(view):

        @wraps(view)
        async def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            return await view(request, *args, **kwargs) if _is_known(request) else problem(401)

        return cast("View", guarded)

    @wraps(view)
    def guarded_in_a_thread(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        return view(request, *args, **kwargs) if _is_known(request) else problem(401)

    return cast("View", guarded_in_a_thread)


def _is_known(request: HttpRequest) -> bool:
    peer = request.peer if hasattr(request, "peer") else proved_peer(request)
    if peer is None and meshlib.peer() is None:
        log.warning(
            "401 for %s: nobody proved anything, since the mesh doesn't stand around this application. "
            "Make it with meshlib_django.get_asgi_application() or get_wsgi_application().",
            request.path,
        )
    return peer is not None


def _held_out(request: HttpRequest) -> meshlib.Peer | None:
    """What is known where the mesh's way isn't around the application: from a server of the mesh, and in the application's tests.

    Keys made of headers look different, so that no request gets here. Outside of tests a stranger is nobody.
    """
    scope = getattr(request, "scope", None)
    if scope is not None:
        tls = (scope.get("extensions") or {}).get("tls") or {}
        found = tls.get("meshlib.peer")
    else:
        found = request.META.get("meshlib.peer")
    return found if isinstance(found, meshlib.Peer) else stranger("", 0).peer
