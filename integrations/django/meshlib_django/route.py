"""Under which template did Django find the view of a call?

A span that is called `GET /items/7` is one of millions; `GET /items/<int:item>/` is a line in a chart. Django puts the template together
from all the `include`s on the way, and leaves it in `request.resolver_match`. One that was written with `re_path` is a regular expression,
and is told as it is.

Metrics are labelled with the templates of mesh.yaml (`services.<name>.route`), and not with these.
"""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from .application import SPAN


def template_of(request: HttpRequest) -> str | None:
    """The template, with the place where the application is mounted; None if no view was found."""
    match = request.resolver_match
    if match is None or match.route is None:
        return None
    prefix = request.path.removesuffix(request.path_info)
    return f"{prefix.rstrip('/')}/{match.route.lstrip('/')}"


def name_span(request: HttpRequest) -> None:
    """Give the span of this call the template, if it is one of a server: another was begun by somebody else, for something else.

    DjangoInstrumentor makes it, where it is active; then it is told who called, which the mesh's span knows already.
    """
    own: Any = getattr(request, "scope", request.META).get(SPAN)
    span: Any = own or trace.get_current_span()
    if not span.is_recording() or getattr(span, "kind", None) is not SpanKind.SERVER:
        return
    peer = getattr(request, "peer", None)
    if own is None and peer is not None:
        span.set_attribute("meshlib.peer", peer.spiffe_id)
    template = template_of(request)
    if template is not None:
        span.set_attribute("http.route", template)
        span.update_name(f"{str(getattr(span, 'name', 'HTTP')).partition(' ')[0]} {template}")
