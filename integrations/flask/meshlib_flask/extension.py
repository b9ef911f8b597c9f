"""What has to change in a Flask application, so that its calls go the mesh's way?

`app.wsgi_app` is Flask's place for what stands around the application. What is put there after the mesh stands outside of it, as far as
another server than `meshlib serve` is concerned, which puts the mesh around everything once more (that counts once). The peer and the
name of the span are set by signals, which come before all of the application's `before_request` functions.

WSGI knows no start and no end: the mesh starts with the first call of a process, or is started by `meshlib serve` in each worker.
"""

from __future__ import annotations

from typing import Any, Final

from flask import Flask, appcontext_pushed, g, request, request_started
from opentelemetry import trace

from meshlib import AttemptFailed, DeadlineExceeded, IdentityError, Mesh, Refused

from .peer import proved_peer
from .problems import answer_for_failed_call

# Under this name `app.extensions` holds the extension.
NAME: Final = "mesh"


class MeshFlask:
    """The extension. `mesh` may come with the application or before it; one extension may serve several applications."""

    def __init__(self, app: Flask | None = None, mesh: Mesh | None = None) -> None:
        self.mesh = mesh
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, mesh: Mesh | None = None) -> None:
        """Put an application into the mesh; once, and before its first request.

        Handlers that the application has for an error of meshlib, before or after, win over those of this module.
        """
        mesh = mesh if mesh is not None else self.mesh
        if mesh is None:
            raise TypeError("Which mesh? Say MeshFlask(app, mesh), or init_app(app, mesh).")
        if NAME in app.extensions:
            raise RuntimeError("This application is in the mesh already: MeshFlask was called twice for it.")
        self.mesh = mesh
        for kind in (DeadlineExceeded, Refused, AttemptFailed, IdentityError):
            if kind not in app.error_handler_spec[None][None]:
                # First, since Flask refuses it for an application that has begun to work.
                app.register_error_handler(kind, answer_for_failed_call)
        app.wsgi_app = mesh.wsgi(app.wsgi_app)  # type: ignore[method-assign]
        # Always there, also in the context of a command or of a test; and new for each request in such a context.
        appcontext_pushed.connect(_set_peer, app)
        request_started.connect(_begin, app)
        app.extensions[NAME] = self


def _set_peer(app: Flask, **_: Any) -> None:
    g.peer = proved_peer()


def _begin(app: Flask, **_: Any) -> None:
    _set_peer(app)
    rule = request.url_rule
    span = trace.get_current_span()
    # Another span was begun by somebody else, for something else.
    if rule is not None and span.is_recording() and getattr(span, "kind", None) is trace.SpanKind.SERVER:
        template = request.root_path + rule.rule
        span.set_attribute("http.route", template)
        span.update_name(f"{str(getattr(span, 'name', 'HTTP')).partition(' ')[0]} {template}")
