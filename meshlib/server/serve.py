"""How is an application served, with the service's own certificate, until it is told to stop?

ASGI applications by uvicorn, WSGI applications by gunicorn; several ASGI processes by uvicorn inside gunicorn's. The choice of server is
the only thing that happens here: TLS, identity and policy are the same behind each, and come with the mesh. Where the service has a public
listener, the same server accepts on it; where it has one for probes, the keeper of each process answers there.

A first SIGTERM drains by the table of `drain.py`; SIGINT is a person, who isn't made to wait. A second one ends at once. With gunicorn
nothing of the mesh runs in the process that only watches the others: a worker starts what it needs after the fork.

Ways into uvicorn: `Server` is meant to be derived from; what is overridden are methods without an underscore (`handle_exit`,
`capture_signals`, `on_tick`, `startup`, `shutdown`, `run`), and what is used are attributes without one (`config`, `servers`,
`server_state.connections`, `lifespan.state`, `started`, `should_exit`, `force_exit`). Into gunicorn: `Arbiter.signal`, `kill_workers` and
`pid`. `tests/server/test_pinned_names.py` holds all of them against the installed releases.

It is not a process manager beyond that: no reload, no daemon, no uid. Who needs those starts gunicorn or uvicorn by their own commands,
with `meshlib.server.gunicorn` and `meshlib.server.uvicorn`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

from ..errors import ConfigError, ListenError, MeshError
from ..observe.probe import ProbeListener, Pulse
from .asgi import MeshASGI
from .door import Door, Inside, door_of, way_into
from .drain import LAST, Phase, disarm, drain_of, last_resort
from .listeners import BACKLOG, HANDED, SHARED, Listeners, bind
from .wsgi import MeshWSGI

if TYPE_CHECKING:
    import uvicorn

__all__ = ["bind", "own_address", "serve", "speaks_asgi", "uvicorn_server", "wrapped"]

log = logging.getLogger("meshlib.server")

# Seconds that an idle connection is kept; callers are told. Not longer, since a connection that asks for nothing does not notice that
# the trust in its peer was withdrawn.
KEEP_ALIVE: Final = 30

# Rounds, and seconds each, for what has come on a connection in the moment it was to be closed.
ROUNDS: Final = 10
ROUND: Final = 0.01


def serve(
    mesh: Inside, app: Any, *, listen: str | None = None, workers: int = 1, threads: int = 8, is_asgi: bool | None = None
) -> None:
    """Serve an ASGI or WSGI application until a signal ends it.

    `listen` is "host:port", ":port" or "[v6]:port", by default the service's `listen`; the public listener and the one for probes are as
    configured. `threads` is the number of threads in a worker of a WSGI application; with 1 there are no kept-alive connections either.
    `is_asgi` overrides the look at the application. Raises ListenError if an address can't be had.
    """
    if is_asgi is None:
        is_asgi = speaks_asgi(app)
    inbound = mesh.config.own.inbound
    address = listen or own_address(mesh)
    mode = HANDED if inbound.agent and address == f"unix:{inbound.agent}" else SHARED
    listeners = Listeners(address, inbound.public, inbound.probe, mode=mode)
    door_of(mesh).is_served = True
    mesh.upkeep.serves(address)
    _tell(mesh, listeners, "uvicorn" if is_asgi else "gunicorn", workers)
    door, pulse = door_of(mesh), Pulse()
    if is_asgi and workers == 1:
        server = uvicorn_server(wrapped(mesh, app, is_asgi=True), door, pulse=pulse)
        with _probed(mesh, listeners, pulse):
            server.run(sockets=listeners.serving)
    else:
        _gunicorn(mesh, lambda: wrapped(mesh, app, is_asgi=is_asgi), door, pulse, listeners, workers, threads, is_asgi=is_asgi)


def own_address(mesh: Inside) -> str:
    """Where mesh.yaml says that this service listens: for the node agent, where that one accepts the connections."""
    if mesh.config.own.inbound.agent:
        return f"unix:{mesh.config.own.inbound.agent}"
    listen = mesh.config.own.listen
    if listen is None:
        raise ConfigError(
            f"the service {mesh.service!r} has no address to listen on.",
            hint=f"Set services.{mesh.service}.listen in {mesh.config.label}, or say --listen 127.0.0.1:8000.",
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


def _tell(mesh: Inside, listeners: Listeners, server: str, workers: int) -> None:
    processes = f"{workers} worker{'s'[: workers != 1]}"
    log.info("%s at %s, mode %s, %s with %s", mesh.service, listeners, mesh.config.own.mode, server, processes)


@contextlib.contextmanager
def _probed(mesh: Inside, listeners: Listeners, pulse: Pulse) -> Generator[None, None, None]:
    """While probes are answered, from before the application has started."""
    probes = answer_probes(mesh, listeners.probe, pulse)
    try:
        yield
    finally:
        if probes is not None:
            probes.stop()


def answer_probes(mesh: Inside, listening: socket.socket | None, pulse: Pulse) -> ProbeListener | None:
    """Answer probes on a socket from now on, if there is one."""
    if listening is None:
        return None
    drain = drain_of(mesh)

    def why_not_ready() -> str:
        if not drain.is_serving:
            return "draining"
        return "" if pulse.has_begun else "starting"

    probes = ProbeListener(mesh.metrics, why_not_ready=why_not_ready, pulse=pulse)
    probes.start(mesh.keeper, listening)
    return probes


# ---------------------------------------------------------------------------------------------------- uvicorn


def uvicorn_server(
    app: Any, door: Door, *, pulse: Pulse | None = None, is_alone: bool = True, longest: float | None = None, **options: Any
) -> uvicorn.Server:
    """A uvicorn server whose connections come through the door, and which ends as described above.

    `is_alone`: nobody watches the process, so that a second signal is a wish to end at once. `longest`: seconds after which who watches
    it kills it.
    """
    import uvicorn

    from .uvicorn import MeshHTTP

    drain = drain_of(door.mesh)

    class Server(uvicorn.Server):
        signals = 0
        # It was started by `run`, so that the process ends with it; awaited in somebody's loop, it is one thing among others.
        has_process = False
        listeners: tuple[socket.socket, ...] = ()
        # Until when idle connections may still ask, once CLOSING has begun.
        idle_until: float | None = None

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.signals += 1
            if sig == signal.SIGQUIT or (is_alone and self.signals > 1):
                drain.end()
                self.should_exit = self.force_exit = True
                if self.has_process:
                    last_resort()
                return
            drain.begin(is_person=sig == signal.SIGINT, longest=longest)
            door.mesh.drain()
            if not self.started:
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

        def run(self, sockets: list[socket.socket] | None = None) -> None:
            self.has_process = True
            try:
                super().run(sockets)
            finally:
                disarm()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            self.listeners = tuple(sockets or ())
            await super().startup(sockets)

        async def on_tick(self, counter: int) -> bool:
            is_over = await super().on_tick(counter)
            if pulse is not None:
                pulse.beat()
            if is_over and not self.should_exit:
                # As many requests as one process is to serve: others take its place.
                drain.begin(may_wait=False)
            if drain.look() < Phase.CLOSING:
                return self.should_exit
            if self.idle_until is None:
                self.idle_until = time.monotonic() + drain.linger
                if is_alone and self.has_process:
                    last_resort(drain.left + LAST)
                await self.close_listeners()
            return self.should_exit or not self.server_state.connections or time.monotonic() >= self.idle_until

        async def close_listeners(self) -> None:
            """Nobody can connect any more, and who has connected by now will be answered."""
            last = [sock for listener in self.listeners for sock in _queue_of(listener)]
            for server in self.servers:
                server.close()
            loop = asyncio.get_running_loop()
            for sock in last:
                with contextlib.suppress(OSError):
                    await loop.connect_accepted_socket(lambda: self.protocol(loop), sock)

        def protocol(self, loop: asyncio.AbstractEventLoop) -> Any:
            kind: Any = self.config.http_protocol_class
            return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if pulse is not None:
                pulse.rest()
            if drain.begin(may_wait=False) < Phase.CLOSING:
                # Told to end by other means than ours.
                drain.look()
            for _ in range(0 if self.force_exit else ROUNDS):
                if not any(_is_readable(each) for each in self.server_state.connections):
                    break
                await asyncio.sleep(ROUND)
            # The annotation says int, and asyncio takes what is left as it is.
            self.config.timeout_graceful_shutdown = drain.left  # type: ignore[assignment]
            try:
                await super().shutdown(sockets)
            finally:
                drain.end()

    settings: dict[str, Any] = {
        "http": MeshHTTP.behind(door),
        "backlog": BACKLOG,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        # What a header says about where a call comes from counts for nothing here.
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE,
        **options,
    }
    settings.setdefault("headers", [("keep-alive", f"timeout={settings['timeout_keep_alive']}")])
    return Server(uvicorn.Config(app, **settings))


def _queue_of(listener: socket.socket) -> Generator[socket.socket, None, None]:
    """The connections that wait in a listener's queue."""
    for _ in range(BACKLOG):
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        yield sock


def _is_readable(connection: Any) -> bool:
    """Has something come on a connection of uvicorn's that nobody has looked at yet?"""
    transport = getattr(connection, "transport", None)
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.fileno() < 0:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


# --------------------------------------------------------------------------------------------------- gunicorn


def _gunicorn(
    mesh: Inside,
    load: Callable[[], Any],
    door: Door,
    pulse: Pulse,
    listeners: Listeners,
    workers: int,
    threads: int,
    *,
    is_asgi: bool,
) -> None:
    from gunicorn.app.base import BaseApplication
    from gunicorn.arbiter import Arbiter

    from . import gunicorn as ours

    kind = ours.ASGIWorker if is_asgi else ours.ThreadWorker if threads > 1 else ours.SyncWorker
    inbound = mesh.config.own.inbound
    settings: dict[str, Any] = {
        "bind": [f"fd://{sock.detach()}" for sock in listeners.serving],
        "worker_class": type(kind.__name__, (kind,), {"door": door, "pulse": pulse}),
        "workers": workers,
        "threads": 1 if is_asgi else threads,
        "keepalive": KEEP_ALIVE,
        "graceful_timeout": math.ceil(inbound.drain_wait + inbound.drain_grace),
        "backlog": BACKLOG,
        "worker_connections": ours.CONNECTIONS,
        "loglevel": logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(),
        # What a header says about where a call comes from counts for nothing here.
        "forwarded_allow_ips": "",
        "secure_scheme_headers": {},
        "control_socket_disable": True,
        "post_worker_init": lambda _: _start_in_worker(mesh, listeners, pulse),
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
        is_person = False

        def signal(self, sig: int, frame: FrameType | None) -> None:
            if os.getpid() != self.pid and sig in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                # A worker, right after its fork and before it has handlers of its own: it would note the signal down for nobody.
                raise SystemExit(0)
            if sig in (signal.SIGTERM, signal.SIGINT) and self.is_ending:
                sig = signal.SIGQUIT  # the second time: at once
            elif sig == signal.SIGINT:
                self.is_person = True
                sig = signal.SIGTERM
            self.is_ending = self.is_ending or sig == signal.SIGTERM
            super().signal(sig, frame)  # type: ignore[no-untyped-call]

        def kill_workers(self, sig: int) -> None:
            # Workers drain by both; by SIGINT nobody waits.
            super().kill_workers(signal.SIGINT if sig == signal.SIGTERM and self.is_person else sig)  # type: ignore[no-untyped-call]

    # What ran here until now would run twice after the fork, and say that the watcher's empty numbers are the service's.
    mesh.close()
    Watcher(Application()).run()  # type: ignore[no-untyped-call]


def _start_in_worker(mesh: Inside, listeners: Listeners, pulse: Pulse) -> None:
    try:
        mesh.start()
        mesh.keeper.start()
    except ListenError as error:
        log.warning("the metrics of worker %d are not served: %s", os.getpid(), error)
    except MeshError as error:
        from gunicorn.arbiter import Arbiter

        log.error("%s", error)
        raise SystemExit(Arbiter.WORKER_BOOT_ERROR) from error
    answer_probes(mesh, listeners.probe, pulse)
