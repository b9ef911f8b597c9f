"""How is an application served, with the service's own certificate, until it is told to stop?

ASGI applications by uvicorn, WSGI applications by gunicorn; several ASGI processes by uvicorn inside gunicorn's. The choice of server is
the only thing that happens here: TLS, identity and policy are the same behind each, and come with the mesh. The address is bound before
anything else, so that a port in use is an error with a name, and not a line in a log.

A first SIGTERM or SIGINT drains: readiness goes false, no connection is accepted, what is in flight is answered with `Connection: close`,
for at most `GRACE` seconds. A second one ends at once. With gunicorn nothing of the mesh runs in the process that only watches the
others: a worker starts what it needs after the fork.

It is not a process manager beyond that: no reload, no daemon, no uid. Who needs those starts gunicorn or uvicorn by their own commands,
with `meshlib.server.gunicorn` and `meshlib.server.uvicorn`.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError, ListenError, MeshError
from .asgi import MeshASGI
from .door import Door, Inside, door_of, way_into
from .wsgi import MeshWSGI

if TYPE_CHECKING:
    import uvicorn

log = logging.getLogger("meshlib.server")

# Seconds that calls in flight have after the first signal. Orchestrators kill after 30.
GRACE: Final = 25.0

# Seconds that an idle connection is kept; callers are told. Not longer, since a connection that asks for nothing does not notice that
# the trust in its peer was withdrawn.
KEEP_ALIVE: Final = 30

BACKLOG: Final = 2048


def serve(
    mesh: Inside, app: Any, *, listen: str | None = None, workers: int = 1, threads: int = 8, is_asgi: bool | None = None
) -> None:
    """Serve an ASGI or WSGI application until a signal ends it.

    `listen` is "host:port", ":port" or "[v6]:port", by default the service's `listen`. `threads` is the number of threads in a worker of
    a WSGI application; with 1 there are no kept-alive connections either. `is_asgi` overrides the look at the application.
    Raises ListenError if the address can't be had.
    """
    if is_asgi is None:
        is_asgi = speaks_asgi(app)
    sock = bind(listen or own_address(mesh))
    _tell(mesh, sock, "uvicorn" if is_asgi else "gunicorn", workers)
    door = door_of(mesh)
    if is_asgi and workers == 1:
        server = uvicorn_server(wrapped(mesh, app, is_asgi=True), door)
        server.run(sockets=[sock])
    else:
        _gunicorn(mesh, lambda: wrapped(mesh, app, is_asgi=is_asgi), door, sock, workers, threads, is_asgi=is_asgi)


def own_address(mesh: Inside) -> str:
    """Where mesh.yaml says that this service listens."""
    listen = mesh.config.own.listen
    if listen is None:
        raise ConfigError(
            f"the service {mesh.service!r} has no address to listen on.",
            hint=f"Set services.{mesh.service}.listen in {mesh.config.file}, or say --listen 127.0.0.1:8000.",
        )
    return listen


def wrapped(mesh: Inside, app: Any, *, is_asgi: bool) -> Any:
    """The application behind the inbound way; as it is, if it was put there already."""
    if isinstance(app, MeshASGI | MeshWSGI):
        return app
    return MeshASGI(app, way_into(mesh)) if is_asgi else MeshWSGI(app, way_into(mesh))


def speaks_asgi(app: Any) -> bool:
    """Judge an application by how it is called: (scope, receive, send) is ASGI, (environ, start_response) is WSGI."""
    if not callable(app):
        raise ConfigError(
            f"{app!r} is no application: it can't be called.", hint="Name the ASGI or WSGI object, as in module:app."
        )
    if inspect.isclass(app):
        raise ConfigError(
            f"{app!r} is a class, not an application.", hint="Name an instance of it, or a function that makes one: module:make()"
        )
    call = app if inspect.isroutine(app) else app.__call__
    if inspect.iscoroutinefunction(call):
        return True
    try:
        inspect.signature(call).bind(None, None)
    except TypeError:
        pass
    except ValueError:
        raise _unclear(app) from None
    else:
        return False
    try:
        inspect.signature(call).bind(None, None, None)
    except TypeError:
        raise _unclear(app) from None
    return True


def _unclear(app: Any) -> ConfigError:
    return ConfigError(
        f"{app!r} looks neither like ASGI (scope, receive, send) nor like WSGI (environ, start_response).",
        hint="If it is one of them, say which: --asgi or --wsgi. If it makes the application, call it: module:make()",
    )


def bind(address: str) -> socket.socket:
    """A listening socket at "host:port", or the one that was handed over as "fd:3". Raises ListenError with what to do."""
    if address.startswith("fd:"):
        return _inherited(address)
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ListenError(
            f"{address!r} is no address to listen on.", hint='It is "host:port", as in "127.0.0.1:8000" or "0.0.0.0:8443".'
        )
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ListenError(f"{address} can't be listened on: {error}.", hint="Is the name of the host right?") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"{address} can't be listened on: {error.strerror or error}.", hint=_hint(error.errno, port)) from None
    return sock


def _inherited(address: str) -> socket.socket:
    """A socket that a supervisor keeps over our restarts, so that no connection is refused meanwhile."""
    try:
        sock = socket.socket(fileno=int(address.removeprefix("fd:")))
        is_listening = bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except (OSError, ValueError) as error:
        raise ListenError(
            f"{address} can't be listened on: {error}.", hint="Was the descriptor handed to this process?"
        ) from None
    if not is_listening:
        raise ListenError(f"{address} is a socket that does not listen.", hint="Hand over one on which listen() was called.")
    return sock


def _hint(code: int | None, port: str) -> str:
    if code == errno.EADDRINUSE:
        who = f"`ss -ltnp 'sport = :{port}'` names it"
        return f"Another process has the port, perhaps an older one of this service ({who}). Stop it, or take another port."
    if code in (errno.EACCES, errno.EPERM):
        return f"Ports below 1024 are for the superuser: take a higher one than {port}, or give the process CAP_NET_BIND_SERVICE."
    if code == errno.EADDRNOTAVAIL:
        return "This machine has no such address: take one of its own, or 0.0.0.0 for all."
    return "See the message of the operating system."


def _tell(mesh: Inside, sock: socket.socket, server: str, workers: int) -> None:
    host, port = sock.getsockname()[:2]
    place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    log.info(
        "%s at %s, mode %s, %s with %d worker%s", mesh.service, place, mesh.config.own.mode, server, workers, "s"[: workers != 1]
    )


# ---------------------------------------------------------------------------------------------------- uvicorn


def uvicorn_server(app: Any, door: Door, **options: Any) -> uvicorn.Server:
    """A uvicorn server whose connections come through the door, and which ends as described above."""
    import uvicorn

    from .uvicorn import MeshHTTP

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            door.mesh.drain()
            if self.should_exit:
                self.force_exit = True
            self.should_exit = True

        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            # uvicorn's own would raise the signal again after a clean end, which then looks like a kill.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for sig, handler in before.items():
                    signal.signal(sig, handler)

    settings: dict[str, Any] = {
        "http": MeshHTTP.behind(door),
        "backlog": BACKLOG,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        # What a header says about where a call comes from counts for nothing here.
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE,
        "timeout_graceful_shutdown": int(GRACE),
        **options,
    }
    settings.setdefault("headers", [("keep-alive", f"timeout={settings['timeout_keep_alive']}")])
    return Server(uvicorn.Config(app, **settings))


# --------------------------------------------------------------------------------------------------- gunicorn


def _gunicorn(
    mesh: Inside, load: Callable[[], Any], door: Door, sock: socket.socket, workers: int, threads: int, *, is_asgi: bool
) -> None:
    from gunicorn.app.base import BaseApplication
    from gunicorn.arbiter import Arbiter

    from . import gunicorn as ours

    kind = ours.ASGIWorker if is_asgi else ours.ThreadWorker if threads > 1 else ours.SyncWorker
    settings: dict[str, Any] = {
        "bind": f"fd://{sock.detach()}",
        "worker_class": type(kind.__name__, (kind,), {"door": door}),
        "workers": workers,
        "threads": 1 if is_asgi else threads,
        "keepalive": KEEP_ALIVE,
        "graceful_timeout": int(GRACE),
        "backlog": BACKLOG,
        "loglevel": logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(),
        # What a header says about where a call comes from counts for nothing here.
        "forwarded_allow_ips": "",
        "secure_scheme_headers": {},
        "control_socket_disable": True,
        "post_worker_init": lambda _: _start_in_worker(mesh),
    }
    if Path("/dev/shm").is_dir():  # noqa: S108  # for gunicorn's heartbeat: on a disk it can block a worker
        settings["worker_tmp_dir"] = "/dev/shm"  # noqa: S108

    class Application(BaseApplication):
        def load_config(self) -> None:
            for name, value in settings.items():
                self.cfg.set(name, value)  # type: ignore[union-attr]

        def load(self) -> Any:
            return load()

    class Watcher(Arbiter):
        is_ending = False

        def signal(self, sig: int, frame: FrameType | None) -> None:
            if os.getpid() != self.pid and sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                # A worker, right after its fork and before it has handlers of its own: it would note the signal down for nobody.
                raise SystemExit(0)
            if sig in (signal.SIGTERM, signal.SIGINT) and self.is_ending:
                sig = signal.SIGQUIT  # the second time: at once
            elif sig == signal.SIGINT:
                sig = signal.SIGTERM
            self.is_ending = self.is_ending or sig == signal.SIGTERM
            super().signal(sig, frame)  # type: ignore[no-untyped-call]

    # What ran here until now would run twice after the fork, and say that the watcher's empty numbers are the service's.
    mesh.close()
    Watcher(Application()).run()  # type: ignore[no-untyped-call]


def _start_in_worker(mesh: Inside) -> None:
    try:
        mesh.start()
        mesh.keeper.start()
    except ListenError as error:
        log.warning("the metrics of worker %d are not served: %s", os.getpid(), error)
    except MeshError as error:
        from gunicorn.arbiter import Arbiter

        log.error("%s", error)
        raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error
