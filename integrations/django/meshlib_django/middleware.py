"""What does a view get from the mesh?

`request.peer`, who called as their connection proved it, or None; an answer for its outgoing calls that failed; and a span that has the
name of its route. In a project that is async all the way no thread is needed for it, in one that isn't no event loop.

First in MIDDLEWARE, so that what others do about an exception comes before what is done here. Exceptions of other middleware are
Django's own business. It lets nobody in and keeps nobody out: see `application.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.http import HttpRequest, HttpResponseBase

from .peer import proved_peer
from .problems import FAILED, answer_for_failed_call
from .route import name_span


class MeshMiddleware:
    """Django's side of the mesh, as one class for both kinds of projects."""

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        if self._is_async:
            markcoroutinefunction(self)

    def __call__(self, request: HttpRequest) -> Any:
        request.peer = proved_peer(request)  # type: ignore[attr-defined]
        if self._is_async:
            return self._later(request)
        try:
            return self.get_response(request)
        finally:
            name_span(request)

    async def _later(self, request: HttpRequest) -> Any:
        try:
            return await self.get_response(request)
        finally:
            name_span(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> HttpResponseBase | None:
        return answer_for_failed_call(request, exception) if isinstance(exception, FAILED) else None
