"""How does gunicorn get mutual TLS, the peer, and a good end?

Worker classes for `gunicorn -k`: `SyncWorker`, `ThreadWorker` (gthread) and `ASGIWorker` (uvicorn in gunicorn's processes). The first
two give gunicorn a `MeshSocket` for every connection (`gunicorn_socket.py`). gunicorn is started without its own `--certfile`. Each
new connection takes the newest identity.

A worker ends by the table of `drain.py`: SIGTERM drains, SIGINT drains without the wait, SIGQUIT ends at once, as ever in gunicorn. A
second SIGTERM changes nothing: the arbiter itself says it again and again to workers that it has too many of. (`meshlib serve` makes a
SIGQUIT of the second one that it gets itself.) Started by gunicorn's own command, a drain takes no longer than `graceful_timeout`.

Ways into gunicorn: its worker classes are meant to be derived from; what is overridden or used are names without an underscore, and
`tests/server/test_pinned_names.py` holds them against the installed release. Of all: `handle_exit`, `init_signals`, `notify` (called in
every round of a worker's loop: the drain is looked after there). Of the two for WSGI: `accept` (the listener is handed on inside a
`_Listener`) and `load_wsgi` (to put the peer into the environ). Of sync: `run`, `wait` and `handle_request`. Of gthread: `handle` (no
thread before a request is there), `handle_request` (the last request of a connection whose peer's proof is not of today),
`enqueue_req` (no thread for a silent connection; a note of the time for all others), `finish_request` (back to the poller, or straight
back to work if what is decrypted already makes no socket readable; a connection that ends waits for its other end in the poller, where
gunicorn's own would hold up all others), `set_accept_enabled` (when the server ends: whoever has connected by then is answered),
`wait_for_and_dispatch_events`, `murder_keepalived` and `murder_pending` (who is too slow, or would not be let in any more). Both leave
the queues of the listeners alone when other workers go on, and count on `sockets`, `ppid`, `nr_conns` and `worker_connections`.

A request of gthread waits for its thread in gunicorn's own line, which is first come first served and knows no priorities. That time
counts: against the deadline, and as time of the call. But places, queue and priorities of the mesh are only given to what has a thread,
so that they mean little where there are fewer threads than places: a warning says so.

It does not speak HTTP/2. It sets no limit to the size of bodies. A sync worker has one call at a time, and one slow caller holds it for
as long as `slow.py` allows: `PATIENCE` for handshake and head, 20 seconds and 500 bytes a second for the body and for the answer. For
callers from anywhere, take gthread. No WSGI server can see that its client goes away while a handler runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from gunicorn.arbiter import Arbiter
from gunicorn.workers.base import Worker
from gunicorn.workers.gthread import TConn
from gunicorn.workers.gthread import ThreadWorker as GunicornThreadWorker
from gunicorn.workers.sync import SyncWorker as GunicornSyncWorker

from ..observe.probe import Pulse
from . import door as doors
from .door import ARRIVED, PATIENCE, Door, Standing
from .drain import LINGER, Drain, Phase, drain_of, last_resort
from .gunicorn_socket import MeshSocket, place_of

log = logging.getLogger("meshlib.server")

# What a connection is answered with that has no whole request yet: it goes back to the poller, and takes no thread.
WAIT: Final = object()

# Seconds until an idle connection is looked at again on which something has come in the moment it was to be closed.
AGAIN: Final = 0.1

# Seconds that a worker has that is to end at once: gunicorn itself takes 0.1 of them.
QUIT: Final = 0.5

# Connections of one worker with threads. gunicorn's own number, said here because it bounds what callers can make it hold: `slow.AHEAD`
# bytes for each, 64 MB.
CONNECTIONS: Final = 1000

# Connections that a worker still takes from the queue of a listener when it ends: more than any backlog holds.
MOST_LAST: Final = 8192

# Nobody waits at a listener.
EMPTY: Final = (errno.EAGAIN, errno.EWOULDBLOCK)

# Of the kernel's tcp_info, as much as is looked at.
TCP_INFO_SIZE: Final = 28

# Seconds that an ending worker gives the arbiter to close its listeners, where a terminal or a supervisor signals all of them at once.
ARBITER: Final = 0.2


class _Listener:
    """A listener whose connections come through the door."""

    __slots__ = ("_door", "_listener", "_name", "_place")

    def __init__(self, listener: Any, door: Door) -> None:
        self._listener = listener
        self._door = door
        self._name = listener.getsockname()
        # A connection's own end is where its listener is: what is asked once need not be asked for each.
        self._place = place_of(listener, door)

    def accept(self) -> tuple[MeshSocket, Any]:
        sock, address = self._listener.accept()
        # Of a UNIX socket there is none.
        return MeshSocket(sock, self._door, str(address[0]) if isinstance(address, tuple) else "", self._place), address

    def getsockname(self) -> Any:
        return self._name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)


class _Queue:
    """What was left in the queue of a listener when it was closed, as a listener."""

    __slots__ = ("_name", "_waiting")

    def __init__(self, listener: Any, door: Door, log: Any) -> None:
        through = _Listener(listener, door)
        self._name = through.getsockname()
        self._waiting: deque[tuple[MeshSocket, Any]] = deque()
        while len(self._waiting) < MOST_LAST:
            try:
                self._waiting.append(through.accept())
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                if error.errno not in EMPTY:
                    log.error("Whoever else waits at %s when this worker ends is not answered: %s", self._name, error)
                break
        # Nobody can connect from here on.
        listener.close()

    def accept(self) -> tuple[MeshSocket, Any]:
        if not self._waiting:
            raise BlockingIOError(errno.EAGAIN, "nobody is left")
        return self._waiting.popleft()

    def getsockname(self) -> Any:
        return self._name

    def __len__(self) -> int:
        return len(self._waiting)


def is_closed_above(listener: Any, parent: int) -> bool:
    """Has the arbiter closed its own end of a listener? It does when the whole server ends, and not for a worker that others replace.

    Where that can't be seen (no /proc, or the worker runs as somebody else), it is taken for the end, so that nobody is lost.
    """
    name = Path(f"socket:[{os.fstat(listener.fileno()).st_ino}]")
    try:
        for each in Path(f"/proc/{parent}/fd").iterdir():
            # Some of them are gone by now.
            with contextlib.suppress(FileNotFoundError):
                if each.readlink() == name:
                    return False
    except OSError:
        pass
    return True


def waiting_at(listener: Any) -> int:
    """How many wait in the queue of a listener; 0 where the system doesn't tell."""
    try:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    except (OSError, AttributeError):
        return 0
    # tcpi_unacked: of a listener it is the length of its queue.
    return int(struct.unpack_from("=I", info, 24)[0]) if len(info) >= TCP_INFO_SIZE else 0


class _Ending:
    """How workers end. `door` is set by `meshlib serve`; otherwise it is that of the process's latest mesh."""

    door: Door | None = None
    pulse: Pulse | None = None
    # Of this worker's process.
    _drain: Drain | None = None
    alive: bool
    cfg: Any
    sockets: Any

    @property
    def drain(self) -> Drain:
        if self._drain is None:
            self._drain = drain_of((self.door or doors.latest()).mesh)
        return self._drain

    def init_signals(self) -> None:
        super().init_signals()  # type: ignore[misc]
        signal.signal(signal.SIGINT, self.handle_exit)
        signal.siginterrupt(signal.SIGINT, False)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.door is None and not doors.has_latest():
            # Before the application was loaded.
            self.close_down(sig, frame)
            return
        mesh = (self.door or doors.latest()).mesh
        phase = self.drain.begin(is_person=sig == signal.SIGINT, longest=float(self.cfg.graceful_timeout))
        mesh.drain()
        if phase >= Phase.CLOSING:
            self.close_down(sig, frame)
        else:
            self.wake_up()

    def notify(self) -> None:
        super().notify()  # type: ignore[misc]
        if self.pulse is not None:
            self.pulse.begin()
        if (self.door is not None or doors.has_latest()) and self.drain.look() >= Phase.CLOSING and self.alive:
            self.close_down(signal.SIGTERM, None)

    def close_down(self, sig: int, frame: FrameType | None) -> None:
        """CLOSING begins: gunicorn's own end, within what is left of our time."""
        if self.door is not None or doors.has_latest():
            self.cfg.set("graceful_timeout", math.ceil(self.drain.left))
        super().handle_exit(sig, frame)  # type: ignore[misc]

    def wake_up(self) -> None:
        """The worker's loop looks at the drain now. A signal does that by itself where the loop waits in `select`."""


class _Mesh(_Ending):
    """What both kinds of worker for WSGI do alike."""

    wsgi: Any
    log: Any
    ppid: int

    def init_process(self) -> None:
        # The listeners of this process, as they are handed to gunicorn's own `accept`.
        self.through: dict[Any, Any] = {}
        super().init_process()  # type: ignore[misc]

    def accept(self, listener: Any) -> None:
        through = self.through.get(listener)
        if through is None:
            is_ours = isinstance(listener, _Queue)
            through = self.through[listener] = listener if is_ours else _Listener(listener, self.door or doors.latest())
        super().accept(through)  # type: ignore[misc]

    def close_listeners(self) -> list[_Queue]:
        """Whoever has connected by now is answered."""
        return [_Queue(listener, self.door or doors.latest(), self.log) for listener in self.sockets]

    def is_last(self) -> bool:
        """Does the whole server end? Otherwise the queues of the listeners are left to the workers that go on, or come."""
        until = time.monotonic() + ARBITER
        while self.sockets and os.getppid() == self.ppid and not is_closed_above(self.sockets[0], self.ppid):
            if time.monotonic() > until:
                return False
            time.sleep(ARBITER / 10)
        return True

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        # A handler's thread may take its time, and an application may catch what is raised in it.
        last_resort(QUIT)
        if self.door is not None or doors.has_latest():
            # gunicorn's `handle` takes our SystemExit for a failed request, and its `run` goes on: nobody else is taken.
            self.drain.end()
        super().handle_quit(sig, frame)  # type: ignore[misc]

    def load_wsgi(self) -> None:
        super().load_wsgi()  # type: ignore[misc]
        # An application without a mesh is no reason to start its worker again and again: raised here, it ends the arbiter, too.
        inbound = (self.door or doors.latest()).mesh.config.own.inbound
        threads = self.cfg.threads if isinstance(self, ThreadWorker) else 1
        if threads < inbound.in_flight and (inbound.adaptive is not None or inbound.priorities):
            log.warning(
                "`inbound.adaptive` and `inbound.priority` say little here: a worker has %d threads, which is less than its %d places "
                "(in_flight), so that calls wait for threads, first come first served. Give it more threads, or set "
                "`inbound.in_flight` below their number.",
                threads,
                inbound.in_flight,
            )
        self.wsgi = _Stamped(self.wsgi, self.drain)


class SyncWorker(_Mesh, GunicornSyncWorker):
    """One call at a time, one call per connection."""

    def handle_request(self, listener: Any, req: Any, client: Any, addr: Any) -> Any:
        client.end_head()
        result = super().handle_request(listener, req, client, addr)  # type: ignore[no-untyped-call]
        client.end_request(is_read=_is_read(req))
        return result

    def wait(self, timeout: float) -> Any:
        if not self.alive:
            return []
        leaving = self.drain.phase is Phase.LEAVING
        return super().wait(min(timeout, self.drain.left + 0.01) if leaving else timeout)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        super().run()  # type: ignore[no-untyped-call]
        if self.drain.phase is Phase.CLOSING and self.is_last():
            self.empty_queues()

    def empty_queues(self) -> None:
        """Answer who waits, one after the other, while the grace lasts.

        All workers take from the same queues. When ours is done of those who waited when closing began, we take who has come since, and
        close: were it left open, there would be no end to newcomers.
        """
        shares = {listener: math.ceil(waiting_at(listener) / max(1, self.cfg.workers)) for listener in self.sockets}
        while shares and self.drain.look() is not Phase.ENDED:
            for listener in tuple(shares):
                self.notify()
                shares[listener] -= 1
                if shares[listener] < 0 or not self.has_served(listener):
                    del shares[listener]
        if self.drain.phase is Phase.ENDED:
            return
        for last in self.close_listeners():
            while last and self.drain.look() is not Phase.ENDED:
                self.notify()
                self.accept(last)

    def has_served(self, listener: Any) -> bool:
        """One of those who wait; False if nobody does."""
        try:
            self.accept(listener)
        except OSError as error:
            if error.errno in EMPTY:
                return False
            if error.errno != errno.ECONNABORTED:
                raise
        return True


class ThreadWorker(_Mesh, GunicornThreadWorker):
    """A pool of threads and kept-alive connections: gthread.

    A thread is taken for a request that is there: its head, and the whole or the first 64 KiB of its body. Whoever is slower, with the
    handshake, the head or the body, waits in the poller; so it takes no thread to be slow, nor many connections to stop the worker.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        # Connections that have had their last answer, and until when they may last: until their other end has closed, too.
        self.parting: dict[TConn, float] = {}

    def notify(self) -> None:
        if self.pulse is not None:
            self.pulse.beat()
        super().notify()
        if self.alive and self.nr_conns >= self.worker_connections:
            self.make_room()

    def wake_up(self) -> None:
        self.method_queue.defer(lambda: None)  # type: ignore[no-untyped-call]

    def enqueue_req(self, conn: TConn) -> None:
        sock = conn.sock
        if sock.is_unheard and not sock.is_readable:
            # Just accepted, and silent: that takes no thread.
            sock.is_unheard = False
            self._await(conn)
            return
        sock.is_unheard = False
        # It may be a while until a thread has time.
        sock.queued = time.monotonic()
        super().enqueue_req(conn)  # type: ignore[no-untyped-call]

    def _await(self, conn: TConn) -> None:
        """Back to the poller, until more of its request comes."""
        sock = conn.sock
        sock.setblocking(False)
        # Not from now: a byte that is none of a request doesn't renew it.
        conn.timeout = sock.since + (PATIENCE if sock.is_unused else self.cfg.keepalive or PATIENCE)
        self.pending_conns.append(conn)
        self.poller.register(sock, selectors.EVENT_READ, partial(self.on_pending_socket_readable, conn))  # type: ignore[union-attr]

    def handle(self, conn: TConn) -> Any:
        sock = conn.sock
        try:
            if conn.parser is not None and (before := conn.parser.unreader.take_buffered()):
                sock.unread(before)
            if not sock.has_request():
                return WAIT
        except OSError as error:
            self.log.debug("Connection lost: %s", error)
            return False
        conn.data_ready = True
        sock.await_head()
        return super().handle(conn)  # type: ignore[no-untyped-call]

    def handle_request(self, req: Any, conn: TConn) -> Any:
        sock = conn.sock
        sock.end_head()
        sock.request = req
        if sock.standing is not Standing.GOOD:
            req.force_close()
        is_kept = super().handle_request(req, conn)  # type: ignore[no-untyped-call]
        sock.end_request(is_read=False)
        # In case it ended between the two looks.
        return is_kept and not sock.is_refused

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        result = fs.result() if not fs.cancelled() and fs.exception() is None else False
        if result is WAIT:
            self._await(conn)
        elif not result or conn.sock.is_broken:
            self._part(conn)
        elif conn.sock.has_pending:
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)  # type: ignore[no-untyped-call]

    # --- who is too slow

    def make_room(self) -> None:
        """No connection more may come in: the oldest goes that never had an answer. One whose head has come is the last choice."""
        unused = (conn for conn in self.pending_conns if conn.sock.is_unused)
        oldest = min(unused, key=lambda conn: (conn.sock.arrived > 0, conn.sock.since), default=None)
        if oldest is not None:
            self.pending_conns.remove(oldest)
            self._end(oldest)

    def murder_keepalived(self, force: bool = False) -> None:
        """Idle connections, of callers too that would not be let in any more."""
        now = time.monotonic()
        for conn in tuple(self.keepalived_conns):
            if conn.sock.standing is Standing.OVER:
                self.keepalived_conns.remove(conn)
                self._end(conn)
            elif conn.timeout <= now and not force and conn.sock.is_readable:
                # The next request came first.
                conn.timeout = now + AGAIN
        super().murder_keepalived(force)  # type: ignore[no-untyped-call]

    def murder_pending(self) -> None:
        """Connections that have not come to a whole request, and those that have had their last answer."""
        now = time.monotonic()
        for conn in tuple(self.pending_conns):
            until: float = now if conn.timeout is None else conn.timeout
            until = conn.sock.until or until
            if conn.sock.until is None and not self.alive:
                # The worker ends: what has not begun by now has a moment left.
                conn.timeout = until = min(until, now + LINGER)
            is_over = conn.sock.standing is Standing.OVER
            if is_over or (now > until and not conn.sock.is_readable):
                self.pending_conns.remove(conn)
                if is_over:
                    self._end(conn)
                    continue
                self._forget(conn)
                if conn.sock.expire():
                    self._part(conn)
                else:
                    self._drop(conn)
        for conn in [conn for conn, until in self.parting.items() if until < now]:
            del self.parting[conn]
            self._end(conn)

    # --- the end of a connection

    def _part(self, conn: TConn) -> None:
        """The last is said. What still comes is read and forgotten: closed at once, the connection could lose what was said."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            if not conn.sock.has_ended():
                self.parting[conn] = time.monotonic() + LINGER
                self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._part_further, conn))  # type: ignore[union-attr]
                return
        except (OSError, ValueError):
            pass
        self._drop(conn)

    def _part_further(self, conn: TConn, sock: MeshSocket) -> None:
        try:
            if not sock.has_ended():
                return
        except OSError:
            pass
        self.parting.pop(conn, None)
        self._end(conn)

    def _end(self, conn: TConn) -> None:
        self._forget(conn)
        self._drop(conn)

    def _forget(self, conn: TConn) -> None:
        with contextlib.suppress(OSError, KeyError, ValueError):
            self.poller.unregister(conn.sock)  # type: ignore[union-attr]

    def _drop(self, conn: TConn) -> None:
        self.nr_conns -= 1
        conn.close()  # type: ignore[no-untyped-call]

    # --- the end of the worker

    def wait_for_and_dispatch_events(self, timeout: float) -> None:
        if self.drain.phase is Phase.LEAVING:
            timeout = min(timeout, self.drain.left + 0.01)
        elif not self.alive:
            timeout = min(timeout, AGAIN)
        super().wait_for_and_dispatch_events(timeout)  # type: ignore[no-untyped-call]

    def set_accept_enabled(self, enabled: bool) -> None:
        super().set_accept_enabled(enabled)  # type: ignore[no-untyped-call]
        if enabled or self.alive or self.drain.phase is Phase.SERVING or not self.is_last():
            return
        for last in self.close_listeners():
            while last:
                self.accept(last)


class _Stamped:
    """The application as gunicorn calls it: with the connection's peer in every environ."""

    __slots__ = ("_app", "_drain")

    def __init__(self, app: Any, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        sock = environ.get("gunicorn.socket")
        if isinstance(sock, MeshSocket):
            if sock.standing is Standing.OVER:
                return sock.refuse(start_response)
            environ.update(sock.environ)
            if sock.arrived:
                environ[ARRIVED] = sock.arrived
            if sock.request is not None:
                start_response = _Last(sock.request, start_response, self._drain)
        return self._app(environ, start_response)


class _Last:
    """`start_response` on a connection that is kept: an answer that begins while the worker closes is its last, whenever it was asked."""

    __slots__ = ("_drain", "_request", "_start_response")

    def __init__(self, request: Any, start_response: Any, drain: Drain) -> None:
        self._request = request
        self._start_response = start_response
        self._drain = drain

    def __call__(self, *args: Any) -> Any:
        if self._drain.is_closing:
            self._request.force_close()
        return self._start_response(*args)


class ASGIWorker(_Ending, Worker):
    """uvicorn, one server per process of gunicorn's. For ASGI applications that want several processes."""

    def init_signals(self) -> None:
        # gunicorn's would swallow what uvicorn's graceful end needs; uvicorn sets TERM and INT by itself.
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, self.handle_usr1)
        signal.siginterrupt(signal.SIGUSR1, False)

    def notify(self) -> None:
        # uvicorn looks after the drain.
        Worker.notify(self)  # type: ignore[no-untyped-call]

    def run(self) -> None:
        from .serve import uvicorn_server

        async def notify() -> None:
            self.notify()

        server = uvicorn_server(
            self.wsgi,
            self.door or doors.latest(),
            pulse=self.pulse,
            is_alone=False,
            longest=float(self.cfg.graceful_timeout),
            backlog=self.cfg.backlog,
            timeout_keep_alive=self.cfg.keepalive,
            limit_max_requests=None if self.max_requests == sys.maxsize else self.max_requests,
            callback_notify=notify,
            timeout_notify=max(1, self.timeout // 2) if self.timeout else 30,
        )

        server.has_process = True  # type: ignore[attr-defined]

        async def serve() -> None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGQUIT, server.handle_exit, signal.SIGQUIT, None)
            await server.serve(sockets=[each.sock for each in self.sockets])

        factory = server.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(serve())
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)  # the arbiter gives up, instead of starting it for ever


def _is_read(req: Any) -> bool:
    """Has all of a request been read? Known where its length was told."""
    reader = getattr(getattr(req, "body", None), "reader", None)
    return getattr(reader, "length", None) == 0


__all__ = ["ASGIWorker", "MeshSocket", "SyncWorker", "ThreadWorker"]
