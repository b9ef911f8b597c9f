"""Under which template did FastAPI find the handler of a call?

A span that is called `GET /items/7` is one of millions; `GET /items/{item}` is a line in a chart. FastAPI leaves the route in the scope,
where it's read after the call. That of a router which was included has only the last part of the template, in versions that keep
included routers as they are (0.16x); those leave the whole one beside it, in `scope["fastapi"]`, and a test pins where.

Metrics are labelled with the templates of mesh.yaml (`services.<name>.route`), and not with these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import Span, SpanKind


def template_of(scope: Mapping[str, Any]) -> str | None:
    """The template, with the place where the application is mounted; None if no handler was found, or it isn't known."""
    route = scope.get("route")
    if not hasattr(route, "endpoint"):
        return None
    context = (scope.get("fastapi") or {}).get("effective_route_context")
    if context is not None and getattr(context, "original_route", None) is route:
        route = context
    template: str = getattr(route, "path_format", "") or getattr(route, "path", "")
    if set(scope.get("path_params") or ()) - set(re.findall(r"{(\w+)", template)):
        # Mounted under a path with parameters, whose values stand in root_path by now.
        return None
    prefix: str = scope.get("root_path") or ""
    return prefix.rstrip("/") + template or None


def name_span(span: Span, scope: Mapping[str, Any]) -> None:
    """Give the span of this call the template, if it is one of a server: another was begun by somebody else, for something else."""
    if not span.is_recording() or getattr(span, "kind", None) is not SpanKind.SERVER:
        return
    if (template := template_of(scope)) is not None:
        span.set_attribute("http.route", template)
        span.update_name(f"{str(getattr(span, 'name', 'HTTP')).partition(' ')[0]} {template}")


def is_traced_by_others(stack: Any) -> bool:
    """Is a middleware of OpenTelemetry's own in this stack? It makes the span of a call where nobody around it has made one."""
    while stack is not None:
        if type(stack).__module__.startswith("opentelemetry.instrumentation."):
            return True
        stack = getattr(stack, "app", None)
    return False
