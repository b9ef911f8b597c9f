"""Are the ways into uvicorn and gunicorn still there? Both are entered by names without an underscore, which no document promises.

What is derived from, called or read is written down here with its signature, and held against the release that is installed. Where a test
fails, a release has moved something: read its change beside the file that is named, and only then move the name here.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import gunicorn.arbiter
import gunicorn.config
import gunicorn.http.body
import gunicorn.http.parser
import gunicorn.http.unreader
import gunicorn.http.wsgi
import gunicorn.workers.base
import gunicorn.workers.gthread
import gunicorn.workers.sync
import pytest
import uvicorn
import uvicorn.config
import uvicorn.protocols.http.h11_impl
import uvicorn.protocols.http.httptools_impl
import uvicorn.server

GTHREAD = gunicorn.workers.gthread
UVICORN = "meshlib/server/serve.py"
PROTOCOL = "meshlib/server/uvicorn.py and head.py"
WORKERS = "meshlib/server/gunicorn.py"
SOCKET = "meshlib/server/gunicorn_socket.py"


def told(package: str, name: str, where: str) -> str:
    return f"{package} {version(package)} has changed {name}, which {where} enters by: see what that file does with it"


METHODS: list[tuple[str, Any, str, str, str]] = [
    # The server itself: how it starts, ticks and ends.
    ("uvicorn", uvicorn.Server, "handle_exit", "(self, sig, frame)", UVICORN),
    ("uvicorn", uvicorn.Server, "capture_signals", "(self)", UVICORN),
    ("uvicorn", uvicorn.Server, "on_tick", "(self, counter)", UVICORN),
    ("uvicorn", uvicorn.Server, "startup", "(self, sockets=None)", UVICORN),
    ("uvicorn", uvicorn.Server, "shutdown", "(self, sockets=None)", UVICORN),
    ("uvicorn", uvicorn.Server, "run", "(self, sockets=None)", UVICORN),
    ("uvicorn", uvicorn.Server, "serve", "(self, sockets=None)", UVICORN),
    ("uvicorn", uvicorn.Config, "get_loop_factory", "(self)", WORKERS),
    # What is made for a connection: `http=` takes a class that is called with these.
    *(
        ("uvicorn", protocol, name, signature, PROTOCOL)
        for protocol in (
            uvicorn.protocols.http.httptools_impl.HttpToolsProtocol,
            uvicorn.protocols.http.h11_impl.H11Protocol,
        )
        for name, signature in (
            ("__init__", "(self, config, server_state, app_state, _loop=None)"),
            ("connection_made", "(self, transport)"),
            ("data_received", "(self, data)"),
            ("connection_lost", "(self, exc)"),
            ("shutdown", "(self)"),
        )
    ),
    ("uvicorn", uvicorn.protocols.http.httptools_impl.HttpToolsProtocol, "on_message_begin", "(self)", PROTOCOL),
    ("uvicorn", uvicorn.protocols.http.httptools_impl.HttpToolsProtocol, "on_headers_complete", "(self)", PROTOCOL),
    ("uvicorn", uvicorn.protocols.http.httptools_impl.HttpToolsProtocol, "on_message_complete", "(self)", PROTOCOL),
    ("uvicorn", uvicorn.protocols.http.h11_impl.H11Protocol, "handle_events", "(self)", PROTOCOL),
    ("uvicorn", uvicorn.protocols.http.h11_impl.H11Protocol, "send_400_response", "(self, msg)", PROTOCOL),
    # gunicorn's watcher.
    ("gunicorn", gunicorn.arbiter.Arbiter, "signal", "(self, sig, frame)", UVICORN),
    ("gunicorn", gunicorn.arbiter.Arbiter, "kill_workers", "(self, sig)", UVICORN),
    ("gunicorn", gunicorn.config.Config, "set", "(self, name, value)", WORKERS),
    # Its workers, all of them.
    ("gunicorn", gunicorn.workers.base.Worker, "init_process", "(self)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "init_signals", "(self)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "load_wsgi", "(self)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "notify", "(self)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "handle_exit", "(self, sig, frame)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "handle_quit", "(self, sig, frame)", WORKERS),
    ("gunicorn", gunicorn.workers.base.Worker, "handle_usr1", "(self, sig, frame)", WORKERS),
    # sync.
    ("gunicorn", gunicorn.workers.sync.SyncWorker, "accept", "(self, listener)", WORKERS),
    ("gunicorn", gunicorn.workers.sync.SyncWorker, "wait", "(self, timeout)", WORKERS),
    ("gunicorn", gunicorn.workers.sync.SyncWorker, "run", "(self)", WORKERS),
    ("gunicorn", gunicorn.workers.sync.SyncWorker, "handle_request", "(self, listener, req, client, addr)", WORKERS),
    # gthread.
    ("gunicorn", GTHREAD.ThreadWorker, "accept", "(self, listener)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "handle", "(self, conn)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "handle_request", "(self, req, conn)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "finish_request", "(self, conn, fs)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "enqueue_req", "(self, conn)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "on_pending_socket_readable", "(self, conn, client)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "murder_keepalived", "(self, force=False)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "murder_pending", "(self)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "wait_for_and_dispatch_events", "(self, timeout)", WORKERS),
    ("gunicorn", GTHREAD.ThreadWorker, "set_accept_enabled", "(self, enabled)", WORKERS),
    ("gunicorn", GTHREAD.PollableMethodQueue, "defer", "(self, callback, *args)", WORKERS),
    ("gunicorn", GTHREAD.TConn, "__init__", "(self, cfg, sock, client, server)", WORKERS),
    ("gunicorn", GTHREAD.TConn, "close", "(self, graceful=False)", WORKERS),
    ("gunicorn", gunicorn.http.unreader.Unreader, "take_buffered", "(self)", WORKERS),
    ("gunicorn", gunicorn.http.wsgi.Response, "start_response", "(self, status, headers, exc_info=None)", WORKERS),
]


@pytest.mark.parametrize(
    ("package", "owner", "name", "signature", "where"), METHODS, ids=lambda value: getattr(value, "__name__", None)
)
def test_methods_are_as_they_were(package: str, owner: Any, name: str, signature: str, where: str) -> None:
    """By name, and by the names and defaults of what they take."""
    found = inspect.getattr_static(owner, name, None)
    assert found is not None, told(package, f"{owner.__name__}.{name} (it is gone)", where)
    seen = inspect.signature(getattr(owner, name))
    bare = seen.replace(
        parameters=[each.replace(annotation=inspect.Parameter.empty) for each in seen.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare) == signature, told(package, f"{owner.__name__}.{name}{bare}", where)


def source(owner: Any) -> str:
    return inspect.getsource(owner)


ATTRIBUTES: list[tuple[str, Any, tuple[str, ...], str]] = [
    (
        "uvicorn", uvicorn.Server,
        ("self.config = ", "self.server_state = ", "self.started = ", "self.should_exit = ", "self.force_exit = ", "self.servers", "self.lifespan = "),
        UVICORN,
    ),
    ("uvicorn", uvicorn.Server.shutdown, ("server.close()", "connection.shutdown()", "self.config.timeout_graceful_shutdown", "self.lifespan.shutdown()"), UVICORN),
    ("uvicorn", uvicorn.Server.main_loop, ("await self.on_tick(counter)", "await asyncio.sleep(0.1)"), UVICORN),
    ("uvicorn", uvicorn.server.ServerState, ("self.connections", "self.tasks", "self.default_headers"), UVICORN),
    ("uvicorn", uvicorn.Config, ("self.loaded_app", "self.http_protocol_class", "self.timeout_graceful_shutdown", "self.timeout_keep_alive"), PROTOCOL),
    ("gunicorn", gunicorn.arbiter.Arbiter, ("self.pid = ", "WORKER_BOOT_ERROR = 3", "self.kill_workers(sig)", "self.cfg.graceful_timeout"), UVICORN),
    ("gunicorn", gunicorn.workers.base.Worker, ("self.sockets = ", "self.alive = ", "self.cfg = ", "self.wsgi = ", "self.timeout = ", "self.max_requests = "), WORKERS),
    ("gunicorn", gunicorn.workers.sync.SyncWorker, ("self.notify()", "self.wait(timeout)", "while self.alive", "client.setblocking(1)"), WORKERS),
    (
        "gunicorn", GTHREAD.ThreadWorker,
        (
            *("self.notify()", "self.murder_keepalived()", "self.murder_pending()", "self.set_accept_enabled(False)", "while self.alive", "self.nr_conns > 0"),
            *("self.keepalived_conns", "self.pending_conns", "self.poller", "self.method_queue", "self.cfg.graceful_timeout", "self.tpool"),
        ),
        WORKERS,
    ),
    ("gunicorn", GTHREAD.TConn, ("self.sock = ", "self.timeout = ", "self.parser = ", "self.data_ready = "), WORKERS),
    ("gunicorn", gunicorn.http.body.LengthReader, ("self.length = ", "self.length -= "), WORKERS),
    ("gunicorn", gunicorn.http.body.Body, ("self.reader = ",), WORKERS),
    ("gunicorn", gunicorn.http.wsgi, ('"gunicorn.socket": sock', 'sock.send(b"HTTP/1.1 100 Continue\\r\\n\\r\\n")', "self.req.should_close()"), SOCKET),
    ("gunicorn", gunicorn.http.wsgi.Response.send_headers, ("util.write(self.sock",), SOCKET),
]  # fmt: skip


@pytest.mark.parametrize(("package", "owner", "texts", "where"), ATTRIBUTES, ids=lambda value: getattr(value, "__name__", None))
def test_attributes_and_steps_are_as_they_were(package: str, owner: Any, texts: tuple[str, ...], where: str) -> None:
    """What is read, and which of our methods a loop of theirs calls: in their own words."""
    text = source(owner)
    for each in texts:
        assert each in text, told(
            package, f"{getattr(owner, '__qualname__', owner.__name__)} ({each!r} is not in it any more)", where
        )


def test_a_connection_of_uvicorn_shows_its_transport() -> None:
    """`serve.py` asks it whether something has come; without one, nothing would be waited for, and nobody would notice."""
    for module in (uvicorn.protocols.http.httptools_impl, uvicorn.protocols.http.h11_impl):
        assert "self.transport = transport" in source(module), told("uvicorn", module.__name__, UVICORN)


def test_no_name_of_ours_hides_one_of_theirs() -> None:
    """What we add to their classes must not be what they use for something else."""
    from meshlib.server import gunicorn as ours

    added = {"door", "pulse", "drain", "through", "parting", "close_down", "wake_up", "close_listeners"}
    for theirs in (gunicorn.workers.base.Worker, gunicorn.workers.sync.SyncWorker, GTHREAD.ThreadWorker):
        assert added & set(dir(theirs)) == set()
        assert [name for name in added if f"self.{name} " in source(theirs) or f"self.{name}." in source(theirs)] == []
    for name in ("signals", "listeners", "idle_until", "close_listeners", "protocol"):
        assert not hasattr(uvicorn.Server, name), name
        assert f"self.{name}" not in source(uvicorn.Server), name
    assert issubclass(ours.ThreadWorker, GTHREAD.ThreadWorker)
