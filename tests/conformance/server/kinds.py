"""On which servers, with which frameworks and in which modes do the behaviours run?

Not the product of all: each server stands here, each framework, and each pair that people run. What a kind can't do it says with its reason,
and the behaviours that need it don't run there. A server is started by its own command line, so that nothing stands here that a user would
not write. In mode enforce the tests speak mutual TLS, in mode permissive and observe plain text where they don't say otherwise: so each
behaviour is seen both ways.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

APP = "tests.conformance.server.app:app"

# What a behaviour may need, and a kind may lack.
NEEDS = {
    "tls": "the server shows who is at the other end of TLS",
    "door": "connections come through the mesh's door",
    "websocket": "conversations",
    "denial": "a conversation can be refused with a response of the handler's",
    "kept-alive": "more than one call per connection",
    "pipeline": "calls that come before the answer to the one before",
    "together": "more than one call at once",
    "method": "the method as it was on the wire",
    "headers": "the headers as they were on the wire",
    "broken": "a handler learns that a body breaks off",
    "chunks": "a body without a length reaches the handler",
    "breaks": "an answer can be broken off",
    "raw": "the path as it was on the wire",
    "piecewise": "a body reaches the handler while it is being sent",
    "lifespan": "the application is told of start and end",
    "background": "work behind an answer",
    "graceful": "the server waits for what is under way when it is told to end",
    "drained": "the mesh knows when the server is to end",
    "twice": "a second signal says that it has to be at once",
    "listeners": "more than one listener",
    "own": "the framework tells who calls by its own means",
    "named": "the framework's routes name spans",
    "spans": "spans are recorded",
}  # fmt: skip

_NO_TLS = "it shows the application no certificate of the peer, and so runs in mode observe, without mutual TLS"
_WSGI = {
    "websocket": "WSGI has no conversations",
    "denial": "WSGI has no conversations",
    "broken": "gunicorn, granian and waitress just end it, or never begin",
    "lifespan": "WSGI tells nobody of start and end",
}
_NO_FRAMEWORK = {
    "own": "there is no framework: meshlib.peer() is the means",
    "named": "there is no framework with routes",
    "spans": "it runs without OpenTelemetry's SDK, as most do",
}
_NOT_INTEGRATED = {
    "own": "meshlib has no integration of it: meshlib.peer() is the means",
    "named": "meshlib has no integration of it",
}
_ONE = {
    "listeners": "by its own command line it has one listener",
    "twice": "by its own command line a second signal changes nothing",
}
_FOREIGN = {**_ONE, "tls": _NO_TLS, "door": "its connections are its own", "drained": "it ends as it always does"}
_DECODED = {"raw": "it hands over the decoded path alone"}
_BY_ITSELF = {**_ONE, "drained": "by its own command line it ends as it always does"}


@dataclass(frozen=True)
class Kind:
    """A server with a framework, and what they don't have."""

    server: str
    framework: str
    modes: tuple[str, ...]
    command: tuple[str, ...]
    lacks: Mapping[str, str] = field(default_factory=dict)
    # In which module of `served` it is.
    application: str = ""

    @property
    def name(self) -> str:
        return f"{self.server}/{self.framework}"

    @property
    def is_asgi(self) -> bool:
        return self.application not in ("bare_wsgi", "on_flask", "django-wsgi")

    @property
    def has_spans(self) -> bool:
        return "spans" not in self.lacks


def _serve(*options: str) -> tuple[str, ...]:
    return ("{meshlib}", "serve", APP, "--listen", "127.0.0.1:{port}", *options)


def _uvicorn(http: str, ws: str) -> tuple[str, ...]:
    return (
        "{python}", "-m", "uvicorn", "--http", http, "--ws", ws, "--port", "{port}", "--log-level", "warning", "--no-access-log", APP,
    )  # fmt: skip


def _gunicorn(worker: str, *options: str) -> tuple[str, ...]:
    return (
        "{python}", "-m", "gunicorn", "-k", f"meshlib.server.gunicorn.{worker}", "-b", "127.0.0.1:{port}", "--log-level", "warning",
        "--worker-tmp-dir", "/dev/shm", "--no-control-socket", *options, APP,
    )  # fmt: skip


def _hypercorn() -> tuple[str, ...]:
    return ("{python}", "-m", "hypercorn", "-b", "127.0.0.1:{port}", "--graceful-timeout", "1", APP)


def _granian(interface: str) -> tuple[str, ...]:
    threads = ("--blocking-threads", "10") if interface == "wsgi" else ()
    return ("{python}", "-m", "granian", "--interface", interface, *threads, "--port", "{port}", "--no-log", APP)


def _waitress() -> tuple[str, ...]:
    return ("{python}", "-m", "waitress", "--listen", "127.0.0.1:{port}", "--threads", "10", APP)


_BOTH = ("enforce", "permissive")
_SYNC = {
    "kept-alive": "gunicorn's sync worker answers one call per connection",
    "pipeline": "gunicorn's sync worker answers one call per connection",
    "together": "gunicorn's sync worker has one call at a time",
}

_HYPERCORN = {"method": "it hands over every method in upper case"}
_GRANIAN_WSGI = {
    **_DECODED,
    "breaks": "it ends the answer as if it were whole",
    "headers": "it takes an underscore for a dash, and empties what is not ASCII",
}
_WAITRESS = {
    **_DECODED,
    "graceful": "it ends without waiting for anything",
    "piecewise": "it reads the whole body before it calls",
}
_DJANGO_WSGI = {"chunks": "Django reads as much as CONTENT_LENGTH says, and nothing of a body in chunks"}
_NO_CHAT = "Django without Channels has no conversations"
_DJANGO_ASGI = {
    "websocket": _NO_CHAT,
    "denial": _NO_CHAT,
    "lifespan": "Django is told of no start and no end",
    "piecewise": "Django reads the whole body before it calls a view",
}

_UVICORN = _uvicorn("meshlib.server.uvicorn:MeshHTTP", "websockets-sansio")
_H11 = _uvicorn("tests.conformance.server.h11:MeshH11", "wsproto")
_THREADS = _serve("--threads", "10")
_OBSERVE = ("observe",)

KINDS = (
    # ours: server, framework, modes, command, what it lacks, application
    Kind("uvicorn", "asgi", _BOTH, _serve(), _NO_FRAMEWORK, "bare_asgi"),
    Kind("uvicorn", "django", ("enforce",), _serve(), _DJANGO_ASGI, "django"),
    Kind("uvicorn-h11", "asgi", ("enforce",), _H11, {**_NO_FRAMEWORK, **_BY_ITSELF}, "bare_asgi"),
    Kind("uvicorn-h11", "starlette", ("permissive",), _H11, {**_NOT_INTEGRATED, **_BY_ITSELF}, "on_starlette"),
    Kind("uvicorn-command", "fastapi", _BOTH, _UVICORN, _BY_ITSELF, "on_fastapi"),
    Kind("gunicorn-asgi", "starlette", _BOTH, _gunicorn("ASGIWorker"), {**_NOT_INTEGRATED, **_ONE}, "on_starlette"),
    Kind("gunicorn-threads", "wsgi", _BOTH, _THREADS, {**_WSGI, **_NO_FRAMEWORK}, "bare_wsgi"),
    Kind("gunicorn-threads", "django-wsgi", ("permissive",), _THREADS, {**_WSGI, **_DJANGO_WSGI}, "django-wsgi"),
    Kind("gunicorn-command", "flask", _BOTH, _gunicorn("ThreadWorker", "--threads", "10"), {**_WSGI, **_ONE}, "on_flask"),
    Kind("gunicorn-sync", "wsgi", ("enforce",), _serve("--threads", "1"), {**_WSGI, **_SYNC, **_NO_FRAMEWORK}, "bare_wsgi"),
    Kind("gunicorn-sync", "flask", ("permissive",), _gunicorn("SyncWorker"), {**_WSGI, **_SYNC, **_ONE}, "on_flask"),
    # those of others
    Kind("hypercorn", "starlette", _OBSERVE, _hypercorn(), {**_FOREIGN, **_HYPERCORN, **_NOT_INTEGRATED}, "on_starlette"),
    Kind("granian", "fastapi", _OBSERVE, _granian("asgi"), _FOREIGN, "on_fastapi"),
    Kind("granian", "wsgi", _OBSERVE, _granian("wsgi"), {**_WSGI, **_FOREIGN, **_GRANIAN_WSGI, **_NO_FRAMEWORK}, "bare_wsgi"),
    Kind("waitress", "flask", _OBSERVE, _waitress(), {**_WSGI, **_FOREIGN, **_WAITRESS}, "on_flask"),
)


def places() -> list[tuple[Kind, str]]:
    """Each kind in each of its modes: a process for each."""
    return [(kind, mode) for kind in KINDS for mode in kind.modes]
